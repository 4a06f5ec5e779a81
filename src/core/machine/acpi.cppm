// ACPI tables of this machine.
export module core.machine.acpi;
import core.std;
import core.acpi;
import core.result;

export namespace fl {

/// Reads the tables and keeps them. `rsdp`: physical address; 0: search for it. Call once, after add_memory(). An Error
/// is not fatal: everything works without tables, with a PIC and a PIT.
Result<void> start_acpi(u64 rsdp);
/// nullptr: no tables.
const acpi::Tables* acpi_tables();

} // namespace fl
