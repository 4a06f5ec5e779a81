module io.run_on;
import core.std;
import core.panic;
import core.time;
import core.spinlock;
import io.task;
import io.executor;

namespace fl::io {

void RemoteCall::send(Runner runner, std::coroutine_handle<> waiting) {
    home_ = Executor::current();
    if (home_ == nullptr) {
        panic("run_on: awaited outside of every executor");
    }
    using Handle = std::coroutine_handle<Runner::promise_type>;
    runner.promise->waiter = Handle::from_promise(*runner.promise);
    runner_ = runner.promise;
    waiter_.waiter = waiting;
    under_way_ = true;
    for (Step* step : {&start_, &done_, &cancel_}) {
        step->call = this;
    }
    start_.run = on_start;
    done_.run = on_done;
    cancel_.run = on_cancel;
    cancel_.urgent = true;
    if (!there_.post(start_)) {
        Handle::from_promise(*runner.promise).destroy(); // it has never run; posts `done`
    }
}

void RemoteCall::on_start(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.runner_->evict = [](RemoteTask& task) {
        std::coroutine_handle<Runner::promise_type>::from_promise(static_cast<Runner::promise_type&>(task)).destroy();
    };
    call.there_.add_remote(*call.runner_);
    call.there_.make_ready(*call.runner_);
}

// There, at the runner's end, whichever it is. With the post the call may be gone.
void RemoteCall::ended() {
    Runner::promise_type* runner = std::exchange(runner_, nullptr);
    if (runner->evict != nullptr) { // it has been started
        there_.remove_remote(*runner);
    }
    if (!home_->post(done_)) {
        // Home has stopped, so nobody but abandon() waits for this. Release, and the last access: partner is the
        // acquire there.
        gone_.store(true, std::memory_order_release);
    }
}

void RemoteCall::on_done(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.under_way_ = false;
    call.home_->make_ready(call.waiter_);
}

void RemoteCall::on_cancel(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.there_.withdraw(call.start_);
    if (call.runner_ != nullptr) {
        std::coroutine_handle<Runner::promise_type>::from_promise(*call.runner_).destroy(); // posts `done`
    }
    // The last access from here. Release: partner is the acquire in abandon(), so that the end of the task comes before
    // whatever the dying frame's owner does next.
    call.cancelled_.store(true, std::memory_order_release);
}

// The frame that waits is being destroyed, at home. The task may refer to that frame: it must end first, on its own
// processor. Meanwhile this one serves requests of the same kind, or two processors that abandon each other's tasks
// would wait for ever.
void RemoteCall::abandon() {
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
