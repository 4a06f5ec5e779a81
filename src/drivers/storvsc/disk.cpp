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

[[gnu::always_inline]] inline io::SendResult Transport::send(Command& command, u64 id) {
    if (command.exchange == nullptr && packets_.has_whole_packets() && command.disk().commands_.is_usual(command)) {
        command.wire.short_cdb = false;
        return packets_.send_words(command.disk().commands_.transfer(command), command.data(), id);
    }
    return send_other(command, id);
}

io::SendResult Transport::send_other(Command& command, u64 id) {
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        command.bytes = exchange.data.size;
        return exchange.data.empty() ? packets_.send(exchange.packet, id)
                                     : packets_.send(exchange.packet, exchange.data, id);
    }
    const UnitCommands& unit = command.disk().commands_;
    Packet packet;
    unit.build(packet, command, command.wire);
    if (command.op <= io::Op::write) {
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
    using enum hv::hyperv::Look;
    const auto look = take_done(packets_, *commands_, completion.id);
    reset_.received(look == taken);
    return look == taken ? io::Next::one : look == none ? io::Next::none : next_other(completion);
}

io::Next Transport::next_other(io::Completion& completion) {
    hv::hyperv::Packet packet;
    for (;;) {
        if (const io::Next taken = packets_.take(packet); taken != io::Next::one) {
            return taken;
        }
        reset_.received(true);
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

io::Next Transport::complete(const hv::hyperv::Packet& packet, io::Completion& completion) {
    const u64 id = completion.id = packet.transaction;
    Command* command = commands_->find(id);
    if (command == nullptr || command->delayed) [[unlikely]] {
        return broken({Code::protocol,
                       "a completion carries a transaction id that is not in flight (unknown, repeated or retired)", 0,
                       id});
    }
    Packet answer;
    if (!decode(packet.payload, packets_.terms().version, *command, answer, fault_)) [[unlikely]] {
        return io::Next::broken;
    }
    if (command->exchange != nullptr) {
        static_cast<Exchange*>(command->exchange)->packet = answer;
    } else if (!succeeded(answer.srb, *command) && command->first != nullptr) { // else its request has ended already
        Disk& disk = command->disk();
        const scsi::Verdict verdict = disk.commands_.judge(
            *command, command->wire, response_of(answer.srb, packets_.terms().version), disk.identity().name);
        completion = {id, verdict.status, verdict.retry};
        if (verdict.rescan) {
            reset_.request_rescan();
        }
    }
    return io::Next::one;
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
