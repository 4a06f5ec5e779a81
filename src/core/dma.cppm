// Memory that devices read and write.
export module core.dma;
import core.std;
import core.result;

export namespace fl {

inline constexpr u64 page_size = 4096;

/// A range of memory that is contiguous for the processor and the device. Non-owning. `bus` is the address that a
/// device uses (the guest-physical address: there is no IOMMU here); `size` is in bytes. Drivers split spans at DMA
/// boundaries.
struct DmaSpan {
    std::byte* data = nullptr;
    u64 bus = 0;
    u32 size = 0;

    constexpr DmaSpan subspan(u32 offset, u32 length) const { return {data + offset, bus + offset, length}; }
    constexpr std::span<std::byte> bytes() const { return {data, size}; }
    constexpr bool empty() const { return size == 0; }
};

class DmaBuffer;

/// Quarantines memory that a device may still access, independently of its owner's lifetime: a DmaBuffer that overlaps
/// it is freed not when it is reset or destroyed, but when the last quarantined part has been released. `holder` and
/// `id` identify the access (a queue and its command). Callable on any processor.
void quarantine(DmaSpan span, const void* holder, u64 id = 0);
/// The device can no longer access the memory quarantined under `holder` and `id`, or under `holder` alone.
void release_quarantine(const void* holder, u64 id);
void release_quarantine(const void* holder);
/// `holder` is destroyed while the device may still access its memory: what it has quarantined stays so permanently,
/// and another holder at the same address cannot release it.
void keep_quarantine(const void* holder);
/// True if part of `span` is quarantined.
bool is_quarantined(DmaSpan span);

struct QuarantineState {
    usize spans = 0;     // that a device may still access
    usize buffers = 0;   // whose owners are gone
    bool frozen = false; // out of memory while recording a span or a buffer: no memory is freed from now on
};
QuarantineState quarantine_state();
/// For tests, in which several machines share one process: forgets everything.
void clear_quarantine();

/// Source of DMA memory: frames in the kernel, the heap in host tests.
class DmaAllocator {
  public:
    /// `size` bytes (rounded up to whole pages): zeroed, page-aligned, physically contiguous, wholly below `limit`.
    /// Error{exhausted}: there is no such memory.
    virtual Result<DmaSpan> allocate(u32 size, u64 limit) = 0;
    /// `span`: as returned by allocate().
    virtual void free(DmaSpan span) = 0;
    Result<DmaBuffer> buffer(u32 size, u64 limit = ~u64{0});

  protected:
    ~DmaAllocator() = default;
};

/// For DmaBuffer. True if part of `span` is quarantined: it is then freed to `from` later, which must live that long.
bool keep_quarantined(DmaAllocator& from, DmaSpan span);

/// Owns DMA memory. `abandon()` gives it up permanently: for memory that the device or host may still write after a
/// fault. Quarantined memory is freed later, or never.
class DmaBuffer {
  public:
    DmaBuffer() = default;
    DmaBuffer(DmaAllocator& from, DmaSpan span) : from_(&from), span_(span) {}
    DmaBuffer(DmaBuffer&& other) noexcept
        : from_(std::exchange(other.from_, nullptr)), span_(std::exchange(other.span_, {})) {}
    DmaBuffer& operator=(DmaBuffer&& other) noexcept {
        if (this != &other) {
            reset();
            from_ = std::exchange(other.from_, nullptr);
            span_ = std::exchange(other.span_, {});
        }
        return *this;
    }
    ~DmaBuffer() { reset(); }

    const DmaSpan& span() const { return span_; }
    operator DmaSpan() const { return span_; }
    std::byte* data() const { return span_.data; }
    u64 bus() const { return span_.bus; }
    u32 size() const { return span_.size; }
    explicit operator bool() const { return span_.data != nullptr; }
    void reset() {
        if (from_ != nullptr && span_.data != nullptr && !keep_quarantined(*from_, span_)) {
            from_->free(span_);
        }
        from_ = nullptr;
        span_ = {};
    }
    void abandon() {
        from_ = nullptr;
        span_ = {};
    }

  private:
    DmaAllocator* from_ = nullptr;
    DmaSpan span_;
};

inline Result<DmaBuffer> DmaAllocator::buffer(u32 size, u64 limit) {
    auto span = allocate(size, limit);
    if (!span) {
        return span.error();
    }
    return DmaBuffer(*this, *span);
}

} // namespace fl
