module;
#include "core/try.hpp"
module drivers.virtio.queue;
import core.std;
import core.dma;
import core.result;
import core.vector;
import io.ring.any;
import drivers.virtio.device;

namespace fl::drivers::virtio {

Result<void> Queue::make(Device& device, u16 number, u64 features, const QueueNeeds& needs, DmaAllocator& dma) {
    const auto has = [&](u64 feature) { return (features & feature) != 0; };
    const bool packed = has(feature_packed);
    const u32 maximum = device.max_size(number);
    if (maximum == 0 || maximum > io::virtqueue_max_size) {
        return Error{Code::protocol, "a queue of the virtio device has an impossible size", io::virtqueue_max_size,
                     maximum};
    }
    const u32 size = Ring::usable_size(std::min(maximum, needs.most), packed);
    if (size < needs.least) {
        return Error{Code::not_supported, "a queue of the virtio device is too small for a request", needs.least, size};
    }
    number_ = number;
    layout_ = Ring::layout(size, packed, device.legacy() ? legacy_align : 64);
    TRY(memory_, dma.buffer(static_cast<u32>(layout_.bytes)));
    for (u32 i = 0; i < size; ++i) {
        if (!rows_.push({})) {
            return Error{Code::exhausted, "no memory for the table of a virtqueue"};
        }
    }
    TRY(const Ring ring,
        Ring::create(io::MappedMemory(memory_.data(), memory_.size()), layout_, size, {rows_.begin(), rows_.size()},
                     {.event_index = has(feature_event_idx),
                      .in_order = has(feature_in_order),
                      .indirect = has(feature_indirect),
                      .packed = packed,
                      .readable_in_length = needs.readable_in_length}));
    ring_.emplace(ring);
    return {};
}

Result<void> Queue::enable(Device& device, u16 vector) {
    const u64 bus = memory_.bus();
    TRY(notifier_, device.enable(number_, ring_->size(),
                                 {bus + layout_.descriptors, bus + layout_.driver, bus + layout_.device}, vector));
    return {};
}

} // namespace fl::drivers::virtio
