// The HBA's interrupt: one message or line for all ports. With a message and a single port in use the handler accesses
// nothing, and the port's turn clears the interrupt. Otherwise the handler finds the ports, keeps the causes and clears
// them.
//
//   atomic      ordering         written by  read by   orders
//   flag_       release/acquire  handler     the turn  causes_ of the same interrupt
//   causes_     relaxed          both        the turn  ordered by flag_
//   count_      relaxed          handler     the turn  same processor; may lag by one interrupt
//   accesses_   relaxed          handler     the turn  likewise
//   plugged_    relaxed          handler     the turn  ordered by flag_ of the port that is raised with it
export module drivers.ahci.interrupts;
import core.std;
import core.log;
import core.mmio;
import io.executor;
import drivers.ahci.protocol;
import drivers.ahci.port;

export namespace fl::drivers::ahci {

/// What the handler passes to a port's turn.
class PortEvents {
  public:
    explicit PortEvents(io::Executor& executor) : executor_(executor) {}

    /// From the handler. `causes`: bits of PxIS, already cleared; 0: unknown, and not cleared.
    void raise(io::Service& queue, u32 causes) {
        if (causes != 0) {
            causes_.fetch_or(causes, std::memory_order_relaxed);
        }
        count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        flag_.store(true, std::memory_order_release);
        executor_.raise(queue);
    }
    /// As if there had been an interrupt: for one that was lost. Not from the handler.
    void force() { flag_.store(true, std::memory_order_relaxed); }
    inline bool pending() const { return flag_.load(std::memory_order_acquire); }
    /// True: there was an interrupt since the last call.
    inline bool take() {
        return flag_.load(std::memory_order_relaxed) && flag_.exchange(false, std::memory_order_acquire);
    }
    /// The causes that the handler has cleared since the last call.
    inline u32 take_causes() { return causes_.exchange(0, std::memory_order_relaxed); }
    /// Interrupts so far, modulo 2^32.
    inline u32 count() const { return count_.load(std::memory_order_relaxed); }

  private:
    io::Executor& executor_;
    std::atomic<bool> flag_{false};
    std::atomic<u32> causes_{0};
    std::atomic<u32> count_{0};
};

/// Shared by the ports of one HBA. Ports are added before its interrupt is attached.
class HbaEvents {
  public:
    /// A port in use.
    void add(u32 number, PortEvents& events, io::Service& queue) {
        ports_[number] = {&events, &queue};
        used_ |= u32{1} << number;
    }
    /// An empty port, whose interrupts for a change of the link are enabled.
    void watch(u32 number) { watched_ |= u32{1} << number; }
    /// `message`: it is delivered by MSI, to nobody else.
    void open(Mmio abar, bool message) {
        abar_ = abar;
        alone_ = message && std::popcount(used_) == 1;
    }
    /// Whether the port's turn must clear the interrupt.
    inline bool alone() const { return alone_; }
    /// Register accesses of the handler since the last call.
    inline u64 take_accesses() { return accesses_.exchange(0, std::memory_order_relaxed); }

    static void handler(void* context) { static_cast<HbaEvents*>(context)->on_interrupt(); }

    /// From the turn of a port that had an interrupt without a cause of its own: looks for devices plugged into empty
    /// ports. They are not attached.
    void report_plugged(Port& through) {
        u32 ports = plugged_.exchange(0, std::memory_order_relaxed);
        if (alone_ && watched_ != 0) {
            ports |= clear_watched(through.read_pending() & watched_);
        }
        for (; ports != 0; ports &= ports - 1) {
            log::warning("ahci: the link of port {} has changed: a device plugged in there is not used before the "
                         "machine restarts",
                         std::countr_zero(ports));
        }
    }

  private:
    struct Used {
        PortEvents* events = nullptr;
        io::Service* queue = nullptr;
    };

    void on_interrupt() {
        if (alone_) {
            const Used& used = ports_[static_cast<u32>(std::countr_zero(used_))];
            return used.events->raise(*used.queue, 0);
        }
        Port first(abar_, 0);
        const u32 pending = first.read_pending();
        u64 accesses = 1;
        if (pending == ~u32{0}) { // the HBA is gone: each port finds that out itself
            for (u32 left = used_; left != 0; left &= left - 1) {
                const Used& used = ports_[static_cast<u32>(std::countr_zero(left))];
                used.events->raise(*used.queue, 0);
            }
            return;
        }
        for (u32 left = pending & used_; left != 0; left &= left - 1) {
            Port port(abar_, static_cast<u32>(std::countr_zero(left)));
            const auto causes = port.read<PortInterrupts>();
            if ((causes.raw & PortInterrupts::link) != 0) {
                port.write(sata_error, ~u32{0});
            }
            port.write(causes);
            accesses += port.accesses();
            ports_[port.number()].events->raise(*ports_[port.number()].queue, causes.raw);
        }
        if (const u32 changed = clear_watched(pending & watched_); changed != 0) {
            plugged_.fetch_or(changed, std::memory_order_relaxed);
            const Used& used = ports_[static_cast<u32>(std::countr_zero(used_))];
            used.events->raise(*used.queue, 0);
        }
        if (pending != 0) {
            first.clear_pending(pending);
            ++accesses;
        }
        accesses_.store(accesses_.load(std::memory_order_relaxed) + accesses, std::memory_order_relaxed);
    }
    u32 clear_watched(u32 ports) {
        for (u32 left = ports; left != 0; left &= left - 1) {
            Port port(abar_, static_cast<u32>(std::countr_zero(left)));
            port.clear_errors();
            port.clear_pending(port.bit());
        }
        return ports;
    }

    Mmio abar_;
    std::array<Used, max_ports> ports_{};
    u32 used_ = 0;
    u32 watched_ = 0;
    bool alone_ = false;
    std::atomic<u64> accesses_{0};
    std::atomic<u32> plugged_{0};
};

} // namespace fl::drivers::ahci
