module boot.machine.sources;
import core.std;
import core.acpi;
import core.machine.acpi;
import core.machine.memory;
import drivers.pci;
import drivers.pci.access;
import drivers.machine.pci;
import boot.devices;
import boot.options;
import boot.sources;

namespace fl::boot {

namespace {

using drivers::pci::Ecam;
using drivers::pci::MechanismOne;

constinit MechanismOne ports{}; // configuration mechanism #1; one pair of ports per machine

// The root buses of segment 0, from ACPI.
std::optional<drivers::pci::Roots> acpi_roots() {
    const acpi::Tables* tables = acpi_tables();
    const acpi::RootBridges found =
        tables != nullptr ? acpi::find_root_bridges(physical_memory(), *tables) : acpi::RootBridges{};
    if (found.bridges == 0 && !found.incomplete) {
        return std::nullopt;
    }
    drivers::pci::Roots roots{.buses = {found.buses}, .others = found.others()};
    for (u32 i = 0; i < acpi::ecam_count(physical_memory(), tables->mcfg); ++i) {
        if (const auto ecam = acpi::ecam(physical_memory(), tables->mcfg, i); ecam && ecam->segment == 0) {
            roots.first = ecam->first_bus;
            roots.last = ecam->last_bus;
        }
    }
    return roots;
}

} // namespace

bool has_config_ports() { return ports.present(); }

void find_pci_functions(PciSource& into, Devices& devices) {
    const u64 mcfg = acpi_tables() != nullptr ? acpi_tables()->mcfg : 0;
    const bool have_ports = ports.present();
    if (have_ports) {
        into.count_found(drivers::pci::enumerate(ports, PciSource::found, &into, 0, acpi_roots, mcfg != 0));
    }
    const u32 count = mcfg != 0 ? acpi::ecam_count(physical_memory(), mcfg) : 0;
    for (u32 i = 0; i < count; ++i) {
        const auto at = acpi::ecam(physical_memory(), mcfg, i);
        auto* ecam = at ? new (std::nothrow)
                              Ecam(device_registers(), at->base, at->first_bus, at->last_bus, at->segment)
                        : nullptr;
        if (at && at->segment == 0 && have_ports) {
            if (ecam != nullptr) {
                ports.use_beyond(*ecam);
            }
            continue;
        }
        if (ecam == nullptr) {
            devices.left_out("ranges of PCI buses", 1, !have_ports || at,
                             at ? "no memory for them" : "the MCFG table has an invalid entry");
            continue;
        }
        const bool first_segment = at->segment == 0;
        into.count_found(drivers::pci::enumerate(*ecam, PciSource::found, &into, at->first_bus,
                                                 first_segment ? acpi_roots : nullptr, first_segment));
    }
    if (!have_ports && count == 0 && acpi_tables() != nullptr) {
        const u64 base = acpi::find_root_bridges(physical_memory(), *acpi_tables()).cba;
        auto* ecam = base != 0 ? new (std::nothrow) Ecam(device_registers(), base, 0, 255) : nullptr;
        if (ecam != nullptr) {
            into.count_found(drivers::pci::enumerate(*ecam, PciSource::found, &into, 0, acpi_roots, true));
        } else if (base != 0) {
            devices.left_out("ranges of PCI buses", 1, true, "no memory for them");
        }
    }
}

void find_virtio_mmio(VirtioMmioSource& into, const LoaderWords& words) {
    const auto probe = [](void* context, const acpi::VirtioMmioNode& node) {
        auto& source = *static_cast<VirtioMmioSource*>(context);
        if (source.seen(node.base)) {
            return;
        }
        VirtioMmioDevice device{.base = node.base, .gsi = node.gsi};
        if (const auto mapped = map_mmio(node.base, 16)) {
            const auto* registers = reinterpret_cast<const volatile u32*>(*mapped);
            device.magic = registers[0];
            device.version = registers[1];
            device.device_id = registers[2];
        }
        source.add(device);
    };
    for (const MmioDevice& device : words.devices()) {
        probe(&into, {device.address, 0, device.interrupt});
    }
    into.leave_out_words(words.devices_dropped);
    const acpi::Tables* tables = acpi_tables();
    if (tables != nullptr && tables->fadt && tables->fadt->hardware_reduced) {
        into.leave_out_acpi(acpi::find_virtio_mmio(physical_memory(), *tables, probe, &into));
    }
}

} // namespace fl::boot
