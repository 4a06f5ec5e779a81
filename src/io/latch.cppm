// One coroutine waits, with a bound; other code on the executor's processor opens. For what is decided in
// Service::drain, not in an interrupt.
export module io.latch;
import core.std;
import core.panic;
import core.time;
import io.executor;

export namespace fl::io {

/// Not usable without an executor; an object that gets its executor later constructs its latch then
/// (std::optional::emplace).
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
        } // else its bound, or an open() before this one, has made it ready already
    }
    void close() { open_ = false; }
    bool is_open() const { return open_; }
    bool awaited() const { return waiting_ != nullptr; }
    /// A coroutine waits, with a bound.
    bool awaited_with_bound() const { return waiting_ != nullptr && waiting_->length != 0; }

    class [[nodiscard]] Wait : Executor::Timer {
      public:
        explicit Wait(Latch& latch, Instant until = never) : latch_(latch) { due = until; }
        Wait(Latch& latch, const Bound& bound) : latch_(latch) {
            if (&bound.executor() != &latch.executor_) {
                panic("io::Latch: a bound in another executor's time");
            }
            bound.apply_to(*this);
        }
        Wait(const Wait&) = delete;
        Wait& operator=(const Wait&) = delete;
        ~Wait() {
            latch_.executor_.cancel(*this);
            if (latch_.waiting_ == this) {
                latch_.waiting_ = nullptr;
            }
        }
        bool await_ready() const {
            if (latch_.waiting_ != nullptr) {
                panic("io::Latch: a coroutine waits while another one does: a latch has one waiter at a time");
            }
            return latch_.open_;
        }
        void await_suspend(std::coroutine_handle<> h) {
            waiter = h;
            latch_.waiting_ = this;
            latch_.executor_.start(*this);
        }
        bool await_resume() {
            latch_.waiting_ = nullptr;
            return std::exchange(latch_.open_, false);
        }

      private:
        friend class Latch;
        Latch& latch_;
    };
    /// co_await latch.wait(bound) -> true: it was open, and is closed again; false: the bound passed first. One waiter
    /// at a time, from its wait to its resumption; a second one is a panic.
    Wait wait(const Bound& bound) { return {*this, bound}; }
    /// Without a bound: for what need not come.
    Wait wait() { return Wait(*this); }
    /// Until `instant` of the executor's machine time at the latest: for what is done at intervals, when nobody is late
    /// if nothing comes. A stop of the machine does not lengthen it.
    Wait wait_until(Instant instant) { return Wait(*this, instant); }

  private:
    Executor& executor_;
    Wait* waiting_ = nullptr; // from its wait to its resumption
    bool open_ = false;
};

} // namespace fl::io
