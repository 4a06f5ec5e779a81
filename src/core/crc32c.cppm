// CRC-32C (Castagnoli), the checksum of the data verification stamp.
export module core.crc32c;
import core.std;

export namespace fl {

/// CRC-32C of `data`, continued from `before` (the CRC of the preceding bytes; 0 if there are none): reflected,
/// polynomial 0x1edc6f41, initial and final value inverted [rfc3720 §12.1]. Uses the SSE4.2 instruction if CPUID
/// reports it (checked once).
u32 crc32c(std::span<const std::byte> data, u32 before = 0);

/// The same by tables, of 8 KiB. For a few bytes in code that runs soon after an exit: KVM on a processor without
/// hardware virtualisation (PVM) emulates the instructions that follow one, and its emulator lacks crc32.
u32 crc32c_by_table(std::span<const std::byte> data, u32 before = 0);

namespace crc32c_detail {
/// Requires has_instruction().
u32 by_instruction(std::span<const std::byte> data, u32 before);
bool has_instruction();
} // namespace crc32c_detail

} // namespace fl
