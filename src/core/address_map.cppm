// Which part of the kernel's half of the address space is for what, and where device registers are mapped in it. With
// page tables of four levels the half has 128 TiB [SDM-3 4.5]; physical addresses may have 52 bits (4 PiB), so not all
// of them can stand at a fixed distance.
export module core.address_map;
import core.std;
import core.paging;
import core.result;

export namespace fl {

struct AddressRegion {
    u64 begin;
    u64 size;
    constexpr u64 end() const { return begin + size; } // 0: the end of the address space
    constexpr bool has(u64 address) const { return address - begin < size; }
};

/// Memory, at a fixed distance from its physical address; so much of it can be used.
inline constexpr AddressRegion direct_map{0xffff800000000000, u64{1} << 46};
/// Device registers below a physical address of 32 TiB, at a fixed distance too.
inline constexpr AddressRegion mmio_map{0xffffc00000000000, u64{1} << 45};
/// Stacks of further processors.
inline constexpr AddressRegion stack_map{0xffffe00000000000, 1_GiB};
/// Device registers at higher physical addresses: windows, one after the other.
inline constexpr AddressRegion mmio_windows{0xffffe80000000000, u64{1} << 43};
/// Where the image is linked [psABI §3.5.1, the kernel code model: the last 2 GiB].
inline constexpr AddressRegion image_map{0xffffffff80000000, 2_GiB};

inline constexpr std::array address_regions{direct_map, mmio_map, stack_map, mmio_windows, image_map};
/// In ascending order, in the upper half of the address space, without a common address.
constexpr bool are_apart(std::span<const AddressRegion> regions) {
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
static_assert(are_apart(address_regions));

/// Maps what is not yet mapped of the pages that [physical, physical + size) touches, at window + physical. A page that
/// is mapped stays as it is. Errors as AddressSpace::map().
Result<void> map_missing(AddressSpace& space, u64 window, u64 physical, u64 size, Protection protection);

/// Maps device registers wherever the processor has physical addresses. The page tables are its only record. Not
/// protected against use by several processors at once.
class MmioSpace {
  public:
    constexpr explicit MmioSpace(AddressSpace& space) : space_(space) {}

    /// The virtual address of [physical, physical + size), uncached, writable, not executable, for good. The same range
    /// gives the same address. Error{bad_argument}: size 0, or no such physical address; Error{exhausted}: no page
    /// table, or no window.
    Result<u64> map(u64 physical, u64 size);
    /// Error{protocol}: a page of [physical, physical + size) is mapped as memory (in direct_map).
    Result<void> check_no_memory(u64 physical, u64 size) const;
    /// Behind an address that map() gave.
    std::optional<u64> physical_of(u64 address) const;

  private:
    Result<u64> window(u64 physical, u64 size);

    AddressSpace& space_;
    u64 windows_end_ = mmio_windows.begin; // what lies beyond has never been used
};

} // namespace fl
