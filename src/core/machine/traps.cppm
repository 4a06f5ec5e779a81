// Exceptions and the panic report: registers, backtrace with symbols, the verdict CRASH.
export module core.machine.traps;
import core.std;

export namespace fl {

/// Installs the descriptor tables, with separate stacks for exceptions that a broken stack can raise; panics are
/// reported from now on. `stack_guard`: the unmapped page below the kernel's stack, `stack_size`: the bytes above it.
/// Interrupts stay off. Call right after the consoles are set up. The calling processor becomes number 0.
void start_traps(u64 stack_guard, u64 stack_size);
/// The same for processor `number`, called on it. Its stack is above the guard page, followed by
/// `emergency_stacks_size` bytes for its exceptions.
void join_traps(u32 number, u64 stack_guard, u64 stack_size);
inline constexpr u64 emergency_stacks_size = 3 * 8192;

/// Handler of vectors 32–255, called with interrupts off.
using InterruptEntry = void (*)(u32 vector);
void set_interrupt_entry(InterruptEntry entry);

/// Stops the other processors in a panic: sends each an NMI, which parks it. Returns when they have stopped, or after a
/// bounded time.
using StopOthers = void (*)();
void set_stop_others(StopOthers stop);

/// Raises the fault of `job=panic fault=…`: ud, gp, pf, text, nx, stack, div, panic. False for any other name.
/// Otherwise it does not return, unless page protection fails to work for text or nx.
bool provoke(std::string_view fault);

} // namespace fl
