// The interface between drivers and the kernel. A driver is a folder: protocol (wire structs, constexpr), channel or
// queue (the ring, no policy), and the driver itself (probe, submit, complete). It depends on neither hypervisors nor
// other drivers.
export module drivers.driver;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.mmio;
import io.executor;
import io.block;
import io.net;
import io.shutdown;
export import drivers.device;

export namespace fl::drivers {

/// Features that a driver must not negotiate (features=-name on the command line).
enum class Feature : u32 {
    persistent = 1 << 0,
    indirect = 1 << 1,
    ring_pages = 1 << 2,
    flush = 1 << 3,
    barrier = 1 << 4,
    event_idx = 1 << 5,
    packed = 1 << 6,
    in_order = 1 << 7,
    multi_queue = 1 << 9,
    messages = 1 << 10, // MSI and MSI-X
    discard = 1 << 11,
    write_zeroes = 1 << 12,
    config_wce = 1 << 13,
    ncq = 1 << 14,
    shadow_doorbells = 1 << 15,
    scatter = 1 << 16,     // frames in several pieces
    checksum = 1 << 17,    // partial checksums of frames
    fifo_events = 1 << 18, // of Xen: used by the backend
    secure_discard = 1 << 19,
};

/// Why a device offered to a driver, or a unit found by it, is not in use.
enum class Unused : u8 {
    no_driver,  // this build has no driver for it
    taken,      // another driver has the same device
    unplugged,  // the host has unplugged the emulated devices on request
    not_a_disk, // a CD drive, a tape …
    empty,      // a disk of 0 bytes, or a drive without a medium
    failed,     // it should work but does not
    no_room,    // a kernel table is full
};
constexpr std::string_view name(Unused why) {
    constexpr std::array<std::string_view, 7> names{"no driver", "taken",  "unplugged", "not a disk",
                                                    "empty",     "failed", "no room"};
    return names[to_underlying(why)];
}

/// Maps an error of attaching to a reason.
constexpr Unused unused_because(Code code) {
    switch (code) {
    case Code::exhausted: return Unused::no_room;
    case Code::busy: return Unused::taken;
    case Code::not_supported: return Unused::no_driver;
    default: return Unused::failed;
    }
}

/// a, b … z, aa, ab …: suffixes of disk names, as in Linux.
[[gnu::noinline]] constexpr FixedText<8> drive_letters(u32 number) {
    std::array<char, 8> letters{};
    usize at = letters.size();
    for (u64 n = u64{number} + 1; n != 0 && at > 0; n = (n - 1) / 26) {
        letters[--at] = static_cast<char>('a' + (n - 1) % 26);
    }
    return FixedText<8>(std::string_view(letters.data() + at, letters.size() - at));
}

/// sda, sdb … sdz, sdaa …: for the prefix "sd".
inline FixedText<16> disk_name(std::string_view prefix, u32 number) {
    FixedText<16> name(prefix);
    name.write(drive_letters(number));
    return name;
}

/// A unit that a driver found and does not drive.
struct UnusedUnit {
    std::string_view bus;     // "ide", "xen", "scsi"
    std::string_view address; // the driver's name for it: "hdb", "LUN 3 of …"
    std::string_view what;    // "CD drive", "SCSI disk"
    Unused why = Unused::failed;
    std::string_view reason; // human-readable; empty with `taken`: the driver that has the device is named
    u32 number = no_twin;    // of its DeviceId
    DeviceKind kind = DeviceKind::disk;
};

/// Claims of the machine's devices, of all classes, as seen by one driver. Order: offered() before the first access,
/// claim() once the device works, withdraw() when it no longer exists. Disks and network cards use their own sinks
/// (DiskSink, NetSink), whose announce() claims; drivers of other classes claim here.
class DeviceSink {
  public:
    /// Whether the driver may access the device: false if another driver has it already, or the table withholds it.
    /// Devices without a twin are always offered.
    virtual bool offered(DeviceId id) = 0;
    /// Records that the driver has attached the device. Error{busy}: another driver attached it first, and this one
    /// must release it; Error{exhausted}: no memory.
    virtual Result<void> claim(DeviceId id) = 0;
    /// Called once for each unit that is not driven. `failed` and `no_room` make the kernel's verdict an ERROR.
    virtual void unused(const UnusedUnit& unit) = 0;
    /// The host has removed the device: a later claim of the same id is a different device.
    virtual void withdraw(DeviceId id) = 0;

  protected:
    ~DeviceSink() = default;
};

/// Where drivers announce disks. A disk number identifies a disk of the machine, independent of its driver: see
/// DeviceId. A synthetic disk's bus gives the number of its emulated twin. Disks without a twin use `no_twin`.
class DiskSink {
  public:
    static constexpr u32 no_twin = drivers::no_twin;
    /// As DeviceSink::offered().
    virtual bool offered(u32 disk_number) = 0;
    /// For a native driver: the number of the disk at `position` of its first controller, if a synthetic driver of this
    /// machine can have the same disks; else no_twin.
    virtual u32 twin_at(u32 position) {
        static_cast<void>(position);
        return no_twin;
    }
    /// The first name of the form disk_name(prefix, n) that no disk of the machine has. Taken by announcing a disk that
    /// has it.
    virtual FixedText<16> free_name(std::string_view prefix) = 0;
    /// The disk is ready; it must live until machine shutdown. Error{busy}: another driver attached the same disk
    /// first; the driver must release it.
    virtual Result<void> announce(io::BlockDevice& disk, u32 disk_number) = 0;
    /// As DeviceSink::unused().
    virtual void unused(const UnusedUnit& unit) { static_cast<void>(unit); }
    /// As DeviceSink::withdraw().
    virtual void withdraw(u32 disk_number) { static_cast<void>(disk_number); }

  protected:
    ~DiskSink() = default;
};

/// Where drivers announce network cards: DiskSink for them. A card's number identifies a card of the machine,
/// independent of its driver: see DeviceId. A synthetic card and its emulated twin have the same hardware address.
class NetSink {
  public:
    static constexpr u32 no_twin = drivers::no_twin;
    /// The number of the card with this address, the same for all drivers, if this driver's cards can have twins in
    /// this machine; else no_twin.
    virtual u32 number_of(const io::MacAddress& address) {
        static_cast<void>(address);
        return no_twin;
    }
    /// As DeviceSink::offered().
    virtual bool offered(u32 number) = 0;
    /// The first name of the form ethN that no open card of the machine has. Taken by announcing a card that has it.
    virtual FixedText<16> free_name() = 0;
    /// The card is ready; it and its lanes must live until machine shutdown. Error{busy}: another driver attached the
    /// same card first; the driver must release it.
    virtual Result<void> announce(io::NetDevice& card, u32 number) = 0;
    /// As DeviceSink::unused().
    virtual void unused(const UnusedUnit& unit) { static_cast<void>(unit); }
    /// As DeviceSink::withdraw().
    virtual void withdraw(u32 number) { static_cast<void>(number); }

  protected:
    ~NetSink() = default;
};

/// Services available to a driver. References are valid for the lifetime of the machine.
struct Environment {
    io::Executor& executor;
    DmaAllocator& dma;
    InterruptController& interrupts;
    DiskSink& disks;
    // bound of every wait for the device or host, and of a single request, in nanoseconds
    Nanoseconds timeout = 5'000'000'000;
    u32 withheld_features = 0; // Feature bits
    /// One executor per running processor, indexed by processor, the first one is `executor`; empty: single
    /// processor. Work is sent to another one through Executor::post or io::run_on.
    std::span<io::Executor* const> executors{};
    /// Host shutdown requests; nullptr if unsupported.
    io::Shutdown* shutdown = nullptr;
    /// Maps device registers: for pci::Device::map_bar(), or for a device whose address comes from a table.
    MmioMapper& mmio = no_mmio();
    /// Claims of devices of all classes, including those of `disks`; nullptr if only disks are announced (tests).
    DeviceSink* devices = nullptr;
    /// For drivers of network cards; nullptr: cards cannot be announced (tests of other drivers).
    NetSink* nets = nullptr;
    /// Feature bits that drivers have asked about, so that a withheld one that none knows can be reported; nullptr: not
    /// counted. Relaxed: it orders no other data.
    std::atomic<u32>* asked_features = nullptr;

    bool allows(Feature feature) const {
        if (asked_features != nullptr) {
            asked_features->fetch_or(to_underlying(feature), std::memory_order_relaxed);
        }
        return (withheld_features & to_underlying(feature)) == 0;
    }
};

} // namespace fl::drivers
