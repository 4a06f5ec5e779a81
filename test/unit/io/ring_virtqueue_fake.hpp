// The device side of split and packed virtqueues, for tests of the driver side. Written from the specification
// [virtio-1.2 §2.7, §2.8] with its own offsets and flags, byte by byte over guest memory; it shares nothing with
// io.ring.split and io.ring.packed. The device itself conforms, and reports the first rule that the driver violates.
// Tests of hostile devices write to the memory directly.
//
// Include after the imports.
#pragma once
import host.std;

#include "zeroed.hpp"

namespace virtqueue_fake {
using fl::i64;
using fl::u16;
using fl::u32;
using fl::u64;
using fl::u8;

/// Guest memory as the device sees it: one range starting at `bus`. An access outside it is a driver error.
struct Guest {
    Zeroed memory;
    u64 bus = 0x1'0000'0000;
    std::string fault; // the first rule that the driver violated

    explicit Guest(std::size_t bytes) : memory((bytes + 7) / 8 * 8) {}
    std::byte* data() { return memory.data(); }
    std::size_t size() const { return memory.size(); }
    void violation(const std::string& rule) {
        if (fault.empty()) {
            fault = rule;
        }
    }
    bool has(u64 at, u64 bytes) const { return at >= bus && at - bus <= size() && bytes <= size() - (at - bus); }
    u64 get(u64 at, u32 bytes) {
        if (!has(at, bytes)) {
            violation("address outside of the guest's memory");
            return 0;
        }
        u64 value = 0;
        for (u32 i = 0; i < bytes; ++i) {
            value |= u64{std::to_integer<u8>(data()[at - bus + i])} << 8 * i;
        }
        return value;
    }
    void put(u64 at, u64 value, u32 bytes) {
        if (!has(at, bytes)) {
            violation("address outside of the guest's memory");
            return;
        }
        for (u32 i = 0; i < bytes; ++i) {
            data()[at - bus + i] = static_cast<std::byte>(value >> 8 * i);
        }
    }
};

struct Piece {
    u64 bus;
    u32 length;
    bool writable;
    bool operator==(const Piece&) const = default;
};

/// A buffer that the device has taken from the queue.
struct Chain {
    u16 id = 0;
    u32 descriptors = 0; // occupied in the ring or the table
    bool indirect = false;
    std::vector<Piece> pieces;

    u64 writable() const {
        u64 sum = 0;
        for (const Piece& piece : pieces) {
            sum += piece.writable ? piece.length : 0;
        }
        return sum;
    }
};

/// Checks that apply to buffers in both formats.
inline void judge(Guest& guest, const Chain& chain, u32 queue_size) {
    bool writable = false;
    u64 total = 0;
    for (const Piece& piece : chain.pieces) {
        if (piece.length == 0) {
            guest.violation("an element of no bytes");
        }
        if (writable && !piece.writable) {
            guest.violation("a device-readable element after a device-writable one");
        }
        writable = piece.writable;
        total += piece.length;
    }
    if (chain.pieces.empty() || chain.pieces.size() > queue_size) {
        guest.violation("a buffer of no elements, or of more than the queue has");
    }
    if (total > u64{1} << 32) {
        guest.violation("a buffer longer than 2^32 bytes");
    }
}

class SplitDevice {
  public:
    struct Setup {
        u32 size;
        u64 descriptors, driver, device; // bus addresses of the three areas
        bool event_index = false;
        bool in_order = false;
    };
    SplitDevice(Guest& guest, const Setup& setup) : guest_(&guest), s_(setup) {
        if (s_.descriptors % 16 != 0 || s_.driver % 2 != 0 || s_.device % 4 != 0) {
            guest.violation("a misaligned area");
        }
    }

    /// The number of buffers available to take.
    u32 pending() {
        const u16 index = static_cast<u16>(guest_->get(s_.driver + 2, 2));
        const u16 count = static_cast<u16>(index - taken_);
        if (count > s_.size) {
            guest_->violation("the available index has jumped");
        }
        return count;
    }
    std::optional<Chain> pop() {
        if (pending() == 0) {
            return std::nullopt;
        }
        Chain chain;
        u16 at = static_cast<u16>(guest_->get(s_.driver + 4 + 2 * (taken_ % s_.size), 2));
        ++taken_;
        chain.id = at;
        if (s_.in_order && at != expected_) {
            guest_->violation("descriptors are not used in ring order");
        }
        while (true) {
            if (at >= s_.size) {
                guest_->violation("a descriptor outside of the table");
                return std::nullopt;
            }
            const u64 d = s_.descriptors + 16 * at;
            const u64 bus = guest_->get(d, 8);
            const u32 length = static_cast<u32>(guest_->get(d + 8, 4));
            const u16 flags = static_cast<u16>(guest_->get(d + 12, 2));
            const u16 next = static_cast<u16>(guest_->get(d + 14, 2));
            ++chain.descriptors;
            if ((flags & ~7) != 0) {
                guest_->violation("unknown descriptor flags");
            }
            if ((flags & 4) != 0) {
                if ((flags & 1) != 0 || chain.descriptors != 1) {
                    guest_->violation("an indirect descriptor in a chain");
                }
                read_table(chain, bus, length);
            } else {
                chain.pieces.push_back({bus, length, (flags & 2) != 0});
            }
            if ((flags & 1) == 0) {
                expected_ = static_cast<u16>((at + 1) % s_.size);
                break;
            }
            if (chain.descriptors == s_.size) {
                guest_->violation("a chain longer than the queue");
                return std::nullopt;
            }
            if (s_.in_order && next != (at + 1) % s_.size) {
                guest_->violation("a chain is not in ring order");
            }
            at = next;
        }
        judge(*guest_, chain, s_.size);
        return chain;
    }
    void push(const Chain& chain, u32 length) { push_batch({&chain, 1}, length); }
    /// Writes one used element for all of them; more than one only with VIRTIO_F_IN_ORDER.
    void push_batch(std::span<const Chain> chains, u32 length) {
        const u64 element = s_.device + 4 + 8 * (used_ % s_.size);
        guest_->put(element, chains.back().id, 4);
        guest_->put(element + 4, length, 4);
        used_ = static_cast<u16>(used_ + chains.size());
        guest_->put(s_.device + 2, used_, 2);
    }
    /// Whether an event is due for the buffers pushed since the last call.
    bool interrupt() {
        const u16 old = std::exchange(signalled_, used_);
        const u16 flags = static_cast<u16>(guest_->get(s_.driver, 2));
        if (flags > 1 || (s_.event_index && flags != 0)) {
            guest_->violation("the driver's flags are not 0 or 1, or not 0 with an event index");
        }
        if (!s_.event_index) {
            return old != used_ && flags == 0;
        }
        const u16 event = static_cast<u16>(guest_->get(s_.driver + 4 + 2 * s_.size, 2));
        for (u16 i = old; i != used_; ++i) {
            if (i == event) {
                return true;
            }
        }
        return false;
    }
    /// Requests a notification after `count` more buffers.
    void want(u32 count) {
        guest_->put(s_.device + 4 + 8 * s_.size, static_cast<u16>(taken_ + count - 1), 2);
        guest_->put(s_.device, 0, 2);
    }
    void want_none() {
        if (s_.event_index) {
            guest_->put(s_.device + 4 + 8 * s_.size, static_cast<u16>(taken_ - 1), 2);
        } else {
            guest_->put(s_.device, 1, 2);
        }
    }

  private:
    void read_table(Chain& chain, u64 bus, u32 length) {
        chain.indirect = true;
        if (length == 0 || length % 16 != 0) {
            guest_->violation("an indirect table of no whole descriptors");
            return;
        }
        u32 at = 0;
        while (true) {
            const u64 d = bus + 16 * at;
            const u16 flags = static_cast<u16>(guest_->get(d + 12, 2));
            chain.pieces.push_back({guest_->get(d, 8), static_cast<u32>(guest_->get(d + 8, 4)), (flags & 2) != 0});
            if ((flags & ~3) != 0) {
                guest_->violation("flags in an indirect table");
            }
            if ((flags & 1) == 0) {
                break;
            }
            const u32 next = static_cast<u32>(guest_->get(d + 14, 2));
            if (next >= length / 16 || next != at + 1) {
                guest_->violation("an indirect chain leaves its table, or is not in order");
                return;
            }
            at = next;
        }
        if (chain.pieces.size() != length / 16) {
            guest_->violation("an indirect table is longer than its chain");
        }
    }

    Guest* guest_;
    Setup s_;
    u16 taken_ = 0;
    u16 used_ = 0;
    u16 signalled_ = 0;
    u16 expected_ = 0;
};

class PackedDevice {
  public:
    using Setup = SplitDevice::Setup;
    PackedDevice(Guest& guest, const Setup& setup) : guest_(&guest), s_(setup) {
        if (s_.descriptors % 16 != 0 || s_.driver % 4 != 0 || s_.device % 4 != 0) {
            guest.violation("a misaligned area");
        }
    }

    u32 pending() { // a lower bound
        return available(next_, wrap_) ? 1 : 0;
    }
    std::optional<Chain> pop() {
        if (!available(next_, wrap_)) {
            return std::nullopt;
        }
        Chain chain;
        while (true) {
            if (chain.descriptors == s_.size) {
                guest_->violation("a list longer than the queue");
                return std::nullopt;
            }
            if (!available(next_, wrap_)) {
                guest_->violation("a list's first descriptor was available before the rest");
                return std::nullopt;
            }
            const u64 d = s_.descriptors + 16 * next_;
            const u64 bus = guest_->get(d, 8);
            const u32 length = static_cast<u32>(guest_->get(d + 8, 4));
            const u16 id = static_cast<u16>(guest_->get(d + 12, 2));
            const u16 flags = static_cast<u16>(guest_->get(d + 14, 2));
            if ((flags & ~0x8087) != 0) {
                guest_->violation("unknown descriptor flags");
            }
            ++chain.descriptors;
            if (++next_ == s_.size) {
                next_ = 0;
                wrap_ = !wrap_;
            }
            if ((flags & 4) != 0) {
                if ((flags & 1) != 0 || chain.descriptors != 1) {
                    guest_->violation("an indirect descriptor in a list");
                }
                chain.indirect = true;
                if (length == 0 || length % 16 != 0) {
                    guest_->violation("an indirect table of no whole descriptors");
                }
                for (u32 at = 0; at + 16 <= length; at += 16) {
                    const u16 inner = static_cast<u16>(guest_->get(bus + at + 14, 2));
                    if ((inner & ~2) != 0) {
                        guest_->violation("flags in an indirect table");
                    }
                    chain.pieces.push_back(
                        {guest_->get(bus + at, 8), static_cast<u32>(guest_->get(bus + at + 8, 4)), (inner & 2) != 0});
                }
            } else {
                chain.pieces.push_back({bus, length, (flags & 2) != 0});
            }
            if ((flags & 1) == 0) {
                chain.id = id; // the last descriptor's id counts
                break;
            }
        }
        judge(*guest_, chain, s_.size);
        return chain;
    }
    void push(const Chain& chain, u32 length) { push_batch({&chain, 1}, length); }
    /// Like QEMU: without the write flag but with the length.
    void push_unflagged(const Chain& chain, u32 length) {
        flagged_ = false;
        push(chain, length);
        flagged_ = true;
    }
    void push_batch(std::span<const Chain> chains, u32 length) {
        const u64 d = s_.descriptors + 16 * used_;
        guest_->put(d + 8, length, 4);
        guest_->put(d + 12, chains.back().id, 2);
        guest_->put(d + 14, (used_wrap_ ? 0x8080u : 0u) | (flagged_ && length != 0 ? 2u : 0u), 2);
        u32 skip = 0;
        for (const Chain& chain : chains) {
            skip += chain.descriptors;
        }
        used_ += skip;
        pushed_ += skip;
        if (used_ >= s_.size) {
            used_ -= s_.size;
            used_wrap_ = !used_wrap_;
        }
    }
    bool interrupt() {
        const u32 pushed = std::exchange(pushed_, 0);
        const u32 old = std::exchange(signalled_, used_);
        const bool old_wrap = std::exchange(signalled_wrap_, used_wrap_);
        const u16 desc = static_cast<u16>(guest_->get(s_.driver, 2));
        const u16 flags = static_cast<u16>(guest_->get(s_.driver + 2, 2));
        if (flags > 2 || (flags == 2 && (!s_.event_index || (desc & 0x7fffu) >= s_.size))) {
            guest_->violation("the driver's event suppression makes no sense");
        }
        if (flags != 2) {
            return pushed != 0 && flags == 0;
        }
        u32 at = old;
        bool wrap = old_wrap;
        for (u32 i = 0; i < pushed; ++i) { // each descriptor passed
            if (at == (desc & 0x7fffu) && wrap == ((desc & 0x8000) != 0)) {
                return true;
            }
            if (++at == s_.size) {
                at = 0;
                wrap = !wrap;
            }
        }
        return false;
    }
    /// Requests a notification when the descriptor `count - 1` positions ahead becomes available.
    void want(u32 count) {
        if (!s_.event_index) {
            guest_->put(s_.device + 2, 0, 2);
            return;
        }
        const u32 at = next_ + count - 1;
        const bool wrap = at >= s_.size ? !wrap_ : wrap_;
        guest_->put(s_.device, (at % s_.size) | (wrap ? 0x8000u : 0u), 2);
        guest_->put(s_.device + 2, 2, 2);
    }
    void want_none() { guest_->put(s_.device + 2, 1, 2); }

  private:
    bool available(u32 at, bool wrap) {
        const u64 flags = guest_->get(s_.descriptors + 16 * at + 14, 2);
        return ((flags & 0x80) != 0) == wrap && ((flags & 0x8000) != 0) == !wrap;
    }

    Guest* guest_;
    Setup s_;
    u32 next_ = 0;
    bool wrap_ = true;
    u32 used_ = 0;
    bool used_wrap_ = true;
    u32 signalled_ = 0;
    bool signalled_wrap_ = true;
    u32 pushed_ = 0;
    bool flagged_ = true;
};

} // namespace virtqueue_fake
