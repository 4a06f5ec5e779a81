// What a hypervisor's module has to be, as concepts: small ones that compose. A backend is a class that models
// `Backend`; every further concept is optional. Drivers use a backend's bus by its own type, without a virtual call;
// the kernel uses the chosen backend through one interface (boot.backend).
//
// That a type models a concept says what its instances may have; what this instance has is asked at run time. What
// works only after a start is an object of its own, and the backend gives a pointer to it: nullptr until it came up,
// and for ever where it did not. Functions of the backend itself (console, unplugging, tear-down, join) may be called
// on any instance at any time: they return an error, or do nothing, where there is nothing behind them. An install() or
// start() that fails gives back what it had taken.
//
// The life of a backend, in order:
//   1. B::recognises(sightings)      static; hv.list and the tests ask it
//   2. construction                  constexpr, empty: nothing is touched
//   3. install(environment)          once, at the entry or at the defined late point: hypercalls and shared pages work
//                                    from here on
//   4. tsc_hz(), console()           right after install, before a clock is calibrated
//   5. start(services)               once: interrupts and the executor exist; events work from here on
//   6. join(...)                     once on every further processor (Processors)
//   7. unplug(...)                   after the driver table has been applied, before any native bus is probed
//   8. bus()->enumerate(...)         inside the executor; then drivers use the bus and what it gives them
//      bus()->next_device()          from then on, when there is news() (LateDevices)
//   9. leave(...)                    on every processor that has joined, when the job is done
export module hv.backend;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.time;
import core.interrupt;
import core.log;
import core.cpuid;
import core.vector;
import io.executor;
import io.latch;
import io.task;
export import hv.detect;

export namespace fl::hv {

/// Physical memory as a backend sees it. The kernel's page tables are a model, a test's arrays another.
class PhysicalMemory {
  public:
    /// Where `size` bytes from `physical` (RAM, or a page that the hypervisor put somewhere) can be read and written,
    /// cached, not executable. Lasts for ever; mapping the same range twice gives the same address.
    virtual Result<std::byte*> map(u64 physical, u64 size) = 0;
    /// The physical address behind something in the kernel's image, its heap or its mappings.
    virtual u64 physical_of(const void* address) = 0;

  protected:
    ~PhysicalMemory() = default;
};

/// Privileged instructions, behind an interface so that a backend's logic runs on the host against a fake. MSRs fault
/// when they do not exist: only those that CPUID announces are touched. Not for the hot path.
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

  protected:
    ~Privileged() = default;
};

/// What there is at install(): page tables, frames, exception reports. No interrupts, no executor and no clock yet.
/// Everything outlives the backend.
struct Environment {
    const CpuidSnapshot& cpuid;
    const Sightings& sightings;
    DmaAllocator& memory;
    PhysicalMemory& physical;
    Privileged& cpu;
};

/// What there is more at start(). Everything outlives the backend.
struct Services {
    InterruptController& interrupts;
    io::Executor& executor;
    Nanoseconds timeout = 5'000'000'000; // bound of every wait for the other side
};

/// Tells time. Called after install(), any number of times. tsc_hz(): the time stamp counter's frequency, if the
/// hypervisor (or the processor) says it; nothing: calibrate. clock_name(): where that comes from, for the log
/// ("kvmclock", "cpuid 0x15").
template <class B>
concept Clock = requires(const B& b) {
    { b.tsc_hz() } -> std::same_as<std::optional<u64>>;
    { b.clock_name() } -> std::convertible_to<std::string_view>;
};

/// The host's text console. Asked once after install(); nullptr: the host gives none. The sink must work with
/// interrupts off and in a panic: it waits a bounded time for room and then drops.
template <class B>
concept Console = requires(B& b) {
    { b.console() } -> std::same_as<log::Sink*>;
};

/// A synthetic device as the bus shows it; drivers match `type`.
struct SyntheticDevice {
    FixedText<40> type;    // Xen: "vbd", "vif"; VMBus: the class GUID
    FixedText<64> address; // where the driver finds it: Xen: "51712" (below device/<type>); VMBus: the instance GUID
    u32 number = 0;        // Xen: the virtual device number; VMBus: the channel's id
};

/// As many as the machine has; what finds no memory is counted in `dropped`.
struct DeviceList {
    Vector<SyntheticDevice> list;
    u32 dropped = 0;

    void add(const SyntheticDevice& device) { dropped += list.push(device) ? 0 : 1; }
    u32 count() const { return static_cast<u32>(list.size()); }
    std::span<const SyntheticDevice> all() const { return {list.begin(), list.size()}; }
};

/// A bus of synthetic devices. enumerate(): awaited in the executor, every wait in it bounded. It appends what is there
/// in a stable order and connects nothing; an Error means that the bus itself cannot be asked.
template <class D>
concept DeviceBus = requires(D& bus, DeviceList& into) {
    { bus.enumerate(into) } -> std::same_as<io::Task<Result<void>>>;
};
/// bus(): nullptr until start() has brought it up, and where there is none. Drivers are given what it points to
/// (B::Bus), not the backend.
template <class B>
concept BusRoot = DeviceBus<typename B::Bus> && requires(B& b) {
    { b.bus() } -> std::same_as<typename B::Bus*>;
};

/// A bus whose devices come and go while the machine runs. next_device(): after enumerate(), in the executor; a device
/// that came since and was not given yet; nothing: none. new_dropped(): how many found no room in the bus since
/// enumerate(), or since this was asked last; they are never given. news(): opened when either may have something; one
/// task waits for it. The bus keeps what nobody asks for, within its own bound, and forgets a device that goes before
/// it was given.
template <class B>
concept LateDevices = BusRoot<B> && requires(typename B::Bus& bus) {
    { bus.next_device() } -> std::same_as<std::optional<SyntheticDevice>>;
    { bus.new_dropped() } -> std::same_as<u32>;
    { bus.news() } -> std::same_as<io::Latch&>;
};

/// Classes of emulated devices that a host may be asked to take away.
struct EmulatedClasses {
    bool disks = false; // IDE, all positions
    bool nics = false;
    bool nvme = false;

    constexpr bool any() const { return disks || nics || nvme; }
    /// Whether one of these is among the others, too.
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

/// Takes emulated devices away, for good. unplug(): after the driver table, before native buses are probed, at most
/// once. Error{not_supported}: this host does not know how, or the backend is not installed; nothing has changed then.
template <class B>
concept EmulatedDevices = requires(B& b, EmulatedClasses classes) {
    { b.unplug(classes) } -> std::same_as<Result<void>>;
};

/// Takes part on further processors. join(): called on the processor itself (cpu == this_processor() > 0), after
/// start() on the boot processor and before the first enumerate() and probe; its interrupts are on, its executor exists
/// and does not run yet. One processor at a time. An Error leaves this processor without the backend's events: it is
/// reported, and the processor is not used. Nothing to do, and no error, where nothing came up that other processors
/// take part in.
template <class B>
concept Processors = requires(B& b, u32 cpu, io::Executor& executor) {
    { b.join(cpu, executor) } -> std::same_as<Result<void>>;
};

/// What a backend may have to undo there. leave(): on a processor that has joined, when the job is done and before the
/// machine ends; nothing may arrive there afterwards.
template <class B>
concept LeavesProcessors = Processors<B> && requires(B& b, u32 cpu) {
    { b.leave(cpu) } -> std::same_as<void>;
};

/// Gives back what install(), start() and enumerate() took: shared pages, connections. uninstall(): at the end of the
/// machine's life, after the drivers' last use of it, on processor 0; bounded, no executor needed, interrupts on or
/// off. Nothing may be called afterwards. Nothing to do before install(), and the second time.
template <class B>
concept TearDown = requires(B& b) {
    { b.uninstall() } -> std::same_as<void>;
};

/// A one-shot timer of each processor. start(): on each processor that shall use it, once, after the backend's start()
/// or join(). arm(): on that processor, `length` nanoseconds from now; a new one replaces the old one. For machines
/// whose local APIC has no timer that is as cheap.
template <class T>
concept ProcessorTimer =
    requires(T& timer, const T& constant, InterruptHandler handler, void* context, Nanoseconds length) {
        { constant.name() } -> std::convertible_to<std::string_view>;
        { timer.start(handler, context) } -> std::same_as<Result<void>>;
        { timer.arm(length) } -> std::same_as<void>;
    };
/// timer(): nullptr until start() has brought up what it needs, and where the host gives none.
template <class B>
concept OneShotTimer = ProcessorTimer<typename B::Timer> && requires(B& b) {
    { b.timer() } -> std::same_as<typename B::Timer*>;
};

/// A hypervisor's module. `name` is what the log and the records call it; `guest` the VmGuest that it is chosen for.
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
