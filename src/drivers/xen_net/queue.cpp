module;
#include "core/try.hpp"
module drivers.xen_net.queue;
import core.std;
import core.result;
import core.dma;
import io.net;
import io.ring;
import io.slots;
import hv.xen.grants;

namespace fl::drivers::xen_net {

Result<void> detail::Ring::lay_out(DmaSpan page, u32 slot_bytes) {
    io::MappedMemory memory(page.data, page.size);
    const io::FreeRunning<u32> positions(io::ring_entries(page.size, ring_slots, slot_bytes));
    TRY(requests,
        Requests::create(
            memory,
            {.index = ring_request_producer, .event = ring_request_event, .entries = ring_slots, .stride = slot_bytes},
            positions));
    TRY(responses, Responses::create(memory,
                                     {.index = ring_response_producer,
                                      .event = ring_response_event,
                                      .entries = ring_slots,
                                      .stride = slot_bytes},
                                     positions));
    // Both sides want an event for the first entry [xen-ring SHARED_RING_INIT].
    memory.store_relaxed<u32>(ring_request_event, 1);
    memory.store_relaxed<u32>(ring_response_event, 1);
    return {};
}

// ---- sending ----

Result<void> Transmitter::open(DmaSpan ring, hv::xen::Domain domain, DmaAllocator& dma) {
    CHECK(ring_.lay_out(ring, tx_slot_bytes));
    CHECK(pages_.open(max_slots, least_slots, domain, true, dma));
    for (usize slot = 0; slot < max_slots; ++slot) { // of an earlier ring
        if (slots_.has_slot(slot)) {
            slots_.free(slots_.id_of(static_cast<u16>(slot)));
        }
    }
    // Slots without a page stay taken for ever.
    std::array<Slots::Id, max_slots> ids;
    for (Slots::Id& id : ids) {
        id = *slots_.take();
    }
    for (const Slots::Id id : ids) {
        if (Slots::slot_of(id) < pages_.size()) {
            slots_.free(id);
        }
    }
    return {};
}

void Transmitter::send(const io::OutgoingFrame& frame, u16 flags) {
    ++frame_;
    std::span<const std::byte> piece = frame.head;
    std::span<const std::byte> next = frame.body;
    usize left = frame.size();
    u16 size = static_cast<u16>(left); // of the whole frame in its first slot
    while (left != 0) {
        const Slots::Id id = *slots_.take();
        slots_[id].frame = frame_;
        const u32 page = Slots::slot_of(id);
        const usize bytes = std::min<usize>(left, buffer_bytes);
        std::byte* at = pages_.data(page);
        for (usize room = bytes; room != 0;) {
            if (piece.empty()) {
                piece = std::exchange(next, {});
            }
            const usize part = std::min(room, piece.size());
            std::memcpy(at, piece.data(), part);
            at += part;
            room -= part;
            piece = piece.subspan(part);
        }
        left -= bytes;
        const TxRequest request{pages_.grant(page), 0, static_cast<u16>(flags | (left != 0 ? tx_more_data : 0)),
                                wire_id(id), size};
        static_cast<void>(ring_.requests->produce(request)); // the ring has more slots than there are pages
        flags = 0;
        size = static_cast<u16>(std::min<usize>(left, buffer_bytes));
    }
}

Result<u32> Transmitter::reap(u64& errors) {
    TRY(const u32 count, ring_.responses->available(owed()));
    for (u32 i = 0; i < count; ++i) {
        TxResponse response;
        static_cast<void>(ring_.responses->take(response)); // the only read of it
        const u16 slot = response.id % max_slots;
        if (!slots_.has_slot(slot) || wire_id(slots_.id_of(slot)) != response.id || slot >= pages_.size())
            [[unlikely]] {
            return Error{Code::protocol,
                         "a transmit response carries an id that is not in flight (unknown, repeated or retired)", 0,
                         response.id};
        }
        const Slots::Id id = slots_.id_of(slot);
        if (response.status != status_okay) [[unlikely]] {
            if (response.status != status_error && response.status != status_dropped) {
                return Error{Code::protocol,
                             "a transmit response has a status that the network interface does not "
                             "define for data",
                             0, static_cast<u16>(response.status)};
            }
            if (slots_[id].frame != failed_frame_) {
                failed_frame_ = slots_[id].frame;
                ++errors;
            }
        }
        slots_.free(id);
    }
    CHECK(ring_.requests->retire(count));
    return count;
}

// ---- receiving ----

Result<void> Receiver::open(DmaSpan ring, hv::xen::Domain domain, DmaAllocator& dma, u32 longest) {
    CHECK(ring_.lay_out(ring, rx_slot_bytes));
    TRY(frame_, dma.buffer(longest));
    capacity_ = longest;
    length_ = slots_ = extras_ = 0;
    more_ = extra_ = damaged_ = false;
    CHECK(pages_.open(max_buffers, least_buffers, domain, false, dma));
    return give_back(0);
}

Result<void> Receiver::give_back(u32 count) {
    CHECK(ring_.requests->retire(count));
    while (ring_.requests->in_flight() < pages_.size()) {
        const u32 position = ring_.requests->position();
        const RxRequest request{static_cast<u16>(position), 0, pages_.grant(position % pages_.size())};
        static_cast<void>(ring_.requests->produce(request)); // the ring has more slots than there are buffers
    }
    return {};
}

io::Checksum Receiver::checksum() const {
    return (flags_ & rx_checksum_blank) != 0   ? io::Checksum::partial
           : (flags_ & rx_data_validated) != 0 ? io::Checksum::verified
                                               : io::Checksum::unknown;
}

Result<Receiver::Got> Receiver::take() {
    const u32 position = ring_.responses->position();
    RxResponse response;
    static_cast<void>(ring_.responses->take(response)); // the only read of it
    if (extra_) [[unlikely]] {
        return take_extra(std::bit_cast<ExtraInfo>(response));
    }
    if (response.id != static_cast<u16>(position)) [[unlikely]] {
        return Error{Code::protocol, "a receive response carries another id than the request in its slot",
                     static_cast<u16>(position), response.id};
    }
    if (!more_) { // a new frame
        length_ = slots_ = extras_ = 0;
        damaged_ = false;
        flags_ = response.flags;
        extra_ = (flags_ & rx_extra_info) != 0;
    }
    if (++slots_ > max_frame_slots) [[unlikely]] {
        return Error{Code::protocol, "a received frame has more slots than the network interface permits",
                     max_frame_slots, slots_};
    }
    more_ = (response.flags & rx_more_data) != 0;
    if (response.status < 0 || (response.flags & rx_gso_prefix) != 0) [[unlikely]] {
        damaged_ = true; // its other slots may follow
        return ended();
    }
    const u32 size = static_cast<u32>(response.status);
    if (response.offset > buffer_bytes || size > buffer_bytes - response.offset) [[unlikely]] {
        return Error{Code::protocol, "a receive response describes data beyond its page (end)", buffer_bytes,
                     u64{response.offset} + size};
    }
    if (size > capacity_ - length_) [[unlikely]] {
        damaged_ = true; // too long
        return ended();
    }
    std::memcpy(frame_.data() + length_, pages_.data(position % pages_.size()) + response.offset, size);
    length_ += size;
    return ended();
}

// What was not offered (a frame to be cut into several) is damage; what is unknown is skipped.
Result<Receiver::Got> Receiver::take_extra(const ExtraInfo& info) {
    if (++extras_ > max_extras) {
        return Error{Code::protocol, "a received frame has more extra infos than the network interface permits",
                     max_extras, extras_};
    }
    damaged_ = damaged_ || info.type == extra_none || info.type == extra_gso;
    extra_ = (info.flags & extra_more) != 0;
    return ended();
}

Result<Receiver::Got> Receiver::ended() {
    if (more_ || extra_) {
        return Got::part;
    }
    return damaged_ || length_ < io::ethernet_header ? Got::damaged : Got::frame;
}

} // namespace fl::drivers::xen_net
