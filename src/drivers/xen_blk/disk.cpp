module;
#include "core/try.hpp"
module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import drivers.xen_blk.answer;

namespace fl::drivers::xen_blk {

// ---- opening ----

void Disk::set_terms(const Terms& terms) {
    io::Geometry geometry = terms.geometry;
    geometry.flush = terms.flush.has_value();
    geometry.discard = terms.discard && !geometry.read_only;
    geometry.secure_discard = terms.secure_discard && !geometry.read_only;
    set_geometry(geometry);
    if (std::exchange(known_, true)) {
        renew(geometry);
    }
}

void Transport::start(const Terms& terms, void (*notify)(void*), void* context) {
    channel_.open(terms.port);
    requests_.open(terms);
    notify_ = notify;
    notify_context_ = context;
    pacing_ = {};
    fault_.reset();
    link_ = Link::up;
}

void Transport::lose() {
    link_ = Link::lost;
    channel_.close();
}

// ---- sending ----

inline io::Fit Transport::prepare(Command& command) {
    if (link_ != Link::up || ring_.full()) [[unlikely]] {
        return io::Fit::full;
    }
    return requests_.fit(command, command.wire, commands_->size() > 1); // this command is already counted
}

[[gnu::always_inline]] inline io::SendResult Transport::send(Command& command, u64 id) {
    if (requests_.is_one_page(command, command.wire)) [[likely]] {
        ring_.add(requests_.encode_one(command, command.wire, id));
    } else {
        send_other(command, id);
    }
    pacing_.sent(command.offset == 0);
    return io::SendResult::sent;
}

void Transport::send_other(Command& command, u64 id) {
    Slot slot;
    ring_.add(requests_.encode(slot, command, command.wire, id));
}

inline Result<void> Transport::publish(io::Counters& counters) {
    if (link_ == Link::lost || !ring_.publish()) {
        return {};
    }
    ++counters.notifications;
    ++counters.hypercalls;
    return channel_.send();
}

// ---- answers ----

[[gnu::always_inline]] inline io::Next Transport::next(io::Completion& completion) {
    if (link_ == Link::lost) [[unlikely]] {
        return io::Next::none;
    }
    if (!ring_.in_batch()) {
        const auto found = ring_.begin_batch();
        if (!found) [[unlikely]] {
            return broken(found.error());
        }
        if (*found == 0) {
            return io::Next::none;
        }
        pacing_.arrived(executor_.turn_time());
    }
    Response response;
    if (!ring_.take(response)) {
        return io::Next::none;
    }
    const Command* command = commands_->find(response.id);
    if (command == nullptr) [[unlikely]] {
        return broken({Code::protocol, "a response carries an id that is not in flight (unknown, repeated or retired)",
                       0, response.id});
    }
    completion.id = response.id;
    return decode(response, command->wire, completion.status, fault_) ? io::Next::one : io::Next::broken;
}

Result<bool> Transport::arm() {
    if (link_ == Link::lost) [[unlikely]] {
        return false;
    }
    if (channel_.unmask()) {
        return true;
    }
    const u32 owed = ring_.owed();
    if (owed == 0) {
        return false; // a response now would be a protocol violation, which next() detects
    }
    TRY(const bool found, ring_.arm(pacing_.count(owed)));
    pacing_.armed(found, executor_.turn_time());
    return found;
}

// ---- the end of a command ----

[[gnu::always_inline]] inline bool Transport::finish(Command& command, io::Status status) {
    Wire& wire = command.wire;
    if (pages_.persistent() && command.first != nullptr && wire.operation == Operation::read &&
        status == io::Status::ok) [[unlikely]] {
        pages_.copy_back(wire.pages, command.data());
    }
    return pages_.release(wire.pages);
}

// A bounce page stays accessible: a write from it may still be executed.
io::Fence Transport::fence(Command& command) {
    if (pages_.persistent()) {
        return io::Fence::effect;
    }
    const bool safe = pages_.end_access(command.wire.pages);
    return !safe ? io::Fence::reachable : command.op >= io::Op::discard ? io::Fence::effect : io::Fence::done;
}

// ---- without a command ----

Result<void> Transport::tick(Instant, bool waiting) {
    if (!is_lost()) { // else the pages are processor 0's
        pages_.tick(waiting);
    }
    return {};
}

void Transport::closed(bool stopped) {
    channel_.close();
    if (!stopped && notify_ != nullptr) {
        std::exchange(notify_, nullptr)(notify_context_);
    }
    leave(); // the last: the driver may free everything from here on
}

} // namespace fl::drivers::xen_blk

namespace fl {
template class io::BlockQueue<drivers::xen_blk::Transport>;
template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl
