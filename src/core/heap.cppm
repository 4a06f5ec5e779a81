// The heap: size classes for small blocks, an address-ordered list of runs for larger ones. Not for hot paths (io.block
// does not allocate) and not for interrupt handlers; callers must serialise.
export module core.heap;
import core.std;

export namespace fl {

class Heap {
  public:
    static constexpr usize granule = 16;
    // block sizes in bytes, header included
    static constexpr std::array<usize, 12> classes{32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048};
    static constexpr usize slab = 4096; // bytes that a class takes from the runs at a time

    constexpr Heap() = default;
    Heap(const Heap&) = delete;
    Heap& operator=(const Heap&) = delete;

    /// Adds memory permanently; adjacent parts are merged.
    void add(std::span<std::byte> memory);
    /// At least `size` bytes at a multiple of `alignment` (a power of two), or nullptr. A size of 0 yields a distinct
    /// block.
    void* allocate(usize size, usize alignment = granule);
    /// Frees a block; nullptr is ignored. Panics on a foreign block or a double free.
    void free(void* block);

    u64 allocations() const { return allocations_; }
    usize blocks_in_use() const { return in_use_; }
    /// Bytes in runs, excluding the classes' free lists.
    usize free_bytes() const;
    /// Bytes to add() so that allocate(size, alignment) is certain to succeed.
    static constexpr usize bytes_for(usize size, usize alignment) {
        return align_up(size + alignment + 2 * granule, slab) + granule;
    }

  private:
    struct Free {
        Free* next;
    };
    struct Run {
        usize size; // bytes, this header included; a multiple of the granule
        Run* next;
    };
    // Precedes every block in use.
    struct Header {
        u32 magic;
        u16 size_class; // index, or large
        u16 back;       // distance from the start of the memory to this header, in granules
        u64 size;       // of the run, for large blocks
    };
    static_assert(sizeof(Header) == granule && sizeof(Run) == granule);
    static constexpr u32 alive = 0x45564c41;
    static constexpr u32 dead = 0x44414544;
    static constexpr u16 large = 0xffff;

    std::byte* allocate_run(usize size);
    void free_run(std::byte* memory, usize size);
    std::byte* allocate_class(usize index);

    std::array<Free*, classes.size()> free_{};
    Run* runs_ = nullptr; // sorted by address
    u64 allocations_ = 0;
    usize in_use_ = 0;
};

} // namespace fl
