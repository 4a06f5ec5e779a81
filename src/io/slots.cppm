// A table of what a device has been given and has not answered yet. Ids carry a generation, so that an answer that comes
// twice, late, or was never asked for is recognised, and an id from outside is never used as an index unchecked.
export module io.slots;
import core.std;

export namespace fl::io {

/// N entries (at most 65536), owned by the table. Not thread-safe: one queue, one processor. An id is
/// slot | generation << 16 with 48 bits of generation, so no id repeats in the life of a machine. It fits the 64-bit ids
/// of Xen's and the VMBus's rings; a ring with 16-bit ids (NVMe, virtio) carries the slot alone and uses find_slot().
/// take() leaves an entry as its last user left it: the caller sets every member.
template <class T, usize N>
class SlotTable {
    static_assert(N >= 1 && N <= 65536);

  public:
    using Id = u64;

    constexpr SlotTable() {
        for (usize i = 0; i < N; ++i) {
            free_[i] = static_cast<u16>(N - 1 - i);
        }
    }
    SlotTable(const SlotTable&) = delete;
    SlotTable& operator=(const SlotTable&) = delete;

    /// A free slot's id; nothing when all are taken.
    constexpr std::optional<Id> take() {
        if (free_count_ == 0) {
            return std::nullopt;
        }
        const u16 slot = free_[--free_count_];
        generations_[slot] |= taken;
        return id_of(slot);
    }
    /// Frees the slot of `id`, which must be taken.
    constexpr void give(Id id) {
        const u16 slot = slot_of(id);
        generations_[slot] = (generations_[slot] & ~taken) + 1;
        free_[free_count_++] = slot;
    }
    /// Retires `id`, which must be taken, and gives the same slot, entry kept, a new one.
    constexpr Id renew(Id id) {
        const u16 slot = slot_of(id);
        generations_[slot] += 1;
        return id_of(slot);
    }
    /// The entry of an id that came from outside; nullptr: unknown, repeated or retired.
    constexpr T* find(Id id) {
        const u64 slot = id & 0xffff;
        return slot < N && generations_[slot] == ((id >> 16) | taken) ? &entries_[slot] : nullptr;
    }
    /// The same for a ring that carries the slot alone.
    constexpr T* find_slot(u64 slot) {
        return slot < N && (generations_[slot] & taken) != 0 ? &entries_[slot] : nullptr;
    }
    /// The entry of an id that is known to be taken.
    constexpr T& operator[](Id id) { return entries_[slot_of(id)]; }
    static constexpr u16 slot_of(Id id) { return static_cast<u16>(id & 0xffff); }
    constexpr Id id_of(u16 slot) const { return slot | (generations_[slot] & ~taken) << 16; }

    constexpr usize size() const { return N - free_count_; }
    constexpr bool full() const { return free_count_ == 0; }
    constexpr bool empty() const { return free_count_ == N; }
    static constexpr usize capacity() { return N; }

    /// Calls f(id, entry) for everything that is taken; f may give() or renew() the id that it is called with.
    template <class F>
    constexpr void for_each(F&& f) {
        if (empty()) {
            return;
        }
        for (usize slot = 0; slot < N; ++slot) {
            if ((generations_[slot] & taken) != 0) {
                f(id_of(static_cast<u16>(slot)), entries_[slot]);
            }
        }
    }

  private:
    static constexpr u64 taken = u64{1} << 63; // beside a generation of 48 bits

    std::array<T, N> entries_{};
    std::array<u64, N> generations_ = [] {
        std::array<u64, N> first{};
        first.fill(1);
        return first;
    }();
    std::array<u16, N> free_{};
    usize free_count_ = N;
};

} // namespace fl::io
