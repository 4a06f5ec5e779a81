// The list of announced disks, and the record printed for each. The claims (boot.sinks) decide which driver may
// announce which disk.
export module boot.disks;
import core.std;
import core.result;
import core.text;
import core.log;
import io.block;

export namespace fl::boot {

class Disks {
  public:
    static constexpr usize capacity = 1024; // fixed: jobs hold a span of the list while disks are added

    /// Whether add() would accept this disk. Error{busy}: another one has its name; Error{exhausted}: the list is full.
    Result<void> takes(const io::BlockDevice& disk) const;
    /// Requires success of takes(). The disk must live until the machine ends. A disk that was removed and works again
    /// keeps its place.
    void add(io::BlockDevice& disk);
    /// In order of attachment.
    std::span<io::BlockDevice* const> all() const { return {disks_.data(), count_}; }
    io::BlockDevice* find(std::string_view name) const;
    bool has(const io::BlockDevice& disk) const { return std::ranges::find(all(), &disk) != all().end(); }
    /// "xvda, hda" for messages; only the first names and the total if there are many; "none" if there are none.
    FixedText<256> names() const;

  private:
    std::array<io::BlockDevice*, capacity> disks_{};
    usize count_ = 0;
};

/// Number of null disks [drivers.null] that the command line needs, 0 to 256: one more than the highest N among the
/// names nullN.
u32 null_disks(std::span<const std::string_view> names);

/// Prints the `disk` record and its human-readable line.
void report(const io::BlockDevice& disk);

} // namespace fl::boot
