// Data integrity: stamp every block, flush, read back. The stamp format is defined in docs/INTERFACES.md; the host
// checks an image by the same rules.
export module io.verify;
import core.std;
import core.result;
import core.dma;
import io.task;
import io.block;

export namespace fl::io {

/// Identity of a block. The payload (from byte 40 on) is the splitmix64 sequence seeded with mix64(mix64(mix64(seed)
/// + lba) + generation), as little-endian 64-bit words.
struct Stamp {
    static constexpr u64 magic = 0x594649524556'4c46; // the bytes "FLVERIFY"
    static constexpr u32 header_bytes = 40;

    u64 lba = 0; // of the block's first byte, in units of 512 bytes
    u64 generation = 1;
    u64 seed = 1;
};

/// The first mismatching part of a block, in the order of the checks.
enum class Mismatch : u8 { none, magic, lba, generation, seed, size, crc, payload, zeroes };
constexpr std::string_view name(Mismatch mismatch) {
    constexpr std::array<std::string_view, 9> names{"none",       "magic",   "LBA",     "generation", "seed",
                                                    "block size", "CRC-32C", "payload", "zeros"};
    return names[to_underlying(mismatch)];
}
struct BlockCheck {
    Mismatch what = Mismatch::none;
    u64 expected = 0;
    u64 seen = 0;
};

/// Fills a block (its size is bs: a multiple of 8, at least header_bytes).
void write_stamp(std::span<std::byte> block, const Stamp& stamp);
/// Compares a block with the output of write_stamp.
BlockCheck check_stamp(std::span<const std::byte> block, const Stamp& stamp);
/// Compares a block with zeros.
BlockCheck check_zeros(std::span<const std::byte> block);

/// Operations that verify also tries.
struct Erase {
    bool discard = false;
    bool zeroes = false;
    bool secure_discard = false;
    constexpr bool any() const { return discard || zeroes || secure_discard; }
};

/// What becomes of a block after it was written. `number`: of the block on the disk, its first byte divided by the
/// block's size. Of four blocks one is discarded, one zeroed and one securely discarded, as far as they are asked for.
constexpr Op operation_on(u64 number, Erase erase) {
    return erase.discard && number % 4 == 1          ? Op::discard
           : erase.zeroes && number % 4 == 2         ? Op::write_zeroes
           : erase.secure_discard && number % 4 == 3 ? Op::secure_discard
                                                     : Op::write;
}

struct VerifyPlan {
    u32 bs = 4096;     // bytes: a multiple of the sector size, at most 1 MiB
    u32 qd = 8;        // 1 to 256
    u64 count = 0;     // blocks; 0: all from first_lba on
    u64 first_lba = 0; // in units of 512 bytes, aligned to the block size
    u64 seed = 1;
    u64 generation = 1;
    Erase erase;
    bool write = true;    // false: only check what an earlier run wrote
    bool scratch = false; // the disk may be overwritten; required for `write`
};

struct BadBlock {
    u64 lba = 0; // in units of 512 bytes
    BlockCheck check;
};

struct VerifyReport {
    VerifyPlan plan;
    u32 lanes = 1; // lanes of the disk used
    u64 blocks = 0;
    u64 written = 0;   // blocks written successfully
    u64 discarded = 0; // blocks discarded successfully
    u64 zeroed = 0;    // blocks zeroed successfully
    u64 secured = 0;   // blocks securely discarded successfully
    u64 to_erase = 0;  // blocks that should have been discarded, zeroed or securely discarded
    u64 read = 0;      // blocks read successfully
    u64 bad = 0;       // blocks read with wrong contents
    std::array<BadBlock, 8> first_bad{};
    std::optional<Error> first_error; // of a transfer

    constexpr bool ok() const {
        return bad == 0 && !first_error && read == blocks && (!plan.write || written == blocks) &&
               discarded + zeroed + secured == to_erase;
    }
    std::span<const BadBlock> bad_blocks() const { return {first_bad.data(), std::min<usize>(bad, first_bad.size())}; }
};

/// Number of blocks covered by `plan` on such a disk, or the error that verify() would return before its first
/// transfer.
Result<u64> blocks_of(const Geometry& geometry, const VerifyPlan& plan);

/// Writes every block, discards and zeroes some of them (plan.erase), flushes, reads every block back and checks it; or
/// only reads and checks. A discarded block has any contents, and is only read. A disk with several
/// lanes is split into as many regions, processed concurrently, each with plan.qd transfers on its own processor.
/// Error{bad_argument}, before anything is submitted: the plan does not suit the disk, or writes without
/// plan.scratch. Error{exhausted}: no buffers or frames. Bad blocks and failed transfers are reported in the result;
/// a disk that timed out, was removed or violated its protocol ends the run.
Task<Result<VerifyReport>> verify(BlockDevice& disk, VerifyPlan plan, DmaAllocator& dma);

/// Prints the record `verify`, and a line for each of the first bad blocks.
void print_record(const BlockDevice& disk, const VerifyReport& report);

} // namespace fl::io
