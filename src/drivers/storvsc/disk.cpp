module drivers.storvsc.disk;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import hv.hyperv.channel;

namespace fl::drivers::storvsc {

// ---- sending ----

void Transport::start(io::Executor& executor, DmaSpan lists, Nanoseconds timeout) {
    packets_.start(lists, executor, *queue);
    timeout_ = timeout;
    join();
}

inline io::Fit Transport::prepare(Command& command) { return command.disk().commands_.limit(command); }

io::SendResult Transport::send(Command& command, u64 id) {
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        command.bytes = exchange.data.size;
        return exchange.data.empty() ? packets_.send(exchange.packet, id)
                                     : packets_.send(exchange.packet, exchange.data, id);
    }
    const UnitCommands& unit = command.disk().commands_;
    Packet packet;
    unit.build(packet, command, command.wire);
    if (command.op <= io::Op::write) [[likely]] {
        return packets_.send(packet, command.data(), id);
    }
    if (command.op != io::Op::discard) {
        return packets_.send(packet, id);
    }
    const DmaSpan list = packets_.unmap_list(io::SlotIndex::slot_of(id));
    unit.write_unmap_list(list, command);
    return packets_.send(packet, list, id);
}

inline Result<void> Transport::publish(io::Counters& counters) {
    return packets_.publish(counters) ? Result<void>{} : fault();
}

// ---- answers ----

[[gnu::always_inline]] inline io::Next Transport::next(io::Completion& completion) {
    hv::hyperv::Packet packet;
    for (;;) {
        if (const io::Next taken = packets_.take(packet); taken != io::Next::one) {
            return taken;
        }
        reset_.received();
        if (packet.type == hv::hyperv::PacketType::completion) [[likely]] {
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
    completion.id = id;
    if (all_done(packet.payload, packets_.terms().version, *command)) [[likely]] {
        return io::Next::one;
    }
    auto* exchange = static_cast<Exchange*>(command->exchange);
    const bool srb = exchange == nullptr || exchange->packet.header.operation == Operation::execute_srb;
    Packet answer;
    if (!decode(packet.payload, packets_.terms().version, srb, most_data(*command), answer, fault_)) [[unlikely]] {
        return io::Next::broken;
    }
    if (exchange != nullptr) {
        exchange->packet = answer;
    } else if (!succeeded(answer.srb, *command)) {
        completion = judge(id, *command, answer);
    }
    return io::Next::one;
}

io::Completion Transport::judge(u64 id, Command& command, const Packet& packet) {
    if (command.first == nullptr) [[unlikely]] { // a late answer: the request has already ended
        return {id};
    }
    Disk& disk = command.disk();
    const scsi::Verdict verdict = disk.commands_.judge(
        command, command.wire, response_of(packet.srb, packets_.terms().version), disk.identity().name);
    if (verdict.rescan) {
        reset_.request_rescan();
    }
    return {id, verdict.status, verdict.retry};
}

// ---- recovery ----

Result<void> Transport::tick(Instant, bool) {
    if (packets_.rescinded()) {
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
    if (!packets_.check()) { // report the protocol violation, not the resulting timeout
        return {.kind = io::Recovery::Kind::close, .why = fault()};
    }
    reset_.request(timeout_);
    return {.kind = io::Recovery::Kind::reset_requested};
}

std::optional<Error> Transport::reset_ineffective(bool writes) {
    return packets_.check() ? reset_.ineffective(writes) : std::optional(fault());
}

io::Stuck Transport::stuck(std::string_view) {
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every slot is held by a request that the host never completed"}};
}

void Transport::closed(bool stopped) {
    packets_.stop();
    reset_.count();
    leave();
    if (!stopped) {
        reset_.notify();
    }
}

// ---- the queue ----

void Queue::start(DmaSpan lists, Nanoseconds timeout) {
    if (!transport().group().closed()) {
        open(timeout);
        transport().start(executor(), lists, timeout);
    }
}

void Queue::tick(Instant now) {
    GroupedQueue::tick(now);
    if (is_open()) {
        transport().bus_reset().send(*this);
    }
}

} // namespace fl::drivers::storvsc

namespace fl {
template class io::BlockQueue<drivers::storvsc::Transport>;
template class io::QueueDisk<drivers::storvsc::Transport>;
} // namespace fl
