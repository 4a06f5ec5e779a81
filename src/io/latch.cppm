// One coroutine waits, with a bound; other code on the executor's processor opens the latch. For conditions detected
// in Service::drain, not in an interrupt handler.
export module io.latch;
import core.std;
import core.panic;
import core.time;
import io.executor;

export namespace fl::io {

/// Needs an executor; an object that gets its executor later constructs its latch then (std::optional::emplace).
class Latch {
  public:
    explicit Latch(Executor& executor) : executor_(executor) {}
    Latch(const Latch&) = delete;
    Latch& operator=(const Latch&) = delete;

    /// Wakes the current waiter, or else the next one. Not from an interrupt handler.
    void open() {
        open_ = true;
        if (waiting_ != nullptr && waiting_->pending) {
            executor_.cancel(*waiting_);
            executor_.make_ready(*waiting_);
        } // else already made ready by its bound or an earlier open()
    }
    /// Clears an open() that no waiter has consumed.
    void close() { open_ = false; }
    bool is_open() const { return open_; }
    bool awaited() const { return waiting_ != nullptr; }
    /// A coroutine waits with a bound.
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
    /// co_await latch.wait(bound) -> true: the latch was open and is now closed; false: the bound expired first. One
    /// waiter at a time, from its wait to its resumption; a second one causes a panic.
    Wait wait(const Bound& bound) { return {*this, bound}; }
    /// Without a bound: for events that may never occur.
    Wait wait() { return Wait(*this); }
    /// Waits at most until `instant` of the executor's machine time: for periodic work, where expiry is normal. A
    /// machine stop does not extend it.
    Wait wait_until(Instant instant) { return Wait(*this, instant); }

  private:
    Executor& executor_;
    Wait* waiting_ = nullptr; // from wait to resumption
    bool open_ = false;
};

} // namespace fl::io
