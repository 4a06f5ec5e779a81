module;
#include "core/try.hpp"
module core.elf;
import core.std;
import core.result;

namespace fl::elf {

namespace {

// True if [begin, begin + size) and [other, other + other_size) overlap. Neither may wrap.
constexpr bool overlap(u64 begin, u64 size, u64 other, u64 other_size) {
    return begin < other + other_size && other < begin + size;
}

template <class T>
T copy_out(std::span<const std::byte> file, u64 offset) {
    T value;
    std::memcpy(&value, file.data() + offset, sizeof value);
    return value;
}

Result<FileHeader> file_header(std::span<const std::byte> file) {
    if (file.size() < sizeof(FileHeader)) {
        return Error(Code::corrupt, "ELF: the file is shorter than its header; rebuild it", sizeof(FileHeader),
                     file.size());
    }
    const auto h = copy_out<FileHeader>(file, 0);
    if (h.ident[0] != 0x7f || h.ident[1] != 'E' || h.ident[2] != 'L' || h.ident[3] != 'F') {
        const u64 seen = u64{h.ident[0]} << 24 | u64{h.ident[1]} << 16 | u64{h.ident[2]} << 8 | h.ident[3];
        return Error(Code::corrupt, "ELF: the magic bytes 7f 45 4c 46 are missing; this is not an ELF file", 0x7f454c46,
                     seen);
    }
    if (h.ident[4] != 2) {
        return Error(Code::not_supported, "ELF: the class must be 64-bit; build for x86-64", 2, h.ident[4]);
    }
    if (h.ident[5] != 1) {
        return Error(Code::not_supported, "ELF: the data encoding must be little endian; build for x86-64", 1,
                     h.ident[5]);
    }
    if (h.ident[6] != 1 || h.version != 1) {
        return Error(Code::not_supported, "ELF: the format version must be 1", 1,
                     h.ident[6] != 1 ? u64{h.ident[6]} : h.version);
    }
    if (h.type != type_executable) {
        return Error(Code::not_supported,
                     "ELF: the type must be executable, linked to fixed addresses; link with -static", type_executable,
                     h.type);
    }
    if (h.machine != machine_x86_64) {
        return Error(Code::not_supported, "ELF: the machine must be x86-64", machine_x86_64, h.machine);
    }
    if (h.header_size != sizeof(FileHeader)) {
        return Error(Code::corrupt, "ELF: wrong size of the file header", sizeof(FileHeader), h.header_size);
    }
    if (h.program_entry_size != sizeof(ProgramHeader)) {
        return Error(Code::corrupt, "ELF: wrong size of a program header", sizeof(ProgramHeader), h.program_entry_size);
    }
    return h;
}

Result<Segment> segment_from(const ProgramHeader& p, std::span<const std::byte> file) {
    if (p.file_size > p.memory_size) {
        return Error(Code::corrupt, "ELF: a segment has more bytes in the file than in memory", p.memory_size,
                     p.file_size);
    }
    if (p.file_offset > file.size() || p.file_size > file.size() - p.file_offset) {
        return Error(Code::corrupt, "ELF: a segment ends beyond the file, which is truncated; rebuild it", file.size(),
                     p.file_offset);
    }
    if (p.memory_size > ~p.virtual_address || p.memory_size > ~p.physical_address) {
        return Error(Code::corrupt, "ELF: a segment wraps round the end of the address space", ~u64{0}, p.memory_size);
    }
    if (p.alignment > 1) {
        if (!std::has_single_bit(p.alignment)) {
            return Error(Code::corrupt, "ELF: a segment's alignment must be a power of two", 4096, p.alignment);
        }
        if (((p.virtual_address ^ p.file_offset) & (p.alignment - 1)) != 0) {
            return Error(Code::corrupt, "ELF: a segment's address and file offset differ modulo its alignment",
                         p.virtual_address & (p.alignment - 1), p.file_offset & (p.alignment - 1));
        }
    }
    return Segment{p.virtual_address, p.physical_address, p.memory_size, p.flags,
                   file.subspan(p.file_offset, p.file_size)};
}

} // namespace

Result<Image> Image::parse(std::span<const std::byte> file) {
    TRY(const FileHeader h, file_header(file));
    // 0xffff would mean that the count is stored elsewhere (PN_XNUM): no kernel has so many program headers.
    const u64 table = u64{h.program_count} * sizeof(ProgramHeader);
    if (h.program_offset > file.size() || table > file.size() - h.program_offset) {
        return Error(Code::corrupt,
                     "ELF: the program header table ends beyond the file, which is truncated; rebuild it", file.size(),
                     h.program_offset);
    }
    Image image;
    u64 end = 0;
    image.base_ = ~u64{0};
    image.entry_ = h.entry;
    bool entry_found = false;
    for (u64 i = 0; i < h.program_count; ++i) {
        const auto p = copy_out<ProgramHeader>(file, h.program_offset + i * sizeof(ProgramHeader));
        if (p.type != segment_load || p.memory_size == 0) {
            continue;
        }
        TRY(const Segment s, segment_from(p, file));
        if (image.count_ == max_segments) {
            return Error(Code::not_supported, "ELF: too many loadable segments", max_segments, max_segments + 1);
        }
        for (const Segment& other : image.segments()) {
            if (overlap(s.physical_address, s.memory_size, other.physical_address, other.memory_size)) {
                return Error(Code::corrupt, "ELF: two segments overlap in physical memory",
                             other.physical_address + other.memory_size, s.physical_address);
            }
            if (overlap(s.virtual_address, s.memory_size, other.virtual_address, other.memory_size)) {
                return Error(Code::corrupt, "ELF: two segments overlap in virtual memory",
                             other.virtual_address + other.memory_size, s.virtual_address);
            }
        }
        image.segments_[image.count_++] = s;
        image.base_ = std::min(image.base_, s.physical_address);
        end = std::max(end, s.physical_address + s.memory_size);
        entry_found = entry_found ||
                      (s.executable() && h.entry >= s.virtual_address && h.entry - s.virtual_address < s.bytes.size());
    }
    if (image.count_ == 0) {
        return Error(Code::corrupt, "ELF: there is no loadable segment; link the kernel with its linker script");
    }
    image.size_ = end - image.base_;
    if (!entry_found) {
        return Error(Code::corrupt,
                     "ELF: the entry lies in no executable segment; link the kernel with its linker script",
                     image.segments_[0].virtual_address, h.entry);
    }
    return image;
}

Result<void> Image::require_linear(u64 virtual_base) const {
    for (const Segment& s : segments()) {
        const u64 expected = virtual_base + (s.physical_address - base_);
        if (s.virtual_address != expected) {
            return Error(Code::not_supported,
                         "ELF: a segment is linked elsewhere than its physical address says; check the linker script",
                         expected, s.virtual_address);
        }
    }
    return {};
}

Result<void> Image::load(std::span<std::byte> memory) const {
    if (memory.size() < size_) {
        return Error(Code::bad_argument, "ELF: too little memory to load the image into", size_, memory.size());
    }
    std::memset(memory.data(), 0, memory.size());
    for (const Segment& s : segments()) {
        if (!s.bytes.empty()) {
            std::memcpy(memory.data() + (s.physical_address - base_), s.bytes.data(), s.bytes.size());
        }
    }
    return {};
}

} // namespace fl::elf
