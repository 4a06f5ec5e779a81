module core.machine.lapic;
import core.std;
import core.result;
import core.machine.cpu;
import core.machine.memory;

namespace fl::lapic {

namespace {

constexpr u32 apic_base_msr = 0x1b; // [SDM-3 11.4.4]
constexpr u64 base_x2apic = 1 << 10;
constexpr u64 base_enable = 1 << 11;
constexpr u64 base_address = 0x000ffffffffff000;

constinit Mode current = Mode::none;
constinit volatile u32* registers = nullptr;
constinit bool deadline = false;

constexpr u32 masked = 1 << 16;

} // namespace

u32 read(Reg reg) {
    if (current == Mode::x2apic) {
        return static_cast<u32>(cpu::read_msr(0x800 + (to_underlying(reg) >> 4)));
    }
    return registers[to_underlying(reg) / 4];
}

void write(Reg reg, u32 value) {
    if (current == Mode::x2apic) {
        cpu::write_msr(0x800 + (to_underlying(reg) >> 4), value);
    } else {
        registers[to_underlying(reg) / 4] = value;
    }
}

Mode start(u8 spurious_vector, bool external, bool x2apic) {
    const auto features = cpu::cpuid(1);
    if ((features.edx >> 9 & 1) == 0) {
        return current = Mode::none;
    }
    u64 base = cpu::read_msr(apic_base_msr);
    // Once switched on it cannot go back without a reset of the APIC: then it stays.
    if ((base & base_x2apic) != 0 || (x2apic && (features.ecx >> 21 & 1) != 0)) {
        cpu::write_msr(apic_base_msr, base | base_enable); // the two bits must not rise at once [SDM-3 11.12.1]
        cpu::write_msr(apic_base_msr, base | base_enable | base_x2apic);
        current = Mode::x2apic;
    } else {
        base |= base_enable;
        cpu::write_msr(apic_base_msr, base);
        const auto mapped = map_mmio(base & base_address, 4096);
        if (!mapped) {
            return current = Mode::none;
        }
        registers = reinterpret_cast<volatile u32*>(*mapped);
        current = Mode::memory;
    }
    deadline = (features.ecx >> 24 & 1) != 0;
    write(Reg::task_priority, 0);
    write(Reg::lvt_timer, masked);
    write(Reg::lvt_error, masked);
    write(Reg::lvt_lint0, external ? 0x700 : masked);
    write(Reg::lvt_lint1, 0x400); // NMI
    write(Reg::spurious, 0x100u | spurious_vector);
    return current;
}

Mode mode() { return current; }
u32 id() { return current == Mode::x2apic ? read(Reg::id) : current == Mode::memory ? read(Reg::id) >> 24 : 0; }
void end_of_interrupt() { write(Reg::end_of_interrupt, 0); }
bool in_service(u8 vector) {
    const u32 word = to_underlying(Reg::in_service) + u32{vector} / 32 * 0x10;
    return (read(static_cast<Reg>(word)) >> (vector % 32) & 1) != 0;
}
bool has_deadline() { return deadline; }

} // namespace fl::lapic
