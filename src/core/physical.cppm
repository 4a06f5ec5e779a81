// Physical memory as the firmware table parsers read it: through the direct map in the kernel, an array in tests.
export module core.physical;
import core.std;

export namespace fl {

/// Reads physical memory.
class PhysicalReader {
  public:
    /// Copies into.size() bytes from physical `address`. Returns false, with `into` unspecified, if any of them cannot
    /// be read. Never faults.
    virtual bool read(u64 address, std::span<std::byte> into) = 0;

    /// A trivially copyable value at `address`, of any alignment.
    template <class T>
        requires std::is_trivially_copyable_v<T>
    std::optional<T> value(u64 address) {
        T result{};
        if (!read(address, std::as_writable_bytes(std::span<T, 1>(&result, 1)))) {
            return std::nullopt;
        }
        return result;
    }

  protected:
    ~PhysicalReader() = default;
};

} // namespace fl
