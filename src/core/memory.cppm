// Physical memory in frames of 4 KiB: a sorted list of free ranges, so that memory is neither touched nor mapped before
// its first use. Not thread-safe, and not for interrupt handlers.
export module core.memory;
import core.std;
import core.result;

export namespace fl {

inline constexpr u64 frame_size = 4096;
/// Frames below this address are allocated only on request: the firmware uses some, and processors start there.
inline constexpr u64 low_memory_end = 0x100000;

/// A request for contiguous frames.
struct FrameRequest {
    u64 frames = 1;
    u64 alignment = frame_size; // bytes, a power of two
    u64 floor = low_memory_end; // bytes: lowest address
    u64 limit = ~u64{0};        // bytes: end of the allocation is at most this
};

class FrameAllocator {
  public:
    static constexpr usize capacity = 1024; // free ranges
    struct Range {
        u64 base; // bytes, multiples of frame_size
        u64 size;
    };

    /// Adds the whole frames in a range. Page 0 is left out; overlap with free memory counts once.
    void add(u64 base, u64 size);
    /// Removes every frame that the range touches from the free frames. Frames that are not free are unaffected.
    void reserve(u64 base, u64 size);
    /// Allocates contiguous frames at the highest address that fits; not zeroed. Error{exhausted} reports the requested
    /// and the free bytes.
    Result<u64> allocate(const FrameRequest& request);
    /// Frees frames from allocate(), possibly in parts. Panics if any of them is free already.
    void free(u64 base, u64 frames);

    u64 free_bytes() const { return free_bytes_; }
    /// Bytes lost because they were freed while the list of ranges was full.
    u64 lost_bytes() const { return lost_bytes_; }
    std::span<const Range> ranges() const { return {ranges_.data(), count_}; }

  private:
    usize first_ending_after(u64 address) const;
    bool insert(usize at, Range range);
    void remove(usize at);

    std::array<Range, capacity> ranges_{};
    usize count_ = 0;
    u64 free_bytes_ = 0;
    u64 lost_bytes_ = 0;
};

/// Allocates a frame that a startup IPI can address: below 1 MiB, and not one of the reserved vectors 0xa0 to 0xbf
/// [SDM-3 9.4.4.1]. Nothing else is assumed about the layout: a PC has adapters and firmware from 640 KiB up, Xen's PVH
/// has memory everywhere. Page 0 is never free.
Result<u64> allocate_start_frame(FrameAllocator& from);

} // namespace fl
