module boot.start;
import core.std;
import core.log;
import core.result;
import core.machine.memory;
import boot.handoff;

namespace fl::boot {

Result<void> use_memory(BootInfo& info) {
    if (clip_ranges(info, physical_end())) {
        log::warning("memory from {:#x} on has no address on this processor: not used", physical_end());
    }
    normalise(info);
    std::array<MemoryArea, BootInfo::max_ranges> areas;
    usize count = 0;
    for (const MemoryRange& range : info.memory()) {
        const bool usable = range.kind == MemoryKind::usable;
        if (usable || range.kind == MemoryKind::acpi_reclaimable || range.kind == MemoryKind::acpi_nvs) {
            areas[count++] = {range.base, range.size, usable};
        }
    }
    return add_memory(std::span(areas).first(count));
}

} // namespace fl::boot
