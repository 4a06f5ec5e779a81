// The guest's memory: one run of bytes from guest physical address 0, held by this process, and the only way anything
// here touches it.
export module vmm.memory;
import core.std;
import core.result;

export namespace fl::vmm {

inline constexpr u64 page_size = 4096;

/// Bytes 0 to size() - 1 of guest physical memory. The guest changes them at any time: what is checked has to be copied
/// out first.
class GuestMemory {
  public:
    /// Where memory ends at the latest: above are PCI's and the VMBus's windows and the interrupt controllers.
    static constexpr u64 max_size = u64{0xc000'0000};

    GuestMemory() = default;
    GuestMemory(GuestMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    GuestMemory& operator=(GuestMemory&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~GuestMemory();

    /// `size`: bytes, a multiple of 4096, 1 MiB to max_size. All zero.
    static Result<GuestMemory> create(u64 size);

    u64 size() const { return bytes_.size(); }
    std::byte* data() const { return bytes_.data(); }

    /// The bytes at [address, address + length), or an empty span when they are not all there (or length is 0).
    std::span<std::byte> at(u64 address, u64 length) const {
        return address <= size() && length <= size() - address ? bytes_.subspan(address, length)
                                                               : std::span<std::byte>{};
    }
    bool read(u64 address, std::span<std::byte> into) const {
        const auto from = at(address, into.size());
        if (from.size() != into.size()) {
            return false;
        }
        if (!from.empty()) { // memcpy takes no nullptr, not even for nothing
            std::memcpy(into.data(), from.data(), from.size());
        }
        return true;
    }
    bool write(u64 address, std::span<const std::byte> from) const {
        const auto into = at(address, from.size());
        if (into.size() != from.size()) {
            return false;
        }
        if (!from.empty()) { // memcpy takes no nullptr, not even for nothing
            std::memcpy(into.data(), from.data(), from.size());
        }
        return true;
    }
    /// Copies a plain value in, or says that there is no memory.
    template <class T>
        requires std::is_trivially_copyable_v<T>
    bool put(u64 address, const T& value) const {
        return write(address, std::as_bytes(std::span{&value, 1}));
    }

  private:
    std::span<std::byte> bytes_{};
};

} // namespace fl::vmm
