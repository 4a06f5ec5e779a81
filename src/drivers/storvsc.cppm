// The driver for Hyper-V's synthetic disks: SCSI controllers, and the accelerators of IDE disks, as VMBus channels
// [storvsc]. Matching, handshake, unit discovery, announcing, hot add and remove. The queue and the disks are in
// drivers.storvsc.disk; drivers.scsi.unit identifies units.
//
// The handshake: BEGIN_INITIALIZATION → QUERY_PROTOCOL_VERSION, newest first → QUERY_PROPERTIES → END_INITIALIZATION
// → CREATE_SUB_CHANNELS, if both sides can use them; then the units are identified.
export module drivers.storvsc;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.vector;
import io.executor;
import io.task;
import io.latch;
import io.block;
import hv.hyperv;
import drivers.driver;
import drivers.scsi.unit;
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
class Controller final : public scsi::Nexus {
  public:
    static constexpr u32 max_units = 256; // LUN 0 to 255 of target 0: the addressable range
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
    io::Task<Result<void>> scan();
    /// Starts the task that handles host events: hot add and remove, rescind, protocol violations.
    Result<void> keep();
    /// Ends everything and closes the channels. Bounded.
    io::Task<Result<void>> disconnect();

    /// Number of units attached, including removed ones.
    u32 disks() const { return static_cast<u32>(units_.size()); }
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
    struct Unit {
        std::array<Disk*, Disk::max_lanes> disks{}; // one per lane; the first is the disk
        bool gone = false;
    };
    io::Task<Result<void>> open_lane(u32 index, hv::hyperv::Offer offer);
    io::Task<Result<void>> send_request(Exchange& exchange, Operation operation);
    io::Task<Result<void>> negotiate_version();
    io::Task<Result<ChannelProperties>> read_properties();
    io::Task<Result<void>> open_sub_channels(ChannelProperties properties);
    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;
    io::Task<Result<void>> scan_unit(u8 lun);
    io::Task<Result<void>> watch_source();
    Result<void> attach(const Disk::Unit& unit, const io::Geometry& geometry,
                        const io::BlockDevice::Identity& identity);
    Unit* known(u8 lun);
    void unused(u8 lun, std::string_view what, Unused why, std::string_view reason);
    void report_out_of_range(u32 units);
    void failed(u8 lun, const Error& error);
    void remove_unit(Unit& unit, std::string_view why);
    scsi::TransportLimits limits() const {
        return {.max_transfer = terms_.max_transfer, .flush = environment_.allows(Feature::flush)};
    }

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
    Vector<Unit*> units_;                  // owned
    std::array<bool, max_units> logged_{}; // LUNs present but not driven and already logged
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
