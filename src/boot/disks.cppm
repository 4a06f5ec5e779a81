// The disks of the machine, as the drivers announce them, and what is printed of each as it comes. Which driver may
// announce which disk is decided by the claims (boot.sinks).
export module boot.disks;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;

export namespace fl::boot {

class Disks {
  public:
    static constexpr usize capacity = 1024; // fixed, since jobs hold on to the list while disks are added

    /// Whether add() would take a disk of that name. Error{busy}: there is one; Error{exhausted}: no room.
    Result<void> takes(std::string_view name) const;
    /// takes() has said that it can be added. The disk lives until the machine ends.
    void add(io::BlockDevice& disk);
    /// In the order in which they attached.
    std::span<io::BlockDevice* const> all() const { return {disks_.data(), count_}; }
    io::BlockDevice* find(std::string_view name) const;
    /// "xvda, hda" for messages, the first ones and the number where there are many; "none" when there is none.
    FixedText<256> names() const;

  private:
    std::array<io::BlockDevice*, capacity> disks_{};
    usize count_ = 0;
};

/// How many null disks [drivers.null] the command line asks for: one more than the highest number in null0, null1 …
/// among these names; 0 to 256.
u32 null_disks(std::span<const std::string_view> names);

/// The `disk` record and its line for people.
void report(const io::BlockDevice& disk);

} // namespace fl::boot
