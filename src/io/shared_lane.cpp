module io.shared_lane;
import core.std;
import core.check;
import core.result;
import core.dma;
import core.vector;
import io.task;
import io.executor;
import io.block;

namespace fl::io {

SharedLane::SharedLane(Executor& executor, BlockDevice& target)
    : BlockDevice(executor), target_(target), collector_(collect_for(*this)) {
    identity_ = target.identity();
    geometry_ = target.geometry();
    set_timeout(target.timeout());
    eviction_.lane = this;
    for (usize i = proxies_.size(); i-- > 0;) {
        Proxy& proxy = proxies_[i];
        proxy.lane = this;
        proxy.next_free = std::exchange(free_, &proxy);
        for (Step* step :
             {&proxy.submit, &proxy.cancel, &proxy.forget, &proxy.done, &proxy.cancelled, &proxy.forgotten}) {
            step->proxy = &proxy;
        }
        proxy.submit.run = on_submit;
        proxy.cancel.run = on_cancel;
        proxy.forget.run = on_forget;
        proxy.done.run = on_done;
        proxy.cancelled.run = proxy.forgotten.run = on_answer;
    }
}

SharedLane::~SharedLane() {
    for (const Proxy& proxy : proxies_) {
        check(proxy.unanswered == 0, "a shared lane is destroyed after the target has answered for every request");
    }
    if (eviction_.evict != nullptr) { // the target's executor still serves
        target_.executor().remove_remote(eviction_);
    }
    if (collector_.handle) {
        collector_.handle.destroy();
    }
}

Result<void> SharedLane::usable() const {
    if (!collector_.handle) {
        return Error{Code::exhausted, "no coroutine frame left for a lane: a larger io::FramePool"};
    }
    return {};
}

// --- At home ---

void SharedLane::start(Request& request) {
    if (free_ == nullptr) {
        waiting_.push(request);
    } else {
        forward(request);
    }
}

void SharedLane::forward(Request& request) {
    Proxy& proxy = *std::exchange(free_, free_->next_free);
    proxy.origin = &request;
    proxy.op = request.op;
    proxy.lba = request.lba;
    proxy.buffer = request.buffer;
    proxy.bound = request.bound;
    if (!send(proxy, proxy.submit)) {
        proxy.origin = nullptr;
        proxy.next_free = std::exchange(free_, &proxy);
        complete(request, Status::device_gone);
    }
}

// False: the target's executor has stopped.
bool SharedLane::send(Proxy& proxy, Step& step) {
    const bool sent = target_.executor().post(step);
    proxy.unanswered += sent ? 1 : 0;
    return sent;
}

void SharedLane::on_done(Post& post) {
    Proxy& proxy = *static_cast<Step&>(post).proxy;
    if (Request* request = std::exchange(proxy.origin, nullptr); request != nullptr) {
        request->buffer_lost = proxy.buffer_lost;
        proxy.lane->complete(*request, proxy.status);
    }
    proxy.lane->answered(proxy);
}

void SharedLane::on_answer(Post& post) {
    Proxy& proxy = *static_cast<Step&>(post).proxy;
    proxy.lane->answered(proxy);
}

void SharedLane::answered(Proxy& proxy) {
    if (--proxy.unanswered != 0) {
        return;
    }
    if (std::exchange(proxy.quarantined, false)) {
        release_quarantine(&proxy);
    }
    proxy.cancelling = false;
    proxy.next_free = std::exchange(free_, &proxy);
    while (free_ != nullptr && !waiting_.empty()) {
        forward(*waiting_.pop());
    }
}

SharedLane::Proxy* SharedLane::find(const Request& request) {
    const auto found = std::ranges::find(proxies_, &request, &Proxy::origin);
    return found != proxies_.end() ? &*found : nullptr;
}

bool SharedLane::cancel_now(Request& request) {
    if (waiting_.remove(request)) {
        complete(request, Status::cancelled);
        return true;
    }
    Proxy* proxy = find(request);
    if (proxy != nullptr && !proxy->cancelling) {
        proxy->cancelling = send(*proxy, proxy->cancel);
    }
    return false; // the target decides
}

void SharedLane::forget(Request& request) {
    if (waiting_.remove(request)) {
        return;
    }
    Proxy* const proxy = find(request);
    if (proxy == nullptr) {
        return;
    }
    proxy->origin = nullptr;
    if (has_data(request.op)) {
        // Until the target has forgotten it, too; its queue then knows whether the device may still access the
        // buffer.
        request.buffer_lost = true;
        proxy->quarantined = true;
        quarantine(request.buffer, proxy);
    }
    // If the target's executor has stopped, its evict() has posted `done`.
    static_cast<void>(send(*proxy, proxy->forget));
}

// --- On the target's processor ---

SharedLane::Collector SharedLane::collect_for(SharedLane& lane) {
    for (;;) {
        co_await std::suspend_always{};
        lane.collect();
    }
}

void SharedLane::on_submit(Post& post) {
    Proxy& proxy = *static_cast<Step&>(post).proxy;
    SharedLane& lane = *proxy.lane;
    if (lane.eviction_.evict == nullptr) {
        lane.eviction_.evict = [](RemoteTask& task) { static_cast<Eviction&>(task).lane->evict(); };
        lane.target_.executor().add_remote(lane.eviction_);
    }
    proxy.forwarded.emplace(lane.target_, proxy.op, proxy.lba, proxy.buffer, proxy.bound);
    proxy.forwarded->waiter = lane.collector_.handle;
    proxy.next_active = std::exchange(lane.active_, &proxy);
    submit_forwarded(lane.target_, *proxy.forwarded);
}

void SharedLane::on_cancel(Post& post) {
    Proxy& proxy = *static_cast<Step&>(post).proxy;
    if (proxy.forwarded) {
        static_cast<void>(proxy.lane->target_.cancel(*proxy.forwarded));
    }
    proxy.lane->answer(proxy.cancelled);
}

void SharedLane::on_forget(Post& post) {
    Proxy& proxy = *static_cast<Step&>(post).proxy;
    SharedLane& lane = *proxy.lane;
    for (Proxy** at = &lane.active_; *at != nullptr; at = &(*at)->next_active) {
        if (*at == &proxy) {
            *at = proxy.next_active;
            lane.end(proxy, Status::cancelled, true);
            break;
        }
    }
    lane.answer(proxy.forgotten);
}

// Takes every forwarded request that has ended, in one pass: those still in the executor's ready list are removed from
// it with their node, so that a batch of completions resumes the collector once.
void SharedLane::collect() {
    for (Proxy** at = &active_; *at != nullptr;) {
        Proxy& proxy = **at;
        if (proxy.forwarded->pending()) {
            at = &proxy.next_active;
            continue;
        }
        *at = proxy.next_active;
        end(proxy, proxy.forwarded->status, proxy.forwarded->buffer_lost);
    }
}

void SharedLane::evict() {
    eviction_.evict = nullptr; // the executor has removed it
    collect();                 // those that have ended keep their status
    while (active_ != nullptr) {
        Proxy& proxy = *std::exchange(active_, active_->next_active);
        const DmaSpan buffer = proxy.buffer;
        proxy.forwarded.reset();
        end(proxy, Status::device_gone, is_quarantined(buffer));
    }
}

void SharedLane::end(Proxy& proxy, Status status, bool buffer_lost) {
    proxy.status = status;
    proxy.buffer_lost = buffer_lost;
    proxy.forwarded.reset();
    answer(proxy.done);
}

// Refused: the home executor has stopped, and what waits there is never resumed.
void SharedLane::answer(Step& step) { static_cast<void>(executor().post(step)); }

// --- All lanes of a disk ---

SharedLanes::~SharedLanes() {
    for (BlockDevice* lane : lanes_) {
        delete static_cast<SharedLane*>(lane);
    }
}

Result<void> SharedLanes::add_to(BlockDevice& disk, std::span<Executor* const> executors) {
    Result<void> result;
    u32 next = 0;
    for (Executor* executor : executors) {
        bool has_queue = false;
        for (u32 i = 0; i < disk.queues(); ++i) {
            has_queue = has_queue || &disk.queue_lane(i).executor() == executor;
        }
        if (has_queue) {
            continue;
        }
        if (frame_pool().in_use() >= max_frames) {
            result = Error{Code::exhausted, "the remaining coroutine frames are kept for requests", max_frames,
                           frame_pool().in_use()};
            break;
        }
        auto* const lane = new (std::nothrow) SharedLane(*executor, disk.queue_lane(next++ % disk.queues()));
        result = lane != nullptr ? lane->usable() : Error{Code::exhausted, "no memory for a lane that shares a queue"};
        if (result && !lanes_.push(lane)) {
            result = Error{Code::exhausted, "no memory for the list of a disk's lanes"};
        }
        if (!result) {
            delete lane;
            break;
        }
    }
    disk.share({lanes_.begin(), lanes_.size()});
    return result;
}

} // namespace fl::io
