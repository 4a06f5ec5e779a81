// Physical memory in frames of 4 KiB: a sorted list of free ranges, so that nothing is touched, or even mapped, before
// it is used. One processor at a time, not in interrupt handlers.
export module core.memory;
import core.std;
import core.result;

export namespace fl {

inline constexpr u64 frame_size = 4096;
/// Below this address frames are given out only on demand: the firmware's habits, and what other processors start in.
inline constexpr u64 low_memory_end = 0x100000;

struct FrameRequest {
    u64 frames = 1;
    u64 alignment = frame_size; // bytes, a power of two
    u64 floor = low_memory_end; // bytes: wholly at or above
    u64 limit = ~u64{0};        // bytes: wholly below
};

class FrameAllocator {
  public:
    static constexpr usize capacity = 1024; // free ranges
    struct Range {
        u64 base; // bytes, multiples of frame_size
        u64 size;
    };

    /// Gives the allocator the whole frames of a range for good. Page 0 is left out; what overlaps free memory counts
    /// once.
    void add(u64 base, u64 size);
    /// Takes every frame that the range touches out of the free ones; what is not free there stays as it is.
    void reserve(u64 base, u64 size);
    /// Contiguous frames, the highest that fit; not zeroed. Error{exhausted} says how much was asked for and what is
    /// free.
    Result<u64> allocate(const FrameRequest& request);
    /// Gives back frames from allocate(), in parts if that is wished. Frames that are free already are a panic.
    void free(u64 base, u64 frames);

    u64 free_bytes() const { return free_bytes_; }
    /// Bytes that were given back while the list was full of fragments: out of use from then on.
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

/// A free frame that a startup IPI can name: below 1 MiB, and not one of the reserved vectors 0xa0 to 0xbf [SDM-3
/// 9.4.4.1]. Nothing else is assumed about what lies there: a PC has adapters and firmware from 640 KiB on, Xen's PVH
/// has memory everywhere. Page 0 is never free.
Result<u64> allocate_start_frame(FrameAllocator& from);

} // namespace fl
