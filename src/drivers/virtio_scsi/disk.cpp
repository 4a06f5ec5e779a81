module;
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
import io.executor;
import io.oldest_wait;

namespace fl::drivers::virtio_scsi {

// ---- sending ----

io::Fit Transport::prepare(Command& command) {
    const usize held = commands_->size(); // this command is already counted
    if (held > terms_.max_commands) {
        return io::Fit::full;
    }
    if (const io::Fit limited = command.disk().commands_.limit(command); limited != io::Fit::ok) [[unlikely]] {
        return limited;
    }
    return fit(command.op == io::Op::flush ? 2 : 3, max_elements, held, command.wire.indirect, max_elements);
}

io::SendResult Transport::send(Command& command, u64 id) {
    const u16 slot = io::SlotIndex::slot_of(id);
    u64 bus = 0;
    auto& own = area<Area>(slot, bus);
    std::array<io::BufferElement, max_elements> elements;
    u32 count = 0;
    elements[count++] = {bus + offsetof(Area, header), header_bytes(terms_.cdb_bytes), false};
    const io::BufferElement answer{bus + offsetof(Area, response), response_bytes(terms_.sense_bytes), true};
    own.header = {.id = id};
    own.response.sense_length = 0;
    own.response.residual = 0;
    own.response.response = response_unwritten;
    const auto cdb = std::span(own.header.cdb).first<scsi::cdb_bytes>();
    if (command.exchange != nullptr) [[unlikely]] {
        const auto& exchange = static_cast<const Exchange&>(*command.exchange);
        command.wire.indirect = needs_table(max_elements);
        own.header.lun = exchange.lun;
        std::ranges::copy(exchange.cdb.bytes, cdb.begin());
        elements[count++] = answer;
        if (!exchange.data.empty()) {
            elements[count++] = {exchange.data.bus, exchange.data.size, true};
        }
    } else {
        const Disk& disk = command.disk();
        own.header.lun = disk.address_;
        if (command.op <= io::Op::write) [[likely]] {
            disk.commands_.build_io(cdb, command, command.wire);
            const DmaSpan data = command.data();
            const bool is_read = command.op == io::Op::read;
            elements[count++] = is_read ? answer : io::BufferElement{data.bus, data.size, false};
            elements[count++] = is_read ? io::BufferElement{data.bus, data.size, true} : answer;
        } else {
            disk.commands_.build_other(cdb, command, command.wire);
            if (command.op == io::Op::discard) {
                disk.commands_.build_unmap_list(own.unmap, command);
                elements[count++] = {bus + offsetof(Area, unmap), scsi::unmap_list_bytes, false};
            } else if (command.op == io::Op::write_zeroes) {
                elements[count++] = {areas_bus() + zeros_at, disk.commands_.parameter_bytes(command.op), false};
            }
            elements[count++] = answer;
        }
    }
    const std::span<std::byte> table = command.wire.indirect ? std::span(own.indirect) : std::span<std::byte>();
    return add(slot, std::span(elements).first(count), table, bus + offsetof(Area, indirect), command.offset == 0);
}

// ---- answers ----

io::Next Transport::next(io::Completion& completion) {
    u16 slot = 0;
    if (const io::Next next = take(slot); next != io::Next::one) {
        return next;
    }
    const u32 at = slot * static_cast<u32>(sizeof(Area)) + static_cast<u32>(offsetof(Area, response));
    const io::MappedMemory memory = areas();
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
    areas().copy_out(at, reinterpret_cast<std::byte*>(&answer), response_bytes(terms_.sense_bytes));
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
        shared().request(rescan_request);
    }
    completion.status = verdict.status;
    completion.retry = verdict.retry;
    return io::Next::one;
}

// ---- recovery ----

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding, std::string_view names) {
    log::warning("{}: no answer within the time-out: resetting the logical units", names);
    reset_answered_ = group().answered();
    shared().request(reset_request);
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

} // namespace fl::drivers::virtio_scsi

namespace fl {
template class io::BlockQueue<drivers::virtio_scsi::Transport>;
template class io::QueueDisk<drivers::virtio_scsi::Transport>;
} // namespace fl
