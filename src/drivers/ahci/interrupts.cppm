// The HBA's interrupt: one message or line for all ports. With a message and a single port in use the handler accesses
// nothing, and the port's turn clears the interrupt. Otherwise the handler finds the ports, keeps the causes and clears
// them. A change of the link of a port in use it does not clear, but masks: the HBA sends no command before PxSERR is
// cleared, and that is the recovery's business.
//
//   atomic      ordering         written by   read by   orders
//   flag_       release/acquire  handler      the turn  causes_ of the same interrupt
//   causes_     relaxed          both         the turn  ordered by flag_
//   count_      relaxed          handler      the turn  same processor; may lag by one interrupt
//   accesses_   relaxed          handler      the turn  likewise
//   used_       release/acquire  the turn     handler   ports_ of the same port
//   watched_    relaxed          the turn     handler   nothing: same processor
//   alone_      relaxed          the turn     both      nothing: same processor
//   changed_    relaxed          both         the turn  ordered by changes_ [io.executor Signal]
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

/// Shared by the ports of one HBA. Runs on the processor that takes its interrupt.
class HbaEvents {
  public:
    explicit HbaEvents(io::Executor& executor) : changes_(executor) {}

    /// A port in use.
    void add(u32 number, PortEvents& events, io::Service& queue) {
        ports_[number] = {&events, &queue};
        used_.fetch_or(bit(number), std::memory_order_release);
        choose_mode();
    }
    /// The port's disk is closed, and no longer told of interrupts.
    void remove(u32 number) {
        used_.fetch_and(~bit(number), std::memory_order_release);
        choose_mode();
    }
    /// A port without a disk in use, whose interrupts for a change of the link are enabled.
    void watch(u32 number) { watched_.fetch_or(bit(number), std::memory_order_relaxed); }
    /// False: it was not watched.
    bool unwatch(u32 number) {
        return (watched_.fetch_and(~bit(number), std::memory_order_relaxed) & bit(number)) != 0;
    }
    /// The interrupt is attached. `message`: it is delivered by MSI, to nobody else.
    void open(Mmio abar, bool message) {
        abar_ = abar;
        message_ = message;
        choose_mode();
    }
    /// Whether the port's turn must clear the interrupt.
    inline bool alone() const { return alone_.load(std::memory_order_relaxed); }
    /// Register accesses of the handler since the last call.
    inline u64 take_accesses() { return accesses_.exchange(0, std::memory_order_relaxed); }

    static void handler(void* context) { static_cast<HbaEvents*>(context)->on_interrupt(); }

    /// From the turn of a port that had an interrupt without a cause of its own: looks at the watched ports.
    void look_at_others(Port& through) {
        const u32 watched = watched_.load(std::memory_order_relaxed);
        if (alone() && watched != 0) {
            changed(clear_watched(through.read_pending() & watched));
        }
    }
    /// The link of watched ports has changed, or the disks of ports in use have closed; one bit each.
    void changed(u32 ports) {
        if (ports != 0) {
            changed_.fetch_or(ports, std::memory_order_relaxed);
            changes_.raise();
        }
    }
    /// Raised by changed().
    io::Signal& changes() { return changes_; }
    u32 take_changed() { return changed_.exchange(0, std::memory_order_relaxed); }

  private:
    struct Used {
        PortEvents* events = nullptr;
        io::Service* queue = nullptr;
    };
    static constexpr u32 bit(u32 number) { return u32{1} << number; }

    void choose_mode() {
        const bool alone = message_ && std::popcount(used_.load(std::memory_order_relaxed)) == 1;
        if (alone_.exchange(alone, std::memory_order_relaxed) && !alone) {
            on_interrupt(); // what the handler has left to the turn, and the turn has not cleared: no further message
        }
    }
    void on_interrupt() {
        const u32 ports = used_.load(std::memory_order_acquire);
        if (alone()) {
            const Used& used = ports_[static_cast<u32>(std::countr_zero(ports))];
            return used.events->raise(*used.queue, 0);
        }
        Port first(abar_, 0);
        const u32 pending = first.read_pending();
        u64 accesses = 1;
        if (pending == ~u32{0}) { // the HBA is gone: each port finds that out itself
            for (u32 left = ports; left != 0; left &= left - 1) {
                const Used& used = ports_[static_cast<u32>(std::countr_zero(left))];
                used.events->raise(*used.queue, 0);
            }
            return;
        }
        for (u32 left = pending & ports; left != 0; left &= left - 1) {
            Port port(abar_, static_cast<u32>(std::countr_zero(left)));
            const auto causes = port.read<PortInterrupts>();
            if ((causes.raw & PortInterrupts::link) != 0) {
                port.write(interrupt_enable, PortInterrupts::enabled & ~PortInterrupts::link);
            }
            port.write(causes);
            accesses += port.accesses();
            ports_[port.number()].events->raise(*ports_[port.number()].queue, causes.raw);
        }
        changed(clear_watched(pending & watched_.load(std::memory_order_relaxed)));
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
    bool message_ = false;
    std::array<Used, max_ports> ports_{};
    std::atomic<u32> used_{0};
    std::atomic<u32> watched_{0};
    std::atomic<bool> alone_{false};
    std::atomic<u64> accesses_{0};
    std::atomic<u32> changed_{0};
    io::Signal changes_;
};

} // namespace fl::drivers::ahci
