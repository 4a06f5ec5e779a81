// The driver for VMware's paravirtual SCSI adapters, and QEMU's model of them [pvscsi]: matching, set-up, scan of the
// targets, hot plug, and the end of an adapter that has failed. The queue and the disks are in drivers.pvscsi.disk;
// drivers.scsi.unit identifies units.
//
// Set-up: ADAPTER_RESET → CONFIG (number of targets) → SETUP_RINGS → SETUP_MSG_RING and SETUP_REQCALLTHRESHOLD, where
// the adapter knows them → INTR_MASK; then the targets are scanned.
export module drivers.pvscsi;
import core.std;
import core.result;
import core.text;
import core.dma;
import core.vector;
import io.executor;
import io.task;
import io.latch;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
import drivers.scsi.unit;
export import drivers.pvscsi.disk;

export namespace fl::drivers::pvscsi {

inline constexpr std::string_view driver_name = "pvscsi";
inline constexpr pci::Match ids[] = {{.vendor = 0x15ad, .device = 0x07c0}};

/// One adapter. Lives until machine shutdown once it has been set up. Runs on the boot processor.
class Controller {
  public:
    static constexpr u32 max_units = 256; // of all targets
    static constexpr u32 max_luns = 256;  // LUN 0 to 255 of a target

    Controller(Environment& environment, const pci::Device& device, u32 index);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    io::Task<Result<void>> connect();
    /// Scans all targets. Failing units are skipped and reported.
    io::Task<Result<void>> scan();
    /// Starts the task that handles hot plug and a failure of the adapter.
    Result<void> keep() { return tasks_.spawn(watch()); }
    /// Ends everything. Afterwards the adapter accesses no memory.
    void disconnect();

    /// Number of units attached, including removed ones.
    u32 disks() const { return static_cast<u32>(units_.size()); }

  private:
    /// The commands to one target, one at a time.
    class Target final : public scsi::Nexus {
      public:
        Target(Controller& controller, u8 number)
            : Nexus(controller.environment_.executor, driver_name), controller_(controller), number_(number) {}
        io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;
        u8 number() const { return number_; }

      private:
        Controller& controller_;
        u8 number_;
    };
    Result<void> map_registers();
    io::Task<Result<void>> scan_target(u8 number);
    io::Task<Result<void>> scan_unit(Target& target, u8 lun);
    Result<void> attach(const Disk::Unit& unit, const scsi::UnitDescription& found);
    io::Task<Result<void>> watch();
    Disk* known(Address unit) const;
    void remove(Disk& disk, std::string_view why);
    void unused(Address unit, std::string_view what, Unused why, std::string_view reason);
    scsi::TransportLimits limits() const {
        return {.max_transfer = Transport::max_transfer, .flush = environment_.allows(Feature::flush)};
    }
    Adapter& adapter() { return queue_.transport().adapter(); }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    pci::Device device_;
    u32 index_;
    bool opened_ = false; // the adapter may access memory
    bool messages_ = false;
    bool threshold_ = false;
    u32 targets_ = default_targets;
    DmaBuffer rings_;
    DmaBuffer areas_;
    DmaBuffer scratch_; // data of the driver's own commands
    Queue queue_;
    pci::Interrupts interrupts_;
    io::Latch changes_;
    Vector<Disk*> units_; // owned
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, pci::Device, u32);
    Controller* next_ = nullptr; // list of attached controllers
};

/// Sets up one adapter and announces its disks.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::pvscsi
