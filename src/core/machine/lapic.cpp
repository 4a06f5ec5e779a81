module core.machine.lapic;
import core.std;
import core.apic;
import core.cpu_registers;
import core.mmio;
import core.result;
import core.machine.cpu;
import core.machine.memory;

namespace fl::lapic {

namespace {

using apic::Delivery;
using apic::LocalVector;

constinit Mode current = Mode::none;
constinit Mmio registers{};
constinit u64 registers_at = 0; // physical address
constinit bool deadline = false;

ApicBase read_base() { return ApicBase::from(cpu::read_msr(ApicBase::msr)); }
void write_base(ApicBase base) { cpu::write_msr(ApicBase::msr, base.raw); }

} // namespace

u32 read(Reg reg) {
    if (current == Mode::x2apic) {
        return static_cast<u32>(cpu::read_msr(0x800 + (to_underlying(reg) >> 4)));
    }
    return registers.read<u32>(to_underlying(reg));
}

void write(Reg reg, u32 value) {
    if (current == Mode::x2apic) {
        cpu::write_msr(0x800 + (to_underlying(reg) >> 4), value);
    } else {
        registers.write(to_underlying(reg), value);
    }
}

namespace {
void set_up(u8 spurious_vector, bool external) {
    constexpr u32 masked = LocalVector::of(LocalVector::mask).raw;
    constexpr u32 external_line = LocalVector{}.set(LocalVector::delivery, Delivery::external).raw;
    constexpr u32 nmi_line = LocalVector{}.set(LocalVector::delivery, Delivery::nmi).raw;
    write(Reg::task_priority, 0);
    write(Reg::lvt_timer, masked);
    write(Reg::lvt_error, masked);
    write(Reg::lvt_lint0, external ? external_line : masked);
    write(Reg::lvt_lint1, nmi_line);
    using apic::SpuriousVector;
    write(Reg::spurious, SpuriousVector::of(SpuriousVector::enable).set(SpuriousVector::vector, spurious_vector).raw);
}

void switch_to_x2apic(ApicBase base) {
    write_base(base.set(ApicBase::enable, true)); // the two bits must not be set in the same write [SDM-3 11.12.1]
    write_base(base.set(ApicBase::x2apic, true));
}
} // namespace

Mode start(u8 spurious_vector, bool external, bool x2apic) {
    const auto features = cpu::cpuid(1);
    const auto more = Cpuid1Ecx::from(features.ecx);
    if (!Cpuid1Edx::from(features.edx).get(Cpuid1Edx::apic)) {
        return current = Mode::none;
    }
    ApicBase base = read_base();
    // Once in x2APIC mode, only a reset of the APIC leaves it: then keep it.
    if (base.get(ApicBase::x2apic) || (x2apic && more.get(Cpuid1Ecx::x2apic))) {
        switch_to_x2apic(base);
        current = Mode::x2apic;
    } else {
        write_base(base.set(ApicBase::enable, true));
        constexpr u64 size = 4096;
        const auto mapped = map_mmio(base.address(), size);
        if (!mapped) {
            return current = Mode::none;
        }
        registers = Mmio(*mapped, size);
        registers_at = base.address();
        current = Mode::memory;
    }
    deadline = more.get(Cpuid1Ecx::tsc_deadline);
    set_up(spurious_vector, external);
    return current;
}

bool join(u8 spurious_vector) {
    ApicBase base = read_base();
    switch (current) {
    case Mode::none: return false;
    case Mode::x2apic: switch_to_x2apic(base); break;
    case Mode::memory: // all processors access their own registers at the same address
        if (base.get(ApicBase::x2apic) || base.address() != registers_at) {
            return false;
        }
        write_base(base.set(ApicBase::enable, true));
        break;
    }
    set_up(spurious_vector, false);
    return true;
}

bool send(u32 apic_id, Delivery delivery, u8 vector) {
    using apic::CommandHigh;
    using apic::CommandLow;
    constexpr u32 max_polls = 100'000;
    const u32 low =
        CommandLow::of(CommandLow::assert).set(CommandLow::delivery, delivery).set(CommandLow::vector, vector).raw;
    switch (current) {
    case Mode::none: return false;
    case Mode::x2apic:
        // A write to an x2APIC register does not wait for earlier stores [SDM-3 11.12.3].
        asm volatile("mfence; lfence" ::: "memory");
        cpu::write_msr(0x830, u64{apic_id} << 32 | low);
        return true;
    case Mode::memory: break;
    }
    if (apic_id > 0xfe) {
        return false;
    }
    // Two writes, between which a handler might send an interrupt of its own.
    const bool were_enabled = cpu::interrupts_are_on();
    cpu::interrupts_off();
    u32 polls = 0;
    while (CommandLow::from(read(Reg::command_low)).get(CommandLow::pending) && ++polls < max_polls) {
        cpu::relax();
    }
    if (polls < max_polls) {
        write(Reg::command_high, CommandHigh{}.set(CommandHigh::destination, apic_id).raw);
        write(Reg::command_low, low);
    }
    if (were_enabled) {
        cpu::interrupts_on();
    }
    return polls < max_polls;
}

Mode mode() { return current; }
u32 id() {
    if (current == Mode::none) {
        return 0;
    }
    const u32 raw = read(Reg::id);
    return current == Mode::x2apic ? raw : apic::LocalId::from(raw).get(apic::LocalId::id);
}
void end_of_interrupt() { write(Reg::end_of_interrupt, 0); }
bool in_service(u8 vector) {
    const u32 word = to_underlying(Reg::in_service) + u32{vector} / 32 * 0x10;
    return (read(static_cast<Reg>(word)) >> (vector % 32) & 1) != 0;
}
bool has_deadline() { return deadline; }

} // namespace fl::lapic
