module boot.pvh;
import core.std;
import core.result;
import core.physical;
import boot.handoff;

namespace fl::boot {

namespace {

// Loaders put their structures below 1 MiB, where the map may have a hole (QEMU's option ROM), or into memory listed in
// the map.
constexpr u64 low_memory = 0x100000;
constexpr u64 limit = 0x100000000; // structures come from 32-bit loaders; also all that the provisional page tables map

bool within(const BootInfo& info, u64 address, u64 size) {
    if (address == 0 || size > limit || address > limit - size) {
        return false;
    }
    if (address + size <= low_memory || info.range_count == 0) {
        return true;
    }
    return std::ranges::any_of(info.memory(), [&](const MemoryRange& r) {
        const bool memory = r.kind == MemoryKind::usable || r.kind == MemoryKind::acpi_reclaimable ||
                            r.kind == MemoryKind::acpi_nvs || r.kind == MemoryKind::reserved;
        return memory && address >= r.base && size <= r.size && address - r.base <= r.size - size;
    });
}

bool read_ranges(PhysicalReader& memory, const HvmStartInfo& start, BootInfo& info) {
    if (start.memory_map == 0 || start.memory_map >= limit) {
        return false;
    }
    // Usable memory first: see add_range().
    for (const bool usable : {true, false}) {
        for (u32 i = 0; i < std::min(start.memory_map_count, max_map_entries); ++i) {
            const u64 at = start.memory_map + u64{i} * sizeof(HvmMemory);
            if (at > limit - sizeof(HvmMemory)) {
                break;
            }
            const auto entry = memory.value<HvmMemory>(at);
            if (!entry) {
                break;
            }
            if (const auto kind = static_cast<MemoryKind>(entry->type); (kind == MemoryKind::usable) == usable) {
                add_range(info, entry->address, entry->size, kind);
            }
        }
    }
    return info.range_count != 0;
}

// Reads a NUL-terminated text in pieces, none of which crosses into a page after the one with the terminator.
bool read_cmdline(PhysicalReader& memory, u64 address, BootInfo& info) {
    std::array<char, 64> piece{};
    for (u64 at = address;;) {
        const usize size = std::min<u64>(piece.size(), 4096 - at % 4096);
        const std::span<char> part(piece.data(), size);
        if (!within(info, at, size) || !memory.read(at, std::as_writable_bytes(part))) {
            info.cmdline_size = 0;
            return false;
        }
        for (const char c : part) {
            if (c == '\0') {
                return true;
            }
            if (info.cmdline_size == BootInfo::max_cmdline) {
                info.cmdline_truncated = 1;
                return true;
            }
            info.cmdline[info.cmdline_size++] = c;
        }
        at += size;
    }
}

bool read_map_file(PhysicalReader& memory, u64 modules, BootInfo& info) {
    if (!within(info, modules, sizeof(HvmModule))) {
        return false;
    }
    const auto first = memory.value<HvmModule>(modules);
    if (!first) {
        return false;
    }
    const u64 size = std::min<u64>(first->size, BootInfo::max_map_file);
    if (size != 0 && (!within(info, first->address, size) ||
                      !memory.read(first->address,
                                   std::as_writable_bytes(std::span(info.map_file).first(static_cast<usize>(size)))))) {
        return false;
    }
    info.has_map_file = 1;
    info.map_file_size = static_cast<u32>(size);
    info.map_file_truncated = first->size > BootInfo::max_map_file ? 1 : 0;
    return true;
}

} // namespace

Result<PvhNotes> gather_pvh(PhysicalReader& memory, u64 address, u64 tsc, BootInfo& info) {
    begin(info, Entry::pvh, tsc);
    HvmStartInfo start{};
    if (address == 0 || address > limit - start_info_v0_size ||
        !memory.read(address, std::as_writable_bytes(std::span(&start, 1)).first(start_info_v0_size))) {
        return Error(Code::protocol, "PVH: EBX must point at hvm_start_info below 4 GiB");
    }
    if (start.magic != HvmStartInfo::magic_value) {
        return Error(Code::protocol, "PVH: hvm_start_info has the wrong magic number", HvmStartInfo::magic_value,
                     start.magic);
    }
    if (start.version >= 1 &&
        (address > limit - sizeof(start) || !memory.read(address, std::as_writable_bytes(std::span(&start, 1))))) {
        return Error(Code::protocol, "PVH: hvm_start_info of version 1 is cut off");
    }
    PvhNotes notes;
    notes.no_memory_map = start.version == 0 || !read_ranges(memory, start, info);
    notes.memory_map_cut = start.memory_map_count > max_map_entries;
    if (start.cmdline != 0) {
        notes.cmdline_unreadable = !read_cmdline(memory, start.cmdline, info);
    }
    if (start.module_count != 0) {
        notes.modules_unreadable = !read_map_file(memory, start.modules, info);
        notes.extra_modules = start.module_count - 1;
    }
    info.rsdp = start.rsdp;
    return notes;
}

} // namespace fl::boot
