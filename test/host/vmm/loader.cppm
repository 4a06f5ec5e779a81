// Puts a guest's kernel into memory: an ELF with a PVH entry, or Linux's bzImage. What the file says is checked before
// it is used.
export module vmm.loader;
import core.std;
import core.result;
import vmm.memory;

export namespace fl::vmm {

/// What goes with the kernel. The spans stay valid during the call only.
struct Payload {
    std::string_view command_line{};
    std::span<const std::byte> module{}; // PVH: the only module; Linux: the initrd. Empty: none
    u64 rsdp = 0;
};

/// How the first processor starts.
struct Entry {
    enum class Mode : u8 {
        protected32, // PVH: 32-bit flat segments, no paging, EBX = argument [PVH]
        long64,      // Linux: identity-mapped 4 GiB, RSI = argument [Linux-boot, "64-bit boot protocol"]
    };
    Mode mode = Mode::protected32;
    u64 address = 0;
    u64 argument = 0;
    u64 page_table = 0;  // long64: CR3
    u64 descriptors = 0; // long64: the descriptor table, with Linux's code segment 0x10 and data segment 0x18
};

/// A run of the memory map, E820 types: 1 usable, 2 reserved.
struct MemoryRange {
    u64 address;
    u64 size; // bytes
    u32 type;
};
/// Below 1 MiB only the first part is usable; the rest of it holds the tables.
inline constexpr u64 low_memory_end = 0x9fc00;
std::array<MemoryRange, 3> memory_map(const GuestMemory& memory);

/// Whether the file is one (by its magic); everything else is left to load_*().
bool is_elf(std::span<const std::byte> file);
bool is_bzimage(std::span<const std::byte> file);

/// An ELF64 for x86-64 with the note XEN_ELFNOTE_PHYS32_ENTRY; segments go to their physical addresses, which lie
/// between 1 MiB and the end of memory. Error{bad_argument}: it is not one, or has no room.
Result<Entry> load_pvh(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload);

/// A bzImage of protocol 2.12 or later with a 64-bit entry. Errors as above.
Result<Entry> load_bzimage(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload);

} // namespace fl::vmm
