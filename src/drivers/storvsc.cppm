// The driver for Hyper-V's synthetic disks: SCSI controllers, and the accelerators of IDE disks, as VMBus channels
// [storvsc]. Matching, handshake, hot add and remove. The queues and the disks are in drivers.storvsc.disk;
// drivers.scsi.units finds, tracks and announces the units.
//
// The handshake: BEGIN_INITIALIZATION → QUERY_PROTOCOL_VERSION, newest first → QUERY_PROPERTIES → END_INITIALIZATION
// → CREATE_SUB_CHANNELS, if both sides can use them; then the units are identified.
export module drivers.storvsc;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.task;
import io.latch;
import io.block;
import hv.hyperv;
import drivers.driver;
import drivers.scsi.units;
export import drivers.storvsc.disk;

export namespace fl::drivers::storvsc {

inline constexpr std::string_view driver_name = "storvsc";

/// The channel's class, by its bus name.
struct Match {
    std::string_view type;
};
inline constexpr Match ids[] = {{scsi_class}, {ide_class}};
constexpr bool matches(const hv::SyntheticDevice& device) {
    return std::ranges::any_of(ids, [&](const Match& m) { return m.type == device.type.view(); });
}

/// One controller with its channels. Lives until machine shutdown once it has a disk. Runs on the boot processor,
/// except for its further queues.
class Controller final : public scsi::Host {
  public:
    // the limit of Hyper-V's own hosts; LUNs probed if the host does not list them
    static constexpr u32 max_hyperv_units = 64;
    static constexpr u32 send_bytes = 64 * 1024; // of packets in each channel's rings
    static constexpr u32 receive_bytes = 32 * 1024;

    Controller(Environment& environment, hv::hyperv::Vmbus& bus);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    /// The handshake up to END_INITIALIZATION, and the sub-channels.
    io::Task<Result<void>> connect(const hv::hyperv::Offer& offer);
    /// Finds and announces new units; closes those that are gone. Failing units are skipped and logged.
    io::Task<Result<void>> scan() { return units_.scan_target(target()); }
    /// Starts the task that handles host events: hot add and remove, rescind, protocol violations.
    Result<void> keep();
    /// Ends everything and closes the channels. Bounded.
    io::Task<Result<void>> disconnect();

    /// Number of units attached, including removed ones.
    u32 disks() const { return units_.attached(); }
    const Terms& terms() const { return terms_; }
    /// Number of channels that were opened.
    u32 channels() const { return lane_count_; }

  private:
    struct Lane {
        Lane(io::Executor& executor, Shared& shared, bool first) : queue(executor, channel, shared, first) {}
        hv::hyperv::Channel channel;
        Queue queue;
        DmaBuffer parameters;
        /// Starts the queue on its own processor.
        struct Start : io::Post {
            Lane* lane = nullptr;
            Nanoseconds timeout = 0;
        } start;
    };
    io::Task<Result<void>> open_lane(u32 index, hv::hyperv::Offer offer);
    io::Task<Result<void>> send_request(Exchange& exchange, Operation operation);
    io::Task<Result<void>> negotiate_version();
    io::Task<Result<ChannelProperties>> read_properties();
    io::Task<Result<void>> open_sub_channels(ChannelProperties properties);
    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;
    bool is_open() const override { return lanes_[0]->queue.is_open(); }
    scsi::Unit* make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                     io::BlockDevice::Identity& identity) override;
    scsi::TransportLimits transport_limits() const;
    io::Task<Result<void>> watch_source();

    static constexpr u32 scratch_bytes = max_data;

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    hv::hyperv::Vmbus& bus_;
    hv::hyperv::Offer offer_;
    std::optional<IdePath> ide_;
    Shared shared_;
    Terms terms_;
    io::Latch changes_;
    DmaBuffer scratch_; // for the controller's own commands, one at a time
    std::array<Lane*, Disk::max_lanes> lanes_{};
    u32 lane_count_ = 0;
    scsi::Units units_;
    io::TaskGroup tasks_;
    Controller* next_ = nullptr; // list of attached controllers
    friend io::Task<Result<void>> probe(Environment&, hv::HyperV&, const hv::SyntheticDevice&);
    friend io::Task<Result<void>> attach(Environment&, hv::hyperv::Vmbus&, hv::hyperv::Offer);
};

/// Connects one channel and announces its disks. Success also if it is left alone (another driver has the disk).
io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device);
/// The same for a bus without its backend.
io::Task<Result<void>> attach(Environment& environment, hv::hyperv::Vmbus& bus, hv::hyperv::Offer offer);

} // namespace fl::drivers::storvsc
