module;
#include "core/try.hpp"
module boot.uefi.memory_map;
import core.std;
import core.result;
import boot.handoff;

namespace fl::boot::uefi {

namespace {

constexpr u64 page = 4096;

// A later version of the specification may make descriptors longer, never shorter [UEFI-2.10 §7.2.3].
Result<void> check(std::span<const std::byte> map, u64 stride) {
    if (stride < sizeof(MemoryDescriptor) || stride > page) {
        return Error(Code::protocol, "memory map: the firmware's descriptor size is out of range",
                     sizeof(MemoryDescriptor), stride);
    }
    if (map.empty() || map.size() % stride != 0) {
        return Error(Code::protocol, "memory map: the firmware's map is no whole number of descriptors", stride,
                     map.size());
    }
    return {};
}

struct Range {
    u64 base;
    u64 size; // 0: no usable description
    u32 type;
    u64 attributes;
};

Range range_at(std::span<const std::byte> map, u64 offset) {
    MemoryDescriptor d;
    std::memcpy(&d, map.data() + offset, sizeof d);
    const u64 base = d.physical_start & ~(page - 1);
    const u64 pages = std::min(d.page_count, (~base) / page); // the end must not wrap
    return {base, pages * page, d.type, d.attributes};
}

} // namespace

MemoryKind kind_of(u32 type, u64 attributes) {
    if ((attributes & attribute_runtime) != 0) {
        return MemoryKind::reserved;
    }
    switch (static_cast<MemoryType>(type)) {
    case MemoryType::loader_code:
    case MemoryType::loader_data:
    case MemoryType::boot_services_code:
    case MemoryType::boot_services_data:
    case MemoryType::conventional:
        return (attributes & attribute_special_purpose) != 0 ? MemoryKind::reserved : MemoryKind::usable;
    case MemoryType::unusable: return MemoryKind::unusable;
    case MemoryType::acpi_reclaim: return MemoryKind::acpi_reclaimable;
    case MemoryType::acpi_nvs: return MemoryKind::acpi_nvs;
    case MemoryType::persistent: return MemoryKind::persistent;
    case MemoryType::reserved:
    case MemoryType::runtime_services_code:
    case MemoryType::runtime_services_data:
    case MemoryType::mapped_io:
    case MemoryType::mapped_io_ports:
    case MemoryType::pal_code:
    case MemoryType::unaccepted: break;
    }
    return MemoryKind::reserved;
}

Result<void> add_memory_map(BootInfo& info, std::span<const std::byte> map, u64 stride) {
    CHECK(check(map, stride));
    for (const bool usable : {true, false}) {
        for (u64 at = 0; at < map.size(); at += stride) {
            const Range r = range_at(map, at);
            const MemoryKind kind = kind_of(r.type, r.attributes);
            if (r.size == 0 || (kind == MemoryKind::usable) != usable) {
                continue;
            }
            if (info.range_count > 0) {
                // Most maps are sorted, so merging with the last range keeps the table short.
                MemoryRange& last = info.ranges[info.range_count - 1];
                if (last.kind == kind && last.base + last.size == r.base) {
                    last.size += r.size;
                    continue;
                }
            }
            if (info.range_count == BootInfo::max_given_ranges) {
                normalise(info);
            }
            add_range(info, r.base, r.size, kind);
        }
    }
    normalise(info);
    return {};
}

void Windows::add(u64 base, u64 size) {
    if (size == 0 || base >= limit) {
        return;
    }
    const u64 end = std::min(limit, base + std::min(size, limit - base));
    Window next{base & ~(gib - 1), (end + gib - 1) & ~(gib - 1)};

    // Merge all windows that touch the new one, then insert the result.
    usize kept = 0;
    for (usize i = 0; i < count_; ++i) {
        const Window w = windows_[i];
        if (w.begin <= next.end && next.begin <= w.end) {
            next = {std::min(w.begin, next.begin), std::max(w.end, next.end)};
        } else {
            windows_[kept++] = w;
        }
    }
    count_ = kept;
    usize at = count_;
    for (; at > 0 && windows_[at - 1].begin > next.begin; --at) {
        windows_[at] = windows_[at - 1];
    }
    windows_[at] = next;
    ++count_;

    if (count_ > max_windows) {
        usize closest = 0;
        for (usize i = 0; i + 1 < count_; ++i) {
            if (windows_[i + 1].begin - windows_[i].end < windows_[closest + 1].begin - windows_[closest].end) {
                closest = i;
            }
        }
        windows_[closest].end = windows_[closest + 1].end;
        std::copy(windows_.begin() + closest + 2, windows_.begin() + count_, windows_.begin() + closest + 1);
        --count_;
    }
}

Result<Windows> windows_of(std::span<const std::byte> map, u64 stride) {
    CHECK(check(map, stride));
    Windows windows;
    for (u64 at = 0; at < map.size(); at += stride) {
        const Range r = range_at(map, at);
        const auto type = static_cast<MemoryType>(r.type);
        if (type != MemoryType::mapped_io && type != MemoryType::mapped_io_ports && type != MemoryType::reserved) {
            windows.add(r.base, r.size);
        }
    }
    return windows;
}

} // namespace fl::boot::uefi
