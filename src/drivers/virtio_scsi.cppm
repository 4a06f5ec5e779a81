// virtio SCSI hosts [virtio-1.2 §5.6], on PCI and on a platform's memory bus: negotiation, the queues, hot add and
// remove. The request queues and the disks are in drivers.virtio_scsi.disk; drivers.scsi.units finds, tracks and
// announces the units.
//
// After a violation of the protocol, or when a device answers nothing even after a reset of its logical units, all its
// disks close. The device is then reset, so that it can no longer reach any buffer; a VMM that cannot reset a device in
// use keeps them, and they are not reused.
export module drivers.virtio_scsi;
import core.std;
import core.result;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.virtio.controller;

export namespace fl::drivers::virtio_scsi {

inline constexpr std::array<pci::Match, 2> pci_ids{{
    {.vendor = virtio::pci_vendor, .device = virtio::modern_pci_id(virtio::type_scsi)},
    {.vendor = virtio::pci_vendor, .device = virtio::transitional_scsi},
}};

/// Attaches a PCI function.
io::Task<Result<void>> probe(Environment& environment, pci::Device function);
/// Attaches the device whose registers are at `base`, a physical address. `gsi`: its interrupt, if known.
io::Task<Result<void>> probe(Environment& environment, u64 base, std::optional<u32> gsi);

/// The driver of a device that is started and has accepted `features`, for callers that destroy it. nullptr: no memory.
virtio::Controller* make_controller(Environment& environment, virtio::Device& device, u64 features);

} // namespace fl::drivers::virtio_scsi
