// co_await io::run_on(executor, task): the task runs on another processor's executor, the caller goes on on its own.
export module io.run_on;
import core.std;
import core.result;
import core.time;
import io.task;
import io.executor;

export namespace fl::io {

/// One task sent to another executor; lives in the frame of the coroutine that waits. Three posts, each used once:
/// start (there), done (home) and, when the waiting frame dies first, cancel (there).
class RemoteCall {
  public:
    RemoteCall(const RemoteCall&) = delete;
    RemoteCall& operator=(const RemoteCall&) = delete;

    static constexpr Nanoseconds longest_answer = 30'000'000'000;

  protected:
    explicit RemoteCall(Executor& there) : there_(there) {}
    ~RemoteCall() = default;
    /// A task still under way is destroyed on its own processor before this returns, with all it waits for. First thing
    /// in the destructor of what holds the task and its value.
    void settle() {
        if (under_way_) {
            abandon();
        }
    }

    /// The coroutine that runs there and owns the task. Its promise's end is what `done` tells: nothing of it is left
    /// there then.
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

    /// Sends the runner on its way; `waiting` is resumed on the calling executor when the runner has ended, at once
    /// where nobody serves.
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

    Executor& there_;
    Executor* home_ = nullptr;
    Runner::promise_type* runner_ = nullptr; // used there alone, once it has been sent
    bool under_way_ = false;                 // used at home alone
    ReadyNode waiter_;
    Step start_;
    Step done_;
    Step cancel_;
    std::atomic<bool> cancelled_{false};
    std::atomic<bool> gone_{false}; // ended without `done`, which home does not take any more
};

template <class T>
class [[nodiscard]] RunOn final : RemoteCall {
  public:
    RunOn(Executor& there, Task<T> task) : RemoteCall(there), task_(std::move(task)) {}
    ~RunOn() { settle(); }

    bool await_ready() const { return false; }
    bool await_suspend(std::coroutine_handle<> waiting) {
        const Runner runner = run_there(*this);
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
    static Runner run_there(RunOn& self) {
        Task<T> task = std::move(self.task_); // it dies there, like everything it made
        self.value_.emplace(co_await std::move(task));
    }

    Task<T> task_;
    std::optional<T> value_;
};

/// Awaited inside an executor's loop: runs `task` on `there` from its first instruction to the destruction of its
/// frame; gives its value, Error{exhausted} when no frame could be had, or Error{device_gone} when `there` stops
/// serving before the task has ended (which is then destroyed). What the task refers to must live until then: as a rule
/// it is in the caller's frame. Destroying the waiting coroutine destroys the task on its own processor and waits for
/// that; a processor that has not answered after RemoteCall::longest_answer is a panic.
template <class T>
RunOn<T> run_on(Executor& there, Task<T> task) {
    return RunOn<T>(there, std::move(task));
}

} // namespace fl::io
