// Device registers in memory: a mapped region and its mapper. Portable: core.machine.memory implements the kernel's
// mapper; tests use ordinary memory or a model of the device.
export module core.mmio;
import core.std;
import core.panic;
import core.result;
import core.registers;

export namespace fl {

/// For tests: handles accesses to a region in place of memory, so that a fake device can act on each one and a script
/// can check their order. `at` is the offset in the mapped region; `width` is 1, 2, 4 or 8 bytes.
class MmioModel {
  public:
    /// Returns the value of a `width`-byte register at offset `at`.
    virtual u64 read(u64 at, u32 width) = 0;
    virtual void write(u64 at, u32 width, u64 value) = 0;

  protected:
    ~MmioModel() = default;
};

/// A mapped region of device registers; a value type. Models RegisterAccess for all four widths.
///
/// Each access is one `mov` of exactly this width: an instruction that every hypervisor decodes. Accesses are in
/// program order with other memory accesses: stores before a write() are visible to a device that reads memory because
/// of it, and loads after a read() follow it. This costs nothing on x86: uncached accesses are strongly ordered [SDM-3
/// 11.3], so only the compiler needs a barrier.
///
/// Bounds are checked once, when the region is mapped (`size` of MmioMapper::map, part()). Test builds also check each
/// access, and panic on a violation.
class Mmio {
  public:
    constexpr Mmio() = default;
    /// `base`: mapped for `size` bytes, uncached for device registers.
    Mmio(std::byte* base, u64 size) : base_(base), size_(size) {}
#if __STDC_HOSTED__
    Mmio(MmioModel& model, u64 size) : size_(size), model_(&model) {}
#endif

    u64 size() const { return size_; }
    /// The registers [at, at + size). Error{protocol}: the region is too small.
    Result<Mmio> part(u64 at, u64 size) const {
        if (at > size_ || size > size_ - at) {
            return Error(Code::protocol, "a device places registers outside of the region that holds them", size_,
                         at + size);
        }
        Mmio inner = *this;
        inner.size_ = size;
#if __STDC_HOSTED__
        inner.first_ = first_ + at;
#endif
        inner.base_ = base_ == nullptr ? nullptr : base_ + at;
        return inner;
    }

    /// `at`: a multiple of the width; the whole register must lie in the region.
    template <RegisterValue T>
    T read(u64 at) const {
#if __STDC_HOSTED__
        check(at, sizeof(T));
        if (model_ != nullptr) {
            return static_cast<T>(model_->read(first_ + at, sizeof(T)));
        }
#endif
        return load(reinterpret_cast<const volatile T*>(base_ + at));
    }
    template <RegisterValue T>
    void write(u64 at, T value) const {
#if __STDC_HOSTED__
        check(at, sizeof(T));
        if (model_ != nullptr) {
            model_->write(first_ + at, sizeof(T), value);
            return;
        }
#endif
        store(reinterpret_cast<volatile T*>(base_ + at), value);
    }

  private:
    static u8 load(const volatile u8* from) {
        u8 value;
        asm volatile("movb %1, %0" : "=q"(value) : "m"(*from) : "memory");
        return value;
    }
    static u16 load(const volatile u16* from) {
        u16 value;
        asm volatile("movw %1, %0" : "=r"(value) : "m"(*from) : "memory");
        return value;
    }
    static u32 load(const volatile u32* from) {
        u32 value;
        asm volatile("movl %1, %0" : "=r"(value) : "m"(*from) : "memory");
        return value;
    }
    static u64 load(const volatile u64* from) {
        u64 value;
        asm volatile("movq %1, %0" : "=r"(value) : "m"(*from) : "memory");
        return value;
    }
    static void store(volatile u8* to, u8 value) { asm volatile("movb %1, %0" : "=m"(*to) : "qi"(value) : "memory"); }
    static void store(volatile u16* to, u16 value) { asm volatile("movw %1, %0" : "=m"(*to) : "ri"(value) : "memory"); }
    static void store(volatile u32* to, u32 value) { asm volatile("movl %1, %0" : "=m"(*to) : "ri"(value) : "memory"); }
    static void store(volatile u64* to, u64 value) { asm volatile("movq %1, %0" : "=m"(*to) : "re"(value) : "memory"); }
#if __STDC_HOSTED__
    void check(u64 at, u64 width) const {
        if (at % width != 0 || at > size_ || width > size_ - at) {
            panic("a register of {} bytes at {:#x} does not lie in its region of {:#x} bytes", width, at, size_);
        }
    }
#endif

    std::byte* base_ = nullptr;
    u64 size_ = 0;
#if __STDC_HOSTED__
    MmioModel* model_ = nullptr;
    u64 first_ = 0; // offset in the modelled region
#endif
};
static_assert(RegisterAccess<const Mmio, u8> && RegisterAccess<const Mmio, u16> && RegisterAccess<const Mmio, u32> &&
              RegisterAccess<const Mmio, u64>);

/// Maps device registers. The object lives as long as the machine.
class MmioMapper {
  public:
    /// Maps the registers at [physical, physical + size), uncached and permanently. `size` is in bytes and not 0; no
    /// alignment is required. The same range yields the same region. Error{bad_argument}: no such physical address on
    /// this processor; Error{protocol}: the range contains RAM; Error{exhausted}: no page tables or no address space
    /// left.
    virtual Result<Mmio> map(u64 physical, u64 size) = 0;

  protected:
    ~MmioMapper() = default;
};

/// A mapper for environments without one: map() always returns Error{not_supported}.
MmioMapper& no_mmio();

} // namespace fl
