// Registers of the interrupt controllers: local APICs and IOAPICs if the MADT lists them, else the two 8259s. Routing
// is in core.interrupt_router.
export module core.machine.interrupts;
import core.std;
import core.acpi;
export import core.interrupt_router;
import core.result;

export namespace fl {

struct InterruptOptions {
    /// Permits the x2APIC. False: use the APIC's register page only: QEMU's TCG stops with "Bad icount read" when an
    /// x2APIC register is accessed while it counts instructions.
    bool x2apic = true;
    /// The hypervisor supports 15-bit destinations in messages and redirection entries [highest_destination].
    bool extended_destinations = false;
};

/// Programs the controllers with everything masked. `tables` may be nullptr. Call once, after start_traps(),
/// add_memory() and start_acpi(); interrupts stay off until the caller enables them.
void start_interrupts(const acpi::Tables* tables, const InterruptOptions& options);
/// Lines and vectors may be attached before interrupts are enabled. Detaching waits until no processor runs the
/// handler, so it must not be called from handlers.
InterruptController& interrupts();

/// On a further processor, with interrupts off: starts its local APIC and its vector table. Error{not_supported}: its
/// APIC does not support the mode of the first one. Error{exhausted}: no memory.
Result<void> join_interrupts();
/// Call once, on the boot processor, before the first further one is started: allocates the vector of kick_processor().
Result<void> start_kicks();
/// Sends an interrupt whose only effect is to end a halt. Callable from anywhere.
void kick_processor(u32 number);
/// The handler of a kick, on the kicked processor.
void take_kick(void*);
/// Another way to kick than the local APIC. send(): raises an interrupt on that processor whose handler is take_kick().
/// False: not on that one, or not now: the local APIC does it.
struct KickSender {
    void* context = nullptr;
    bool (*send)(void* context, u32 number) = nullptr;
};
/// Before the first further processor is started.
void use_kicks(KickSender sender);
/// Declares that processors 0 to count - 1 run and take interrupts.
void set_running_processors(u32 count);

/// Counters of the calling processor.
InterruptCounters interrupt_counters();
/// For the log: "x2APIC, IOAPIC" or "8259".
std::string_view interrupt_controllers();
/// True: lines are routed through IOAPICs; false: through the 8259s.
bool has_io_apic();

} // namespace fl
