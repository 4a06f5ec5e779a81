module drivers.ahci.queue;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.dma_mapper;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;

namespace fl::drivers::ahci {

// ---- opening and closing ----

void Disk::open(const Terms& terms, const Identity& identity, Nanoseconds timeout) {
    identity_ = identity;
    set_geometry(geometry_of(terms));
    set_timeout(timeout);
    queue_.add(*this);
    queue_.open(timeout);
    queue_.transport().open(*this, terms);
}

void Disk::close() {
    if (queue_.is_open()) {
        queue_.transport().leave();
        queue_.stop();
        static_cast<void>(queue_.transport().port().stop(100));
    }
}

void Transport::open(Disk& disk, const Terms& terms) {
    disk_ = &disk;
    depth_ = terms.depth;
    lba48_ = terms.info.lba48;
    flush_ext_ = terms.info.flush_ext;
    port_.clear_errors();
    port_.clear_pending(port_.bit());
    port_.write(interrupt_enable, PortInterrupts::enabled);
    charged_accesses_ = port_.accesses();
    leaving_ = false;
    forget_commands();
}

// ---- sending ----

/// Queued and other commands exclude each other, and of the others there is at most one.
bool Transport::has_room(const Command& command) const {
    if (recovery_.in_progress() || returned_ != 0) {
        return false;
    }
    return (issued_ | unissued_) == 0 || (queued_ && queued(command));
}

io::Fit Transport::prepare(Command& command) {
    command.wire.alone = false;
    // The lowest slots are used first, so that with at most depth_ of them in use all are below it.
    if (!has_room(command) || commands_->size() > std::max(depth_, 1u)) {
        return io::Fit::full;
    }
    switch (command.op) {
    case io::Op::flush: return io::Fit::ok;
    case io::Op::discard:
        command.bytes = static_cast<u32>(
            std::min<u64>(command.bytes, u64{trim_ranges} * trim_max_sectors * command.disk().geometry().sector_size));
        return io::Fit::ok;
    case io::Op::write_zeroes: // ATA has no such command, and the geometry says so
        command.refusal = io::Status::not_supported;
        return io::Fit::refused;
    case io::Op::read:
    case io::Op::write: break;
    }
    const u32 most = lba48_ ? max_transfer : std::min(max_transfer, 256 * command.disk().geometry().sector_size);
    command.bytes = std::min(command.bytes, most);
    return limits_.admits(command.first->buffer) ? io::Fit::ok : map(command);
}

io::Fit Transport::map(Command& command) {
    command.bytes = std::min(command.bytes, max_bounced);
    DmaLimits limits = limits_;
    limits.granule = command.disk().geometry().sector_size;
    const DmaSpan data = command.data();
    const auto mapped =
        mapper_.map({&data, 1}, command.op == io::Op::write ? DmaDirection::to_device : DmaDirection::from_device,
                    limits, command.wire.mapping);
    if (mapped) {
        command.bytes = *mapped;
        return io::Fit::ok;
    }
    if (mapped.error().code == Code::busy) {
        return io::Fit::full;
    }
    log::error("{}: no memory below 4 GiB to reach a buffer above it: {}", command.disk().identity().name.view(),
               mapped.error());
    command.refusal = io::Status::io_error;
    return io::Fit::refused;
}

CommandFis Transport::build(const Command& command, u32 slot) const {
    if (command.op == io::Op::flush) {
        return plain_fis(flush_ext_ ? Opcode::flush_cache_ext : Opcode::flush_cache);
    }
    const u32 sectors = command.bytes / command.disk().geometry().sector_size;
    if (command.op == io::Op::discard) {
        auto* const ranges = reinterpret_cast<u64*>(memory_.block(1).data);
        fill_trim(std::span<u64, trim_ranges>(ranges, trim_ranges), command.lba, sectors);
        return trim_fis();
    }
    const bool write = command.op == io::Op::write;
    return queued(command) ? queued_fis(write, command.lba, sectors, slot)
                           : dma_fis(write, lba48_, command.lba, sectors);
}

io::SendResult Transport::send(Command& command, u64 id) {
    if (!has_room(command)) [[unlikely]] { // a resend
        return io::SendResult::full;
    }
    const u32 slot = io::SlotIndex::slot_of(id);
    const CommandFis fis = build(command, slot);
    if (command.op > io::Op::write) {
        const DmaSpan ranges = memory_.block(1);
        memory_.encode(slot, slot, fis, command.op == io::Op::discard,
                       {&ranges, command.op == io::Op::discard ? 1u : 0u});
    } else if (command.wire.mapping.active()) [[unlikely]] {
        std::array<DmaSpan, max_descriptors> pieces;
        const auto segments = command.wire.mapping.segments();
        for (usize i = 0; i < segments.size(); ++i) {
            pieces[i] = {nullptr, segments[i].bus, segments[i].size};
        }
        memory_.encode(slot, slot, fis, command.op == io::Op::write, {pieces.data(), segments.size()});
    } else {
        const DmaSpan data = command.data();
        memory_.encode(slot, slot, fis, command.op == io::Op::write, {&data, 1});
    }
    queued_ = queued(command);
    unissued_ |= u32{1} << slot;
    return io::SendResult::sent;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (unissued_ == 0 || recovery_.in_progress()) {
        return {};
    }
    if (queued_) [[likely]] {
        port_.write(sata_active, unissued_);
    } else {
        memory_.forget(ReceivedFis::register_at); // may be of a queued command that the device has accepted
    }
    port_.write(command_issue, unissued_);
    issued_ |= std::exchange(unissued_, 0);
    issued_at_ = executor_.turn_time();
    suspect_ = false;
    ++counters.notifications;
    return {};
}

void Transport::settle(io::Counters& counters) {
    counters.device_accesses += port_.accesses() - charged_accesses_ + hba_.take_accesses();
    charged_accesses_ = port_.accesses();
}

// ---- answers ----

io::Next Transport::next(io::Completion& completion) {
    if (done_ == 0) {
        if (returned_ != 0) [[unlikely]] {
            completion = give_back();
            return io::Next::one;
        }
        if (fault_) [[unlikely]] {
            return io::Next::broken;
        }
        if (!events_.take()) {
            return io::Next::none;
        }
        if (!collect()) [[unlikely]] {
            return io::Next::broken;
        }
        if (done_ == 0) [[unlikely]] {
            return returned_ != 0 ? next(completion) : io::Next::none;
        }
    }
    const u32 slot = static_cast<u32>(std::countr_zero(done_));
    done_ &= done_ - 1;
    completion.id = commands_->id_of(static_cast<u16>(slot));
    if (!queued_) [[unlikely]] {
        check_length(slot, completion);
    }
    return io::Next::one;
}

/// The HBA counts the bytes of a command that is not queued [ahci-1.3.1 §4.2.2].
void Transport::check_length(u32 slot, io::Completion& completion) {
    const Command& command = (*commands_)[completion.id];
    const u32 bytes = memory_.header(slot).transferred;
    if (command.op == io::Op::read && bytes < command.bytes) {
        log::warning("{}: a read ended after {} of {} bytes", disk_->identity().name.view(), bytes, command.bytes);
        completion.status = io::Status::io_error;
        completion.retry = io::Retry::alone;
    }
}

/// After an interrupt: finds what has ended. False: the port is broken.
bool Transport::collect() {
    const u32 causes = events_.take_causes();
    if (recovery_.in_progress()) [[unlikely]] {
        return step(); // clears the interrupt when the cause is gone: doing so now would raise it again at once
    }
    if (hba_.alone() || std::exchange(forced_, false)) [[likely]] {
        port_.write(PortInterrupts::offset, PortInterrupts::ends);
        port_.clear_pending(port_.bit());
    }
    u32 ended = ended_by_fis();
    if (ended != issued_) { // the FIS is of the last ones only
        const u32 busy = port_.read(queued_ ? sata_active : command_issue);
        if ((busy & ~issued_) != 0) [[unlikely]] {
            return busy == ~u32{0} ? examine(busy)
                                   : broken({Code::protocol,
                                             "the HBA shows commands that were never issued (PxSACT, "
                                             "PxCI)",
                                             issued_, busy});
        }
        ended = issued_ & ~busy;
    }
    issued_ &= ~ended;
    done_ |= ended;
    if (ended == 0 || (causes & (PortInterrupts::fatal | PortInterrupts::link)) != 0) [[unlikely]] {
        return examine(causes);
    }
    recovery_.succeeded();
    return true;
}

/// The commands that the last FIS of the device in memory ends. The HBA interrupts for it after it has cleared their
/// bits in its registers [ahci-1.3.1 §5.3.14].
u32 Transport::ended_by_fis() {
    const u32 at = queued_ ? ReceivedFis::bits_at : ReceivedFis::register_at;
    const FisHead head = FisHead::from(memory_.received(at));
    const u8 type = queued_ ? ReceivedFis::bits_type : ReceivedFis::register_type;
    const ata::Status status{head.get(FisHead::status)};
    if (head.get(FisHead::type) != type || status.error() || status.device_fault() || status.in_progress()) {
        return 0;
    }
    const u32 ended = queued_ ? memory_.received(at + 4) & issued_ : issued_;
    memory_.forget(at); // not to be taken for the answer to a later command
    return ended;
}

/// An interrupt that ended no command. `causes`: those that the handler has cleared.
[[gnu::noinline]] bool Transport::examine(u32 causes) {
    const u32 seen = port_.read<PortInterrupts>().raw;
    if (seen == ~u32{0}) {
        disk_->remove();
        return broken({Code::device_gone, "all registers read as ones: the HBA was removed"});
    }
    causes |= seen;
    if ((causes & PortInterrupts::link) != 0 && !port_.established()) {
        disk_->remove();
        return broken({Code::device_gone, "the link to the disk is down (PhyRdy): it was unplugged or has failed"});
    }
    failed_ = port_.read<TaskFile>();
    if ((causes & (PortInterrupts::fatal | PortInterrupts::link)) == 0) {
        hba_.report_plugged(port_);
        return true;
    }
    // A new link has reset the disk, and after a fatal error of the HBA the port must be reset.
    transport_error_ =
        (causes & (PortInterrupts::fatal & ~PortInterrupts::tfes.mask)) != 0 || (causes & PortInterrupts::link) != 0;
    lost_ |= std::exchange(issued_, 0);
    if (transport_error_) {
        static_cast<void>(recovery_.begin_reset());
    } else {
        recovery_.begin_error(queued_ && lost_ != 0);
    }
    return step();
}

/// Advances the recovery. False: it is hopeless.
bool Transport::step() {
    const auto over = recovery_.step();
    if (!over) {
        return broken(over.error());
    }
    if (*over) {
        if (recovery_.exhausted()) {
            return broken({Code::io, "the disk fails every command in spite of resets"});
        }
        returned_ = std::exchange(lost_, 0);
        executor_.touch(*queue); // for commands that were not issued
    }
    return true;
}

/// The next command that was under way when the port was restarted.
[[gnu::noinline]] io::Completion Transport::give_back() {
    const u32 slot = static_cast<u32>(std::countr_zero(returned_));
    returned_ &= returned_ - 1;
    const u64 id = commands_->id_of(static_cast<u16>(slot));
    Command& command = (*commands_)[id];
    if (queued_ && !transport_error_) {
        if (const auto& failed = recovery_.failed(); failed && failed->tag == slot) {
            failed_ = TaskFile::from(static_cast<u32>(failed->error.raw << 8 | failed->status.raw));
            return judge(id, command);
        }
        command.wire.alone = !recovery_.failed();
        return {id, io::Status::io_error, io::Retry::later};
    }
    return transport_error_ && queued_ ? io::Completion{id, io::Status::io_error, io::Retry::later}
                                       : judge(id, command);
}

io::Completion Transport::judge(u64 id, const Command& command) {
    const ata::ErrorRegister error = failed_.error();
    report(command, failed_.status(), error);
    // ICRC is set together with ABRT [ACS §6.3]; ABRT alone is a refusal, which a retry would not change.
    const bool again = command.op != io::Op::flush && (transport_error_ || error.interface_crc());
    return {id, io::Status::io_error, again ? io::Retry::alone : io::Retry::none};
}

void Transport::report(const Command& command, ata::Status status, ata::ErrorRegister error) {
    if (reports_ >= max_reports || command.first == nullptr) {
        return;
    }
    FixedText<160> text;
    ata::describe(text, status, error, ata::BusMasterStatus{});
    log::warning("{}: {} of {} bytes at LBA {} failed: {}{}", command.disk().identity().name.view(), command.op,
                 command.bytes, command.lba, text, ++reports_ == max_reports ? " (further ones are not shown)" : "");
}

bool Transport::finish(Command& command, io::Status status) {
    if (command.op <= io::Op::write && command.wire.mapping.active()) [[unlikely]] {
        const DmaSpan data = status == io::Status::ok && command.first != nullptr ? command.data() : DmaSpan{};
        mapper_.unmap(command.wire.mapping, data.empty() ? std::span<const DmaSpan>() : std::span(&data, 1));
    }
    return true;
}

// ---- timeouts ----

Result<void> Transport::tick(Instant now, bool) {
    if (recovery_.in_progress()) {
        if (!step()) {
            return fault();
        }
    } else if (issued_ != 0 && now > issued_at_ && now - issued_at_ >= lost_after && !events_.pending()) {
        const u32 causes = port_.read<PortInterrupts>().raw;
        if ((causes & ~PortInterrupts::dps.mask & (PortInterrupts::ends | PortInterrupts::enabled)) == 0) {
            suspect_ = false;
        } else if (std::exchange(suspect_, true)) { // for a whole tick
            if (++lost_interrupts_ == 1) {
                log::warning("ahci: port {}: a command ended without an interrupt", port_.number());
            }
            suspect_ = false;
            forced_ = true; // the handler has not cleared it
            events_.force();
        }
    }
    return {};
}

io::Recovery Transport::recover(const Command& command, io::OldestWait::Finding, std::string_view) {
    if (done_ != 0 || returned_ != 0 || suspect_ || events_.pending() || recovery_.in_progress()) {
        return {.kind = io::Recovery::Kind::none};
    }
    log::warning("{}: no answer to a command, the port is reset", command.disk().identity().name.view());
    transport_error_ = true;
    if (!recovery_.begin_reset()) { // the commands are resent once the HBA has stopped
        lost_ |= std::exchange(issued_, 0);
        return {.kind = io::Recovery::Kind::none};
    }
    forget_commands();
    return {.kind = io::Recovery::Kind::stopped,
            .why = recovery_.exhausted()
                       ? std::optional(Error{Code::timed_out, "the disk gives no answer in spite of resets"})
                       : std::nullopt};
}

io::Fence Transport::fence(Command& command) {
    if (leaving_ && port_.stop(100)) {
        port_.write(interrupt_enable, 0);
        recovery_.abort();
        forget_commands();
        return io::Fence::stopped;
    }
    for (u32 left = unissued_; left != 0; left &= left - 1) { // not issued: it ends here
        const u32 slot = static_cast<u32>(std::countr_zero(left));
        if (&(*commands_)[commands_->id_of(static_cast<u16>(slot))] == &command) {
            unissued_ &= ~(u32{1} << slot);
            done_ |= u32{1} << slot;
            return io::Fence::done;
        }
    }
    return command.op <= io::Op::write && command.wire.mapping.active() ? io::Fence::effect : io::Fence::reachable;
}

} // namespace fl::drivers::ahci

namespace fl {
template class io::BlockQueue<drivers::ahci::Transport>;
template class io::QueueDisk<drivers::ahci::Transport>;
} // namespace fl
