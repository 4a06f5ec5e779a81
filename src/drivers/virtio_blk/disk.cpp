module;
#include "core/try.hpp"
#include <cstddef>
module drivers.virtio_blk.disk;
import core.std;
import core.dma;
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

namespace fl::drivers::virtio_blk {

void Transport::set_up(const Ring& ring, DmaSpan commands, bool indirect, const Limits& limits, void (*changed)(void*),
                       void* context) {
    ring_.emplace(ring);
    areas_ = commands;
    indirect_ = indirect;
    limits_ = limits;
    limits_.segments = std::clamp(std::min(limits.segments, ring.size() - 2), 1u, max_segments);
    max_bytes_ = static_cast<u32>(std::min<u64>(u64{limits_.segments} * limits_.segment_bytes, 0x7fff'f000));
    changed_ = changed;
    context_ = context;
}

// ---- sending ----

u32 Transport::elements_of(const Command& command) const {
    if (command.op > io::Op::write) {
        return command.op == io::Op::discard ? 3 : 2;
    }
    if (command.bytes <= limits_.segment_bytes) [[likely]] {
        return 3;
    }
    return 2 + (command.bytes + limits_.segment_bytes - 1) / limits_.segment_bytes;
}

// A request is a chain of descriptors, or one descriptor of an indirect table. A chain costs the device less, as long
// as there are enough descriptors for all commands that may still come.
io::Fit Transport::prepare(Command& command) {
    if (command.op == io::Op::discard) [[unlikely]] {
        command.bytes = std::min(command.bytes, limits_.discard_bytes);
    } else if (command.op <= io::Op::write) {
        command.bytes = std::min(command.bytes, max_bytes_);
    }
    const u32 elements = elements_of(command);
    const u32 room = ring_->free();
    const u32 to_come = max_commands - static_cast<u32>(commands_->size()); // this command is already counted
    command.wire.indirect =
        indirect_ && room < elements + to_come && elements <= sizeof(Area::indirect) / io::virtqueue_descriptor_bytes;
    return room < (command.wire.indirect ? 1 : elements) ? io::Fit::full : io::Fit::ok;
}

io::SendResult Transport::send(Command& command, u64 id) {
    const u16 slot = io::SlotIndex::slot_of(id);
    const u32 at = slot * static_cast<u32>(sizeof(Area));
    auto& area = *reinterpret_cast<Area*>(areas_.data + at);
    const u64 bus = areas_.bus + at;
    std::array<io::BufferElement, max_segments + 2> elements;
    u32 count = 0;
    elements[count++] = {bus + offsetof(Area, header), sizeof(RequestHeader), false};
    area.status = status_unwritten;
    if (command.exchange != nullptr) [[unlikely]] {
        const DmaSpan data = static_cast<IdExchange*>(command.exchange)->data;
        command.wire.indirect = false;
        area.header = {.type = RequestType::get_id};
        elements[count++] = {data.bus, data.size, true};
    } else if (command.op <= io::Op::write) [[likely]] {
        const bool is_read = command.op == io::Op::read;
        const DmaSpan data = command.data();
        const u64 sector = (command.first->lba << (command.device->sector_shift() - 9)) + (command.offset >> 9);
        area.header = {.type = is_read ? RequestType::in : RequestType::out, .sector = sector};
        u32 done = 0;
        do {
            const u32 length = std::min(data.size - done, limits_.segment_bytes);
            elements[count++] = {data.bus + done, length, is_read};
            done += length;
        } while (done != data.size);
    } else if (command.op == io::Op::discard) {
        area.header = {.type = RequestType::discard};
        area.discard = {.sector = (command.first->lba << (command.device->sector_shift() - 9)) + (command.offset >> 9),
                        .sectors = command.bytes >> 9};
        elements[count++] = {bus + offsetof(Area, discard), sizeof(DiscardSegment), false};
    } else {
        area.header = {.type = RequestType::flush};
    }
    elements[count++] = {bus + offsetof(Area, status), 1, true};
    pacing_.sent(command.offset == 0);
    const std::span<const io::BufferElement> all(elements.data(), count);
    const io::MappedMemory table(area.indirect.data(), area.indirect.size());
    const auto added = command.wire.indirect ? ring_->add_indirect(slot, all, table, bus + offsetof(Area, indirect))
                                             : ring_->add(slot, all);
    if (!added) [[unlikely]] {
        return added.error().code == Code::exhausted ? io::SendResult::full : broken(added.error());
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
        fault_ = used.error();
        return io::Next::broken;
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
    const io::MappedMemory memory(areas_.data, areas_.size);
    const u8 status = memory.load_relaxed<u8>(slot * sizeof(Area) + offsetof(Area, status));
    completion.id = commands_->id_of(slot);
    switch (status) {
    case status_ok: completion.status = io::Status::ok; break;
    case status_io_error: completion.status = io::Status::io_error; break;
    case status_unsupported: completion.status = io::Status::not_supported; break;
    default:
        fault_ = Error{Code::protocol,
                       "a virtio block request was returned with a status that is not defined (0xff: with none)",
                       status_unsupported, status};
        return io::Next::broken;
    }
    if (io::Exchange* exchange = (*commands_)[completion.id].exchange; exchange != nullptr) [[unlikely]] {
        static_cast<IdExchange*>(exchange)->status = completion.status;
    }
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

io::Recovery Transport::recover(const Command&, io::OldestWait::Finding finding, std::string_view) {
    if (finding == io::OldestWait::Finding::lost) {
        return {.kind = io::Recovery::Kind::give_up};
    }
    return {.kind = io::Recovery::Kind::close,
            .why = Error{Code::timed_out, "the device has not answered anything for a whole time-out"}};
}

void Transport::closed(bool stopped) {
    leave();
    if (!stopped && changed_ != nullptr) {
        changed_(context_);
    }
}

} // namespace fl::drivers::virtio_blk

namespace fl {
template class io::BlockQueue<drivers::virtio_blk::Transport>;
template class io::QueueDisk<drivers::virtio_blk::Transport>;
} // namespace fl
