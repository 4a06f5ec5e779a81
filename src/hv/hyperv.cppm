// Hyper-V, as its guest sees it, on Microsoft's hypervisor and on those that play it (KVM, OpenVMM). Order of what install() does: guest
// identity, hypercall page, reference time; start(): SynIC of processor 0; join(): SynIC of each further processor; enumerate(): the VMBus.
// Everything a driver needs hangs here. Below a Hyper-V that offers no VMBus, or whose VMBus does not answer, it is a clock and a way to report
// a crash, and the native drivers go on.
export module hv.hyperv;
import core.std;
import core.result;
import core.dma;
import core.interrupt;
import core.log;
import core.panic;
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

    HyperV() = default;
    HyperV(const HyperV&) = delete;
    HyperV& operator=(const HyperV&) = delete;

    static bool recognises(const Sightings& sightings) {
        const Sighting* sighting = sightings.find(VmGuest::hyperv);
        return sighting != nullptr && sighting->base != 0;
    }

    /// The way into the hypervisor: the processor's own unless a test brings another one, before install().
    void set_gate(const hyperv::Gate& gate) { gate_ = gate; }
    /// Error{not_supported}: no hypercalls here. A missing VMBus is no error.
    Result<void> install(Environment& environment);
    /// Processor 0's SynIC. What fails leaves a machine without a VMBus, with a warning.
    Result<void> start(Services& services);
    /// Processors: on each further processor, once, after start() and before the first probe. Nothing to do where there is no VMBus.
    Result<void> join(u32 cpu, io::Executor& executor);
    /// LeavesProcessors: on a processor that has joined: its SynIC off.
    void leave(u32 cpu);
    /// TearDown: the bus unloaded, this processor's SynIC off, time and hypercall pages given back. Bounded; works with interrupts off.
    void uninstall();

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return clock_name_; }
    u64 hypercalls() const { return hypercalls_.count(); }

    /// Connects, asks what is there, and lists the first channels of all devices by their relids. A bus that does not answer is a warning and an
    /// empty list.
    io::Task<Result<void>> enumerate(DeviceList& into);
    /// LateDevices: what the host offers afterwards, a device that it took away and offers again included.
    std::optional<SyntheticDevice> next_device();
    /// After start(), whether or not there is a bus: where there is none it never opens.
    io::Latch& news() {
        if (!news_) {
            panic("HyperV: news() before start()");
        }
        return *news_;
    }

    // OneShotTimer: synthetic timer 0 of each processor.
    bool timer_offered() const { return timer_offered_; }
    /// On each processor that shall use it, once, after start() or join(). `handler` as an InterruptHandler.
    Result<void> start_timer(InterruptHandler handler, void* context);
    /// On this processor: once, `length` from now (at least 100 ns); replaces what was set before.
    void arm_timer(Nanoseconds length);
    std::string_view timer_name() const { return timer_direct_ ? "Hyper-V synthetic, direct" : "Hyper-V synthetic"; }

    hyperv::Vmbus& vmbus() { return vmbus_; }
    hyperv::Synic& synic() { return synic_; }
    hyperv::Hypercalls& calls() { return hypercalls_; }
    const hyperv::ReferenceClock& clock() const { return clock_; }
    /// Whether SynIC and bus were started; false: there are no synthetic devices.
    bool has_bus() const { return bus_started_; }

  private:
    Result<void> install_hypercalls(Environment& environment);
    void find_clock(Environment& environment);
    Result<void> start_bus(Services& services);

    hyperv::Gate gate_;
    hyperv::Hypercalls hypercalls_;
    hyperv::Synic synic_;
    hyperv::Vmbus vmbus_;
    hyperv::ReferenceClock clock_;
    std::optional<io::Latch> news_; // from start() on
    hyperv::OfferListener listener_{.offered = [](void* self, const hyperv::Offer&) { static_cast<HyperV*>(self)->news().open(); },
                                    .context = this};
    Privileged* cpu_ = nullptr;
    DmaAllocator* memory_ = nullptr;
    io::Executor* executor_ = nullptr;
    InterruptController* interrupts_ = nullptr;
    u32 base_ = 0;
    u32 privileges_ = 0;
    u32 features_ = 0;
    u32 recommendations_ = 0;
    bool bus_offered_ = false;
    bool bus_started_ = false;
    bool auto_eoi_ = false;
    bool timer_offered_ = false;
    bool timer_direct_ = false;
    InterruptVector vector_{};
    std::optional<InterruptVector> timer_vector_;
    std::optional<u64> tsc_hz_;
    std::string_view clock_name_ = "none";
};
static_assert(Backend<HyperV> && Hypercalls<HyperV> && BusRoot<HyperV> && LateDevices<HyperV> && LeavesProcessors<HyperV> &&
              TearDown<HyperV> && OneShotTimer<HyperV>);

} // namespace fl::hv
