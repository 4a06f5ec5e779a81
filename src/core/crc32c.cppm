// CRC-32C (Castagnoli), the checksum of the verify stamp.
export module core.crc32c;
import core.std;

export namespace fl {

/// CRC-32C of `data`, continuing from `before` (the value of what came in front, 0 for nothing): reflected, polynomial
/// 0x1edc6f41, initial and final value inverted [rfc3720 §12.1]. Uses the processor's instruction where CPUID offers it
/// (asked once).
u32 crc32c(std::span<const std::byte> data, u32 before = 0);

namespace crc32c_detail {
/// The two ways behind it, for tests; the second one only where has_instruction().
u32 by_table(std::span<const std::byte> data, u32 before);
u32 by_instruction(std::span<const std::byte> data, u32 before);
bool has_instruction();
} // namespace crc32c_detail

} // namespace fl
