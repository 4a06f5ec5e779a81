// Interrupts on this processor: local APIC and IOAPICs where the MADT tells of them, else the pair of 8259s.
export module core.machine.interrupts;
import core.std;
import core.acpi;
import core.interrupt;
import core.result;

export namespace fl {

/// Programs the controllers with everything masked. `tables` may be nullptr. Once, after start_traps, add_memory and
/// start_acpi; interrupts stay off until the caller switches them on. `x2apic` false keeps to the APIC's page of
/// registers: QEMU's own emulation stops with "Bad icount read" when an x2APIC register is accessed while it counts
/// instructions.
void start_interrupts(const acpi::Tables* tables, bool x2apic = true);
/// Lines and vectors may be attached before interrupts are on. Lines go to the processor that attaches them; vectors
/// are valid everywhere. Detaching waits until no processor runs the handler any more, so it is not for handlers.
InterruptController& interrupts();

/// On a further processor, with interrupts off: its local APIC. Error{not_supported}: not of the kind that the first
/// one has.
Result<void> join_interrupts();
/// Once, on the boot processor, before the first further one is started: takes the vector that kick_processor() sends.
Result<void> start_kicks();
/// An interrupt that does nothing but end a halt. From anywhere.
void kick_processor(u32 apic_id);
/// Processors 0 to count - 1 run and take interrupts.
void set_running_processors(u32 count);

struct InterruptCounters {
    u64 taken = 0;      // with at least one handler
    u64 spurious = 0;   // announced by the controller and withdrawn
    u64 unexpected = 0; // a vector that nobody attached
};
/// Of the calling processor.
InterruptCounters interrupt_counters();
/// For the log: "x2APIC, IOAPIC" or "8259".
std::string_view interrupt_controllers();
/// Lines go through IOAPICs; false: through the 8259s.
bool has_io_apic();

} // namespace fl
