// The kernel proper, as far as it goes without knowing where it runs.
module boot.start;
import core.std;
import core.log;
import core.text;
import core.verdict;
import core.memory;
import core.machine.cpu;
import core.machine.exit;
import core.machine.memory;
import core.machine.traps;
import boot.handoff;

namespace fl::boot {

[[noreturn]] void kernel_start(BootInfo& info) {
    log::info("Firstlight, entered by {}, image at {:#x}, {} KiB", info.entry, info.kernel_phys, info.kernel_size >> 10);
    log::info("command line: \"{}\"", info.cmdline_text());
    log::info("RSDP {:#x}, SMBIOS {:#x}, map file: {}", info.rsdp, info.smbios, info.has_map_file != 0 ? "given" : "none");
    for (const MemoryRange& range : info.memory()) {
        log::info("  {:016x}-{:016x} {} ({})", range.base, range.base + range.size, name(range.kind), to_underlying(range.kind));
    }
    log::info("{} KiB free, page tables with {}, {} us so far", frames().free_bytes() >> 10, memory_features(),
              (cpu::read_tsc() - info.entry_tsc) / 1000);
    const auto text = info.cmdline_text();
    if (const usize at = text.find("fault="); at != std::string_view::npos) {
        provoke(text.substr(at + 6));
    }
    end_vm(Verdict::success, "booted");
}

} // namespace fl::boot
