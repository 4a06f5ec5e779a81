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
import io.event_pacing;
import io.oldest_wait;
import io.ring;
import hv.xen.events;
import hv.xen.grants;
import drivers.xen_blk.pages;

namespace fl::drivers::xen_blk {

using hv::xen::Port;

Result<void> Disk::open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void*),
                        void* context) {
    identity_ = identity;
    io::Geometry geometry = terms.geometry;
    geometry.flush = terms.flush.has_value();
    geometry.discard = terms.discard && !geometry.read_only;
    set_geometry(geometry);
    CHECK(queue_.transport().open(terms, pool, notify, context));
    queue_.add(*this);
    queue_.open(timeout());
    return {};
}

void Disk::reclaim() {
    queue_.reclaim();
    if (!queue_.is_open()) {
        queue_.transport().pages().reclaim();
    }
}

Result<void> Transport::lay_out(DmaSpan ring) {
    io::MappedMemory memory(ring.data, ring.size);
    const u32 slots = std::min(io::ring_entries(ring.size, ring_slots, slot_bytes), max_commands);
    const io::FreeRunning<u32> positions(slots);
    TRY(requests_,
        Requests::create(
            memory,
            {.index = ring_request_producer, .event = ring_request_event, .entries = ring_slots, .stride = slot_bytes},
            positions));
    TRY(responses_, Responses::create(memory,
                                      {.index = ring_response_producer,
                                       .event = ring_response_event,
                                       .entries = ring_slots,
                                       .stride = slot_bytes},
                                      positions));
    // Both sides want an event for the first entry [xen-ring SHARED_RING_INIT].
    memory.store_relaxed<u32>(ring_request_event, 1);
    memory.store_relaxed<u32>(ring_response_event, 1);
    return {};
}

Result<void> Transport::open(const Terms& terms, DmaAllocator& pool, void (*notify)(void*), void* context) {
    terms_ = terms;
    sector_shift_ = static_cast<u32>(std::countr_zero(terms.geometry.sector_size / terms.wire_unit));
    unit_shift_ = static_cast<u32>(std::countr_zero(terms.wire_unit));
    notify_ = notify;
    notify_context_ = context;
    return pages_.open(terms, terms.geometry.sector_size, requests_->capacity(), pool);
}

// ---- sending ----

io::Fit Transport::prepare(Command& command) {
    if (requests_->full()) {
        return io::Fit::full;
    }
    Wire& wire = command.wire;
    if (command.op > io::Op::write) [[unlikely]] {
        wire.operation = command.op == io::Op::discard ? Operation::discard : terms_.flush.value_or(Operation::flush);
        return io::Fit::ok;
    }
    const DmaSpan data = command.data();
    if (!pages_.admits(data)) [[unlikely]] {
        command.refusal = io::Status::misaligned;
        return io::Fit::refused;
    }
    wire.operation = command.op == io::Op::read ? Operation::read : Operation::write;
    const u32 bytes = pages_.take(wire.pages, data, commands_->size() > 1); // this command is already counted
    if (bytes == 0) [[unlikely]] {
        return io::Fit::full;
    }
    command.bytes = bytes;
    return io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    Wire& wire = command.wire;
    const u64 sector = (command.first->lba << sector_shift_) + (command.offset >> unit_shift_);
    pacing_.sent(command.offset == 0);
    if (command.op > io::Op::write) [[unlikely]] {
        if (command.op == io::Op::discard) {
            const DiscardRequest slot{{wire.operation, 0, terms_.handle, 0, id, sector}, command.bytes >> unit_shift_};
            static_cast<void>(requests_->produce(slot));
        } else {
            const RequestHeader slot{wire.operation, 0, terms_.handle, 0, id, 0};
            static_cast<void>(requests_->produce(slot));
        }
        return io::SendResult::sent;
    }
    CommandPages& pages = wire.pages;
    DirectRequest slot; // only the part in use is initialized and copied to the ring
    pages_.fill(pages, command.data(), wire.operation == Operation::write,
                pages.indirect ? pages_.indirect_segments(pages) : std::span(slot.segments).first(pages.segments));
    if (!pages.indirect) [[likely]] {
        slot.header = {wire.operation, pages.segments, terms_.handle, 0, id, sector};
        static_cast<void>(requests_->produce(
            {reinterpret_cast<const std::byte*>(&slot), sizeof slot.header + pages.segments * sizeof(Segment)}));
        return io::SendResult::sent;
    }
    IndirectRequest indirect{
        Operation::indirect, wire.operation, pages.segments, 0, id, sector, terms_.handle, 0, {}, 0};
    indirect.pages[0] = pages_.indirect_grant(pages);
    static_cast<void>(requests_->produce(indirect));
    return io::SendResult::sent;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (!requests_->publish()) {
        return {};
    }
    ++counters.notifications;
    ++counters.hypercalls;
    return events_.send(terms_.port);
}

// ---- answers ----

void Transport::on_event() {
    interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    // At most one event between two sleeps of the executor, however many the back end sends.
    events_.mask(terms_.port);
    masked_.store(true, std::memory_order_relaxed);
    executor_.raise(*queue);
}

// The producer index is read once per batch.
io::Next Transport::next(io::Completion& completion) {
    if (!in_batch_) {
        const auto found = responses_->available(requests_->owed());
        if (!found) [[unlikely]] {
            return broken(found.error());
        }
        if (*found == 0) {
            return io::Next::none;
        }
        in_batch_ = true;
        batch_ = batch_left_ = *found;
        pacing_.arrived(executor_.turn_time());
    }
    if (batch_left_ == 0) {
        return io::Next::none;
    }
    --batch_left_;
    Response response;
    static_cast<void>(responses_->take(response)); // the only read of it
    return check(response, completion);
}

[[gnu::always_inline]] inline io::Next Transport::check(const Response& response, io::Completion& completion) {
    const Command* command = commands_->find(response.id);
    if (command == nullptr) [[unlikely]] {
        return broken({Code::protocol, "a response carries an id that is not in flight (unknown, repeated or retired)",
                       0, response.id});
    }
    const Wire& wire = command->wire;
    if (response.operation != wire.operation && !(wire.pages.indirect && response.operation == Operation::indirect))
        [[unlikely]] {
        return broken({Code::protocol, "a response has another operation than its request",
                       to_underlying(wire.operation), to_underlying(response.operation)});
    }
    completion.id = response.id;
    switch (response.status) {
    case status_ok: completion.status = io::Status::ok; break;
    case status_error: completion.status = io::Status::io_error; break;
    case status_not_supported: completion.status = io::Status::not_supported; break;
    default:
        return broken({Code::protocol, "a response has a status that the block interface does not define", 0,
                       static_cast<u16>(response.status)});
    }
    return io::Next::one;
}

Result<void> Transport::release(io::Counters&) {
    in_batch_ = false;
    return requests_->retire(batch_);
}

bool Transport::finish(Command& command, io::Status status) {
    Wire& wire = command.wire;
    if (pages_.persistent() && command.first != nullptr && wire.operation == Operation::read &&
        status == io::Status::ok) {
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
    return !safe ? io::Fence::reachable : command.op == io::Op::discard ? io::Fence::effect : io::Fence::done;
}

Result<bool> Transport::arm() {
    if (masked_.load(std::memory_order_relaxed)) {
        masked_.store(false, std::memory_order_relaxed); // before unmasking: the handler may run in between
        if (events_.unmask(terms_.port)) {
            masked_.store(true, std::memory_order_relaxed); // consumed here, as the handler would do
            events_.mask(terms_.port);
            return true;
        }
    }
    const u32 owed = requests_->owed();
    if (owed == 0) {
        return false; // a response now would be a protocol violation, which next() detects
    }
    TRY(const bool found, responses_->arm(pacing_.count(owed), owed));
    pacing_.armed(found, executor_.turn_time());
    return found;
}

// ---- recovery ----

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding finding, std::string_view) {
    if (finding == io::OldestWait::Finding::lost) {
        return {.kind = io::Recovery::Kind::give_up};
    }
    return {.kind = io::Recovery::Kind::close,
            .why = Error{Code::timed_out, "the back end has not answered anything for a whole time-out"}};
}

// Abandoned requests hold all slots, or other disks hold all grants.
io::Stuck Transport::stuck(std::string_view) {
    if (commands_->full() || requests_->full()) {
        return {.kind = io::Stuck::Kind::close,
                .why = Error{Code::timed_out, "every slot is held by a request that the back end never completed"}};
    }
    return {.kind = io::Stuck::Kind::give_up,
            .why = Error{Code::timed_out, "no grant entries became free for a request within the time-out"}};
}

Result<void> Transport::tick(Instant, bool waiting) {
    pages_.tick(waiting);
    return {};
}

bool Transport::closing(io::Status) {
    events_.mask(terms_.port);
    return true;
}

void Transport::closed(bool stopped) {
    if (!stopped && notify_ != nullptr) {
        std::exchange(notify_, nullptr)(notify_context_);
    }
}

} // namespace fl::drivers::xen_blk

namespace fl {
template class io::BlockQueue<drivers::xen_blk::Transport>;
template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl
