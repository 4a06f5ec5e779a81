// Loads a guest's kernel into memory: an ELF with a PVH entry, or Linux's bzImage. All values in the file are checked
// before use.
export module vmm.loader;
import core.std;
import core.result;
import vmm.memory;

export namespace fl::vmm {

/// Data passed to the kernel. The spans need to be valid during the call only.
struct Payload {
    std::string_view command_line{};
    std::span<const std::byte> module{}; // PVH: the only module; Linux: the initrd. Empty: none
    u64 rsdp = 0;
};

/// Initial state of the first processor.
struct Entry {
    enum class Mode : u8 {
        protected32, // PVH: 32-bit flat segments, no paging, EBX = argument [PVH]
        long64,      // Linux: identity-mapped 4 GiB, RSI = argument [Linux-boot, "64-bit boot protocol"]
    };
    Mode mode = Mode::protected32;
    u64 address = 0;
    u64 argument = 0;
    u64 page_table = 0;  // long64: CR3
    u64 descriptors = 0; // long64: the GDT, with Linux's code segment 0x10 and data segment 0x18
};

/// A range of the memory map. `type` as in E820: 1 usable, 2 reserved.
struct MemoryRange {
    u64 address;
    u64 size; // bytes
    u32 type;
};
/// End of usable memory below 1 MiB; the tables are above it.
inline constexpr u64 low_memory_end = 0x9fc00;
std::array<MemoryRange, 3> memory_map(const GuestMemory& memory);

/// Whether the file has that format's magic number; load_*() checks the rest.
bool is_elf(std::span<const std::byte> file);
bool is_bzimage(std::span<const std::byte> file);

/// An ELF64 for x86-64 with the note XEN_ELFNOTE_PHYS32_ENTRY; segments are loaded at their physical addresses, which
/// must be between 1 MiB and the end of memory. Error{bad_argument}: not such a file, or it does not fit.
Result<Entry> load_pvh(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload);

/// A bzImage of protocol 2.12 or later with a 64-bit entry. Errors as above.
Result<Entry> load_bzimage(const GuestMemory& memory, std::span<const std::byte> file, const Payload& payload);

} // namespace fl::vmm
