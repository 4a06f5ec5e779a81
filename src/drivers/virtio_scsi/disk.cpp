module;
#include "core/try.hpp"
#include <cstddef>
module drivers.virtio_scsi.disk;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import io.event_pacing;
import io.executor;
import io.oldest_wait;
import io.ring.any;
import drivers.virtio.device;

namespace fl::drivers::virtio_scsi {

// ---- sending ----

// A request is a chain of descriptors, or one descriptor of an indirect table. A chain costs the device less, as long
// as there are enough descriptors for all commands that may still come.
io::Fit Transport::prepare(Command& command) {
    const u32 held = static_cast<u32>(commands_->size()); // this command is already counted
    if (held > terms_.max_commands) {
        return io::Fit::full;
    }
    if (const io::Fit fit = command.disk().commands_.limit(command); fit != io::Fit::ok) [[unlikely]] {
        return fit;
    }
    const u32 elements = command.op == io::Op::flush ? 2 : 3;
    const u32 room = ring_->free();
    command.wire.indirect = terms_.indirect && room < elements + (max_commands - held);
    return room < (command.wire.indirect ? 1 : elements) ? io::Fit::full : io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    const u16 slot = io::SlotIndex::slot_of(id);
    const u32 at = slot * static_cast<u32>(sizeof(Area));
    auto& area = *reinterpret_cast<Area*>(areas_.data + at);
    const u64 bus = areas_.bus + at;
    std::array<io::BufferElement, max_elements> elements;
    u32 count = 0;
    elements[count++] = {bus + offsetof(Area, header), header_bytes(terms_.cdb_bytes), false};
    const io::BufferElement answer{bus + offsetof(Area, response), response_bytes(terms_.sense_bytes), true};
    area.header = {.id = id};
    area.response.sense_length = 0;
    area.response.residual = 0;
    area.response.response = response_unwritten;
    const auto cdb = std::span(area.header.cdb).first<scsi::cdb_bytes>();
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        command.wire.indirect = false;
        area.header.lun = exchange.lun;
        std::ranges::copy(exchange.cdb.bytes, cdb.begin());
        elements[count++] = answer;
        if (!exchange.data.empty()) {
            elements[count++] = {exchange.data.bus, exchange.data.size, true};
        }
    } else {
        const Disk& disk = command.disk();
        area.header.lun = disk.address_;
        if (command.op <= io::Op::write) [[likely]] {
            disk.commands_.build_io(cdb, command, command.wire);
            const DmaSpan data = command.data();
            const bool is_read = command.op == io::Op::read;
            elements[count++] = is_read ? answer : io::BufferElement{data.bus, data.size, false};
            elements[count++] = is_read ? io::BufferElement{data.bus, data.size, true} : answer;
        } else {
            disk.commands_.build_other(cdb, command, command.wire);
            if (command.op == io::Op::discard) {
                disk.commands_.build_unmap_list(area.unmap, command);
                elements[count++] = {bus + offsetof(Area, unmap), scsi::unmap_list_bytes, false};
            } else if (command.op == io::Op::write_zeroes) {
                elements[count++] = {areas_.bus + zeros_at, disk.commands_.parameter_bytes(command.op), false};
            }
            elements[count++] = answer;
        }
        pacing_.sent(command.offset == 0);
    }
    const std::span<const io::BufferElement> all(elements.data(), count);
    const io::MappedMemory table(area.indirect.data(), area.indirect.size());
    const auto added = command.wire.indirect ? ring_->add_indirect(slot, all, table, bus + offsetof(Area, indirect))
                                             : ring_->add(slot, all);
    if (!added) [[unlikely]] {
        if (added.error().code == Code::exhausted) {
            return io::SendResult::full;
        }
        fault_ = added.error();
        return io::SendResult::broken;
    }
    return io::SendResult::sent;
}

Result<void> Transport::publish(io::Counters& counters) {
    if (ring_->publish()) {
        ++counters.notifications;
        ++counters.device_accesses;
        notifier_.notify();
    }
    return {};
}

// ---- answers ----

io::Next Transport::next(io::Completion& completion) {
    const auto used = ring_->take();
    if (!used) [[unlikely]] {
        return broken(used.error());
    }
    if (!*used) {
        return io::Next::none;
    }
    if (!batch_) {
        batch_ = true;
        ring_->disarm(); // polled while there is work
        pacing_.arrived(executor_.turn_time());
    }
    const u16 slot = (*used)->slot; // one of ours, checked by the ring
    const u32 at = slot * static_cast<u32>(sizeof(Area)) + static_cast<u32>(offsetof(Area, response));
    const io::MappedMemory memory(areas_.data, areas_.size);
    completion.id = commands_->id_of(slot);
    const u8 response = memory.load_relaxed<u8>(at + offsetof(RequestResponse, response));
    const u8 status = memory.load_relaxed<u8>(at + offsetof(RequestResponse, status));
    const u32 residual = memory.load_relaxed<u32>(at + offsetof(RequestResponse, residual));
    Command& command = (*commands_)[completion.id];
    if (response == to_underlying(ResponseCode::ok) && status == scsi::status_good && residual == 0 &&
        command.exchange == nullptr) [[likely]] {
        return io::Next::one;
    }
    return judge(command, at, completion);
}

io::Next Transport::judge(Command& command, u32 at, io::Completion& completion) {
    RequestResponse answer; // a copy: the device may still write
    io::MappedMemory(areas_.data, areas_.size)
        .copy_out(at, reinterpret_cast<std::byte*>(&answer), response_bytes(terms_.sense_bytes));
    const auto service = service_of(answer.response);
    if (!service) {
        return broken({Code::protocol,
                       "a SCSI request was returned with a response that is not defined (0xff: with none)",
                       to_underlying(ResponseCode::incorrect_lun), answer.response});
    }
    auto* exchange = static_cast<Exchange*>(command.exchange);
    const u32 bytes = exchange != nullptr           ? exchange->data.size
                      : command.op <= io::Op::write ? command.bytes
                                                    : command.disk().commands_.parameter_bytes(command.op);
    scsi::Response response{
        .service = *service,
        .status = answer.status,
        .moved = 0,
        .sense = {},
        .transport = {"virtio-scsi response", name(static_cast<ResponseCode>(answer.response)), answer.response}};
    if (*service == scsi::ServiceResponse::command_complete) { // otherwise the other fields are not defined
        if (answer.residual > bytes) {
            return broken({Code::protocol, "a SCSI request was returned with more residual data than it has", bytes,
                           answer.residual});
        }
        if (answer.sense_length > terms_.sense_bytes) {
            return broken({Code::protocol, "a SCSI request was returned with more sense data than it has room for",
                           terms_.sense_bytes, answer.sense_length});
        }
        response.moved = bytes - answer.residual;
        response.sense = scsi::parse_sense(std::span(answer.sense).first(answer.sense_length));
    }
    if (exchange != nullptr) {
        exchange->response = response;
        return io::Next::one;
    }
    if (command.first == nullptr) { // a late answer: the request has already ended
        return io::Next::one;
    }
    Disk& disk = command.disk();
    const scsi::Verdict verdict = disk.commands_.judge(command, command.wire, response, disk.identity().name);
    if (verdict.rescan) {
        shared_.request(shared_.rescan_requested);
    }
    completion.status = verdict.status;
    completion.retry = verdict.retry;
    return io::Next::one;
}

Result<void> Transport::release(io::Counters& counters) {
    batch_ = false;
    const u32 accesses = accesses_.load(std::memory_order_relaxed);
    counters.device_accesses += accesses - std::exchange(charged_accesses_, accesses);
    return {};
}

Result<bool> Transport::arm() {
    const u32 outstanding = ring_->outstanding();
    if (outstanding == 0) {
        return false; // a buffer returned now would be a violation, which next() finds
    }
    TRY(const bool found, ring_->arm(pacing_.count(outstanding)));
    pacing_.armed(found, executor_.turn_time());
    return found;
}

// ---- recovery ----

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding, std::string_view names) {
    log::warning("{}: no answer within the time-out: resetting the logical units", names);
    reset_answered_ = group().answered();
    shared_.request(shared_.reset_requested);
    return {.kind = io::Recovery::Kind::reset_requested};
}

std::optional<Error> Transport::reset_ineffective(bool writes) {
    if (group().answered() == reset_answered_) { // on any queue
        return Error{Code::timed_out, "the device has not answered anything for a whole time-out"};
    }
    if (writes) { // it may be executed at any time, and overwrite later writes
        return Error{Code::timed_out, "a write was not answered, not even by a reset of its unit: no later write is "
                                      "safe"};
    }
    return std::nullopt;
}

void Transport::closed(bool stopped) {
    leave();
    if (!stopped) {
        shared_.changed();
    }
}

} // namespace fl::drivers::virtio_scsi

namespace fl {
template class io::BlockQueue<drivers::virtio_scsi::Transport>;
template class io::QueueDisk<drivers::virtio_scsi::Transport>;
} // namespace fl
