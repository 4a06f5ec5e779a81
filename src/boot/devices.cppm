// Reports the state of every device that could be a disk, network card, input device or display: one line and one
// `device` record each (docs/INTERFACES.md), so that a missing disk is always explained. Entries are collected while
// drivers attach and printed when the job calls list(), so that they do not delay the first block.
export module boot.devices;
import core.std;
import core.text;
import core.vector;
import hv.backend;
import drivers.driver;
import drivers.pci;

export namespace fl::boot {

enum class DeviceClass : u8 { disk, network, input, display, other };
constexpr std::string_view name(DeviceClass kind) {
    constexpr std::array<std::string_view, 5> names{"disk", "network", "input", "display", "other"};
    return names[to_underlying(kind)];
}

constexpr DeviceClass class_of(drivers::DeviceKind kind) {
    switch (kind) {
    case drivers::DeviceKind::disk: return DeviceClass::disk;
    case drivers::DeviceKind::network: return DeviceClass::network;
    case drivers::DeviceKind::keyboard:
    case drivers::DeviceKind::pointer: return DeviceClass::input;
    case drivers::DeviceKind::display: return DeviceClass::display;
    }
    return DeviceClass::other;
}

struct DeviceEntry {
    FixedText<12> bus;     // "pci", "virtio-mmio", "xen", "vmbus"; for a driver's units "ide", "scsi"
    FixedText<64> address; // on that bus
    FixedText<16> id;      // "1af4:1001", "virtio 2"; may be empty
    FixedText<64> what;    // "virtio block device"
    DeviceClass kind = DeviceClass::other;
    std::string_view driver;            // static storage; empty: no driver
    std::optional<drivers::Unused> why; // why it is not in use; nothing: `driver` drives it
    FixedText<160> reason;              // for people; may be empty if the device is driven
    u32 disks = 0;                      // devices that the driver found on it: the disks of a controller
};

class Devices {
  public:
    Devices() = default;

    void add(const DeviceEntry& entry);
    /// Prints all entries so far; later entries are printed as they are added.
    void list();
    /// Reports something of the machine that was not recorded or not examined: prints a line and a `left_out` record at
    /// once. `disk`: it may include a disk or another device that has a driver, and the verdict becomes an ERROR.
    void left_out(std::string_view what, u64 count, bool disk, std::string_view reason);

    /// Number of units and devices that failed or found no room.
    u32 failures() const { return failures_; }
    /// Whether any left_out() call may include a disk.
    bool disk_left_out() const { return disk_left_out_; }
    /// "of 3 devices that could be or have one: 2 no driver, 1 empty; see the device lines"; for verdicts.
    FixedText<160> why_no_disk() const;

  private:
    static void print(const DeviceEntry& entry);

    Vector<DeviceEntry> entries_; // not printed yet
    bool listed_ = false;
    u32 failures_ = 0;
    bool disk_left_out_ = false;
    std::array<u32, to_underlying(drivers::Unused::no_room) + 1> unused_disks_{};
    u32 without_disks_ = 0; // driven controllers without disks
};

/// Whether a PCI function belongs to a listed class: mass storage, network, display, input, and all of virtio.
bool is_listed(const drivers::pci::Device& device);
DeviceEntry describe(const drivers::pci::Device& device);
/// `bus`: the backend's name.
DeviceEntry describe(const hv::SyntheticDevice& device, std::string_view bus);
DeviceEntry describe(const drivers::UnusedUnit& unit);
/// A virtio-mmio device at `base`, from its registers MagicValue, Version and DeviceID [virtio-1.2 §4.2.2]. Nothing: a
/// placeholder without a device.
std::optional<DeviceEntry> describe_virtio_mmio(u64 base, u32 magic, u32 version, u32 device_id);

/// Sets the entry's reason to "no driver for this NAME in this build".
DeviceEntry without_driver(DeviceEntry entry);

} // namespace fl::boot
