// The queue giving up: time-outs, the reset of the bus, and the end of everything.
module;
#include "core/try.hpp"
module drivers.storvsc.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.block;
import io.inflight;
import io.latch;
import io.oldest_wait;
import hv.hyperv.channel;

namespace fl::drivers::storvsc {

// All parts of a request that ends now, whatever the host does later.
void Queue::abandon(Request& request) {
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        if (slot.request != &request) {
            return;
        }
        slot.request = nullptr;
        if (std::exchange(slot.delayed, false)) { // not with the host
            --delayed_;
            static_cast<void>(inflight_.give(id));
        } else if (request.op <= io::Op::write) {
            request.buffer_lost = true;
        }
    });
    request.parts = 0;
}

void Queue::tick(Instant now) {
    if (state_ != State::open) {
        return;
    }
    look_at_events();
    if (idle_events_ > max_idle_events && !std::exchange(storm_told_, true)) {
        log::warning(
            "storvsc: more than {} interrupts within {} ms and not a packet: the host signals without a reason",
            max_idle_events, idle_window / 1'000'000);
    }
    if (now >= idle_until_) {
        idle_events_ = 0;
        idle_until_ = after(now, idle_window);
    }
    if (channel_.rescinded()) {
        shared_.taken.store(true, std::memory_order_relaxed); // ordered by what shut() stores
        return shut(io::Status::device_gone, {Code::device_gone, "the host has taken the storage controller away"});
    }
    if (first_ && shared_.reset_wanted.load(std::memory_order_relaxed)) {
        send_reset();
    }
    if (shared_.rescan_wanted.load(std::memory_order_relaxed)) {
        wish();
    }
    if (delayed_ != 0) {
        inflight_.for_each([&](u64 id, Slot&) {
            Slot& slot = slots_[inflight_.slot_of(id)];
            if (slot.delayed && state_ == State::open && put(slot, id)) {
                slot.delayed = false;
                --delayed_;
                executor_.touch(*this);
            }
        });
    }
    pump();
    if (state_ == State::open) {
        look_at_time();
    }
}

void Queue::publish_counts(u64 under_way) {
    // modulo 2^64
    shared_.under_way.fetch_add(under_way - std::exchange(published_under_way_, under_way), std::memory_order_relaxed);
    shared_.answered.fetch_add(answered_ - std::exchange(published_answered_, answered_), std::memory_order_relaxed);
    shared_.heard.fetch_add(heard_ - std::exchange(published_heard_, heard_), std::memory_order_relaxed);
}

void Queue::look_at_time() {
    using Finding = io::OldestWait::Finding;
    publish_counts(inflight_.size());
    const u64 under_way = shared_.under_way.load(std::memory_order_relaxed);
    const u64 answered = shared_.answered.load(std::memory_order_relaxed);
    Slot* oldest = nullptr; // with the host, and somebody waits for it
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        if (slot.request != nullptr && !slot.delayed && (oldest == nullptr || slot.number < oldest->number)) {
            oldest = &slot;
        }
    });
    const Finding found =
        oldest_.look(executor_, {oldest != nullptr ? oldest->number : 0, under_way, answered}, timeout_);
    if (reset_wait_) {
        if (oldest == nullptr || oldest->number > reset_issued_) {
            reset_wait_.reset(); // the reset has done its work
        } else if (reset_wait_->passed()) {
            return give_up_after_reset();
        }
    } else if (found != Finding::none) {
        return ask_for_reset(*oldest);
    }
    bool waiting = delayed_ != 0;
    for (const Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
        waiting = waiting || !disk->waiting_.empty();
    }
    const bool stuck = oldest == nullptr && waiting;
    if (stuck_.look(executor_, {stuck ? issued_ + 1 : 0, under_way, answered}, timeout_) != Finding::none) {
        shut(io::Status::device_gone,
             {Code::timed_out, "every slot is held by a request that the host never answered"});
    }
}

void Queue::ask_for_reset(Slot& oldest) {
    if (!channel_.look()) { // the rule that was broken, and not the time-out that came of it
        return broken_ring();
    }
    log::warning("storvsc: no answer within {} ms: asking the host to reset the bus", timeout_ / 1'000'000);
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        if (slot.request != nullptr && !slot.delayed) {
            slot.expired = &slot == &oldest || slot.reset;
            slot.reset = true;
        }
    });
    reset_wait_.emplace(executor_, timeout_);
    reset_issued_ = issued_;
    reset_heard_ = shared_.heard.load(std::memory_order_relaxed);
    shared_.reset_wanted.store(true, std::memory_order_relaxed);
}

// The bus has been reset, or the host does not even do that.
void Queue::give_up_after_reset() {
    bool unfenced = false;
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        Request* request = slot.request;
        if (request == nullptr || slot.delayed || slot.number > reset_issued_) {
            return;
        }
        Disk& disk = *slot.disk;
        unfenced = unfenced || request->op == io::Op::write || request->op == io::Op::discard;
        disk.waiting_.remove(*request);
        abandon(*request);
        disk.end(*request, io::Status::timed_out);
    });
    reset_wait_.reset();
    if (!channel_.look()) {
        return broken_ring();
    }
    if (shared_.heard.load(std::memory_order_relaxed) == reset_heard_) { // on any queue
        return shut(io::Status::device_gone,
                    {Code::timed_out, "the host has not answered anything for a whole time-out"});
    }
    // What the host still holds it may carry out at any time, and undo by it what was written there since.
    if (unfenced) {
        shut(io::Status::device_gone,
             {Code::timed_out, "a write was not answered, not even by a bus reset: nothing may be written behind it"});
    }
}

// Its answer says only that it was taken; what was under way is answered one by one, or is given up.
void Queue::send_reset() {
    if (inflight_.peek(reset_.id) != nullptr && slots_[inflight_.slot_of(reset_.id)].exchange == &reset_) {
        shared_.reset_wanted.store(false, std::memory_order_relaxed); // one is under way
        return;
    }
    reset_.packet = {};
    reset_.packet.header = {Operation::reset_bus, flag_completion, 0};
    if (send(reset_)) {
        shared_.reset_wanted.store(false, std::memory_order_relaxed);
    }
}

void Queue::shut(io::Status status, const Error& why) {
    if (state_ != State::open) {
        return;
    }
    // Relaxed: it only says who tells; another queue may find the same, or something else, in this very moment.
    if (!shared_.told.exchange(true, std::memory_order_relaxed)) {
        FixedText<96> names;
        for (const Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
            print(names, "{}{}", names.empty() ? "" : ", ", disk->identity().name.view());
        }
        log::error("{}: closed: {}", names.empty() ? std::string_view("storvsc") : names.view(), why);
        shared_.close_status.store(to_underlying(status), std::memory_order_relaxed); // ordered by the next line
        shared_.closed.store(true, std::memory_order_release);                        // partner: the acquire in drain()
    }
    end_all(status);
    wish();
}

void Queue::end_all(io::Status status) {
    if (state_ != State::open) {
        return;
    }
    state_ = State::shut;
    publish_counts(0);
    for (Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
        while (Request* request = disk->waiting_.pop()) {
            if (request->parts == 0) {
                disk->end(*request, status);
            } else {
                request->issued = request->buffer.size; // ends with its parts
            }
        }
    }
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        if (Exchange* exchange = std::exchange(slot.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        }
        if (Request* request = std::exchange(slot.request, nullptr); request != nullptr) {
            if (!slot.delayed && request->op <= io::Op::write) {
                request->buffer_lost = true; // nothing keeps the host from it until the channel is closed
            }
            if (request->parts != 0 && --request->parts == 0) {
                slot.disk->end(*request, status);
            }
        }
    });
    // Release: all of the above before. Partner: the acquire in quiet().
    quiet_.store(true, std::memory_order_release);
}

} // namespace fl::drivers::storvsc
