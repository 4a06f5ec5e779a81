// Calls into the firmware; every result is checked.
export module boot.uefi.firmware;
import core.std;
import core.result;
import boot.handoff;
import boot.uefi.memory_map;
import boot.uefi.protocol;

export namespace fl::boot::uefi {

inline constexpr u64 four_gib = u64{1} << 32;

/// Allocates zeroed whole pages below 4 GiB, aligned to `alignment` (a power of two, at least 4096). Never freed: the
/// kernel takes over all memory.
Result<std::span<std::byte>> allocate(const BootServices& boot, u64 bytes, u64 alignment, MemoryType type);

/// The firmware's memory map, in a buffer of its own.
class MemoryMap {
  public:
    /// Allocates room for the current map and some more entries, because every allocation can add one.
    static Result<MemoryMap> create(const BootServices& boot);
    /// Rereads the map; allocates nothing.
    Result<void> refresh(const BootServices& boot);
    /// True: refresh() failed because the map no longer fits the buffer.
    bool too_small() const { return too_small_; }
    std::span<const std::byte> bytes() const { return storage_.first(size_); }
    u64 stride() const { return stride_; }
    u64 key() const { return key_; }

  private:
    std::span<std::byte> storage_{};
    u64 size_ = 0;
    u64 stride_ = 0;
    u64 key_ = 0;
    bool too_small_ = false;
};

/// Exits boot services with `map` as the final map. A first attempt that fails may have shut drivers down; after it
/// only the map may be reread [UEFI-2.10 §7.4.6]. Nothing may be printed in between.
Result<void> leave_boot_services(const BootServices& boot, Handle handle, MemoryMap& map);

/// Reads the start of the file, as much as fits; nothing if there is no such file. `name` is absolute, with
/// backslashes.
Result<std::optional<std::span<char>>> read_file(const BootServices& boot, const LoadedImage& image,
                                                 const char16_t* name, std::span<char> into);

/// Physical addresses from the configuration table; 0: not present.
u64 find_rsdp(const SystemTable& system);
u64 find_smbios(const SystemTable& system);

/// The current mode's framebuffer; base 0: none that is directly writable.
Framebuffer find_framebuffer(const BootServices& boot);

} // namespace fl::boot::uefi
