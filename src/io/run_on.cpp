module io.run_on;
import core.std;
import core.panic;
import core.time;
import core.spinlock;
import io.task;
import io.executor;

namespace fl::io {

void Errand::send(Carrier carrier, std::coroutine_handle<> waiting) {
    home_ = Executor::current();
    if (home_ == nullptr) {
        panic("run_on: awaited outside of every executor");
    }
    using Handle = std::coroutine_handle<Carrier::promise_type>;
    carrier.promise->waiter = Handle::from_promise(*carrier.promise);
    carrier_ = carrier.promise;
    waiter_.waiter = waiting;
    under_way_ = true;
    for (Step* step : {&start_, &done_, &cancel_}) {
        step->errand = this;
    }
    start_.run = on_start;
    done_.run = on_done;
    cancel_.run = on_cancel;
    cancel_.urgent = true;
    if (!there_.post(start_)) {
        Handle::from_promise(*carrier.promise).destroy(); // it has never run; posts `done`
    }
}

void Errand::on_start(Post& post) {
    Errand& errand = *static_cast<Step&>(post).errand;
    errand.carrier_->evict = [](Lodger& lodger) {
        std::coroutine_handle<Carrier::promise_type>::from_promise(static_cast<Carrier::promise_type&>(lodger))
            .destroy();
    };
    errand.there_.lodge(*errand.carrier_);
    errand.there_.make_ready(*errand.carrier_);
}

// There, at the carrier's end, whichever it is. With the post the errand may be gone.
void Errand::ended() {
    Carrier::promise_type* carrier = std::exchange(carrier_, nullptr);
    if (carrier->evict != nullptr) { // it has been started
        there_.leave(*carrier);
    }
    if (!home_->post(done_)) {
        // Home has stopped, so nobody but abandon() waits for this. Release, and the last access: partner is the
        // acquire there.
        gone_.store(true, std::memory_order_release);
    }
}

void Errand::on_done(Post& post) {
    Errand& errand = *static_cast<Step&>(post).errand;
    errand.under_way_ = false;
    errand.home_->make_ready(errand.waiter_);
}

void Errand::on_cancel(Post& post) {
    Errand& errand = *static_cast<Step&>(post).errand;
    errand.there_.withdraw(errand.start_);
    if (errand.carrier_ != nullptr) {
        std::coroutine_handle<Carrier::promise_type>::from_promise(*errand.carrier_).destroy(); // posts `done`
    }
    // The last access from here. Release: partner is the acquire in abandon(), so that the end of the task comes before
    // whatever the dying frame's owner does next.
    errand.cancelled_.store(true, std::memory_order_release);
}

// The frame that waits is being destroyed, at home. The task may refer to that frame: it must end first, on its own
// processor. Meanwhile this one serves requests of the same kind, or two processors that abandon each other's tasks
// would wait for ever.
void Errand::abandon() {
    under_way_ = false;
    if (there_.processor() == home_->processor()) {
        on_cancel(cancel_);
        static_cast<void>(home_->withdraw(done_));
        return;
    }
    // else it has stopped, and ends the task by itself, or has: `done` is its last access
    const bool asked = there_.post(cancel_);
    const Bound bound(*home_, longest_answer);
    while (asked ? !cancelled_.load(std::memory_order_acquire)
                 : !home_->withdraw(done_) && !gone_.load(std::memory_order_acquire)) {
        home_->run_urgent();
        spin_pause();
        if (bound.passed()) {
            panic("run_on: a processor does not end a task that nobody waits for any more");
        }
    }
    if (asked) {
        static_cast<void>(home_->withdraw(done_));
    }
}

} // namespace fl::io
