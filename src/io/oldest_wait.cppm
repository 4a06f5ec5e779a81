// Whether a device takes too long: the one rule of all drivers. A request's time-out does not run while the request
// waits in a driver's queue, nor behind others in the device. Only the oldest request that the device has is timed,
// from when it became the oldest:
//
//   lost    it has been the oldest for a whole time-out, and the device has answered so many others meanwhile that
//           their number does not explain it (a device may reorder requests): it has been passed over
//   silent  it has been the oldest for a whole time-out, and for a whole time-out the device has not answered anything
//
// So a device that is slow and answers is never given up, however many requests it has; a device that is silent is
// found after one time-out; and of several requests that a device loses each is found, one after the other. The bounds
// are in machine time and begin anew after a stop of the machine [io.executor Bound].
export module io.oldest_wait;
import core.std;
import core.time;
import io.executor;

export namespace fl::io {

/// One for each queue. Costs nothing on the way of an I/O but a number for each request (Oldest::id) and a count of
/// answers.
class OldestWait {
  public:
    enum class Finding : u8 { none, lost, silent };

    /// What a driver sees in its tick.
    struct Seen {
        u64 oldest = 0;    // the number of the oldest request that the device has, never used twice; 0: it has none
        u64 under_way = 0; // requests that the device has
        u64 answered = 0;  // requests that it has answered so far
    };
    /// Answers for each request under way that a request may wait for beyond its time-out.
    static constexpr u64 patience = 4;

    /// Once in each tick. What is found is found again in the next tick, until the driver has ended the request or
    /// `timeout` begins anew.
    Finding look(Executor& executor, const Seen& seen, Nanoseconds timeout) {
        if (seen.oldest == 0) {
            oldest_ = 0;
            return Finding::none;
        }
        if (seen.oldest != oldest_) {
            oldest_ = seen.oldest;
            wait_.emplace(executor, timeout);
            silence_ = wait_;
            answered_ = last_answered_ = seen.answered;
            passes_ = patience * seen.under_way;
            return Finding::none;
        }
        if (seen.answered != last_answered_) {
            last_answered_ = seen.answered;
            silence_.emplace(executor, timeout);
        }
        const Instant now = executor.now();
        if (!wait_->passed(now)) {
            return Finding::none;
        }
        return silence_->passed(now)                  ? Finding::silent
               : seen.answered - answered_ >= passes_ ? Finding::lost
                                                      : Finding::none;
    }
    /// The oldest request gets a whole time-out more.
    inline void restart() { oldest_ = 0; }

  private:
    u64 oldest_ = 0;
    u64 answered_ = 0;             // when it became the oldest
    u64 passes_ = 0;               // so many answers to others, and it has been passed over
    u64 last_answered_ = 0;        // when it was last looked at
    std::optional<Bound> wait_;    // since it became the oldest
    std::optional<Bound> silence_; // since the last answer
};

} // namespace fl::io
