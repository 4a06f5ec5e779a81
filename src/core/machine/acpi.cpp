module core.machine.acpi;
import core.std;
import core.acpi;
import core.result;
import core.verdict;
import core.machine.cpu;
import core.machine.exit;
import core.machine.memory;

namespace fl {

namespace {

constinit std::optional<acpi::Tables> tables;

void write_byte(const acpi::Register& to, u8 value) {
    if (to.space == acpi::Space::io) {
        cpu::out8(static_cast<u16>(to.address), value);
    } else if (const auto mapped = map_mmio(to.address, 1)) {
        *reinterpret_cast<volatile u8*>(*mapped) = value;
    }
}

// The host needs a moment to take the machine away: some reads of a slow port, bounded.
void wait_a_moment() {
    for (u32 i = 0; i < 100'000; ++i) {
        static_cast<void>(cpu::in8(0x80));
    }
}

// [ACPI 6.5 §4.8.3.2.1, §4.8.3.7]
void power_off(Verdict) {
    constexpr u16 sci_enabled = 1;
    constexpr u16 sleep_enable = 1 << 13;
    constexpr u8 reduced_sleep_enable = 1 << 5;
    const acpi::Fadt& fadt = *tables->fadt;
    if (const auto s5 = acpi::find_s5(physical_memory(), fadt.dsdt)) {
        if (fadt.pm1a_control != 0) {
            if (fadt.smi_command != 0 && fadt.acpi_enable != 0 && (cpu::in16(fadt.pm1a_control) & sci_enabled) == 0) {
                cpu::out8(fadt.smi_command, fadt.acpi_enable);
                wait_a_moment();
            }
            cpu::out16(fadt.pm1a_control, static_cast<u16>(s5->a << 10 | sleep_enable));
            if (fadt.pm1b_control != 0) {
                cpu::out16(fadt.pm1b_control, static_cast<u16>(s5->b << 10 | sleep_enable));
            }
        } else if (fadt.sleep_control.address != 0) {
            write_byte(fadt.sleep_control, static_cast<u8>(s5->a << 2 | reduced_sleep_enable));
        }
        wait_a_moment();
    }
    if (fadt.reset.address != 0) {
        write_byte(fadt.reset, fadt.reset_value);
        wait_a_moment();
    }
}

} // namespace

Result<void> start_acpi(u64 rsdp) {
    auto read = acpi::read_tables(physical_memory(), rsdp);
    if (!read) {
        return read.error();
    }
    tables = *read;
    if (tables->fadt) {
        set_acpi_power_off(power_off);
    }
    return {};
}

const acpi::Tables* acpi_tables() { return tables ? &*tables : nullptr; }

} // namespace fl
