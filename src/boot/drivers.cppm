// The drivers of this build: one list for each device source (boot.sources). A native PCI driver is one line in
// pci_drivers; a synthetic driver is one line in the list of its hypervisor's backend. Their priority is decided by the
// driver table, not here.
export module boot.drivers;
import core.std;
import core.result;
import io.task;
import hv.backend;
import hv.list;
import drivers.driver;
import drivers.table;
import drivers.pci;
import drivers.ata;
import drivers.ahci;
import drivers.e1000;
import drivers.nvme;
import drivers.pvscsi;
import drivers.virtio.protocol;
import drivers.virtio_blk;
import drivers.virtio_scsi;
import drivers.machine.ports;
import boot.backend;
import boot.sources;
#ifdef FIRSTLIGHT_HV_XEN
import drivers.xen_blk;
import drivers.xen_console;
import drivers.xen_control;
import drivers.xen_net;
#endif
#ifdef FIRSTLIGHT_HV_HYPERV
import core.dma;
import core.memory;
import core.machine.memory;
import drivers.storvsc;
import drivers.hv_util;
import drivers.hv_balloon;
#endif

export namespace fl::boot {

/// Each controller reserves four disk names, in Linux's order: hda to hdd, hde to hdh … The controller at the legacy
/// ports is probed first, because only its disks can have a synthetic twin.
inline io::Task<Result<void>> probe_ata(drivers::Environment& environment, drivers::pci::Device device, u32 index) {
    static constinit drivers::ata::PortClaims claims;
    return drivers::ata::probe(environment, device, drivers::Ports{}, 4 * index, &claims);
}
inline io::Task<Result<void>> probe_virtio_blk(drivers::Environment& environment, drivers::pci::Device device, u32) {
    return drivers::virtio_blk::probe(environment, device);
}
inline io::Task<Result<void>> probe_virtio_scsi(drivers::Environment& environment, drivers::pci::Device device, u32) {
    return drivers::virtio_scsi::probe(environment, device);
}
inline constexpr auto pci_drivers = std::to_array<PciDriver>({
    {"ata", drivers::ata::ids, probe_ata, drivers::ata::is_legacy},
    {"ahci", drivers::ahci::ids, drivers::ahci::probe, nullptr},
    {"nvme", drivers::nvme::ids, drivers::nvme::probe, nullptr},
    {"virtio_blk", drivers::virtio_blk::pci_ids, probe_virtio_blk, nullptr},
    {"virtio_scsi", drivers::virtio_scsi::pci_ids, probe_virtio_scsi, nullptr},
    {"pvscsi", drivers::pvscsi::ids, drivers::pvscsi::probe, nullptr},
    {"e1000", drivers::e1000::ids, drivers::e1000::probe, nullptr},
});
static_assert(std::ranges::all_of(pci_drivers, [](const PciDriver& d) { return drivers::driver_named(d.name); }));

inline io::Task<Result<void>> probe_virtio_mmio_blk(drivers::Environment& environment, const VirtioMmioDevice& device,
                                                    u32) {
    return drivers::virtio_blk::probe(environment, device.base, device.gsi);
}
inline io::Task<Result<void>> probe_virtio_mmio_scsi(drivers::Environment& environment, const VirtioMmioDevice& device,
                                                     u32) {
    return drivers::virtio_scsi::probe(environment, device.base, device.gsi);
}
inline constexpr auto virtio_mmio_drivers = std::to_array<VirtioMmioDriver>({
    {"virtio_blk", drivers::virtio::type_block, probe_virtio_mmio_blk},
    {"virtio_scsi", drivers::virtio::type_scsi, probe_virtio_mmio_scsi},
});

/// The drivers for the devices on one backend's bus; empty for most. Drivers without a twin (services) are not named by
/// any rule of the table, and are tried after those that are.
template <class B>
inline constexpr std::array<BusDriver<BusOf<B>>, 0> bus_drivers{};

#ifdef FIRSTLIGHT_HV_XEN
template <>
inline constexpr std::array<BusDriver<hv::Xen::Bus>, 4> bus_drivers<hv::Xen>{{
    {{"xen_blk", "vbd"}, drivers::xen_blk::probe},
    {{"xen_net", "vif"}, drivers::xen_net::probe},
    {{drivers::xen_control::driver_name, drivers::xen_control::device_type}, drivers::xen_control::probe},
    {{drivers::xen_console::driver_name, drivers::xen_console::device_type}, drivers::xen_console::probe},
}};
#endif

#ifdef FIRSTLIGHT_HV_HYPERV
inline io::Task<Result<void>> probe_balloon(drivers::Environment& environment, hv::HyperV::Bus& bus,
                                            const hv::SyntheticDevice& device) {
    static constinit u64 total = 0; // pages available to the kernel when reporting began
    total = frames().free_bytes() / frame_size;
    const drivers::hv_balloon::Memory memory{dma_memory(), [] { return total; },
                                             [] { return frames().free_bytes() / frame_size; }};
    return drivers::hv_balloon::probe(environment, bus, device, memory);
}
template <>
inline constexpr std::array<BusDriver<hv::HyperV::Bus>, 6> bus_drivers<hv::HyperV>{{
    {{"storvsc", drivers::storvsc::scsi_class}, drivers::storvsc::probe},
    {{"storvsc", drivers::storvsc::ide_class}, drivers::storvsc::probe},
    {{"hv_util", drivers::hv_util::shutdown_class}, drivers::hv_util::probe},
    {{"hv_util", drivers::hv_util::heartbeat_class}, drivers::hv_util::probe},
    {{"hv_util", drivers::hv_util::time_sync_class}, drivers::hv_util::probe},
    {{"hv_balloon", drivers::hv_balloon::balloon_class}, probe_balloon},
}};
#endif

} // namespace fl::boot
