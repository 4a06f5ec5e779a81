// The end of the machine: the verdict record, then the steps of boot.ending.
export module core.machine.exit;
import core.std;
import core.verdict;

export namespace fl {

/// Ends the machine; does not return. If a fault in one step calls it again, it continues with the next step.
using EndMachine = void (*)(Verdict verdict, std::string_view reason);
/// Sets the function that end_vm() calls.
void set_end_machine(EndMachine hook);

/// Prints the verdict record and ends the machine. A nested call (from a fault in one of the steps) continues with the
/// next step, so that it always ends.
[[noreturn]] void end_vm(Verdict verdict, std::string_view reason);

} // namespace fl
