// Further processors: listed in the MADT and started by INIT and startup IPIs [SDM-3 9.4], or started by the
// hypervisor; stopped at the end.
export module core.machine.smp;
import core.std;
import core.acpi;
import core.processor;
import core.result;
import core.time;

export namespace fl {

/// The work of a further processor. Both functions are called on it, with interrupts on, number > 0. An Error from
/// join() is reported, and the processor is not used. serve() must return soon after its processor was asked to stop.
struct ProcessorWork {
    void* context;
    Result<void> (*join)(void* context, u32 number);
    void (*serve)(void* context, u32 number);
};

/// A hypervisor that starts processors itself [hv::StartsProcessors]: they begin in 64-bit mode, and need no table that
/// lists them and no page below 1 MiB.
struct ProcessorStarter {
    void* context = nullptr;
    u32 count = 0; // processors of the machine, the boot processor included
    Result<void> (*start)(void* context, u32 index, const ProcessorStart& state) = nullptr;
    void (*stop)(void* context, u32 index) = nullptr;
    void (*yield)(void* context) = nullptr;
};

/// Result of start_processors(), the boot processor included.
struct Processors {
    u32 listed = 1;   // enabled in the MADT, or known to the starter
    u32 running = 1;  // numbers 0 to running - 1
    u32 left_out = 0; // failed to start or to join; each is logged
};

/// Starts up to `maximum` - 1 further processors, one at a time: each has joined before the next is started. Call once,
/// on the boot processor, with clock, timer and interrupts running. Every wait is bounded: 1 s for a processor to
/// start, `join_bound` (ns) for its join(). `starter`: used in place of IPIs if it knows more than one processor; of
/// the processors that it knows, no more than the MADT lists, if there is one.
Processors start_processors(const acpi::Tables* tables, u32 maximum, const ProcessorWork& work, Nanoseconds join_bound,
                            const ProcessorStarter& starter = {});
/// Waits, for a bounded time, until each serve() has returned; those processors take no interrupts afterwards. The
/// caller must have asked them to stop.
void await_stopped();

} // namespace fl
