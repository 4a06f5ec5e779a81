module drivers.ahci.queue;
import core.std;
import core.result;
import core.log;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;

namespace fl::drivers::ahci {

void Transport::open(PortDisk& disk, const Terms& terms) {
    disk_ = &disk;
    encoder_.open(terms);
    recovery_.open(terms);
    // Not PxSERR: if the link has changed since the disk was identified, that interrupts now.
    port_.write(PortInterrupts::offset, ~u32{0});
    port_.clear_pending(port_.bit());
    port_.write(interrupt_enable, PortInterrupts::enabled);
    charged_accesses_ = port_.accesses();
    leaving_ = false;
    slots_.forget();
}

// ---- sending ----

io::Fit Transport::prepare(Command& command) {
    command.wire.alone = false;
    // The lowest slots are used first, so that with at most depth() of them in use all are below it.
    if (!has_room(command) || commands_->size() > encoder_.depth()) {
        return io::Fit::full;
    }
    return encoder_.fit(command, command.wire);
}

io::SendResult Transport::send(Command& command, u64 id) {
    if (!has_room(command)) [[unlikely]] { // a resend
        return io::SendResult::full;
    }
    const u32 slot = io::SlotIndex::slot_of(id);
    encoder_.encode(slot, command, command.wire);
    slots_.add(slot, encoder_.queued(command, command.wire));
    return io::SendResult::sent;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (slots_.unissued() == 0 || recovery_.in_progress()) {
        return {};
    }
    slots_.issue();
    lost_.issued(executor_.turn_time());
    ++counters.notifications;
    return {};
}

void Transport::settle(io::Counters& counters) {
    counters.device_accesses += port_.accesses() - charged_accesses_ + hba_.take_accesses();
    charged_accesses_ = port_.accesses();
}

// ---- answers ----

io::Next Transport::next(io::Completion& completion) {
    if (!slots_.any_done()) {
        if (slots_.any_returned()) [[unlikely]] {
            const u32 slot = slots_.next_returned();
            const u64 id = commands_->id_of(static_cast<u16>(slot));
            Command& command = (*commands_)[id];
            completion = errors_.judge(id, slot, command, command.wire);
            return io::Next::one;
        }
        if (fault_) [[unlikely]] {
            return io::Next::broken;
        }
        if (!events_.take() && !polling_.found()) {
            return io::Next::none;
        }
        if (!slots_.any_done() && !collect()) [[unlikely]] {
            return io::Next::broken;
        }
        if (!slots_.any_done()) [[unlikely]] {
            return slots_.any_returned() ? next(completion) : io::Next::none;
        }
    }
    const u32 slot = slots_.next_done();
    completion.id = commands_->id_of(static_cast<u16>(slot));
    if (!slots_.queued()) [[unlikely]] {
        errors_.check_length(memory_, slot, (*commands_)[completion.id], completion);
    }
    return io::Next::one;
}

/// After an interrupt: finds what has ended. False: the port is broken.
bool Transport::collect() {
    const u32 causes = events_.take_causes();
    if (recovery_.in_progress()) [[unlikely]] {
        // clears the interrupt when the cause is gone: doing so now would raise it again at once
        return attend(errors_.step(causes));
    }
    if (hba_.alone() || lost_.take()) [[likely]] {
        port_.write(PortInterrupts::offset, PortInterrupts::ends);
        port_.clear_pending(port_.bit());
    }
    const auto ended = slots_.find_ended();
    if (!ended) [[unlikely]] {
        return attend(ended.error());
    }
    slots_.end(*ended);
    if (*ended == 0 || (causes & (PortInterrupts::fatal | PortInterrupts::link)) != 0) [[unlikely]] {
        return attend(errors_.examine(causes));
    }
    recovery_.succeeded();
    return true;
}

/// What a step of the recovery has led to. False: the port is broken.
[[gnu::noinline]] bool Transport::attend(const Result<bool>& recovered) {
    if (!recovered) {
        if (recovered.error().code == Code::device_gone) {
            disk_->remove();
        }
        return broken(recovered.error());
    }
    if (*recovered) {
        executor_.touch(*queue); // for commands that were not issued
    }
    return true;
}

// ---- timeouts ----

Result<void> Transport::tick(Instant now, bool) {
    if (recovery_.in_progress()) {
        if (!attend(errors_.step(0))) {
            return fault();
        }
    } else if (slots_.issued() != 0 && !events_.pending() && !polling_.on() && lost_.check(port_, now)) {
        events_.force();
    }
    return {};
}

io::Recovery Transport::recover(const Command& command, io::OldestWait::Finding, std::string_view) {
    if (slots_.any_done() || slots_.any_returned() || lost_.suspect() || events_.pending() || recovery_.in_progress()) {
        return {.kind = io::Recovery::Kind::none};
    }
    log::warning("{}: no answer to a command, the port is reset", command.disk().identity().name.view());
    return errors_.reset();
}

io::Fence Transport::fence(Command& command) {
    if (leaving_ && port_.stop(100)) {
        port_.write(interrupt_enable, 0);
        recovery_.abort();
        slots_.forget();
        return io::Fence::stopped;
    }
    if (slots_.withdraw(static_cast<u32>(&command - commands_->entries()))) {
        return io::Fence::done;
    }
    return encoder_.bounced(command, command.wire) ? io::Fence::effect : io::Fence::reachable;
}

} // namespace fl::drivers::ahci

namespace fl {
template class io::BlockQueue<drivers::ahci::Transport>;
template class io::QueueDisk<drivers::ahci::Transport>;
} // namespace fl
