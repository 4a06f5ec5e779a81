// Device sources: PCI functions, the synthetic devices of a backend's bus, virtio-mmio devices and null disks. Each is
// a DeviceSource: a list of devices plus a list of the drivers for that kind of device. The binder (boot.binder) uses
// nothing but this interface. Portable: boot.machine.sources discovers the devices and fills the lists.
//
// To add a source (ACPI devices, for example), derive from SourceOf<Device, Driver>. To add a driver, add one line to
// the list of its source (boot.drivers).
export module boot.sources;
import core.std;
import core.result;
import core.text;
import core.vector;
import io.latch;
import io.task;
import hv.backend;
import drivers.driver;
import drivers.null;
import drivers.pci;
import boot.backend;
import boot.devices;

export namespace fl::boot {

class DeviceSource {
  public:
    /// For log lines; static storage.
    virtual std::string_view name() const = 0;
    /// Devices are numbered 0 to count() - 1, drivers 0 to driver_count() - 1.
    virtual u32 count() const = 0;
    virtual u32 driver_count() const = 0;
    /// The driver's name: as in drivers::known_drivers, or its own if no rule can name it. Several entries of one
    /// source may share a name; they are parts of one driver. Static storage.
    virtual std::string_view driver(u32 driver) const = 0;
    virtual bool matches(u32 driver, u32 device) const = 0;
    /// True: probe this device before the driver's devices for which this is false.
    virtual bool first(u32 driver, u32 device) const;
    /// Attaches the device. `index`: how many devices this driver name was given before. A Result without an error:
    /// attached, or skipped for a reason the driver has reported. Error{not_supported}: the driver declines, and
    /// another one may match.
    virtual io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) = 0;
    /// True: each device is listed (boot.devices). False: only devices that fail.
    virtual bool listed() const { return true; }
    /// Describes the device as if no driver had it. `why`, if set, is the reason to report when no driver takes it.
    virtual DeviceEntry describe(u32 device) const = 0;
    /// The device's name on its bus, for log lines.
    virtual FixedText<120> place(u32 device) const;
    /// Reports devices that did not fit or cannot be reached: one left_out() for each kind.
    virtual void report_left_out(Devices& into) const { static_cast<void>(into); }

    /// Hot-added devices. changes(): a latch opened when one is pending or was dropped; nullptr: this source has none.
    /// Only one task may wait for it.
    virtual io::Latch* changes() { return nullptr; }
    /// Makes the next pending device the source's only device. False: none is pending.
    virtual bool next() { return false; }
    /// Number of hot-added devices dropped since the last call.
    virtual u32 lost() { return 0; }

  protected:
    ~DeviceSource() = default;
};

/// A heap-allocated list of devices and a list of drivers. `Driver` has `name`, `matches(const Device&)` and whatever
/// else its source needs.
template <class Device, class Driver>
class SourceOf : public DeviceSource {
  public:
    /// `drivers` must live as long as the machine.
    explicit SourceOf(std::span<const Driver> drivers) : drivers_(drivers) {}

    u32 count() const override { return static_cast<u32>(devices_.size()); }
    u32 driver_count() const override { return static_cast<u32>(drivers_.size()); }
    std::string_view driver(u32 driver) const override { return drivers_[driver].name; }
    bool matches(u32 driver, u32 device) const override { return drivers_[driver].matches(devices_[device]); }

  protected:
    ~SourceOf() = default;
    bool has_driver(const Device& device) const {
        return std::ranges::any_of(drivers_, [&](const Driver& driver) { return driver.matches(device); });
    }
    void keep(const Device& device) { dropped_ += devices_.push(device) ? 0 : 1; }

    std::span<const Driver> drivers_;
    Vector<Device> devices_;
    u32 dropped_ = 0; // dropped for lack of memory
};

// ---- PCI ----

/// `name`: as in drivers::known_drivers. `ids`: the functions it drives. `probe`: attaches one function, the driver's
/// `index`th. `first`: functions to probe before the driver's others; may be nullptr.
struct PciDriver {
    std::string_view name;
    std::span<const drivers::pci::Match> ids;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, drivers::pci::Device device, u32 index);
    bool (*first)(const drivers::pci::Device& device);

    bool matches(const drivers::pci::Device& device) const { return drivers::pci::matches(ids, device); }
};

/// The PCI functions that are listed or matched by a driver.
class PciSource final : public SourceOf<drivers::pci::Device, PciDriver> {
  public:
    using SourceOf::SourceOf;
    /// Callback for drivers::pci::Walk::Found; `context` is the PciSource.
    static void found(void* context, const drivers::pci::Device& device);
    /// Adds the totals of one bus walk.
    void count_found(const drivers::pci::Enumerated& found);
    /// PCI-to-PCI bridges, ports of PCI Express among them.
    std::span<const drivers::pci::Device> bridges() const { return {bridges_.begin(), bridges_.size()}; }
    /// All functions found, listed or not.
    u32 functions() const { return functions_; }

    std::string_view name() const override { return "pci"; }
    bool first(u32 driver, u32 device) const override;
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) override;
    DeviceEntry describe(u32 device) const override;
    void report_left_out(Devices& into) const override;

  private:
    Vector<drivers::pci::Device> bridges_;
    u32 functions_ = 0;
    u32 unreachable_ = 0;
};

// ---- synthetic devices ----

/// The devices on the backend's bus, hot-added ones included.
class SyntheticSource final : public DeviceSource {
  public:
    explicit SyntheticSource(Backend& backend) : backend_(backend) {}
    /// Lists the devices present. On an Error the bus cannot be queried and the list stays empty.
    io::Task<Result<void>> enumerate() { return backend_.enumerate(found_); }

    /// The bus's name in records: "xen", "vmbus".
    std::string_view name() const override;
    u32 count() const override { return late_ ? 1 : found_.count(); }
    u32 driver_count() const override { return backend_.driver_count(); }
    std::string_view driver(u32 driver) const override { return backend_.driver(driver).name; }
    bool matches(u32 driver, u32 device) const override {
        return backend_.driver(driver).type == at(device).type.view();
    }
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) override;
    DeviceEntry describe(u32 device) const override;
    FixedText<120> place(u32 device) const override;
    void report_left_out(Devices& into) const override;
    io::Latch* changes() override { return backend_.changes(); }
    bool next() override;
    u32 lost() override { return backend_.new_dropped(); }

  private:
    const hv::SyntheticDevice& at(u32 device) const { return late_ ? *late_ : found_.list[device]; }
    Backend& backend_;
    hv::DeviceList found_;
    std::optional<hv::SyntheticDevice> late_; // the most recent hot-added device
};

// ---- virtio-mmio ----

/// The identification registers of a virtio-mmio device [virtio-1.2 §4.2.2].
struct VirtioMmioDevice {
    u64 base = 0; // physical
    u32 magic = 0;
    u32 version = 0;
    u32 device_id = 0; // 0: placeholder, no device
    std::optional<u32> gsi{};
};
struct VirtioMmioDriver {
    std::string_view name; // as in drivers::known_drivers
    u32 device_id;         // [virtio-1.2 §5]
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, const VirtioMmioDevice& device, u32 index);

    bool matches(const VirtioMmioDevice& device) const;
};

/// The devices named by the command line or by ACPI. One that does not identify as virtio is listed as failed.
class VirtioMmioSource final : public SourceOf<VirtioMmioDevice, VirtioMmioDriver> {
  public:
    using SourceOf::SourceOf;
    /// Whether this address has been added, even as an empty placeholder.
    bool seen(u64 base) const { return std::ranges::find(bases_, base) != bases_.end(); }
    /// Call once for each address.
    void add(const VirtioMmioDevice& device);
    /// Number of devices named by the command line or ACPI that were not examined.
    void leave_out_words(u32 count) { words_dropped_ += count; }
    void leave_out_acpi(u32 count) { acpi_dropped_ += count; }

    std::string_view name() const override { return "virtio-mmio"; }
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) override;
    DeviceEntry describe(u32 device) const override;
    void report_left_out(Devices& into) const override;

  private:
    Vector<u64> bases_;
    u32 words_dropped_ = 0;
    u32 acpi_dropped_ = 0;
};

// ---- null disks ----

/// Null disks [drivers.null], which have no device; created for a command line that names them. Not part of the
/// machine, so not listed.
class NullSource final : public DeviceSource {
  public:
    explicit NullSource(u32 count) : count_(count) {}

    std::string_view name() const override { return "null"; }
    u32 count() const override { return count_; }
    u32 driver_count() const override { return 1; }
    std::string_view driver(u32) const override { return "null"; }
    bool matches(u32, u32) const override { return true; }
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) override;
    bool listed() const override { return false; }
    DeviceEntry describe(u32 device) const override;

  private:
    u32 count_;
};

} // namespace fl::boot
