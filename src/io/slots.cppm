// A table of commands sent to a device and not yet answered. Ids carry a generation, so that duplicate, late and
// unsolicited answers are detected; an id received from the device is never used as an unchecked index.
export module io.slots;
import core.std;

export namespace fl::io {

/// Tracks which slots are taken, and under which ids. Not thread-safe: one queue, one processor. An id is slot |
/// generation << 16 with a 48-bit generation, so ids do not repeat within the machine's lifetime. It fits the 64-bit
/// ids of Xen and VMBus rings; a ring with 16-bit ids (NVMe, virtio) carries only the slot and uses has_slot().
class SlotIndex {
  public:
    using Id = u64;
    SlotIndex(const SlotIndex&) = delete;
    SlotIndex& operator=(const SlotIndex&) = delete;

    /// Takes a free slot and returns its id; nullopt: all are taken.
    constexpr std::optional<Id> take() { return free_count_ == 0 ? std::nullopt : std::optional(take_free()); }
    /// The same when the caller knows that one is free [free_slots()].
    constexpr Id take_free() {
        const u16 slot = free_[--free_count_];
        return slot | ++generations_[slot] << 16;
    }
    /// Frees the slot of `id`, which must be taken.
    constexpr void free(Id id) {
        const u16 slot = slot_of(id);
        ++generations_[slot];
        free_[free_count_++] = slot;
    }
    /// Retires `id`, which must be taken, and returns a new id for the same slot.
    constexpr Id renew(Id id) {
        const u16 slot = slot_of(id);
        generations_[slot] += 2;
        return id_of(slot);
    }
    /// Whether an id received from outside is currently taken: not unknown, repeated or retired.
    constexpr bool has(Id id) const {
        const u64 slot = id & 0xffff;
        return slot < capacity_ && generations_[slot] == id >> 16 && (id & first_taken) != 0;
    }
    /// The same for a ring that carries only the slot.
    constexpr bool has_slot(u64 slot) const { return slot < capacity_ && (generations_[slot] & 1) != 0; }
    static constexpr u16 slot_of(Id id) { return static_cast<u16>(id & 0xffff); }
    constexpr Id id_of(u16 slot) const { return slot | generations_[slot] << 16; }

    constexpr usize size() const { return capacity_ - free_count_; }
    constexpr usize free_slots() const { return free_count_; }
    constexpr bool full() const { return free_count_ == 0; }
    constexpr bool empty() const { return free_count_ == capacity_; }
    constexpr usize capacity() const { return capacity_; }

  protected:
    constexpr SlotIndex() = default;
    ~SlotIndex() = default;
    /// Arrays owned by the derived class, `capacity` elements each.
    constexpr void use(u64* generations, u16* free, u32 capacity) {
        generations_ = generations;
        free_ = free;
        capacity_ = free_count_ = capacity;
        for (u32 i = 0; i < capacity; ++i) {
            generations_[i] = 0;
            free_[i] = static_cast<u16>(capacity - 1 - i);
        }
    }

  private:
    static constexpr Id first_taken = 1 << 16; // the lowest bit of the generation

    u64* generations_ = nullptr; // odd while the slot is taken: each take() and free() counts it up
    u16* free_ = nullptr;
    u32 capacity_ = 0;
    u32 free_count_ = 0;
};

/// N entries (at most 65536), owned by the table. take() does not reset an entry: the caller must set every member.
template <class T, usize N>
class SlotTable final : public SlotIndex {
    static_assert(N >= 1 && N <= 65536);

  public:
    constexpr SlotTable() { use(generations_.data(), free_.data(), N); }

    /// The entry of an id received from outside; nullptr: unknown, repeated or retired.
    constexpr T* find(Id id) { return has(id) ? &entries_[slot_of(id)] : nullptr; }
    constexpr T* find_slot(u64 slot) { return has_slot(slot) ? &entries_[slot] : nullptr; }
    /// The entry of an id known to be taken.
    constexpr T& operator[](Id id) { return entries_[slot_of(id)]; }
    constexpr T* entries() { return entries_.data(); }

    /// Calls f(id, entry) for every taken entry; f may free() or renew() the id it is called with.
    template <class F>
    constexpr void for_each(F&& f) {
        for (usize slot = 0; slot < N && !empty(); ++slot) {
            if (has_slot(slot)) {
                f(id_of(static_cast<u16>(slot)), entries_[slot]);
            }
        }
    }

  private:
    std::array<T, N> entries_{};
    std::array<u64, N> generations_{};
    std::array<u16, N> free_{};
};

} // namespace fl::io
