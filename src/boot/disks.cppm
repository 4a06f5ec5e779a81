// The disks of the machine, as the drivers announce them. Keeps the rule that one disk attaches once (drivers.claims)
// and prints each as it comes.
export module boot.disks;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;
import drivers.table;
import drivers.claims;
import drivers.driver;
import boot.devices;

export namespace fl::boot {

class Disks {
  public:
    static constexpr usize capacity = 1024; // fixed, since jobs hold on to the list while disks are added

    /// What these refer to must outlive this. `devices`: where disks that are not attached are told; nullptr: nobody
    /// is.
    explicit Disks(const drivers::Plan& plan, Devices* devices = nullptr) : claims_(plan), devices_(devices) {}

    /// What one driver is given: it sees only the disks that the table lets it have.
    class Port final : public drivers::DiskSink {
      public:
        Port(Disks& disks, std::string_view driver) : disks_(disks), driver_(driver) {}
        bool offered(u32 disk_number) override;
        Result<void> announce(io::BlockDevice& disk, u32 disk_number) override;
        void unused(const drivers::UnusedUnit& unit) override;
        void gone(u32 disk_number) override { disks_.claims_.released(driver_, drivers::disk_slot(disk_number)); }

      private:
        Disks& disks_;
        std::string_view driver_;
    };

    /// In the order in which they attached.
    std::span<io::BlockDevice* const> all() const { return {disks_.data(), count_}; }
    io::BlockDevice* find(std::string_view name) const;
    /// "xvda, hda" for messages, the first ones and the number where there are many; "none" when there is none.
    FixedText<256> names() const;

  private:
    drivers::Claims claims_;
    Devices* devices_;
    std::array<io::BlockDevice*, capacity> disks_{};
    usize count_ = 0;
};

/// How many null disks [drivers.null] the command line asks for: one more than the highest number in null0, null1 …
/// among these names; 0 to 256.
u32 null_disks(std::span<const std::string_view> names);

/// The `disk` record and its line for people.
void report(const io::BlockDevice& disk);

} // namespace fl::boot
