// One coroutine waits, with a bound; other code on the executor's processor opens. For what is decided in Service::drain, not in an interrupt.
export module io.latch;
import core.std;
import core.panic;
import core.time;
import io.executor;

export namespace fl::io {

/// Not usable without an executor; an object that gets its executor later constructs its latch then (std::optional::emplace).
class Latch {
  public:
    explicit Latch(Executor& executor) : executor_(executor) {}
    Latch(const Latch&) = delete;
    Latch& operator=(const Latch&) = delete;

    /// Wakes the waiter, or the next one to come. Not from an interrupt handler.
    void open() {
        open_ = true;
        if (waiting_ != nullptr && waiting_->pending) {
            executor_.cancel(*waiting_);
            executor_.make_ready(*waiting_);
        } // else its deadline, or an open() before this one, has made it ready already
    }
    void close() { open_ = false; }
    bool is_open() const { return open_; }
    bool awaited() const { return waiting_ != nullptr; }

    /// co_await latch.wait(deadline) -> true: it was open, and is closed again; false: the deadline came first. One waiter at a time, from its
    /// wait to its resumption; a second one is a panic.
    auto wait(Instant deadline) {
        struct Awaiter : Executor::Timer {
            Latch& latch;
            Awaiter(Latch& l, Instant at) : latch(l) { due = at; }
            Awaiter(const Awaiter&) = delete;
            Awaiter& operator=(const Awaiter&) = delete;
            ~Awaiter() {
                latch.executor_.cancel(*this);
                if (latch.waiting_ == this) {
                    latch.waiting_ = nullptr;
                }
            }
            bool await_ready() const {
                if (latch.waiting_ != nullptr) {
                    panic("io::Latch: a coroutine waits while another one does: a latch has one waiter at a time");
                }
                return latch.open_;
            }
            void await_suspend(std::coroutine_handle<> h) {
                waiter = h;
                latch.waiting_ = this;
                latch.executor_.start(*this);
            }
            bool await_resume() {
                latch.waiting_ = nullptr;
                return std::exchange(latch.open_, false);
            }
        };
        return Awaiter{*this, deadline};
    }

  private:
    Executor& executor_;
    Executor::Timer* waiting_ = nullptr; // from its wait to its resumption
    bool open_ = false;
};

} // namespace fl::io
