// This machine's ACPI tables.
export module core.machine.acpi;
import core.std;
import core.acpi;
import core.result;

export namespace fl {

/// Reads the tables (rsdp 0: looks for them), keeps them. Once, after add_memory. An Error is
/// no reason to stop: everything works without tables, with a PIC and a PIT.
Result<void> start_acpi(u64 rsdp);
/// nullptr: there are none.
const acpi::Tables* acpi_tables();

} // namespace fl
