module boot.machine.ending;
import core.std;
import core.acpi;
import core.text;
import core.result;
import core.cpuid;
import core.log;
import core.physical;
import core.time;
import core.verdict;
import core.machine.acpi;
import core.machine.clock;
import core.machine.cpu;
import core.machine.exit;
import core.machine.memory;
import hv.machine.detect;
import hv.machine.privileged;
import boot.ending;
import boot.handoff;

// A symbol of kernel.ld; only its address is meaningful.
extern "C" {
extern const std::byte image_text_begin[];
}

namespace fl::boot {

namespace {

constexpr u64 pvh_image = RestartNote::physical + 4096; // as in kernel.ld
constexpr u64 identity_end = u64{4} << 30;              // of the loader's page tables

// Physical memory under the loader's page tables.
class IdentityMemory final : public PhysicalReader {
  public:
    bool read(u64 address, std::span<std::byte> into) override {
        if (into.size() > identity_end || address > identity_end - into.size()) {
            return false;
        }
        std::memcpy(into.data(), reinterpret_cast<const void*>(address), into.size());
        return true;
    }
};

// Separate from the machine object, so that they go into .bss instead of the image file.
constinit CpuidSnapshot cpuid_snapshot{};
alignas(256) constinit std::array<char, 256> reason_text{}; // within one page: the host reads no further

class ThisMachine final : public EndMachine {
  public:
    constexpr explicit ThisMachine(CpuidSnapshot& snapshot) : cpuid_(snapshot) {}
    void wait(Nanoseconds length) override {
        // The clock may not run yet, or its rate may be a guess: assume the fastest possible counter. Give up if the
        // counter does not advance.
        constexpr u64 fastest_hz = 4'000'000'000;
        const u64 cycles = length / 1000 * (std::max(tsc_hz(), fastest_hz) / 1'000'000);
        const u64 begin = cpu::read_tsc();
        u64 still = 0;
        for (u64 last = begin; last - begin < cycles && still < 100'000'000;) {
            cpu::relax();
            const u64 now = cpu::read_tsc();
            still = now == last ? still + 1 : 0;
            last = now;
        }
    }
    const CpuidSnapshot& cpuid() override {
        hv::read_cpuid(cpuid_);
        return cpuid_;
    }
    PhysicalReader& memory() override { return kernel_tables ? physical_memory() : identity_; }
    u64 rsdp() override { return info != nullptr ? info->rsdp : 0; }
    const acpi::Tables* tables() override { return kernel_tables ? acpi_tables() : nullptr; }
    void write_memory(u64 physical, u8 value) override {
        if (!kernel_tables) {
            if (physical < identity_end) {
                *reinterpret_cast<volatile u8*>(physical) = value;
            }
        } else if (const auto mapped = map_mmio(physical, 1)) {
            *reinterpret_cast<volatile u8*>(*mapped) = value;
        }
    }
    // [xen-public arch-x86/xen-x86_64.h]: RAX holds the hypercall number, RDI and RSI the arguments.
    void xen_shutdown(u32 reason) override {
        constexpr u64 sched_op = 29;
        constexpr u64 op_shutdown = 2;
        const FixedText<12> vendor = cpuid_.vendor();
        u64 answer = sched_op;
        u64 op = op_shutdown;
        const u32* pointer = &reason;
        if (vendor == "AuthenticAMD" || vendor == "HygonGenuine") {
            asm volatile("vmmcall"
                         : "+a"(answer), "+D"(op), "+S"(pointer)::"memory", "cc", "rcx", "rdx", "r8", "r9", "r10",
                           "r11");
        } else {
            asm volatile("vmcall"
                         : "+a"(answer), "+D"(op), "+S"(pointer)::"memory", "cc", "rcx", "rdx", "r8", "r9", "r10",
                           "r11");
        }
        wait(10'000'000);
    }
    Text reason() override {
        const u64 base = info != nullptr && info->kernel_phys != 0 ? info->kernel_phys : pvh_image;
        return {reinterpret_cast<u64>(reason_text.data()) - reinterpret_cast<u64>(image_text_begin) + base, text_size_};
    }
    void note_restart(Verdict verdict) override {
        const RestartNote note = restart_note(verdict);
        if (!kernel_tables) {
            std::memcpy(reinterpret_cast<void*>(RestartNote::physical), &note, sizeof note);
        } else if (const auto mapped = map_physical(RestartNote::physical, sizeof note)) {
            std::memcpy(*mapped, &note, sizeof note);
        }
    }
    void triple_fault() override {
        // A breakpoint with an empty descriptor table.
        const struct [[gnu::packed]] {
            u16 limit = 0;
            u64 base = 0;
        } none;
        asm volatile("lidt %0; int3" ::"m"(none));
    }
    void keep(std::string_view text) {
        text_size_ = std::min(text.size(), reason_text.size());
        std::copy_n(text.data(), text_size_, reason_text.data());
    }

    const BootInfo* info = nullptr;
    bool kernel_tables = false;

  private:
    CpuidSnapshot& cpuid_;
    IdentityMemory identity_;
    usize text_size_ = 0;
};

constinit ThisMachine machine{cpuid_snapshot};
constinit Ending ending;
constinit std::optional<Verdict> verdict;
constinit u64 end_stack = 0;

} // namespace

extern "C" [[noreturn, gnu::used]] void end_on_own_stack() {
    hv::MachinePrivileged cpu;
    while (ending.step(machine, cpu, *verdict)) {
    }
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

namespace {

// Runs from the top of the boot stack: the caller's stack may be an emergency stack, too small for reading the ACPI
// tables, and neither is returned to.
[[noreturn]] void end_machine(Verdict first, std::string_view reason) {
    if (!verdict) { // otherwise a step has faulted
        verdict = first;
        machine.keep(reason);
    }
    asm volatile("movq %0, %%rsp\n"
                 "xorl %%ebp, %%ebp\n"
                 "call end_on_own_stack\n" ::"r"(end_stack)
                 : "memory");
    __builtin_unreachable();
}

} // namespace

void start_ending(const BootInfo& info, u64 stack_top) {
    machine.info = &info;
    end_stack = stack_top;
    set_end_machine(end_machine);
}

void stop_without_memory(std::byte* end) {
    auto* const last = reinterpret_cast<volatile u64*>(end) - 1;
    const u64 before = *last;
    bool there = true;
    for (const u64 pattern : {u64{0x5a5aa5a5c3c33c3c}, u64{0xa5a55a5a3c3cc3c3}}) {
        *last = pattern;
        there = there && *last == pattern;
    }
    *last = before;
    if (there) {
        return;
    }
    // Uses only the stack: the log and its consoles may lie in memory that is missing.
    FixedText<256> reason;
    print(reason, "too little memory: the image alone needs it up to {} KiB, and it ends before: give the machine more",
          (reinterpret_cast<u64>(end) - kernel_virtual + pvh_image) >> 10);
    FixedText<512> text;
    print(text, "error: {}\n@{{\"record\":\"verdict\",\"verdict\":\"{}\",\"reason\":\"{}\"}}\n", reason.view(),
          Verdict::error, reason.view());
    constexpr u16 com1 = 0x3f8;
    constexpr u8 transmitter_empty = 0x20;
    for (const char c : text.view()) {
        for (u32 polls = 0; polls < 20'000 && (cpu::in8(com1 + 5) & transmitter_empty) == 0; ++polls) {
        }
        cpu::out8(com1, static_cast<u8>(c));
    }
    CpuidSnapshot snapshot{};
    ThisMachine poor{snapshot};
    Ending last_resort;
    hv::MachinePrivileged cpu;
    while (last_resort.step(poor, cpu, Verdict::error)) {
    }
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

void ending_uses_kernel_tables() { machine.kernel_tables = true; }

void end_by_restart() { ending.request_restart(); }

void stop_if_restarted() {
    auto* const place = reinterpret_cast<RestartNote*>(RestartNote::physical);
    RestartNote note;
    std::memcpy(&note, place, sizeof note);
    const auto before = restarted_by(note);
    if (!before) {
        return;
    }
    std::memset(place, 0, sizeof note); // so that a restart from outside boots again
    log::error(
        "the previous boot (verdict {}) ended with a restart: this machine cannot be powered off by its guest. Halted; "
        "start the VMM so that a reset ends it (QEMU: -no-reboot), or with a debug exit port",
        *before);
    log::flush();
    for (;;) {
        cpu::interrupts_off();
        cpu::halt();
    }
}

} // namespace fl::boot
