module;
#include "core/try.hpp"
module drivers.pvscsi.disk;
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
import io.ring;

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
    const io::MappedMemory rings(memory.rings.data, memory.rings.size);
    const io::FreeRunning<u32> positions(Memory::entries);
    TRY(requests_, decltype(requests_)::value_type::create(rings,
                                                           {.index = RingsState::request_producer,
                                                            .consumed = RingsState::request_consumer,
                                                            .entries = Memory::requests_at,
                                                            .stride = RequestDescriptor::stride},
                                                           positions, {{}, options.threshold}));
    TRY(completions_, decltype(completions_)::value_type::create(rings,
                                                                 {.index = RingsState::completion_producer,
                                                                  .consumed = RingsState::completion_consumer,
                                                                  .entries = Memory::completions_at,
                                                                  .stride = sizeof(CompletionDescriptor)},
                                                                 positions));
    TRY(messages_, decltype(messages_)::value_type::create(rings,
                                                           {.index = RingsState::message_producer,
                                                            .consumed = RingsState::message_consumer,
                                                            .entries = Memory::messages_at,
                                                            .stride = sizeof(MessageDescriptor)},
                                                           io::FreeRunning<u32>(Memory::message_entries)));
    live_.store(true, std::memory_order_release); // orders the above; pairs with the acquire in on_interrupt()
    return {};
}

// An adapter completes a command after it has taken its descriptor: so there is room for every command of the table.
io::Fit Transport::prepare(Command& command) { return command.disk().commands_.limit(command); }

// Buffers are contiguous. One that crosses a multiple of the longest element's size is described by a list.
[[gnu::always_inline]] inline void Transport::describe_data(RequestDescriptor& request, DmaSpan data,
                                                            DmaSpan area) const {
    request.data_length = data.size;
    request.data_address = data.bus;
    u64 next = (data.bus | (sg_element_bytes - 1)) + 1;
    const u64 end = data.bus + data.size;
    if (next >= end) {
        return;
    }
    request.data_address = area.bus + Memory::list_at;
    request.flags |= flag_sg_list;
    std::byte* to = area.data + Memory::list_at;
    for (u64 at = data.bus; at < end; at = next, next = std::min(next + sg_element_bytes, end)) {
        const SgElement element{.address = at, .length = static_cast<u32>(std::min(next, end) - at)};
        std::memcpy(to, &element, sizeof element);
        to += sizeof element;
    }
}

io::SendResult Transport::send(Command& command, u64 id) {
    const u16 slot = io::SlotIndex::slot_of(id);
    const DmaSpan area = memory_.area(slot);
    command.wire.context = (slot + 1u) | static_cast<u32>(id >> 16 << 16);
    RequestDescriptor request{.context = command.wire.context,
                              .sense_address = area.bus,
                              .sense_length = Memory::sense_bytes,
                              .tag = simple_queue_tag,
                              .vcpu_hint = static_cast<u8>(executor_.processor())};
    Address unit;
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        unit = exchange.unit;
        request.cdb = exchange.cdb.bytes;
        request.cdb_length = exchange.cdb.length;
        request.flags = exchange.data.empty() ? flag_dir_none : flag_dir_to_host;
        command.bytes = exchange.data.size;
        describe_data(request, exchange.data, area);
        other_ = true;
    } else {
        const Disk& disk = command.disk();
        unit = disk.unit_;
        if (command.op <= io::Op::write) [[likely]] {
            request.cdb_length = disk.commands_.build_io(request.cdb, command, command.wire.form);
            request.flags = command.op == io::Op::write ? flag_dir_to_device : flag_dir_to_host;
            describe_data(request, command.data(), area);
        } else {
            request.cdb_length = disk.commands_.build_other(request.cdb, command, command.wire.form);
            request.data_length = disk.commands_.parameter_bytes(command.op);
            request.flags = request.data_length == 0 ? flag_dir_none : flag_dir_to_device;
            if (command.op == io::Op::write_zeroes) {
                request.data_address = memory_.rings.bus + Memory::zeros_at;
            } else if (command.op == io::Op::discard) {
                request.data_address = area.bus + Memory::unmap_at;
                disk.commands_.build_unmap_list(
                    std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(area.data + Memory::unmap_at),
                                                          scsi::unmap_list_bytes),
                    command);
            }
            other_ = true;
        }
    }
    request.target = unit.target;
    request.lun[1] = unit.lun;
    area.data[0] = std::byte{}; // no sense data yet
    return requests_->produce(request) ? io::SendResult::sent : io::SendResult::full;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (requests_->unpublished() != 0) {
        const bool rw_only = !std::exchange(other_, false);
        withheld_ = !requests_->publish() && rw_only;
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
    const auto found = completions_->available(requests_->owed());
    if (!found) [[unlikely]] {
        return broken(found.error());
    }
    if (*found == 0) {
        if (options_.messages && std::exchange(looked_, events()) != events()) {
            if (const auto taken = take_messages(); !taken) [[unlikely]] {
                return broken(taken.error());
            }
        }
        return io::Next::none;
    }
    CompletionDescriptor answer;
    static_cast<void>(completions_->take(answer)); // the only read of it
    static_cast<void>(requests_->retire(1));       // at most `owed`
    alive_ = true;
    const u64 slot = (answer.context & 0xffff) - 1;
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
    command.expired = command.expired || command.wire.context == aborted_context_;
    Disk& disk = command.disk();
    const scsi::Verdict verdict = disk.commands_.judge(command, command.wire.form, response, disk.identity().name);
    if (verdict.rescan) {
        request_scan(disk.unit_.target);
    }
    return {id, verdict.status, verdict.retry};
}

Result<void> Transport::take_messages() {
    CHECK(messages_->available());
    for (MessageDescriptor message; messages_->take(message);) {
        if (message.bus == 0 && message.target < max_targets && message.type <= MessageType::device_removed) {
            request_scan(message.target);
        } else {
            log::warning("pvscsi: a message of type {} for bus {}, target {}: ignored", to_underlying(message.type),
                         message.bus, message.target);
        }
    }
    messages_->release();
    return {};
}

void Transport::request_scan(u32 target) {
    changed_[target] = true;
    options_.notify(options_.context);
}

std::optional<u8> Transport::take_changed() {
    const auto found = std::ranges::find(changed_, true);
    if (found == changed_.end()) {
        return std::nullopt;
    }
    *found = false;
    return static_cast<u8>(found - changed_.begin());
}

// ---- recovery ----

Result<void> Transport::tick(Instant, bool) {
    if (std::exchange(withheld_, false)) { // nothing depends on the adapter's threshold
        adapter_.kick(true);
    }
    if (!std::exchange(alive_, false) && adapter_.absent()) {
        removed_.store(true, std::memory_order_relaxed);
        return Error{Code::device_gone, "the adapter was removed: its registers read as all ones"};
    }
    return {};
}

io::Recovery Transport::recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names) {
    const u32 target = oldest.disk().unit().target;
    Result<void> sent;
    if (finding == io::OldestWait::Finding::silent) {
        log::warning("{}: no answer within {} ms: RESET_BUS", names, options_.timeout / 1'000'000);
        sent = adapter_.command(AdapterCommand::reset_bus);
    } else if (aborted_ != oldest.number) {
        log::warning("{}: no answer to a command, while others were answered: ABORT_CMD", names);
        aborted_ = oldest.number;
        aborted_context_ = oldest.wire.context;
        abort_bound_.emplace(executor_, options_.timeout);
        if (adapter_.command(AdapterCommand::abort_cmd, AbortCommand{.context = aborted_context_, .target = target})) {
            return {.kind = io::Recovery::Kind::none};
        }
        sent = adapter_.command(AdapterCommand::reset_device, ResetDevice{.target = target});
    } else if (!abort_bound_->passed()) {
        return {.kind = io::Recovery::Kind::none};
    } else {
        log::warning("{}: the command was not aborted: RESET_DEVICE", names);
        sent = adapter_.command(AdapterCommand::reset_device, ResetDevice{.target = target});
    }
    return sent ? io::Recovery{.kind = io::Recovery::Kind::reset_requested}
                : io::Recovery{.kind = io::Recovery::Kind::close, .why = sent.error()};
}

std::optional<Error> Transport::reset_ineffective(bool) {
    return Error{Code::timed_out, "a command was not answered, not even by a reset: the adapter is reset and not used"};
}

io::Fence Transport::fence(Command&) {
    if (leaving_) {
        reset();
    }
    return stopped_ ? io::Fence::stopped : io::Fence::reachable;
}

void Transport::reset() {
    if (!std::exchange(reset_, true)) {
        adapter_.disable_interrupts();
        stopped_ = adapter_.command(AdapterCommand::adapter_reset).has_value() || removed();
    }
}

void Transport::closed(bool stopped) {
    reset();
    live_.store(false, std::memory_order_release); // orders all of the above; see on_interrupt()
    if (!stopped) {
        options_.notify(options_.context);
    }
}

} // namespace fl::drivers::pvscsi

namespace fl {
template class io::BlockQueue<drivers::pvscsi::Transport>;
template class io::QueueDisk<drivers::pvscsi::Transport>;
} // namespace fl
