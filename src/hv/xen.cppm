// Xen HVM and PVH guest support, on Xen or on KVM's emulation of it. install() sets up, in order: hypercall page,
// shared info page, the events of processor 0, grant table, XenStore's page; start(): the upcall vector, XenStore's
// events; join(): the events of each further processor. All services of Xen drivers are members of this class, except
// the consoles, which work from entry on (hv.xen.console, boot/entry.cpp).
export module hv.xen;
import core.std;
import core.result;
import core.interrupt;
import core.processor;
import core.time;
import core.wall_clock;
import io.executor;
import io.latch;
import io.task;
export import hv.backend;
export import hv.xen.hypercall;
export import hv.xen.clock;
export import hv.xen.events;
export import hv.xen.grants;
export import hv.xen.store;
export import hv.xen.bus;
export import hv.xen.console;

export namespace fl::hv {

/// Stops the other processors during a suspension.
class Parking {
  public:
    /// Afterwards they access nothing, until release(). Error{timed_out}: not all of them have stopped.
    virtual io::Task<Result<void>> park() = 0;
    /// Also after an error of park().
    virtual void release() = 0;

  protected:
    ~Parking() = default;
};

class Xen {
  public:
    static constexpr std::string_view name = "xen";
    static constexpr VmGuest guest = VmGuest::xen;
    /// Devices are found in XenStore and driven by events and grants, which are members of the backend: drivers
    /// therefore receive the backend itself.
    using Bus = Xen;

    /// How events are delivered on this processor, once started.
    enum class Upcall : u8 {
        none,
        vector,      // injected by Xen: no end-of-interrupt
        apic_vector, // through the local APIC: needs an end-of-interrupt
    };

    /// The single-shot timer of each virtual CPU, whose expiry comes as an event.
    class Timer {
      public:
        explicit Timer(Xen& xen) : xen_(xen) {}

        /// On each processor that uses the timer, once, after start() or join(). `handler`: as InterruptHandler.
        /// Error{not_supported}: the processor takes no events, or Xen has no such timer or does not tell the time.
        Result<void> start(InterruptHandler handler, void* context);
        /// Fires once on this processor, `length` ns from now; replaces a previously armed expiry. False: it will not
        /// fire.
        bool arm(Nanoseconds length);
        std::string_view name() const { return "Xen single-shot"; }

      private:
        friend class Xen;
        /// In another domain, on processor 0 while nothing else runs: the timers are not armed.
        void restart();
        void stop(u32 processor);

        Xen& xen_;
        InterruptHandler handler_ = nullptr;
        void* context_ = nullptr;
        // Each is written by its processor, and by processor 0 while that one is stopped.
        std::array<xen::Port, max_processors> ports_{};
    };

    Xen() = default;
    Xen(const Xen&) = delete;
    Xen& operator=(const Xen&) = delete;

    static bool recognises(const Sightings& sightings) { return sightings.has(VmGuest::xen); }

    /// Replaces the hypercall instruction, for tests; call before install().
    void set_gate(const xen::Gate& gate) { gate_ = gate; }
    /// Error{not_supported}: no hypercalls here, or Xen lacks a feature that a guest with its own page tables needs. A
    /// missing XenStore is not an error: there are no devices then.
    Result<void> install(Environment& environment);
    /// Sets up the upcall vector, and XenStore if it is present.
    Result<void> start(Services& services);

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return clock_name_; }
    /// EmulatedDevices: Xen's unplug protocol [xen-unplug]. Error{not_supported}: not installed, or the host refuses.
    Result<void> unplug(EmulatedClasses classes);
    /// StartsProcessors, by VCPUOP_initialise. 0 on KVM's emulation of Xen, which has no such call, and where firmware
    /// has used the processors before.
    u32 processor_count();
    Result<void> start_processor(u32 index, const ProcessorStart& state);
    void stop_processor(u32 index) { static_cast<void>(hypercalls_.stop_vcpu(index)); }
    /// Processors: events on each further processor. One whose events cannot be set up is used without: its queues'
    /// events arrive on processor 0.
    Result<void> join(u32 cpu, io::Executor& executor);
    /// LeavesProcessors: no event arrives on the processor from now on.
    void leave(u32 cpu) {
        kick_ports_[cpu].store(xen::Port::none, std::memory_order_relaxed);
        timer_.stop(cpu);
        events_.leave(cpu);
    }
    /// KicksProcessors, by an event channel to each processor: an interrupt that needs no end-of-interrupt.
    void take_kicks(InterruptHandler handler, void* context) {
        kick_handler_ = handler;
        kick_context_ = context;
    }
    bool kick(u32 cpu) {
        const xen::Port port = kick_ports_[cpu].load(std::memory_order_relaxed); // see open_kicks()
        return port != xen::Port::none && events_.send(port).has_value();
    }
    /// nullptr before start().
    Timer* timer() { return upcall_ != Upcall::none ? &timer_ : nullptr; }
    /// The system time of the calling processor's virtual CPU, in ns since the start of the domain; nothing: Xen does
    /// not tell it, or the processor has not joined.
    std::optional<u64> system_time() const;
    /// StolenTime: by a hypercall. Nothing: Xen does not tell it (KVM's emulation does not).
    std::optional<Nanoseconds> stolen();
    /// Does not count as a hypercall of the guest: any processor may call it.
    void yield() { xen::Hypercalls(gate_).call(xen::Hypercall::sched_op, to_underlying(xen::SchedOp::yield)); }
    /// nullptr before start(), and if XenStore is missing or unusable.
    Xen* bus() { return store_.started() ? this : nullptr; }
    io::Task<Result<void>> enumerate(DeviceList& into);
    /// LateDevices: only while bus() is not nullptr. The first call of changes() begins to watch.
    std::optional<SyntheticDevice> next_device() { return device_watch_->next(); }
    u32 new_dropped() { return device_watch_->new_dropped(); }
    io::Latch& changes() {
        device_watch_->start();
        return device_watch_->changes();
    }

    /// Suspends this guest, as its toolstack has requested: for `xl save`, for a migration. Returns once it goes on,
    /// and whether in another domain (true) or in the same one, because the toolstack has cancelled it. On an Error it
    /// was not suspended, or cannot use its devices any more. In another domain everything that Xen and the toolstack
    /// keep for a guest is set up anew; its devices are connected again by their drivers, afterwards.
    io::Task<Result<bool>> suspend(Parking& others);

    /// TearDown: releases nothing, as the domain ends. Logs what is in use; an error if all devices have gone and
    /// grants of theirs have not.
    void uninstall();

    /// Sleeps in the hypervisor until one of the (masked) events is pending or about `timeout_ns` have passed, without
    /// taking an interrupt. Interrupts of other devices do not end it, so use it only if all devices are Xen's.
    void idle_poll(std::span<const u32> ports, u64 timeout_ns) { static_cast<void>(events_.poll(ports, timeout_ns)); }

    xen::Hypercalls& calls() { return hypercalls_; }
    /// Valid once start() has set an upcall, i.e. upcall() is not `none`.
    xen::Events& events() { return events_; }
    xen::Grants& grants() { return grants_; }
    xen::Store& store() { return store_; }
    /// The page of the guest's console and its event channel; nullptr: it has none. Valid after install().
    std::byte* console_page() const { return console_page_; }
    xen::Port console_port() const { return console_port_; }
    /// The devices that drivers have attached.
    xen::BusDevices& devices() { return devices_; }
    /// By the driver of a device that it has left, with the front end's state closed: the toolstack may make it anew.
    void ended(const xen::BusDevice& device) {
        if (device_watch_) {
            device_watch_->ended(device.type(), device.number());
        }
    }
    /// What this guest shares with other domains now.
    struct InUse {
        u32 grants = 0; // entries, those in quarantine included
        u32 event_channels = 0;
        u32 watches = 0;
        friend constexpr bool operator==(const InUse&, const InUse&) = default;
    };
    InUse in_use() const { return {grants_.in_use(), events_.open_ports(), store_.watches()}; }
    Upcall upcall() const { return upcall_; }
    /// major << 16 | minor
    u32 version() const { return version_; }

  private:
    Result<void> install_hypercalls(Environment& environment, const Sighting& sighting);
    Result<void> install_shared_info(Environment& environment);
    Result<void> install_events(Environment& environment);
    u32 vcpu_of(u32 cpu);
    /// Of each processor, in all domains until now.
    std::array<Nanoseconds, max_processors> stolen_so_far();
    Result<void> join_events(u32 cpu);
    void open_kicks(u32 cpu);
    Result<void> install_grants(Environment& environment);
    Result<void> map_grant_frame(u32 frame);
    void install_store(Environment& environment);
    void install_console(Environment& environment);
    std::optional<u64> pvclock_hz() const { return xen::pvclock_hz(events_.info(0).time); }
    std::optional<UnixNanoseconds> time_of_day() const;
    void set_time_of_day(Instant now);
    Result<void> set_up_anew();
    void check_clock();
    void find_clock(const Environment& environment, const Sighting& sighting);

    xen::Gate gate_;
    xen::Hypercalls hypercalls_;
    Privileged* cpu_ = nullptr;
    u32 hypercall_msr_ = 0;
    u64 hypercall_page_ = 0; // physical; 0: the gate has none
    u64 shared_frame_ = 0;   // guest frame number of shared_
    xen::SharedInfo* shared_ = nullptr;
    xen::SharedWithVcpu* with_vcpus_ = nullptr; // max_processors of them
    u64 with_vcpus_frame_ = 0;                  // guest frame number of the first one
    u64 prepared_vcpus_ = 0; // bits: virtual CPUs that have been given a place before they were started
    static_assert(max_processors <= 64);
    u32 base_ = 0;                                             // of Xen's CPUID leaves
    std::array<Nanoseconds, max_processors> stolen_earlier_{}; // in the domains before this one
    std::optional<u32> starting_; // index of the virtual CPU that start_processor() has started last
    u32 version_ = 0;
    u32 features_ = 0;
    std::optional<u64> tsc_hz_;
    std::string_view clock_name_ = "none";
    Upcall upcall_ = Upcall::none;
    u8 upcall_vector_ = 0;
    InterruptHandler kick_handler_ = nullptr;
    void* kick_context_ = nullptr;
    // Of each processor's IPI port. Relaxed: no data depends on it.
    std::array<std::atomic<xen::Port>, max_processors> kick_ports_{};
    bool has_store_ = false;
    bool emulated_ = false; // by KVM: not Xen itself
    xen::Events events_;
    Timer timer_{*this};
    xen::Grants grants_;
    u64 grant_frame_ = 0; // guest frame number of the table's first frame
    xen::Store store_;
    std::byte* console_page_ = nullptr;
    xen::Port console_port_ = xen::Port::none;
    std::array<char, xen::store_payload_max> listing_{};
    xen::BusDevices devices_;
    std::optional<xen::DeviceWatch> device_watch_; // once the store has been started
};
static_assert(Backend<Xen> && EmulatedDevices<Xen> && LateDevices<Xen> && StartsProcessors<Xen> &&
              KicksProcessors<Xen> && LeavesProcessors<Xen> && TearDown<Xen> && OneShotTimer<Xen> && StolenTime<Xen>);

} // namespace fl::hv
