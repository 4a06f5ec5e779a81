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
import io.ring;
import hv.xen.events;
import hv.xen.grants;

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
        queue_.transport().reclaim();
    }
}

Transport::~Transport() {
    if (!commands_->empty() || pool_.size() != 0 ||
        indirect_size_ != 0) { // not reclaimed: the host may still write to it
        pool_.abandon();
        indirect_memory_.abandon();
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
    terms_.indirect_segments = std::min(terms.indirect_segments, max_segments);
    sector_shift_ = static_cast<u32>(std::countr_zero(terms.geometry.sector_size / terms.wire_unit));
    unit_shift_ = static_cast<u32>(std::countr_zero(terms.wire_unit));
    notify_ = notify;
    notify_context_ = context;
    if (!terms_.persistent) {
        close_pool();
    } else if (pool_.size() >= max_segments) {
        extend_pool(pool);
    } else {
        return Error{Code::bad_argument, "persistent grants were agreed on and there are no pages for them",
                     max_segments, pool_.size()};
    }
    if (terms_.indirect_segments > segments_in_slot) {
        open_indirect(pool);
    }
    spare_memory_.reset();
    return {};
}

bool Transport::start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
    terms_.domain = domain;
    // At most an eighth of the remaining grants for each disk: with many disks the pools get smaller, and finally
    // there are none.
    return keep_spare(pool) && grants_.obtainable() / 8 >= pool_chunk && add_pool_pages(pool);
}

bool Transport::keep_spare(DmaAllocator& pool) {
    if (!spare_memory_) {
        if (auto memory = pool.buffer(spare_bytes)) {
            spare_memory_ = std::move(*memory);
        }
    }
    return static_cast<bool>(spare_memory_);
}

// Adds one chunk of permanently granted pages, or nothing. Granted for reading and writing, because later requests
// may use them in either direction [xen-blkif note 8].
bool Transport::add_pool_pages(DmaAllocator& pool) {
    if (!grants_.ensure(pool_chunk + spare_grants)) {
        return false;
    }
    auto pages = pool.buffer(pool_.chunk_bytes);
    if (!pages) {
        return false;
    }
    u32 page = pool_.size();
    pool_.add(std::move(*pages));
    for (; page < pool_.size(); ++page) {
        const Grant grant = grants_.take_unchecked();
        grants_.grant(grant, terms_.domain, pool_.span(page).bus / page_size, false);
        pool_grants_[page] = grant;
    }
    return true;
}

// Allocates as many pages as the ring can use, or fewer if grants or memory are short.
void Transport::extend_pool(DmaAllocator& pool) {
    const u32 wanted = std::min({requests_->capacity() * segments_in_slot, max_pool_pages, grants_.obtainable() / 8});
    while (pool_.size() + pool_chunk <= wanted && add_pool_pages(pool)) {
    }
}

// Only before the back end has seen these grants.
void Transport::close_pool() {
    for (u32 page = pool_.size(); page-- != 0;) {
        static_cast<void>(grants_.release(pool_grants_[page]));
    }
    pool_.clear();
}

void Transport::open_indirect(DmaAllocator& pool) {
    const u32 wanted = std::min({requests_->capacity(), max_indirect_pages, grants_.obtainable() / 32});
    auto pages = keep_spare(pool) && wanted != 0 && grants_.ensure(wanted + spare_grants)
                     ? pool.buffer(wanted * static_cast<u32>(page_size))
                     : Result<DmaBuffer>(Error{Code::exhausted, "no grants, or no memory, for pages of segments"});
    if (!pages) {
        terms_.indirect_segments = 0; // use 11 direct segments instead
        return;
    }
    indirect_memory_ = std::move(*pages);
    for (; indirect_size_ < wanted; ++indirect_size_) {
        const Grant grant = grants_.take_unchecked();
        // The back end only reads them, but with persistent grants it maps every page writable, including these.
        grants_.grant(grant, terms_.domain, indirect_memory_.bus() / page_size + indirect_size_, !terms_.persistent);
        indirect_grants_[indirect_size_] = grant;
        indirect_free_[indirect_free_count_++] = static_cast<u16>(indirect_size_);
    }
}

// ---- sending ----

io::Fit Transport::prepare(Command& command) {
    if (requests_->full()) {
        return io::Fit::full;
    }
    Wire& wire = command.wire;
    wire.indirect = false;
    wire.segments = 0;
    if (command.op > io::Op::write) [[unlikely]] {
        wire.operation = command.op == io::Op::discard ? Operation::discard : terms_.flush.value_or(Operation::flush);
        return io::Fit::ok;
    }
    const bool pooled = terms_.persistent;
    const u64 bus = command.first->buffer.bus + command.offset;
    // A segment's offset must also be a multiple of the sector size [xen-blkif].
    if (!pooled && bus % terms_.geometry.sector_size != 0) [[unlikely]] {
        command.refusal = io::Status::misaligned;
        return io::Fit::refused;
    }
    wire.operation = command.op == io::Op::read ? Operation::read : Operation::write;
    const u32 in_page = pooled ? 0 : static_cast<u32>(bus % page_size);
    wire.indirect = command.bytes + in_page > segments_in_slot * page_size &&
                    terms_.indirect_segments > segments_in_slot && indirect_free_count_ != 0;
    const u32 most = wire.indirect ? terms_.indirect_segments : segments_in_slot;
    u32 bytes = std::min(command.bytes, most * static_cast<u32>(page_size) - in_page);
    u32 count = (in_page + bytes + static_cast<u32>(page_size) - 1) / static_cast<u32>(page_size);
    if (const u32 free = pooled ? pool_.available() : grants_.available(); count > free) [[unlikely]] {
        if (free == 0 || commands_->size() > 1) { // this command is already counted
            wire.indirect = false;
            return io::Fit::full; // answers will free some
        }
        count = free; // other disks hold the rest, for an unbounded time
        bytes = count * static_cast<u32>(page_size) - in_page;
    }
    if (wire.indirect) {
        wire.indirect_page = indirect_free_[--indirect_free_count_];
    }
    wire.segments = static_cast<u16>(count);
    command.bytes = bytes;
    return io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    Wire& wire = command.wire;
    const u64 sector = (command.first->lba << sector_shift_) + (command.offset >> unit_shift_);
    burst_ = command.offset == 0 ? 1 : burst_ + 1;
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
    if (!wire.indirect) [[likely]] {
        DirectRequest slot; // only the part in use is initialized and copied to the ring
        slot.header = {wire.operation, static_cast<u8>(wire.segments), terms_.handle, 0, id, sector};
        fill_segments(command, std::span(slot.segments).first(wire.segments));
        static_cast<void>(requests_->produce(
            {reinterpret_cast<const std::byte*>(&slot), sizeof slot.header + wire.segments * sizeof(Segment)}));
        return io::SendResult::sent;
    }
    auto* segments = reinterpret_cast<Segment*>(indirect_memory_.data() + wire.indirect_page * page_size);
    fill_segments(command, {segments, wire.segments});
    IndirectRequest slot{Operation::indirect, wire.operation, wire.segments, 0, id, sector, terms_.handle, 0, {}, 0};
    slot.pages[0] = indirect_grants_[wire.indirect_page];
    static_cast<void>(requests_->produce(slot));
    return io::SendResult::sent;
}

// Grants the command's pages and fills in their descriptors. For pooled writes it also copies the data.
void Transport::fill_segments(Command& command, std::span<Segment> segments) {
    Wire& wire = command.wire;
    const bool pooled = terms_.persistent;
    u32 left = command.bytes;
    const u64 bus = command.first->buffer.bus + command.offset;
    u64 frame = bus / page_size;
    u32 in_page = pooled ? 0 : static_cast<u32>(bus % page_size);
    const std::byte* data = command.first->buffer.data + command.offset;
    for (u32 i = 0; i < segments.size(); ++i) {
        const u32 bytes = std::min(left, static_cast<u32>(page_size) - in_page);
        Grant grant;
        if (!pooled) [[likely]] {
            grant = grants_.take_unchecked();
            grants_.grant(grant, terms_.domain, frame++, wire.operation == Operation::write);
            wire.grants[i] = grant;
        } else {
            const u16 page = pool_.take();
            wire.grants[i] = page;
            grant = pool_grants_[page];
            if (wire.operation == Operation::write) {
                std::memcpy(pool_.data(page), data, bytes);
                data += bytes;
            }
        }
        segments[i] = {grant, static_cast<u8>(in_page >> unit_shift_),
                       static_cast<u8>(((in_page + bytes) >> unit_shift_) - 1), 0};
        left -= bytes;
        in_page = 0;
    }
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
        if (armed_at_ != never) { // the processor slept until these arrived
            if (eager_ != 0) {
                --eager_;
            } else if (executor_.turn_time() <= after(armed_at_, patience)) {
                next_eager_ = 1;
            } else {
                next_eager_ = std::min(next_eager_ * 2, max_eager);
                eager_ = next_eager_;
            }
            armed_at_ = never;
        }
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
        return broken({Code::protocol, "an answer carries an id that is not under way (unknown, repeated or retired)",
                       0, response.id});
    }
    const Wire& wire = command->wire;
    if (response.operation != wire.operation && !(wire.indirect && response.operation == Operation::indirect))
        [[unlikely]] {
        return broken({Code::protocol, "an answer names another operation than was asked for",
                       to_underlying(wire.operation), to_underlying(response.operation)});
    }
    completion.id = response.id;
    switch (response.status) {
    case status_ok: completion.status = io::Status::ok; break;
    case status_error: completion.status = io::Status::io_error; break;
    case status_not_supported: completion.status = io::Status::not_supported; break;
    default:
        return broken({Code::protocol, "an answer has a status that the block interface does not define", 0,
                       static_cast<u16>(response.status)});
    }
    return io::Next::one;
}

Result<void> Transport::release(io::Counters&) {
    in_batch_ = false;
    return requests_->retire(batch_);
}

// Releases the command's grants and pages.
bool Transport::finish(Command& command, io::Status status) {
    Wire& wire = command.wire;
    if (terms_.persistent && command.first != nullptr && wire.operation == Operation::read &&
        status == io::Status::ok) {
        std::byte* into = command.first->buffer.data + command.offset;
        for (u32 i = 0, left = command.bytes; i < wire.segments; ++i) {
            const u32 bytes = std::min(left, static_cast<u32>(page_size));
            std::memcpy(into, pool_.data(wire.grants[i]), bytes);
            into += bytes;
            left -= bytes;
        }
    }
    bool safe = true;
    if (wire.indirect) {
        indirect_free_[indirect_free_count_++] = wire.indirect_page;
    }
    for (u32 i = wire.segments; i-- > 0;) { // LIFO order keeps reusing the same few
        if (terms_.persistent) {
            pool_.give(static_cast<u16>(wire.grants[i]));
        } else {
            safe = grants_.release(wire.grants[i]) && safe;
        }
    }
    wire.segments = 0;
    wire.indirect = false;
    return safe;
}

// Ends the back end's access to the buffer while the request is still in the ring. The grant references are not
// reused, because the back end may still process the request. A pool page stays accessible: a write from it may still
// be executed.
io::Fence Transport::fence(Command& command) {
    if (terms_.persistent) {
        return io::Fence::effect;
    }
    bool safe = true;
    for (u32 i = 0; i < command.wire.segments; ++i) {
        safe = grants_.end(command.wire.grants[i]) && safe;
    }
    return !safe ? io::Fence::reachable : command.op == io::Op::discard ? io::Fence::effect : io::Fence::done;
}

// The number of outstanding responses after which an event pays off: all of them, as long as whole batches arrive
// within `patience`; otherwise three quarters, so that a slow response does not delay the others; and at least as
// many as the last request has commands, because no waiter can continue earlier. Responses waiting for the rest are
// found by the executor's tick at the latest.
u32 Transport::event_after(u32 owed) const {
    const u32 enough = owed < 2 || eager_ == 0 ? owed : owed - std::max(owed / 4, 1u);
    return std::max(enough, std::min(burst_, owed));
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
    TRY(const bool found, responses_->arm(event_after(owed), owed));
    armed_at_ = found ? never : executor_.turn_time();
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
                .why = Error{Code::timed_out, "every slot is held by a request that the back end never answered"}};
    }
    return {.kind = io::Stuck::Kind::give_up,
            .why = Error{Code::timed_out, "no grant entries came free for a request within the time-out"}};
}

Result<void> Transport::tick(Instant, bool waiting) {
    grants_.sweep();
    if (waiting && !terms_.persistent) { // the grant table may still grow; a pool has its own entries
        static_cast<void>(grants_.ensure(std::max(spare_grants, terms_.indirect_segments)));
    }
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

void Transport::reclaim() {
    bool safe = true;
    for (u32 page = 0; page < pool_.size(); ++page) {
        safe = grants_.release(pool_grants_[page]) && safe;
    }
    for (u32 i = 0; i < indirect_size_; ++i) {
        safe = grants_.release(indirect_grants_[i]) && safe;
    }
    if (safe) {
        pool_.clear();
        indirect_memory_.reset();
    } else {
        pool_.abandon();
        indirect_memory_.abandon();
    }
    indirect_size_ = indirect_free_count_ = 0;
}

} // namespace fl::drivers::xen_blk

namespace fl {
template class io::BlockQueue<drivers::xen_blk::Transport>;
template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl
