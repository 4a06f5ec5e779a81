module;
#include "core/try.hpp"
module drivers.ahci.errors;
import core.std;
import core.log;
import core.result;
import core.text;
import io.block;
import io.block_queue;

namespace fl::drivers::ahci {

Result<bool> Errors::examine(u32 causes) {
    const u32 seen = port_.read<PortInterrupts>().raw;
    if (seen == ~u32{0}) {
        return Error{Code::device_gone, "all registers read as ones: the HBA was removed"};
    }
    causes |= seen;
    failed_ = port_.read<TaskFile>();
    if ((causes & (PortInterrupts::fatal | PortInterrupts::link)) == 0) {
        hba_.look_at_others(port_);
        return false;
    }
    // After a change of the link it may be another disk, and after a fatal error of the HBA the port must be reset.
    const bool link = (causes & PortInterrupts::link) != 0;
    transport_ = link || (causes & PortInterrupts::fatal & ~PortInterrupts::tfes.mask) != 0;
    const bool any = slots_.lose();
    if (transport_) {
        static_cast<void>(recovery_.begin_reset(link));
    } else {
        recovery_.begin_error(slots_.queued() && any);
    }
    return step(0);
}

Result<bool> Errors::step(u32 causes) {
    TRY(const bool over, recovery_.step(causes));
    if (over) {
        if (recovery_.exhausted()) {
            return Error{Code::io, "the disk fails every command in spite of resets"};
        }
        slots_.give_back();
    }
    return over;
}

io::Recovery Errors::reset() {
    transport_ = true;
    if (!recovery_.begin_reset()) { // the commands are resent once the HBA has stopped
        slots_.lose();
        return {.kind = io::Recovery::Kind::none, .expired = true};
    }
    slots_.forget();
    return {.kind = io::Recovery::Kind::stopped,
            .why = recovery_.exhausted()
                       ? std::optional(Error{Code::timed_out, "the disk gives no answer in spite of resets"})
                       : std::nullopt};
}

io::Completion Errors::judge(u64 id, u32 slot, const io::QueuedCommand& command, Wire& wire) {
    if (command.expired) {
        return {id, io::Status::timed_out, io::Retry::none};
    }
    if (!slots_.queued()) {
        return judge(id, command);
    }
    if (transport_) {
        return {id, io::Status::io_error, io::Retry::later};
    }
    if (const auto& failed = recovery_.failed(); failed && failed->tag == slot) {
        failed_ = TaskFile::from(static_cast<u32>(failed->error.raw << 8 | failed->status.raw));
        return judge(id, command);
    }
    wire.alone = !recovery_.failed();
    return {id, io::Status::io_error, io::Retry::later};
}

io::Completion Errors::judge(u64 id, const io::QueuedCommand& command) {
    const ata::ErrorRegister error = failed_.error();
    report(command, failed_.status(), error);
    // ICRC is set together with ABRT [ACS §6.3]; ABRT alone is a refusal, which a retry would not change.
    const bool again = command.op != io::Op::flush && (transport_ || error.interface_crc());
    return {id, io::Status::io_error, again ? io::Retry::alone : io::Retry::none};
}

void Errors::report(const io::QueuedCommand& command, ata::Status status, ata::ErrorRegister error) {
    if (reports_ >= max_reports || command.first == nullptr) {
        return;
    }
    FixedText<160> text;
    ata::describe(text, status, error, ata::BusMasterStatus{});
    log::warning("{}: {} of {} bytes at LBA {} failed: {}{}", command.device->identity().name.view(), command.op,
                 command.bytes, command.lba, text, ++reports_ == max_reports ? " (further ones are not shown)" : "");
}

void Errors::check_length(const PortMemory& memory, u32 slot, const io::QueuedCommand& command,
                          io::Completion& completion) const {
    const u32 bytes = memory.header(slot).transferred;
    if (command.op == io::Op::read && bytes < command.bytes) {
        log::warning("{}: a read ended after {} of {} bytes", command.device->identity().name.view(), bytes,
                     command.bytes);
        completion.status = io::Status::io_error;
        completion.retry = io::Retry::alone;
    }
}

} // namespace fl::drivers::ahci
