module io.executor;
import core.std;
import core.check;
import core.result;
import core.log;
import core.time;
import core.processor;
import core.spinlock;
import io.task;
import io.mailbox;
import io.timer_heap;

namespace fl::io {

namespace {
// Each processor accesses only its own entry, on entering or leaving its loop.
constinit std::array<Executor*, max_processors> running{};
} // namespace

Executor* Executor::current() { return running[this_processor()]; }
Executor* Executor::enter(Executor* executor) { return std::exchange(running[this_processor()], executor); }

void Executor::collect() {
    if (!closed_) {
        collect(mailbox_.take_all());
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
        post->run(*post); // may destroy it
    }
}

bool Executor::withdraw(Post& post) {
    check_processor();
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
        mailbox_.raise(); // the turn signalled for them may have begun already
    }
    return found;
}

void Executor::add_remote(RemoteTask& task) { task.next_remote = std::exchange(remote_tasks_, &task); }

void Executor::remove_remote(RemoteTask& task) {
    for (RemoteTask** at = &remote_tasks_; *at != nullptr; at = &(*at)->next_remote) {
        if (*at == &task) {
            *at = task.next_remote;
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
        post = posts_; // run() may have changed the list
    }
    if (posts_ != nullptr) {
        mailbox_.raise();
    }
}

[[clang::minsize]] void Executor::serve(const std::atomic<bool>& stop) {
    Executor* const before = enter(this);
    clock_.rest_until(never);
    while (!stop.load(std::memory_order_acquire)) { // pairs with the release by the setter of `stop`
        step();
    }
    collect(mailbox_.close());
    closed_ = true;
    run_posts(); // posts queued before; tasks added by them are evicted below
    while (remote_tasks_ != nullptr) {
        RemoteTask* task = remote_tasks_;
        remove_remote(*task);
        task->evict(*task);
    }
    enter(before);
}

void Executor::add(Service& service) {
    check_processor();
    service.next_ = services_;
    services_ = &service;
    activate(service);
    RaisedList<Service>::attach(service);
}

// Rarely called: optimized for size.
[[clang::minsize]] void Executor::remove(Service& service) {
    check_processor();
    const auto unlink = [&](Service*& first, Service* Service::* next) {
        for (Service** at = &first; *at != nullptr; at = &((*at)->*next)) {
            if (*at == &service) {
                *at = service.*next;
                return true;
            }
        }
        return false;
    };
    if (!unlink(services_, &Service::next_)) {
        return;
    }
    if (RaisedList<Service>::detach(service)) { // it is in the list, or about to be added
        for (bool found = false; !found; spin_pause()) {
            for (Service* raised = raised_.take_all(); raised != nullptr;) {
                Service* const following = raised->next_raised;
                found = found || raised == &service;
                if (raised != &service) {
                    lower(*raised);
                    mailbox_.raise(); // the turn for that raise may have begun already: drain it in the next one
                }
                raised = following;
            }
        }
    }
    if (service.active_) {
        unlink(active_, &Service::next_active_);
        unlink(following_, &Service::next_active_); // removed while iterating over active services
        service.active_ = false;
    }
    if (service.ticking_) {
        unlink(ticking_, &Service::next_ticking_);
        service.ticking_ = false;
    }
    if (service.touched_) {
        unlink(touched_, &Service::next_touched_);
        service.touched_ = false;
    }
}

// Handles a raised service, after its link has been read.
void Executor::lower(Service& service) {
    RaisedList<Service>::lower(service);
    if (&service != &everything_) [[likely]] {
        activate(service);
        return;
    }
    for (Service* each = services_; each != nullptr; each = each->next_) {
        activate(*each);
    }
    // wake() also signals the loop's own condition, which is tested between turns, possibly before this turn began.
    // So this turn must not end in a sleep.
    mailbox_.raise();
}

void Executor::take_raised() {
    for (Service* service = raised_.take_all(); service != nullptr;) {
        Service* const following = service->next_raised;
        lower(*service);
        service = following;
    }
}

void Executor::start(Timer& timer) {
    check_processor();
    timer.pending = true;
    timer.number = ++timers_started_;
    bounds_pending_ += timer.length != 0 ? 1 : 0;
    timers_.add(timer);
}

void Executor::cancel(Timer& timer) {
    check_processor();
    if (!timer.pending) {
        return;
    }
    timer.pending = false;
    bounds_pending_ -= timer.length != 0 ? 1 : 0;
    timers_.remove(timer);
}

// After a machine stop: bounds among the timers restart in full.
[[clang::minsize]] void Executor::renew_bounds() {
    renewed_at_ = resumed_at();
    timers_.take_all([&](Timer& timer) {
        if (timer.length != 0) {
            timer.due = end_of_bound(timer.begun, timer.length);
        }
        timers_.add(timer);
    });
    if (std::exchange(logged_stops_, clock_.long_stops()) != clock_.long_stops() && processor_ == 0) {
        if (clock_.last_long_stop() != 0) {
            log::info("the machine was stopped for {} ms: all time-outs restart", clock_.last_long_stop() / 1'000'000);
        } else {
            log::info("the machine was stopped, and its clock was set back: all time-outs restart");
        }
    }
}

void Executor::step() {
    ++turns_;
    // Where the host emulates the counter each reading is an exit: a turn for what the one before has made ready has
    // the time of that one.
    if (!std::exchange(keep_time_, false)) {
        const Instant begun = elapsed();
        turn_time_ = clock_.read(begun);
        if (std::exchange(asleep_, false)) { // one reading of the clock ends the sleep and begins the turn
            slept_ += times_sleep_ ? begun - asleep_since_ : 0;
            woken_ = turns_;
        }
        time_read_ = turns_;
    }
    // Clear the flag, then check everything: a later raise or post is either seen below or prevents the sleep.
    if (mailbox_.clear()) {
        run_posts();
        take_raised();
    }

    // Only coroutines ready now: one that makes itself ready again waits for the next turn, so that the queues are
    // serviced. A coroutine destroyed by an earlier one unlinks its node from the batch.
    ReadyList batch;
    batch.take_all(ready_);
    while (ReadyNode* node = batch.pop()) {
        node->waiter.resume(); // the node may be destroyed with the frame
    }

    bool worked = touched_ != nullptr;
    while (touched_ != nullptr) {
        Service* service = std::exchange(touched_, touched_->next_touched_);
        service->touched_ = false;
        service->flush();
    }
    const bool tick_due = turn_time_ >= next_tick_;
    if (tick_due) { // drain these first: an interrupt may have been lost
        while (ticking_ != nullptr) {
            Service* const service = std::exchange(ticking_, ticking_->next_ticking_);
            activate(*service); // ticking_ stays set until run_ticks()
        }
    }
    for (Service* service = active_; service != nullptr; service = following_) {
        following_ = service->next_active_;
        worked |= service->drain();
    }
    if (worked) {
        poll_until_ = turn_time_ + poll_window;
    }

    if (tick_due || !timers_.empty()) {
        if (resumed_at() != renewed_at_) [[unlikely]] {
            renew_bounds();
        }
        while (!timers_.empty() && timers_.first()->due <= turn_time_) {
            Timer& timer = *timers_.first();
            cancel(timer);
            make_ready(timer);
        }
        if (tick_due) {
            run_ticks(turn_time_);
        }
    }
    if (checks_enabled && platform_.turn_budget != 0) {
        check(now() - turn_time_ <= platform_.turn_budget, "a turn ends within its budget of time");
    }
    if (!ready_.empty() || touched_ != nullptr) {
        keep_time_ = time_read_ == turns_;
        return;
    }

    // About to sleep.
    if (mailbox_.raised()) {
        return; // an event arrived during this turn
    }
    if (wait() != Wait::interrupt && keeps_polling()) [[unlikely]] {
        ++polls_;
        spin_pause();
        return;
    }
    if (active_ != nullptr && arm_all()) {
        return;
    }
    ++idles_;
    // A bound needs ticks even if no service does: long machine stops are detected by reading the clock often.
    Instant until = ticking_ != nullptr || bounds_pending_ != 0 ? next_tick_ : never;
    if (!timers_.empty()) {
        until = std::min(until, timers_.first()->due);
    }
    until = clock_.elapsed(until);
    clock_.rest_until(until);
    asleep_ = true;
    if (times_sleep_) [[unlikely]] {
        asleep_since_ = elapsed();
    }
    if (platform_.kick == nullptr) {
        platform_.idle(platform_.context, until, mailbox_.wake_flag());
    } else {
        if (mailbox_.begin_sleep()) {
            platform_.idle(platform_.context, until, mailbox_.wake_flag());
        }
        mailbox_.end_sleep();
    }
}

void Executor::run_ticks(Instant time) {
    next_tick_ = after(time, tick_length);
    for (Service* service = active_; service != nullptr; service = following_) {
        following_ = service->next_active_;
        if (std::exchange(service->ticking_, false) || service->wants_tick()) {
            service->tick(time);
        }
    }
}

bool Executor::keeps_polling() const {
    if (wait() == Wait::adaptive && turn_time_ >= poll_until_) {
        return false;
    }
    for (const Service* service = active_; service != nullptr; service = service->next_active_) {
        if (service->awaits_answer()) {
            return true;
        }
    }
    return false;
}

// Arms all active services, most of which become passive. True: some remain active, or there is other work.
bool Executor::arm_all() {
    following_ = std::exchange(active_, nullptr);
    while (following_ != nullptr) {
        Service& service = *std::exchange(following_, following_->next_active_);
        service.active_ = false;
        if (service.arm()) {
            activate(service);
        } else if (!service.ticking_ && service.wants_tick()) {
            service.ticking_ = true;
            service.next_ticking_ = ticking_;
            ticking_ = &service;
        }
    }
    return active_ != nullptr || touched_ != nullptr || !ready_.empty();
}

bool Signal::drain() {
    if (waiting_ == nullptr || waiting_->by_signal_ || !raised_.exchange(false, std::memory_order_acquire)) {
        return false;
    }
    waiting_->by_signal_ = true;
    if (waiting_->pending) { // else its bound has expired in this turn, and it is already ready
        executor_.cancel(*waiting_);
        executor_.make_ready(*waiting_);
    }
    return true;
}

TaskGroup::~TaskGroup() {
    while (members_ != nullptr) {
        std::coroutine_handle<Member::promise_type>::from_promise(*members_).destroy(); // unlinks it
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
