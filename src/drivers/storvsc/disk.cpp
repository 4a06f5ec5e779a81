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
import io.block_queue;
import io.oldest_wait;
import hv.hyperv.channel;

namespace fl::drivers::storvsc {

using hv::hyperv::PacketType;

// ---- the disk ----

Disk::Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity, Linked linked)
    : QueueDisk(queue.executor(), queue), owner_(queue), unit_(unit) {
    identity_ = identity;
    set_geometry(geometry);
    set_timeout(queue.timeout());
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
    srb.time_out_value = static_cast<u32>(std::clamp<u64>(queue.timeout() / 1'000'000'000, 1, 3600));
    link_.disk = this;
    link_.run = [](io::Post& post) { static_cast<Link&>(post).disk->enlist(); };
    if (linked == Linked::now) {
        enlist();
    }
}

void Disk::enlist() {
    linked_ = true;
    owner_.add(*this);
}

// The queue walks its disks on its own processor, at any time.
void Disk::link(io::Executor& here) {
    if (&here == &owner_.executor()) {
        enlist();
    } else {
        static_cast<void>(owner_.executor().post(link_)); // refused: that processor has stopped, and the lane with it
    }
}

Disk::~Disk() {
    if (linked_) {
        owner_.remove(*this);
    }
}

void Disk::add_lane(Disk& lane) { lanes_[lane_count_++] = &lane; }

[[gnu::always_inline]] inline void Disk::build(Packet& packet, Transport::Command& command) const {
    packet = template_;
    ScsiRequest& srb = packet.srb;
    if (command.op <= io::Op::write) [[likely]] {
        const bool write = command.op == io::Op::write;
        command.wire.short_cdb = io_10_;
        srb.cdb_length = 16;
        srb.data_in = write ? Direction::out : Direction::in;
        srb.data_transfer_length = command.bytes;
        srb.srb_flags = srb_common_flags | (write ? srb_data_out : srb_data_in);
        if (io_10_) [[unlikely]] { // READ(10) and WRITE(10): the LBA in bytes 2 to 5, the count in 7 and 8
            srb.cdb_length = 10;
            srb.payload[0] = to_underlying(write ? scsi::Opcode::write_10 : scsi::Opcode::read_10);
            scsi::put_be(std::span(srb.payload).subspan(2, 4), command.lba);
            scsi::put_be(std::span(srb.payload).subspan(7, 2), command.bytes >> sector_shift());
            return;
        }
        // READ(16) and WRITE(16) [SBC-3 §5.15, §5.38], in place: the LBA in bytes 2 to 9, the count in 10 to 13.
        srb.payload[0] = write ? 0x8a : 0x88;
        const u64 lba_be = __builtin_bswap64(command.lba);
        const u32 blocks_be = __builtin_bswap32(command.bytes >> sector_shift());
        std::memcpy(srb.payload.data() + 2, &lba_be, 8);
        std::memcpy(srb.payload.data() + 10, &blocks_be, 4);
        return;
    }
    const bool unmap = command.op == io::Op::discard;
    command.wire.short_cdb = !unmap && !flush_16_;
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
    return geometry_.sectors <= u64{1} << 32 && unit_.max_transfer >> sector_shift() <= 0xffff;
}

void Disk::report(scsi::Opcode opcode, std::string_view what) {
    if (errors_reported_ < max_reported_errors) {
        log::error("{}: {}: {}", identity_.name, scsi::name(opcode), what);
        if (++errors_reported_ == max_reported_errors) {
            log::warning("{}: further errors of this kind are only counted", identity_.name);
        }
    }
}

void Disk::report_attention(const scsi::Sense& sense) {
    if (attentions_reported_ < max_reported_errors) {
        ++attentions_reported_;
        log::info("{}: {}: asked again", identity_.name, scsi::describe(sense, std::nullopt));
    }
}

// ---- the queue ----

void Queue::start(DmaSpan parameters, Nanoseconds timeout) {
    if (transport().closed_before_start()) {
        return;
    }
    open(timeout);
    transport().start(parameters, timeout);
}

void Queue::tick(Instant now) {
    BlockQueue::tick(now);
    if (is_open() && transport().reset_wanted()) {
        send_reset();
    }
}

// Its answer says only that it was taken; what was under way is answered command by command, or is given up.
void Queue::send_reset() {
    if (is_under_way(reset_)) {
        return transport().reset_sent();
    }
    reset_.packet = {};
    reset_.packet.header = {Operation::reset_bus, flag_completion, 0};
    if (send(reset_)) {
        transport().reset_sent();
    }
}

// ---- the transport: sending ----

void Transport::start(DmaSpan parameters, Nanoseconds timeout) {
    parameters_ = parameters;
    timeout_ = timeout;
    // Release: started before it is seen to be. Partner: the acquire in quiet().
    quiet_.store(false, std::memory_order_release);
}

io::Fit Transport::prepare(Command& command) {
    if (command.op <= io::Op::write) [[likely]] {
        command.bytes = std::min(command.bytes, command.disk().unit().max_transfer);
    } else if (command.op == io::Op::discard) {
        const u64 most = u64{command.disk().unit().max_unmap_blocks} * command.disk().geometry().sector_size;
        command.bytes = static_cast<u32>(std::min<u64>(command.bytes, most));
    }
    return io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    using hv::hyperv::Sent;
    Sent sent;
    const u32 length = packet_bytes(terms_.version);
    const auto bytes_of = [&](const Packet& packet) {
        return std::as_bytes(std::span<const Packet, 1>(&packet, 1)).first(length);
    };
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        command.bytes = exchange.data.size;
        sent = exchange.data.empty() ? channel_.send_inband(bytes_of(exchange.packet), id, true)
                                     : channel_.send_gpa_direct(bytes_of(exchange.packet), exchange.data, id);
    } else {
        Packet packet;
        command.disk().build(packet, command);
        if (command.op <= io::Op::write) [[likely]] {
            sent = channel_.send_gpa_direct(bytes_of(packet), command.data(), id);
        } else if (command.op == io::Op::discard) {
            const u32 sector = command.disk().geometry().sector_size;
            const u32 at = io::SlotIndex::slot_of(id) * 32u;
            const DmaSpan list = parameters_.subspan(at, scsi::unmap_list_bytes);
            scsi::unmap_list(
                std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(list.data), scsi::unmap_list_bytes),
                command.lba, command.bytes / sector);
            sent = channel_.send_gpa_direct(bytes_of(packet), list, id);
        } else {
            sent = channel_.send_inband(bytes_of(packet), id, true);
        }
    }
    if (sent == Sent::queued) [[likely]] {
        return io::SendResult::sent;
    }
    if (sent == Sent::full) {
        return io::SendResult::full;
    }
    fault_ = channel_.broken().value_or(
        Error{Code::exhausted, "a storage packet is longer than the ring", channel_.send_capacity(), length});
    return io::SendResult::broken;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (channel_.publish()) {
        ++counters.notifications;
    }
    if (!channel_.sound()) [[unlikely]] {
        return fault();
    }
    return {};
}

void Transport::settle(io::Counters& counters) {
    const u64 signals = channel_.counters().signals;
    counters.hypercalls += signals - std::exchange(charged_signals_, signals);
}

// The rule that the host broke in one of the rings, which are of no use any more.
Error Transport::fault() const {
    return fault_.value_or(
        channel_.broken().value_or(Error{Code::protocol, "a ring of the storage channel is broken"}));
}

// ---- the transport: answers ----

io::Next Transport::next(io::Completion& completion) {
    hv::hyperv::Packet packet;
    for (;;) {
        const auto got = channel_.receive(packet);
        if (!got) [[unlikely]] {
            return broken(got.error());
        }
        if (!*got) {
            if (std::exchange(taken_, false)) {
                channel_.release();
            }
            return io::Next::none;
        }
        taken_ = true;
        ++heard_;
        if (armed_) {
            channel_.disarm(); // polled as long as there is something to do
            armed_ = false;
        }
        if (packet.type == PacketType::completion) [[likely]] {
            return complete(packet, completion);
        }
        if (auto accepted = accept_event(packet); !accepted) [[unlikely]] {
            return broken(accepted.error());
        }
    }
}

[[gnu::always_inline]] inline io::Next Transport::complete(const hv::hyperv::Packet& packet,
                                                           io::Completion& completion) {
    const u64 id = packet.transaction;
    Command* command = commands_->find(id);
    if (command == nullptr || command->delayed) [[unlikely]] {
        return broken({Code::protocol,
                       "a completion carries a transaction id that is not under way (unknown, repeated or retired)", 0,
                       id});
    }
    // Before a version is agreed on a host may answer in either length, and to a packet that is no SRB as well
    // [storvsc].
    auto* exchange = static_cast<Exchange*>(command->exchange);
    const u32 length = packet_bytes(terms_.version);
    const bool srb = exchange == nullptr || exchange->packet.header.operation == Operation::execute_srb;
    if (srb ? packet.payload.size() != length : packet.payload.size() < sizeof(PacketHeader)) [[unlikely]] {
        return broken({Code::protocol, "a completion has not the length of the agreed version's packets", length,
                       packet.payload.size()});
    }
    Packet answer;
    if (srb && length == sizeof answer) [[likely]] {
        std::memcpy(&answer, packet.payload.data(), sizeof answer);
    } else {
        answer = {};
        std::memcpy(&answer, packet.payload.data(), std::min(packet.payload.size(), sizeof answer));
    }
    if (answer.header.operation != Operation::complete_io) [[unlikely]] {
        return broken({Code::protocol, "a completion is no COMPLETE_IO", to_underlying(Operation::complete_io),
                       to_underlying(answer.header.operation)});
    }
    const bool unmap = exchange == nullptr && command->op == io::Op::discard;
    if (srb && answer.srb.data_transfer_length > std::max(command->bytes, unmap ? scsi::unmap_list_bytes : 0u))
        [[unlikely]] {
        return broken({Code::protocol, "a completion says that more data was moved than was asked for", command->bytes,
                       answer.srb.data_transfer_length});
    }
    if (exchange != nullptr) [[unlikely]] {
        exchange->packet = answer;
        completion = {id};
        return io::Next::one;
    }
    const ScsiRequest& s = answer.srb;
    const SrbStatus status = srb_status_of(s.srb_status);
    if (s.scsi_status == scsi::status_good && (status == SrbStatus::success || status == SrbStatus::data_overrun) &&
        (s.data_transfer_length == command->bytes || command->op > io::Op::write)) [[likely]] {
        completion.id = id;
        return io::Next::one;
    }
    completion = judge(id, *command, answer);
    return io::Next::one;
}

// What the host says by itself.
Result<void> Transport::accept_event(const hv::hyperv::Packet& packet) {
    if (packet.type != PacketType::inband) {
        return Error{Code::protocol, "a packet of a type that a storage host does not send",
                     to_underlying(PacketType::completion), to_underlying(packet.type)};
    }
    if (packet.payload.size() < sizeof(Operation)) {
        return Error{Code::protocol, "a storage packet is shorter than its operation", sizeof(Operation),
                     packet.payload.size()};
    }
    Operation operation;
    std::memcpy(&operation, packet.payload.data(), sizeof operation);
    switch (operation) {
    case Operation::enumerate_bus:
    case Operation::remove_device: want_rescan(); return {};
    case Operation::event_notification: return {};
    case Operation::complete_io:
        return Error{Code::protocol, "a COMPLETE_IO that answers nothing", 0, packet.transaction};
    default: log::debug("storvsc: the host sends {}: not for a guest", name(operation)); return {};
    }
}

// What an answer to a request means: SCSI status, SRB status and sense data.
io::Completion Transport::judge(u64 id, Command& command, const Packet& packet) {
    const ScsiRequest& srb = packet.srb;
    if (command.first == nullptr) [[unlikely]] { // a late answer: the request has ended without it
        return {id};
    }
    const SrbStatus status = srb_status_of(srb.srb_status);
    Disk& disk = command.disk();
    if (srb.scsi_status == scsi::status_good && (status == SrbStatus::success || status == SrbStatus::data_overrun))
        [[likely]] {
        FixedText<120> text;
        print(text, "the host moved {} of {} bytes and calls that a success, at LBA {}", srb.data_transfer_length,
              command.bytes, command.lba);
        disk.report(command.op == io::Op::read ? scsi::Opcode::read_16 : scsi::Opcode::write_16, text);
        return {id, io::Status::io_error};
    }
    const bool short_cdb = command.wire.short_cdb;
    const auto opcode = command.op == io::Op::read      ? short_cdb ? scsi::Opcode::read_10 : scsi::Opcode::read_16
                        : command.op == io::Op::write   ? short_cdb ? scsi::Opcode::write_10 : scsi::Opcode::write_16
                        : command.op == io::Op::discard ? scsi::Opcode::unmap
                        : short_cdb                     ? scsi::Opcode::synchronize_cache_10
                                                        : scsi::Opcode::synchronize_cache_16;
    std::optional<scsi::Sense> sense;
    if ((srb.srb_status & srb_autosense_valid) != 0) {
        sense = scsi::parse_sense(
            std::span(srb.payload).first(std::min<usize>(srb.sense_info_length, sense_bytes(terms_.version))));
    }
    if (sense &&
        (sense->key == scsi::key_recovered ||
         (sense->key == scsi::key_no_sense && srb.scsi_status == scsi::status_good)) &&
        srb.data_transfer_length == command.bytes) {
        return {id}; // done, and the device wants to say how
    }
    const bool again_now = command.retries < Queue::retries_at_once;
    if (sense && sense->key == scsi::key_unit_attention) {
        if (sense->asc == 0x3f || sense->asc == 0x2a) { // the units, or their sizes, have changed
            want_rescan();
        }
        if (again_now) {
            disk.report_attention(*sense);
            return {id, io::Status::io_error, io::Retry::now};
        }
    }
    const bool busy = srb.scsi_status == scsi::status_busy || srb.scsi_status == scsi::status_task_set_full ||
                      status == SrbStatus::busy || (sense && scsi::passes(*sense));
    const bool flushed = was_flushed(status);
    if (command.expired && (flushed || busy)) {
        return {id, io::Status::timed_out};
    }
    if ((busy || (flushed && !sense)) && command.retries < Queue::retries_later) {
        return {id, io::Status::io_error, io::Retry::later};
    }
    if (sense && sense->key == scsi::key_illegal_request && sense->asc == 0x20) { // no such command
        if (command.op == io::Op::flush && short_cdb && again_now) { // each one that was sent as the short command
            disk.flush_16_ = true;
            return {id, io::Status::not_supported, io::Retry::now};
        }
        if (command.op <= io::Op::write && !short_cdb && disk.fits_10() && again_now) {
            disk.io_10_ = true;
            return {id, io::Status::not_supported, io::Retry::now};
        }
        disk.report(opcode, scsi::describe(*sense, std::nullopt));
        return {id, io::Status::not_supported};
    }
    io::Status result = io::Status::io_error;
    if (says_nobody(status) || (sense && sense->asc == 0x25)) {
        result = io::Status::device_gone;
        want_rescan();
    }
    if (result == io::Status::device_gone && std::exchange(disk.absence_reported_, true)) {
        // All that is under way ends like this; the keeper looks at what is left.
    } else if (sense) {
        disk.report(opcode,
                    scsi::describe(*sense, command.op == io::Op::flush ? std::nullopt : std::optional(command.lba)));
    } else {
        FixedText<120> text;
        print(text, "SCSI status {}, SRB status {} ({:#x}), no sense data, at LBA {}",
              scsi::status_name(srb.scsi_status), name(status), srb.srb_status, command.lba);
        disk.report(opcode, text);
    }
    return {id, result};
}

Result<bool> Transport::arm() {
    if (armed_) {
        return false; // whatever has come since has raised an event, which keeps us awake
    }
    TRY(const bool found, channel_.arm());
    armed_ = !found;
    return found;
}

// ---- the transport: giving up ----

Result<void> Transport::tick(Instant, bool) {
    if (channel_.rescinded()) {
        shared_.taken.store(true, std::memory_order_relaxed); // ordered by what closing() stores
        return Error{Code::device_gone, "the host has taken the storage controller away"};
    }
    if (shared_.rescan_wanted.load(std::memory_order_relaxed)) {
        notify();
    }
    return {};
}

void Transport::add_counts(u64 under_way, u64 answered) {
    const auto add = [](std::atomic<u64>& sum, u64& added, u64 now) { // modulo 2^64
        sum.fetch_add(now - std::exchange(added, now), std::memory_order_relaxed);
    };
    add(shared_.under_way, added_under_way_, under_way);
    add(shared_.answered, added_answered_, answered);
    add(shared_.heard, added_heard_, heard_);
}

io::OldestWait::Seen Transport::seen(io::OldestWait::Seen own) {
    add_counts(own.under_way, own.answered);
    return {.oldest = own.oldest,
            .under_way = shared_.under_way.load(std::memory_order_relaxed),
            .answered = shared_.answered.load(std::memory_order_relaxed)};
}

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding, std::string_view) {
    if (!channel_.look()) { // the rule that was broken, and not the time-out that came of it
        return {.kind = io::Recovery::Kind::close, .why = fault()};
    }
    log::warning("storvsc: no answer within {} ms: asking the host to reset the bus", timeout_ / 1'000'000);
    reset_heard_ = shared_.heard.load(std::memory_order_relaxed);
    shared_.reset_wanted.store(true, std::memory_order_relaxed);
    return {.kind = io::Recovery::Kind::asked};
}

// The host does not even answer what the reset of the bus has ended.
std::optional<Error> Transport::asked_in_vain(bool writes) {
    if (!channel_.look()) {
        return fault();
    }
    if (shared_.heard.load(std::memory_order_relaxed) == reset_heard_) { // on any queue
        return Error{Code::timed_out, "the host has not answered anything for a whole time-out"};
    }
    if (writes) { // it may be carried out at any time, and undo what was written since
        return Error{Code::timed_out,
                     "a write was not answered, not even by a bus reset: nothing may be written behind it"};
    }
    return std::nullopt;
}

io::Stuck Transport::stuck(std::string_view) {
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every slot is held by a request that the host never answered"}};
}

std::optional<io::Status> Transport::closed_elsewhere() const {
    if (!shared_.closed.load(std::memory_order_acquire)) [[likely]] { // acquire: see Shared
        return std::nullopt;
    }
    return static_cast<io::Status>(shared_.close_status.load(std::memory_order_relaxed));
}

bool Transport::closing(io::Status status) {
    // Relaxed: it only says which queue reports; another one may find the same, or something else, in this very moment.
    if (shared_.reported.exchange(true, std::memory_order_relaxed)) {
        return false;
    }
    shared_.close_status.store(to_underlying(status), std::memory_order_relaxed); // ordered by the next line
    shared_.closed.store(true, std::memory_order_release); // partner: the acquire in closed_elsewhere()
    return true;
}

void Transport::closed(bool stopped) {
    add_counts(0, added_answered_);
    // Release: all of the above before. Partner: the acquire in quiet().
    quiet_.store(true, std::memory_order_release);
    if (!stopped) {
        notify();
    }
}

} // namespace fl::drivers::storvsc

namespace fl {
template class io::BlockQueue<drivers::storvsc::Transport>;
template class io::QueueDisk<drivers::storvsc::Transport>;
} // namespace fl
