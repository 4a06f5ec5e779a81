// The kernel proper, as far as it goes without knowing where it runs.
module boot.start;
import core.std;
import core.log;
import core.text;
import core.verdict;
import core.memory;
import core.result;
import core.time;
import core.machine.acpi;
import core.machine.clock;
import core.machine.cpu;
import core.machine.interrupts;
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
    if (const auto started = start_acpi(info.rsdp); !started) {
        log::info("{}", started.error());
    }
    const u64 before = cpu::read_tsc();
    start_clock(info.entry_tsc, acpi_tables(), {});
    log::set_clock(now);
    log::info("clock: TSC at {} kHz by {}, in {} cycles", tsc_hz() / 1000, clock_name(), cpu::read_tsc() - before);
    start_interrupts(acpi_tables());
    if (const auto started = start_timer(interrupts()); !started) {
        log::warning("timer: {}", started.error());
    }
    log::info("interrupts: {}, timer: {}", interrupt_controllers(), timer_name());
    const auto text = info.cmdline_text();
    if (const usize at = text.find("fault="); at != std::string_view::npos) {
        provoke(text.substr(at + 6));
    }
    const std::atomic<bool> wake{false};
    const Instant begin = now();
    while (now() < begin + 2'000'000) {
        platform_idle(nullptr, begin + 2'000'000, wake);
    }
    const auto counters = interrupt_counters();
    log::info("slept {} us, {} interrupts, {} spurious, {} unexpected", (now() - begin) / 1000, counters.taken, counters.spurious,
              counters.unexpected);
    end_vm(Verdict::success, "booted");
}

} // namespace fl::boot
