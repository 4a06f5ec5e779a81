// The queue giving up: deadlines, the reset of the bus, and the end of everything.
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
        log::warning("storvsc: more than {} interrupts within {} ms and not a packet: the host signals without a reason", max_idle_events,
                     idle_window / 1'000'000);
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
    look_at_deadlines(now);
    pump();
}

void Queue::look_at_deadlines(Instant now) {
    bool late = false;
    bool starved = false;
    for (Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
        for (usize n = disk->waiting_.size(); n != 0; --n) {
            Request& request = *disk->waiting_.pop();
            if (request.deadline > now || request.parts != 0) { // those with parts are found below
                disk->waiting_.push(request);
                continue;
            }
            starved = true;
            disk->end(request, io::Status::timed_out);
        }
    }
    bool given_up = false;
    bool unfenced = false;
    bool waited_for = false;
    inflight_.for_each([&](u64 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        Request* request = slot.request;
        waited_for = waited_for || request != nullptr || slot.exchange != nullptr;
        if (request == nullptr || request->deadline > now) {
            return;
        }
        late = true;
        slot.expired = true;
        if (now >= after(request->deadline, std::min(grace, timeout_))) {
            Disk& disk = *slot.disk;
            given_up = true;
            unfenced = unfenced || request->op == io::Op::write || request->op == io::Op::discard;
            disk.waiting_.remove(*request);
            abandon(*request);
            disk.end(*request, io::Status::timed_out);
        }
    });
    if (late && !channel_.look()) { // the rule that was broken, and not the time-out that came of it
        return broken_ring();
    }
    if (late && !shared_.reset_wanted.load(std::memory_order_relaxed) && reset_at_ == never) {
        log::warning("storvsc: no answer within {} ms: asking the host to reset the bus", timeout_ / 1'000'000);
        reset_at_ = now;
        shared_.reset_wanted.store(true, std::memory_order_relaxed);
    }
    if (!late && reset_at_ != never && now >= after(reset_at_, timeout_)) {
        reset_at_ = never; // the next time-out may ask again
    }
    if (given_up && now >= after(last_answer_, timeout_)) {
        return shut(io::Status::device_gone, {Code::timed_out, "the host has not answered anything for a whole time-out"});
    }
    // What the host still holds it may carry out at any time, and undo by it what was written there since.
    if (unfenced) {
        return shut(io::Status::device_gone,
                    {Code::timed_out, "a write was not answered, not even by a bus reset: nothing may be written behind it"});
    }
    if (starved && !waited_for && inflight_.size() >= max_parts - kept_parts) {
        shut(io::Status::device_gone, {Code::timed_out, "every slot is held by a request that the host never answered"});
    }
}

// Its answer says only that it was taken; what was under way is answered one by one, or is given up when the grace has passed.
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
