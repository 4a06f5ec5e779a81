// Further processors: found in the MADT, started by INIT and startup IPIs [SDM-3 9.4], stopped in the end.
export module core.machine.smp;
import core.std;
import core.acpi;
import core.result;
import core.time;

export namespace fl {

/// What a further processor does; both functions are called on it, with interrupts on, number > 0. An Error from
/// join(): it is reported, and the processor is not used. serve() returns soon after its processor has been told to
/// stop.
struct ProcessorWork {
    void* context;
    Result<void> (*join)(void* context, u32 number);
    void (*serve)(void* context, u32 number);
};

struct Processors {
    u32 listed = 1;   // enabled in the MADT; 1 without one
    u32 running = 1;  // numbers 0 to running - 1
    u32 left_out = 0; // did not come up, or could not join; each has its line in the log
};

/// Starts up to `most` - 1 further ones, one after the other; each has joined when the next one begins. Once, on the
/// boot processor, with clock, timer and interrupts running. Every wait is bounded: 1 s for a processor to come up,
/// `join_bound` for its join().
Processors start_processors(const acpi::Tables* tables, u32 most, const ProcessorWork& work, Nanoseconds join_bound);
/// Waits, for a bounded time, until the serve() of each has returned; they take no interrupt after that. Whoever calls
/// has told them.
void await_stopped();

} // namespace fl
