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
    : GroupedDisk(queue, geometry, identity), unit_(unit), commands_(unit, geometry) {
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
    if (linked == Linked::now) {
        link_now();
    }
}

[[gnu::always_inline]] inline void Disk::build(Packet& packet, Transport::Command& command) const {
    packet = template_;
    ScsiRequest& srb = packet.srb;
    const auto cdb = std::span(srb.payload).first<scsi::cdb_bytes>();
    if (command.op <= io::Op::write) [[likely]] {
        const bool write = command.op == io::Op::write;
        srb.cdb_length = commands_.build_io(cdb, command, command.wire);
        srb.data_in = write ? Direction::out : Direction::in;
        srb.data_transfer_length = command.bytes;
        srb.srb_flags = srb_common_flags | (write ? srb_data_out : srb_data_in);
        return;
    }
    const bool out = scsi::data_phase(command.op) == scsi::DataPhase::out;
    srb.cdb_length = commands_.build_other(cdb, command, command.wire);
    srb.data_in = out ? Direction::out : Direction::none;
    srb.data_transfer_length = out ? scsi::unmap_list_bytes : 0;
    srb.srb_flags = srb_common_flags | (out ? srb_data_out : 0);
}

// ---- the queue ----

void Queue::start(DmaSpan parameters, Nanoseconds timeout) {
    if (transport().group().closed()) {
        return;
    }
    open(timeout);
    transport().listen(executor());
    transport().start(parameters, timeout);
}

void Queue::tick(Instant now) {
    GroupedQueue::tick(now);
    if (is_open() && transport().reset_requested()) {
        send_reset();
    }
}

// The answer only confirms the request; the host ends outstanding commands individually, or they are abandoned.
void Queue::send_reset() {
    if (is_in_flight(reset_)) {
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
    // Release: orders the start before the flag. Pairs with the acquire in quiescent().
    join();
}

io::Fit Transport::prepare(Command& command) { return command.disk().commands_.limit(command); }

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
            const u32 at = io::SlotIndex::slot_of(id) * 32u;
            const DmaSpan list = parameters_.subspan(at, scsi::unmap_list_bytes);
            command.disk().commands_.build_unmap_list(
                std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(list.data), scsi::unmap_list_bytes),
                command);
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

// The protocol violation by the host that broke a ring; the rings are unusable afterwards.
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
            if (std::exchange(unreleased_, false)) {
                channel_.release();
            }
            return io::Next::none;
        }
        unreleased_ = true;
        ++received_;
        if (armed_) {
            channel_.disarm(); // polled while there is work
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
                       "a completion carries a transaction id that is not in flight (unknown, repeated or retired)", 0,
                       id});
    }
    // Before version negotiation a host may answer with either length, even to a packet without an SRB [storvsc].
    auto* exchange = static_cast<Exchange*>(command->exchange);
    const u32 length = packet_bytes(terms_.version);
    const bool srb = exchange == nullptr || exchange->packet.header.operation == Operation::execute_srb;
    if (srb ? packet.payload.size() != length : packet.payload.size() < sizeof(PacketHeader)) [[unlikely]] {
        return broken({Code::protocol, "a completion's length is not that of the negotiated version's packets", length,
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
        return broken({Code::protocol, "a completion is not a COMPLETE_IO", to_underlying(Operation::complete_io),
                       to_underlying(answer.header.operation)});
    }
    const bool unmap = exchange == nullptr && command->op == io::Op::discard;
    if (srb && answer.srb.data_transfer_length > std::max(command->bytes, unmap ? scsi::unmap_list_bytes : 0u))
        [[unlikely]] {
        return broken({Code::protocol, "a completion reports more data than was requested", command->bytes,
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
        scsi::moved_all(*command, s.data_transfer_length)) [[likely]] {
        completion.id = id;
        return io::Next::one;
    }
    completion = judge(id, *command, answer);
    return io::Next::one;
}

// Handles unsolicited packets from the host.
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
    case Operation::remove_device: request_rescan(); return {};
    case Operation::event_notification: return {};
    case Operation::complete_io: return Error{Code::protocol, "a COMPLETE_IO without a request", 0, packet.transaction};
    default: log::debug("storvsc: the host sends {}: not for a guest", name(operation)); return {};
    }
}

namespace {

scsi::ServiceResponse service_of(SrbStatus status, u8 scsi_status) {
    if (is_no_device(status)) {
        return scsi::ServiceResponse::no_unit;
    }
    if (was_flushed(status)) {
        return scsi::ServiceResponse::aborted;
    }
    switch (status) {
    case SrbStatus::success:
    case SrbStatus::data_overrun: return scsi::ServiceResponse::command_complete;
    case SrbStatus::busy: return scsi::ServiceResponse::busy;
    case SrbStatus::error: // reported by the unit, if its SCSI status is not GOOD
        return scsi_status != scsi::status_good ? scsi::ServiceResponse::command_complete
                                                : scsi::ServiceResponse::failed;
    default: return scsi::ServiceResponse::failed;
    }
}

} // namespace

scsi::Response response_of(const ScsiRequest& srb, Version version) {
    const SrbStatus status = srb_status_of(srb.srb_status);
    scsi::Response response{.service = service_of(status, srb.scsi_status),
                            .status = srb.scsi_status,
                            .moved = srb.data_transfer_length,
                            .sense = {},
                            .transport = {"SRB status", name(status), srb.srb_status}};
    if ((srb.srb_status & srb_autosense_valid) != 0) {
        response.sense = scsi::parse_sense(
            std::span(srb.payload).first(std::min<usize>(srb.sense_info_length, sense_bytes(version))));
    }
    return response;
}

io::Completion Transport::judge(u64 id, Command& command, const Packet& packet) {
    if (command.first == nullptr) [[unlikely]] { // a late answer: the request has already ended
        return {id};
    }
    Disk& disk = command.disk();
    const scsi::Verdict verdict =
        disk.commands_.judge(command, command.wire, response_of(packet.srb, terms_.version), disk.identity().name);
    if (verdict.rescan) {
        request_rescan();
    }
    return {id, verdict.status, verdict.retry};
}

Result<bool> Transport::arm() {
    if (armed_) {
        return false; // anything received since has raised an event, which prevents sleep
    }
    TRY(const bool found, channel_.arm());
    armed_ = !found;
    return found;
}

// ---- the transport: recovery ----

Result<void> Transport::tick(Instant, bool) {
    if (channel_.rescinded()) {
        shared_.set_removed();
        return Error{Code::device_gone, "the host has rescinded the storage controller"};
    }
    if (shared_.rescan_requested.load(std::memory_order_relaxed)) {
        notify();
    }
    return {};
}

void Transport::count_received() {
    shared_.received.fetch_add(received_ - std::exchange(added_received_, received_), std::memory_order_relaxed);
}

io::OldestWait::Seen Transport::seen(io::OldestWait::Seen own) {
    count_received();
    return GroupedTransport::seen(own);
}

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding, std::string_view) {
    if (!channel_.check()) { // report the protocol violation, not the resulting timeout
        return {.kind = io::Recovery::Kind::close, .why = fault()};
    }
    log::warning("storvsc: no answer within {} ms: asking the host to reset the bus", timeout_ / 1'000'000);
    reset_received_ = shared_.received.load(std::memory_order_relaxed);
    shared_.reset_requested.store(true, std::memory_order_relaxed);
    shared_.raise_queues();
    return {.kind = io::Recovery::Kind::reset_requested};
}

// The host has not answered all commands even after the bus reset.
std::optional<Error> Transport::reset_ineffective(bool writes) {
    if (!channel_.check()) {
        return fault();
    }
    if (shared_.received.load(std::memory_order_relaxed) == reset_received_) { // on any queue
        return Error{Code::timed_out, "the host has not answered anything for a whole time-out"};
    }
    if (writes) { // it may be executed at any time, and overwrite later writes
        return Error{Code::timed_out, "a write was not answered, not even by a bus reset: no later write is safe"};
    }
    return std::nullopt;
}

io::Stuck Transport::stuck(std::string_view) {
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every slot is held by a request that the host never completed"}};
}

void Transport::closed(bool stopped) {
    channel_.stop_listening();
    count_received();
    leave();
    if (!stopped) {
        notify();
    }
}

} // namespace fl::drivers::storvsc

namespace fl {
template class io::BlockQueue<drivers::storvsc::Transport>;
template class io::QueueDisk<drivers::storvsc::Transport>;
} // namespace fl
