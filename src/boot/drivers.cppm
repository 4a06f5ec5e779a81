// The drivers of this build, as data. A native driver of a PCI device is one line in pci_drivers; a synthetic one a line in the list of its
// hypervisor's backend. Which of them come first is not decided here but by the driver table.
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

export namespace fl::boot {

/// `name` as in drivers::known_drivers; `ids`: what it drives; `probe`: attaches one function.
struct PciDriver {
    std::string_view name;
    std::span<const drivers::pci::Match> ids;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, drivers::pci::Device device);
};

inline io::Task<Result<void>> probe_ata(drivers::Environment& environment, drivers::pci::Device device) {
    return drivers::ata::probe(environment, device, drivers::Ports{});
}
inline constexpr std::array<PciDriver, 1> pci_drivers{{
    {"ata", drivers::ata::ids, probe_ata},
}};

/// `type`: as the backend's bus calls it (hv::SyntheticDevice::type).
template <class B>
struct SyntheticDriver {
    std::string_view name;
    std::string_view type;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, B& backend, const hv::SyntheticDevice& device);
};

/// The synthetic drivers for one backend; none for most.
template <class B>
inline constexpr std::array<SyntheticDriver<B>, 0> synthetic_drivers{};

#ifdef FIRSTLIGHT_HV_XEN
template <>
inline constexpr std::array<SyntheticDriver<hv::Xen>, 1> synthetic_drivers<hv::Xen>{{
    {"xen_blk", "vbd", drivers::xen_blk::probe},
}};
#endif

} // namespace fl::boot
