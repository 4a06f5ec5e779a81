// What a ring's shared memory looks like from our side: the concept and its two models in use. Others stand in
// test/model (a checker's memory) and in io.ring.hostile.
export module io.ring.memory;
import core.std;

export namespace fl::io {

/// Memory that two sides share. A small handle, copied into the ring. Everything is by value: no reference into shared
/// memory leaves the model, since the other side may change a byte between two reads of it. Offsets are in bytes from
/// the handle's beginning; words are naturally aligned (create() checks that once), the byte copies are not ordered by
/// themselves.
template <class M>
concept RingMemory =
    std::copyable<M> && requires(M& memory, usize offset, u16 half, u32 word, const std::byte* from, std::byte* into) {
        { memory.size() } -> std::convertible_to<usize>;
        { memory.template load_relaxed<u32>(offset) } -> std::same_as<u32>;
        { memory.template load_acquire<u32>(offset) } -> std::same_as<u32>;
        { memory.template load_acquire<u16>(offset) } -> std::same_as<u16>;
        memory.template store_relaxed<u32>(offset, word);
        memory.template store_release<u32>(offset, word);
        memory.template store_release<u16>(offset, half);
        memory.full_barrier(); // orders earlier stores before later loads
        memory.copy_out(offset, into, usize{});
        memory.copy_in(offset, from, usize{});
    };

/// Pages that a device or a hypervisor shares with us: every byte is read exactly once and written exactly once, by
/// volatile accesses as wide as the alignment allows. Does not own the pages. `base` is 8-byte aligned.
class MappedMemory {
  public:
    MappedMemory() = default;
    MappedMemory(std::byte* base, usize size) : base_(base), size_(size) {}

    usize size() const { return size_; }
    std::byte* base() const { return base_; }
    template <class W>
    W load_relaxed(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_relaxed);
    }
    template <class W>
    W load_acquire(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_acquire);
    }
    template <class W>
    void store_relaxed(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_relaxed);
    }
    template <class W>
    void store_release(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_release);
    }
    void full_barrier() const { std::atomic_thread_fence(std::memory_order_seq_cst); }
    // Inlined always: the size of an entry is a constant where it is copied, and then each copy is a few moves.
    [[gnu::always_inline]] inline void copy_out(usize offset, std::byte* into, usize count) const {
        const std::byte* from = base_ + offset;
        if (offset % 8 == 0) {
            for (; count >= 8; count -= 8, from += 8, into += 8) {
                const u64 value = *reinterpret_cast<const volatile u64*>(from);
                std::memcpy(into, &value, 8);
            }
        }
        for (; count != 0; --count, ++from, ++into) {
            *into = *static_cast<const volatile std::byte*>(from);
        }
    }
    [[gnu::always_inline]] inline void copy_in(usize offset, const std::byte* from, usize count) {
        std::byte* into = base_ + offset;
        if (offset % 8 == 0) {
            for (; count >= 8; count -= 8, from += 8, into += 8) {
                u64 value;
                std::memcpy(&value, from, 8);
                *reinterpret_cast<volatile u64*>(into) = value;
            }
        }
        for (; count != 0; --count, ++from, ++into) {
            *static_cast<volatile std::byte*>(into) = *from;
        }
    }

  private:
    template <class W>
    W& word(usize offset) const {
        return *reinterpret_cast<W*>(base_ + offset);
    }
    std::byte* base_ = nullptr;
    usize size_ = 0;
};

/// Ordinary memory of the same program, for tests and for rings between processors: plain copies, atomic indices. Does
/// not own the storage (8-byte aligned).
class FlatMemory {
  public:
    FlatMemory() = default;
    explicit FlatMemory(std::span<std::byte> storage) : storage_(storage) {}

    usize size() const { return storage_.size(); }
    template <class W>
    W load_relaxed(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_relaxed);
    }
    template <class W>
    W load_acquire(usize offset) const {
        return std::atomic_ref<W>(word<W>(offset)).load(std::memory_order_acquire);
    }
    template <class W>
    void store_relaxed(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_relaxed);
    }
    template <class W>
    void store_release(usize offset, W value) {
        std::atomic_ref<W>(word<W>(offset)).store(value, std::memory_order_release);
    }
    void full_barrier() const { std::atomic_thread_fence(std::memory_order_seq_cst); }
    void copy_out(usize offset, std::byte* into, usize count) const {
        std::memcpy(into, storage_.data() + offset, count);
    }
    void copy_in(usize offset, const std::byte* from, usize count) {
        std::memcpy(storage_.data() + offset, from, count);
    }

  private:
    template <class W>
    W& word(usize offset) const {
        return *reinterpret_cast<W*>(storage_.data() + offset);
    }
    std::span<std::byte> storage_;
};
static_assert(RingMemory<MappedMemory> && RingMemory<FlatMemory>);

} // namespace fl::io
