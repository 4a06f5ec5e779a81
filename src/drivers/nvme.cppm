// The driver for NVMe controllers [nvme-1.4]: matching, set-up, namespaces, events, and the end of a controller that
// has failed. The queues and the disks are in drivers.nvme.disk.
//
// Set-up [nvme-1.4 §7.6.1]: disable, admin queue, enable, Identify Controller, shadow doorbells, Number of Queues, an
// I/O queue pair for each processor, the active namespaces. Each wait has a bound.
export module drivers.nvme;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.mmio;
import core.vector;
import io.executor;
import io.task;
import io.latch;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
export import drivers.nvme.disk;

export namespace fl::drivers::nvme {

inline constexpr std::string_view driver_name = "nvme";

/// Mass storage, non-volatile memory, NVMe I/O controller [nvme-1.4 §2.1.5].
inline constexpr pci::Match ids[] = {{.class_code = 0x01, .subclass = 0x08, .prog_if = 0x02}};

/// One controller. Lives until machine shutdown once it has a disk, or another processor has seen it. Runs on the boot
/// processor, except for the I/O queues.
class Controller {
  public:
    static constexpr u32 max_namespaces = 64;
    static constexpr u32 max_lanes = Disk::max_lanes;

    Controller(Environment& environment, const pci::Device& device, u32 index);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// The set-up up to the I/O queues.
    io::Task<Result<void>> connect();
    /// Finds and announces the namespaces. Failing ones are skipped and reported.
    io::Task<Result<void>> scan();
    /// Starts the tasks that handle events and a failure of the controller.
    Result<void> keep();
    /// Ends everything, disables the controller, and frees what it can no longer access. Bounded. An Error: the
    /// controller may still access memory, and nothing is freed.
    io::Task<Result<void>> disconnect();

    u32 disks() const { return static_cast<u32>(units_.size()); }
    /// I/O queue pairs.
    u32 queues() const { return lane_count_; }

  private:
    struct Lane {
        Lane(io::Executor& executor, io::QueueGroup& group) : queue(executor, group) {}
        Queue queue;
        DmaBuffer submissions;
        DmaBuffer completions;
        DmaBuffer lists;
    };
    struct Unit {
        std::array<Disk*, max_lanes> disks{}; // one per lane; the first is the disk
    };
    Result<void> make_lane(u32 index, io::Executor& executor);
    Result<void> lay_out(u32 index);
    io::Task<Result<void>> wait_ready(bool ready);
    io::Task<Result<void>> disable();
    io::Task<Result<u32>> command(Submission command, std::string_view what);
    io::Task<Result<void>> identify(u32 cns, u32 nsid);
    io::Task<Result<void>> use_doorbell_buffers();
    io::Task<Result<void>> create_queues();
    io::Task<Result<void>> open_lane(u32 index);
    io::Task<Result<void>> scan_namespace(u32 nsid);
    io::Task<Result<void>> watch_events();
    io::Task<Result<void>> handle_event(u32 event);
    io::Task<Result<void>> watch_failure();
    Result<void> attach(u32 nsid, const NamespaceInfo& info);
    void unused(u32 nsid, Unused why, std::string_view reason);
    std::span<const u8, identify_bytes> data() const {
        return std::span<const u8, identify_bytes>(reinterpret_cast<const u8*>(scratch_.data()), identify_bytes);
    }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    pci::Device device_;
    u32 index_;
    Mmio registers_{};
    Nanoseconds ready_bound_ = 0;
    u32 entries_ = 2; // of each I/O queue
    u8 stride_ = 0;
    bool set_up_ = false; // the controller may access memory
    bool gone_ = false;
    io::QueueGroup group_;
    ControllerInfo info_;
    u32 max_bytes_ = 0;
    DmaBuffer shadow_;
    DmaBuffer events_;
    DmaBuffer scratch_;                                     // for the data of admin commands, one at a time
    std::array<Lane*, io::QueueGroup::max_queues> lanes_{}; // the first is the admin queue
    u32 made_ = 0;                                          // lanes that exist
    u32 lane_count_ = 0;                                    // I/O queues in use
    pci::Interrupts interrupts_;
    u32 vectors_ = 0;
    io::Latch failed_;
    Vector<Unit*> units_; // owned
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, pci::Device, u32);
    Controller* next_ = nullptr; // list of attached controllers
};

/// Sets up one controller and announces its namespaces as nvme<index>n<namespace>.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::nvme
