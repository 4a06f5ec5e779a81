// What drivers are given to announce devices: one sink for each driver and class, over the claims of the whole machine.
// A class of devices joins by a typed sink like DiskPort: announce() asks its list, claims by DeviceSink, and adds.
export module boot.sinks;
import core.std;
import core.result;
import core.text;
import io.block;
import drivers.table;
import drivers.claims;
import drivers.driver;
import boot.devices;
import boot.disks;

export namespace fl::boot {

/// What is attached, whichever driver announced it. Lives as long as the machine.
struct Attached {
    /// What these refer to must outlive this. `list`: where units that are not driven are listed; nullptr: nowhere.
    explicit Attached(const drivers::Plan& plan, Devices* list = nullptr) : claims(plan), devices(list) {}
    drivers::Claims claims;
    Devices* devices;
    Disks disks;
};

/// The claims of all classes, for one driver: it sees only what the table lets it have.
class ClaimSink final : public drivers::DeviceSink {
  public:
    ClaimSink(Attached& attached, std::string_view driver) : attached_(attached), driver_(driver) {}
    bool offered(drivers::DeviceId id) override;
    Result<void> claim(drivers::DeviceId id) override;
    void unused(const drivers::UnusedUnit& unit) override;
    void gone(drivers::DeviceId id) override;

    std::string_view driver() const { return driver_; }
    /// How many devices the driver has attached so far, those that are gone again included.
    u32 attached() const { return count_; }
    /// The driver is about to be given the device at this address: reported() says from then on whether it has said
    /// itself, by unused(), what became of that device.
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

class DiskPort final : public drivers::DiskSink {
  public:
    DiskPort(Disks& disks, drivers::DeviceSink& claims) : disks_(disks), claims_(claims) {}
    bool offered(u32 disk_number) override { return claims_.offered(drivers::disk_id(disk_number)); }
    Result<void> announce(io::BlockDevice& disk, u32 disk_number) override;
    void unused(const drivers::UnusedUnit& unit) override { claims_.unused(unit); }
    void gone(u32 disk_number) override { claims_.gone(drivers::disk_id(disk_number)); }

  private:
    Disks& disks_;
    drivers::DeviceSink& claims_;
};

/// All sinks of one driver.
struct DriverSinks {
    DriverSinks(Attached& attached, std::string_view driver)
        : devices(attached, driver), disks(attached.disks, devices) {}
    DriverSinks(const DriverSinks&) = delete;
    DriverSinks& operator=(const DriverSinks&) = delete;
    ClaimSink devices;
    DiskPort disks;
};

} // namespace fl::boot
