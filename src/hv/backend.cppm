// The interface of a hypervisor module, as small concepts that compose. A backend is a class that models `Backend`; all
// further concepts are optional. Drivers use a backend's bus by its concrete type, without virtual calls; the kernel
// uses the chosen backend through one interface (boot.backend).
//
// Modelling a concept says what instances of a type may offer; what an instance actually offers is queried at run time.
// A service that works only after a start is a separate object, and the backend returns a pointer to it: nullptr until
// the service is up, and always where it is unavailable. Functions of the backend itself (console, unplug, uninstall,
// join) may be called on any instance at any time: they return an error, or do nothing, if unsupported. An install() or
// start() that fails releases what it has acquired.
//
// The life of a backend, in order:
//   1. B::recognises(sightings)      static; called by hv.list and tests
//   2. construction                  constexpr, empty: touches no hardware
//   3. install(environment)          once, at entry or at the defined late point; afterwards hypercalls and shared
//                                    pages work
//   4. tsc_hz(), console()           right after install(), before a clock is calibrated
//   5. start(services)               once; interrupts and the executor exist, afterwards events work
//   6. join(...)                     once on each further processor (Processors)
//   7. unplug(...)                   after the driver table has been applied, before native buses are probed
//   8. bus()->enumerate(...)         in the executor; drivers then use the bus and its services
//      bus()->next_device()          afterwards, when changes() is opened (LateDevices)
//   9. leave(...)                    on each processor that has joined, when the job is done
export module hv.backend;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.time;
import core.interrupt;
import core.log;
import core.processor;
export import core.cpuid;
import core.vector;
import io.executor;
import io.latch;
import io.task;
export import hv.detect;

export namespace fl::hv {

/// Access to physical memory. Implemented by the kernel's page tables, and by arrays in tests.
class PhysicalMemory {
  public:
    /// Maps `size` bytes from `physical` (RAM, or a page placed by the hypervisor) readable, writable, cached, not
    /// executable; returns the virtual address. Permanent; mapping the same range twice yields the same address.
    virtual Result<std::byte*> map(u64 physical, u64 size) = 0;
    /// The physical address of an object in the kernel's image, heap or mappings.
    virtual u64 physical_of(const void* address) = 0;

  protected:
    ~PhysicalMemory() = default;
};

/// Privileged instructions. An interface, so that a backend's logic runs on the host against a fake. Access only MSRs
/// that CPUID reports: others fault. Not for the hot path.
class Privileged {
  public:
    virtual u64 read_msr(u32 msr) = 0;
    virtual void write_msr(u32 msr, u64 value) = 0;
    virtual u8 in8(u16 port) = 0;
    virtual u16 in16(u16 port) = 0;
    virtual u32 in32(u16 port) = 0;
    virtual void out8(u16 port, u8 value) = 0;
    virtual void out16(u16 port, u16 value) = 0;
    virtual void out32(u16 port, u32 value) = 0;
    /// What differs between processors: the rest is in the CpuidSnapshot.
    virtual CpuidRegisters cpuid_leaf(u32 leaf) = 0;

  protected:
    ~Privileged() = default;
};

/// Services available from install(): page tables, frames and exception reports, but no interrupts, executor or clock.
/// All objects outlive the backend.
struct Environment {
    const CpuidSnapshot& cpuid;
    const Sightings& sightings;
    DmaAllocator& memory;
    PhysicalMemory& physical;
    Privileged& cpu;
    /// False: Xen's FIFO event channels are withheld on the command line.
    bool fifo_events = true;
};

/// Additional services, available from start(). All objects outlive the backend.
struct Services {
    InterruptController& interrupts;
    io::Executor& executor;
    Nanoseconds timeout = 5'000'000'000; // bound of every wait for the host, in ns
};

/// Time source. Called after install(), any number of times. tsc_hz(): frequency of the time stamp counter in Hz as
/// reported by the hypervisor or the processor; nothing: calibrate. clock_name(): its source, for the log ("kvmclock",
/// "cpuid 0x15").
template <class B>
concept Clock = requires(const B& b) {
    { b.tsc_hz() } -> std::same_as<std::optional<u64>>;
    { b.clock_name() } -> std::convertible_to<std::string_view>;
};

/// The host's text console. Queried once after install(); nullptr: none. The sink must work with interrupts off and in
/// a panic: it waits a bounded time for room, then drops output.
template <class B>
concept Console = requires(B& b) {
    { b.console() } -> std::same_as<log::Sink*>;
};

/// A synthetic device as the bus reports it; drivers match `type`.
struct SyntheticDevice {
    FixedText<40> type;    // Xen: "vbd", "vif"; VMBus: the class GUID
    FixedText<64> address; // used by the driver: Xen: "51712" (below device/<type>); VMBus: the instance GUID
    u32 number = 0;        // Xen: virtual-device number; VMBus: channel id
};

/// Devices found, without a fixed limit; those for which memory ran out are counted in `dropped`.
struct DeviceList {
    Vector<SyntheticDevice> list;
    u32 dropped = 0;

    void add(const SyntheticDevice& device) { dropped += list.push(device) ? 0 : 1; }
    u32 count() const { return static_cast<u32>(list.size()); }
    std::span<const SyntheticDevice> all() const { return {list.begin(), list.size()}; }
};

/// A bus of synthetic devices. enumerate(): awaited in the executor; all its waits are bounded. Appends the present
/// devices in a stable order and connects none; an Error means that the bus itself does not work.
template <class D>
concept DeviceBus = requires(D& bus, DeviceList& into) {
    { bus.enumerate(into) } -> std::same_as<io::Task<Result<void>>>;
};
/// bus(): nullptr until start() has brought it up, and where there is none. Drivers receive the bus (B::Bus), not the
/// backend.
template <class B>
concept BusRoot = DeviceBus<typename B::Bus> && requires(B& b) {
    { b.bus() } -> std::same_as<typename B::Bus*>;
};

/// A bus with hotplug. next_device(): called after enumerate(), in the executor; returns a device that was added since
/// and has not been returned yet, or nothing. new_dropped(): number of devices for which the bus had no room since
/// enumerate() or the previous call; they are never returned. changes(): opened when either may have something to
/// report; one task waits for it. The bus queues added devices, up to a bound, until they are returned, and forgets
/// those that are removed before.
template <class B>
concept LateDevices = BusRoot<B> && requires(typename B::Bus& bus) {
    { bus.next_device() } -> std::same_as<std::optional<SyntheticDevice>>;
    { bus.new_dropped() } -> std::same_as<u32>;
    { bus.changes() } -> std::same_as<io::Latch&>;
};

/// Classes of emulated devices that a host can be asked to unplug.
struct EmulatedClasses {
    bool disks = false; // IDE, all positions
    bool nics = false;
    bool nvme = false;

    constexpr bool any() const { return disks || nics || nvme; }
    /// True if some class is in both sets.
    constexpr bool intersects(const EmulatedClasses& others) const {
        return (disks && others.disks) || (nics && others.nics) || (nvme && others.nvme);
    }
    constexpr EmulatedClasses& operator|=(const EmulatedClasses& others) {
        disks = disks || others.disks;
        nics = nics || others.nics;
        nvme = nvme || others.nvme;
        return *this;
    }
    friend constexpr bool operator==(const EmulatedClasses&, const EmulatedClasses&) = default;
};

/// Unplugs emulated devices permanently. unplug(): called at most once, after the driver table has been applied and
/// before native buses are probed. Error{not_supported}: the host cannot unplug, or the backend is not installed;
/// nothing has changed.
template <class B>
concept EmulatedDevices = requires(B& b, EmulatedClasses classes) {
    { b.unplug(classes) } -> std::same_as<Result<void>>;
};

/// Support for further processors. join(): called on the processor itself (cpu == this_processor() > 0), one processor
/// at a time, after start() on the boot processor and before the first enumerate() and probe. Interrupts are on; the
/// executor exists but does not run yet. On an Error the processor has no events of the backend: the error is reported
/// and the processor is not used. Succeeds without effect if the backend has no per-processor state.
template <class B>
concept Processors = requires(B& b, u32 cpu, io::Executor& executor) {
    { b.join(cpu, executor) } -> std::same_as<Result<void>>;
};

/// Starts processors by hypercall, in place of INIT and startup IPIs. On the boot processor, after start().
/// processor_count(): processors of this machine, the boot processor included, numbered 0 to count - 1; 0: this
/// instance cannot start any. start_processor(): `index` > 0, once, or again after stop_processor(); an Error if the
/// hypervisor refuses. stop_processor(): it executes nothing any more. yield(): lets another processor of this guest
/// run, if there are more of them than the host has; on any processor.
template <class B>
concept StartsProcessors = requires(B& b, u32 index, const ProcessorStart& state) {
    { b.processor_count() } -> std::same_as<u32>;
    { b.start_processor(index, state) } -> std::same_as<Result<void>>;
    { b.stop_processor(index) } -> std::same_as<void>;
    { b.yield() } -> std::same_as<void>;
};

/// Interrupts another processor without its local APIC. take_kicks(): once, before the first join(); `handler` runs on
/// each processor that is kicked, with interrupts off. kick(): on any processor; false: that one cannot be kicked so
/// now, because it has not joined, or has left, or the hypervisor refuses. A kick that follows another before the
/// handler has run may be merged with it.
template <class B>
concept KicksProcessors = Processors<B> && requires(B& b, u32 cpu, InterruptHandler handler, void* context) {
    { b.take_kicks(handler, context) } -> std::same_as<void>;
    { b.kick(cpu) } -> std::same_as<bool>;
};

/// Undoes join(). leave(): called on each processor that has joined, when the job is done and before the machine ends;
/// afterwards no events arrive on it.
template <class B>
concept LeavesProcessors = Processors<B> && requires(B& b, u32 cpu) {
    { b.leave(cpu) } -> std::same_as<void>;
};

/// Releases what install(), start() and enumerate() acquired: shared pages, connections. uninstall(): called on
/// processor 0 at the end of the machine's life, after the drivers' last use of the backend, with interrupts on or off;
/// bounded, needs no executor. No other call may follow. No effect before install() or when called twice.
template <class B>
concept TearDown = requires(B& b) {
    { b.uninstall() } -> std::same_as<void>;
};

/// A per-processor one-shot timer, for machines without a local APIC timer that is as cheap. start(): called once on
/// each processor that uses it, after the backend's start() or join(). arm(): on that processor, fires `length` ns from
/// now; replaces a previously armed expiry; false: it will not fire.
template <class T>
concept ProcessorTimer =
    requires(T& timer, const T& constant, InterruptHandler handler, void* context, Nanoseconds length) {
        { constant.name() } -> std::convertible_to<std::string_view>;
        { timer.start(handler, context) } -> std::same_as<Result<void>>;
        { timer.arm(length) } -> std::same_as<bool>;
    };
/// timer(): nullptr until start() has brought up what it needs, and where the host offers none.
template <class B>
concept OneShotTimer = ProcessorTimer<typename B::Timer> && requires(B& b) {
    { b.timer() } -> std::same_as<typename B::Timer*>;
};

/// Time for which the calling processor could have run and the host ran something else, in ns since some start. The
/// difference of two values counts; nothing: the host does not tell. stolen(): on any processor, from install() on.
template <class B>
concept StolenTime = requires(B& b) {
    { b.stolen() } -> std::same_as<std::optional<Nanoseconds>>;
};

/// A hypervisor module. `name`: used in the log and in records; `guest`: the VmGuest for which it is chosen.
template <class B>
concept Backend = Clock<B> && std::default_initializable<B> &&
                  requires(B& b, const Sightings& sightings, Environment& environment, Services& services) {
                      { B::name } -> std::convertible_to<std::string_view>;
                      { B::guest } -> std::convertible_to<VmGuest>;
                      { B::recognises(sightings) } -> std::same_as<bool>;
                      { b.install(environment) } -> std::same_as<Result<void>>;
                      { b.start(services) } -> std::same_as<Result<void>>;
                  };

} // namespace fl::hv
