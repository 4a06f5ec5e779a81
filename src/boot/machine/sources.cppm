// Finds the devices of this machine that no bus enumerates by itself, and puts them into their sources.
export module boot.machine.sources;
import core.std;
import boot.devices;
import boot.options;
import boot.sources;

export namespace fl::boot {

/// Whether PCI configuration space is reached through ports.
bool has_config_ports();
/// All PCI functions. Segment 0 through the ports where they are there, else in memory like all other segments. What is
/// left out beyond single functions is reported to `devices`.
void find_pci_functions(PciSource& into, Devices& devices);
/// The virtio-mmio devices that the command line names and, on machines without the old hardware, those of ACPI.
void find_virtio_mmio(VirtioMmioSource& into, const LoaderWords& words);

} // namespace fl::boot
