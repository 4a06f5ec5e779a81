// Discovers the devices of this machine that no bus enumerates by itself, and adds them to their sources.
export module boot.machine.sources;
import core.std;
import boot.devices;
import boot.options;
import boot.sources;

export namespace fl::boot {

/// Whether PCI configuration space is accessed through I/O ports.
bool has_config_ports();
/// Enumerates all PCI functions. Segment 0 uses the configuration ports if present; otherwise it uses memory-mapped
/// configuration, like all other segments. Anything larger than a single function that is skipped is reported to
/// `devices`.
void find_pci_functions(PciSource& into, Devices& devices);
/// Adds the virtio-mmio devices named by the command line and, on hardware-reduced machines, those in ACPI.
void find_virtio_mmio(VirtioMmioSource& into, const LoaderWords& words);

} // namespace fl::boot
