// co_await io::run_on(executor, task): runs the task on another processor's executor, while the caller's executor
// continues.
export module io.run_on;
import core.std;
import core.result;
import core.time;
import io.task;
import io.executor;

export namespace fl::io {

/// A task sent to another executor; lives in the frame of the waiting coroutine. Three posts, each used once: start
/// (remote), done (home) and, if the waiting frame is destroyed first, cancel (remote).
class RemoteCall {
  public:
    RemoteCall(const RemoteCall&) = delete;
    RemoteCall& operator=(const RemoteCall&) = delete;

    static constexpr Nanoseconds longest_answer = 30'000'000'000;

  protected:
    explicit RemoteCall(Executor& there) : target_(there) {}
    ~RemoteCall() = default;
    /// Destroys a task still under way, with everything it awaits, on its own processor before returning. Must come
    /// first in the destructor of the class that holds the task and its value.
    void settle() {
        if (in_flight_) {
            abandon();
        }
    }

    /// The remote coroutine that owns the task. `done` is posted when its promise is destroyed: nothing of it is left
    /// on the remote processor then.
    struct Runner {
        struct promise_type : PoolAllocated, ReadyNode, RemoteTask {
            RemoteCall& call;
            explicit promise_type(RemoteCall& e) : call(e) {}
            promise_type(const promise_type&) = delete;
            promise_type& operator=(const promise_type&) = delete;
            ~promise_type() {
                unlink();
                call.ended();
            }
            Runner get_return_object() noexcept { return {this}; }
            static Runner get_return_object_on_allocation_failure() noexcept { return {}; }
            std::suspend_always initial_suspend() const noexcept { return {}; }
            std::suspend_never final_suspend() const noexcept { return {}; }
            void return_void() const noexcept {}
            void unhandled_exception() const noexcept {}
        };
        promise_type* promise = nullptr;
    };

    /// Starts the runner; `waiting` is resumed on the calling executor when the runner has ended, or at once if the
    /// remote executor has stopped serving.
    void send(Runner runner, std::coroutine_handle<> waiting);

  private:
    struct Step : Post {
        RemoteCall* call = nullptr;
    };
    static void on_start(Post& post);
    static void on_done(Post& post);
    static void on_cancel(Post& post);
    void ended();
    void abandon();

    Executor& target_;
    Executor* home_ = nullptr;
    Runner::promise_type* runner_ = nullptr; // accessed only on the remote processor once sent
    bool in_flight_ = false;                 // accessed only on the home processor
    ReadyNode waiter_;
    Step start_;
    Step done_;
    Step cancel_;
    std::atomic<bool> cancelled_{false};
    std::atomic<bool> gone_{false}; // ended without `done`, because the home executor has stopped serving
};

template <class T>
class [[nodiscard]] RunOn final : RemoteCall {
  public:
    RunOn(Executor& there, Task<T> task) : RemoteCall(there), task_(std::move(task)) {}
    ~RunOn() { settle(); }

    bool await_ready() const { return false; }
    bool await_suspend(std::coroutine_handle<> waiting) {
        const Runner runner = start_remote(*this);
        if (runner.promise == nullptr) {
            value_.emplace(Error{Code::exhausted,
                                 "no coroutine frame left to run a task on another processor: a larger io::FramePool"});
            return false;
        }
        send(runner, waiting);
        return true;
    }
    T await_resume() {
        if (!value_) {
            return Error{Code::device_gone, "the processor that a task was sent to has stopped"};
        }
        return std::move(*value_);
    }

  private:
    static Runner start_remote(RunOn& self) {
        Task<T> task = std::move(self.task_); // destroyed on the remote processor, like everything it creates
        self.value_.emplace(co_await std::move(task));
    }

    Task<T> task_;
    std::optional<T> value_;
};

/// Awaited in an executor's loop: runs `task` on `there` from its first instruction to the destruction of its frame.
/// Returns its value, Error{exhausted} if no frame was available, or Error{device_gone} if `there` stops serving
/// before the task has ended (it is then destroyed). Everything the task refers to must live until then; normally it
/// is in the caller's frame. Destroying the waiting coroutine destroys the task on its own processor and waits for
/// that; no answer within RemoteCall::longest_answer (nanoseconds) causes a panic.
template <class T>
RunOn<T> run_on(Executor& there, Task<T> task) {
    return RunOn<T>(there, std::move(task));
}

} // namespace fl::io
