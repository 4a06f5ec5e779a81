module drivers.nvme.disk;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;

namespace fl::drivers::nvme {

// ---- sending ----

io::Fit Transport::prepare(Command& command) {
    if (commands_->size() > room_ || pair_.full()) [[unlikely]] {
        return io::Fit::full;
    }
    command.wire = {};
    const Limits& limits = command.disk().limits();
    if (command.op <= io::Op::write) [[likely]] {
        if (command.data().bus % 4 != 0) [[unlikely]] { // PRP entries are dwords [nvme-1.4 §4.3]
            command.refusal = io::Status::misaligned;
            return io::Fit::refused;
        }
        command.bytes = std::min(command.bytes, limits.transfer);
    } else if (command.op != io::Op::flush) {
        command.bytes = std::min(command.bytes, command.op == io::Op::discard ? limits.discard : limits.zeroes);
    }
    return io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    if (room_ == 0 || (command.delayed && recovery_.turn_time() < command.wire.not_before)) [[unlikely]] {
        return io::SendResult::full;
    }
    const u32 slot = io::SlotIndex::slot_of(id);
    Submission entry;
    if (command.exchange != nullptr) [[unlikely]] {
        entry = static_cast<const Exchange&>(*command.exchange).command;
    } else {
        const Disk& disk = command.disk();
        const u32 blocks = command.bytes >> disk.sector_shift();
        entry.nsid = disk.nsid();
        if (command.op <= io::Op::write) [[likely]] {
            describe_data(entry, command.data(), pair_.list(slot));
            describe_range(entry, command.op == io::Op::write ? Opcode::write : Opcode::read, command.lba, blocks);
        } else {
            describe_other(entry, command.op, command.lba, blocks, pair_.list(slot));
        }
    }
    entry.cid = command_id(id);
    return pair_.submit(entry) ? io::SendResult::sent : io::SendResult::full;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (room_ != 0) [[likely]] {
        counters.notifications += pair_.publish() ? 1 : 0;
    }
    return {};
}

// ---- completions ----

io::Next Transport::next(io::Completion& completion) {
    if (!recovery_.running()) [[unlikely]] {
        if (const io::Next found = after_reset(completion); found == io::Next::one || recovery_.held()) {
            return found;
        }
    }
    CompletionEntry entry;
    if (const io::Next taken = pair_.take(entry, commands_->size() != 0); taken != io::Next::one) {
        if (taken == io::Next::none && pair_.terms().id != 0 && recovery_.look()) [[unlikely]] {
            room_ = 0;
        }
        return taken;
    }
    alive_ = true;
    const u16 slot = entry.cid & (slots_of_ids - 1);
    const u64 id = commands_->has_slot(slot) ? commands_->id_of(slot) : ~u64{0};
    Command* command = commands_->find(id);
    if (command == nullptr || command->delayed || command_id(id) != entry.cid) [[unlikely]] {
        return pair_.broken({Code::protocol,
                             "a completion carries a command id that is not in flight (unknown, repeated or retired)",
                             0, entry.cid});
    }
    completion.id = id;
    if (command->exchange != nullptr) [[unlikely]] {
        static_cast<Exchange*>(command->exchange)->completion = entry;
    } else if (status_code(entry.status) != 0) [[unlikely]] {
        completion = failures_.judge(id, *command, command->wire, entry.status, recovery_.turn_time());
    }
    return io::Next::one;
}

io::Next Transport::after_reset(io::Completion& completion) {
    if (const auto id = recovery_.next(*commands_)) {
        Command& command = (*commands_)[*id];
        if (command.disk().removed()) { // another namespace may have its number now
            completion = {*id, io::Status::device_gone};
        } else {
            completion = {*id, io::Status::timed_out, Recovery::again(command.wire.attempts)};
        }
        return io::Next::one;
    }
    if (recovery_.running()) {
        room_ = pair_.capacity();
    }
    return io::Next::none;
}

Result<void> Transport::release(io::Counters&) {
    if (room_ != 0) {
        pair_.release();
    }
    return {};
}

Result<bool> Transport::arm() {
    if (room_ == 0 || commands_->empty()) {
        return false; // a completion now would be a violation, which next() detects
    }
    pair_.count_accesses(interrupts_.unmask());
    return pair_.arm();
}

// ---- recovery ----

Result<void> Transport::tick(Instant, bool) {
    auto ticked = recovery_.tick(std::exchange(alive_, false), pair_);
    if (!ticked) {
        group().set_removed();
    }
    return ticked;
}

io::Recovery Transport::recover(const Command& oldest, io::OldestWait::Finding, std::string_view) {
    if (recovery_.held()) {
        return {.kind = io::Recovery::Kind::none};
    }
    const u16 slot = static_cast<u16>(&oldest - commands_->entries());
    recovery_.timed_out(oldest.number, pair_.terms().id, command_id(commands_->id_of(slot)), timeout_);
    return {.kind = io::Recovery::Kind::none};
}

io::Stuck Transport::stuck(std::string_view) {
    if (room_ == 0) {
        return {.kind = io::Stuck::Kind::none}; // the reset has its own bounds
    }
    return {.kind = io::Stuck::Kind::close,
            .why = Error{Code::timed_out, "every command is held by a request that the controller never completed"}};
}

void Transport::closed(bool stopped) {
    leave();
    if (!stopped) {
        recovery_.controller().wake();
    }
}

} // namespace fl::drivers::nvme

namespace fl {
template class io::BlockQueue<drivers::nvme::Transport>;
template class io::QueueDisk<drivers::nvme::Transport>;
} // namespace fl
