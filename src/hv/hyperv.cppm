// Hyper-V, as its guest sees it, on Microsoft's hypervisor and on those that play it (KVM, OpenVMM). Order of what
// install() does: guest identity, hypercall page, reference time; start(): SynIC of processor 0, what a VMBus needs,
// the synthetic timer; join(): SynIC of each further processor. What came up is given out by bus() and timer(). Below a
// Hyper-V that offers no VMBus, or whose VMBus does not answer, it is a clock, and the native drivers go on.
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

    /// The VMBus of an instance whose SynIC is on. Whether a host answers on it is found out by enumerate().
    class Bus {
      public:
        Bus(io::Executor& executor, const hyperv::ReferenceClock& clock) : clock_(clock), news_(executor) {}
        Bus(const Bus&) = delete;
        Bus& operator=(const Bus&) = delete;

        /// Connects, asks what is there, and lists the first channels of all devices by their relids. A bus that does
        /// not answer, or that this guest may not use, is a warning and an empty list.
        io::Task<Result<void>> enumerate(DeviceList& into);
        /// LateDevices: what the host offers afterwards, a device that it took away and offers again included.
        std::optional<SyntheticDevice> next_device();
        u32 new_dropped() {
            const auto dropped = static_cast<u32>(vmbus_.counters().offers_dropped);
            return dropped - std::exchange(dropped_, dropped);
        }
        io::Latch& news() { return news_; }

        hyperv::Vmbus& vmbus() { return vmbus_; }
        const hyperv::ReferenceClock& clock() const { return clock_; }

      private:
        friend class HyperV;
        const hyperv::ReferenceClock& clock_;
        hyperv::Vmbus vmbus_;
        io::Latch news_;
        hyperv::OfferListener listener_{
            .offered = [](void* self, const hyperv::Offer&) { static_cast<Bus*>(self)->news_.open(); },
            .dropped = [](void* self) { static_cast<Bus*>(self)->news_.open(); },
            .context = this};
        u32 dropped_ = 0; // offers that new_dropped() has told of
    };

    /// Synthetic timer 0 of each processor, of an instance that has what it needs: direct mode, or a SynIC to send its
    /// message.
    class Timer {
      public:
        Timer(Privileged& cpu, InterruptController& interrupts, hyperv::Synic& synic,
              const hyperv::ReferenceClock& clock, bool direct)
            : cpu_(cpu), interrupts_(interrupts), synic_(synic), clock_(clock), direct_(direct) {}

        /// On each processor that shall use it, once, after start() or join(). `handler` as an InterruptHandler.
        Result<void> start(InterruptHandler handler, void* context);
        /// On this processor: once, `length` from now (at least 100 ns); replaces what was set before.
        void arm(Nanoseconds length);
        std::string_view name() const { return direct_ ? "Hyper-V synthetic, direct" : "Hyper-V synthetic"; }

      private:
        friend class HyperV;
        void stop();
        Privileged& cpu_;
        InterruptController& interrupts_;
        hyperv::Synic& synic_;
        const hyperv::ReferenceClock& clock_;
        bool direct_;
        std::atomic<bool> started_ = false;     // on any processor
        std::optional<InterruptVector> vector_; // direct mode, one for all processors
    };

    HyperV() = default;
    HyperV(const HyperV&) = delete;
    HyperV& operator=(const HyperV&) = delete;

    static bool recognises(const Sightings& sightings) {
        const Sighting* sighting = sightings.find(VmGuest::hyperv);
        return sighting != nullptr && sighting->base != 0;
    }

    /// The way into the hypervisor: the processor's own unless a test brings another one, before install().
    void set_gate(const hyperv::Gate& gate) { gate_ = gate; }
    /// Error{not_supported}: no hypercalls here; nothing is left behind. A missing VMBus is no error.
    Result<void> install(Environment& environment);
    /// Processor 0's SynIC, the bus, the timer. What fails is given back and leaves a machine without it, with a
    /// warning.
    Result<void> start(Services& services);
    /// Processors: on each further processor, once, after start() and before the first probe. Nothing to do where there
    /// is no VMBus.
    Result<void> join(u32 cpu, io::Executor& executor);
    /// LeavesProcessors: on a processor that has joined: its SynIC off.
    void leave(u32 cpu);
    /// TearDown: the bus unloaded, this processor's SynIC off, time and hypercall pages given back. Bounded; works with
    /// interrupts off.
    void uninstall();

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return clock_name_; }

    /// nullptr: before start(), after uninstall(), and where SynIC or bus did not come up.
    Bus* bus() { return bus_started_ ? &*bus_ : nullptr; }
    /// nullptr: before start(), and where the host offers none that can be used.
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
