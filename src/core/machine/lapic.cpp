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
constinit u64 registers_at = 0; // physical
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

namespace {
void set_up(u8 spurious_vector, bool external) {
    write(Reg::task_priority, 0);
    write(Reg::lvt_timer, masked);
    write(Reg::lvt_error, masked);
    write(Reg::lvt_lint0, external ? 0x700 : masked);
    write(Reg::lvt_lint1, 0x400); // NMI
    write(Reg::spurious, 0x100u | spurious_vector);
}
} // namespace

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
        registers_at = base & base_address;
        current = Mode::memory;
    }
    deadline = (features.ecx >> 24 & 1) != 0;
    set_up(spurious_vector, external);
    return current;
}

bool join(u8 spurious_vector) {
    const u64 base = cpu::read_msr(apic_base_msr);
    switch (current) {
    case Mode::none: return false;
    case Mode::x2apic:
        cpu::write_msr(apic_base_msr, base | base_enable);
        cpu::write_msr(apic_base_msr, base | base_enable | base_x2apic);
        break;
    case Mode::memory: // every processor sees its own registers at the one address
        if ((base & base_x2apic) != 0 || (base & base_address) != registers_at) {
            return false;
        }
        cpu::write_msr(apic_base_msr, base | base_enable);
        break;
    }
    set_up(spurious_vector, false);
    return true;
}

bool send(u32 apic_id, Delivery delivery, u8 vector) {
    constexpr u32 assert_level = 1 << 14;
    constexpr u32 pending = 1 << 12;
    constexpr u32 most_polls = 100'000;
    const u32 low = vector | to_underlying(delivery) << 8 | assert_level;
    switch (current) {
    case Mode::none: return false;
    case Mode::x2apic:
        // Writing an x2APIC register does not wait for earlier stores [SDM-3 11.12.3].
        asm volatile("mfence; lfence" ::: "memory");
        cpu::write_msr(0x830, u64{apic_id} << 32 | low);
        return true;
    case Mode::memory: break;
    }
    if (apic_id > 0xfe) {
        return false;
    }
    // Two writes, and a handler in between may have one of its own to send.
    const bool were_on = cpu::interrupts_are_on();
    cpu::interrupts_off();
    u32 polls = 0;
    while ((read(Reg::command_low) & pending) != 0 && ++polls < most_polls) {
        cpu::relax();
    }
    if (polls < most_polls) {
        write(Reg::command_high, apic_id << 24);
        write(Reg::command_low, low);
    }
    if (were_on) {
        cpu::interrupts_on();
    }
    return polls < most_polls;
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
