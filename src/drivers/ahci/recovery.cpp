module;
#include "core/try.hpp"
module drivers.ahci.recovery;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.time;

namespace fl::drivers::ahci {

Result<bool> Recovery::step(u32 causes) {
    if (sent()) { // before the rest: `causes` are not of a command that is sent now
        CHECK(check_sent(causes));
    }
    if (state_ == State::stopping && port_.stopped()) {
        stopped();
    }
    if (state_ == State::reset && executor_.now() - since_ >= hold) {
        port_.comreset(false);
        enter(State::released);
    }
    if (state_ == State::released && port_.established()) {
        enter(State::linked);
    }
    if (state_ == State::linked) {
        port_.command(false);             // lets the HBA store the first FIS of the device
        port_.write(sata_error, ~u32{0}); // DIAG.X: the HBA takes it [ahci-1.3.1 §10.4.2]
        if (const ata::Status status = port_.read<TaskFile>().status(); !status.in_progress()) {
            start();
        }
    }
    if (state_ == State::none) {
        return std::exchange(over_, false);
    }
    const Nanoseconds bound = state_ == State::stopping   ? stop_bound
                              : state_ == State::released ? link_bound
                                                          : timeout_;
    if (executor_.now() >= executor_.end_of_bound(since_, bound)) {
        return overdue();
    }
    return false;
}

void Recovery::begin() {
    failed_.reset();
    over_ = false;
    enter(State::stopping);
    if (port_.stop()) {
        stopped();
    }
}

void Recovery::stopped() {
    // A change of the link stays in PxSERR, and so in PxIS, until start() clears it.
    link_ = link_ || (port_.read<PortInterrupts>().raw & PortInterrupts::link) != 0;
    if (!reset_ && !link_ && !port_.read<TaskFile>().status().in_progress()) {
        return start();
    }
    in_a_row_ += reset_ || link_ ? 0 : 1;
    reset_ = true;
    read_log_ = false;
    ++resets_;
    port_.write(interrupt_enable, 0); // the reset changes the link: no news, and cleared by start()
    port_.comreset(true);
    enter(State::reset);
}

void Recovery::start() {
    port_.clear_errors();
    port_.clear_pending(port_.bit());
    port_.write(interrupt_enable, PortInterrupts::enabled);
    memory_.forget(ReceivedFis::bits_at);
    memory_.forget(ReceivedFis::register_at);
    port_.command(true);
    if (reset_) {
        send(State::identifying, plain_fis(Opcode::identify_device), true);
    } else if (read_log_) {
        send(State::reading_log, error_log_fis(), true);
    } else {
        end();
    }
}

/// Issues a command of this in slot 0. `reads`: 512 bytes, to block 0.
void Recovery::send(State state, const CommandFis& fis, bool reads) {
    const DmaSpan page = memory_.block(0);
    memory_.encode(0, PortMemory::own, fis, false, reads ? std::span(&page, 1) : std::span<const DmaSpan>());
    port_.write(command_issue, 1);
    enter(state);
}

Result<void> Recovery::check_sent(u32 causes) {
    const u32 seen = port_.read<PortInterrupts>().raw;
    if (seen == ~u32{0}) {
        return Error{Code::device_gone, "all registers read as ones: the HBA was removed"};
    }
    if ((seen & PortInterrupts::link) != 0) {
        link_ = true;
        return again();
    }
    if (((seen | causes) & PortInterrupts::fatal) != 0) {
        return again(); // without the log only a reset makes the device accept other commands [sata]
    }
    if ((port_.read(command_issue) & 1) != 0) {
        return {};
    }
    port_.write(PortInterrupts::offset, PortInterrupts::ends);
    port_.clear_pending(port_.bit());
    return answered();
}

Result<void> Recovery::answered() {
    if (state_ == State::reading_log) {
        // Before the log the device ends all tags by a Set Device Bits FIS [sata]: no answer to those that are sent
        // from now on.
        memory_.forget(ReceivedFis::bits_at);
        std::array<u8, 512> page;
        std::memcpy(page.data(), memory_.block(0).data, page.size());
        failed_ = decode_error_log(page);
    } else if (state_ == State::identifying) {
        CHECK(check_identity());
        if (write_through_) {
            send(State::setting, no_write_cache_fis(), false);
            return {};
        }
    }
    end();
    return {};
}

Result<void> Recovery::check_identity() {
    ata::IdentifyData data;
    if (memory_.header(0).transferred != sizeof data) {
        return Error{Code::protocol, "IDENTIFY DEVICE ended before all of its data (PRDBC)", sizeof data,
                     memory_.header(0).transferred};
    }
    std::memcpy(data.words.data(), memory_.block(0).data, sizeof data);
    const ata::DeviceIdentity now(data);
    // Without a serial number nothing shows that the disk was not replaced while the link was down.
    if (link_ ? identity_.same(now) : identity_.words == now.words) {
        link_ = false;
        return {};
    }
    log::warning("ahci: port {}: expected {} after a change of the link, seen {}", port_.number(), shown(identity_),
                 shown(now));
    return Error{Code::device_gone, "the disk that answers after a reset of the link is not known to be the same one"};
}

/// A command of this has failed: another reset, if that has a point.
Result<void> Recovery::again() {
    if (exhausted()) {
        return Error{Code::io, "the disk fails the commands that follow a reset (IDENTIFY DEVICE, SET FEATURES)"};
    }
    static_cast<void>(begin_reset(link_));
    return {};
}

Result<bool> Recovery::overdue() {
    if (sent()) {
        CHECK(again());
        return false;
    }
    if (state_ == State::stopping) {
        return Error{Code::timed_out, "the HBA does not stop the port's command list (PxCMD.CR)"};
    }
    if (!port_.established()) {
        return Error{Code::device_gone, "the link to the disk is down (PhyRdy): it was unplugged or has failed"};
    }
    return Error{Code::timed_out, "the disk is not ready after a reset of the port (COMRESET)"};
}

} // namespace fl::drivers::ahci
