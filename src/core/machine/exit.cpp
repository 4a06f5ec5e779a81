module core.machine.exit;
import core.std;
import core.log;
import core.verdict;
import core.machine.cpu;
import core.machine.serial;

namespace fl {

namespace {

constexpr u16 debug_exit_port = 0xf4;

constinit PowerOff backend_power_off = nullptr;
constinit PowerOff acpi_power_off = nullptr;
constinit u32 next_way = 0; // each way is tried once, even if it faults and brings us back here

} // namespace

void set_backend_power_off(PowerOff hook) { backend_power_off = hook; }
void set_acpi_power_off(PowerOff hook) { acpi_power_off = hook; }

[[noreturn]] void end_vm(Verdict verdict, std::string_view reason) {
    cpu::interrupts_off();
    for (;;) {
        switch (next_way++) {
        case 0: log::Record("verdict").text("verdict", name(verdict)).text("reason", reason); break;
        case 1: flush_consoles(); break;
        case 2: cpu::out32(debug_exit_port, to_underlying(verdict)); break;
        case 3:
            if (backend_power_off != nullptr) {
                backend_power_off(verdict);
            }
            break;
        case 4:
            if (acpi_power_off != nullptr) {
                acpi_power_off(verdict);
            }
            break;
        case 5: cpu::out8(0x64, 0xfe); break; // keyboard controller: pulse the reset line
        case 6: {
            // No descriptor table and a breakpoint: a triple fault, which every hypervisor takes for the end.
            const struct [[gnu::packed]] {
                u16 limit = 0;
                u64 base = 0;
            } none;
            asm volatile("lidt %0; int3" ::"m"(none));
            break;
        }
        default: cpu::halt(); break;
        }
    }
}

} // namespace fl
