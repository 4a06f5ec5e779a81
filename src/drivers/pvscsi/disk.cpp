module;
#include "core/try.hpp"
module drivers.pvscsi.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import io.ring.memory;

namespace fl::drivers::pvscsi {

Disk::Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity)
    : QueueDisk(queue.executor(), queue), owner_(queue), unit_(unit), commands_(unit, geometry) {
    identity_ = identity;
    set_geometry(geometry);
    set_timeout(queue.timeout());
    queue.add(*this);
}

// ---- sending ----

Result<void> Transport::start(const Memory& memory, const Options& options) {
    memory_ = memory;
    options_ = options;
    recovery_.start(options.timeout);
    targets_.start(options.notify, options.context);
    CHECK(rings_.start(memory, options.threshold));
    live_.store(true, std::memory_order_release); // orders the above; pairs with the acquire in on_interrupt()
    return {};
}

// An adapter completes a command after it has taken its descriptor: so there is room for every command of the table.
io::Fit Transport::prepare(Command& command) { return command.disk().commands_.limit(command); }

io::SendResult Transport::send(Command& command, u64 id) {
    const DmaSpan area = memory_.area(io::SlotIndex::slot_of(id));
    const auto* exchange = static_cast<const Exchange*>(command.exchange);
    command.wire.context = context_of(id);
    RequestDescriptor request = request_to(exchange == nullptr ? Address(command.disk().unit_) : exchange->unit,
                                           command.wire.context, area, executor_.processor());
    if (exchange != nullptr) [[unlikely]] {
        command.bytes = exchange->data.size;
        describe(request, *exchange, area);
        other_ = true;
    } else if (command.op <= io::Op::write) [[likely]] {
        describe_io(request, command.disk().commands_, command, command.wire.form, area);
    } else {
        describe_other(request, command.disk().commands_, command, command.wire.form, area,
                       memory_.rings.bus + Memory::zeros_at);
        other_ = true;
    }
    return rings_.produce(request) ? io::SendResult::sent : io::SendResult::full;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (rings_.unpublished()) {
        const bool rw_only = !std::exchange(other_, false);
        withheld_ = !rings_.publish() && rw_only;
        if (!withheld_) {
            adapter_.kick(rw_only);
            ++counters.notifications;
        }
    }
    return {};
}

// ---- completions ----

void Transport::on_interrupt(void* self) {
    auto& t = *static_cast<Transport*>(self);
    if (t.live_.load(std::memory_order_acquire) && (!t.options_.line || t.adapter_.acknowledge())) {
        t.interrupts_.store(t.interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        t.executor_.raise(*t.queue);
    }
}

io::Next Transport::next(io::Completion& completion) {
    CompletionDescriptor answer;
    const auto found = rings_.take(answer);
    if (!found) [[unlikely]] {
        return broken(found.error());
    }
    if (!*found) {
        if (options_.messages && std::exchange(looked_, events()) != events()) {
            const auto taken = rings_.take_messages([&](const MessageDescriptor& m) { targets_.accept(m); });
            if (!taken) [[unlikely]] {
                return broken(taken.error());
            }
        }
        return io::Next::none;
    }
    recovery_.answered();
    const u64 slot = slot_of(answer.context);
    Command* command = commands_->find_slot(slot);
    if (command == nullptr || command->delayed || command->wire.context != answer.context) [[unlikely]] {
        return broken({Code::protocol, "a completion carries a context that is not in flight (unknown or repeated)", 0,
                       answer.context});
    }
    completion.id = commands_->id_of(static_cast<u16>(slot));
    const u32 requested =
        command->op <= io::Op::write ? command->bytes : command->disk().commands_.parameter_bytes(command->op);
    if (answer.data_length > requested || answer.sense_length > Memory::sense_bytes) [[unlikely]] {
        return broken({Code::protocol, "a completion reports more data, or more sense data, than was requested",
                       requested, answer.data_length});
    }
    const bool good = answer.host_status == 0 && answer.scsi_status == scsi::status_good;
    if (good && command->exchange == nullptr && moved_of(answer, requested) == requested) [[likely]] {
        return io::Next::one;
    }
    completion = judge(completion.id, *command, answer, response_of(answer, requested));
    return io::Next::one;
}

io::Completion Transport::judge(u64 id, Command& command, const CompletionDescriptor& answer, scsi::Response response) {
    std::array<u8, Memory::sense_bytes> sense;
    const DmaSpan area = memory_.area(io::SlotIndex::slot_of(id));
    io::MappedMemory(area.data, area.size).copy_out(0, reinterpret_cast<std::byte*>(sense.data()), sense.size());
    response.sense = scsi::parse_sense(std::span(sense).first(answer.sense_length));
    if (command.exchange != nullptr) {
        static_cast<Exchange*>(command.exchange)->response = response;
        return {id};
    }
    if (command.first == nullptr) { // a late answer: the request has already ended
        return {id};
    }
    command.expired = command.expired || recovery_.aborted(command.wire.context);
    Disk& disk = command.disk();
    const scsi::Verdict verdict = disk.commands_.judge(command, command.wire.form, response, disk.identity().name);
    if (verdict.rescan) {
        targets_.set(disk.unit_.target);
    }
    return {id, verdict.status, verdict.retry};
}

// ---- recovery ----

Result<void> Transport::tick(Instant, bool) {
    if (std::exchange(withheld_, false)) { // nothing depends on the adapter's threshold
        adapter_.kick(true);
    }
    return recovery_.check();
}

io::Recovery Transport::recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names) {
    return recovery_.recover({oldest.number, oldest.wire.context, oldest.disk().unit().target}, finding, names);
}

std::optional<Error> Transport::reset_ineffective(bool) {
    return Error{Code::timed_out, "a command was not answered, not even by a reset: the adapter is reset and not used"};
}

void Transport::closed(bool stopped) {
    recovery_.reset();
    live_.store(false, std::memory_order_release); // orders all of the above; see on_interrupt()
    if (!stopped) {
        targets_.notify();
    }
}

} // namespace fl::drivers::pvscsi

namespace fl {
template class io::BlockQueue<drivers::pvscsi::Transport>;
template class io::QueueDisk<drivers::pvscsi::Transport>;
} // namespace fl
