// BootInfo: the hand-off from every entry (PVH, UEFI, later ones) to the kernel proper. It holds copies and the
// physical addresses of firmware tables, never a pointer into the loader's memory. The UEFI loader is compiled for
// another target, so all types are of fixed width.
export module boot.handoff;
import core.std;

export namespace fl::boot {

/// How the kernel was entered.
enum class Entry : u32 { none, pvh, uefi };
constexpr std::string_view name(Entry entry) {
    switch (entry) {
    case Entry::none: return "none";
    case Entry::pvh: return "pvh";
    case Entry::uefi: return "uefi";
    }
    return "unknown";
}

/// Use of a physical memory range. Values follow ACPI's numbering, as do E820 and PVH; UEFI loader and boot-services
/// memory is `usable`.
enum class MemoryKind : u32 {
    usable = 1,
    reserved = 2,
    acpi_reclaimable = 3,
    acpi_nvs = 4,
    unusable = 5,
    persistent = 7,
    kernel = 0x100
};
constexpr std::string_view name(MemoryKind kind) {
    switch (kind) {
    case MemoryKind::usable: return "usable";
    case MemoryKind::reserved: return "reserved";
    case MemoryKind::acpi_reclaimable: return "ACPI reclaimable";
    case MemoryKind::acpi_nvs: return "ACPI NVS";
    case MemoryKind::unusable: return "unusable";
    case MemoryKind::persistent: return "persistent";
    case MemoryKind::kernel: return "kernel";
    }
    return "unknown kind";
}

struct MemoryRange {
    u64 base;        // bytes, physical
    u64 size;        // bytes
    MemoryKind kind; // may hold firmware-defined values not listed here
    u32 reserved;
};

struct Framebuffer {
    u64 base;   // physical; 0: none
    u32 width;  // pixels
    u32 height; // pixels
    u32 pitch;  // bytes per scan line
    u32 bgr;    // 1: blue is the lowest byte of a 32-bit pixel; 0: red is
};

struct BootInfo {
    static constexpr u64 magic_value = 0x544847494c545346; // the bytes "FSTLIGHT" in memory
    static constexpr u32 version_value = 1;
    // the last entry is reserved for the image; the others hold `max_given_ranges`
    static constexpr usize max_ranges = 256;
    static constexpr usize max_given_ranges = max_ranges - 1;
    static constexpr usize max_cmdline = 4096;
    static constexpr usize max_map_file = 16384;
    static constexpr u32 unreadable = 2;

    u64 magic;   // magic_value
    u32 version; // version_value
    u32 size;    // sizeof(BootInfo), to check that loader and kernel agree on the layout
    Entry entry;
    u32 range_count;
    u64 entry_tsc;   // time stamp counter at the entry
    u64 kernel_phys; // physical address of the image's first byte, 2 MiB aligned
    u64 kernel_size; // bytes of memory occupied by the image, including .bss
    u64 rsdp;        // physical address of the ACPI RSDP; 0: not given (search the BIOS area, or run without ACPI)
    u64 smbios;      // physical address of the SMBIOS entry point (_SM_ or _SM3_); 0: not given
    Framebuffer framebuffer;
    u32 cmdline_size;  // bytes, without a terminator; at most max_cmdline
    u32 map_file_size; // bytes; at most max_map_file
    // 1: cut, the loader offered more than fits; `unreadable`: it could not be read at all
    u32 cmdline_truncated;
    u32 map_file_truncated;                     // 1: likewise
    u32 ranges_truncated;                       // 1: likewise; the ranges left out are not used
    u32 has_map_file;                           // 1: a map file was given, possibly empty
    std::array<MemoryRange, max_ranges> ranges; // sorted by base, no overlaps after normalise()
    std::array<char, max_cmdline> cmdline;
    std::array<char, max_map_file> map_file;

    std::string_view cmdline_text() const { return {cmdline.data(), cmdline_size}; }
    std::string_view map_file_text() const { return {map_file.data(), map_file_size}; }
    std::span<const MemoryRange> memory() const { return {ranges.data(), range_count}; }
};
static_assert(std::is_standard_layout_v<BootInfo> && std::is_trivially_copyable_v<BootInfo>);
static_assert(sizeof(MemoryRange) == 24 && sizeof(Framebuffer) == 24);

/// Sets the identifying fields. Does not touch the others, which must be zero.
constexpr void begin(BootInfo& info, Entry entry, u64 tsc) {
    info.magic = BootInfo::magic_value;
    info.version = BootInfo::version_value;
    info.size = sizeof(BootInfo);
    info.entry = entry;
    info.entry_tsc = tsc;
}

/// Adds a range. If the table is full (max_given_ranges), the range is dropped and ranges_truncated set; a dropped
/// range that is not usable is also cut out of the usable ranges in the table. Add usable ranges first, so that an
/// overflow never loses a protected range. Empty ranges are dropped; ends beyond 2^64 are cut.
void add_range(BootInfo& info, u64 base, u64 size, MemoryKind kind);

/// Cuts the ranges that would be mapped (usable, ACPI) at `end`, the processor's first unaddressable byte. True: some
/// range was cut.
bool clip_ranges(BootInfo& info, u64 end);

/// Copies text into one of the two text fields, truncating what does not fit.
constexpr void set_cmdline(BootInfo& info, std::string_view text) {
    info.cmdline_size = static_cast<u32>(std::min(text.size(), BootInfo::max_cmdline));
    info.cmdline_truncated = text.size() > BootInfo::max_cmdline ? 1 : 0;
    std::copy_n(text.data(), info.cmdline_size, info.cmdline.data());
}
constexpr void set_map_file(BootInfo& info, std::string_view text) {
    info.has_map_file = 1;
    info.map_file_size = static_cast<u32>(std::min(text.size(), BootInfo::max_map_file));
    info.map_file_truncated = text.size() > BootInfo::max_map_file ? 1 : 0;
    std::copy_n(text.data(), info.map_file_size, info.map_file.data());
}

/// Sorts the ranges, resolves overlaps in favour of the less usable kind and merges adjacent ranges of one kind. The
/// image's own memory (kernel_phys, kernel_size) becomes MemoryKind::kernel. If the table cannot hold all pieces,
/// usable memory is dropped (ranges_truncated), or a piece is downgraded to a less usable kind.
void normalise(BootInfo& info);

/// Checks that this kernel understands a BootInfo from a loader: magic, version, size and the bounds of every count.
bool is_valid(const BootInfo& info);

/// The image's link address: virtual = physical - kernel_phys + kernel_virtual (core.address_map: image_map).
inline constexpr u64 kernel_virtual = 0xffffffff80000000;

} // namespace fl::boot
