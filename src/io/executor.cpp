module io.executor;
import core.std;
import core.result;
import core.log;
import core.time;
import core.processor;
import io.task;
import io.door;

namespace fl::io {

namespace {
// Each processor reads and writes its own, when it enters or leaves its loop.
constinit std::array<Executor*, max_processors> running{};
} // namespace

Executor* Executor::current() { return running[this_processor()]; }
Executor* Executor::enter(Executor* executor) { return std::exchange(running[this_processor()], executor); }

void Executor::collect() {
    if (!closed_) {
        collect(door_.take_all());
    }
}

void Executor::collect(Post* posts) {
    for (Post* post = posts; post != nullptr;) {
        Post* following = std::exchange(post->next, nullptr);
        *posts_end_ = post;
        posts_end_ = &post->next;
        post = following;
    }
}

void Executor::run_posts() {
    collect();
    while (posts_ != nullptr) {
        Post* post = posts_;
        static_cast<void>(withdraw(*post));
        post->run(*post); // may be its end
    }
}

bool Executor::withdraw(Post& post) {
    collect();
    bool found = false;
    for (Post** at = &posts_; *at != nullptr; at = &(*at)->next) {
        if (*at == &post) {
            *at = post.next;
            if (*at == nullptr) {
                posts_end_ = at;
            }
            post.next = nullptr;
            found = true;
            break;
        }
    }
    if (posts_ != nullptr) {
        door_.raise(); // the turn that was told of them may have begun already
    }
    return found;
}

void Executor::lodge(Lodger& lodger) { lodger.next_lodger = std::exchange(lodgers_, &lodger); }

void Executor::leave(Lodger& lodger) {
    for (Lodger** at = &lodgers_; *at != nullptr; at = &(*at)->next_lodger) {
        if (*at == &lodger) {
            *at = lodger.next_lodger;
            return;
        }
    }
}

void Executor::run_urgent() {
    collect();
    for (Post* post = posts_; post != nullptr;) {
        if (!post->urgent) {
            post = post->next;
            continue;
        }
        static_cast<void>(withdraw(*post));
        post->run(*post);
        post = posts_; // it may have changed the list
    }
    if (posts_ != nullptr) {
        door_.raise();
    }
}

void Executor::serve(const std::atomic<bool>& stop) {
    Executor* const before = enter(this);
    clock_.rest_until(never);
    while (!stop.load(std::memory_order_acquire)) { // partner: the release of whoever stops us
        step();
    }
    collect(door_.close());
    closed_ = true;
    run_posts(); // what arrived before; a lodger that comes by one of them goes below
    while (lodgers_ != nullptr) {
        Lodger* lodger = lodgers_;
        leave(*lodger);
        lodger->evict(*lodger);
    }
    enter(before);
}

void Executor::add(Service& service) {
    service.next_ = services_;
    services_ = &service;
}

void Executor::remove(Service& service) {
    if (following_ == &service) { // removed by the service that is being visited just now
        following_ = service.next_;
    }
    for (Service** at = &services_; *at != nullptr; at = &(*at)->next_) {
        if (*at == &service) {
            *at = service.next_;
            break;
        }
    }
    for (Service** at = &touched_; *at != nullptr; at = &(*at)->next_touched_) {
        if (*at == &service) {
            *at = service.next_touched_;
            service.touched_ = false;
            break;
        }
    }
}

void Executor::start(Timer& timer) {
    timer.pending = true;
    Timer** at = &timers_;
    while (*at != nullptr && (*at)->due <= timer.due) {
        at = &(*at)->next_timer;
    }
    timer.next_timer = *at;
    *at = &timer;
}

void Executor::cancel(Timer& timer) {
    if (!timer.pending) {
        return;
    }
    timer.pending = false;
    for (Timer** at = &timers_; *at != nullptr; at = &(*at)->next_timer) {
        if (*at == &timer) {
            *at = timer.next_timer;
            return;
        }
    }
}

// After a stop of the machine: the bounds among the timers get their length anew.
void Executor::renew_bounds() {
    renewed_at_ = resumed_at();
    Timer* timers = std::exchange(timers_, nullptr);
    while (timers != nullptr) {
        Timer& timer = *std::exchange(timers, timers->next_timer);
        if (timer.length != 0) {
            timer.due = end_of_bound(timer.begun, timer.length);
        }
        start(timer);
    }
    if (std::exchange(told_stops_, clock_.long_stops()) != clock_.long_stops() && processor_ == 0) {
        if (clock_.last_long_stop() != 0) {
            log::info("the machine stood still for {} ms: every wait for another side begins anew",
                      clock_.last_long_stop() / 1'000'000);
        } else {
            log::info("the machine stood still, and its clock was set back: every wait for another side begins anew");
        }
    }
}

void Executor::step() {
    ++turns_;
    turn_time_ = now();
    // Clear the flag, then look at everything: what is raised from here on is either seen below or keeps us awake. A
    // post raises it, too.
    if (door_.clear()) {
        run_posts();
    }

    // Only what is ready now: a coroutine that makes itself ready again waits for the next turn, so that queues get
    // theirs. A coroutine that is destroyed by one resumed before it takes its node out of the batch.
    ReadyList batch;
    batch.take_all(ready_);
    while (ReadyNode* node = batch.pop()) {
        node->waiter.resume(); // the node may die with the frame
    }

    while (touched_ != nullptr) {
        Service* service = std::exchange(touched_, touched_->next_touched_);
        service->touched_ = false;
        service->flush();
    }
    for (Service* service = services_; service != nullptr; service = following_) {
        following_ = service->next_;
        static_cast<void>(service->drain());
    }

    if (timers_ != nullptr || turn_time_ >= next_tick_) {
        const Instant time = now();
        if (resumed_at() != renewed_at_) [[unlikely]] {
            renew_bounds();
        }
        while (timers_ != nullptr && timers_->due <= time) {
            Timer* timer = std::exchange(timers_, timers_->next_timer);
            timer->pending = false;
            make_ready(*timer);
        }
        if (time >= next_tick_) {
            next_tick_ = after(time, tick_length);
            for (Service* service = services_; service != nullptr; service = following_) {
                following_ = service->next_;
                service->tick(time);
            }
        }
    }
    if (!ready_.empty() || touched_ != nullptr) {
        return;
    }

    // About to sleep.
    if (door_.raised()) {
        return; // something came while we worked
    }
    bool found = false;
    for (Service* service = services_; service != nullptr; service = service->next_) {
        found = service->arm() || found;
    }
    if (found) {
        return;
    }
    ++idles_;
    // Without services there is nothing to tick: a processor without work sleeps until it is kicked.
    Instant until = services_ != nullptr ? next_tick_ : never;
    if (timers_ != nullptr) {
        until = std::min(until, timers_->due);
    }
    until = clock_.elapsed(until);
    clock_.rest_until(until);
    if (platform_.kick == nullptr) {
        platform_.idle(platform_.context, until, door_.wake_flag());
    } else {
        if (door_.falls_asleep()) {
            platform_.idle(platform_.context, until, door_.wake_flag());
        }
        door_.woke();
    }
}

bool Signal::drain() {
    if (waiting_ == nullptr || waiting_->by_signal_ || !raised_.exchange(false, std::memory_order_acquire)) {
        return false;
    }
    waiting_->by_signal_ = true;
    if (waiting_->pending) { // else its deadline has passed in this very turn and it is ready already
        executor_.cancel(*waiting_);
        executor_.make_ready(*waiting_);
    }
    return true;
}

TaskGroup::~TaskGroup() {
    while (members_ != nullptr) {
        std::coroutine_handle<Member::promise_type>::from_promise(*members_).destroy(); // leaves the list
    }
}

Result<void> TaskGroup::spawn(Task<Result<void>> task) {
    const bool has_frame = static_cast<bool>(task);
    Member member = has_frame ? run(*this, std::move(task)) : Member{};
    if (member.promise == nullptr) {
        return Error{Code::exhausted,
                     "no coroutine frame left to start a task: a smaller queue depth, or a larger io::FramePool"};
    }
    ++running_;
    member.promise->next_member = members_;
    member.promise->link = &members_;
    if (members_ != nullptr) {
        members_->link = &member.promise->next_member;
    }
    members_ = member.promise;
    member.promise->waiter = std::coroutine_handle<Member::promise_type>::from_promise(*member.promise);
    executor_.make_ready(*member.promise);
    return {};
}

TaskGroup::Member TaskGroup::run(TaskGroup& group, Task<Result<void>> task) {
    const Result<void> result = co_await std::move(task);
    if (!result && !group.first_error_) {
        group.first_error_ = result.error();
    }
    if (--group.running_ == 0 && group.joiner_.waiter) {
        group.executor_.make_ready(group.joiner_);
    }
}

} // namespace fl::io
