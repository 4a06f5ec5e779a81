// Requests of the host to add or remove PCI devices while the kernel runs. The kernel finds PCI devices once, at the
// start, and cannot release one that is in use: each request is refused, by a line that says so and what to do.
//
// Two interfaces carry such requests:
//   - a PCI Express port with a hot-pluggable slot interrupts [PCIe-5.0 §6.7];
//   - QEMU's general-purpose event 1 means that its hot plug registers have changed [qemu
//     docs/specs/acpi_pci_hotplug.rst]. QEMU uses it by default, also for the slots of PCI Express ports.
// Neither is acknowledged in the way that would eject a device: the host keeps a device that it was asked to remove.
export module drivers.pci.hotplug;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;
import core.vector;
import io.executor;
import io.task;
import drivers.pci;
import drivers.pci.msi;

export namespace fl::drivers::pci {

/// The processor's I/O ports. Callable from interrupt handlers.
class Ports {
  public:
    virtual u8 in8(u16 port) = 0;
    virtual void out8(u16 port, u8 value) = 0;
    virtual void out16(u16 port, u16 value) = 0;
    virtual u32 in32(u16 port) = 0;
    virtual void out32(u16 port, u32 value) = 0;

  protected:
    ~Ports() = default;
};

/// Where the firmware's tables place the registers, and their interrupt.
struct AcpiHotplug {
    u16 registers = 0;   // port of QEMU's hot plug registers
    u16 gpe_status = 0;  // port of general-purpose events 0 to 7: status
    u16 gpe_enable = 0;  // and enable
    u8 gpe_bytes = 0;    // of the enable registers
    u16 pm1a_enable = 0; // port of the enable register of the fixed events; 0: none
    InterruptLine sci;
};

/// One per machine. Lives as long as the executor runs.
class Hotplug {
  public:
    /// Log lines in all. Further requests are not reported.
    static constexpr u32 max_reports = 64;

    Hotplug(io::Executor& executor, InterruptController& controller, MmioMapper& mapper)
        : controller_(controller), mapper_(mapper), changed_(executor) {}
    ~Hotplug();
    Hotplug(const Hotplug&) = delete;
    Hotplug& operator=(const Hotplug&) = delete;

    /// Watches the slot of a PCI Express port. Returns whether it has one that is hot-pluggable; other functions are
    /// not touched. Error: the port cannot interrupt by messages, or there is no memory.
    Result<bool> add_port(const Device& port);
    /// Watches QEMU's hot plug registers. Once only. Disables all other ACPI events, which nobody handles. `ports` must
    /// outlive this. Errors of InterruptController::attach_line().
    Result<void> add_acpi(Ports& ports, const AcpiHotplug& where);
    /// Reports requests, for ever.
    io::Task<Result<void>> watch();
    u32 reports() const { return reports_; }

  private:
    struct Slot {
        Slot(const Device& device, u16 at, InterruptController& controller, MmioMapper& mapper)
            : port(device), capability(at), interrupts(device, controller, mapper) {}
        Device port;
        u16 capability;
        Interrupts interrupts;
    };
    static constexpr u32 acpi_buses = 256; // that QEMU's registers can select

    static void on_port(void* self);
    static void on_sci(void* self);
    void look_at(const Slot& slot);
    void look_at_acpi();
    void report(bool removal, std::string_view place);

    InterruptController& controller_;
    MmioMapper& mapper_;
    io::Signal changed_;
    Vector<Slot*> slots_; // owned
    Ports* ports_ = nullptr;
    AcpiHotplug acpi_;
    std::array<u32, acpi_buses> removals_{}; // slots of each bus whose removal has been reported
    u32 reports_ = 0;
};

} // namespace fl::drivers::pci
