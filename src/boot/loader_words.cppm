// Command line words that VMMs and boot loaders add for a Linux guest [Linux-params].
export module boot.loader_words;
import core.std;

export namespace fl::boot {

/// A device described with Linux's parameter virtio_mmio.device=SIZE@ADDRESS:INTERRUPT[:ID].
struct MmioDevice {
    u64 address = 0;   // physical, of the registers
    u64 size = 0;      // bytes
    u32 interrupt = 0; // GSI
    std::optional<u32> id;
    friend bool operator==(const MmioDevice&, const MmioDevice&) = default;
};
/// Sizes and addresses are decimal, 0x hexadecimal, or have a suffix k, m or g. Nothing: malformed, of size 0, or
/// beyond the end of the address space.
std::optional<MmioDevice> parse_mmio_device(std::string_view value);
inline constexpr std::string_view mmio_device_key = "virtio_mmio.device";

/// Whether Linux, or a program started by it, uses this key: it is in the word table, or has the form of a module
/// parameter (module.parameter), which no key of this kernel has.
bool is_loader_word(std::string_view key);

} // namespace fl::boot
