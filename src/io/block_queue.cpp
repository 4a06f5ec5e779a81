module io.block_queue;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import io.executor;
import io.latch;
import io.block;
import io.oldest_wait;

namespace fl::io {

// ---- opening and closing ----

void QueueCore::open(Nanoseconds timeout) {
    timeout_ = timeout;
    events_seen_ = transport_events();
    idle_events_ = 0;
    oldest_.restart();
    stuck_.restart();
    state_ = State::open;
    executor_.add(*this);
}

void QueueCore::close(Status status, Status with_device, const Error& why) {
    if (state_ != State::open) {
        return;
    }
    if (transport_closing(status)) {
        log::error("{}: closed: {}", names(), why);
    }
    end_everything(status, with_device);
}

void QueueCore::stop() {
    if (state_ == State::stopped) {
        return;
    }
    if (state_ == State::open) {
        end_everything(Status::device_gone, Status::device_gone, true);
    }
    executor_.remove(*this);
    state_ = State::stopped;
}

/// `with_device`: the status of requests of which the device holds a part.
void QueueCore::end_everything(Status status, Status with_device, bool stopped) {
    state_ = State::closed;
    const auto end = [&](Request& request, Status how) {
        request.issued = request.buffer.size; // the rest is not sent
        request.resend = false;
        if (request.parts == 0) {
            request.part_status = how;
            done_.push(request);
        }
    };
    for_each_disk([&](QueuedDevice& disk) {
        for (RequestQueue* list : {&disk.retry_, &disk.waiting_}) {
            while (Request* request = list->pop()) {
                end(*request, status);
            }
        }
    });
    parked_ = 0;
    bool device_stopped = false;
    for_each_command([&](u64 id, QueuedCommand& command) {
        if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        }
        Request* request = command.first;
        if (request == nullptr) {
            return;
        }
        const Fence fence = command.delayed || device_stopped ? Fence::stopped : transport_fence(command);
        device_stopped = device_stopped || (fence == Fence::stopped && !command.delayed);
        orphan(id, command, fence);
        for (Request* following = nullptr; request != nullptr; request = following) {
            following = command.gathered ? request->link : nullptr;
            --request->parts;
            end(*request, command.expired ? Status::timed_out : with_device);
        }
    });
    delayed_ = 0;
    if (device_stopped) { // also takes back commands without a waiter
        reclaim_all(nullptr);
    }
    reset_bound_.reset();
    complete_done();
    transport_closed(stopped);
}

void QueueCore::reclaim() {
    if (state_ == State::open) {
        return;
    }
    for_each_command([&](u64 id, QueuedCommand& command) {
        static_cast<void>(transport_finish(command, Status::device_gone));
        slots_->free(id);
    });
    while (late_writes_ != 0) {
        count_late(-1);
    }
    release_quarantine(this);
}

void QueueCore::add(QueuedDevice& disk) {
    if (disks_ == nullptr) {
        disks_ = disk.next_ = &disk;
    } else {
        QueuedDevice* last = disks_;
        while (last->next_ != disks_) {
            last = last->next_;
        }
        disk.next_ = disks_;
        last->next_ = &disk;
    }
    ++disk_count_;
}

void QueueCore::remove(QueuedDevice& disk) {
    if (disk.next_ == nullptr) {
        return;
    }
    QueuedDevice* before = &disk;
    while (before->next_ != &disk) {
        before = before->next_;
    }
    before->next_ = disk.next_;
    disks_ = --disk_count_ == 0 ? nullptr : disks_ == &disk ? disk.next_ : disks_;
    disk.next_ = nullptr;
    current_ = current_ == &disk ? nullptr : current_;
}

FixedText<96> QueueCore::names() const {
    FixedText<96> text;
    for_each_disk(
        [&](const QueuedDevice& disk) { print(text, "{}{}", text.empty() ? "" : ", ", disk.identity().name.view()); });
    return text.empty() ? FixedText<96>(limits_.driver) : text;
}

// ---- sending ----

/// Whether an abandoned write that the device may still execute overlaps the request.
bool QueueCore::blocked(const QueuedDevice& disk, const Request& request) {
    bool found = false;
    const u64 end = request.lba + (request.buffer.size >> disk.sector_shift_);
    for_each_command([&](u64, const QueuedCommand& command) {
        found = found || (command.late_write && command.device == &disk && command.lba < end &&
                          request.lba < command.lba + (command.bytes >> disk.sector_shift_));
    });
    return found;
}

void QueueCore::send_delayed() {
    for_each_command([&](u64 id, QueuedCommand& command) {
        if (!command.delayed || state_ != State::open) {
            return;
        }
        if (command.device->removed()) { // another disk may be in its place
            return end_delayed(id, command, Status::device_gone);
        }
        const SendResult sent = transport_send(command, id);
        if (sent == SendResult::sent) {
            command.delayed = false;
            --delayed_;
            executor_.touch(*this);
        } else if (sent == SendResult::broken) {
            fail(transport_fault());
        }
    });
}

/// The device does not have the command, and does not get it any more. complete_done() must follow.
void QueueCore::end_delayed(u64 id, QueuedCommand& command, Status status) {
    --delayed_;
    static_cast<void>(transport_finish(command, status));
    Request* request = std::exchange(command.first, nullptr);
    if (command.partial) {
        end_late(id, command, true);
    }
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        end_part(*request, status);
    }
    slots_->free(id);
}

Result<void> QueueCore::send(Exchange& exchange) {
    if (state_ != State::open) {
        return Error{Code::device_gone, "the queue is closed"};
    }
    const auto id = slots_->take();
    if (!id) {
        return Error{Code::exhausted, "no slot for a command of the driver's own", slots_->capacity(),
                     slots_->capacity()};
    }
    QueuedCommand& command = at(*id);
    command.device = nullptr;
    command.first = nullptr;
    command.exchange = &exchange;
    command.op = Op::read;
    command.number = 0;
    command.bytes = 0;
    command.gathered = command.partial = command.delayed = false;
    command.reset = command.expired = command.late_write = false;
    exchange.id = *id;
    exchange.answered = false;
    exchange.done.close();
    const SendResult sent = transport_send(command, *id);
    if (sent != SendResult::sent) {
        command.exchange = nullptr;
        slots_->free(*id);
        if (sent == SendResult::broken) {
            const Error why = transport_fault();
            fail(why);
            return why;
        }
        return Error{Code::exhausted, "no room in the queue"};
    }
    executor_.touch(*this);
    return {};
}

void QueueCore::abandon(Exchange& exchange) {
    if (is_in_flight(exchange)) {
        at(exchange.id).exchange = nullptr;
    }
}

// ---- answers ----

/// Removes the request from its disk's lists.
bool QueueCore::unpark(Request& request) {
    auto& disk = static_cast<QueuedDevice&>(request.device());
    const bool found = disk.waiting_.remove(request) || disk.retry_.remove(request);
    parked_ -= found ? 1 : 0;
    return found;
}

/// The rest of the request is not sent. It ends now, or when the device has answered what was sent.
void QueueCore::refuse(Request& request, Status status) {
    static_cast<void>(unpark(request));
    request.issued = request.buffer.size;
    request.part_status = status;
    if (request.parts == 0) {
        complete(request, status);
    }
}

/// The device has answered, or was stopped with, a command of which some request was abandoned. `safe`: it no longer
/// accesses any of the command's buffers.
void QueueCore::end_late(u64 id, QueuedCommand& command, bool safe) {
    if (std::exchange(command.late_write, false)) {
        count_late(-1);
    }
    if (safe) {
        release_quarantine(this, id);
    }
}

void QueueCore::note_error(Request& request, Status status) {
    if (request.part_status == Status::ok) {
        request.part_status = status;
    }
    if (request.issued != request.buffer.size) { // the rest need not be sent
        static_cast<void>(unpark(request));
        request.issued = request.buffer.size;
    }
}

/// The host has answered but may still access the buffer.
void QueueCore::quarantine_buffer(u64 id, const QueuedDevice& device, Request& request) {
    log::warning("{}: the host has answered and still holds the buffer: it is not reused",
                 device.identity().name.view());
    request.buffer_lost = true;
    quarantine(request.buffer, this, id);
}

/// False: the retries are exhausted.
bool QueueCore::retry(u64 id, QueuedCommand& command, Retry how) {
    if (how == Retry::alone || command.partial) {
        if (!command.gathered && command.first->resends != 0 && !command.first->resend) {
            return false;
        }
        for (Request* request = command.first; request != nullptr;
             request = command.gathered ? request->link : nullptr) {
            request->resends += request->resend ? 0 : 1; // else another of its commands failed in the same attempt
        }
        const bool safe = transport_finish(command, Status::io_error);
        if (command.partial) {
            end_late(id, command, safe);
        }
        requeue_all(command);
        slots_->free(id);
        return true;
    }
    if (command.retries >= (how == Retry::now ? retries_at_once : retries_later)) {
        return false;
    }
    ++command.retries;
    const u64 fresh = slots_->renew(id);
    command.number = ++issued_;
    if (how == Retry::now) {
        const SendResult sent = transport_send(command, fresh);
        if (sent == SendResult::sent) {
            executor_.touch(*this);
            return true;
        }
        if (sent == SendResult::broken) {
            fail(transport_fault());
            return true;
        }
    }
    command.delayed = true;
    ++delayed_;
    return true;
}

/// The device no longer holds the command: its requests are resent, each alone.
void QueueCore::requeue_all(QueuedCommand& command) {
    Request* request = std::exchange(command.first, nullptr);
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        // the device still holds other commands of it
        if (--request->parts != 0 || request->part_status != Status::ok) {
            static_cast<void>(unpark(*request));
            request->issued = request->buffer.size;
            request->resend = true;
            if (request->parts == 0) {
                done_.push(*request);
            }
        } else {
            static_cast<void>(unpark(*request));
            // `resend`: another of its commands must be resent as well.
            request->issued = command.gathered || request->resend ? 0 : command.offset;
            request->resend = false;
            park(command.device->retry_, *request);
        }
    }
}

/// Resends the request from its beginning: some of its parts succeeded, others did not.
void QueueCore::requeue(Request& request) {
    request.resend = false;
    request.issued = 0;
    park(static_cast<QueuedDevice&>(request.device()).retry_, request);
}

// ---- cancellation ----

bool QueueCore::cancel(Request& request) {
    if (request.parts != 0 || !unpark(request)) {
        return false; // the device has it: it ends when the device answers
    }
    complete(request, Status::cancelled);
    return true;
}

void QueueCore::forget(Request& request) {
    static_cast<void>(unpark(request));
    detach(request);
    request.parts = 0;
    complete_done(); // if the device was stopped: requests that failed before, which may be destroyed now
}

void QueueCore::give_up(Request& request, Status status) {
    static_cast<void>(unpark(request));
    detach(request);
    request.parts = 0;
    complete(request, status);
}

void QueueCore::give_up_all(QueuedCommand& command) {
    while (command.first != nullptr) {
        give_up(*command.first, Status::timed_out);
    }
}

/// Detaches all commands from the request.
void QueueCore::detach(Request& request) {
    bool stopped = false;
    if (request.parts != 0) {
        for_each_command(
            [&](u64 id, QueuedCommand& command) { stopped = detach(id, command, request, stopped) || stopped; });
    }
    if (stopped) {
        reclaim_all(nullptr);
    }
}

/// `stopped`: the device is already stopped. True: the device held the command, and is stopped now.
bool QueueCore::detach(u64 id, QueuedCommand& command, Request& request, bool stopped) {
    Request** at = &command.first;
    while (*at != nullptr && *at != &request && command.gathered) {
        at = &(*at)->link;
    }
    if (*at != &request) {
        return false;
    }
    const bool delayed = command.delayed;
    const Fence fence = delayed || stopped ? Fence::stopped : transport_fence(command);
    if (!command.gathered) {
        delayed_ -= delayed ? 1 : 0;
        orphan(id, command, fence);
        return fence == Fence::stopped && !delayed;
    }
    *at = request.link;
    request.link = nullptr;
    if (delayed) { // it is not resent as it was
        --delayed_;
        static_cast<void>(transport_finish(command, Status::cancelled));
        requeue_all(command);
        slots_->free(id);
        return false;
    }
    if (fence == Fence::reachable) {
        command.partial = true;
        request.buffer_lost = true;
        quarantine(request.buffer, this, id);
        if (command.op == Op::write && !std::exchange(command.late_write, true)) {
            count_late(1);
        }
    }
    return fence == Fence::stopped;
}

/// The command has no waiter any more. Its requests are still linked, and their buffers are quarantined if necessary.
void QueueCore::orphan(u64 id, QueuedCommand& command, Fence fence) {
    for (Request* request = command.first; request != nullptr && fence == Fence::reachable;
         request = command.gathered ? request->link : nullptr) {
        if (request->op <= Op::write) {
            request->buffer_lost = true;
            quarantine(command.gathered ? request->buffer : request->buffer.subspan(command.offset, command.bytes),
                       this, id);
        }
    }
    command.first = nullptr;
    if (fence == Fence::stopped) {
        static_cast<void>(transport_finish(command, Status::cancelled));
        end_late(id, command, true);
        slots_->free(id);
    } else if (fence != Fence::done && changes_medium(command.op) && !std::exchange(command.late_write, true)) {
        count_late(1);
    }
}

void QueueCore::count_late(i32 change) {
    late_writes_ += static_cast<u32>(change);
    transport_count_late_writes(change);
}

/// The device was stopped. `expired`: the command that timed out; if it has several requests, each is resent alone.
void QueueCore::reclaim_all(const QueuedCommand* expired) {
    for_each_command([&](u64 id, QueuedCommand& command) {
        if (command.delayed) {
            return;
        }
        static_cast<void>(transport_finish(command, Status::cancelled));
        if (command.first == nullptr || command.partial) {
            end_late(id, command, true);
        }
        if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        } else if (command.first != nullptr && &command == expired && !command.gathered) {
            end_part(*std::exchange(command.first, nullptr), Status::timed_out);
        } else {
            requeue_all(command);
        }
        slots_->free(id);
    });
    reset_bound_.reset();
}

void QueueCore::take_back() {
    for_each_command([&](u64 id, QueuedCommand& command) {
        if (command.delayed) { // the device does not have it
            return;
        }
        const bool safe = transport_finish(command, Status::cancelled);
        if (command.first == nullptr || command.partial) {
            end_late(id, command, safe);
        }
        if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        } else if (command.first != nullptr && safe) {
            requeue_all(command);
        } else if (command.first != nullptr) {
            end_unreachable(id, command);
        }
        slots_->free(id);
    });
    reset_bound_.reset();
    oldest_.restart();
    stuck_.restart();
    complete_done();
}

/// The device may access the buffers of the command's requests for ever.
void QueueCore::end_unreachable(u64 id, QueuedCommand& command) {
    Request* request = std::exchange(command.first, nullptr);
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        quarantine_buffer(id, *command.device, *request);
        end_part(*request, Status::device_gone);
    }
}

void QueueCore::send_again() {
    for_each_disk([&](QueuedDevice& disk) {
        for (RequestQueue* list : {&disk.retry_, &disk.waiting_}) {
            for (usize left = list->size(); left != 0; --left) { // each once, in order
                Request& request = *list->pop();
                // A flush waits for an answer that there will be none to: what it was for may be lost.
                auto refused = request.op == Op::flush ? std::nullopt : disk.refusal(request);
                if (!refused) {
                    list->push(request);
                    continue;
                }
                --parked_;
                request.issued = request.buffer.size;
                request.resend = false;
                request.part_status = *refused;
                if (request.parts == 0) {
                    done_.push(request);
                }
            }
        }
    });
    oldest_.restart();
    stuck_.restart();
    if (parked_ != 0 && submit_waiting()) {
        executor_.touch(*this);
    }
    complete_done();
    executor_.poll(*this);
}

// ---- timeouts ----

void QueueCore::tick(Instant now) {
    if (state_ != State::open) {
        return;
    }
    static_cast<void>(count_events(transport_events(), false));
    if (idle_events_ > limits_.max_idle_events && !std::exchange(storm_logged_, true)) {
        log::warning("{}: more than {} interrupts within {} ms without an answer: the host signals without a cause",
                     limits_.driver, limits_.max_idle_events, limits_.idle_window / 1'000'000);
    }
    if (now >= idle_until_) {
        idle_events_ = 0;
    }
    if (auto ticked = transport_tick(now, parked_ != 0); !ticked) {
        return fail(ticked.error());
    }
    if (delayed_ != 0) {
        send_delayed();
    }
    if (parked_ != 0 && submit_waiting()) {
        executor_.touch(*this);
    }
    while (Request* overdue = bounded_ ? find_overdue(now) : nullptr) {
        give_up(*overdue, Status::timed_out);
    }
    if (state_ == State::open) {
        check_timeouts();
    }
    if (state_ == State::open) {
        transport_settle();
    }
    complete_done();
}

/// A request whose caller waits no longer. Clears bounded_ if none has a bound.
Request* QueueCore::find_overdue(Instant now) {
    Request* overdue = nullptr;
    bounded_ = false;
    const auto check = [&](Request* request) {
        if (request->bound != 0) {
            bounded_ = true;
            overdue = now >= executor_.end_of_bound(request->begun, request->bound) ? request : overdue;
        }
    };
    for_each_disk([&](const QueuedDevice& disk) {
        for (const RequestQueue* list : {&disk.waiting_, &disk.retry_}) {
            for (Request* request = list->front(); request != nullptr; request = request->link) {
                check(request);
            }
        }
    });
    for_each_command([&](u64, const QueuedCommand& command) {
        for (Request* request = command.first; request != nullptr;
             request = command.gathered ? request->link : nullptr) {
            check(request);
        }
    });
    return overdue;
}

void QueueCore::check_timeouts() {
    using Finding = OldestWait::Finding;
    QueuedCommand* oldest = nullptr; // held by the device, with a waiter, or with requests waiting for its sectors
    for_each_command([&](u64, QueuedCommand& command) {
        if ((command.first != nullptr || command.late_write) && !command.delayed &&
            (oldest == nullptr || command.number < oldest->number)) {
            oldest = &command;
        }
    });
    const OldestWait::Seen seen = transport_seen(
        {.oldest = oldest != nullptr ? oldest->number : 0, .in_flight = slots_->size(), .answered = answered_});
    const Finding found = oldest_.check(executor_, seen, timeout_);
    if (reset_bound_) {
        if (oldest == nullptr || oldest->number > reset_issued_) {
            reset_bound_.reset(); // the reset succeeded
        } else if (reset_bound_->passed()) {
            return give_up_after_reset();
        }
    } else if (found != Finding::none) {
        return recover(*oldest, found);
    }
    // While writes wait for one of another queue, that queue's time-out ends the wait.
    const bool waits = oldest == nullptr && (parked_ != 0 || delayed_ != 0) && !transport_late_writes_elsewhere();
    const OldestWait::Seen waiting{
        .oldest = waits ? issued_ + 1 : 0, .in_flight = seen.in_flight, .answered = seen.answered};
    if (stuck_.check(executor_, waiting, timeout_) == Finding::none) {
        return;
    }
    const Stuck stuck = transport_stuck(names());
    if (stuck.kind == Stuck::Kind::close) {
        return close(Status::device_gone, *stuck.why);
    }
    if (stuck.kind == Stuck::Kind::give_up) {
        fail_waiting(*stuck.why);
    }
}

/// Ends one of the requests that wait for room or for a resend.
void QueueCore::fail_waiting(const Error& why) {
    Request* request = nullptr;
    for_each_disk([&](QueuedDevice& disk) {
        if (request == nullptr) {
            request = disk.retry_.empty() ? disk.waiting_.front() : disk.retry_.front();
        }
    });
    for_each_command([&](u64, QueuedCommand& command) {
        if (request == nullptr && command.delayed) {
            request = command.first;
        }
    });
    if (request != nullptr) {
        log::warning("{}: {}", request->device().identity().name.view(), why);
        give_up(*request, Status::timed_out);
    }
}

void QueueCore::recover(QueuedCommand& command, OldestWait::Finding finding) {
    const Recovery recovery = transport_recover(command, finding, names());
    switch (recovery.kind) {
    case Recovery::Kind::none: command.expired = command.expired || recovery.expired; return;
    case Recovery::Kind::give_up:
        if (command.first == nullptr) {
            return close(Status::device_gone,
                         {Code::timed_out, "a write that was given up was never answered: no later write is safe"});
        }
        log::warning("{}: no answer to a request within {} ms, while others were answered",
                     command.device->identity().name.view(), timeout_ / 1'000'000);
        give_up_all(command);
        return oldest_.restart(); // a late write gets another timeout
    case Recovery::Kind::reset_requested: return request_reset(command);
    case Recovery::Kind::stopped:
        reclaim_all(&command);
        complete_done();
        if (recovery.why) {
            close(Status::device_gone, *recovery.why);
        }
        return;
    case Recovery::Kind::close:
        if (recovery.why && recovery.why->code == Code::protocol) {
            return fail(*recovery.why);
        }
        return close(Status::device_gone, Status::timed_out,
                     recovery.why.value_or(Error{Code::timed_out, "the device is silent"}));
    }
}

void QueueCore::request_reset(const QueuedCommand& oldest) {
    for_each_command([&](u64, QueuedCommand& command) {
        if (command.first != nullptr && !command.delayed) {
            command.expired = &command == &oldest || command.reset;
            command.reset = true;
        }
    });
    reset_bound_.emplace(executor_, timeout_);
    reset_issued_ = issued_;
}

void QueueCore::give_up_after_reset() {
    bool writes = false;
    for_each_command([&](u64, QueuedCommand& command) {
        if ((command.first == nullptr && !command.late_write) || command.delayed || command.number > reset_issued_) {
            return;
        }
        writes = writes || changes_medium(command.op);
        give_up_all(command);
    });
    reset_bound_.reset();
    if (const auto why = transport_reset_ineffective(writes)) {
        close(why->code == Code::protocol ? Status::protocol_error : Status::device_gone, *why);
    }
}

} // namespace fl::io
