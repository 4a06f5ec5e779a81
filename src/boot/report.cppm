// What the kernel prints of the machine before and while devices are bound: lines for people and records
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

/// What the entry and the loader have handed over.
void print_boot_info(const BootInfo& info);
/// Words of the command line that are for Linux: a line and the record `ignored`; nothing where there are none.
void print_loader_words(const LoaderWords& words);
/// What is wrong with the command line, each message once.
void print_option_errors(const OptionErrors& errors);
/// What is wrong with the rules of a map file and of the command line.
void print_diagnostics(const drivers::Table& table);

/// What the `boot` record says, beside the memory map.
struct BootFacts {
    std::string_view backend;
    std::string_view clock;
    u64 tsc_hz = 0;
    bool clock_assumed = false;
    Nanoseconds detected = 0;    // from the entry to the choice of a hypervisor
    Nanoseconds first_probe = 0; // from the entry on
};
void boot_record(const BootInfo& info, const hv::Sightings& sightings, const BootFacts& facts);

/// What of the loader's and the firmware's tables is not used. `tables`: nullptr without ACPI. `config_ports`: PCI
/// configuration space is reached through ports, so that a damaged MCFG costs no device of segment 0.
void report_left_out(const BootInfo& info, const acpi::Tables* tables, bool config_ports, Devices& into);

} // namespace fl::boot
