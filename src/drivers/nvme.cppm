// The driver for NVMe controllers [nvme-1.4]: matching, set-up, reset, and the end of a controller that has failed.
// Its parts, in order: drivers.nvme.protocol, .commands (and .status), .queue, .recovery, .disk (the transport),
// .registers, .admin, .namespaces.
//
// Set-up [nvme-1.4 §7.6.1]: disable, admin queue, enable, Identify Controller, shadow doorbells, Number of Queues, an
// I/O queue pair for each processor, the active namespaces. Each wait has a bound. A reset repeats all of it but the
// last.
export module drivers.nvme;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.mmio;
import io.executor;
import io.task;
import io.block;
import drivers.driver;
import drivers.pci;
import drivers.pci.msi;
export import drivers.nvme.namespaces;
export import drivers.nvme.registers;

export namespace fl::drivers::nvme {

inline constexpr std::string_view driver_name = "nvme";

/// Mass storage, non-volatile memory, NVMe I/O controller [nvme-1.4 §2.1.5].
inline constexpr pci::Match ids[] = {{.class_code = 0x01, .subclass = 0x08, .prog_if = 0x02}};

/// One controller. Lives until machine shutdown once it has a disk, or another processor has seen it. Runs on the boot
/// processor, except for the I/O queues.
class Controller {
  public:
    static constexpr u32 max_lanes = Disk::max_lanes;

    Controller(Environment& environment, const pci::Device& device, u32 index);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// The set-up up to the I/O queues.
    io::Task<Result<void>> connect();
    /// Finds and announces the namespaces. Failing ones are skipped and reported.
    io::Task<Result<void>> scan() { return namespaces_.scan(); }
    /// Starts the tasks that handle events, commands without an answer, and a failure of the controller.
    Result<void> keep();
    /// Ends everything, disables the controller, and frees what it can no longer access. Bounded. An Error: the
    /// controller may still access memory, and nothing is freed.
    io::Task<Result<void>> disconnect();

    u32 disks() const { return namespaces_.disks(); }
    /// I/O queue pairs.
    u32 queues() const { return lane_count_; }
    u64 resets() const { return recovery_.resets(); }
    /// An abort or a reset is under way.
    bool recovering() const { return recovery_.pending(); }

  private:
    struct Lane {
        Lane(io::Executor& executor, io::QueueGroup& group, Recovery& recovery) : queue(executor, group, recovery) {}
        Queue queue;
        DmaBuffer submissions;
        DmaBuffer completions;
        DmaBuffer lists;
    };
    // Set-up.
    Result<void> make_lane(u32 index, io::Executor& executor);
    Result<u32> attach_interrupts(u32 wanted);
    Result<void> lay_out(u32 index);
    io::Task<Result<void>> bring_up();
    io::Task<Result<void>> use_doorbell_buffers();
    io::Task<Result<u32>> ask_for_queues(u32 wanted);
    io::Task<Result<void>> create_queues(u32 index);
    io::Task<Result<void>> read_limits();
    io::Task<Result<void>> settle_write_cache();
    io::Task<Result<void>> accept_retry_delays();
    void describe();
    // While in use.
    io::Task<Result<void>> watch_events();
    io::Task<Result<void>> handle_event(Event event);
    io::Task<Result<void>> watch();
    io::Task<Result<void>> abort(Recovery::Request request);
    io::Task<Result<void>> reset(Recovery::Cause cause);
    io::Task<Result<void>> wait_until_quiet();
    Queue& admin_queue() { return lanes_[0]->queue; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    pci::Device device_;
    u32 index_;
    Registers registers_;
    u32 entries_ = 2;            // of each I/O submission queue
    u32 completion_entries_ = 2; // of each I/O completion queue
    io::QueueGroup group_;
    Recovery recovery_;
    Admin admin_;
    ControllerInfo info_;
    CommandSetLimits limits_;
    bool delays_ = false;        // the controller may delay what is sent again
    bool shadows_ = false;       // the doorbell buffers are in use
    bool write_through_ = false; // the volatile write cache was switched off
    DmaBuffer shadow_;
    DmaBuffer events_;
    std::array<Lane*, io::QueueGroup::max_queues> lanes_{}; // the first is the admin queue
    std::array<Queue*, max_lanes> queues_{};                // the others'
    u32 made_ = 0;                                          // lanes that exist
    u32 lane_count_ = 0;                                    // I/O queues in use
    pci::Interrupts interrupts_;
    u32 vectors_ = 0;
    Namespaces namespaces_;
    bool watching_events_ = false;
    u8 reported_events_ = 0; // types of events that were logged, one bit each
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, pci::Device, u32);
    Controller* next_ = nullptr; // list of attached controllers
};

/// Sets up one controller and announces its namespaces as nvme<index>n<namespace>.
io::Task<Result<void>> probe(Environment& environment, pci::Device device, u32 index);

} // namespace fl::drivers::nvme
