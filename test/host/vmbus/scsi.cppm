// The device side of a SCSI disk: command descriptor blocks in, data and sense out. Independent of VMBus. [SPC-4],
// [SBC-3]
export module host.scsi;
import host.std;
export import host.platform;
export import host.faults;
export import host.transfers;

export namespace fl::host {

struct LunConfig {
    u8 lun = 0;
    BlockStore* store = nullptr; // outlives the LUN
    u32 block_size = 512;        // 512 or 4096; the store's size is a multiple
    std::string serial = "FL0";
    bool write_cache = true;
    bool thin = true; // UNMAP is offered
    u32 iops = 0;     // reads, writes, flushes and UNMAPs completed per second, one after the other; 0: unlimited
};

/// A command's data buffer in the guest: pieces, in order. Resolved before the command runs, so that every byte is
/// accessible.
class DataBuffer {
  public:
    void clear() { pieces_.clear(), bytes_ = 0; }
    void add(std::span<std::byte> piece) {
        if (!pieces_.empty() && pieces_.back().data() + pieces_.back().size() == piece.data()) {
            pieces_.back() = std::span(pieces_.back().data(), pieces_.back().size() + piece.size());
        } else {
            pieces_.push_back(piece);
        }
        bytes_ += piece.size();
    }
    usize size() const { return bytes_; }
    /// Limits the buffer to its first `bytes` bytes.
    void truncate(usize bytes);
    std::span<const std::span<std::byte>> pieces() const { return pieces_; }
    /// Copies as much as fits; returns the number of bytes.
    usize put(std::span<const std::byte> bytes);
    usize get(std::span<std::byte> into) const;

  private:
    std::vector<std::span<std::byte>> pieces_;
    usize bytes_ = 0;
};

enum class ScsiStatus : u8 { good = 0, check_condition = 2, busy = 8 };

struct Sense {
    u8 key = 0;
    u8 asc = 0;
    u8 ascq = 0;
    std::optional<u32> information; // the LBA
    /// Fixed format, 18 bytes [SPC-4 §4.5.3].
    std::array<u8, 18> bytes() const;
};

struct ScsiResult {
    ScsiStatus status = ScsiStatus::good;
    usize transferred = 0;
    std::optional<Sense> sense;
    bool overrun = false; // the command asks for more data than the buffer can hold
};

/// INQUIRY to a LUN without a logical unit: peripheral qualifier 3 [SPC-4 §6.4.2].
ScsiResult absent_inquiry(std::span<const u8, 16> cdb, DataBuffer& data);
/// REPORT LUNS [SPC-4 §6.33].
ScsiResult report_luns(std::span<const u8> luns, DataBuffer& data);
/// Opcodes that StorVSP handles itself.
inline constexpr u8 opcode_inquiry = 0x12;
inline constexpr u8 opcode_report_luns = 0xa0;
/// Whether a command accesses the medium; LunConfig::iops limits these.
constexpr bool reaches_medium(u8 opcode) {
    // READ, WRITE, SYNCHRONIZE CACHE, UNMAP
    constexpr std::array<u8, 9> commands{0x08, 0x0a, 0x28, 0x2a, 0x88, 0x8a, 0x35, 0x91, 0x42};
    return std::ranges::find(commands, opcode) != commands.end();
}

/// The result of a transfer that has failed.
ScsiResult medium_failure(const Transfer& transfer, u32 block_size);

/// One logical unit.
class ScsiDisk {
  public:
    ScsiDisk(const LunConfig& config, u32 maximum_transfer, Counters& counters, FaultPlan& faults)
        : config_(config), maximum_transfer_(maximum_transfer), counters_(counters), faults_(faults) {}
    const LunConfig& config() const { return config_; }
    u64 blocks() const { return config_.store->size() / config_.block_size; }
    /// With `later`, reads, writes and flushes only describe what is to be done there; its kind is `none` if nothing
    /// is. The result is then that of a transfer that ends well; otherwise it is medium_failure().
    ScsiResult execute(std::span<const u8, 16> cdb, DataBuffer& data, Transfer* later = nullptr);
    /// The next command other than INQUIRY, REPORT LUNS and REQUEST SENSE ends with this unit attention (power on,
    /// reset, changed capacity).
    void set_unit_attention(u8 asc, u8 ascq) { attention_ = Sense{6, asc, ascq, {}}; }

  private:
    ScsiResult inquiry(std::span<const u8, 16> cdb, DataBuffer& data) const;
    ScsiResult read_capacity(bool sixteen, DataBuffer& data, usize allocation) const;
    ScsiResult read_write(bool write, u64 lba, u64 count, bool force, DataBuffer& data, Transfer* later);
    ScsiResult mode_sense(std::span<const u8, 16> cdb, DataBuffer& data, bool ten) const;
    ScsiResult unmap(DataBuffer& data);
    ScsiResult flush(Transfer* later);
    bool inside(u64 lba, u64 count) const { return lba <= blocks() && count <= blocks() - lba; }
    LunConfig config_;
    u32 maximum_transfer_;
    Counters& counters_;
    FaultPlan& faults_;
    std::optional<Sense> attention_;
};

} // namespace fl::host
