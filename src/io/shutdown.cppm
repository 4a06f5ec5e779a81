// An orderly end that somebody outside asks for (a host's integration service): the one who hears of it says so here,
// the kernel's main task stops the job and brings the disks to rest, and then the one who was asked may answer. One
// processor: all of it on one executor.
//
//   asked by a driver:   ask(...) is true  →  co_await rested()       →  (answers its host)  →  answered()
//   the main task:       co_await asked()  →  (ends the job, flushes)  →  rest(result)
//                        →  co_await was_answered(bound)  →  verdict
export module io.shutdown;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.latch;

export namespace fl::io {

class Shutdown {
  public:
    explicit Shutdown(Executor& executor) : asked_(executor), rested_(executor), answered_(executor) {}

    /// `by`: static storage, for the log and the verdict. False: an end has been asked for already. Then there is
    /// nothing to wait for: rested() is for the first one to ask, alone.
    [[nodiscard]] bool ask(std::string_view by) {
        if (requested_) {
            return false;
        }
        requested_ = true;
        by_ = by;
        asked_.open();
        return true;
    }
    bool requested() const { return requested_; }
    std::string_view by() const { return by_; }

    /// For the driver: waits until the main task is done with the disks; then at_rest() says whether everything
    /// acknowledged is on stable storage. Without a bound of its own: the main task's waits have theirs, which depend
    /// on how many requests a slow disk still has.
    auto rested() { return rested_.wait(); }
    bool at_rest() const { return at_rest_; }
    void answered() { answered_.open(); }

    /// For the main task.
    auto asked() { return asked_.wait(); }
    void rest(bool good) {
        at_rest_ = good;
        rested_.open();
    }
    auto was_answered(const Bound& bound) { return answered_.wait(bound); }
    /// Ends the main task's wait in asked() without a request: the job is done.
    void stop_waiting() { asked_.open(); }

  private:
    Latch asked_;
    Latch rested_;
    Latch answered_;
    std::string_view by_;
    bool requested_ = false;
    bool at_rest_ = false;
};

} // namespace fl::io
