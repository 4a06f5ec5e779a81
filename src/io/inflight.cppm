// The table of what is under way: a slot for every request that the other side may answer. Ids carry a generation, so
// that an answer which comes twice, late, or was never asked for is recognised and is never an array index.
export module io.inflight;
import core.std;

export namespace fl::io {

/// N slots (at most 65536) of T*. Not thread-safe: one queue, one processor. An id is slot | generation << 16, with 48
/// bits of generation: no id comes twice in the life of a machine. It fits the 64 bits of Xen's and the VMBus's wire;
/// for a wire with 16 bits (NVMe, virtio) the slot alone is asked for by give_slot().
template <class T, usize N>
class Inflight {
    static_assert(N >= 1 && N <= 65536);

  public:
    using Id = u64;

    constexpr Inflight() {
        for (usize i = 0; i < N; ++i) {
            free_[i] = static_cast<u16>(N - 1 - i);
        }
    }

    /// A slot for `item`; nothing when all are taken.
    constexpr std::optional<Id> take(T& item) {
        if (free_count_ == 0) {
            return std::nullopt;
        }
        const u16 slot = free_[--free_count_];
        slots_[slot].item = &item;
        return id_of(slot);
    }
    /// The item behind an id that came from outside, and frees its slot; nullptr when the id is unknown, repeated or
    /// retired.
    constexpr T* give(u64 id) {
        const u64 slot = id & 0xffff;
        if (slot >= N || slots_[slot].item == nullptr || id_of(static_cast<u16>(slot)) != id) {
            return nullptr;
        }
        return release(static_cast<u16>(slot));
    }
    constexpr T* give_slot(u64 slot) {
        return slot < N && slots_[slot].item != nullptr ? release(static_cast<u16>(slot)) : nullptr;
    }
    /// The item, with its slot kept.
    constexpr T* peek(u64 id) const {
        const u64 slot = id & 0xffff;
        return slot < N && slots_[slot].item != nullptr && id_of(static_cast<u16>(slot)) == id ? slots_[slot].item
                                                                                               : nullptr;
    }
    static constexpr u16 slot_of(u64 id) { return static_cast<u16>(id & 0xffff); }
    constexpr usize size() const { return N - free_count_; }
    constexpr bool full() const { return free_count_ == 0; }
    constexpr bool empty() const { return free_count_ == N; }
    static constexpr usize capacity() { return N; }

    /// Calls f(id, item) for everything under way; f may give() the id it is called with.
    template <class F>
    constexpr void for_each(F&& f) {
        for (usize slot = 0; slot < N; ++slot) {
            if (slots_[slot].item != nullptr) {
                f(id_of(static_cast<u16>(slot)), *slots_[slot].item);
            }
        }
    }

  private:
    struct Slot {
        T* item = nullptr;
        u64 generation = 1;
    };
    constexpr Id id_of(u16 slot) const { return slot | slots_[slot].generation << 16; }
    constexpr T* release(u16 slot) {
        T* item = std::exchange(slots_[slot].item, nullptr);
        ++slots_[slot].generation;
        free_[free_count_++] = slot;
        return item;
    }

    std::array<Slot, N> slots_{};
    std::array<u16, N> free_{};
    usize free_count_ = N;
};

} // namespace fl::io
