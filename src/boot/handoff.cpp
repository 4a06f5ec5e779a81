module boot.handoff;
import core.std;

namespace fl::boot {

namespace {

// Which kind wins where ranges overlap: the higher one.
constexpr u32 severity(MemoryKind kind) {
    switch (kind) {
    case MemoryKind::usable: return 0;
    case MemoryKind::acpi_reclaimable: return 1;
    case MemoryKind::persistent: return 2;
    case MemoryKind::acpi_nvs: return 3;
    case MemoryKind::reserved: return 4;
    case MemoryKind::unusable: return 5;
    case MemoryKind::kernel: return 6;
    }
    return 4; // a kind that the firmware made up is not ours to use
}

} // namespace

void normalise(BootInfo& info) {
    if (info.kernel_size != 0) {
        add_range(info, info.kernel_phys, info.kernel_size, MemoryKind::kernel);
    }
    auto& r = info.ranges;
    const auto by_base = [](const MemoryRange& a, const MemoryRange& b) { return a.base < b.base; };
    std::sort(r.begin(), r.begin() + info.range_count, by_base);

    // Cut overlaps pairwise until none is left. Every step shrinks or removes a range, or splits one around a more severe one; a split that
    // does not fit into the table drops its tail, which is then simply not used.
    for (u32 i = 0; i + 1 < info.range_count;) {
        MemoryRange& a = r[i];
        MemoryRange& b = r[i + 1];
        const u64 a_end = a.base + a.size;
        const u64 b_end = b.base + b.size;
        const auto remove = [&](u32 at) {
            std::copy(r.begin() + at + 1, r.begin() + info.range_count, r.begin() + at);
            --info.range_count;
        };
        if (b.size == 0) {
            remove(i + 1);
        } else if (a.size == 0) {
            remove(i);
            i = i > 0 ? i - 1 : 0;
        } else if (a.kind == b.kind && b.base <= a_end) {
            a.size = std::max(a_end, b_end) - a.base;
            remove(i + 1);
        } else if (b.base >= a_end) {
            ++i;
        } else if (severity(a.kind) > severity(b.kind)) {
            if (b_end <= a_end) {
                remove(i + 1);
            } else {
                b.base = a_end;
                b.size = b_end - a_end;
                std::sort(r.begin() + i + 1, r.begin() + info.range_count, by_base);
            }
        } else {
            a.size = b.base - a.base;
            if (b_end < a_end) {
                const MemoryKind kind = a.kind;
                add_range(info, b_end, a_end - b_end, kind);
                std::sort(r.begin() + i + 1, r.begin() + info.range_count, by_base);
            }
            if (a.size == 0) {
                remove(i);
            }
            i = i > 0 ? i - 1 : 0;
        }
    }
}

bool is_valid(const BootInfo& info) {
    return info.magic == BootInfo::magic_value && info.version == BootInfo::version_value && info.size == sizeof(BootInfo) &&
           info.range_count <= BootInfo::max_ranges && info.cmdline_size <= BootInfo::max_cmdline &&
           info.map_file_size <= BootInfo::max_map_file;
}

} // namespace fl::boot
