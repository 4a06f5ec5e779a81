module boot.start;
import core.std;
import core.log;
import core.result;
import core.memory;
import core.machine.memory;
import boot.ending;
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
    auto added = add_memory(std::span(areas).first(count));
    if (added) { // so that the restart note written at the end does not overwrite memory in use
        frames().reserve(RestartNote::physical, frame_size);
    }
    return added;
}

} // namespace fl::boot
