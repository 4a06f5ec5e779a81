// The driver for AHCI HBAs [ahci-1.3.1]: matching, taking over from the firmware, finding the disks at the ports,
// announcing. I/O is handled by drivers.ahci.queue.
export module drivers.ahci;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.mmio;
import core.time;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
export import drivers.ahci.protocol;
export import drivers.ahci.queue;

export namespace fl::drivers::ahci {

/// Mass storage, Serial ATA, AHCI 1.0 [ahci-1.3.1 §2.1.5].
inline constexpr pci::Match ids[] = {{.class_code = 0x01, .subclass = 0x06, .prog_if = 0x01}};
inline constexpr u8 abar = 5; // its base address register

/// The ports whose registers exist, from PI, CAP.NP and the size of ABAR. Error{protocol}: none.
struct Ports {
    u32 usable = 0;
    u32 dropped = 0; // implemented according to PI, but beyond CAP.NP or ABAR
};
Result<Ports> usable_ports(u32 implemented, Capabilities capabilities, u64 abar_size);

/// One HBA with its ports. Must outlive all use of its disks; normally lives until machine shutdown.
class Controller {
  public:
    explicit Controller(Environment& environment) : environment_(environment) {}
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// Finds and announces the disks. A failing port is reported, and the others are tried; finding no disk is not an
    /// error.
    io::Task<Result<void>> attach(pci::Device device);
    /// Number of announced disks.
    u32 disks() const { return count_; }
    /// The disk at a port; nullptr: none is in use.
    Disk* disk(u32 port) { return slots_[port].disk ? &*slots_[port].disk : nullptr; }
    std::string_view interrupt() const {
        return interrupts_ ? name(interrupts_->kind()) : name(pci::InterruptKind::none);
    }

  private:
    struct Slot {
        DmaBuffer memory;
        std::optional<Disk> disk; // destroyed first: it stops the port
        std::optional<Terms> terms;
    };
    io::Task<Result<void>> take_over();
    io::Task<Result<void>> reset();
    io::Task<Result<void>> examine(u32 number);
    io::Task<Result<void>> start(Port& port, Slot& slot);
    io::Task<Result<void>> identify(Port& port, const PortMemory& memory, ata::IdentifyData& data);
    io::Task<Result<void>> stop(Port& port);
    bool any(u64 at, u32 bits) const { return (abar_.read<u32>(at) & bits) != 0; }
    io::Task<Result<void>> wait(Nanoseconds bound, u64 at, u32 bits, bool set);
    Result<void> open(pci::Device& device);
    bool announce(u32 number);
    io::Task<Result<void>> give_up(u32 number);
    void unused(u32 number, std::string_view what, Unused why, std::string_view reason = {});
    void failed(u32 number, const Error& error);

    Environment environment_; // its disk sink is used only while attaching
    Mmio abar_;
    Capabilities capabilities_;
    u32 present_ = 0; // ports that had a device before the reset, or may still show one
    HbaEvents events_;
    std::array<Slot, max_ports> slots_;
    std::optional<pci::Interrupts> interrupts_; // destroyed first
    u32 count_ = 0;
};

/// Creates a controller on the heap, for the lifetime of the machine, and attaches it. Freed if it has no disks.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::ahci
