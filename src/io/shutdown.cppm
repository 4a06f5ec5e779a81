// Host-requested shutdown (a host's integration service): a driver reports the request here, the kernel's main task
// stops the job and flushes the disks, and the driver may then answer its host. Single processor: everything runs on
// one executor.
//
//   driver:     ask(...) is true  →  co_await rested()           →  (answers its host)  →  answered()
//   main task:  co_await asked()  →  (ends the job, flushes)    →  rest(result)
//               →  co_await was_answered(bound)  →  verdict
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

    /// `by`: static storage, for the log and the verdict. False: a shutdown has already been requested, and this
    /// caller must not wait in rested(), which has only one waiter.
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

    /// For the driver: waits until the main task has finished with the disks; at_rest() then says whether all
    /// acknowledged data is on stable storage. Has no bound of its own: the main task's waits are bounded, depending
    /// on the requests a slow disk still holds.
    auto rested() { return rested_.wait(); }
    bool at_rest() const { return at_rest_; }
    /// For the driver: reports that it has answered its host.
    void answered() { answered_.open(); }

    /// For the main task.
    auto asked() { return asked_.wait(); }
    /// For the main task: the disks are done; `good`: all acknowledged data is on stable storage.
    void rest(bool good) {
        at_rest_ = good;
        rested_.open();
    }
    /// For the main task: co_await -> false: the driver did not answer within the bound.
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
