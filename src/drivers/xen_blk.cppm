// The driver for Xen's virtual block devices [xen-blkif]: matching, the handshake with the back end, announcing, and
// back end disconnection. The disk is in drivers.xen_blk.disk, its life from one connection to the next in
// drivers.xen_blk.lane.
//
// A disk whose back end leaves the connection, without being removed, is connected again: its requests wait meanwhile,
// and those that were under way are sent again. A disk that the toolstack removes ends; added again, it is the same
// Vbd and Disk, under the same name.
//
// Each processor has a queue, as far as the back end serves several: a ring and an event channel, whose handler runs on
// that processor. The others share them [io.shared_lane]. How many there are is settled when the disk is announced: a
// back end that returns has to serve as many.
//
// The handshake: back end init-wait → we publish ring, event channel, protocol → initialised → back end connected →
// we read the disk's properties → connected. Features offered by the back end are used if Environment::allows() them;
// all are optional.
export module drivers.xen_blk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.latch;
import io.task;
import io.block;
import hv.xen;
import drivers.driver;
export import drivers.xen_blk.lane;

export namespace fl::drivers::xen_blk {

inline constexpr std::string_view driver_name = "xen_blk";

/// Virtual block devices, by the type's bus name.
struct Match {
    std::string_view type;
};
inline constexpr Match ids[] = {{"vbd"}};
constexpr bool matches(const hv::SyntheticDevice& device) {
    return std::ranges::any_of(ids, [&](const Match& m) { return m.type == device.type.view(); });
}

/// The most queues of one disk.
inline constexpr u32 max_queues = 8;

/// One device with its connection. Lives until machine shutdown once its disk has been announced.
class Vbd final : public hv::xen::BusDevice {
  public:
    /// `slot`: the disk's number in Environment::disks.
    Vbd(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device, const hv::xen::VirtualDisk& which,
        u32 slot);
    ~Vbd();

    /// The handshake up to state connected; opens the disk. An Error with left() set: not a device for this driver.
    io::Task<Result<void>> connect();
    /// Starts watching the back end: a disk whose back end is removed or violates the protocol is closed and removed
    /// from the bus.
    Result<void> keep();
    /// Disconnects from the bus in an orderly way; every wait is bounded.
    io::Task<Result<void>> disconnect();
    /// The device has been added again: waits for the end of the former connection. True: connect() may be called
    /// again; false: the former back end has kept something, so this disk can never be used again.
    io::Task<Result<bool>> await_end();
    // hv::xen::BusDevice
    bool holds_grants() const override { return !ended_ || lost_; }
    io::Task<Result<void>> pause() override;
    void lost() override;
    void resumed(bool moved) override;

    Disk& disk() { return lanes_[0]->disk(); }
    bool has_lanes() const { return lanes_[0] != nullptr; }
    /// Ends everything under way. `why`: for the log.
    void close(const Error& why) { lanes_[0]->close(io::Status::device_gone, why); }
    /// After disconnect(): no other processor knows anything of it.
    bool disposable() const { return !running_; }
    /// Why a working device is not attached: a CD drive, a disk of 0 bytes, or an unsupported one.
    std::optional<Unused> left() const { return left_; }

  private:
    static constexpr u32 entries_of_queue = Connection::max_pages + 1;
    static constexpr u64 largest_disk = u64{1} << 54; // in the units of "sectors"; more is nonsense
    static constexpr Nanoseconds retry_pause = 20'000'000;
    static constexpr Nanoseconds pause_step = 1'000'000;

    io::Task<Result<void>> shake_hands();
    io::Task<Result<void>> follow();
    io::Task<Result<void>> follow_state(hv::xen::BusState back_state);
    io::Task<Result<void>> reconnect(hv::xen::BusState back_state);
    io::Task<Result<void>> connect_again();
    io::Task<Result<bool>> release();
    io::Task<Result<void>> take_over(const Terms& old);
    io::Task<Result<void>> start_lanes();
    io::Task<Result<void>> hold_lanes();
    io::Task<Result<void>> unpause_lanes();
    io::Task<Result<u32>> in_flight();
    io::Task<Result<void>> forget_connection();
    io::Task<Result<bool>> end_lanes();
    void remove(const Error& why);
    bool is_open() const { return lanes_[0]->is_open(); }
    /// The lanes that there are, of this connection or an earlier one.
    std::span<Lane* const> lanes() const { return std::span(lanes_).first(made_); }
    io::Executor& executor(u32 lane) const { return lane == 0 ? environment_.executor : *environment_.executors[lane]; }
    FixedText<96> features() const;
    void report_in_use() const;
    io::Task<Result<void>> negotiate();
    io::Task<Result<u32>> ring_order();
    io::Task<Result<u32>> queue_count();
    Result<void> make_lanes(u32 wanted, u32 order);
    Result<void> make_lane(u32 number, u32 order);
    io::Task<Result<void>> withdraw_key(std::string_view key, bool& published);
    io::Task<Result<void>> publish(bool old_style);
    void publish_queue(std::string_view prefix, const Connection& connection);
    io::Task<Result<void>> read_geometry();
    io::Task<Result<void>> read_features();
    io::Task<Result<bool>> offers(std::string_view feature);
    io::Task<Result<void>> follow_size();
    io::Task<Result<void>> watch_source();
    void add_entry(std::string_view key, std::string_view value);
    void add_entry(std::string_view key, u64 value);

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    hv::Xen& xen_;
    hv::xen::Frontend front_;
    io::QueueGroup group_;
    std::array<Lane*, max_queues> lanes_{}; // owned; the first one is made with this
    u32 made_ = 0;                          // lanes that exist
    u32 queues_ = 1;                        // of the connection: the first ones
    u32 known_lanes_ = 0;                   // of the disk, once it was connected
    hv::xen::VirtualDisk which_;
    FixedText<12> address_; // on the bus
    u32 slot_;
    Terms terms_;
    std::optional<Unused> left_;
    bool begun_ = false; // the back end may have seen us
    bool old_ring_keys_ = false;
    bool offers_persistent_ = false;
    bool knows_queues_ = false;   // the back end says how many queues it serves
    bool counts_sectors_ = false; // feature-large-sector-size has been published
    // Keys that a later connection has to remove, if it does without them.
    bool published_order_ = false;
    bool published_large_sectors_ = false;
    bool ended_ = false; // disconnected; may be connected again unless `lost_`
    bool lost_ = false;  // a back end has kept pages of the disk
    bool moved_ = false; // to another domain: it has to be connected again
    bool paused_ = false;
    bool running_ = false; // lanes are known to their processors
    io::Latch end_;
    std::array<hv::xen::StoreEntry, max_queues * entries_of_queue + 6> entries_{};
    u32 entry_count_ = 0;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, hv::Xen&, const hv::SyntheticDevice&);
    Vbd* next_ = nullptr; // list of attached devices, for as long as the machine
};

/// Connects and announces one device. Success: attached, or left alone (another driver has the disk, a CD-ROM, an
/// unknown virtual-device number).
io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_blk
