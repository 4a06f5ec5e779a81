// The heap: size classes for small blocks, an address-ordered list of runs for the rest. Not for hot paths (io.block
// allocates nothing) and not for interrupt handlers; the caller serialises.
export module core.heap;
import core.std;

export namespace fl {

class Heap {
  public:
    static constexpr usize granule = 16;
    // bytes, header included
    static constexpr std::array<usize, 12> classes{32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048};
    static constexpr usize slab = 4096; // what a class takes from the runs at once

    constexpr Heap() = default;
    Heap(const Heap&) = delete;
    Heap& operator=(const Heap&) = delete;

    /// Gives the heap memory for good; parts are joined with their neighbours.
    void add(std::span<std::byte> memory);
    /// At least `size` bytes at a multiple of `alignment` (a power of two), or nullptr. Zero bytes are a block of their
    /// own.
    void* allocate(usize size, usize alignment = granule);
    /// Takes back a block; nullptr is nothing. A block that is not from here, or freed twice, is a panic.
    void free(void* block);

    u64 allocations() const { return allocations_; }
    usize blocks_in_use() const { return in_use_; }
    /// Bytes in runs (not in the classes' free lists).
    usize free_bytes() const;
    /// What add() must be given for allocate(size, alignment) to succeed for certain.
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
    // Stands before every block in use.
    struct Header {
        u32 magic;
        u16 size_class; // index, or large
        u16 back;       // granules from the begin of the memory to this header
        u64 size;       // of the run, when large
    };
    static_assert(sizeof(Header) == granule && sizeof(Run) == granule);
    static constexpr u32 alive = 0x45564c41;
    static constexpr u32 dead = 0x44414544;
    static constexpr u16 large = 0xffff;

    std::byte* take_run(usize size);
    void give_run(std::byte* memory, usize size);
    std::byte* take_class(usize index);

    std::array<Free*, classes.size()> free_{};
    Run* runs_ = nullptr; // by address
    u64 allocations_ = 0;
    usize in_use_ = 0;
};

} // namespace fl
