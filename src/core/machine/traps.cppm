// Exceptions and the panic report: registers, backtrace with symbols, the verdict CRASH.
export module core.machine.traps;
import core.std;

export namespace fl {

/// Descriptor tables and stacks of their own for the exceptions that a broken stack raises; panics are reported from here on. `stack_guard`:
/// the unmapped page below the kernel's stack, `stack_size` the bytes above it. Interrupts stay off. First thing after the consoles.
void start_traps(u64 stack_guard, u64 stack_size);

/// Who gets vectors 32–255, with interrupts off: one function, which knows the rest.
using InterruptEntry = void (*)(u32 vector);
void set_interrupt_entry(InterruptEntry entry);

/// Raises what `job=panic fault=…` names: ud, gp, pf, stack, div, panic. False for any other name; does not return else.
bool provoke(std::string_view fault);

} // namespace fl
