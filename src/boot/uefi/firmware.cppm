// Calls into the firmware, each with its answer checked.
export module boot.uefi.firmware;
import core.std;
import core.result;
import boot.handoff;
import boot.uefi.memory_map;
import boot.uefi.protocol;

export namespace fl::boot::uefi {

inline constexpr u64 four_gib = u64{1} << 32;

/// Whole pages below 4 GiB, zeroed, at a multiple of `alignment` (a power of two, at least 4096). Never given back: the
/// kernel takes all.
Result<std::span<std::byte>> allocate(const BootServices& boot, u64 bytes, u64 alignment, MemoryType type);

/// The firmware's memory map in memory of its own.
class MemoryMap {
  public:
    /// Makes room for the map of now and for some more pieces, since every allocation can add one.
    static Result<MemoryMap> create(const BootServices& boot);
    /// Reads the map anew; allocates nothing.
    Result<void> refresh(const BootServices& boot);
    /// refresh() failed because the map is longer than there was room for.
    bool outgrown() const { return outgrown_; }
    std::span<const std::byte> bytes() const { return storage_.first(size_); }
    u64 stride() const { return stride_; }
    u64 key() const { return key_; }

  private:
    std::span<std::byte> storage_{};
    u64 size_ = 0;
    u64 stride_ = 0;
    u64 key_ = 0;
    bool outgrown_ = false;
};

/// Ends boot services, with `map` as the last map. A first call that fails may have shut drivers down, so after it only
/// the map may be read again [UEFI-2.10 §7.4.6]. Nothing may be printed between.
Result<void> leave_boot_services(const BootServices& boot, Handle handle, MemoryMap& map);

/// The file's first bytes, as many as fit; nothing when there is no such file. The name is absolute, with backslashes.
Result<std::optional<std::span<char>>> read_file(const BootServices& boot, const LoadedImage& image,
                                                 const char16_t* name, std::span<char> into);

/// Physical addresses out of the configuration table; 0: not there.
u64 find_rsdp(const SystemTable& system);
u64 find_smbios(const SystemTable& system);

/// The current mode's framebuffer; base 0: none that can be written directly.
Framebuffer find_framebuffer(const BootServices& boot);

} // namespace fl::boot::uefi
