// Mapping memory for a device: which bus addresses it is given for a buffer, and the copy through other memory where
// the device does not reach the buffer, or not as it lies.
//
// A mapper belongs to one queue, as the queue belongs to one processor: nothing is locked, and nothing is allocated for
// an I/O. A driver keeps a DmaMapping for each command that it may have under way. Two models:
//
//   IdentityMapper  the bus address is the guest-physical address
//   BounceMapper    the same where the limits are met; else the data goes through a bounded pool of pages
//
// A driver that checks DmaLimits::admits() first has no mapping, and no cost, for the memory that the device reaches.
//
// An IOMMU would be a third model: map() takes a range of I/O virtual addresses from a space of the queue's own, enters
// the frames, and gives the range as segments; unmap() removes them and invalidates the IOTLB before the range is used
// again; `admits` would be false for everything. Memory shared with the host of a confidential guest is BounceMapper
// with a DmaAllocator that gives shared pages, and limits that admit nothing.
export module core.dma_mapper;
import core.std;
import core.dma;
import core.result;

export namespace fl {

/// As the device sees it: to_device is read by it (a disk's write), from_device is written.
enum class DmaDirection : u8 { to_device, from_device, both };

/// What a device's engine takes.
struct DmaLimits {
    u64 highest = ~u64{0};      // the last address that it reaches
    u64 boundary = 0;           // a power of two of which no segment crosses a multiple; 0: none
    u32 max_segment = ~u32{0};  // bytes of one segment
    u32 max_segments = ~u32{0}; // of one mapping
    u32 alignment = 1;          // of each segment's address: a power of two, at most max_segment, boundary and a page
    u32 granule = 1;            // a mapping that cannot hold everything holds a multiple of it: the sector size

    /// The device reaches the span as it lies; in how many segments is another question.
    constexpr bool admits(DmaSpan span) const {
        const u64 last = span.bus + span.size - 1;
        return (last <= highest && span.bus <= last && span.bus % alignment == 0) || span.empty();
    }
};

struct DmaSegment {
    u64 bus = 0;
    u32 size = 0; // bytes, never 0
};

/// A command's buffer as its device sees it, and what ends that. `room` is the driver's and outlives the mapping.
class DmaMapping {
  public:
    constexpr DmaMapping() = default;
    constexpr explicit DmaMapping(std::span<DmaSegment> room) : room_(room) {}
    DmaMapping(const DmaMapping&) = delete;
    DmaMapping& operator=(const DmaMapping&) = delete;

    std::span<const DmaSegment> segments() const { return {room_.data(), count_}; }
    /// Of the buffer, from its begin.
    u32 bytes() const { return bytes_; }
    /// Between map() and unmap() or abandon().
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
    u16 first_page_ = no_page; // of those that it goes through, in order
    u16 last_page_ = no_page;
    DmaDirection direction_ = DmaDirection::both;
    bool active_ = false;
};

class DmaMapper {
  public:
    /// Describes `spans`, one after the other, to the device; with to_device and both, what is bounced is copied out.
    /// Neighbours in the address space become one segment. Returns the bytes that are mapped: all, or as much from the
    /// begin as fits into the segments or the pool, a multiple of `granule`. The memory belongs to the device until
    /// unmap().
    /// Error{busy}: the pool has no room now; there will be some when another mapping ends. Error{exhausted}: there is
    /// no memory for a pool at all. Error{not_supported}: this model cannot meet the limits. Error{bad_argument}: the
    /// limits contradict each other, or have no room for a granule. Nothing is mapped then.
    virtual Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                            DmaMapping& mapping) = 0;
    /// The device has ended with it, or cannot access anything any more. `spans`: as for map(), to copy back what was
    /// bounced from the device; empty when nobody wants the data (an error, or the buffer's owner is gone). What is in
    /// quarantine [core.dma] is not used again before it is released. A mapping that is not active is a panic.
    virtual void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) = 0;
    /// The mapping ends, and the device has not let go: what it reaches stays out of use until reclaim(), or for good.
    virtual void abandon(DmaMapping& mapping) = 0;
    /// The device can no longer access anything that was abandoned.
    virtual void reclaim() = 0;

  protected:
    ~DmaMapper() = default;
};

/// Bus address and guest-physical address are the same, and there is no pool: for devices that reach all memory.
class IdentityMapper final : public DmaMapper {
  public:
    Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                    DmaMapping& mapping) override;
    void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) override;
    void abandon(DmaMapping& mapping) override;
    void reclaim() override {}
};

/// Pages that data is copied through: taken last in, first out, so that the same few stay in the cache. `Capacity`:
/// pages at most; it grows by `Chunk` pages, which are contiguous.
template <u32 Capacity, u32 Chunk>
class BouncePool {
    static_assert(Capacity % Chunk == 0 && Capacity < 0xffff);

  public:
    static constexpr u32 capacity = Capacity;
    static constexpr u32 chunk_bytes = Chunk * static_cast<u32>(page_size);

    u32 size() const { return size_; }
    u32 available() const { return available_; }
    bool full() const { return size_ == Capacity; }
    /// `memory`: chunk_bytes of it. Not when it is full.
    void add(DmaBuffer memory) {
        for (u32 i = 0; i < Chunk; ++i) {
            data_[size_ + i] = memory.data() + i * page_size;
            free_[available_++] = static_cast<u16>(size_ + i);
        }
        memory_[size_ / Chunk] = std::move(memory);
        size_ += Chunk;
    }
    /// Not when none is available.
    u16 take() { return free_[--available_]; }
    void give(u16 page) { free_[available_++] = page; }
    std::byte* data(u32 page) const { return data_[page]; }
    DmaSpan span(u32 page) const {
        return memory_[page / Chunk].span().subspan(page % Chunk * static_cast<u32>(page_size),
                                                    static_cast<u32>(page_size));
    }
    /// The memory goes back, but for what is in quarantine.
    void clear() {
        memory_ = {};
        size_ = available_ = 0;
    }
    /// The memory is given up for good.
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

/// What the limits do not admit goes through pages below DmaLimits::highest, which are allocated in chunks when they
/// are needed first and kept. One device, so that the limits are always the same.
class BounceMapper final : public DmaMapper {
  public:
    static constexpr u32 max_pages = 64;
    static constexpr u32 chunk_pages = 16;

    /// `most_bytes`: of the pool, whole chunks (64 KiB) up to 256 KiB. `from` outlives the mapper.
    BounceMapper(DmaAllocator& from, u32 most_bytes)
        : from_(from), most_pages_(std::min(most_bytes / static_cast<u32>(page_size), max_pages)) {}
    BounceMapper(const BounceMapper&) = delete;
    BounceMapper& operator=(const BounceMapper&) = delete;
    /// Memory that was abandoned does not go back before it is released from quarantine.
    ~BounceMapper();

    Result<u32> map(std::span<const DmaSpan> spans, DmaDirection direction, const DmaLimits& limits,
                    DmaMapping& mapping) override;
    void unmap(DmaMapping& mapping, std::span<const DmaSpan> spans) override;
    void abandon(DmaMapping& mapping) override;
    void reclaim() override;

    /// Pages that are neither in a mapping nor in quarantine.
    u32 available() const { return pool_.available(); }

  private:
    // What a page that is in use holds.
    struct Use {
        u32 offset; // in the mapped bytes
        u32 size;
        u16 next; // of the same mapping, or of those in quarantine
    };
    Result<void> make_room(const DmaLimits& limits);
    void take_back(u16 page);

    DmaAllocator& from_;
    u32 most_pages_;
    u32 in_use_ = 0; // pages in mappings
    u16 held_ = DmaMapping::no_page;
    BouncePool<max_pages, chunk_pages> pool_;
    std::array<Use, max_pages> uses_{};
};

} // namespace fl
