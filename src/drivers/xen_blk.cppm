// The driver for Xen's virtual block devices [xen-blkif]: matching, the handshake with the back end, announcing, and
// back end disconnection. The disk is in drivers.xen_blk.disk, its life from one connection to the next in
// drivers.xen_blk.lane.
//
// A disk whose back end leaves the connection, without being removed, is connected again: its requests wait meanwhile,
// and those that were under way are sent again. A disk that the toolstack removes ends; added again, it is the same
// Vbd and Disk, under the same name.
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

/// The largest ring requested: four pages, 128 slots. More slots than Ring::max_slots would be unusable.
inline constexpr u32 max_ring_order = 2;

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

    Lane& lane() { return lane_; }
    /// Why a working device is not attached: a CD drive, a disk of 0 bytes, or an unsupported one.
    std::optional<Unused> left() const { return left_; }

  private:
    static constexpr u32 max_ring_pages = 1u << max_ring_order;
    static constexpr u64 largest_disk = u64{1} << 54; // in the units of "sectors"; more is nonsense
    static constexpr Nanoseconds retry_pause = 20'000'000;
    static constexpr Nanoseconds pause_step = 1'000'000;

    io::Task<Result<void>> shake_hands();
    io::Task<Result<void>> follow();
    io::Task<Result<void>> follow_state(hv::xen::BusState back_state);
    io::Task<Result<void>> reconnect(hv::xen::BusState back_state);
    io::Task<Result<void>> connect_again();
    io::Task<Result<bool>> release();
    Result<void> take_over(const Terms& old);
    void forget_connection();
    FixedText<96> features() const;
    void report_in_use() const;
    io::Task<Result<void>> negotiate();
    io::Task<Result<u32>> ring_order();
    Result<u32> make_ring(u32 order);
    io::Task<Result<void>> withdraw_key(std::string_view key, bool& published);
    io::Task<Result<void>> publish(u32 order, bool old_style);
    io::Task<Result<void>> read_geometry();
    io::Task<Result<void>> read_features();
    io::Task<Result<bool>> offers(std::string_view feature);
    io::Task<Result<void>> follow_size();
    io::Task<Result<void>> watch_source();
    void add_entry(std::string_view key, std::string_view value);
    void add_entry(std::string_view key, u64 value);
    void free_ring();

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    hv::Xen& xen_;
    hv::xen::Frontend front_;
    Lane lane_;
    hv::xen::VirtualDisk which_;
    FixedText<12> address_; // on the bus
    u32 slot_;
    Terms terms_;
    std::optional<Unused> left_;
    bool begun_ = false; // the back end may have seen us
    bool old_ring_keys_ = false;
    bool offers_persistent_ = false;
    bool counts_sectors_ = false; // feature-large-sector-size has been published
    // Keys that a later connection has to remove, if it does without them.
    bool published_order_ = false;
    bool published_large_sectors_ = false;
    bool ended_ = false; // disconnected; may be connected again unless `lost_`
    bool lost_ = false;  // a back end has kept pages of the disk
    bool moved_ = false; // to another domain: it has to be connected again
    io::Latch end_;
    hv::xen::Port port_ = hv::xen::Port::none;
    DmaBuffer ring_;
    std::array<hv::xen::GrantRef, max_ring_pages> ring_grants_{};
    u32 ring_pages_ = 0;
    std::array<hv::xen::StoreEntry, max_ring_pages + 6> entries_{};
    u32 entry_count_ = 0;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, hv::Xen&, const hv::SyntheticDevice&);
    Vbd* next_ = nullptr; // list of attached devices, for as long as the machine
};

/// Connects and announces one device. Success: attached, or left alone (another driver has the disk, a CD-ROM, an
/// unknown virtual-device number).
io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_blk
