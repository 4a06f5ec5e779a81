// Ring access to memory shared with a peer: the concept and the two models in use. Others are in test/model (a model
// checker's memory) and in io.ring.hostile.
export module io.ring.memory;
import core.std;

export namespace fl::io {

/// Memory shared by two sides. A small handle, copied into the ring. All access is by value: no reference into shared
/// memory leaves the model, because the peer may change a byte between two reads of it. Offsets are in bytes from the
/// start of the memory; words are naturally aligned (create() checks that once); byte copies are unordered.
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

/// Accesses shared memory by single machine instructions; used by BasicMappedMemory outside of tests. `at` is aligned
/// to the width of W, an unsigned integer of 1, 2, 4 or 8 bytes.
struct VolatileAccess {
    template <class W>
    static W read(const std::byte* at) {
        return *reinterpret_cast<const volatile W*>(at);
    }
    template <class W>
    static void write(std::byte* at, W value) {
        *reinterpret_cast<volatile W*>(at) = value;
    }
};

/// Pages shared with a device or hypervisor. Does not own them. `base` is 8-byte aligned.
///
/// copy_out() and copy_in() access every byte exactly once, in ascending order, by naturally aligned accesses of 8,
/// 4, 2 and 1 bytes, each the widest that the alignment and the remaining bytes allow. Thus a naturally aligned field
/// of 2, 4 or 8 bytes that lies wholly within the copied range is accessed once and never torn. The copies are
/// unordered: ordering comes from the acquire loads and release stores of words.
template <class Access>
class BasicMappedMemory {
  public:
    BasicMappedMemory() = default;
    BasicMappedMemory(std::byte* base, usize size) : base_(base), size_(size) {}

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
    // Always inlined: callers copy entries of constant size, which become a few moves.
    [[gnu::always_inline]] inline void copy_out(usize offset, std::byte* into, usize count) const {
        const std::byte* from = base_ + offset;
        if (offset % 8 == 4 && count >= 4) { // the used ring of a split virtqueue
            read<u32>(from, into);
            from += 4;
            into += 4;
            count -= 4;
        } else if (offset % 8 != 0) [[unlikely]] {
            const usize head = read_to_alignment(from, into, offset, count);
            from += head;
            into += head;
            count -= head;
        }
        for (; count >= 8; count -= 8, from += 8, into += 8) {
            read<u64>(from, into);
        }
        if ((count & 4) != 0) {
            read<u32>(from, into);
            from += 4;
            into += 4;
        }
        if ((count & 2) != 0) {
            read<u16>(from, into);
            from += 2;
            into += 2;
        }
        if ((count & 1) != 0) {
            read<u8>(from, into);
        }
    }
    [[gnu::always_inline]] inline void copy_in(usize offset, const std::byte* from, usize count) {
        std::byte* into = base_ + offset;
        if (count == 2 && offset % 2 == 0) { // the available ring of a split virtqueue
            write<u16>(into, from);
            return;
        }
        if (offset % 8 != 0) [[unlikely]] {
            const usize head = write_to_alignment(into, from, offset, count);
            from += head;
            into += head;
            count -= head;
        }
        for (; count >= 8; count -= 8, from += 8, into += 8) {
            write<u64>(into, from);
        }
        if ((count & 4) != 0) {
            write<u32>(into, from);
            from += 4;
            into += 4;
        }
        if ((count & 2) != 0) {
            write<u16>(into, from);
            from += 2;
            into += 2;
        }
        if ((count & 1) != 0) {
            write<u8>(into, from);
        }
    }

  private:
    // Not std::memcpy(), which a freestanding build calls even for 8 bytes.
    template <class W>
    [[gnu::always_inline]] static void read(const std::byte* from, std::byte* into) {
        const W value = Access::template read<W>(from);
        __builtin_memcpy(into, &value, sizeof(W));
    }
    template <class W>
    [[gnu::always_inline]] static void write(std::byte* into, const std::byte* from) {
        W value;
        __builtin_memcpy(&value, from, sizeof(W));
        Access::template write<W>(into, value);
    }
    /// Width in bytes of the first access at `offset`, which is not a multiple of 8, with `count` (>= 1) bytes left.
    static usize first_width(usize offset, usize count) {
        return std::min(usize{1} << std::countr_zero(offset), std::bit_floor(count));
    }
    /// Copies up to the next multiple of 8, or to the end; returns the number of bytes. Not inlined: rare.
    [[gnu::noinline]] static usize read_to_alignment(const std::byte* from, std::byte* into, usize offset,
                                                     usize count) {
        usize done = 0;
        while ((offset + done) % 8 != 0 && done != count) {
            const usize width = first_width(offset + done, count - done);
            switch (width) {
            case 4: read<u32>(from + done, into + done); break;
            case 2: read<u16>(from + done, into + done); break;
            default: read<u8>(from + done, into + done); break;
            }
            done += width;
        }
        return done;
    }
    [[gnu::noinline]] static usize write_to_alignment(std::byte* into, const std::byte* from, usize offset,
                                                      usize count) {
        usize done = 0;
        while ((offset + done) % 8 != 0 && done != count) {
            const usize width = first_width(offset + done, count - done);
            switch (width) {
            case 4: write<u32>(into + done, from + done); break;
            case 2: write<u16>(into + done, from + done); break;
            default: write<u8>(into + done, from + done); break;
            }
            done += width;
        }
        return done;
    }

    template <class W>
    W& word(usize offset) const {
        return *reinterpret_cast<W*>(base_ + offset);
    }
    std::byte* base_ = nullptr;
    usize size_ = 0;
};
using MappedMemory = BasicMappedMemory<VolatileAccess>;

/// Ordinary memory of the same program, for tests and for rings between processors: plain copies, atomic indices.
/// Does not own the storage (8-byte aligned).
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
