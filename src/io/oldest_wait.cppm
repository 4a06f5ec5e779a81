// Timeout detection common to all drivers. A request's timeout does not run while the request waits in a driver's
// queue, nor while the device has older ones. Only the oldest request held by the device is timed, from when it
// became the oldest:
//
//   lost    it has been the oldest for a full timeout, and the device has meanwhile answered more other requests
//           than reordering explains: it was dropped
//   silent  it has been the oldest for a full timeout, and the device has answered nothing for a full timeout
//
// So a slow device that still answers is never given up, however many requests it holds; a silent device is detected
// after one timeout; and if a device loses several requests, each is detected in turn. The bounds are in machine time
// and restart after a machine stop [io.executor Bound].
export module io.oldest_wait;
import core.std;
import core.time;
import io.executor;

export namespace fl::io {

/// One per queue. Its only cost per I/O is a number for each request (Seen::oldest) and a count of answers.
class OldestWait {
  public:
    enum class Finding : u8 { none, lost, silent };

    /// Input from a driver's tick.
    struct Seen {
        u64 oldest = 0;    // number of the oldest request held by the device, never reused; 0: none
        u64 in_flight = 0; // requests held by the device
        u64 answered = 0;  // requests answered so far
    };
    /// A request whose timeout has expired counts as lost after this many answers to other requests for each request
    /// that was under way when it became the oldest.
    static constexpr u64 max_passes = 4;

    /// Call once per tick. A finding is repeated in every tick until the driver has ended the request or restarts the
    /// timeout.
    Finding check(Executor& executor, const Seen& seen, Nanoseconds timeout) {
        if (seen.oldest == 0) {
            oldest_ = 0;
            return Finding::none;
        }
        if (seen.oldest != oldest_) {
            oldest_ = seen.oldest;
            wait_.emplace(executor, timeout);
            silence_ = wait_;
            answered_ = last_answered_ = seen.answered;
            passes_ = max_passes * seen.in_flight;
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
    /// Gives the oldest request another full timeout.
    inline void restart() { oldest_ = 0; }

  private:
    u64 oldest_ = 0;
    u64 answered_ = 0;             // value of Seen::answered when it became the oldest
    u64 passes_ = 0;               // answers to others after which it counts as lost
    u64 last_answered_ = 0;        // value at the last check()
    std::optional<Bound> wait_;    // since it became the oldest
    std::optional<Bound> silence_; // since the last answer
};

} // namespace fl::io
