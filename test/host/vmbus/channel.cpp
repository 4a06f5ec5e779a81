module;
#include <cstddef>
module host.channel;
import host.std;
import core.result;
import io.ring;

namespace fl::host {
namespace {

constexpr u32 descriptor_bytes = 16;
constexpr u32 trailer_bytes = 8;
constexpr u32 padded(usize bytes) { return static_cast<u32>((bytes + 7) & ~usize{7}); }

struct Descriptor {
    u16 type;
    u16 offset8;
    u16 length8;
    u16 flags;
    u64 transaction;
};
static_assert(sizeof(Descriptor) == descriptor_bytes && offsetof(Descriptor, offset8) == 2 &&
              offsetof(Descriptor, length8) == 4 && offsetof(Descriptor, flags) == 6 &&
              offsetof(Descriptor, transaction) == 8);

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
    return std::span(reinterpret_cast<const std::byte*>(&value), sizeof(T));
}

constexpr io::RingLayout layout{
    .index = ring_write_index, .event = ring_interrupt_mask, .consumed = ring_read_index, .entries = 4096, .stride = 1};

} // namespace

Result<Channel> Channel::create(Bus& bus, u32 relid, u32 vp, u16 index, std::vector<std::byte*> page_list,
                                u32 downstream) {
    // The list must not move once the rings refer to it.
    auto pages = std::make_unique<std::vector<std::byte*>>(std::move(page_list));
    if (downstream < 2 || downstream >= pages->size() || pages->size() - downstream < 2) {
        return Error{Code::protocol, "each ring needs a header page and at least one page of bytes", pages->size(),
                     downstream};
    }
    const std::span<std::byte* const> all = *pages;
    Memory in_memory(all.first(downstream));
    Memory out_memory(all.subspan(downstream));
    const u32 in_bytes = (downstream - 1) * 4096;
    const u32 out_bytes = static_cast<u32>(pages->size() - downstream - 1) * 4096;
    auto in = In::create(in_memory, layout, io::Wrapped<u32>(in_bytes));
    auto out = Out::create(out_memory, layout, io::Wrapped<u32>(out_bytes));
    if (!in || !out) {
        return !in ? in.error() : out.error();
    }
    for (Memory* memory : {&in_memory, &out_memory}) {
        const u32 write = memory->load_relaxed<u32>(ring_write_index);
        const u32 read = memory->load_relaxed<u32>(ring_read_index);
        if (write != 0 || read != 0) {
            return Error{Code::protocol, "a ring's indices are 0 when its channel is opened", 0,
                         write != 0 ? write : read};
        }
    }
    out_memory.store_relaxed<u32>(ring_features, feature_pending_send);
    return Channel(bus, relid, vp, index, std::move(pages), in_memory, out_memory, *in, *out);
}

std::optional<Packet> Channel::give_up(const char* what, u64 expected, u64 seen) {
    broken_ = true;
    bus_->judge().violation("channel %u: %s; expected %llu, seen %llu: its rings are no longer served", relid_, what,
                            static_cast<unsigned long long>(expected), static_cast<unsigned long long>(seen));
    return std::nullopt;
}

void Channel::begin() {
    ++bus_->counters().turns;
    in_.disarm();
}

std::optional<Packet> Channel::receive() {
    if (broken_) {
        return std::nullopt;
    }
    if (in_.ready() == 0) {
        auto available = in_.available();
        if (!available) {
            return give_up("the guest's write index is out of range", available.error().expected,
                           available.error().seen);
        }
        if (*available == 0) {
            return std::nullopt;
        }
    }
    const u32 at = in_.slot();
    const u32 ready = in_.ready();
    Descriptor descriptor{};
    if (ready < descriptor_bytes + trailer_bytes) {
        return give_up("the guest published less than a packet", descriptor_bytes + trailer_bytes, ready);
    }
    static_cast<void>(in_.remove(std::span(reinterpret_cast<std::byte*>(&descriptor), sizeof descriptor)));
    const u32 length = descriptor.length8 * 8u;
    const u32 offset = descriptor.offset8 * 8u;
    if (length < descriptor_bytes || length + trailer_bytes > ready) {
        return give_up("a packet's length is beyond the published data", ready - trailer_bytes, length);
    }
    if (length > buffer_bytes) {
        return give_up("a packet is longer than any that this host takes", buffer_bytes, length);
    }
    const bool gpa_direct = descriptor.type == static_cast<u16>(PacketType::data_gpa_direct);
    const u32 header = descriptor_bytes + (gpa_direct ? 8 : 0);
    if (offset < header || offset > length) {
        return give_up("a packet's payload does not begin after its header and within the packet", header, offset);
    }
    const std::span<std::byte> body = std::span(*buffer_).first(length - descriptor_bytes);
    std::array<u32, 2> trailer{};
    static_cast<void>(in_.remove(body));
    static_cast<void>(in_.remove(std::span(reinterpret_cast<std::byte*>(trailer.data()), sizeof trailer)));
    taken_ += length + trailer_bytes;
    ++bus_->counters().packets_in;
    if (trailer[1] != at) {
        bus_->judge().violation("channel %u: a packet's trailer names offset %u, it began at %u", relid_, trailer[1],
                                at);
    }
    if ((descriptor.flags & ~packet_completion_requested) != 0) {
        bus_->judge().violation("channel %u: a packet's flags have unknown bits: 0x%x", relid_, descriptor.flags);
    }
    Packet packet{static_cast<PacketType>(descriptor.type),
                  descriptor.flags,
                  descriptor.transaction,
                  0,
                  {},
                  body.subspan(offset - 16)};
    if (gpa_direct) {
        std::memcpy(&packet.range_count, body.data() + 4, 4);
        packet.ranges = body.subspan(8, offset - header);
    }
    return packet;
}

bool Channel::room(usize payload) {
    if (broken_) {
        return false;
    }
    const u32 need = descriptor_bytes + padded(payload) + trailer_bytes;
    if (out_.free() >= need) [[likely]] {
        return true;
    }
    for (bool asked = false;; asked = true) {
        if (auto seen = out_.observe(); !seen) {
            static_cast<void>(give_up("the guest's read index is not between its last one and what was written",
                                      seen.error().expected, seen.error().seen));
            return false;
        }
        if (out_.free() >= need) {
            if (waiting_ != 0) {
                waiting_ = 0;
                out_memory_.store_relaxed<u32>(ring_pending_send, 0);
            }
            return true;
        }
        if (asked) {
            ++bus_->counters().ring_full;
            return false;
        }
        publish();
        waiting_ = need;
        out_memory_.store_relaxed<u32>(ring_pending_send, need);
        // Orders the host's pending_send_sz before the second read of the guest's read index. Pairs with the barrier
        // between the guest's read index and its read of pending_send_sz: at least one of the two sees the other's
        // store.
        out_memory_.full_barrier();
    }
}

bool Channel::send(PacketType type, u16 flags, u64 transaction, std::span<const std::byte> payload, bool target) {
    if (!room(payload.size())) {
        return false;
    }
    const u32 at = out_.slot();
    const u32 length = descriptor_bytes + padded(payload.size());
    Descriptor descriptor{static_cast<u16>(type), descriptor_bytes / 8, static_cast<u16>(length / 8), flags,
                          transaction};
    std::array<u32, 2> trailer{0, at};
    if (target) [[unlikely]] {
        FaultPlan& faults = bus_->faults();
        if (faults.injects(Fault::packet_too_long)) {
            descriptor.length8 = 0xffff;
        } else if (faults.injects(Fault::packet_too_short)) {
            descriptor.length8 = 1;
        } else if (faults.injects(Fault::packet_offset)) {
            descriptor.offset8 = static_cast<u16>(length / 8 + 4);
        } else if (faults.injects(Fault::packet_trailer)) {
            trailer[1] = at + 4096;
        } else if (faults.injects(Fault::packet_type)) {
            descriptor.type = 0x42;
        } else if (faults.injects(Fault::unknown_transaction)) {
            descriptor.transaction = ~transaction;
        }
        target_sent_ = true;
        last_at_ = at;
        last_bytes_ = length;
    }
    static constexpr std::array<std::byte, 8> zeros{};
    static_cast<void>(out_.append(bytes_of(descriptor)));
    static_cast<void>(out_.append(payload));
    static_cast<void>(out_.append(std::span(zeros).first(padded(payload.size()) - payload.size())));
    static_cast<void>(out_.append(bytes_of(trailer)));
    ++bus_->counters().packets_out;
    return true;
}

void Channel::publish() {
    if (out_.unpublished() == 0) {
        return;
    }
    // the rule below compares with it; an invalid one is detected here, not only when the ring is full
    if (auto seen = out_.observe(); !seen) {
        static_cast<void>(give_up("the guest's read index is not between its last one and what was written",
                                  seen.error().expected, seen.error().seen));
        return;
    }
    if (out_.publish()) {
        bus_->interrupt(*this);
    } else {
        ++bus_->counters().interrupts_saved;
    }
    if (std::exchange(target_sent_, false) && bus_->faults().fault() != Fault::none) [[unlikely]] {
        break_after_publishing();
    }
}

void Channel::break_after_publishing() {
    FaultPlan& faults = bus_->faults();
    if (faults.injects(Fault::write_index_beyond)) {
        out_memory_.store_release<u32>(ring_write_index, out_.capacity() + 1 + 64);
        bus_->interrupt(*this, true);
    } else if (faults.injects(Fault::read_index_beyond)) {
        in_memory_.store_release<u32>(ring_read_index, static_cast<u32>(in_memory_.size()) + 64);
        read_index_lost_ = true;
        bus_->interrupt(*this, true);
    } else if (faults.injects(Fault::signal_storm)) {
        storm += 5000;
    } else if (faults.injects(Fault::rewrite_completion)) {
        // Alternates right and wrong values and ends with wrong ones: the length in the descriptor, and the data length
        // in a completion's payload. A reader that reads twice sees both.
        const u32 ring = out_.capacity() + 1;
        const u32 length_at = 4096 + (last_at_ + 4) % ring;
        const u32 data_at = 4096 + (last_at_ + 16 + 12 + 12) % ring;
        const u32 data = out_memory_.load_relaxed<u32>(data_at);
        for (u32 i = 0; i < 2000; ++i) {
            const bool wrong = i % 2 != 0;
            out_memory_.store_relaxed<u16>(length_at, wrong ? u16{0xfff0} : static_cast<u16>(last_bytes_ / 8));
            out_memory_.store_relaxed<u32>(data_at, wrong ? 0x7fff0000 : data);
        }
    }
}

bool Channel::finish() {
    publish();
    if (broken_) {
        return false;
    }
    const u32 taken = std::exchange(taken_, 0);
    if (taken != 0 && !read_index_lost_) [[likely]] {
        in_.release();
    }
    auto more = in_.arm(1); // mask off, full barrier, recheck
    if (!more) {
        static_cast<void>(give_up("the guest's write index is out of range", more.error().expected, more.error().seen));
        return false;
    }
    if (taken != 0) {
        // After the barrier in arm(): a guest that sets its pending_send_sz after this read sees the host's read index.
        const u32 pending_send = in_memory_.load_relaxed<u32>(ring_pending_send);
        const u32 free = static_cast<u32>(in_memory_.size()) - 4096 - 1 - in_.ready();
        if (pending_send != 0 && free >= pending_send && free - std::min(free, taken) < pending_send) {
            bus_->interrupt(*this);
        }
    }
    return *more && waiting_ == 0;
}

} // namespace fl::host
