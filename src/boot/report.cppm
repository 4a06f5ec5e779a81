// What the kernel prints about the machine before and while devices are bound: human-readable lines and records
// (docs/INTERFACES.md "Console and records").
export module boot.report;
import core.std;
import core.acpi;
import core.time;
import hv.detect;
import drivers.table;
import boot.devices;
import boot.handoff;
import boot.options;

export namespace fl::boot {

/// The data handed over by the loader and the entry.
void print_boot_info(const BootInfo& info);
/// Command line words meant for Linux: a line and the record `ignored`; nothing if there are none.
void print_loader_words(const LoaderWords& words);
/// Prints each command line error once.
void print_option_errors(const OptionErrors& errors);
/// Prints the errors in the rules of the map file and the command line.
void print_diagnostics(const drivers::Table& table);

/// The contents of the `boot` record besides the memory map.
struct BootFacts {
    std::string_view backend;
    std::string_view clock;
    u64 tsc_hz = 0;
    bool clock_assumed = false;
    Nanoseconds detected = 0;    // from the entry to the choice of a hypervisor
    Nanoseconds first_probe = 0; // from the entry
};
void boot_record(const BootInfo& info, const hv::Sightings& sightings, const BootFacts& facts);

/// Reports the parts of the loader's and the firmware's tables that are not used. `tables`: nullptr without ACPI.
/// `config_ports`: PCI configuration space is accessed through ports, so that a damaged MCFG loses no device of segment
/// 0.
void report_left_out(const BootInfo& info, const acpi::Tables* tables, bool config_ports, Devices& into);

} // namespace fl::boot
