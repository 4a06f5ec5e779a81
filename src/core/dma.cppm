// Memory that devices read and write.
export module core.dma;
import core.std;
import core.result;

export namespace fl {

inline constexpr u64 page_size = 4096;

/// A run of memory that is contiguous for the processor and for the device. Does not own it. `bus` is the address that
/// a device uses (the guest-physical address: there is no IOMMU here). Where DMA must not cross a boundary the driver
/// splits.
struct DmaSpan {
    std::byte* data = nullptr;
    u64 bus = 0;
    u32 size = 0;

    constexpr DmaSpan subspan(u32 offset, u32 length) const { return {data + offset, bus + offset, length}; }
    constexpr std::span<std::byte> bytes() const { return {data, size}; }
    constexpr bool empty() const { return size == 0; }
};

class DmaBuffer;

/// Takes memory out of use for good: a device may still write to it, or read it, whatever becomes of its owner. A
/// DmaBuffer that holds any of it is not given back. From any processor. There is room for 64 spans; after that nothing
/// is given back any more.
void condemn(DmaSpan span);
bool is_condemned(DmaSpan span);
/// For tests, where the end of a machine is not the end of the program.
void pardon_all();

/// Where DMA memory comes from: frames in the kernel, the heap in host tests.
class DmaAllocator {
  public:
    /// `size` bytes (rounded up to whole pages), zeroed, page-aligned, physically contiguous, wholly below `limit`.
    virtual Result<DmaSpan> allocate(u32 size, u64 limit) = 0;
    virtual void free(DmaSpan span) = 0;
    Result<DmaBuffer> buffer(u32 size, u64 limit = ~u64{0});

  protected:
    ~DmaAllocator() = default;
};

/// Owns DMA memory. `abandon()` gives it up for good: for memory that the other side may still write after a fault.
/// What was condemned is given up, too.
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
        if (from_ != nullptr && span_.data != nullptr && !is_condemned(span_)) {
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
