// Watches for requests to add or remove PCI devices, with the ports and tables of this machine.
export module boot.machine.hotplug;
import core.std;
import core.interrupt;
import core.mmio;
import io.executor;
import io.task;
import boot.sources;

export namespace fl::boot {

/// Called once, when the devices in `pci` have been found and attached. Reports requests until the machine ends;
/// `executor`, `interrupts` and `mmio` must live as long. A machine without hot plug costs a search of the DSDT.
void watch_pci_hotplug(const PciSource& pci, io::Executor& executor, InterruptController& interrupts, MmioMapper& mmio,
                       io::TaskGroup& tasks);

} // namespace fl::boot
