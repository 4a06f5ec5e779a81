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
    : GroupedDisk(queue, geometry, identity), unit_(unit),
      commands_(unit, geometry, queue.terms().version, queue.timeout()) {
    if (linked == Linked::now) {
        link_now();
    }
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
    if (is_open() && transport().bus_reset().requested()) {
        send_reset();
    }
}

// The answer only confirms the request; the host ends outstanding commands individually, or they are abandoned.
void Queue::send_reset() {
    if (is_in_flight(reset_)) {
        return transport().bus_reset().sent();
    }
    reset_.packet = {};
    reset_.packet.header = {Operation::reset_bus, flag_completion, 0};
    if (send(reset_)) {
        transport().bus_reset().sent();
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
        command.disk().commands_.build(packet, command, command.wire);
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
        reset_.received();
        if (armed_) {
            channel_.disarm(); // polled while there is work
            armed_ = false;
        }
        if (packet.type == PacketType::completion) [[likely]] {
            return complete(packet, completion);
        }
        const auto changed = units_changed(packet);
        if (!changed) [[unlikely]] {
            return broken(changed.error());
        }
        if (*changed) {
            reset_.request_rescan();
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
    auto* exchange = static_cast<Exchange*>(command->exchange);
    const bool srb = exchange == nullptr || exchange->packet.header.operation == Operation::execute_srb;
    const bool unmap = exchange == nullptr && command->op == io::Op::discard;
    Packet answer;
    if (!decode(packet.payload, terms_.version, srb, std::max(command->bytes, unmap ? scsi::unmap_list_bytes : 0u),
                answer, fault_)) [[unlikely]] {
        return io::Next::broken;
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

io::Completion Transport::judge(u64 id, Command& command, const Packet& packet) {
    if (command.first == nullptr) [[unlikely]] { // a late answer: the request has already ended
        return {id};
    }
    Disk& disk = command.disk();
    const scsi::Verdict verdict =
        disk.commands_.judge(command, command.wire, response_of(packet.srb, terms_.version), disk.identity().name);
    if (verdict.rescan) {
        reset_.request_rescan();
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
        group().set_removed();
        return Error{Code::device_gone, "the host has rescinded the storage controller"};
    }
    reset_.tick();
    return {};
}

io::OldestWait::Seen Transport::seen(io::OldestWait::Seen own) {
    reset_.count();
    return GroupedTransport::seen(own);
}

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding, std::string_view) {
    if (!channel_.check()) { // report the protocol violation, not the resulting timeout
        return {.kind = io::Recovery::Kind::close, .why = fault()};
    }
    reset_.request(timeout_);
    return {.kind = io::Recovery::Kind::reset_requested};
}

std::optional<Error> Transport::reset_ineffective(bool writes) {
    return channel_.check() ? reset_.ineffective(writes) : std::optional(fault());
}

io::Stuck Transport::stuck(std::string_view) {
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every slot is held by a request that the host never completed"}};
}

void Transport::closed(bool stopped) {
    channel_.stop_listening();
    reset_.count();
    leave();
    if (!stopped) {
        reset_.notify();
    }
}

} // namespace fl::drivers::storvsc

namespace fl {
template class io::BlockQueue<drivers::storvsc::Transport>;
template class io::QueueDisk<drivers::storvsc::Transport>;
} // namespace fl
