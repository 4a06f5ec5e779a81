// Physical memory as the parsers of firmware tables see it: in the kernel through the direct map, in tests an array of
// golden bytes.
export module core.physical;
import core.std;

export namespace fl {

class PhysicalReader {
  public:
    /// Copies the bytes from `address` on into `into`; false, with `into` in any state, when not all of them can be
    /// read. Never faults.
    virtual bool read(u64 address, std::span<std::byte> into) = 0;

    /// A trivially copyable value from `address`, which need not be aligned.
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
