// Exceptions and the panic report: registers, backtrace with symbols, the verdict CRASH.
export module core.machine.traps;
import core.std;

export namespace fl {

/// Descriptor tables and stacks of their own for the exceptions that a broken stack raises; panics are reported from
/// here on. `stack_guard`: the unmapped page below the kernel's stack, `stack_size` the bytes above it. Interrupts stay
/// off. First thing after the consoles. The calling processor is number 0 from here on.
void start_traps(u64 stack_guard, u64 stack_size);
/// The same tables for processor `number`, on itself. Its stack stands above the guard page, and above the stack
/// `emergency_stacks_size` bytes for its exceptions.
void join_traps(u32 number, u64 stack_guard, u64 stack_size);
inline constexpr u64 emergency_stacks_size = 3 * 8192;

/// Who gets vectors 32–255, with interrupts off: one function, which knows the rest.
using InterruptEntry = void (*)(u32 vector);
void set_interrupt_entry(InterruptEntry entry);

/// How a panic stops the other processors: an NMI to each, which parks it. Returns when they have stopped, or after a
/// bounded time.
using StopOthers = void (*)();
void set_stop_others(StopOthers stop);

/// Raises what `job=panic fault=…` names: ud, gp, pf, text, nx, stack, div, panic. False for any other name; does not
/// return else, but for text and nx on a machine whose page tables do not protect as they should.
bool provoke(std::string_view fault);

} // namespace fl
