// One coroutine waits, with a bound; whoever runs on the executor's processor opens. For what is decided in Service::drain, not in an interrupt.
export module io.latch;
import core.std;
import core.time;
import io.executor;

export namespace fl::io {

class Latch {
  public:
    Latch() = default;
    Latch(const Latch&) = delete;
    Latch& operator=(const Latch&) = delete;

    /// Before the first wait.
    void attach(Executor& executor) { executor_ = &executor; }
    /// Wakes the waiter, or the next one to come. Not from an interrupt handler.
    void open() {
        open_ = true;
        if (Executor::Timer* timer = std::exchange(waiting_, nullptr); timer != nullptr && timer->pending) {
            executor_->cancel(*timer);
            executor_->make_ready(*timer);
        } // else its deadline has made it ready already; it finds the latch open
    }
    void close() { open_ = false; }
    bool is_open() const { return open_; }
    bool awaited() const { return waiting_ != nullptr; }

    /// co_await latch.wait(deadline) -> true: it was open, and is closed again; false: the deadline came first. One waiter at a time.
    auto wait(Instant deadline) {
        struct Awaiter : Executor::Timer {
            Latch& latch;
            Awaiter(Latch& l, Instant at) : latch(l) { due = at; }
            Awaiter(const Awaiter&) = delete;
            Awaiter& operator=(const Awaiter&) = delete;
            ~Awaiter() {
                latch.executor_->cancel(*this);
                if (latch.waiting_ == this) {
                    latch.waiting_ = nullptr;
                }
            }
            bool await_ready() const { return latch.open_; }
            void await_suspend(std::coroutine_handle<> h) {
                waiter = h;
                latch.waiting_ = this;
                latch.executor_->start(*this);
            }
            bool await_resume() {
                if (latch.waiting_ == this) { // by the timer
                    latch.waiting_ = nullptr;
                }
                return std::exchange(latch.open_, false);
            }
        };
        return Awaiter{*this, deadline};
    }

  private:
    Executor* executor_ = nullptr;
    Executor::Timer* waiting_ = nullptr;
    bool open_ = false;
};

} // namespace fl::io
