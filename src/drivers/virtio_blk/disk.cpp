module;
#include <cstddef>
module drivers.virtio_blk.disk;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.block;
import io.block_queue;
import io.executor;
import io.oldest_wait;

namespace fl::drivers::virtio_blk {

void Transport::set_limits(const Limits& limits) {
    limits_ = limits;
    limits_.segments = std::clamp(std::min(limits.segments, queue_size() - 2), 1u, max_segments);
    max_bytes_ = static_cast<u32>(std::min<u64>(u64{limits_.segments} * limits_.segment_bytes, 0x7fff'f000));
}

// ---- sending ----

u32 Transport::elements_of(const Command& command) const {
    if (command.op > io::Op::write) {
        return command.op == io::Op::flush ? 2 : 3;
    }
    if (command.bytes <= limits_.segment_bytes) [[likely]] {
        return 3;
    }
    return 2 + (command.bytes + limits_.segment_bytes - 1) / limits_.segment_bytes;
}

io::Fit Transport::prepare(Command& command) {
    if (command.op <= io::Op::write) [[likely]] {
        command.bytes = std::min(command.bytes, max_bytes_);
    } else if (command.op != io::Op::flush) {
        command.bytes =
            std::min(command.bytes, command.op == io::Op::discard ? limits_.discard_bytes : limits_.zeroes_bytes);
    }
    constexpr u32 most = sizeof(Area::indirect) / io::virtqueue_descriptor_bytes;
    return fit(elements_of(command), most, commands_->size(), command.wire.indirect);
}

io::SendResult Transport::send(Command& command, u64 id) {
    const u16 slot = io::SlotIndex::slot_of(id);
    u64 bus = 0;
    auto& own = area<Area>(slot, bus);
    std::array<io::BufferElement, max_segments + 2> elements;
    u32 count = 0;
    elements[count++] = {bus + offsetof(Area, header), sizeof(RequestHeader), false};
    own.status = status_unwritten;
    if (command.exchange != nullptr) [[unlikely]] {
        const DmaSpan data = static_cast<IdExchange*>(command.exchange)->data;
        command.wire.indirect = false;
        own.header = {.type = RequestType::get_id};
        elements[count++] = {data.bus, data.size, true};
    } else if (command.op <= io::Op::write) [[likely]] {
        const bool is_read = command.op == io::Op::read;
        const DmaSpan data = command.data();
        const u64 sector = (command.first->lba << (command.device->sector_shift() - 9)) + (command.offset >> 9);
        own.header = {.type = is_read ? RequestType::in : RequestType::out, .sector = sector};
        u32 done = 0;
        do {
            const u32 length = std::min(data.size - done, limits_.segment_bytes);
            elements[count++] = {data.bus + done, length, is_read};
            done += length;
        } while (done != data.size);
    } else if (command.op == io::Op::flush) {
        own.header = {.type = RequestType::flush};
    } else {
        const bool zeroes = command.op == io::Op::write_zeroes;
        own.header = {.type = zeroes ? RequestType::write_zeroes : RequestType::discard};
        own.range = {.sector = (command.first->lba << (command.device->sector_shift() - 9)) + (command.offset >> 9),
                     .sectors = command.bytes >> 9,
                     .flags = zeroes && limits_.zeroes_unmap ? segment_unmap : 0};
        elements[count++] = {bus + offsetof(Area, range), sizeof(RangeSegment), false};
    }
    elements[count++] = {bus + offsetof(Area, status), 1, true};
    const std::span<std::byte> table = command.wire.indirect ? std::span(own.indirect) : std::span<std::byte>();
    return add(slot, std::span(elements).first(count), table, bus + offsetof(Area, indirect), command.offset == 0);
}

// ---- answers ----

io::Next Transport::next(io::Completion& completion) {
    u16 slot = 0;
    if (const io::Next next = take(slot); next != io::Next::one) {
        return next;
    }
    completion.id = commands_->id_of(slot);
    const u8 status = areas().load_relaxed<u8>(slot * sizeof(Area) + offsetof(Area, status));
    switch (status) {
    case status_ok: completion.status = io::Status::ok; break;
    case status_io_error: completion.status = io::Status::io_error; break;
    case status_unsupported: completion.status = io::Status::not_supported; break;
    default:
        return broken({Code::protocol,
                       "a virtio block request was returned with a status that is not defined (0xff: with none)",
                       status_unsupported, status});
    }
    if (io::Exchange* exchange = (*commands_)[completion.id].exchange; exchange != nullptr) [[unlikely]] {
        static_cast<IdExchange*>(exchange)->status = completion.status;
    }
    return io::Next::one;
}

// ---- recovery ----

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding finding, std::string_view) {
    if (finding == io::OldestWait::Finding::lost) {
        return {.kind = io::Recovery::Kind::give_up};
    }
    return {.kind = io::Recovery::Kind::close,
            .why = Error{Code::timed_out, "the device has not answered anything for a whole time-out"}};
}

} // namespace fl::drivers::virtio_blk

namespace fl {
template class io::BlockQueue<drivers::virtio_blk::Transport>;
template class io::QueueDisk<drivers::virtio_blk::Transport>;
} // namespace fl
