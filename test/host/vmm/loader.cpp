module;
#include "core/try.hpp"
module vmm.loader;
import host.std;
import core.result;
import core.elf;
import vmm.memory;

namespace fl::vmm {
namespace {

// Addresses in low memory that do not conflict with anything below.
constexpr u64 descriptor_table = 0x500;
constexpr u64 start_info = 0x6000;
constexpr u64 module_list = 0x6100;
constexpr u64 pvh_memory_map = 0x6200;
constexpr u64 zero_page = 0x7000;
constexpr u64 page_tables = 0x9000; // six pages
constexpr u64 command_line_at = 0x2'0000;
constexpr u64 command_line_room = 0x1'0000;
constexpr u64 one_mebibyte = 0x10'0000;

constexpr u32 elf_note_segment = 4;
constexpr u32 note_entry = 18; // XEN_ELFNOTE_PHYS32_ENTRY [PVH]
constexpr u32 start_magic = 0x336e'c578;

template <class T>
Result<T> value_at(std::span<const std::byte> file, u64 offset) {
    if (offset > file.size() || sizeof(T) > file.size() - offset) {
        return Error{Code::bad_argument, "the kernel's file ends too early", offset + sizeof(T), file.size()};
    }
    T value{};
    std::memcpy(&value, file.data() + offset, sizeof(T));
    return value;
}

/// The entry in a segment of notes: name size, descriptor size, type, each 32 bits; name and descriptor padded to 4
/// [gABI-4 ch. 5 "Note Section"].
Result<u64> entry_of_notes(std::span<const std::byte> notes) {
    u64 at = 0;
    while (at + 12 <= notes.size()) {
        TRY(const u32 name_size, value_at<u32>(notes, at));
        TRY(const u32 size, value_at<u32>(notes, at + 4));
        TRY(const u32 type, value_at<u32>(notes, at + 8));
        const u64 descriptor = at + 12 + ((u64{name_size} + 3) & ~u64{3});
        const u64 next = descriptor + ((u64{size} + 3) & ~u64{3});
        if (next > notes.size()) {
            break;
        }
        if (type == note_entry && name_size == 4 && std::memcmp(notes.data() + at + 12, "Xen", 4) == 0) {
            if (size == 4) {
                TRY(const u32 entry, value_at<u32>(notes, descriptor));
                return entry;
            }
            if (size == 8) {
                return value_at<u64>(notes, descriptor);
            }
        }
        at = next;
    }
    return Error{Code::not_found, "no entry in this segment"};
}

Result<u64> pvh_entry(std::span<const std::byte> file) {
    TRY(const elf::FileHeader header, value_at<elf::FileHeader>(file, 0));
    for (u32 i = 0; i < header.program_count; ++i) {
        TRY(const elf::ProgramHeader program,
            value_at<elf::ProgramHeader>(file, header.program_offset + u64{i} * sizeof(elf::ProgramHeader)));
        if (program.type == elf_note_segment && program.file_offset <= file.size() &&
            program.file_size <= file.size() - program.file_offset) {
            if (const auto found = entry_of_notes(file.subspan(program.file_offset, program.file_size))) {
                return *found;
            }
        }
    }
    return Error{Code::bad_argument, "the ELF has no PVH entry: a note of owner Xen and type 18 was expected"};
}

/// Places the module at the end of memory, in whole pages, and above `lowest`: away from where a kernel unpacks itself.
Result<u64> place_module(const GuestMemory& memory, std::span<const std::byte> module, u64 lowest) {
    if (module.empty()) {
        return u64{0};
    }
    const u64 whole = (module.size() + page_size - 1) & ~(page_size - 1);
    if (lowest > memory.size() || whole > memory.size() - lowest) {
        return Error{Code::bad_argument, "the module or initrd does not fit after the kernel: more --memory is needed",
                     memory.size(), lowest + whole};
    }
    const u64 at = memory.size() - whole;
    memory.write(at, module);
    return at;
}

Result<void> place_command_line(const GuestMemory& memory, std::string_view text, u64 limit) {
    if (text.size() >= limit) {
        return Error{Code::bad_argument, "the command line is too long", limit - 1, text.size()};
    }
    memory.write(command_line_at, std::as_bytes(std::span{text}));
    memory.put<u8>(command_line_at + text.size(), 0);
    return {};
}

} // namespace

std::array<MemoryRange, 3> memory_map(const GuestMemory& memory) {
    return {{{0, low_memory_end, 1},
             {low_memory_end, one_mebibyte - low_memory_end, 2},
             {one_mebibyte, memory.size() - one_mebibyte, 1}}};
}

bool is_elf(std::span<const std::byte> file) {
    return file.size() >= 4 && std::memcmp(file.data(),
                                           "\x7f"
                                           "ELF",
                                           4) == 0;
}

bool is_bzimage(std::span<const std::byte> file) {
    return file.size() >= 0x206 && std::memcmp(file.data() + 0x202, "HdrS", 4) == 0;
}

Result<Entry> load_pvh(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload) {
    TRY(const elf::Image image, elf::Image::parse(file));
    TRY(const u64 entry, pvh_entry(file));
    const u64 base = image.physical_base();
    const auto target = memory.at(base, image.physical_size());
    if (base < one_mebibyte || target.empty()) {
        return Error{Code::bad_argument, "the kernel does not fit between 1 MiB and the end of memory", memory.size(),
                     base + image.physical_size()};
    }
    if (entry < base || entry >= base + image.physical_size() || entry > 0xffff'ffff) {
        return Error{Code::bad_argument, "the PVH entry lies outside the image", base, entry};
    }
    CHECK(image.load(target));
    CHECK(place_command_line(memory, payload.command_line, command_line_room));
    TRY(const u64 module, place_module(memory, payload.module, base + image.physical_size()));
    // hvm_start_info, version 1, then one hvm_modlist_entry, then the hvm_memmap_table_entries, by offset as in the
    // header [PVH].
    memory.put<u32>(start_info, start_magic);
    memory.put<u32>(start_info + 4, 1);
    memory.put<u32>(start_info + 12, payload.module.empty() ? 0 : 1);
    memory.put<u64>(start_info + 16, payload.module.empty() ? 0 : module_list);
    memory.put<u64>(start_info + 24, command_line_at);
    memory.put<u64>(start_info + 32, payload.rsdp);
    const auto map = memory_map(memory);
    memory.put<u64>(start_info + 40, pvh_memory_map);
    memory.put<u32>(start_info + 48, static_cast<u32>(map.size()));
    memory.put<u64>(module_list, module);
    memory.put<u64>(module_list + 8, payload.module.size());
    for (u64 i = 0; i < map.size(); ++i) {
        memory.put<u64>(pvh_memory_map + 24 * i, map[i].address);
        memory.put<u64>(pvh_memory_map + 24 * i + 8, map[i].size);
        memory.put<u32>(pvh_memory_map + 24 * i + 16, map[i].type);
    }
    return Entry{.mode = Entry::Mode::protected32, .address = entry, .argument = start_info};
}

Result<Entry> load_bzimage(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload) {
    if (!is_bzimage(file)) {
        return Error{Code::bad_argument, "a bzImage has HdrS at 0x202"};
    }
    // Offsets in the file are those in the zero page [Linux-boot, "The Real-Mode Kernel Header"].
    TRY(const u16 version, value_at<u16>(file, 0x206));
    TRY(const u16 load_flags, value_at<u16>(file, 0x236)); // xloadflags
    if (version < 0x020c || (load_flags & 1) == 0) {
        return Error{Code::bad_argument, "a bzImage of protocol 2.12 with a 64-bit entry was expected", 0x020c,
                     version};
    }
    TRY(const u8 setup_sectors, value_at<u8>(file, 0x1f1));
    TRY(const u64 preferred, value_at<u64>(file, 0x258));
    TRY(const u32 init_size, value_at<u32>(file, 0x260));
    TRY(const u8 header_jump, value_at<u8>(file, 0x201));
    TRY(const u32 command_line_size, value_at<u32>(file, 0x238));
    const u64 setup_size = (u64{setup_sectors == 0 ? u8{4} : setup_sectors} + 1) * 512;
    const u64 header_end = 0x202 + header_jump;
    if (setup_size >= file.size() || header_end > setup_size) {
        return Error{Code::bad_argument, "the bzImage ends within its setup part", setup_size, file.size()};
    }
    const u64 needed = std::max<u64>(init_size, file.size() - setup_size);
    if (preferred < one_mebibyte || memory.at(preferred, needed).empty()) {
        return Error{Code::bad_argument, "the kernel does not fit into memory: more --memory is needed", memory.size(),
                     preferred + needed};
    }
    memory.write(preferred, file.subspan(setup_size));
    CHECK(
        place_command_line(memory, payload.command_line, std::min<u64>(command_line_room, u64{command_line_size} + 1)));
    TRY(const u64 initrd, place_module(memory, payload.module, preferred + needed));
    memory.write(zero_page + 0x1f1, file.subspan(0x1f1, header_end - 0x1f1));
    memory.put<u8>(zero_page + 0x210, 0xff); // loader type: none of the registered ones
    memory.put<u32>(zero_page + 0x218, static_cast<u32>(initrd));
    memory.put<u32>(zero_page + 0x21c, static_cast<u32>(payload.module.size()));
    memory.put<u32>(zero_page + 0x228, static_cast<u32>(command_line_at));
    memory.put<u64>(zero_page + 0x070, payload.rsdp);
    const auto map = memory_map(memory);
    memory.put<u8>(zero_page + 0x1e8, static_cast<u8>(map.size()));
    for (u64 i = 0; i < map.size(); ++i) { // 20 bytes each, packed
        memory.put<u64>(zero_page + 0x2d0 + 20 * i, map[i].address);
        memory.put<u64>(zero_page + 0x2d0 + 20 * i + 8, map[i].size);
        memory.put<u32>(zero_page + 0x2d0 + 20 * i + 16, map[i].type);
    }
    // A level 4 table, a table with four entries, and four tables with 512 pages of 2 MiB: an identity map of the first
    // 4 GiB.
    memory.put<u64>(page_tables, (page_tables + page_size) | 3);
    for (u64 i = 0; i < 4; ++i) {
        memory.put<u64>(page_tables + page_size + 8 * i, (page_tables + (2 + i) * page_size) | 3);
    }
    for (u64 i = 0; i < 2048; ++i) {
        memory.put<u64>(page_tables + 2 * page_size + 8 * i, i << 21 | 0x83);
    }
    memory.put<u64>(descriptor_table + 0x10, 0x00af'9a00'0000'ffff); // code, 64-bit
    memory.put<u64>(descriptor_table + 0x18, 0x00cf'9200'0000'ffff); // data
    return Entry{
        .mode = Entry::Mode::long64,
        .address = preferred + 0x200,
        .argument = zero_page,
        .page_table = page_tables,
        .descriptors = descriptor_table,
    };
}

} // namespace fl::vmm
