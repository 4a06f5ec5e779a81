module drivers.pvscsi.recovery;
import core.std;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block_queue;
import io.executor;
import io.oldest_wait;

namespace fl::drivers::pvscsi {

io::Recovery Recovery::recover(const Oldest& oldest, io::OldestWait::Finding finding, std::string_view names) {
    Result<void> sent;
    if (finding == io::OldestWait::Finding::silent) {
        log::warning("{}: no answer within {} ms: RESET_BUS", names, timeout_ / 1'000'000);
        sent = adapter_.command(AdapterCommand::reset_bus);
    } else if (aborted_ != oldest.number) {
        log::warning("{}: no answer to a command, while others were answered: ABORT_CMD", names);
        aborted_ = oldest.number;
        aborted_context_ = oldest.context;
        abort_bound_.emplace(executor_, timeout_);
        if (adapter_.command(AdapterCommand::abort_cmd,
                             AbortCommand{.context = aborted_context_, .target = oldest.target})) {
            return {.kind = io::Recovery::Kind::none};
        }
        sent = adapter_.command(AdapterCommand::reset_device, ResetDevice{.target = oldest.target});
    } else if (!abort_bound_->passed()) {
        return {.kind = io::Recovery::Kind::none};
    } else {
        log::warning("{}: the command was not aborted: RESET_DEVICE", names);
        sent = adapter_.command(AdapterCommand::reset_device, ResetDevice{.target = oldest.target});
    }
    return sent ? io::Recovery{.kind = io::Recovery::Kind::reset_requested}
                : io::Recovery{.kind = io::Recovery::Kind::close, .why = sent.error()};
}

Result<void> Recovery::check() {
    if (!std::exchange(alive_, false) && adapter_.absent()) {
        removed_.store(true, std::memory_order_relaxed);
        return Error{Code::device_gone, "the adapter was removed: its registers read as all ones"};
    }
    return {};
}

io::Fence Recovery::fence() {
    if (leaving_) {
        reset();
    }
    return stopped_ ? io::Fence::stopped : io::Fence::reachable;
}

void Recovery::reset() {
    if (!std::exchange(reset_, true)) {
        adapter_.disable_interrupts();
        stopped_ = adapter_.command(AdapterCommand::adapter_reset).has_value() || removed();
    }
}

} // namespace fl::drivers::pvscsi
