// The driver for VMware's paravirtual SCSI adapters, and QEMU's model of them [pvscsi]: matching, set-up, hot plug, and
// the end of an adapter that has failed. The queue and the disks are in drivers.pvscsi.disk; drivers.scsi.units finds,
// tracks and announces the units.
//
// Set-up: ADAPTER_RESET → CONFIG (number of targets) → SETUP_RINGS → SETUP_MSG_RING and SETUP_REQCALLTHRESHOLD, where
// the adapter knows them → INTR_MASK; then the targets are scanned.
export module drivers.pvscsi;
import core.std;
import core.result;
import core.text;
import core.dma;
import io.executor;
import io.task;
import io.latch;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
import drivers.scsi.units;
export import drivers.pvscsi.disk;

export namespace fl::drivers::pvscsi {

inline constexpr std::string_view driver_name = "pvscsi";
inline constexpr pci::Match ids[] = {{.vendor = 0x15ad, .device = 0x07c0}};

/// One adapter. Lives until machine shutdown once it has been set up. Runs on the boot processor.
class Controller final : public scsi::Host {
  public:
    Controller(Environment& environment, const pci::Device& device, u32 index);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    io::Task<Result<void>> connect();
    /// Scans all targets. Failing units are skipped and reported.
    io::Task<Result<void>> scan() { return units_.scan(targets_); }
    /// Starts the task that handles hot plug and a failure of the adapter.
    Result<void> keep() { return tasks_.spawn(watch()); }
    /// Ends everything. Afterwards the adapter accesses no memory.
    void disconnect();

    /// Number of units attached, including removed ones.
    u32 disks() const { return units_.attached(); }

  private:
    Result<void> map_registers();
    io::Task<Result<void>> end(Exchange& exchange);
    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;
    bool is_open() const override { return queue_.is_open(); }
    scsi::Unit* make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                     io::BlockDevice::Identity& identity) override;
    io::Task<Result<void>> watch();
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
    scsi::Units units_;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, pci::Device, u32);
    Controller* next_ = nullptr; // list of attached controllers
};

/// Sets up one adapter and announces its disks.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::pvscsi
