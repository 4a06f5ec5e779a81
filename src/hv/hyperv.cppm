// Hyper-V guest support, on Microsoft's hypervisor and on those that emulate its interface (KVM, OpenVMM). install()
// sets up, in order: guest identity, hypercall page, reference time; start(): SynIC of processor 0, what the VMBus
// needs, the synthetic timer; join(): SynIC of each further processor. The services that are up are returned by bus()
// and timer(). If Hyper-V offers no VMBus, or its VMBus does not answer, it serves as a clock only, and native drivers
// are used.
export module hv.hyperv;
import core.std;
import core.result;
import core.dma;
import core.interrupt;
import core.log;
import core.processor;
import core.time;
import io.executor;
import io.latch;
import io.task;
export import hv.backend;
export import hv.hyperv.clock;
export import hv.hyperv.hypercall;
export import hv.hyperv.synic;
export import hv.hyperv.vmbus;

export namespace fl::hv {

class HyperV {
  public:
    static constexpr std::string_view name = "hyperv";
    static constexpr VmGuest guest = VmGuest::hyperv;

    /// The VMBus of an instance whose SynIC is enabled. enumerate() finds out whether a host answers on it.
    class Bus {
      public:
        Bus(io::Executor& executor, const hyperv::ReferenceClock& clock) : clock_(clock), changes_(executor) {}
        Bus(const Bus&) = delete;
        Bus& operator=(const Bus&) = delete;

        /// Connects, requests the offers, and lists the primary channels of all devices by relid. If the bus does not
        /// answer, or refuses this guest, logs a warning and leaves the list empty.
        io::Task<Result<void>> enumerate(DeviceList& into);
        /// LateDevices: devices offered since enumerate(), including those that were rescinded and are offered again.
        std::optional<SyntheticDevice> next_device();
        u32 new_dropped() {
            const auto dropped = static_cast<u32>(vmbus_.counters().offers_dropped);
            return dropped - std::exchange(dropped_, dropped);
        }
        io::Latch& changes() { return changes_; }

        hyperv::Vmbus& vmbus() { return vmbus_; }
        const hyperv::ReferenceClock& clock() const { return clock_; }

      private:
        friend class HyperV;
        const hyperv::ReferenceClock& clock_;
        hyperv::Vmbus vmbus_;
        io::Latch changes_;
        hyperv::OfferListener listener_{
            .offered = [](void* self, const hyperv::Offer&) { static_cast<Bus*>(self)->changes_.open(); },
            .dropped = [](void* self) { static_cast<Bus*>(self)->changes_.open(); },
            .context = this};
        u32 dropped_ = 0; // offers already reported by new_dropped()
    };

    /// Synthetic timer 0 of each processor, if its requirements are met: direct mode, or a SynIC to deliver its
    /// message.
    class Timer {
      public:
        Timer(Privileged& cpu, InterruptController& interrupts, hyperv::Synic& synic,
              const hyperv::ReferenceClock& clock, bool direct)
            : cpu_(cpu), interrupts_(interrupts), synic_(synic), clock_(clock), direct_(direct) {}

        /// On each processor that uses the timer, once, after start() or join(). `handler`: as InterruptHandler.
        Result<void> start(InterruptHandler handler, void* context);
        /// Fires once on this processor, `length` ns from now (at least 100 ns); replaces a previously armed expiry.
        bool arm(Nanoseconds length);
        std::string_view name() const { return direct_ ? "Hyper-V synthetic, direct" : "Hyper-V synthetic"; }

      private:
        friend class HyperV;
        void stop();
        Privileged& cpu_;
        InterruptController& interrupts_;
        hyperv::Synic& synic_;
        const hyperv::ReferenceClock& clock_;
        bool direct_;
        std::atomic<bool> started_ = false;     // on at least one processor
        std::optional<InterruptVector> vector_; // direct mode, one for all processors
    };

    HyperV() = default;
    HyperV(const HyperV&) = delete;
    HyperV& operator=(const HyperV&) = delete;

    static bool recognises(const Sightings& sightings) {
        const Sighting* sighting = sightings.find(VmGuest::hyperv);
        return sighting != nullptr && sighting->base != 0;
    }

    /// Replaces the hypercall instruction, for tests; call before install().
    void set_gate(const hyperv::Gate& gate) { gate_ = gate; }
    /// Error{not_supported}: no hypercalls here; nothing stays set up. A missing VMBus is not an error.
    Result<void> install(Environment& environment);
    /// Brings up processor 0's SynIC, the bus and the timer. Parts that fail are released, with a warning, and the
    /// machine runs without them.
    Result<void> start(Services& services);
    /// Processors: on each further processor, once, after start() and before the first probe. No effect without a
    /// VMBus.
    Result<void> join(u32 cpu, io::Executor& executor);
    /// LeavesProcessors: disables the SynIC of a processor that has joined.
    void leave(u32 cpu);
    /// TearDown: unloads the bus, disables this processor's SynIC, and withdraws the reference time and hypercall
    /// pages. Bounded; works with interrupts off.
    void uninstall();

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return clock_name_; }

    /// nullptr before start(), after uninstall(), and if SynIC or bus did not start.
    Bus* bus() { return bus_started_ ? &*bus_ : nullptr; }
    /// nullptr before start(), and if the host offers no usable timer.
    Timer* timer() { return timer_ ? &*timer_ : nullptr; }

    hyperv::Synic& synic() { return synic_; }
    hyperv::Hypercalls& calls() { return hypercalls_; }
    const hyperv::ReferenceClock& clock() const { return clock_; }

  private:
    Result<void> install_hypercalls(Environment& environment);
    void withdraw_pages();
    void find_clock(Environment& environment);
    Result<void> start_bus(Services& services);

    hyperv::Gate gate_;
    hyperv::Hypercalls hypercalls_;
    hyperv::Synic synic_;
    hyperv::ReferenceClock clock_;
    std::optional<Bus> bus_;
    std::optional<Timer> timer_;
    Privileged* cpu_ = nullptr;
    DmaAllocator* memory_ = nullptr;
    u32 base_ = 0;
    u32 privileges_ = 0;
    u32 features_ = 0;
    u32 recommendations_ = 0;
    bool installed_ = false;
    bool bus_offered_ = false;
    bool bus_started_ = false;
    bool auto_eoi_ = false;
    InterruptVector vector_{};
    std::optional<u64> tsc_hz_;
    std::string_view clock_name_ = "none";
};
static_assert(Backend<HyperV> && BusRoot<HyperV> && LateDevices<HyperV> && LeavesProcessors<HyperV> &&
              TearDown<HyperV> && OneShotTimer<HyperV>);

} // namespace fl::hv
