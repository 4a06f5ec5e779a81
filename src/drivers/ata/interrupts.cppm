// What the interrupt handler of a channel passes to the executor's turn. An ISA line belongs to its channel alone, and
// the turn reads the registers. On a shared (PCI) line the handler has to read them, to find out which device
// interrupts; reading clears the interrupt, so the handler keeps what it read.
//
//   atomic      ordering         written by  read by   orders
//   flag_       release/acquire  handler     the turn  seen_ of the same interrupt
//   seen_       relaxed          both        the turn  ordered by flag_
//   count_      relaxed          handler     the turn  same processor; may lag by one interrupt
//   accesses_   relaxed          handler     the turn  likewise
export module drivers.ata.interrupts;
import core.std;
import core.log;
import core.text;
import core.time;
import io.executor;
import drivers.ata.protocol;
import drivers.ata.channel;

export namespace fl::drivers::ata {

template <PortAccess P>
class ChannelInterrupts {
  public:
    ChannelInterrupts(io::Executor& executor, P ports, ChannelPorts at)
        : executor_(executor), registers_(std::move(ports), at) {}

    /// Called before the handler is attached.
    void set_shared(bool shared) { shared_ = shared; }
    /// The handler. `queue`: raised if the interrupt is the channel's.
    void on_interrupt(io::Service& queue) {
        if (shared_) {
            const Outcome outcome = Channel<P>::poll_shared(registers_);
            accesses_.store(registers_.accesses(), std::memory_order_relaxed);
            if (!outcome.bus.interrupt()) {
                return; // of another device
            }
            if (outcome.ended) {
                seen_.store(1u << 16 | u32{outcome.bus.raw} << 8 | outcome.status.raw, std::memory_order_relaxed);
            }
        }
        count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        flag_.store(true, std::memory_order_release);
        executor_.raise(queue);
    }

    /// Before a command is issued: discards a stale answer to the last one.
    inline void discard() { seen_.store(0, std::memory_order_relaxed); }
    /// Whether there was an interrupt since the last take().
    inline bool pending() const { return flag_.load(std::memory_order_acquire); }
    /// True: there was one.
    inline bool take() {
        return flag_.load(std::memory_order_relaxed) && flag_.exchange(false, std::memory_order_acquire);
    }
    /// After take(): the state of the command, as read by the handler or from the registers.
    inline Outcome poll(Channel<P>& channel) {
        if (!shared_) {
            return channel.poll();
        }
        if (const u32 seen = seen_.exchange(0, std::memory_order_relaxed); seen != 0) {
            return {.ended = true, .status = {static_cast<u8>(seen)}, .bus = {static_cast<u8>(seen >> 8)}};
        }
        return {};
    }
    /// Interrupts of this channel so far, modulo 2^32.
    inline u32 count() const { return count_.load(std::memory_order_relaxed); }
    /// Register accesses of the handler so far.
    inline u64 accesses() const { return accesses_.load(std::memory_order_relaxed); }

  private:
    io::Executor& executor_;
    Registers<P> registers_; // the handler's own, with its own count
    bool shared_ = false;
    std::atomic<bool> flag_{false};
    std::atomic<u32> seen_{0}; // shared lines: 1<<16 | bus status<<8 | status of an ended command; 0: none
    std::atomic<u32> count_{0};
    std::atomic<u64> accesses_{0};
};

/// Finds commands that end without an interrupt. For the command under way, on the queue's processor.
template <PortAccess P>
class LostInterrupt {
  public:
    // without an interrupt for this long the command is polled in each tick
    static constexpr Nanoseconds after = 20'000'000;

    inline void sent(Instant now) {
        sent_at_ = now;
        ended_at_last_tick_ = false;
        busy_ = true;
    }
    inline Instant sent_at() const { return sent_at_; }
    /// Whether the command was in progress at the last look.
    bool busy() const { return busy_; }
    /// Commands that ended without an interrupt so far.
    u64 count() const { return count_; }
    /// The outcome of a command that has ended, if there is still no interrupt a tick after that was seen first. From
    /// then on each command's interrupt is cleared as if it were asserted. Logged with `disk` the first time.
    std::optional<Outcome> tick(Instant now, Channel<P>& channel, std::string_view disk) {
        if (now <= sent_at_ || now - sent_at_ < after) {
            return std::nullopt;
        }
        busy_ = channel.registers().alternate_status().in_progress();
        if (busy_ || !std::exchange(ended_at_last_tick_, true)) {
            return std::nullopt;
        }
        const Outcome outcome = channel.poll();
        busy_ = !outcome.ended;
        if (!outcome.ended) {
            return std::nullopt;
        }
        if (++count_ == 1) {
            log::warning("{}: a command ended without an interrupt", disk);
        }
        channel.set_clear_always(true);
        return outcome;
    }

  private:
    Instant sent_at_ = 0;
    bool ended_at_last_tick_ = false; // had ended then, but no interrupt was seen
    bool busy_ = true;
    u64 count_ = 0;
};

} // namespace fl::drivers::ata
