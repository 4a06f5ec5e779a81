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

using hv::hyperv::PacketType;
using hv::hyperv::Sent;

namespace {
constexpr u8 max_retries = 3;

constexpr Error unknown_id(u64 id) {
    return {Code::protocol, "a completion carries a transaction id that is not under way (unknown, repeated or retired)", 0, id};
}
} // namespace

// ---- the disk --------------------------------------------------------------------------------------------------------------------------------

Disk::Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity, Linked linked)
    : io::BlockDevice(queue.executor()), queue_(queue), unit_(unit), sector_shift_(static_cast<u32>(std::countr_zero(geometry.sector_size))) {
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
        queue_.executor().post(link_);
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

// The frame dies with the request, and as a rule the buffer with it: the host writes there for a read and reads there for a write, and what it
// reads then reaches the medium. It gets the disk's time-out to answer, else the channel is closed. Whoever destroys many frames brings the disk
// to rest before [boot.shutdown].
void Disk::forget(Request& request) {
    waiting_.remove(request);
    if (request.op <= io::Op::write && request.parts != 0 && queue_.is_open()) {
        request.waiter = {};
        request.issued = request.buffer.size;
        queue_.flush();
        const Instant deadline = after(executor().now(), timeout());
        while (request.pending() && queue_.is_open() && executor().now() < deadline) {
            static_cast<void>(queue_.drain());
        }
        if (request.pending() && queue_.is_open()) {
            queue_.abandon(request);
            queue_.shut(io::Status::device_gone, {Code::busy, "a transfer was given up, and the host may still reach its buffer"});
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
    const scsi::Cdb cdb = unmap ? scsi::unmap(scsi::unmap_list_bytes) : flush_16_ ? scsi::synchronize_cache_16() : scsi::synchronize_cache_10();
    std::copy(cdb.bytes.begin(), cdb.bytes.end(), srb.payload.begin());
    srb.cdb_length = cdb.length;
    srb.data_in = unmap ? Direction::out : Direction::none;
    srb.data_transfer_length = unmap ? scsi::unmap_list_bytes : 0;
    srb.srb_flags = srb_common_flags | (unmap ? srb_data_out : 0);
}

// Every LBA in 32 bits, the largest count in 16.
bool Disk::fits_10() const { return geometry_.sectors <= u64{1} << 32 && unit_.max_transfer >> sector_shift_ <= 0xffff; }

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

// ---- the queue: asking
// -------------------------------------------------------------------------------------------------------------------------

Queue::Queue(io::Executor& executor, hv::hyperv::Channel& channel, Shared& shared, bool first)
    : executor_(executor), channel_(channel), shared_(shared), first_(first), reset_(executor) {}

Queue::~Queue() { stop(); }

void Queue::start(DmaSpan parameters, Nanoseconds timeout) {
    if (shared_.closed.load(std::memory_order_acquire)) { // acquire: see Shared
        return;
    }
    parameters_ = parameters;
    timeout_ = timeout;
    last_answer_ = executor_.now();
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
        return state_ == State::open ? Error{Code::exhausted, "no room in the storage channel's ring"}
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

// The slot's packet into the ring. False: no room, or the ring is broken (then the queue is shut).
[[gnu::always_inline]] inline bool Queue::put(Slot& slot, u32 id) {
    Sent sent;
    const u32 length = packet_bytes(terms_.version);
    if (slot.exchange != nullptr) [[unlikely]] {
        const auto bytes = std::as_bytes(std::span<const Packet, 1>(&slot.exchange->packet, 1)).first(length);
        sent = slot.exchange->data.empty() ? channel_.send_inband(bytes, id, true) : channel_.send_gpa_direct(bytes, slot.exchange->data, id);
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
            scsi::unmap_list(std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(list.data), scsi::unmap_list_bytes),
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
        broken(channel_.broken().value_or(Error{Code::exhausted, "a storage packet is longer than the ring", channel_.send_capacity(), length}));
    }
    return false;
}

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
    slot.delayed = slot.expired = false;
    if (!put(slot, *id)) [[unlikely]] {
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
void Queue::broken_ring() { broken(channel_.broken().value_or(Error{Code::protocol, "a ring of the storage channel is broken"})); }

// ---- the queue: being answered
// -----------------------------------------------------------------------------------------------------------------

bool Queue::drain() {
    if (state_ != State::open) [[unlikely]] {
        return false;
    }
    hv::hyperv::Packet packet;
    u32 count = 0;
    for (;;) {
        const auto got = channel_.receive(packet);
        if (!got) [[unlikely]] {
            broken(got.error());
            return true;
        }
        if (!*got) {
            break;
        }
        ++count;
        if (!accept(packet)) [[unlikely]] {
            return true;
        }
    }
    if (shared_.closed.load(std::memory_order_acquire)) [[unlikely]] { // acquire: see Shared
        end_all(static_cast<io::Status>(shared_.close_status.load(std::memory_order_relaxed)));
        wish();
        return true;
    }
    if (count == 0) {
        return false;
    }
    if (armed_) {
        channel_.disarm(); // we look by ourselves as long as there is something to do
        armed_ = false;
    }
    look_at_events();
    idle_events_ = 0;
    last_answer_ = executor_.turn_time();
    const u64 signals = channel_.counters().signals;
    channel_.release();
    if (current_ != nullptr) {
        current_->counters_.hypercalls += channel_.counters().signals - signals;
    }
    pump();
    return true;
}

bool Queue::accept(const hv::hyperv::Packet& packet) {
    if (packet.type != PacketType::completion) [[unlikely]] {
        return accept_event(packet);
    }
    const u64 id = packet.transaction;
    if (inflight_.peek(id) == nullptr) [[unlikely]] {
        broken(unknown_id(id));
        return false;
    }
    Slot& slot = slots_[inflight_.slot_of(id)];
    if (slot.delayed) [[unlikely]] {
        broken(unknown_id(id));
        return false;
    }
    // Before a version is agreed on a host may answer in either length, and to a packet that is no SRB as well [storvsc].
    const u32 length = packet_bytes(terms_.version);
    const bool srb = slot.exchange == nullptr || slot.exchange->packet.header.operation == Operation::execute_srb;
    if (srb ? packet.payload.size() != length : packet.payload.size() < sizeof(PacketHeader)) [[unlikely]] {
        broken({Code::protocol, "a completion has not the length of the agreed version's packets", length, packet.payload.size()});
        return false;
    }
    Packet answer;
    if (srb && length == sizeof answer) [[likely]] {
        std::memcpy(&answer, packet.payload.data(), sizeof answer);
    } else {
        answer = {};
        std::memcpy(&answer, packet.payload.data(), std::min(packet.payload.size(), sizeof answer));
    }
    if (answer.header.operation != Operation::complete_io) [[unlikely]] {
        broken(
            {Code::protocol, "a completion is no COMPLETE_IO", to_underlying(Operation::complete_io), to_underlying(answer.header.operation)});
        return false;
    }
    if (srb && answer.srb.data_transfer_length >
                   std::max(slot.bytes, slot.request != nullptr && slot.request->op == io::Op::discard ? scsi::unmap_list_bytes : 0u))
        [[unlikely]] {
        broken({Code::protocol, "a completion says that more data was moved than was asked for", slot.bytes, answer.srb.data_transfer_length});
        return false;
    }
    if (Exchange* exchange = slot.exchange; exchange != nullptr) [[unlikely]] {
        static_cast<void>(inflight_.give(id));
        slot.exchange = nullptr;
        exchange->packet = answer;
        exchange->answered = true;
        exchange->done.open();
        return true;
    }
    answered(static_cast<u32>(id), slot, answer);
    return true;
}

// What the host says by itself.
bool Queue::accept_event(const hv::hyperv::Packet& packet) {
    if (packet.type != PacketType::inband) {
        broken({Code::protocol, "a packet of a type that a storage host does not send", to_underlying(PacketType::completion),
                to_underlying(packet.type)});
        return false;
    }
    if (packet.payload.size() < sizeof(Operation)) {
        broken({Code::protocol, "a storage packet is shorter than its operation", sizeof(Operation), packet.payload.size()});
        return false;
    }
    Operation operation;
    std::memcpy(&operation, packet.payload.data(), sizeof operation);
    switch (operation) {
    case Operation::enumerate_bus:
    case Operation::remove_device:
        shared_.rescan_wanted.store(true, std::memory_order_relaxed);
        wish();
        return true;
    case Operation::event_notification: return true;
    case Operation::complete_io: broken({Code::protocol, "a COMPLETE_IO that answers nothing", 0, packet.transaction}); return false;
    default: log::debug("storvsc: the host sends {}: not for a guest", name(operation)); return true;
    }
}

void Queue::answered(u32 id, Slot& slot, const Packet& packet) {
    const ScsiRequest& srb = packet.srb;
    Request* request = slot.request;
    if (request == nullptr) [[unlikely]] { // a late answer: the request has ended without it
        static_cast<void>(inflight_.give(id));
        return;
    }
    const SrbStatus status = srb_status_of(srb.srb_status);
    if (srb.scsi_status == scsi::status_good && (status == SrbStatus::success || status == SrbStatus::data_overrun)) [[likely]] {
        if (srb.data_transfer_length == slot.bytes || request->op > io::Op::write) [[likely]] {
            static_cast<void>(inflight_.give(id));
            return finish(slot, io::Status::ok);
        }
        FixedText<120> text;
        print(text, "the host moved {} of {} bytes and calls that a success, at LBA {}", srb.data_transfer_length, slot.bytes,
              request->lba + (slot.offset >> slot.disk->sector_shift_));
        slot.disk->tell(request->op == io::Op::read ? scsi::Opcode::read_16 : scsi::Opcode::write_16, text);
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::io_error);
    }
    const auto opcode = request->op == io::Op::read      ? slot.short_cdb ? scsi::Opcode::read_10 : scsi::Opcode::read_16
                        : request->op == io::Op::write   ? slot.short_cdb ? scsi::Opcode::write_10 : scsi::Opcode::write_16
                        : request->op == io::Op::discard ? scsi::Opcode::unmap
                        : slot.short_cdb                 ? scsi::Opcode::synchronize_cache_10
                                                         : scsi::Opcode::synchronize_cache_16;
    const u64 lba = request->lba + (slot.offset >> slot.disk->sector_shift_);
    std::optional<scsi::Sense> sense;
    if ((srb.srb_status & srb_autosense_valid) != 0) {
        sense = scsi::parse_sense(std::span(srb.payload).first(std::min<usize>(srb.sense_info_length, sense_bytes(terms_.version))));
    }
    if (sense && (sense->key == scsi::key_recovered || (sense->key == scsi::key_no_sense && srb.scsi_status == scsi::status_good)) &&
        srb.data_transfer_length == slot.bytes) {
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::ok); // done, and the device wants to say how
    }
    if (sense && sense->key == scsi::key_unit_attention) {
        if (sense->asc == 0x3f || sense->asc == 0x2a) { // the units, or their sizes, have changed
            shared_.rescan_wanted.store(true, std::memory_order_relaxed);
            wish();
        }
        if (again(id, true)) {
            slot.disk->tell_attention(*sense);
            return;
        }
    }
    const bool busy = srb.scsi_status == scsi::status_busy || srb.scsi_status == scsi::status_task_set_full || status == SrbStatus::busy;
    const bool flushed = status == SrbStatus::bus_reset || status == SrbStatus::aborted || status == SrbStatus::request_flushed;
    if (slot.expired && (flushed || busy)) {
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::timed_out);
    }
    if ((busy || (flushed && !sense)) && again(id, false)) {
        return;
    }
    if (sense && sense->key == scsi::key_illegal_request && sense->asc == 0x20) { // no such command
        if (request->op == io::Op::flush && slot.short_cdb) {                     // each one that was under way with the short command
            slot.disk->flush_16_ = true;
            if (again(id, true)) {
                return;
            }
        }
        if (request->op <= io::Op::write && !slot.short_cdb && slot.disk->fits_10()) {
            slot.disk->io_10_ = true;
            if (again(id, true)) {
                return;
            }
        }
        slot.disk->tell(opcode, scsi::describe(*sense, std::nullopt));
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::not_supported);
    }
    io::Status result = io::Status::io_error;
    if (status == SrbStatus::invalid_lun || status == SrbStatus::no_device || status == SrbStatus::invalid_target_id ||
        (sense && sense->asc == 0x25)) {
        result = io::Status::device_gone;
        shared_.rescan_wanted.store(true, std::memory_order_relaxed);
        wish();
    }
    if (result == io::Status::device_gone && std::exchange(slot.disk->absence_told_, true)) {
        // All that is under way ends like this; the keeper looks at what is left.
    } else if (sense) {
        slot.disk->tell(opcode, scsi::describe(*sense, request->op == io::Op::flush ? std::nullopt : std::optional(lba)));
    } else {
        FixedText<120> text;
        print(text, "SCSI status {}, SRB status {} ({:#x}), no sense data, at LBA {}", scsi::status_name(srb.scsi_status), name(status),
              srb.srb_status, lba);
        slot.disk->tell(opcode, text);
    }
    static_cast<void>(inflight_.give(id));
    finish(slot, result);
}

// The same part once more, under a new id. `now`: else in the next tick. False: often enough.
bool Queue::again(u32 id, bool now) {
    const u16 number = inflight_.slot_of(id);
    Slot& slot = slots_[number];
    if (slot.retries >= (now ? max_retries : 200)) {
        return false;
    }
    ++slot.retries;
    static_cast<void>(inflight_.give(id));
    const u32 fresh = *inflight_.take(slots_[0]); // the slot that was freed last: the same one
    if (now && put(slot, fresh)) {
        executor_.touch(*this);
    } else if (state_ == State::open) {
        slot.delayed = true;
        ++delayed_;
    }
    return true;
}

// The part has been answered: its slot is free.
void Queue::finish(Slot& slot, io::Status status) {
    Request* request = std::exchange(slot.request, nullptr);
    Disk& disk = *slot.disk;
    if (status != io::Status::ok) [[unlikely]] {
        if (request->part_status == io::Status::ok) {
            request->part_status = status;
        }
        if (request->issued != request->buffer.size) { // the rest need not be asked for
            disk.waiting_.remove(*request);
            request->issued = request->buffer.size;
        }
    }
    current_ = &disk;
    if (--request->parts == 0 && request->issued == request->buffer.size) {
        disk.end(*request, request->part_status);
    }
}

void Queue::look_at_events() {
    const u32 events = channel_.interrupts();
    const u32 fresh = events - std::exchange(events_seen_, events);
    idle_events_ += fresh;
    if (current_ != nullptr) {
        current_->counters_.interrupts += fresh;
    }
}

bool Queue::arm() {
    if (state_ != State::open || armed_) {
        return false; // armed: whatever has come since has raised an event, which keeps us awake
    }
    const auto found = channel_.arm();
    if (!found) [[unlikely]] {
        broken(found.error());
        return true;
    }
    armed_ = !*found;
    return *found;
}

// ---- the queue: giving up
// ----------------------------------------------------------------------------------------------------------------------

// All parts of a request that ends now, whatever the host does later.
void Queue::abandon(Request& request) {
    inflight_.for_each([&](u32 id, Slot&) {
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
        return shut(io::Status::device_gone, {Code::device_gone, "the host has taken the storage controller away"});
    }
    if (first_ && shared_.reset_wanted.load(std::memory_order_relaxed)) {
        send_reset();
    }
    if (shared_.rescan_wanted.load(std::memory_order_relaxed)) {
        wish();
    }
    if (delayed_ != 0) {
        inflight_.for_each([&](u32 id, Slot&) {
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
    for (Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
        for (usize n = disk->waiting_.size(); n != 0; --n) {
            Request& request = *disk->waiting_.pop();
            if (request.deadline > now || request.parts != 0) { // those with parts are found below
                disk->waiting_.push(request);
                continue;
            }
            disk->end(request, io::Status::timed_out);
        }
    }
    bool given_up = false;
    inflight_.for_each([&](u32 id, Slot&) {
        Slot& slot = slots_[inflight_.slot_of(id)];
        Request* request = slot.request;
        if (request == nullptr || request->deadline > now) {
            return;
        }
        late = true;
        slot.expired = true;
        if (now >= after(request->deadline, std::min(grace, timeout_))) {
            Disk& disk = *slot.disk;
            given_up = true;
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
        shut(io::Status::device_gone, {Code::timed_out, "the host has not answered anything for a whole time-out"});
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
    FixedText<96> names;
    for (const Disk* disk = disks_; disk != nullptr; disk = disk->next_) {
        print(names, "{}{}", names.empty() ? "" : ", ", disk->identity().name.view());
    }
    log::error("{}: closed: {}", names.empty() ? std::string_view("storvsc") : names.view(), why);
    shared_.close_status.store(to_underlying(status), std::memory_order_relaxed); // ordered by the next line
    shared_.closed.store(true, std::memory_order_release);                        // partner: the acquire in drain()
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
    inflight_.for_each([&](u32 id, Slot&) {
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
