// When a queue's next event is due. An event for every answer costs an interrupt each; one after all answers lets the
// first ones wait for the last.
export module io.event_pacing;
import core.std;
import core.time;

export namespace fl::io {

/// For a transport whose device raises an event after a number of answers that the driver chooses. An event is due
/// after all outstanding answers, as long as whole batches arrive within `linger`; otherwise after three quarters, so
/// that a slow answer does not delay the others; and never before all commands of the last request can have been
/// answered, because no waiter can continue earlier. Answers that wait for the rest are found by the executor's tick.
class EventPacing {
  public:
    /// After a batch of answers that took longer than this, the event for the next two batches is requested before the
    /// whole batch is due; after another slow one for the next four, and so on.
    static constexpr Nanoseconds linger = 2'000'000;
    static constexpr u32 max_eager = 64;

    /// A command was sent. `first`: it is the first one of its request.
    inline void sent(bool first) { burst_ = first ? 1 : burst_ + 1; }
    /// A batch of answers has arrived. `now`: the time of the executor's turn.
    inline void arrived(Instant now) {
        if (armed_at_ == never) { // they arrived before the processor slept
            return;
        }
        if (eager_ != 0) {
            --eager_;
        } else if (now <= after(armed_at_, linger)) {
            next_eager_ = 1;
        } else {
            next_eager_ = std::min(next_eager_ * 2, max_eager);
            eager_ = next_eager_;
        }
        armed_at_ = never;
    }
    /// Number of answers, of `owed` outstanding ones, after which the event is due.
    inline u32 count(u32 owed) const {
        const u32 enough = owed < 2 || eager_ == 0 ? owed : owed - std::max(owed / 4, 1u);
        return std::max(enough, std::min(burst_, owed));
    }
    /// The event was requested. `found`: an answer was there already, so the processor does not sleep.
    inline void armed(bool found, Instant now) { armed_at_ = found ? never : now; }

  private:
    u32 next_eager_ = 1;
    u32 eager_ = 0; // remaining batches with an early event
    Instant armed_at_ = never;
    u32 burst_ = 1; // number of commands of the last request
};

} // namespace fl::io
