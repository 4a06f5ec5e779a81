// Where the machine's devices come from: PCI functions, the synthetic devices of a backend's bus, virtio-mmio devices,
// null disks. Each is a DeviceSource: a list of devices and a list of drivers for devices of its kind. The binder
// (boot.binder) brings the two together and knows nothing else of them. Portable: what touches the machine finds the
// devices and puts them in (boot.machine.sources).
//
// A new source, ACPI's devices for one: a class that derives from SourceOf<Device, Driver>. A new driver: one line in
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
    /// Devices have the numbers 0 to count() - 1, drivers 0 to driver_count() - 1.
    virtual u32 count() const = 0;
    virtual u32 driver_count() const = 0;
    /// The driver's name, as in drivers::known_drivers or, of one that no rule can name, its own. Several drivers of a
    /// source may have one name: they are parts of one driver. Static storage.
    virtual std::string_view driver(u32 driver) const = 0;
    virtual bool matches(u32 driver, u32 device) const = 0;
    /// Whether it comes before all devices of that driver for which this is false.
    virtual bool first(u32 driver, u32 device) const;
    /// Attaches the device. `index`: how many devices the driver's name was given before. A Result without an error:
    /// done, or left alone for a reason that the driver has reported. Error{not_supported}: this driver is not for it,
    /// and another one may be.
    virtual io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) = 0;
    /// Devices of the machine are listed (boot.devices); others only if they fail.
    virtual bool listed() const { return true; }
    /// The device without a driver. With `why`: that is why, when no driver takes it.
    virtual DeviceEntry describe(u32 device) const = 0;
    /// For log lines: the device, as the bus calls it.
    virtual FixedText<120> place(u32 device) const;
    /// Devices for which there was no room, or which cannot be reached: left_out(), once for each kind of them.
    virtual void report_left_out(Devices& into) const { static_cast<void>(into); }

    /// Devices that come while the machine runs. news(): opened when one waits, or was lost; nullptr: none ever comes.
    /// One task waits for it.
    virtual io::Latch* news() { return nullptr; }
    /// Makes the next one that waits the source's only device; false: none waits.
    virtual bool next() { return false; }
    /// How many were lost since this was asked last.
    virtual u32 lost() { return 0; }

  protected:
    ~DeviceSource() = default;
};

/// A list of devices on the heap, as many as the machine has, and a list of drivers. `Driver` has `name`,
/// `matches(const Device&)` and what else its source wants.
template <class Device, class Driver>
class SourceOf : public DeviceSource {
  public:
    /// `drivers` lasts as long as the machine.
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
    u32 dropped_ = 0; // no memory
};

// ---- PCI ----

/// `name` as in drivers::known_drivers; `ids`: what it drives; `probe`: attaches one function, the driver's `index`th.
/// `first`: functions that come before all others of the driver. May be nullptr.
struct PciDriver {
    std::string_view name;
    std::span<const drivers::pci::Match> ids;
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, drivers::pci::Device device, u32 index);
    bool (*first)(const drivers::pci::Device& device);

    bool matches(const drivers::pci::Device& device) const { return drivers::pci::matches(ids, device); }
};

/// The PCI functions that are listed or that a driver matches.
class PciSource final : public SourceOf<drivers::pci::Device, PciDriver> {
  public:
    using SourceOf::SourceOf;
    /// A drivers::pci::Walk::Found; `context` is the PciSource.
    static void found(void* context, const drivers::pci::Device& device);
    /// After a walk: what it says.
    void count_found(const drivers::pci::Enumerated& found);
    /// All functions of the machine.
    u32 functions() const { return functions_; }

    std::string_view name() const override { return "pci"; }
    bool first(u32 driver, u32 device) const override;
    io::Task<Result<void>> probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) override;
    DeviceEntry describe(u32 device) const override;
    void report_left_out(Devices& into) const override;

  private:
    u32 functions_ = 0;
    u32 unreachable_ = 0;
};

// ---- synthetic devices ----

/// The devices on the bus of the backend, and those that come later.
class SyntheticSource final : public DeviceSource {
  public:
    explicit SyntheticSource(Backend& backend) : backend_(backend) {}
    /// Lists what is there. An Error: the bus cannot be asked, and shows nothing.
    io::Task<Result<void>> enumerate() { return backend_.enumerate(found_); }

    /// What the records call the bus: "xen", "vmbus".
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
    io::Latch* news() override { return backend_.news(); }
    bool next() override;
    u32 lost() override { return backend_.new_dropped(); }

  private:
    const hv::SyntheticDevice& at(u32 device) const { return late_ ? *late_ : found_.list[device]; }
    Backend& backend_;
    hv::DeviceList found_;
    std::optional<hv::SyntheticDevice> late_; // the one that came last
};

// ---- virtio-mmio ----

/// What the first registers of a virtio-mmio device say [virtio-1.2 §4.2.2].
struct VirtioMmioDevice {
    u64 base = 0; // physical
    u32 magic = 0;
    u32 version = 0;
    u32 device_id = 0; // 0: a place without a device
};
struct VirtioMmioDriver {
    std::string_view name; // as in drivers::known_drivers
    u32 device_id;         // [virtio-1.2 §5]
    io::Task<Result<void>> (*probe)(drivers::Environment& environment, const VirtioMmioDevice& device, u32 index);

    bool matches(const VirtioMmioDevice& device) const;
};

/// The devices that the command line or ACPI names. What does not answer as a virtio device is listed as failed.
class VirtioMmioSource final : public SourceOf<VirtioMmioDevice, VirtioMmioDriver> {
  public:
    using SourceOf::SourceOf;
    /// Whether a device at this address is there already, or was found to be an empty place.
    bool seen(u64 base) const { return std::ranges::find(bases_, base) != bases_.end(); }
    /// Once for each address.
    void add(const VirtioMmioDevice& device);
    /// So many that the command line or ACPI names were not looked at.
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

/// Disks without a device [drivers.null], for a command line that names them. No devices of the machine: not listed.
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
