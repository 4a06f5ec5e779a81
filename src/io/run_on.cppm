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
class Errand {
  public:
    Errand(const Errand&) = delete;
    Errand& operator=(const Errand&) = delete;

    static constexpr Nanoseconds longest_answer = 30'000'000'000;

  protected:
    explicit Errand(Executor& there) : there_(there) {}
    ~Errand() = default;
    /// A task still under way is destroyed on its own processor before this returns, with all it waits for. First thing
    /// in the destructor of what holds the task and its value.
    void settle() {
        if (under_way_) {
            abandon();
        }
    }

    /// The coroutine that runs there and owns the task. Its promise's end is what `done` tells: nothing of it is left
    /// there then.
    struct Carrier {
        struct promise_type : PoolAllocated, ReadyNode, Lodger {
            Errand& errand;
            explicit promise_type(Errand& e) : errand(e) {}
            promise_type(const promise_type&) = delete;
            promise_type& operator=(const promise_type&) = delete;
            ~promise_type() {
                unlink();
                errand.ended();
            }
            Carrier get_return_object() noexcept { return {this}; }
            static Carrier get_return_object_on_allocation_failure() noexcept { return {}; }
            std::suspend_always initial_suspend() const noexcept { return {}; }
            std::suspend_never final_suspend() const noexcept { return {}; }
            void return_void() const noexcept {}
            void unhandled_exception() const noexcept {}
        };
        promise_type* promise = nullptr;
    };

    /// Sends the carrier on its way; `waiting` is resumed on the calling executor when the carrier has ended, at once
    /// where nobody serves.
    void send(Carrier carrier, std::coroutine_handle<> waiting);

  private:
    struct Step : Post {
        Errand* errand = nullptr;
    };
    static void on_start(Post& post);
    static void on_done(Post& post);
    static void on_cancel(Post& post);
    void ended();
    void abandon();

    Executor& there_;
    Executor* home_ = nullptr;
    Carrier::promise_type* carrier_ = nullptr; // used there alone, once it has been sent
    bool under_way_ = false;                   // used at home alone
    ReadyNode waiter_;
    Step start_;
    Step done_;
    Step cancel_;
    std::atomic<bool> cancelled_{false};
    std::atomic<bool> gone_{false}; // ended without `done`, which home does not take any more
};

template <class T>
class [[nodiscard]] RunOn final : Errand {
  public:
    RunOn(Executor& there, Task<T> task) : Errand(there), task_(std::move(task)) {}
    ~RunOn() { settle(); }

    bool await_ready() const { return false; }
    bool await_suspend(std::coroutine_handle<> waiting) {
        const Carrier carrier = carry(*this);
        if (carrier.promise == nullptr) {
            value_.emplace(Error{Code::exhausted,
                                 "no coroutine frame left to run a task on another processor: a larger io::FramePool"});
            return false;
        }
        send(carrier, waiting);
        return true;
    }
    T await_resume() {
        if (!value_) {
            return Error{Code::device_gone, "the processor that a task was sent to has stopped"};
        }
        return std::move(*value_);
    }

  private:
    static Carrier carry(RunOn& self) {
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
/// that; a processor that has not answered after Errand::longest_answer is a panic.
template <class T>
RunOn<T> run_on(Executor& there, Task<T> task) {
    return RunOn<T>(there, std::move(task));
}

} // namespace fl::io
