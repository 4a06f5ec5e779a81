// The driver for Xen's virtual block devices [xen-blkif]: matching, the handshake with the back end, announcing, and
// back end disconnection. The disk is in drivers.xen_blk.disk.
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
import io.task;
import io.block;
import hv.xen;
import drivers.driver;
export import drivers.xen_blk.disk;

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
class Vbd {
  public:
    Vbd(Environment& environment, hv::Xen& xen);
    ~Vbd();
    Vbd(const Vbd&) = delete;
    Vbd& operator=(const Vbd&) = delete;

    /// The handshake up to state connected. `path`: "device/vbd/51712". An Error with left() set: not a device for
    /// this driver.
    io::Task<Result<void>> connect(const hv::SyntheticDevice& device, const hv::xen::VirtualDisk& which);
    /// Starts watching the back end: a disk whose back end closes or violates the protocol is closed and removed from
    /// the bus.
    Result<void> keep();
    /// Disconnects from the bus in an orderly way; every wait is bounded.
    io::Task<Result<void>> disconnect();
    Disk& disk() { return disk_; }
    /// Why a working device is not attached: a CD drive, a disk of 0 bytes, or an unsupported one.
    std::optional<Unused> left() const { return left_; }

  private:
    static constexpr u32 max_ring_pages = 1u << max_ring_order;
    static constexpr u64 largest_disk = u64{1} << 54; // in the units of "sectors"; more is nonsense

    io::Task<Result<void>> negotiate();
    io::Task<Result<u32>> ring_order();
    Result<u32> make_ring(u32 order);
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
    Disk disk_;
    Terms terms_;
    std::optional<Unused> left_;
    bool begun_ = false; // the back end may have seen us
    bool old_ring_keys_ = false;
    bool offers_persistent_ = false;
    bool counts_sectors_ = false; // feature-large-sector-size has been published
    hv::xen::Port port_ = hv::xen::Port::none;
    DmaBuffer ring_;
    std::array<hv::xen::GrantRef, max_ring_pages> ring_grants_{};
    u32 ring_pages_ = 0;
    std::array<hv::xen::StoreEntry, max_ring_pages + 6> entries_{};
    u32 entry_count_ = 0;
    io::TaskGroup tasks_;
    friend io::Task<Result<void>> probe(Environment&, hv::Xen&, const hv::SyntheticDevice&);
    Vbd* next_ = nullptr; // list of attached devices
};

/// Connects and announces one device. Success: attached, or left alone (another driver has the disk, a CD-ROM, an
/// unknown virtual-device number).
io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice& device);

} // namespace fl::drivers::xen_blk
