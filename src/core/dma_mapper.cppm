// DMA mapping: the bus addresses that a device uses for a buffer, and bounce buffering where the device cannot reach
// the buffer or its limits forbid the layout.
//
// A mapper belongs to one queue and therefore to one processor: it takes no locks, and it allocates nothing per I/O. A
// driver keeps one DmaMapping for each command that it may have in flight. Two models:
//
//   IdentityMapper  the bus address is the guest-physical address
//   BounceMapper    the same where the limits permit; otherwise data is copied through a bounded pool of pages
//
// A driver that calls DmaLimits::admits() first needs no mapping for memory that the device can reach.
//
// An IOMMU would be a third model: map() allocates a range from the queue's I/O virtual address space, enters the
// frames and returns the range as segments; unmap() removes them and invalidates the IOTLB before the range is reused;
// `admits` is false for everything. For a confidential guest, use BounceMapper with a DmaAllocator that returns memory
// shared with the host, and limits that admit nothing.
export module core.dma_mapper;
import core.std;
import core.dma;
import core.result;

export namespace fl {

/// Seen from the device: to_device is read by it (a disk write), from_device is written by it.
enum class DmaDirection : u8 { to_device, from_device, both };

/// Addressing limits of a device's DMA engine.
struct DmaLimits {
    u64 highest = ~u64{0};      // the last address that the device can reach
    u64 boundary = 0;           // a power of two; no segment crosses a multiple of it; 0: none
    u32 max_segment = ~u32{0};  // maximum bytes per segment
    u32 max_segments = ~u32{0}; // maximum segments per mapping
    u32 alignment = 1;          // of each segment's address: a power of two, at most max_segment, boundary and a page
    u32 granule = 1;            // bytes: a partial mapping is a multiple of it (the sector size)

    /// True if the device can access the span in place. Says nothing about the number of segments.
    constexpr bool admits(DmaSpan span) const {
        const u64 last = span.bus + span.size - 1;
        return (last <= highest && span.bus <= last && span.bus % alignment == 0) || span.empty();
    }
};

/// A range of bus addresses.
struct DmaSegment {
    u64 bus = 0;
    u32 size = 0; // bytes, never 0
};

/// A command's buffer as the device sees it. `room` is owned by the driver and must outlive the mapping.
class DmaMapping {
  public:
    constexpr DmaMapping() = default;
    constexpr explicit DmaMapping(std::span<DmaSegment> room) : room_(room) {}
    DmaMapping(const DmaMapping&) = delete;
    DmaMapping& operator=(const DmaMapping&) = delete;

    std::span<const DmaSegment> segments() const { return {room_.data(), count_}; }
    /// Mapped bytes, counted from the start of the buffer.
    u32 bytes() const { return bytes_; }
    /// True between map() and unmap() or abandon().
    bool active() const { return active_; }
    bool bounced() const { return first_page_ != no_page; }

  private:
    friend class SegmentList;
    friend class IdentityMapper;
    friend class BounceMapper;
    static constexpr u16 no_page = 0xffff;

    std::span<DmaSegment> room_;
    u32 count_ = 0;
    u32 bytes_ = 0;
    u16 first_page_ = no_page; // of its list of bounce pages, in order
    u16 last_page_ = no_page;
    DmaDirection direction_ = DmaDirection::both;
    bool active_ = false;
};

/// Maps buffers for one queue of a device.
class DmaMapper {
  public:
    /// Maps `spans`, in order, for the device. For to_device and both, bounced data is copied into the bounce pages.
    /// Spans that are adjacent in the address space are merged into one segment. Returns the number of bytes mapped,
    /// from the start of the buffer: all, or as many as fit into the segments or the pool, as a multiple of `granule`.
    /// The device owns the memory until unmap().
    /// On an error nothing is mapped. Error{busy}: the pool is full now; retry when another mapping ends.
    /// Error{exhausted}: no memory for a pool at all. Error{not_supported}: this model cannot meet the limits.
    /// Error{bad_argument}: the limits contradict each other, or cannot hold one granule.
    virtual Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                            DmaMapping& mapping) = 0;
    /// Call when the device has completed the command or can no longer access memory. `spans`: as for map(), to copy
    /// back what the device wrote to bounce pages; empty if the data is not needed (an error, or the buffer's owner is
    /// gone). Quarantined memory [core.dma] is not reused before its release. Panics if the mapping is not active.
    virtual void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) = 0;
    /// Ends a mapping whose memory the device may still access. That memory is not reused before reclaim().
    virtual void abandon(DmaMapping& mapping) = 0;
    /// Call when the device can no longer access any abandoned memory.
    virtual void reclaim() = 0;

  protected:
    ~DmaMapper() = default;
};

/// Bus addresses equal guest-physical addresses, without a pool: for devices that reach all memory.
class IdentityMapper final : public DmaMapper {
  public:
    Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                    DmaMapping& mapping) override;
    void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) override;
    void abandon(DmaMapping& mapping) override;
    void reclaim() override {}
};

/// Bounce pages, allocated last in, first out, so that the same few stay in the cache. `Capacity`: maximum number of
/// pages. Grows by `Chunk` physically contiguous pages at a time.
template <u32 Capacity, u32 Chunk>
class BouncePool {
    static_assert(Capacity % Chunk == 0 && Capacity < 0xffff);

  public:
    static constexpr u32 capacity = Capacity;
    static constexpr u32 chunk_bytes = Chunk * static_cast<u32>(page_size);

    u32 size() const { return size_; }
    u32 available() const { return available_; }
    bool full() const { return size_ == Capacity; }
    /// `memory`: chunk_bytes. The pool must not be full.
    void add(DmaBuffer memory) {
        for (u32 i = 0; i < Chunk; ++i) {
            data_[size_ + i] = memory.data() + i * page_size;
            free_[available_++] = static_cast<u16>(size_ + i);
        }
        memory_[size_ / Chunk] = std::move(memory);
        size_ += Chunk;
    }
    /// available() must not be 0.
    u16 take() { return free_[--available_]; }
    void recycle(u16 page) { free_[available_++] = page; }
    std::byte* data(u32 page) const { return data_[page]; }
    DmaSpan span(u32 page) const {
        return memory_[page / Chunk].span().subspan(page % Chunk * static_cast<u32>(page_size),
                                                    static_cast<u32>(page_size));
    }
    /// Frees the memory, except for what is quarantined.
    void clear() {
        memory_ = {};
        size_ = available_ = 0;
    }
    /// Gives the memory up permanently.
    void abandon() {
        for (DmaBuffer& memory : memory_) {
            memory.abandon();
        }
        size_ = available_ = 0;
    }

  private:
    std::array<DmaBuffer, Capacity / Chunk> memory_{};
    std::array<std::byte*, Capacity> data_{};
    std::array<u16, Capacity> free_{};
    u32 size_ = 0;
    u32 available_ = 0;
};

/// Bounces what the limits do not admit through pages below DmaLimits::highest. The pages are allocated in chunks on
/// first use and kept. For a single device: the limits must be the same in each call.
class BounceMapper final : public DmaMapper {
  public:
    static constexpr u32 max_pages = 64;
    static constexpr u32 chunk_pages = 16;

    /// `max_bytes`: maximum size of the pool, in whole chunks (64 KiB) up to 256 KiB. `from` must outlive the mapper.
    BounceMapper(DmaAllocator& from, u32 max_bytes)
        : from_(from), max_pages_(std::min(max_bytes / static_cast<u32>(page_size), max_pages)) {}
    BounceMapper(const BounceMapper&) = delete;
    BounceMapper& operator=(const BounceMapper&) = delete;
    /// Abandoned memory is not freed before it is released from quarantine.
    ~BounceMapper();

    Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                    DmaMapping& mapping) override;
    void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) override;
    void abandon(DmaMapping& mapping) override;
    void reclaim() override;

    /// Pages that are neither mapped nor quarantined.
    u32 available() const { return pool_.available(); }

  private:
    // A page in use.
    struct Use {
        u32 offset; // in the mapped bytes
        u32 size;
        u16 next; // page of the same mapping, or of the quarantine list
    };
    Result<void> make_room(const DmaLimits& limits);
    void free_page(u16 page);

    DmaAllocator& from_;
    u32 max_pages_;
    u32 in_use_ = 0; // pages in mappings
    u16 held_ = DmaMapping::no_page;
    BouncePool<max_pages, chunk_pages> pool_;
    std::array<Use, max_pages> uses_{};
};

} // namespace fl
