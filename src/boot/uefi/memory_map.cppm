// Converts the firmware's memory map (GetMemoryMap()) into BootInfo's ranges and into the windows that the provisional
// page tables cover.
module;
#include <cstddef>
export module boot.uefi.memory_map;
import core.std;
import core.result;
import boot.handoff;

export namespace fl::boot::uefi {

/// EFI_MEMORY_DESCRIPTOR [UEFI-2.10 §7.2.3]. The stride of the firmware's array is separate, and never smaller than
/// this.
struct MemoryDescriptor {
    u32 type; // MemoryType
    u32 padding;
    u64 physical_start; // multiple of 4096
    u64 virtual_start;
    u64 page_count; // of 4096 bytes
    u64 attributes;
};
static_assert(sizeof(MemoryDescriptor) == 40);
static_assert(offsetof(MemoryDescriptor, type) == 0 && offsetof(MemoryDescriptor, padding) == 4);
static_assert(offsetof(MemoryDescriptor, physical_start) == 8 && offsetof(MemoryDescriptor, virtual_start) == 16);
static_assert(offsetof(MemoryDescriptor, page_count) == 24 && offsetof(MemoryDescriptor, attributes) == 32);

/// EFI_MEMORY_TYPE [UEFI-2.10 §7.2.1]; values from 0x70000000 are defined by firmware vendors and operating systems.
enum class MemoryType : u32 {
    reserved,
    loader_code,
    loader_data,
    boot_services_code,
    boot_services_data,
    runtime_services_code,
    runtime_services_data,
    conventional,
    unusable,
    acpi_reclaim,
    acpi_nvs,
    mapped_io,
    mapped_io_ports,
    pal_code,
    persistent,
    unaccepted,
};

inline constexpr u64 attribute_special_purpose = 0x40000; // EFI_MEMORY_SP: set aside for drivers that ask for it
inline constexpr u64 attribute_runtime = u64{1} << 63;    // EFI_MEMORY_RUNTIME: the firmware keeps using it

/// The kernel's use of a range after boot services end. A type not known to be free is reserved.
MemoryKind kind_of(u32 type, u64 attributes);

/// Adds the map's ranges to `info`, sorted, with adjacent ranges of one kind merged. Usable memory is added first: if
/// the map has more ranges than the table has entries (ranges_truncated), ranges of the other kinds are at least cut
/// out of it. `info.kernel_size` must still be 0.
Result<void> add_memory_map(BootInfo& info, std::span<const std::byte> map, u64 stride);

/// A range of physical addresses, in whole GiB.
struct Window {
    u64 begin; // bytes, multiple of 1 GiB
    u64 end;   // exclusive; multiple of 1 GiB
};

/// The address ranges that the provisional page tables identity-map: the first 4 GiB and every GiB that holds memory.
/// Sorted and disjoint; on overflow the two closest windows are merged.
class Windows {
  public:
    static constexpr usize max_windows = 16;
    static constexpr u64 gib = u64{1} << 30;
    static constexpr u64 limit = u64{1} << 47; // the lower half of a 48-bit address space; memory above is left out

    Windows() { add(0, 4 * gib); }
    void add(u64 base, u64 size);
    std::span<const Window> view() const { return {windows_.data(), count_}; }

  private:
    std::array<Window, max_windows + 1> windows_{};
    usize count_ = 0;
};

/// The windows that cover all memory of the map; device ranges are excluded.
Result<Windows> windows_of(std::span<const std::byte> map, u64 stride);

} // namespace fl::boot::uefi
