// The end of the machine: the verdict record, then every way to stop, one after the other.
export module core.machine.exit;
import core.std;
import core.verdict;

export namespace fl {

/// Powers the machine off, or reports a crash, in a hypervisor's or the firmware's own way; returns when it could not.
using PowerOff = void (*)(Verdict verdict);
/// Two hooks, tried in this order when the debug exit port is absent: the backend's and ACPI's. nullptr: none.
void set_backend_power_off(PowerOff hook);
void set_acpi_power_off(PowerOff hook);

/// Prints the verdict record and ends the machine: debug exit port 0xf4, backend, ACPI, keyboard controller, triple fault. A call from
/// within itself (a fault on the way) goes on with the next way, so it always ends.
[[noreturn]] void end_vm(Verdict verdict, std::string_view reason);

} // namespace fl
