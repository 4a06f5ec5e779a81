// What a driver is given and what it gives back. A driver is a folder: protocol (wire structs, constexpr), channel or
// queue (the ring, no policy), the driver itself (probe, submit, complete). It knows its device and nothing of
// hypervisors or of other drivers.
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
import io.shutdown;
export import drivers.device;

export namespace fl::drivers {

/// Features that a driver shall not negotiate (features=-name on the command line).
enum class Feature : u32 { persistent = 1, indirect = 2, ring_pages = 4, flush = 8, barrier = 16 };

/// Why something that a driver was offered, or found on its device, is not in use.
enum class Unused : u8 {
    no_driver,  // nothing in this build drives it
    taken,      // another driver has the same device
    unplugged,  // the host has taken the emulated devices away, as it was asked to
    not_a_disk, // a CD drive, a tape …
    empty,      // a disk of 0 bytes, a drive without a medium
    failed,     // it should work, and does not
    no_room,    // a table of this kernel's is full
};
constexpr std::string_view name(Unused why) {
    constexpr std::array<std::string_view, 7> names{"no driver", "taken",  "unplugged", "not a disk",
                                                    "empty",     "failed", "no room"};
    return names[to_underlying(why)];
}

/// What an error of attaching comes to.
constexpr Unused unused_because(Code code) {
    switch (code) {
    case Code::exhausted: return Unused::no_room;
    case Code::busy: return Unused::taken;
    case Code::not_supported: return Unused::no_driver;
    default: return Unused::failed;
    }
}

/// a, b … z, aa, ab …: what disks' names end with, after Linux.
[[gnu::noinline]] constexpr FixedText<8> drive_letters(u32 number) {
    std::array<char, 8> letters{};
    usize at = letters.size();
    for (u64 n = u64{number} + 1; n != 0 && at > 0; n = (n - 1) / 26) {
        letters[--at] = static_cast<char>('a' + (n - 1) % 26);
    }
    return FixedText<8>(std::string_view(letters.data() + at, letters.size() - at));
}

/// A unit that a driver found and will not drive.
struct UnusedUnit {
    std::string_view bus;     // "ide", "xen", "scsi"
    std::string_view address; // as the driver calls it: "hdb", "LUN 3 of …"
    std::string_view what;    // "CD drive", "SCSI disk"
    Unused why = Unused::failed;
    std::string_view reason; // for people; empty with `taken`: the driver that has the device is named
    u32 number = no_twin;    // of its DeviceId
    DeviceKind kind = DeviceKind::disk;
};

/// The claims of the machine's devices, of every class, as one driver sees them. Order: offered() before the first
/// access, claim() once the device works, gone() when it does not exist any more. A class whose devices have an
/// interface has a typed sink (DiskSink), whose announce() claims; drivers of the others claim here.
class DeviceSink {
  public:
    /// Whether the driver may touch the device at all: false when another driver has it already, or the table withholds
    /// it. Devices without a twin are always offered.
    virtual bool offered(DeviceId id) = 0;
    /// The driver has attached the device. Error{busy}: another driver attached it first, and this one lets go of it;
    /// Error{exhausted}: no memory.
    virtual Result<void> claim(DeviceId id) = 0;
    /// Once for each unit that is not driven. `failed` and `no_room` make the kernel's verdict an ERROR.
    virtual void unused(const UnusedUnit& unit) = 0;
    /// The host has taken the device away: what is claimed under that id later is another one.
    virtual void gone(DeviceId id) = 0;

  protected:
    ~DeviceSink() = default;
};

/// Where drivers announce disks. A disk number says which disk of the machine it is, whichever driver shows it: see
/// DeviceId. A synthetic disk's bus says which number its emulated twin would have. Disks without a twin use `no_twin`.
class DiskSink {
  public:
    static constexpr u32 no_twin = drivers::no_twin;
    /// As DeviceSink::offered().
    virtual bool offered(u32 disk_number) = 0;
    /// The disk is ready; it lives until the machine ends. Error{busy}: another driver attached the same disk first;
    /// the driver lets go of it.
    virtual Result<void> announce(io::BlockDevice& disk, u32 disk_number) = 0;
    /// As DeviceSink::unused().
    virtual void unused(const UnusedUnit& unit) { static_cast<void>(unit); }
    /// As DeviceSink::gone().
    virtual void gone(u32 disk_number) { static_cast<void>(disk_number); }

  protected:
    ~DiskSink() = default;
};

/// Everything a driver may use. References live as long as the machine.
struct Environment {
    io::Executor& executor;
    DmaAllocator& dma;
    InterruptController& interrupts;
    DiskSink& disks;
    Nanoseconds timeout = 5'000'000'000; // bound of every wait for the other side, and of one request
    u32 withheld_features = 0;           // Feature bits
    /// One executor per processor that runs, index = processor, the first one is `executor`; empty: there is one
    /// processor. Work gets to another one through Executor::post or io::run_on.
    std::span<io::Executor* const> executors{};
    /// Where a driver says that somebody asks for an orderly end; nullptr: nobody would listen.
    io::Shutdown* shutdown = nullptr;
    /// Maps registers in memory: pci::Device::map_bar(), or a device whose address a table gives.
    MmioMapper& mmio = no_mmio();
    /// Claims of devices of every class, those of `disks` among them; nullptr where only disks are announced (tests).
    DeviceSink* devices = nullptr;

    bool allows(Feature feature) const { return (withheld_features & to_underlying(feature)) == 0; }
};

} // namespace fl::drivers
