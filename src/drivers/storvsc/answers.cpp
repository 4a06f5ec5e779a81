// The queue being answered: every completion, and what the host says by itself.
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

namespace {
constexpr u8 max_retries = 3;

constexpr Error unknown_id(u64 id) {
    return {Code::protocol,
            "a completion carries a transaction id that is not under way (unknown, repeated or retired)", 0, id};
}
} // namespace

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
        // shut: the channel may be closed under us from now on
        if (!accept(packet) || state_ != State::open) [[unlikely]] {
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
    heard_ += count;
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
    // Before a version is agreed on a host may answer in either length, and to a packet that is no SRB as well
    // [storvsc].
    const u32 length = packet_bytes(terms_.version);
    const bool srb = slot.exchange == nullptr || slot.exchange->packet.header.operation == Operation::execute_srb;
    if (srb ? packet.payload.size() != length : packet.payload.size() < sizeof(PacketHeader)) [[unlikely]] {
        broken({Code::protocol, "a completion has not the length of the agreed version's packets", length,
                packet.payload.size()});
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
        broken({Code::protocol, "a completion is no COMPLETE_IO", to_underlying(Operation::complete_io),
                to_underlying(answer.header.operation)});
        return false;
    }
    if (srb &&
        answer.srb.data_transfer_length >
            std::max(slot.bytes, slot.request != nullptr && slot.request->op == io::Op::discard ? scsi::unmap_list_bytes
                                                                                                : 0u)) [[unlikely]] {
        broken({Code::protocol, "a completion says that more data was moved than was asked for", slot.bytes,
                answer.srb.data_transfer_length});
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
    ++answered_;
    answered(id, slot, answer);
    return true;
}

// What the host says by itself.
bool Queue::accept_event(const hv::hyperv::Packet& packet) {
    if (packet.type != PacketType::inband) {
        broken({Code::protocol, "a packet of a type that a storage host does not send",
                to_underlying(PacketType::completion), to_underlying(packet.type)});
        return false;
    }
    if (packet.payload.size() < sizeof(Operation)) {
        broken({Code::protocol, "a storage packet is shorter than its operation", sizeof(Operation),
                packet.payload.size()});
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
    case Operation::complete_io:
        broken({Code::protocol, "a COMPLETE_IO that answers nothing", 0, packet.transaction});
        return false;
    default: log::debug("storvsc: the host sends {}: not for a guest", name(operation)); return true;
    }
}

void Queue::answered(u64 id, Slot& slot, const Packet& packet) {
    const ScsiRequest& srb = packet.srb;
    Request* request = slot.request;
    if (request == nullptr) [[unlikely]] { // a late answer: the request has ended without it
        static_cast<void>(inflight_.give(id));
        return;
    }
    const SrbStatus status = srb_status_of(srb.srb_status);
    if (srb.scsi_status == scsi::status_good && (status == SrbStatus::success || status == SrbStatus::data_overrun))
        [[likely]] {
        if (srb.data_transfer_length == slot.bytes || request->op > io::Op::write) [[likely]] {
            static_cast<void>(inflight_.give(id));
            return finish(slot, io::Status::ok);
        }
        FixedText<120> text;
        print(text, "the host moved {} of {} bytes and calls that a success, at LBA {}", srb.data_transfer_length,
              slot.bytes, request->lba + (slot.offset >> slot.disk->sector_shift_));
        slot.disk->tell(request->op == io::Op::read ? scsi::Opcode::read_16 : scsi::Opcode::write_16, text);
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::io_error);
    }
    const auto opcode = request->op == io::Op::read ? slot.short_cdb ? scsi::Opcode::read_10 : scsi::Opcode::read_16
                        : request->op == io::Op::write
                            ? slot.short_cdb ? scsi::Opcode::write_10 : scsi::Opcode::write_16
                        : request->op == io::Op::discard ? scsi::Opcode::unmap
                        : slot.short_cdb                 ? scsi::Opcode::synchronize_cache_10
                                                         : scsi::Opcode::synchronize_cache_16;
    const u64 lba = request->lba + (slot.offset >> slot.disk->sector_shift_);
    std::optional<scsi::Sense> sense;
    if ((srb.srb_status & srb_autosense_valid) != 0) {
        sense = scsi::parse_sense(
            std::span(srb.payload).first(std::min<usize>(srb.sense_info_length, sense_bytes(terms_.version))));
    }
    if (sense &&
        (sense->key == scsi::key_recovered ||
         (sense->key == scsi::key_no_sense && srb.scsi_status == scsi::status_good)) &&
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
    const bool busy = srb.scsi_status == scsi::status_busy || srb.scsi_status == scsi::status_task_set_full ||
                      status == SrbStatus::busy || (sense && scsi::passes(*sense));
    const bool flushed = was_flushed(status);
    if (slot.expired && (flushed || busy)) {
        static_cast<void>(inflight_.give(id));
        return finish(slot, io::Status::timed_out);
    }
    if ((busy || (flushed && !sense)) && again(id, false)) {
        return;
    }
    if (sense && sense->key == scsi::key_illegal_request && sense->asc == 0x20) { // no such command
        // each one that was under way with the short command
        if (request->op == io::Op::flush && slot.short_cdb) {
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
    if (says_nobody(status) || (sense && sense->asc == 0x25)) {
        result = io::Status::device_gone;
        shared_.rescan_wanted.store(true, std::memory_order_relaxed);
        wish();
    }
    if (result == io::Status::device_gone && std::exchange(slot.disk->absence_told_, true)) {
        // All that is under way ends like this; the keeper looks at what is left.
    } else if (sense) {
        slot.disk->tell(opcode,
                        scsi::describe(*sense, request->op == io::Op::flush ? std::nullopt : std::optional(lba)));
    } else {
        FixedText<120> text;
        print(text, "SCSI status {}, SRB status {} ({:#x}), no sense data, at LBA {}",
              scsi::status_name(srb.scsi_status), name(status), srb.srb_status, lba);
        slot.disk->tell(opcode, text);
    }
    static_cast<void>(inflight_.give(id));
    finish(slot, result);
}

// The same part once more, under a new id. `now`: else in the next tick. False: often enough.
bool Queue::again(u64 id, bool now) {
    const u16 number = inflight_.slot_of(id);
    Slot& slot = slots_[number];
    if (slot.retries >= (now ? max_retries : 200)) {
        return false;
    }
    ++slot.retries;
    static_cast<void>(inflight_.give(id));
    const u64 fresh = *inflight_.take(slots_[0]); // the slot that was freed last: the same one
    slot.number = ++issued_;
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

} // namespace fl::drivers::storvsc
