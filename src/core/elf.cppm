// Parser for ELF64 executables in memory, used by the UEFI loader. Every field is checked before use, and headers are
// copied before they are read, so that the file needs no alignment.
module;
#include <cstddef>
export module core.elf;
import core.std;
import core.result;

export namespace fl::elf {

/// The file header [gABI-4 ch. 4 "ELF Header"]; little endian, 64-bit class.
struct FileHeader {
    std::array<u8, 16> ident; // 0x7f "ELF", class, data encoding, version, OS ABI, ABI version, padding
    u16 type;                 // 2: executable
    u16 machine;              // 62: x86-64
    u32 version;              // 1
    u64 entry;                // virtual address
    u64 program_offset;       // of the program header table, bytes in the file
    u64 section_offset;
    u32 flags;
    u16 header_size; // of this header
    u16 program_entry_size;
    u16 program_count;
    u16 section_entry_size;
    u16 section_count;
    u16 section_names;
};
static_assert(sizeof(FileHeader) == 64);
static_assert(offsetof(FileHeader, ident) == 0 && offsetof(FileHeader, type) == 16 &&
              offsetof(FileHeader, machine) == 18);
static_assert(offsetof(FileHeader, version) == 20 && offsetof(FileHeader, entry) == 24 &&
              offsetof(FileHeader, program_offset) == 32);
static_assert(offsetof(FileHeader, section_offset) == 40 && offsetof(FileHeader, flags) == 48 &&
              offsetof(FileHeader, header_size) == 52);
static_assert(offsetof(FileHeader, program_entry_size) == 54 && offsetof(FileHeader, program_count) == 56);
static_assert(offsetof(FileHeader, section_entry_size) == 58 && offsetof(FileHeader, section_count) == 60);
static_assert(offsetof(FileHeader, section_names) == 62);

/// One entry of the program header table [gABI-4 ch. 5 "Program Header"].
struct ProgramHeader {
    u32 type;        // 1: loadable; other types are skipped
    u32 flags;       // 1 execute, 2 write, 4 read
    u64 file_offset; // bytes
    u64 virtual_address;
    u64 physical_address;
    u64 file_size;   // bytes in the file
    u64 memory_size; // bytes in memory; those beyond file_size are zero
    u64 alignment;   // 0 and 1: none; else a power of two
};
static_assert(sizeof(ProgramHeader) == 56);
static_assert(offsetof(ProgramHeader, type) == 0 && offsetof(ProgramHeader, flags) == 4 &&
              offsetof(ProgramHeader, file_offset) == 8);
static_assert(offsetof(ProgramHeader, virtual_address) == 16 && offsetof(ProgramHeader, physical_address) == 24);
static_assert(offsetof(ProgramHeader, file_size) == 32 && offsetof(ProgramHeader, memory_size) == 40);
static_assert(offsetof(ProgramHeader, alignment) == 48);

inline constexpr u16 type_executable = 2;
inline constexpr u16 machine_x86_64 = 62;
inline constexpr u32 segment_load = 1;
inline constexpr u32 flag_execute = 1;
inline constexpr u32 flag_write = 2;

/// A checked loadable segment: `bytes` is inside the file and not longer than memory_size; neither address range wraps.
struct Segment {
    u64 virtual_address = 0;
    u64 physical_address = 0;
    u64 memory_size = 0; // bytes, never 0
    u32 flags = 0;
    std::span<const std::byte> bytes{}; // refers to the file

    constexpr bool executable() const { return (flags & flag_execute) != 0; }
    constexpr bool writable() const { return (flags & flag_write) != 0; }
};

/// A checked executable. Refers to the bytes that it was parsed from, which must not change.
class Image {
  public:
    static constexpr usize max_segments = 16;

    /// Accepts an x86-64 executable with 1 to max_segments loadable segments that overlap neither in virtual nor in
    /// physical memory, and an entry point in the file-backed part of an executable one. Empty segments are skipped.
    static Result<Image> parse(std::span<const std::byte> file);

    /// Virtual address of the first instruction.
    u64 entry() const { return entry_; }
    std::span<const Segment> segments() const { return {segments_.data(), count_}; }
    /// Lowest physical address of a segment.
    u64 physical_base() const { return base_; }
    /// Bytes from physical_base() to the end of the highest segment.
    u64 physical_size() const { return size_; }

    /// Checks that the image can be mapped with one offset: every segment's virtual address must be virtual_base +
    /// (physical address - physical_base()).
    Result<void> require_linear(u64 virtual_base) const;

    /// Copies the segments to their physical addresses and zeroes the rest. `memory` has physical_size() bytes and
    /// corresponds to physical_base().
    Result<void> load(std::span<std::byte> memory) const;

  private:
    std::array<Segment, max_segments> segments_{};
    usize count_ = 0;
    u64 entry_ = 0;
    u64 base_ = 0;
    u64 size_ = 0;
};

} // namespace fl::elf
