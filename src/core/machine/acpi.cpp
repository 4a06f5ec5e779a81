module core.machine.acpi;
import core.std;
import core.acpi;
import core.result;
import core.machine.memory;

namespace fl {

namespace {

constinit std::optional<acpi::Tables> tables;

} // namespace

Result<void> start_acpi(u64 rsdp) {
    auto read = acpi::read_tables(physical_memory(), rsdp);
    if (!read) {
        return read.error();
    }
    tables = *read;
    return {};
}

const acpi::Tables* acpi_tables() { return tables ? &*tables : nullptr; }

} // namespace fl
