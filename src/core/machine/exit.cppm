// The end of the machine: the verdict record, then whatever boot.ending knows to do.
export module core.machine.exit;
import core.std;
import core.verdict;

export namespace fl {

/// Ends the machine and does not return. Called again by a fault on the way: goes on behind the step that faulted.
using EndMachine = void (*)(Verdict verdict, std::string_view reason);
void set_end_machine(EndMachine hook);

/// Prints the verdict record and ends the machine. A call from within itself (a fault on the way) goes on with the next
/// step, so it always ends.
[[noreturn]] void end_vm(Verdict verdict, std::string_view reason);

} // namespace fl
