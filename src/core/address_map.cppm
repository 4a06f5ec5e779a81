// Layout of the kernel's half of the address space, and the mapping of device registers in it. With four-level page
// tables the half has 128 TiB [SDM-3 4.5]; physical addresses may have 52 bits (4 PiB), so not all of them can be
// mapped at a fixed offset.
export module core.address_map;
import core.std;
import core.paging;
import core.result;

export namespace fl {

/// A range of virtual addresses, in bytes.
struct AddressRegion {
    u64 begin;
    u64 size;
    constexpr u64 end() const { return begin + size; } // 0: the end of the address space
    constexpr bool has(u64 address) const { return address - begin < size; }
};

/// RAM, at a fixed offset from its physical address; this much of it can be used.
inline constexpr AddressRegion direct_map{0xffff800000000000, u64{1} << 46};
/// Device registers at physical addresses below 32 TiB, at a fixed offset.
inline constexpr AddressRegion mmio_map{0xffffc00000000000, u64{1} << 45};
/// Stacks of processors other than the first.
inline constexpr AddressRegion stack_map{0xffffe00000000000, 1_GiB};
/// Device registers at higher physical addresses: windows, allocated in sequence.
inline constexpr AddressRegion mmio_windows{0xffffe80000000000, u64{1} << 43};
/// The address range that the image is linked for [psABI §3.5.1, the kernel code model: the last 2 GiB].
inline constexpr AddressRegion image_map{0xffffffff80000000, 2_GiB};

inline constexpr std::array address_regions{direct_map, mmio_map, stack_map, mmio_windows, image_map};
/// True if the regions are ascending, disjoint and in the upper half of the address space.
constexpr bool are_disjoint(std::span<const AddressRegion> regions) {
    for (usize i = 0; i < regions.size(); ++i) {
        const AddressRegion& r = regions[i];
        const u64 last = r.begin + (r.size - 1);
        if (r.size == 0 || r.begin < 0xffff800000000000 || last < r.begin ||
            (i + 1 < regions.size() && last >= regions[i + 1].begin)) {
            return false;
        }
    }
    return true;
}
static_assert(are_disjoint(address_regions));

/// Maps those pages touched by [physical, physical + size) that are not yet mapped, at window + physical. Mapped pages
/// are unchanged. Errors as AddressSpace::map().
Result<void> map_missing(AddressSpace& space, u64 window, u64 physical, u64 size, Protection protection);

/// Maps device registers at any physical address. The page tables are its only record. Not thread-safe.
class MmioSpace {
  public:
    constexpr explicit MmioSpace(AddressSpace& space) : space_(space) {}

    /// Maps [physical, physical + size) uncached, writable and not executable, permanently, and returns its virtual
    /// address. The same range yields the same address. Error{bad_argument}: size is 0, or no such physical address;
    /// Error{exhausted}: no page table, or no window left.
    Result<u64> map(u64 physical, u64 size);
    /// Error{protocol}: a page of [physical, physical + size) is mapped as RAM (in direct_map).
    Result<void> check_no_memory(u64 physical, u64 size) const;
    /// The physical address for an address that map() returned.
    std::optional<u64> physical_of(u64 address) const;

  private:
    Result<u64> window(u64 physical, u64 size);

    AddressSpace& space_;
    u64 windows_end_ = mmio_windows.begin; // windows above this are unused
};

} // namespace fl
