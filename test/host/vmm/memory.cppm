// The guest's memory: one contiguous range from guest physical address 0, mapped in this process. All accesses go
// through this module.
export module vmm.memory;
import core.std;
import core.result;

export namespace fl::vmm {

inline constexpr u64 page_size = 4096;

/// Bytes 0 to size() - 1 of guest physical memory. The guest may change them at any time: data must be copied out
/// before it is checked.
class GuestMemory {
  public:
    /// Upper limit of the size: the windows of PCI and VMBus and the interrupt controllers are above.
    static constexpr u64 max_size = u64{0xc000'0000};

    GuestMemory() = default;
    GuestMemory(GuestMemory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    GuestMemory& operator=(GuestMemory&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~GuestMemory();

    /// `size`: bytes, a multiple of 4096, 1 MiB to max_size. The memory is zeroed.
    static Result<GuestMemory> create(u64 size);

    u64 size() const { return bytes_.size(); }
    std::byte* data() const { return bytes_.data(); }

    /// The bytes at [address, address + length), or an empty span if not all of them are memory, or length is 0.
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
    /// Copies a value in. False: no memory there.
    template <class T>
        requires std::is_trivially_copyable_v<T>
    bool put(u64 address, const T& value) const {
        return write(address, std::as_bytes(std::span{&value, 1}));
    }

  private:
    std::span<std::byte> bytes_{};
};

} // namespace fl::vmm
