module boot.ending;
import core.std;
import core.acpi;
import core.cpuid;
import core.physical;
import core.time;
import core.verdict;
import hv.backend;
import hv.detect;

namespace fl::boot {

namespace {

constexpr u16 debug_exit_port = 0xf4;
// The host may end the machine from another thread after the port write has completed; do not start the next method
// before that.
constexpr Nanoseconds exit_port_wait = 10'000'000;
constexpr Nanoseconds note_wait = 50'000'000;
constexpr Nanoseconds end_wait = 1'000'000'000;
constexpr Nanoseconds acpi_mode_wait = 300'000'000;

// SHUTDOWN_poweroff, SHUTDOWN_reboot, SHUTDOWN_crash [xen-public sched.h]. Defined here, not in the Xen module, because
// builds without Xen support end this way, too.
constexpr u32 xen_poweroff = 0;
constexpr u32 xen_reboot = 1;
constexpr u32 xen_crash = 3;

// [hv-tlfs §2.4, §2.9]: privileges in EAX, features in EDX of CPUID leaf base + 3.
constexpr u32 hyperv_reset_privilege = 1u << 7;
constexpr u32 hyperv_crash_feature = 1u << 10;
constexpr u32 hyperv_reset_msr = 0x40000003;
constexpr u32 hyperv_guest_os_id_msr = 0x40000000;
constexpr u32 hyperv_crash_parameter0 = 0x40000100; // the first of five
constexpr u32 hyperv_crash_control = 0x40000105;
constexpr u64 hyperv_crash_message = u64{1} << 62;
constexpr u64 hyperv_crash_notify = u64{1} << 63;

constexpr u8 pvpanic_panicked = 1; // [QEMU "pvpanic"]

constexpr u16 keyboard_command = 0x64; // reads return the status; bit 1: input buffer full
constexpr u8 pulse_reset = 0xfe;

constexpr bool is_good(Verdict verdict) { return verdict == Verdict::success || verdict == Verdict::skip; }

} // namespace

Methods methods_of(const Platform& platform, Verdict verdict, bool restart) {
    const bool good = is_good(verdict);
    Methods methods;
    const auto add = [&](bool there, Method method) {
        if (there) {
            methods.list[methods.count++] = method;
        }
    };
    if (restart && good) {
        add(platform.xen, Method::xen_reboot);
        add(platform.acpi_reset, Method::acpi_reset);
        add(platform.hyperv_reset, Method::hyperv_reset);
        add(true, Method::keyboard);
        add(true, Method::triple_fault);
        return methods;
    }
    add(platform.xen, good ? Method::xen_off : Method::xen_crash);
    add(!good && platform.hyperv_crash, Method::hyperv_crash);
    add(!good && platform.pvpanic, Method::pvpanic);
    // Where a triple fault is reported to the outside as a failure: on bhyve, and on machines that can only be reset,
    // such as Firecracker's.
    if (!good && (platform.triple_fault_reported || (!platform.acpi_off && !platform.acpi_reset))) {
        add(true, Method::triple_fault);
        return methods;
    }
    add(platform.acpi_off, Method::acpi_off);
    add(platform.acpi_reset, Method::acpi_reset);
    add(platform.hyperv_reset, Method::hyperv_reset);
    add(true, Method::keyboard);
    add(true, Method::triple_fault);
    return methods;
}

bool Ending::step(EndMachine& machine, hv::Privileged& cpu, Verdict verdict) {
    if (!verdict_) {
        verdict_ = verdict;
    }
    switch (const u32 at = next_++) {
    case 0: take(Method::exit_port, machine, cpu); return true;
    case 1: probe_cpuid(machine, cpu); return true;
    case 2: probe_acpi(machine); return true;
    case 3: methods_ = methods_of(platform_, *verdict_, restart_); return true;
    default:
        if (at - 4 >= methods_.count) {
            next_ = at; // stays past the last entry
            return false;
        }
        take(methods_.list[at - 4], machine, cpu);
        return true;
    }
}

void Ending::probe_cpuid(EndMachine& machine, hv::Privileged&) {
    const CpuidSnapshot& cpuid = machine.cpuid();
    const hv::Sightings sightings = hv::detect(cpuid, nullptr);
    platform_.xen = sightings.has(hv::VmGuest::xen);
    platform_.triple_fault_reported = sightings.has(hv::VmGuest::bhyve);
    if (const hv::Sighting* hyperv = sightings.find(hv::VmGuest::hyperv); hyperv != nullptr && hyperv->base != 0) {
        const CpuidRegisters features = cpuid.get(hyperv->base + 3);
        platform_.hyperv_crash = (features.edx & hyperv_crash_feature) != 0;
        platform_.hyperv_reset = (features.eax & hyperv_reset_privilege) != 0;
    }
}

void Ending::probe_acpi(EndMachine& machine) {
    std::optional<acpi::Tables> read;
    const acpi::Tables* tables = machine.tables();
    if (tables == nullptr) {
        if (const auto found = acpi::read_tables(machine.memory(), machine.rsdp())) {
            tables = &read.emplace(*found);
        }
    }
    if (tables == nullptr || !tables->fadt) {
        return;
    }
    fadt_ = tables->fadt;
    if (const auto s5 = acpi::find_s5(machine.memory(), *tables)) {
        s5_ = *s5;
    }
    platform_.acpi_off = s5_ && (fadt_->pm1a_control != 0 || fadt_->sleep_control.address != 0);
    platform_.acpi_reset = fadt_->reset.address != 0;
    if (const auto port = acpi::find_pvpanic(machine.memory(), fadt_->dsdt)) {
        pvpanic_port_ = *port;
        platform_.pvpanic = true;
    }
}

namespace {

void write_register(const acpi::Register& to, u8 value, EndMachine& machine, hv::Privileged& cpu) {
    if (to.space == acpi::Space::io) {
        cpu.out8(static_cast<u16>(to.address), value);
    } else {
        machine.write_memory(to.address, value);
    }
}

} // namespace

// [ACPI 6.5 §4.8.3.2.1, §4.8.3.7]
void Ending::sleep_s5(EndMachine& machine, hv::Privileged& cpu) {
    constexpr u16 sci_enabled = 1;
    constexpr u16 sleep_type = 7 << 10;
    constexpr u16 sleep_enable = 1 << 13;
    constexpr u8 reduced_sleep_enable = 1 << 5;
    const acpi::Fadt& fadt = *fadt_;
    if (fadt.pm1a_control != 0) {
        if (fadt.smi_command != 0 && fadt.acpi_enable != 0 && (cpu.in16(fadt.pm1a_control) & sci_enabled) == 0) {
            cpu.out8(fadt.smi_command, fadt.acpi_enable);
            for (Nanoseconds waited = 0; waited < acpi_mode_wait && (cpu.in16(fadt.pm1a_control) & sci_enabled) == 0;
                 waited += 10'000'000) {
                machine.wait(10'000'000);
            }
        }
        const auto sleep = [&](u16 port, u8 type) {
            const u32 kept = cpu.in16(port) & ~u32{sleep_type | sleep_enable};
            cpu.out16(port, static_cast<u16>(kept | u32{type} << 10 | sleep_enable));
        };
        sleep(fadt.pm1a_control, s5_->a);
        if (fadt.pm1b_control != 0) {
            sleep(fadt.pm1b_control, s5_->b);
        }
    } else {
        write_register(fadt.sleep_control, static_cast<u8>(s5_->a << 2 | reduced_sleep_enable), machine, cpu);
    }
    machine.wait(end_wait);
}

// [hv-tlfs, guest crash enlightenment]: parameters 3 and 4 give a text, if the host accepts one.
void Ending::crash_hyperv(EndMachine& machine, hv::Privileged& cpu) {
    const u64 offered = cpu.read_msr(hyperv_crash_control);
    if ((offered & hyperv_crash_notify) == 0) {
        return;
    }
    EndMachine::Text text{0, 0};
    if ((offered & hyperv_crash_message) != 0) {
        text = machine.reason();
    }
    constexpr u64 first_parameter = 0x4649525354; // "FIRST": identifies this kernel
    const std::array<u64, 5> parameters{first_parameter, cpu.read_msr(hyperv_guest_os_id_msr), to_underlying(*verdict_),
                                        text.physical, text.size};
    for (u32 i = 0; i < parameters.size(); ++i) {
        cpu.write_msr(hyperv_crash_parameter0 + i, parameters[i]);
    }
    cpu.write_msr(hyperv_crash_control, hyperv_crash_notify | (text.size != 0 ? hyperv_crash_message : 0));
    machine.wait(note_wait);
}

// A restart that the host has asked for is to boot again.
void Ending::note_restart(EndMachine& machine) {
    if (!restart_) {
        machine.note_restart(*verdict_);
    }
}

void Ending::take(Method method, EndMachine& machine, hv::Privileged& cpu) {
    switch (method) {
    case Method::exit_port:
        cpu.out32(debug_exit_port, to_underlying(*verdict_));
        machine.wait(exit_port_wait);
        break;
    case Method::xen_off: machine.xen_shutdown(xen_poweroff); break;
    case Method::xen_crash: machine.xen_shutdown(xen_crash); break;
    case Method::xen_reboot: machine.xen_shutdown(xen_reboot); break;
    case Method::hyperv_crash: crash_hyperv(machine, cpu); break;
    case Method::pvpanic:
        cpu.out8(pvpanic_port_, pvpanic_panicked);
        machine.wait(note_wait);
        break;
    case Method::acpi_off: sleep_s5(machine, cpu); break;
    case Method::acpi_reset:
        note_restart(machine);
        write_register(fadt_->reset, fadt_->reset_value, machine, cpu);
        machine.wait(end_wait);
        break;
    case Method::hyperv_reset:
        note_restart(machine);
        cpu.write_msr(hyperv_reset_msr, 1);
        machine.wait(end_wait);
        break;
    case Method::keyboard:
        note_restart(machine);
        // A busy controller drops commands. All bits set: there is no controller, so stop polling.
        for (u32 tries = 0; tries < 8; ++tries) {
            const u8 status = cpu.in8(keyboard_command);
            if (status == 0xff || (status & 2) == 0) {
                break;
            }
            machine.wait(1'000'000);
        }
        cpu.out8(keyboard_command, pulse_reset);
        machine.wait(end_wait); // Firecracker reports a failure if a triple fault follows immediately
        break;
    case Method::triple_fault:
        note_restart(machine);
        machine.triple_fault();
        break;
    }
}

} // namespace fl::boot
