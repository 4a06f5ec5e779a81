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
    in_flight_ = true;
    for (Step* step : {&start_, &done_, &cancel_}) {
        step->call = this;
    }
    start_.run = on_start;
    done_.run = on_done;
    cancel_.run = on_cancel;
    cancel_.urgent = true;
    if (!target_.post(start_)) {
        Handle::from_promise(*runner.promise).destroy(); // it never ran; posts `done`
    }
}

void RemoteCall::on_start(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.runner_->evict = [](RemoteTask& task) {
        std::coroutine_handle<Runner::promise_type>::from_promise(static_cast<Runner::promise_type&>(task)).destroy();
    };
    call.target_.add_remote(*call.runner_);
    call.target_.make_ready(*call.runner_);
}

// On the remote processor, when the runner ends in any way. Once the post is sent the call may be destroyed.
void RemoteCall::ended() {
    Runner::promise_type* runner = std::exchange(runner_, nullptr);
    if (runner->evict != nullptr) { // it was started
        target_.remove_remote(*runner);
    }
    if (!home_->post(done_)) {
        // The home executor has stopped, so only abandon() can be waiting. Release, and the last access: pairs with
        // the acquire there.
        gone_.store(true, std::memory_order_release);
    }
}

void RemoteCall::on_done(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.in_flight_ = false;
    call.home_->make_ready(call.waiter_);
}

void RemoteCall::on_cancel(Post& post) {
    RemoteCall& call = *static_cast<Step&>(post).call;
    call.target_.withdraw(call.start_);
    if (call.runner_ != nullptr) {
        std::coroutine_handle<Runner::promise_type>::from_promise(*call.runner_).destroy(); // posts `done`
    }
    // The last access from here. Release: pairs with the acquire in abandon(), so that the task's end is ordered
    // before what the destroyed frame's owner does next.
    call.cancelled_.store(true, std::memory_order_release);
}

// On the home processor: the waiting frame is being destroyed. The task may refer to that frame, so it must end
// first, on its own processor. Meanwhile this processor serves such requests itself, or two processors abandoning
// each other's tasks would deadlock.
void RemoteCall::abandon() {
    in_flight_ = false;
    if (target_.processor() == home_->processor()) {
        on_cancel(cancel_);
        static_cast<void>(home_->withdraw(done_));
        return;
    }
    // else it has stopped, and ends or has ended the task by itself: `done` is its last access
    const bool posted = target_.post(cancel_);
    const Bound bound(*home_, longest_answer);
    while (posted ? !cancelled_.load(std::memory_order_acquire)
                  : !home_->withdraw(done_) && !gone_.load(std::memory_order_acquire)) {
        home_->run_urgent();
        spin_pause();
        if (bound.passed()) {
            panic("run_on: a processor does not end an abandoned task");
        }
    }
    if (posted) {
        static_cast<void>(home_->withdraw(done_));
    }
}

} // namespace fl::io
