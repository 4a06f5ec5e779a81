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

using hv::hyperv::PacketType;
using hv::hyperv::Sent;

// ---- the disk ----

Disk::Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity, Linked linked)
    : io::BlockDevice(queue.executor()), queue_(queue), unit_(unit),
      sector_shift_(static_cast<u32>(std::countr_zero(geometry.sector_size))) {
    identity_ = identity;
    geometry_ = geometry;
    set_timeout(queue.timeout_);
    io_10_ = unit.short_commands && fits_10();
    const Version version = queue.terms().version;
    template_.header = {Operation::execute_srb, flag_completion, 0};
    ScsiRequest& srb = template_.srb;
    srb.length = static_cast<u16>(srb_bytes(version));
    srb.path_id = unit.path;
    srb.target_id = unit.target;
    srb.lun = unit.lun;
    srb.sense_info_length = sense_bytes(version);
    srb.queue_tag = queue_untagged;
    srb.queue_action = queue_simple_request;
    srb.time_out_value = static_cast<u32>(std::clamp<u64>(queue.timeout_ / 1'000'000'000, 1, 3600));
    link_.disk = this;
    link_.run = [](io::Post& post) { static_cast<Link&>(post).disk->enlist(); };
    if (linked == Linked::now) {
        enlist();
    }
}

void Disk::enlist() {
    linked_ = true;
    next_ = std::exchange(queue_.disks_, this);
}

// The queue walks its list on its own processor, at any time.
void Disk::link(io::Executor& here) {
    if (&here == &queue_.executor()) {
        enlist();
    } else {
        static_cast<void>(queue_.executor().post(link_)); // refused: that processor has stopped, and the lane with it
    }
}

Disk::~Disk() {
    if (!linked_) {
        return;
    }
    for (Disk** at = &queue_.disks_; *at != nullptr; at = &(*at)->next_) {
        if (*at == this) {
            *at = next_;
            break;
        }
    }
    if (queue_.current_ == this) {
        queue_.current_ = nullptr;
    }
}

bool Disk::removed() const {
    return gone_.load(std::memory_order_relaxed) || queue_.shared_.taken.load(std::memory_order_relaxed);
}

void Disk::add_lane(Disk& lane) { lanes_[lane_count_++] = &lane; }

void Disk::start(Request& request) {
    if (!queue_.is_open() || removed()) [[unlikely]] {
        return complete(request, io::Status::device_gone);
    }
    if (!waiting_.empty() || !queue_.issue(*this, request)) [[unlikely]] {
        if (!queue_.is_open()) { // found broken just now: the queue does not know this one yet
            if (request.pending()) {
                queue_.abandon(request);
                complete(request, io::Status::protocol_error);
            }
            return;
        }
        waiting_.push(request);
    }
    queue_.executor().touch(queue_);
}

bool Disk::cancel_now(Request& request) {
    if (request.parts != 0 || !waiting_.remove(request)) {
        return false; // the host has it: it ends when that answers
    }
    complete(request, io::Status::cancelled);
    return true;
}

// The frame dies with the request, and as a rule the buffer with it: the host writes there for a read and reads there
// for a write, and what it reads then reaches the medium. It gets the disk's time-out to answer, else the channel is
// closed. Whoever destroys many frames brings the disk to rest before [boot.shutdown].
void Disk::forget(Request& request) {
    waiting_.remove(request);
    if (request.op <= io::Op::write && request.parts != 0 && queue_.is_open()) {
        request.waiter = {};
        request.issued = request.buffer.size;
        queue_.flush();
        const io::Bound bound(executor(), timeout());
        while (request.pending() && queue_.is_open() && !bound.passed()) {
            static_cast<void>(queue_.drain());
        }
        if (request.pending() && queue_.is_open()) {
            queue_.abandon(request);
            queue_.shut(io::Status::device_gone,
                        {Code::busy, "a transfer was given up, and the host may still reach its buffer"});
        }
    }
    queue_.abandon(request);
}

void Disk::build(Packet& packet, const Request& request, u32 offset, u32 bytes) const {
    packet = template_;
    ScsiRequest& srb = packet.srb;
    const u64 lba = request.lba + (offset >> sector_shift_);
    if (request.op <= io::Op::write) [[likely]] {
        const bool write = request.op == io::Op::write;
        srb.cdb_length = 16;
        srb.data_in = write ? Direction::out : Direction::in;
        srb.data_transfer_length = bytes;
        srb.srb_flags = srb_common_flags | (write ? srb_data_out : srb_data_in);
        if (io_10_) [[unlikely]] { // READ(10) and WRITE(10): the LBA in bytes 2 to 5, the count in 7 and 8
            srb.cdb_length = 10;
            srb.payload[0] = to_underlying(write ? scsi::Opcode::write_10 : scsi::Opcode::read_10);
            scsi::put_be(std::span(srb.payload).subspan(2, 4), lba);
            scsi::put_be(std::span(srb.payload).subspan(7, 2), bytes >> sector_shift_);
            return;
        }
        // READ(16) and WRITE(16) [SBC-3 §5.15, §5.38], in place: the LBA in bytes 2 to 9, the count in 10 to 13.
        srb.payload[0] = write ? 0x8a : 0x88;
        const u64 lba_be = __builtin_bswap64(lba);
        const u32 blocks_be = __builtin_bswap32(bytes >> sector_shift_);
        std::memcpy(srb.payload.data() + 2, &lba_be, 8);
        std::memcpy(srb.payload.data() + 10, &blocks_be, 4);
        return;
    }
    const bool unmap = request.op == io::Op::discard;
    const scsi::Cdb cdb = unmap       ? scsi::unmap(scsi::unmap_list_bytes)
                          : flush_16_ ? scsi::synchronize_cache_16()
                                      : scsi::synchronize_cache_10();
    std::copy(cdb.bytes.begin(), cdb.bytes.end(), srb.payload.begin());
    srb.cdb_length = cdb.length;
    srb.data_in = unmap ? Direction::out : Direction::none;
    srb.data_transfer_length = unmap ? scsi::unmap_list_bytes : 0;
    srb.srb_flags = srb_common_flags | (unmap ? srb_data_out : 0);
}

// Every LBA in 32 bits, the largest count in 16.
bool Disk::fits_10() const {
    return geometry_.sectors <= u64{1} << 32 && unit_.max_transfer >> sector_shift_ <= 0xffff;
}

void Disk::tell(scsi::Opcode opcode, std::string_view what) {
    if (errors_told_ < max_told_errors) {
        log::error("{}: {}: {}", identity_.name, scsi::name(opcode), what);
        if (++errors_told_ == max_told_errors) {
            log::warning("{}: further errors of this kind are only counted", identity_.name);
        }
    }
}

void Disk::tell_attention(const scsi::Sense& sense) {
    if (attentions_told_ < max_told_errors) {
        ++attentions_told_;
        log::info("{}: {}: asked again", identity_.name, scsi::describe(sense, std::nullopt));
    }
}

// ---- the queue: asking ----

Queue::Queue(io::Executor& executor, hv::hyperv::Channel& channel, Shared& shared, bool first)
    : executor_(executor), channel_(channel), shared_(shared), first_(first), reset_(executor) {}

Queue::~Queue() { stop(); }

void Queue::start(DmaSpan parameters, Nanoseconds timeout) {
    if (shared_.closed.load(std::memory_order_acquire)) { // acquire: see Shared
        return;
    }
    parameters_ = parameters;
    timeout_ = timeout;
    events_seen_ = channel_.interrupts();
    state_ = State::open;
    executor_.add(*this);
    // Release: started before it is seen to be. Partner: the acquire in quiet().
    quiet_.store(false, std::memory_order_release);
}

void Queue::stop() {
    if (state_ == State::closed) {
        return;
    }
    end_all(io::Status::device_gone);
    executor_.remove(*this);
    state_ = State::closed;
}

Result<void> Queue::send(Exchange& exchange) {
    if (state_ != State::open) {
        return Error{Code::device_gone, "the storage channel is closed"};
    }
    const auto id = inflight_.take(slots_[0]); // the slot is what counts
    if (!id) {
        return Error{Code::exhausted, "no slot for a packet of the storage controller", max_parts, max_parts};
    }
    Slot& slot = slots_[inflight_.slot_of(*id)];
    slot = {};
    slot.exchange = &exchange;
    slot.bytes = exchange.data.size;
    exchange.id = *id;
    exchange.answered = false;
    exchange.done.close();
    if (!put(slot, *id)) {
        static_cast<void>(inflight_.give(*id));
        slot.exchange = nullptr;
        return state_ == State::open
                   ? Error{Code::exhausted, "no room in the storage channel's ring"}
                   : Error{Code::protocol, "the storage channel is closed: its host broke the protocol"};
    }
    executor_.touch(*this);
    return {};
}

void Queue::abandon(Exchange& exchange) {
    if (inflight_.peek(exchange.id) != nullptr) {
        Slot& slot = slots_[inflight_.slot_of(exchange.id)];
        if (slot.exchange == &exchange) {
            slot.exchange = nullptr;
        }
    }
}

// For the path of an I/O, in this file.
[[gnu::always_inline]] inline bool Queue::put_inline(Slot& slot, u64 id) {
    Sent sent;
    const u32 length = packet_bytes(terms_.version);
    if (slot.exchange != nullptr) [[unlikely]] {
        const auto bytes = std::as_bytes(std::span<const Packet, 1>(&slot.exchange->packet, 1)).first(length);
        sent = slot.exchange->data.empty() ? channel_.send_inband(bytes, id, true)
                                           : channel_.send_gpa_direct(bytes, slot.exchange->data, id);
    } else {
        Packet packet;
        const Request& request = *slot.request;
        slot.disk->build(packet, request, slot.offset, slot.bytes);
        const auto bytes = std::as_bytes(std::span<const Packet, 1>(&packet, 1)).first(length);
        if (request.op <= io::Op::write) [[likely]] {
            slot.short_cdb = slot.disk->io_10_;
            sent = channel_.send_gpa_direct(bytes, request.buffer.subspan(slot.offset, slot.bytes), id);
        } else if (request.op == io::Op::discard) {
            const u32 sector = slot.disk->geometry().sector_size;
            const DmaSpan list = parameters_.subspan(inflight_.slot_of(id) * 32u, scsi::unmap_list_bytes);
            scsi::unmap_list(
                std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(list.data), scsi::unmap_list_bytes),
                request.lba + slot.offset / sector, slot.bytes / sector);
            sent = channel_.send_gpa_direct(bytes, list, id);
        } else {
            slot.short_cdb = !slot.disk->flush_16_;
            sent = channel_.send_inband(bytes, id, true);
        }
    }
    if (sent == Sent::queued) [[likely]] {
        return true;
    }
    if (sent != Sent::full) {
        broken(channel_.broken().value_or(
            Error{Code::exhausted, "a storage packet is longer than the ring", channel_.send_capacity(), length}));
    }
    return false;
}

bool Queue::put(Slot& slot, u64 id) { return put_inline(slot, id); }

// Everything of the request into the ring; false: there is no room for the rest now.
bool Queue::issue(Disk& disk, Request& request) {
    do {
        if (!issue_part(disk, request)) [[unlikely]] {
            return false;
        }
    } while (request.issued < request.buffer.size);
    return true;
}

bool Queue::issue_part(Disk& disk, Request& request) {
    if (inflight_.size() >= max_parts - kept_parts) [[unlikely]] {
        return false;
    }
    const auto id = inflight_.take(slots_[0]);
    if (!id) [[unlikely]] {
        return false;
    }
    Slot& slot = slots_[inflight_.slot_of(*id)];
    u32 bytes = request.buffer.size - request.issued;
    if (request.op <= io::Op::write) [[likely]] {
        bytes = std::min(bytes, disk.unit_.max_transfer);
    } else if (request.op == io::Op::discard) {
        bytes = static_cast<u32>(std::min<u64>(bytes, u64{disk.unit_.max_unmap_blocks} * disk.geometry().sector_size));
    }
    slot.request = &request;
    slot.disk = &disk;
    slot.exchange = nullptr;
    slot.offset = request.issued;
    slot.bytes = bytes;
    slot.retries = 0;
    slot.delayed = slot.reset = slot.expired = false;
    slot.number = ++issued_;
    if (!put_inline(slot, *id)) [[unlikely]] {
        if (state_ == State::open) {
            static_cast<void>(inflight_.give(*id));
            slot.request = nullptr;
        }
        return false;
    }
    request.issued += bytes;
    ++request.parts;
    current_ = &disk;
    return true;
}

// Those that found no room before; every disk in turn.
void Queue::pump() {
    for (Disk* disk = disks_; disk != nullptr && state_ == State::open; disk = disk->next_) {
        if (!disk->waiting_.empty()) [[unlikely]] {
            pump(*disk);
        }
    }
}

void Queue::pump(Disk& disk) {
    while (Request* request = disk.waiting_.front()) {
        const u32 before = request->issued;
        const bool all = issue(disk, *request);
        if (state_ != State::open) {
            return;
        }
        if (all || request->issued != before) {
            executor_.touch(*this);
        }
        if (!all) {
            return;
        }
        static_cast<void>(disk.waiting_.pop());
    }
}

void Queue::flush() {
    if (state_ != State::open) {
        return;
    }
    const u64 signals = channel_.counters().signals;
    if (channel_.publish() && current_ != nullptr) {
        ++current_->counters_.notifications;
        current_->counters_.hypercalls += channel_.counters().signals - signals;
    }
    if (!channel_.sound()) [[unlikely]] {
        broken_ring();
    }
}

// The rule that the host broke in one of the rings, which are of no use any more.
void Queue::broken_ring() {
    broken(channel_.broken().value_or(Error{Code::protocol, "a ring of the storage channel is broken"}));
}

} // namespace fl::drivers::storvsc
