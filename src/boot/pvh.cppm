// Converts the structures of a PVH loader into a BootInfo [PVH]. All addresses are untrusted: each is bounds-checked
// before it is read.
module;
#include <cstddef>
export module boot.pvh;
import core.std;
import core.result;
import core.physical;
import boot.handoff;

export namespace fl::boot {

/// hvm_start_info, version 1; version 0 ends before memmap_paddr [PVH: xen/include/public/arch-x86/hvm/start_info.h].
struct HvmStartInfo {
    static constexpr u32 magic_value = 0x336ec578;

    u32 magic;
    u32 version;
    u32 flags;
    u32 module_count;
    u64 modules;
    u64 cmdline;
    u64 rsdp;
    u64 memory_map;
    u32 memory_map_count;
    u32 reserved;
};
static_assert(sizeof(HvmStartInfo) == 56);
static_assert(offsetof(HvmStartInfo, magic) == 0 && offsetof(HvmStartInfo, version) == 4 &&
              offsetof(HvmStartInfo, flags) == 8);
static_assert(offsetof(HvmStartInfo, module_count) == 12 && offsetof(HvmStartInfo, modules) == 16 &&
              offsetof(HvmStartInfo, cmdline) == 24);
static_assert(offsetof(HvmStartInfo, rsdp) == 32 && offsetof(HvmStartInfo, memory_map) == 40 &&
              offsetof(HvmStartInfo, memory_map_count) == 48);
static_assert(offsetof(HvmStartInfo, reserved) == 52);
inline constexpr usize start_info_v0_size = 40;
inline constexpr u32 max_map_entries = 4096; // limit on the entries read, regardless of the given count

struct HvmModule {
    u64 address;
    u64 size; // bytes
    u64 cmdline;
    u64 reserved;
};
static_assert(sizeof(HvmModule) == 32);
static_assert(offsetof(HvmModule, address) == 0 && offsetof(HvmModule, size) == 8 &&
              offsetof(HvmModule, cmdline) == 16);
static_assert(offsetof(HvmModule, reserved) == 24);

struct HvmMemory {
    u64 address;
    u64 size; // bytes
    u32 type; // as in E820
    u32 reserved;
};
static_assert(sizeof(HvmMemory) == 24);
static_assert(offsetof(HvmMemory, address) == 0 && offsetof(HvmMemory, size) == 8 && offsetof(HvmMemory, type) == 16);
static_assert(offsetof(HvmMemory, reserved) == 20);

/// What could not be used, for the log; the boot continues without it.
struct PvhNotes {
    // version 0, or an empty or unreadable map: query the hypervisor instead (BootInfo::range_count is 0)
    bool no_memory_map = false;
    bool memory_map_cut = false;     // more than max_map_entries; the rest was not read
    bool cmdline_unreadable = false; // lies outside the memory that the loader describes
    bool modules_unreadable = false; // likewise
    u32 extra_modules = 0;           // number beyond the first; only the first is used (the map file)
};

/// Fills `info` (zeroed by the caller) from the start_info at physical `address`. The caller must also set kernel_phys
/// and kernel_size, before or after. The ranges are copied as given; the caller must call normalise(). Error{protocol}:
/// no start_info at that address.
Result<PvhNotes> gather_pvh(PhysicalReader& memory, u64 address, u64 tsc, BootInfo& info);

} // namespace fl::boot
