// The sinks through which drivers announce devices: one for each driver and device class, on top of the machine-wide
// claims. To add a device class, add a typed sink like DriverDiskSink: announce() checks its list, claims through
// DeviceSink, and adds.
export module boot.sinks;
import core.std;
import core.result;
import core.text;
import core.vector;
import io.executor;
import io.block;
import io.net;
import io.shared_lane;
import drivers.table;
import drivers.claims;
import drivers.driver;
import boot.devices;
import boot.disks;
import boot.nets;

export namespace fl::boot {

/// Everything attached, by any driver. Lives as long as the machine.
struct Attached {
    /// The arguments must outlive this. `list`: receives units that are not driven; nullptr: they are not listed.
    explicit Attached(const drivers::Plan& plan, Devices* list = nullptr) : claims(plan), devices(list) {}
    Attached(const Attached&) = delete;
    Attached& operator=(const Attached&) = delete;
    ~Attached();
    drivers::Claims claims;
    Devices* devices;
    Disks disks;
    Nets nets;
    /// Of the network cards that can have twins: a card's number is its place here.
    Vector<io::MacAddress> addresses;
    /// One per running processor: each disk gets a lane for each of them.
    std::span<io::Executor* const> executors{};
    /// Of the disks whose devices have fewer queues.
    Vector<io::SharedLanes*> shared_lanes;
};

/// One driver's view of the claims of all classes: it sees only the devices that the table allows it.
class DriverDeviceSink final : public drivers::DeviceSink {
  public:
    DriverDeviceSink(Attached& attached, std::string_view driver) : attached_(attached), driver_(driver) {}
    bool offered(drivers::DeviceId id) override;
    Result<void> claim(drivers::DeviceId id) override;
    void unused(const drivers::UnusedUnit& unit) override;
    void withdraw(drivers::DeviceId id) override;

    std::string_view driver() const { return driver_; }
    /// Number of devices the driver has attached so far, removed ones included.
    u32 attached() const { return count_; }
    /// Call before offering the driver the device at `address`. reported() then says whether the driver has itself
    /// reported that device through unused().
    void expect(std::string_view address) {
        expected_.clear();
        expected_.write(address);
        reported_ = false;
    }
    bool reported() const { return reported_; }

  private:
    Attached& attached_;
    std::string_view driver_;
    u32 count_ = 0;
    FixedText<64> expected_;
    bool reported_ = false;
};

class DriverDiskSink final : public drivers::DiskSink {
  public:
    DriverDiskSink(Attached& attached, drivers::DeviceSink& claims, std::string_view driver)
        : attached_(attached), claims_(claims), driver_(driver) {}
    bool offered(u32 disk_number) override { return claims_.offered(drivers::disk_id(disk_number)); }
    u32 twin_at(u32 position) override { return attached_.claims.has_twins(driver_) ? position : drivers::no_twin; }
    FixedText<16> free_name(std::string_view prefix) override;
    Result<void> announce(io::BlockDevice& disk, u32 disk_number) override;
    void unused(const drivers::UnusedUnit& unit) override { claims_.unused(unit); }
    void withdraw(u32 disk_number) override { claims_.withdraw(drivers::disk_id(disk_number)); }

  private:
    void share_queues(io::BlockDevice& disk);

    Attached& attached_;
    drivers::DeviceSink& claims_;
    std::string_view driver_;
};

class DriverNetSink final : public drivers::NetSink {
  public:
    DriverNetSink(Attached& attached, drivers::DeviceSink& claims, std::string_view driver)
        : attached_(attached), claims_(claims), driver_(driver) {}
    u32 number_of(const io::MacAddress& address) override;
    bool offered(u32 number) override { return claims_.offered(id(number)); }
    FixedText<16> free_name() override { return attached_.nets.free_name(); }
    Result<void> announce(io::NetDevice& card, u32 number) override;
    void unused(const drivers::UnusedUnit& unit) override { claims_.unused(unit); }
    void withdraw(u32 number) override { claims_.withdraw(id(number)); }

  private:
    static drivers::DeviceId id(u32 number) { return {drivers::DeviceKind::network, number}; }

    Attached& attached_;
    drivers::DeviceSink& claims_;
    std::string_view driver_;
};

/// All sinks of one driver.
struct DriverSinks {
    DriverSinks(Attached& attached, std::string_view driver)
        : devices(attached, driver), disks(attached, devices, driver), nets(attached, devices, driver) {}
    DriverSinks(const DriverSinks&) = delete;
    DriverSinks& operator=(const DriverSinks&) = delete;
    DriverDeviceSink devices;
    DriverDiskSink disks;
    DriverNetSink nets;
};

} // namespace fl::boot
