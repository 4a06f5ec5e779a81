module boot.handoff;
import core.std;

namespace fl::boot {

namespace {

// Where ranges overlap, the kind with the higher value wins.
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
    return 4; // firmware-defined kinds are never used
}

u64 end_of(const MemoryRange& r) { return r.base + r.size; }

// Cuts `out` from a range that must remain one piece: keeps the larger of the two remainders.
void cut(MemoryRange& r, const MemoryRange& out) {
    if (out.base >= end_of(r) || end_of(out) <= r.base) {
        return;
    }
    const u64 before = out.base > r.base ? out.base - r.base : 0;
    const u64 after = end_of(r) > end_of(out) ? end_of(r) - end_of(out) : 0;
    if (after > before) {
        r.base = end_of(out);
    }
    r.size = std::max(before, after);
}

void put(BootInfo& info, const MemoryRange& range, usize places) {
    if (info.range_count < places) {
        info.ranges[info.range_count++] = range;
        return;
    }
    info.ranges_truncated = 1;
    if (range.kind != MemoryKind::usable) {
        for (MemoryRange& r : std::span(info.ranges).first(info.range_count)) {
            if (r.kind == MemoryKind::usable) {
                cut(r, range);
            }
        }
    }
}

} // namespace

void add_range(BootInfo& info, u64 base, u64 size, MemoryKind kind) {
    size = std::min(size, ~u64{0} - base);
    if (size != 0) {
        put(info, {base, size, kind, 0}, BootInfo::max_given_ranges);
    }
}

bool clip_ranges(BootInfo& info, u64 end) {
    bool clipped = false;
    u32 kept = 0;
    for (MemoryRange r : info.memory()) {
        const bool mapped =
            r.kind == MemoryKind::usable || r.kind == MemoryKind::acpi_reclaimable || r.kind == MemoryKind::acpi_nvs;
        if (mapped && end_of(r) > end) {
            clipped = true;
            r.size = end > r.base ? end - r.base : 0;
        }
        if (r.size != 0) {
            info.ranges[kept++] = r;
        }
    }
    info.range_count = kept;
    return clipped;
}

void normalise(BootInfo& info) {
    usize places = BootInfo::max_given_ranges;
    if (info.kernel_size != 0) {
        places = BootInfo::max_ranges;
        put(info, {info.kernel_phys, info.kernel_size, MemoryKind::kernel, 0}, places);
    }
    auto& r = info.ranges;
    // Insertion sort: after the first pass the table is nearly sorted, and std::sort would be larger than the rest of
    // this file.
    const auto sort_from = [&](u32 at) {
        for (u32 k = at + 1; k < info.range_count; ++k) {
            for (u32 j = k; j > at && r[j].base < r[j - 1].base; --j) {
                std::swap(r[j], r[j - 1]);
            }
        }
    };
    sort_from(0);

    // Resolve overlaps pairwise until none is left. Every step shrinks or removes a range, or splits one around a more
    // severe one. If a split does not fit into the table, a usable range keeps the larger piece; for any other kind,
    // the piece after the cut becomes more severe, never free.
    for (u32 i = 0; i + 1 < info.range_count;) {
        MemoryRange& a = r[i];
        MemoryRange& b = r[i + 1];
        const u64 a_end = end_of(a);
        const u64 b_end = end_of(b);
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
                sort_from(i + 1);
            }
        } else {
            const bool split = a.base < b.base && b_end < a_end;
            if (split && info.range_count < places) {
                r[info.range_count++] = {b_end, a_end - b_end, a.kind, 0};
                a.size = b.base - a.base;
            } else {
                if (split) {
                    info.ranges_truncated = 1;
                    b.size = a.kind == MemoryKind::usable ? b.size : a_end - b.base;
                }
                cut(a, b);
            }
            sort_from(i);
            i = i > 0 ? i - 1 : 0;
        }
    }
}

bool is_valid(const BootInfo& info) {
    return info.magic == BootInfo::magic_value && info.version == BootInfo::version_value &&
           info.size == sizeof(BootInfo) && info.range_count <= BootInfo::max_ranges &&
           info.cmdline_size <= BootInfo::max_cmdline && info.map_file_size <= BootInfo::max_map_file;
}

} // namespace fl::boot
