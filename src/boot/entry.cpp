// The C++ part of the entry points in pvh.S.
#include <stdint.h>
import core.std;
import core.physical;
import core.result;
import core.log;
import core.text;
import core.verdict;
import core.machine.exit;
import core.machine.memory;
import core.machine.runtime;
import core.machine.serial;
import core.machine.traps;
import boot.handoff;
import boot.machine.ending;
import boot.pvh;
import boot.start;
#ifdef FIRSTLIGHT_HV_XEN
import core.cpuid;
import core.machine.cpu;
import hv.machine.detect;
import hv.machine.privileged;
import hv.xen.console;
import hv.xen.memory_map;
#endif

using namespace fl;

// Symbols of kernel.ld and pvh.S; only their addresses are meaningful.
extern "C" {
extern const std::byte image_text_begin[];
extern const std::byte image_end[];
}

namespace {

constexpr usize stack_size = 64 * 1024;

constinit boot::BootInfo boot_info{};

// Physical memory under the entry's page tables: 4 GiB, identity-mapped.
class IdentityReader final : public PhysicalReader {
  public:
    bool read(u64 address, std::span<std::byte> into) override {
        if (into.size() > 0x100000000 || address > 0x100000000 - into.size()) {
            return false;
        }
        std::memcpy(into.data(), reinterpret_cast<const void*>(address), into.size());
        return true;
    }
};

} // namespace

// The stack grows down to a guard page that the final page tables leave unmapped.
extern "C" {
alignas(4096) [[gnu::section(".bss.pages")]] std::byte boot_stack_guard[4096 + stack_size];
}

static std::byte* image_end_writable() { return const_cast<std::byte*>(image_end); } // under the loader's page tables
static u64 stack_guard() { return reinterpret_cast<u64>(boot_stack_guard); }

#ifdef FIRSTLIGHT_HV_XEN
static constinit hv::xen::ConsoleRing xen_console{};

static u64 hypercall_page(const hv::xen::Gate& gate) {
    return reinterpret_cast<u64>(gate.page) - reinterpret_cast<u64>(image_text_begin) + boot_info.kernel_phys;
}

// Opens Xen's consoles as early as possible: first under the loader's page tables, which a PVH entry knows, then once
// more under the kernel's own, where the ring has another address. This precedes the parsing of the command line, so
// hv= does not affect it. Nothing else of Xen is used here.
static void open_xen_consoles(bool loaders_tables) {
    static constinit hv::xen::Consoles found{};
    static constinit bool searched = false;
    if (!std::exchange(searched, true)) {
        hv::MachinePrivileged cpu;
        const hv::xen::Gate gate = hv::xen::native_gate();
        const auto cpuid = [](u32 leaf, u32 subleaf) {
            const cpu::CpuidRegisters r = cpu::cpuid(leaf, subleaf);
            return CpuidRegisters{r.eax, r.ebx, r.ecx, r.edx};
        };
        found = hv::xen::find_consoles(cpuid, cpu, gate, hypercall_page(gate));
        if (found.found && !found.emulated) {
            // Xen's debug port; written without probing, because older versions do not answer reads
            use_debug_port(hv::xen::log_line_max);
        }
    }
    if (found.ring == 0 || (loaders_tables && found.ring > 0xffff'f000)) {
        return;
    }
    std::byte* page = reinterpret_cast<std::byte*>(found.ring);
    if (!loaders_tables) {
        const auto mapped = map_physical(found.ring, 4096);
        if (!mapped) {
            log::detach(xen_console);
            log::warning("xen: the console's page cannot be mapped: {}", mapped.error());
            return;
        }
        page = *mapped;
    }
    if (xen_console.is_open()) {
        xen_console.move(page);
    } else {
        xen_console.open(found.calls, page, found.port, [] { return cpu::read_tsc(); }, found.tsc_khz);
        log::attach(xen_console);
    }
}
#endif

static void start(boot::Entry entry) {
    boot::stop_without_memory(image_end_writable());
    boot::start_ending(boot_info, stack_guard() + 4096 + stack_size);
    log::keep_history(true);
    open_consoles();
    start_traps(stack_guard(), stack_size);
    if (entry == boot::Entry::pvh) {
        boot_info.kernel_phys = 0x200000;
#ifdef FIRSTLIGHT_HV_XEN
        open_xen_consoles(true);
#endif
    }
    boot::stop_if_restarted();
}

// Errors of the loader or the machine are not reported as a crash of the kernel.
[[noreturn]] static void refuse(std::string_view reason, Code code) {
    log::error("{}", reason);
    log::Record("error").text("code", name(code)).text("message", reason);
    end_vm(Verdict::error, reason);
}
[[noreturn]] static void refuse(std::string_view where, const Error& error) {
    FixedText<240> reason;
    print(reason, "{}: {}", where, error);
    refuse(reason.view(), error.code);
}

// Reports sizes in units in which a machine's memory is configured.
[[noreturn]] static void too_little_memory(const Error& error) {
    constexpr u64 large = 2_MiB;
    const u64 needed = align_up(boot_info.kernel_phys + boot_info.kernel_size, large) + large;
    u64 seen = 0;
    for (const boot::MemoryRange& range : boot_info.memory()) {
        const bool usable = range.kind == boot::MemoryKind::usable || range.kind == boot::MemoryKind::kernel;
        seen = usable ? std::max(seen, range.base + range.size) : seen;
    }
    if (error.code != Code::exhausted || seen >= needed) {
        refuse("memory", error);
    }
    FixedText<240> reason;
    print(reason,
          "too little memory: needed up to {} KiB (the image, and 2 MiB after it), seen up to {} KiB: give the "
          "machine more",
          needed >> 10, seen >> 10);
    refuse(reason.view(), error.code);
}

[[noreturn]] static void continue_boot() {
    start_memory({boot_info.kernel_phys, stack_guard()});
    boot::ending_uses_kernel_tables();
#ifdef FIRSTLIGHT_HV_XEN
    open_xen_consoles(false);
#endif
    if (boot_info.range_count != 0) {
        if (const auto added = boot::use_memory(boot_info); !added) {
            too_little_memory(added.error());
        }
    }
    run_initialisers();
    boot::kernel_start(boot_info);
}

#ifdef FIRSTLIGHT_HV_XEN
// Only Xen uses version 0; the hypervisor supplies what its start_info lacks. Rare, so CPUID is simply read a second
// time.
static Result<void> read_xen_memory_map() {
    static constinit CpuidSnapshot cpuid{};
    static constinit std::array<hv::xen::E820Entry, boot::BootInfo::max_ranges> ranges{};
    hv::read_cpuid(cpuid);
    hv::MachinePrivileged cpu;
    const hv::xen::Gate gate = hv::xen::native_gate();
    const auto count = hv::xen::read_memory_map(cpuid, cpu, gate, hypercall_page(gate), ranges);
    if (!count) {
        return count.error();
    }
    for (const hv::xen::E820Entry& range : std::span(ranges).first(*count)) {
        boot::add_range(boot_info, range.address, range.size, static_cast<boot::MemoryKind>(range.type));
    }
    log::info("PVH: {} memory {} from Xen", *count, plural(*count, "ranges"));
    return {};
}
#endif

extern "C" [[noreturn]] void pvh_main(u64 start_info, u64 tsc) {
    start(boot::Entry::pvh);
    IdentityReader memory;
    auto notes = boot::gather_pvh(memory, start_info, tsc, boot_info);
    if (!notes) {
        refuse("entry", notes.error());
    }
    if (notes->no_memory_map) {
        log::warning("PVH: the loader passed no memory map");
#ifdef FIRSTLIGHT_HV_XEN
        if (auto map = read_xen_memory_map(); !map) {
            log::warning("PVH: {}", map.error());
        }
#endif
    }
    if (notes->memory_map_cut) {
        log::warning("PVH: only the first {} entries of the memory map are read", boot::max_map_entries);
    }
    if (notes->cmdline_unreadable) {
        log::warning("PVH: the command line lies outside the memory that the loader describes");
        boot_info.cmdline_truncated = fl::boot::BootInfo::unreadable;
    }
    if (notes->modules_unreadable) {
        log::warning("PVH: the first module lies outside the memory that the loader describes; there is no map file");
    }
    if (notes->extra_modules != 0) {
        log::warning("PVH: ignored: {} {} after the first one, which is the map file", notes->extra_modules,
                     plural(notes->extra_modules, "modules"));
    }
    boot_info.kernel_size = static_cast<u64>(image_end - image_text_begin);
    continue_boot();
}

extern "C" [[noreturn]] void entry64_main(const boot::BootInfo* handed_over) {
    start(boot::Entry::uefi);
    if (!boot::is_valid(*handed_over)) {
        refuse("entry", {Code::protocol, "the loader's BootInfo is not of this kernel's version: update the loader on "
                                         "the boot medium together with "
                                         "the kernel"});
    }
    boot_info = *handed_over;
    continue_boot();
}
