// The interrupt controllers' registers: local APICs and IOAPICs where the MADT names them, else the pair of 8259s. What
// is attached where is core.interrupt_router's.
export module core.machine.interrupts;
import core.std;
import core.acpi;
export import core.interrupt_router;
import core.result;

export namespace fl {

struct InterruptOptions {
    /// The x2APIC may be used. False keeps to the APIC's page of registers: QEMU's own emulation stops with "Bad icount
    /// read" when an x2APIC register is accessed while it counts instructions.
    bool x2apic = true;
    /// The hypervisor takes 15 bits of a destination in messages and redirection entries [highest_destination].
    bool extended_destinations = false;
};

/// Programs the controllers with everything masked. `tables` may be nullptr. Once, after start_traps, add_memory and
/// start_acpi; interrupts stay off until the caller switches them on.
void start_interrupts(const acpi::Tables* tables, const InterruptOptions& options);
/// Lines and vectors may be attached before interrupts are on. Detaching waits until no processor runs the handler any
/// more, so it is not for handlers.
InterruptController& interrupts();

/// On a further processor, with interrupts off: its local APIC and its table of vectors. Error{not_supported}: the APIC
/// is not of the kind that the first one has. Error{exhausted}: no memory.
Result<void> join_interrupts();
/// Once, on the boot processor, before the first further one is started: takes the vector that kick_processor() sends.
Result<void> start_kicks();
/// An interrupt that does nothing but end a halt. From anywhere.
void kick_processor(u32 apic_id);
/// Processors 0 to count - 1 run and take interrupts.
void set_running_processors(u32 count);

/// Of the calling processor.
InterruptCounters interrupt_counters();
/// For the log: "x2APIC, IOAPIC" or "8259".
std::string_view interrupt_controllers();
/// Lines go through IOAPICs; false: through the 8259s.
bool has_io_apic();

} // namespace fl
