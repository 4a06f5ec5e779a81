// The commands of a disk's I/O, independent of the transport: which command forms a unit supports, their CDBs, and
// the meaning of a command's end for its request. The transport (an io::BlockTransport) puts the CDB into its packet
// and reports how the command ended.
//
// Fast path: limit(), build_io() and moved_all(), which are inline. An answer with status GOOD and all data moved
// needs no judge().
export module drivers.scsi.commands;
import core.std;
import core.result;
import core.text;
import io.block;
import io.block_queue;
export import drivers.scsi.protocol;

export namespace fl::drivers::scsi {

/// Limits of one command to a unit, and its form.
struct UnitLimits {
    u32 max_transfer = 0;        // bytes per READ or WRITE; a multiple of the block size
    u32 max_unmap_blocks = 0;    // per UNMAP
    u32 max_zero_blocks = 0;     // per WRITE SAME
    bool short_commands = false; // READ(10) and WRITE(10) from the start; else after (16) was refused
    bool write_through = false;  // WRITE with FUA
};

/// A transport's per-command state (part of its BlockTransport::Wire).
struct CommandForm {
    bool short_cdb = false; // sent as a 10-byte command that has a longer form
};

/// Direction of a command's data.
enum class DataPhase : u8 { none, in, out };

/// Meaning of a command's end for its request.
struct Verdict {
    io::Status status = io::Status::ok;
    io::Retry retry = io::Retry::none;
    bool rescan = false; // the target's units, or their sizes, have changed: they must be rescanned
};

/// True: an answer with status GOOD completed the whole command.
constexpr bool moved_all(const io::QueuedCommand& command, u32 moved) {
    return moved == command.bytes || command.op > io::Op::write;
}

/// A logical unit, as used by one queue: supported command forms, and the number of errors reported. For use on the
/// queue's processor only.
class LogicalUnit {
  public:
    static constexpr u32 max_reported_errors = 8;

    /// `geometry`: block size of 512 to 4096 bytes.
    LogicalUnit(const UnitLimits& limits, const io::Geometry& geometry);

    /// Reduces command.bytes to what one command to the unit can do. Refused: the unit has refused such a command
    /// before, and is not asked again. Inline: for BlockTransport::prepare().
    inline io::Fit limit(io::QueuedCommand& command) const {
        if (command.op <= io::Op::write) [[likely]] {
            command.bytes = std::min(command.bytes, limits_.max_transfer);
            return io::Fit::ok;
        }
        return limit_other(command);
    }

    /// Whether build_io() makes it a READ(10) or WRITE(10).
    inline bool is_short(const io::QueuedCommand& command) const { return io_10_ && reaches_10(command); }
    inline u32 blocks_of(const io::QueuedCommand& command) const { return command.bytes >> block_shift_; }

    /// Builds the CDB of a read or write in place; `cdb` must be zeroed. Returns its length in bytes.
    inline u8 build_io(std::span<u8, cdb_bytes> cdb, const io::QueuedCommand& command, CommandForm& form) const {
        const bool write = command.op == io::Op::write;
        form.short_cdb = is_short(command);
        if (form.short_cdb) [[unlikely]] {
            build_io_10(cdb, command);
            return 10;
        }
        // READ(16) and WRITE(16) [SBC-3 §5.15, §5.38]: the LBA in bytes 2 to 9, the count in 10 to 13.
        cdb[0] = write ? 0x8a : 0x88;
        cdb[1] = write ? write_flags_ : 0;
        const u64 lba_be = __builtin_bswap64(command.lba);
        const u32 blocks_be = __builtin_bswap32(command.bytes >> block_shift_);
        __builtin_memcpy(cdb.data() + 2, &lba_be, 8);
        __builtin_memcpy(cdb.data() + 10, &blocks_be, 4);
        return 16;
    }

    /// Builds the CDB of a flush, discard or write zeroes. Returns its length in bytes.
    u8 build_other(std::span<u8, cdb_bytes> cdb, const io::QueuedCommand& command, CommandForm& form) const;
    /// The data-out of such a command: for a discard build_unmap_list(), for write zeroes as many zeros.
    u32 parameter_bytes(io::Op op) const {
        return op == io::Op::discard ? unmap_list_bytes : op == io::Op::write_zeroes ? 1u << block_shift_ : 0;
    }
    void build_unmap_list(std::span<u8, unmap_list_bytes> list, const io::QueuedCommand& command) const {
        unmap_list(list, command.lba, command.bytes >> block_shift_);
    }

    /// Interprets the response to a command. The command has requests (BlockQueue has not abandoned it), and `form`
    /// is the one it was built with. Errors are logged with `name`, at most max_reported_errors. Retries are bounded
    /// by command.retries.
    Verdict judge(const io::QueuedCommand& command, CommandForm form, const Response& response, std::string_view name);

  private:
    io::Fit limit_other(io::QueuedCommand& command) const;
    /// READ(10) and WRITE(10) have 32 bits for the LBA.
    static constexpr bool reaches_10(const io::QueuedCommand& command) { return command.lba >> 32 == 0; }
    void build_io_10(std::span<u8, cdb_bytes> cdb, const io::QueuedCommand& command) const;
    bool refuses(io::Op op, const Sense& sense);
    bool try_other_form(const io::QueuedCommand& command, CommandForm form);
    void report(std::string_view name, Opcode opcode, std::string_view what);
    void report_attention(std::string_view name, const Sense& sense);

    UnitLimits limits_;
    u32 block_shift_;
    u8 write_flags_;               // byte 1 of WRITE
    bool fits_10_;                 // READ(10) and WRITE(10) can transfer as much as the limits allow
    bool io_10_;                   // and are used, for the LBAs that they reach
    bool flush_16_ = false;        // SYNCHRONIZE CACHE(16) is used
    bool discard_refused_ = false; // the unit has refused UNMAP
    bool zeroes_refused_ = false;  // or WRITE SAME
    bool absence_reported_ = false;
    u32 errors_reported_ = 0;
    u32 attentions_reported_ = 0;
};

/// Bytes of zeros that a transport keeps for WRITE SAME: one block of the largest size.
inline constexpr u32 zeros_bytes = 4096;

/// Data direction of an operation.
constexpr DataPhase data_phase(io::Op op) {
    return op == io::Op::read ? DataPhase::in : op == io::Op::flush ? DataPhase::none : DataPhase::out;
}

} // namespace fl::drivers::scsi
