// The drivers of this build, as data. A native driver of a PCI device is one line in pci_drivers; a synthetic one a
// line in the list of its hypervisor's backend. Which of them come first is not decided here but by the driver table.
export module boot.drivers;
import core.std;
import core.result;
import io.task;
import hv.backend;
import hv.list;
import drivers.driver;
import drivers.pci;
import drivers.ata;
import drivers.machine.ports;
#ifdef FIRSTLIGHT_HV_XEN
import drivers.xen_blk;
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

/// `name` as in drivers::known_drivers; `ids`: what it drives; `probe`: attaches one function, the driver's `index`th.
/// `first`: functions that come before all others of the driver. May be nullptr.
struct PciDriver {
    std::string_view name;
    std::span<const drivers::pci::Match> ids;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, drivers::pci::Device device, u32 index);
    bool (*first)(const drivers::pci::Device& device);
};

/// Four places for disks on each controller, in the order of Linux: hda to hdd, hde to hdh … The controller at the
/// fixed ports comes first: its disks are those that can have a synthetic twin.
inline io::Task<Result<void>> probe_ata(drivers::Environment& environment, drivers::pci::Device device, u32 index) {
    static constinit drivers::ata::PortClaims claims;
    return drivers::ata::probe(environment, device, drivers::Ports{}, 4 * index, &claims);
}
inline constexpr std::array<PciDriver, 1> pci_drivers{{
    {"ata", drivers::ata::ids, probe_ata, drivers::ata::is_legacy},
}};

/// `type`: as the backend's bus calls it (hv::SyntheticDevice::type). `bus`: B::Bus of the backend in whose list it
/// stands; untyped, so that one loop does for all of them.
struct SyntheticDriver {
    std::string_view name;
    std::string_view type;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, void* bus, const hv::SyntheticDevice& device);
};
template <hv::BusRoot B,
          io::Task<Result<void>> (*probe)(drivers::Environment&, typename B::Bus&, const hv::SyntheticDevice&)>
io::Task<Result<void>> probe_on(drivers::Environment& environment, void* bus, const hv::SyntheticDevice& device) {
    return probe(environment, *static_cast<typename B::Bus*>(bus), device);
}

/// The synthetic drivers for one backend; none for most.
template <class B>
inline constexpr std::array<SyntheticDriver, 0> synthetic_drivers{};

#ifdef FIRSTLIGHT_HV_XEN
template <>
inline constexpr std::array<SyntheticDriver, 1> synthetic_drivers<hv::Xen>{{
    {"xen_blk", "vbd", probe_on<hv::Xen, drivers::xen_blk::probe>},
}};
#endif

/// Synthetic devices that are no disks: no rule of the table names them, they are probed after the disks.
template <class B>
inline constexpr std::array<SyntheticDriver, 0> service_drivers{};

#ifdef FIRSTLIGHT_HV_HYPERV
template <>
inline constexpr std::array<SyntheticDriver, 2> synthetic_drivers<hv::HyperV>{{
    {"storvsc", drivers::storvsc::scsi_class, probe_on<hv::HyperV, drivers::storvsc::probe>},
    {"storvsc", drivers::storvsc::ide_class, probe_on<hv::HyperV, drivers::storvsc::probe>},
}};

inline io::Task<Result<void>> probe_balloon(drivers::Environment& environment, hv::HyperV::Bus& bus,
                                            const hv::SyntheticDevice& device) {
    static constinit u64 total = 0; // pages that the kernel could still give when it began to report
    total = frames().free_bytes() / frame_size;
    const drivers::hv_balloon::Memory memory{dma_memory(), [] { return total; },
                                             [] { return frames().free_bytes() / frame_size; }};
    return drivers::hv_balloon::probe(environment, bus, device, memory);
}
template <>
inline constexpr std::array<SyntheticDriver, 4> service_drivers<hv::HyperV>{{
    {"hv_util", drivers::hv_util::shutdown_class, probe_on<hv::HyperV, drivers::hv_util::probe>},
    {"hv_util", drivers::hv_util::heartbeat_class, probe_on<hv::HyperV, drivers::hv_util::probe>},
    {"hv_util", drivers::hv_util::time_sync_class, probe_on<hv::HyperV, drivers::hv_util::probe>},
    {"hv_balloon", drivers::hv_balloon::balloon_class, probe_on<hv::HyperV, probe_balloon>},
}};
#endif

} // namespace fl::boot
