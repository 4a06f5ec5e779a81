// Host-requested shutdown (a host's integration service): a driver reports the request here, the kernel's main task
// stops the job and flushes the disks, and the driver may then answer its host. Single processor: everything runs on
// one executor.
//
//   driver:     request(...) is true  →  co_await await_quiesced()  →  (answers its host)  →  answered()
//   main task:  co_await await_request()  →  (ends the job, flushes)  →  quiesced(result)
//               →  co_await await_answer(bound)  →  verdict
export module io.shutdown;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.latch;

export namespace fl::io {

class Shutdown {
  public:
    /// How the machine ends afterwards.
    enum class End : u8 { off, restart };

    explicit Shutdown(Executor& executor) : request_latch_(executor), quiesced_(executor), answered_(executor) {}

    /// `by`: static storage, for the log and the verdict. False: a shutdown has already been requested, and this
    /// caller must not wait in await_quiesced(), which has only one waiter.
    [[nodiscard]] bool request(std::string_view by, End end = End::off) {
        if (requested_) {
            return false;
        }
        requested_ = true;
        by_ = by;
        end_ = end;
        request_latch_.open();
        return true;
    }
    bool requested() const { return requested_; }
    std::string_view by() const { return by_; }
    End end() const { return end_; }

    /// For the driver: waits until the main task has finished with the disks; flushed() then says whether all
    /// acknowledged data is on stable storage. Has no bound of its own: the main task's waits are bounded, depending
    /// on the requests a slow disk still holds.
    auto await_quiesced() { return quiesced_.wait(); }
    bool flushed() const { return flushed_; }
    /// For the driver: reports that it has answered its host.
    void answered() { answered_.open(); }

    /// For the main task.
    auto await_request() { return request_latch_.wait(); }
    /// For the main task: the disks are done; `good`: all acknowledged data is on stable storage.
    void quiesced(bool good) {
        flushed_ = good;
        quiesced_.open();
    }
    /// For the main task: co_await -> false: the driver did not answer within the bound.
    auto await_answer(const Bound& bound) { return answered_.wait(bound); }
    /// Ends the main task's wait in await_request() without a request: the job is done.
    void stop_waiting() { request_latch_.open(); }

  private:
    Latch request_latch_;
    Latch quiesced_;
    Latch answered_;
    std::string_view by_;
    End end_ = End::off;
    bool requested_ = false;
    bool flushed_ = false;
};

} // namespace fl::io
