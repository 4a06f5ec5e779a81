module;
#include "core/try.hpp"
module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.block;
import io.inflight;
import io.oldest_wait;
import io.ring;
import hv.xen.events;
import hv.xen.grants;

namespace fl::drivers::xen_blk {

using hv::xen::Port;

Disk::Disk(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
    : io::BlockDevice(executor), events_(events), grants_(grants) {}

Disk::~Disk() {
    if (state_ != State::closed) {
        executor().remove(*this);
    }
    if (!inflight_.empty() || pool_size_ != 0 || indirect_size_ != 0) { // not reclaimed: somebody may still write there
        for (DmaBuffer& memory : pool_memory_) {
            memory.abandon();
        }
        indirect_memory_.abandon();
    }
}

Result<void> Disk::prepare(DmaSpan ring) {
    io::MappedMemory memory(ring.data, ring.size);
    const u32 slots = std::min(io::ring_entries(ring.size, ring_slots, slot_bytes), max_parts);
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
    // Both sides want to hear of the first entry [xen-ring SHARED_RING_INIT].
    memory.store_relaxed<u32>(ring_request_event, 1);
    memory.store_relaxed<u32>(ring_response_event, 1);
    return {};
}

Result<void> Disk::open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void*),
                        void* context) {
    terms_ = terms;
    terms_.indirect_segments = std::min(terms.indirect_segments, max_segments);
    identity_ = identity;
    geometry_ = terms.geometry;
    geometry_.flush = terms.flush.has_value();
    geometry_.discard = terms.discard && !geometry_.read_only;
    sector_shift_ = static_cast<u32>(std::countr_zero(geometry_.sector_size / terms.wire_unit));
    unit_shift_ = static_cast<u32>(std::countr_zero(terms.wire_unit));
    notify_ = notify;
    notify_context_ = context;
    if (!terms_.persistent) {
        close_pool();
    } else if (pool_size_ >= max_segments) {
        extend_pool(pool);
    } else {
        return Error{Code::bad_argument, "persistent grants were agreed on and there are no pages for them",
                     max_segments, pool_size_};
    }
    if (terms_.indirect_segments > segments_in_slot) {
        open_indirect(pool);
    }
    spare_memory_.reset();
    state_ = State::open;
    executor().add(*this);
    return {};
}

bool Disk::start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
    terms_.domain = domain;
    // An eighth of the grants that are left, at most, for each disk: the pools of many disks become smaller, and then
    // there are none.
    return keep_spare(pool) && grants_.obtainable() / 8 >= pool_chunk && add_pool_pages(pool);
}

bool Disk::keep_spare(DmaAllocator& pool) {
    if (!spare_memory_) {
        if (auto memory = pool.buffer(spare_bytes)) {
            spare_memory_ = std::move(*memory);
        }
    }
    return static_cast<bool>(spare_memory_);
}

// Pages that stay granted, for reading and writing: later requests use them in either direction [xen-blkif note 8]. A
// chunk of them or none.
bool Disk::add_pool_pages(DmaAllocator& pool) {
    if (!grants_.ensure(pool_chunk + spare_grants)) {
        return false;
    }
    auto pages = pool.buffer(pool_chunk * static_cast<u32>(page_size));
    if (!pages) {
        return false;
    }
    DmaBuffer& memory = pool_memory_[pool_size_ / pool_chunk];
    memory = std::move(*pages);
    for (u32 i = 0; i < pool_chunk; ++i) {
        const Grant grant = grants_.take_unchecked();
        grants_.grant(grant, terms_.domain, memory.bus() / page_size + i, false);
        pool_[pool_size_] = {memory.data() + i * page_size, grant};
        pool_free_[pool_free_count_++] = static_cast<u16>(pool_size_++);
    }
    return true;
}

// As many pages as the ring can use; fewer where grants or memory are short.
void Disk::extend_pool(DmaAllocator& pool) {
    const u32 wanted = std::min({requests_->capacity() * segments_in_slot, max_pool_pages, grants_.obtainable() / 8});
    while (pool_size_ + pool_chunk <= wanted && add_pool_pages(pool)) {
    }
}

// The other side has not seen these grants.
void Disk::close_pool() {
    while (pool_size_ != 0) {
        static_cast<void>(grants_.release(pool_[--pool_size_].grant));
    }
    pool_free_count_ = 0;
    pool_memory_ = {};
}

void Disk::open_indirect(DmaAllocator& pool) {
    const u32 wanted = std::min({requests_->capacity(), max_indirect_pages, grants_.obtainable() / 32});
    auto pages = keep_spare(pool) && wanted != 0 && grants_.ensure(wanted + spare_grants)
                     ? pool.buffer(wanted * static_cast<u32>(page_size))
                     : Result<DmaBuffer>(Error{Code::exhausted, "no grants, or no memory, for pages of segments"});
    if (!pages) {
        terms_.indirect_segments = 0; // eleven segments will do
        return;
    }
    indirect_memory_ = std::move(*pages);
    for (; indirect_size_ < wanted; ++indirect_size_) {
        const Grant grant = grants_.take_unchecked();
        // Only read, but with persistent grants the back end maps every page for writing, these too.
        grants_.grant(grant, terms_.domain, indirect_memory_.bus() / page_size + indirect_size_, !terms_.persistent);
        indirect_grants_[indirect_size_] = grant;
        indirect_free_[indirect_free_count_++] = static_cast<u16>(indirect_size_);
    }
}

// ---- asking ----

void Disk::start(Request& request) {
    if (state_ != State::open) [[unlikely]] {
        return complete(request, io::Status::device_gone);
    }
    // A segment's offset must be a multiple of the sector size, too [xen-blkif].
    if (request.op <= io::Op::write && request.buffer.bus % geometry_.sector_size != 0 && !terms_.persistent)
        [[unlikely]] {
        return complete(request, io::Status::misaligned);
    }
    if (!waiting_.empty() || !issue(request)) {
        waiting_.push(request);
    }
    executor().touch(*this);
}

// Everything of the request into the ring; false: there is no room for the rest now. issued == buffer.size: nothing is
// left.
bool Disk::issue(Request& request) {
    if (request.op > io::Op::write) [[unlikely]] {
        return issue_command(request);
    }
    do {
        if (!issue_data(request)) {
            return false;
        }
    } while (request.issued < request.buffer.size);
    burst_ = request.parts;
    return true;
}

bool Disk::issue_data(Request& request) {
    if (requests_->full()) {
        return false;
    }
    const bool pooled = terms_.persistent;
    const u32 left = request.buffer.size - request.issued;
    const u32 in_page = pooled ? 0 : static_cast<u32>((request.buffer.bus + request.issued) % page_size);
    const bool indirect = left + in_page > segments_in_slot * page_size &&
                          terms_.indirect_segments > segments_in_slot && indirect_free_count_ != 0;
    const u32 most = indirect ? terms_.indirect_segments : segments_in_slot;
    u32 bytes = std::min(left, most * static_cast<u32>(page_size) - in_page);
    u32 count = (in_page + bytes + static_cast<u32>(page_size) - 1) / static_cast<u32>(page_size);
    if (const u32 free = pooled ? pool_free_count_ : grants_.available(); count > free) [[unlikely]] {
        if (free == 0 || !inflight_.empty()) {
            return false; // answers give some back
        }
        count = free; // other disks have the rest, for as long as they like
        bytes = count * static_cast<u32>(page_size) - in_page;
    }
    const auto id = inflight_.take(parts_[0]); // the slot is what counts
    if (!id) [[unlikely]] {
        return false;
    }
    Part& part = parts_[inflight_.slot_of(*id)];
    part.request = &request;
    part.operation = request.op == io::Op::read ? Operation::read : Operation::write;
    part.indirect = indirect;
    part.segments = static_cast<u16>(count);
    part.offset = request.issued;
    part.bytes = bytes;
    part.number = ++issued_;
    const u64 sector = (request.lba << sector_shift_) + (request.issued >> unit_shift_);
    if (!indirect) [[likely]] {
        DirectRequest slot; // as much of it as is used is written, and no more goes into the ring
        slot.header = {part.operation, static_cast<u8>(count), terms_.handle, 0, *id, sector};
        fill_segments(part, request, std::span(slot.segments).first(count), pooled);
        static_cast<void>(requests_->produce(
            {reinterpret_cast<const std::byte*>(&slot), sizeof slot.header + count * sizeof(Segment)}));
    } else {
        part.indirect_page = indirect_free_[--indirect_free_count_];
        auto* segments = reinterpret_cast<Segment*>(indirect_memory_.data() + part.indirect_page * page_size);
        fill_segments(part, request, {segments, count}, pooled);
        IndirectRequest slot{
            Operation::indirect, part.operation, static_cast<u16>(count), 0, *id, sector, terms_.handle, 0, {}, 0};
        slot.pages[0] = indirect_grants_[part.indirect_page];
        static_cast<void>(requests_->produce(slot));
    }
    request.issued += bytes;
    ++request.parts;
    return true;
}

// Grants the part's pages and describes them. For writes through the pool the data is copied here.
void Disk::fill_segments(Part& part, Request& request, std::span<Segment> segments, bool pooled) {
    u32 left = part.bytes;
    const u64 bus = request.buffer.bus + part.offset;
    u64 frame = bus / page_size;
    u32 in_page = pooled ? 0 : static_cast<u32>(bus % page_size);
    const std::byte* data = request.buffer.data + part.offset;
    for (u32 i = 0; i < segments.size(); ++i) {
        const u32 bytes = std::min(left, static_cast<u32>(page_size) - in_page);
        Grant grant;
        if (!pooled) [[likely]] {
            grant = grants_.take_unchecked();
            grants_.grant(grant, terms_.domain, frame++, part.operation == Operation::write);
            part.grants[i] = grant;
        } else {
            const u16 page = pool_free_[--pool_free_count_];
            part.grants[i] = page;
            grant = pool_[page].grant;
            if (part.operation == Operation::write) {
                std::memcpy(pool_[page].data, data, bytes);
                data += bytes;
            }
        }
        segments[i] = {grant, static_cast<u8>(in_page >> unit_shift_),
                       static_cast<u8>(((in_page + bytes) >> unit_shift_) - 1), 0};
        left -= bytes;
        in_page = 0;
    }
}

bool Disk::issue_command(Request& request) {
    if (requests_->full()) {
        return false;
    }
    const auto id = inflight_.take(parts_[0]);
    if (!id) {
        return false;
    }
    Part& part = parts_[inflight_.slot_of(*id)];
    part.request = &request;
    part.indirect = false;
    part.segments = 0;
    part.offset = 0;
    part.bytes = 0;
    part.number = ++issued_;
    if (request.op == io::Op::discard) {
        part.operation = Operation::discard;
        const DiscardRequest slot{{Operation::discard, 0, terms_.handle, 0, *id, request.lba << sector_shift_},
                                  request.buffer.size >> unit_shift_};
        static_cast<void>(requests_->produce(slot));
    } else {
        part.operation = terms_.flush.value_or(Operation::flush);
        const RequestHeader slot{part.operation, 0, terms_.handle, 0, *id, 0};
        static_cast<void>(requests_->produce(slot));
    }
    request.issued = request.buffer.size;
    ++request.parts;
    return true;
}

// Those that found no room before.
void Disk::pump() {
    while (Request* request = waiting_.front()) {
        const u32 before = request->issued;
        const bool all = issue(*request);
        if (all || request->issued != before) {
            executor().touch(*this);
        }
        if (!all) {
            return;
        }
        static_cast<void>(waiting_.pop());
    }
}

void Disk::flush() {
    if (state_ != State::open || !requests_->publish()) {
        return;
    }
    ++counters_.notifications;
    ++counters_.hypercalls;
    if (auto sent = events_.send(terms_.port); !sent) [[unlikely]] {
        shut(io::Status::device_gone, sent.error());
    }
}

// ---- being answered ----

void Disk::rang(void* self) {
    Disk& disk = *static_cast<Disk*>(self);
    ++disk.counters_.interrupts;
    // One event for each time that the executor is about to sleep, however many the other side sends.
    disk.events_.mask(disk.terms_.port);
    disk.masked_.store(true, std::memory_order_relaxed);
    disk.rang_.store(true, std::memory_order_relaxed);
    disk.executor().wake();
}

bool Disk::drain() {
    if (state_ != State::open) {
        return false;
    }
    const auto found = responses_->available(requests_->owed());
    if (!found) [[unlikely]] {
        broken(found.error());
        return false;
    }
    const u32 count = *found;
    const bool rang = rang_.load(std::memory_order_relaxed) && rang_.exchange(false, std::memory_order_relaxed);
    if (count == 0) {
        idle_events_ += rang ? 1 : 0;
        return false;
    }
    idle_events_ = 0;
    answered_ += count;
    if (armed_at_ != never) { // we slept for these
        if (hurry_ != 0) {
            --hurry_;
        } else if (executor().turn_time() <= after(armed_at_, patience)) {
            next_hurry_ = 1;
        } else {
            next_hurry_ = std::min(next_hurry_ * 2, max_hurry);
            hurry_ = next_hurry_;
        }
        armed_at_ = never;
    }
    for (u32 i = 0; i < count; ++i) {
        Response response;
        static_cast<void>(responses_->take(response)); // the only look at it
        if (!accept(response)) [[unlikely]] {
            return true;
        }
    }
    if (auto retired = requests_->retire(count); !retired) [[unlikely]] {
        broken(retired.error());
        return true;
    }
    if (!waiting_.empty()) {
        pump();
    }
    return true;
}

bool Disk::accept(const Response& response) {
    if (inflight_.peek(response.id) == nullptr) [[unlikely]] {
        broken({Code::protocol, "an answer carries an id that is not under way (unknown, repeated or retired)", 0,
                response.id});
        return false;
    }
    Part& part = parts_[inflight_.slot_of(response.id)];
    if (response.operation != part.operation && !(part.indirect && response.operation == Operation::indirect))
        [[unlikely]] {
        broken({Code::protocol, "an answer names another operation than was asked for", to_underlying(part.operation),
                to_underlying(response.operation)});
        return false;
    }
    io::Status status;
    switch (response.status) {
    case status_ok: status = io::Status::ok; break;
    case status_error: status = io::Status::io_error; break;
    case status_not_supported: status = io::Status::not_supported; break;
    default:
        broken({Code::protocol, "an answer has a status that the block interface does not define", 0,
                static_cast<u16>(response.status)});
        return false;
    }
    static_cast<void>(inflight_.give(response.id));
    finish(part, status);
    return true;
}

// The part has been answered: its slot of inflight_ is free, its pages are not.
void Disk::finish(Part& part, io::Status status) {
    Request* request = part.request;
    if (request != nullptr && terms_.persistent && part.operation == Operation::read && status == io::Status::ok) {
        std::byte* into = request->buffer.data + part.offset;
        for (u32 i = 0, left = part.bytes; i < part.segments; ++i) {
            const u32 bytes = std::min(left, static_cast<u32>(page_size));
            std::memcpy(into, pool_[part.grants[i]].data, bytes);
            into += bytes;
            left -= bytes;
        }
    }
    const bool safe = release(part);
    part.request = nullptr;
    if (request == nullptr) [[unlikely]] {
        return; // a late answer: the request has ended without it
    }
    if (!safe) [[unlikely]] {
        log::warning("{}: the back end has answered and still holds the buffer: it is not used again", identity_.name);
        request->buffer_lost = true;
    }
    if (status != io::Status::ok) [[unlikely]] {
        if (request->part_status == io::Status::ok) {
            request->part_status = status;
        }
        if (request->issued != request->buffer.size) { // the rest need not be asked for
            waiting_.remove(*request);
            request->issued = request->buffer.size;
        }
    }
    if (--request->parts == 0 && request->issued == request->buffer.size) {
        complete(*request, request->part_status);
    }
}

// Takes the part's grants and pages back. False: the other side still holds one; it is in quarantine.
bool Disk::release(Part& part) {
    bool safe = true;
    if (part.indirect) {
        indirect_free_[indirect_free_count_++] = part.indirect_page;
    }
    // the last one taken is the first one back: the same few are used again and again
    for (u32 i = part.segments; i-- > 0;) {
        if (terms_.persistent) {
            pool_free_[pool_free_count_++] = static_cast<u16>(part.grants[i]);
        } else {
            safe = grants_.release(part.grants[i]) && safe;
        }
    }
    part.segments = 0;
    part.indirect = false;
    return safe;
}

// Ends the other side's access to the part's buffer while its request still stands in the ring: the grants are not
// given to anybody else, since it may yet be taken up. False: the other side has the buffer mapped now.
bool Disk::withdraw(Part& part) {
    bool safe = true;
    for (u32 i = 0; !terms_.persistent && i < part.segments; ++i) {
        safe = grants_.end(part.grants[i]) && safe;
    }
    return safe;
}

// After how many of the answers that are owed an event is worth its price: all of them, as long as the whole batch
// comes within `patience`; three quarters where it does not, so that a slow answer does not keep the others waiting;
// and never before all the parts of a request can be there, since nobody can go on before. Answers that wait for the
// rest are found by the executor's tick at the latest.
u32 Disk::event_after(u32 owed) const {
    const u32 enough = owed < 2 || hurry_ == 0 ? owed : owed - std::max(owed / 4, 1u);
    return std::max(enough, std::min(burst_, owed));
}

bool Disk::arm() {
    if (state_ != State::open) {
        return false;
    }
    if (masked_.load(std::memory_order_relaxed) && idle_events_ < max_idle_events) {
        masked_.store(false, std::memory_order_relaxed); // before the unmasking: the handler may run in between
        if (events_.unmask(terms_.port)) {
            masked_.store(true, std::memory_order_relaxed); // consumed here, as the handler would have
            events_.mask(terms_.port);
            rang_.store(true, std::memory_order_relaxed);
            return true;
        }
    }
    const u32 owed = requests_->owed();
    if (owed == 0) {
        return false; // an answer now would be one too many; drain() sees it
    }
    const auto found = responses_->arm(event_after(owed), owed);
    if (!found) [[unlikely]] {
        broken(found.error());
        return true;
    }
    armed_at_ = *found ? never : executor().turn_time();
    return *found;
}

// ---- giving up ----

bool Disk::cancel_now(Request& request) {
    if (request.parts != 0 || !waiting_.remove(request)) {
        return false; // the other side has it: it ends when that answers
    }
    complete(request, io::Status::cancelled);
    return true;
}

// All parts of a request that ends now, whatever the other side does later.
void Disk::abandon(Request& request) {
    inflight_.for_each([&](u64 id, Part&) {
        Part& part = parts_[inflight_.slot_of(id)];
        if (part.request == &request) {
            if (!withdraw(part)) {
                request.buffer_lost = true;
            }
            part.request = nullptr;
        }
    });
    request.parts = 0;
}

void Disk::forget(Request& request) {
    waiting_.remove(request);
    abandon(request);
    if (request.buffer_lost && state_ == State::open) {
        shut(io::Status::device_gone, {Code::busy, "a request was given up while the back end had its buffer mapped"});
    }
}

void Disk::tick(Instant) {
    grants_.sweep();
    if (state_ != State::open) {
        return;
    }
    idle_events_ = 0; // after a storm: listen again
    if (!waiting_.empty()) {
        if (!terms_.persistent) { // the table may grow still; a pool has its own entries
            static_cast<void>(grants_.ensure(std::max(spare_grants, terms_.indirect_segments)));
        }
        pump(); // grants may have come free elsewhere
    }
    look_at_time();
}

void Disk::give_up(Request& request) {
    waiting_.remove(request); // the rest of it
    abandon(request);
    complete(request, io::Status::timed_out);
}

void Disk::look_at_time() {
    using Finding = io::OldestWait::Finding;
    const Part* oldest = nullptr;
    inflight_.for_each([&](u64 id, Part&) {
        const Part& part = parts_[inflight_.slot_of(id)];
        if (part.request != nullptr && (oldest == nullptr || part.number < oldest->number)) {
            oldest = &part;
        }
    });
    const u64 under_way = inflight_.size();
    const Finding found =
        oldest_.look(executor(), {oldest != nullptr ? oldest->number : 0, under_way, answered_}, timeout());
    if (found == Finding::lost) {
        log::warning("{}: no answer to a request within {} ms, while others were answered", identity_.name,
                     timeout() / 1'000'000);
        give_up(*oldest->request);
    } else if (found == Finding::silent) {
        inflight_.for_each([&](u64 id, Part&) {
            if (Request* request = parts_[inflight_.slot_of(id)].request; request != nullptr) {
                give_up(*request);
            }
        });
        return shut(io::Status::device_gone,
                    {Code::timed_out, "the back end has not answered anything for a whole time-out"});
    }
    // Nothing that is waited for is with the back end, and still there is no room: requests that were given up hold the
    // slots, or others hold all the grants.
    const bool stuck = oldest == nullptr && !waiting_.empty();
    if (stuck_.look(executor(), {stuck ? issued_ + 1 : 0, under_way, answered_}, timeout()) == Finding::none) {
        return;
    }
    if (inflight_.full() || requests_->full()) {
        return shut(io::Status::device_gone,
                    {Code::timed_out, "every slot is held by a request that the back end never answered"});
    }
    log::warning("{}: no grant entries came free for a request within {} ms", identity_.name, timeout() / 1'000'000);
    give_up(*waiting_.front());
}

void Disk::shut(io::Status status, const Error& why) {
    if (state_ != State::open) {
        return;
    }
    state_ = State::shut;
    events_.mask(terms_.port);
    log::error("{}: closed: {}", identity_.name, why);
    while (Request* request = waiting_.pop()) {
        if (request->parts == 0) {
            complete(*request, status);
        } else {
            request->issued = request->buffer.size; // ends with its parts
        }
    }
    inflight_.for_each([&](u64 id, Part&) {
        Part& part = parts_[inflight_.slot_of(id)];
        if (part.request != nullptr && !withdraw(part)) {
            part.request->buffer_lost = true;
        }
    });
    inflight_.for_each([&](u64 id, Part&) {
        Part& part = parts_[inflight_.slot_of(id)];
        if (Request* request = std::exchange(part.request, nullptr); request != nullptr && --request->parts == 0) {
            complete(*request, status);
        }
    });
    if (notify_ != nullptr) {
        std::exchange(notify_, nullptr)(notify_context_);
    }
}

void Disk::reclaim() {
    if (state_ == State::open) {
        return;
    }
    inflight_.for_each([&](u64 id, Part&) {
        release(parts_[inflight_.slot_of(id)]);
        static_cast<void>(inflight_.give(id));
    });
    bool safe = true;
    for (u32 i = 0; i < pool_size_; ++i) {
        safe = grants_.release(pool_[i].grant) && safe;
    }
    for (u32 i = 0; i < indirect_size_; ++i) {
        safe = grants_.release(indirect_grants_[i]) && safe;
    }
    if (safe) {
        pool_memory_ = {};
        indirect_memory_.reset();
    } else {
        for (DmaBuffer& memory : pool_memory_) {
            memory.abandon();
        }
        indirect_memory_.abandon();
    }
    pool_size_ = pool_free_count_ = indirect_size_ = indirect_free_count_ = 0;
}

} // namespace fl::drivers::xen_blk
