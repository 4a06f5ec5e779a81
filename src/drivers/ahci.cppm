// The driver for AHCI HBAs [ahci-1.3.1]: matching, taking over from the firmware, finding the disks at the ports,
// announcing. I/O is handled by drivers.ahci.queue.
export module drivers.ahci;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.mmio;
import core.time;
import core.vector;
import io.executor;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
export import drivers.ahci.protocol;
export import drivers.ahci.queue;
export import drivers.ahci.sata_disk;
export import drivers.ahci.setup;

export namespace fl::drivers::ahci {

/// Mass storage, Serial ATA, AHCI 1.0 [ahci-1.3.1 §2.1.5].
inline constexpr pci::Match ids[] = {{.class_code = 0x01, .subclass = 0x06, .prog_if = 0x01}};
inline constexpr u8 abar = 5; // its base address register
/// Xen's toolstack puts the disks 0 to 5 of a guest with hdtype="ahci" at the ports 0 to 5 of its only HBA [xl-cfg].
inline constexpr u32 ports_with_twins = 6;

/// The ports whose registers exist, from PI, CAP.NP and the size of ABAR. Error{protocol}: none.
struct Ports {
    u32 usable = 0;
    u32 dropped = 0; // implemented according to PI, but beyond CAP.NP or ABAR
};
Result<Ports> usable_ports(u32 implemented, Capabilities capabilities, u64 abar_size);

/// One HBA with its ports. Must outlive all use of its disks; normally lives until machine shutdown.
///
/// A port without a disk in use, and one whose disk is closed, is watched: when its link changes, what is plugged in
/// there is examined in the same way as at the start. A disk that is unplugged or replaced is closed as removed.
class Controller {
  public:
    /// `first`: the machine's first HBA, whose ports can have the twins of synthetic disks.
    explicit Controller(Environment& environment, bool first = true)
        : environment_(environment), first_(first), setup_(environment.executor, environment.dma, environment.timeout),
          events_(environment.executor), tasks_(environment.executor) {}
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// Finds and announces the disks, and watches the ports from then on. A failing port is reported, and the others
    /// are tried; finding no disk is not an error.
    io::Task<Result<void>> attach(pci::Device device);
    /// Number of disks announced so far, removed ones included.
    u32 disks() const { return count_; }
    /// The disk at a port; nullptr: none is in use.
    Disk* disk(u32 port) { return slots_[port].disk; }
    std::string_view interrupt() const {
        return interrupts_ ? name(interrupts_->kind()) : name(pci::InterruptKind::none);
    }

  private:
    struct Slot {
        DmaBuffer memory;
        Disk* disk = nullptr; // owned
        std::optional<Terms> terms;
    };
    io::Task<Result<void>> take_over();
    io::Task<Result<void>> reset();
    io::Task<Result<void>> examine(u32 number);
    io::Task<Result<void>> disable_write_cache(Port& port, Slot& slot);
    Result<void> open(pci::Device& device);
    bool announce(u32 number);
    io::Task<Result<void>> give_up(u32 number);
    // While in use.
    void watch_port(u32 number, bool empty);
    io::Task<Result<void>> watch();
    io::Task<Result<void>> look_again(u32 number);
    io::Task<Result<void>> retire(u32 number);
    u32 twin_of(u32 number) const {
        return first_ && number < ports_with_twins ? environment_.disks.twin_at(number) : DiskSink::no_twin;
    }
    void unused(u32 number, std::string_view what, Unused why, std::string_view reason = {});
    void failed(u32 number, const Error& error);

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    bool first_;
    Setup setup_;
    Mmio abar_;
    Capabilities capabilities_;
    u32 present_ = 0; // ports that had a device before the reset, or may still show one
    HbaEvents events_;
    std::array<Slot, max_ports> slots_;
    Vector<Disk*> retired_; // owned: their users may still refer to them
    std::optional<pci::Interrupts> interrupts_;
    u32 count_ = 0;
    io::TaskGroup tasks_; // destroyed first
};

/// Creates a controller on the heap, for the lifetime of the machine, and attaches it. Freed if that fails.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::ahci
