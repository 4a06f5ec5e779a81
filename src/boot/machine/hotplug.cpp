module boot.machine.hotplug;
import core.std;
import core.acpi;
import core.interrupt;
import core.log;
import core.machine.acpi;
import core.machine.cpu;
import core.machine.memory;
import core.mmio;
import core.result;
import drivers.pci;
import drivers.pci.hotplug;
import io.executor;
import io.task;
import boot.sources;

namespace fl::boot {

namespace {

class ProcessorPorts final : public drivers::pci::Ports {
  public:
    u8 in8(u16 port) override { return cpu::in8(port); }
    void out8(u16 port, u8 value) override { cpu::out8(port, value); }
    void out16(u16 port, u16 value) override { cpu::out16(port, value); }
    u32 in32(u16 port) override { return cpu::in32(port); }
    void out32(u16 port, u32 value) override { cpu::out32(port, value); }
};
constinit ProcessorPorts ports;

// QEMU's registers, if this machine has them.
std::optional<drivers::pci::AcpiHotplug> acpi_hotplug() {
    const acpi::Tables* tables = acpi_tables();
    if (tables == nullptr || !tables->fadt || tables->fadt->gpe0 == 0 || tables->fadt->gpe0_bytes < 2) {
        return std::nullopt;
    }
    const acpi::Fadt& fadt = *tables->fadt;
    const auto registers = acpi::find_pci_hotplug(physical_memory(), fadt.dsdt);
    if (!registers) {
        return std::nullopt;
    }
    const u8 half = fadt.gpe0_bytes / 2;
    drivers::pci::AcpiHotplug found{.registers = *registers,
                                    .gpe_status = fadt.gpe0,
                                    .gpe_enable = static_cast<u16>(fadt.gpe0 + half),
                                    .gpe_bytes = half,
                                    .sci = {.gsi = fadt.sci, .isa = fadt.sci < 16, .level = true, .active_low = true}};
    if (fadt.pm1a_event != 0) {
        found.pm1a_enable = static_cast<u16>(fadt.pm1a_event + fadt.pm1_event_bytes / 2);
    }
    return found;
}

} // namespace

void watch_pci_hotplug(const PciSource& pci, io::Executor& executor, InterruptController& interrupts, MmioMapper& mmio,
                       io::TaskGroup& tasks) {
    const auto acpi = acpi_hotplug();
    if (!acpi && pci.bridges().empty()) {
        return;
    }
    auto* hotplug = new (std::nothrow) drivers::pci::Hotplug(executor, interrupts, mmio); // as long as the machine
    if (hotplug == nullptr) {
        log::warning("pci: hot plug is not watched: no memory");
        return;
    }
    u32 watched = 0;
    for (const drivers::pci::Device& bridge : pci.bridges()) {
        const auto added = hotplug->add_port(bridge);
        if (!added) {
            log::debug("pci: {:02x}:{:02x}.{}: hot plug is not watched: {}", bridge.at.bus, bridge.at.device,
                       bridge.at.function, added.error());
        }
        watched += added && *added ? 1 : 0;
    }
    if (acpi) {
        if (auto added = hotplug->add_acpi(ports, *acpi); !added) {
            log::warning("pci: hot plug is not watched: {}", added.error());
        } else {
            ++watched;
        }
    }
    if (watched == 0) {
        delete hotplug;
        return;
    }
    if (auto spawned = tasks.spawn(hotplug->watch()); !spawned) {
        log::warning("pci: hot plug is not watched: {}", spawned.error());
    }
}

} // namespace fl::boot
