// Numbers and structures of network packets: big-endian, without alignment or padding. And the checksum of the Internet
// protocols.
export module io.net.wire;
import core.std;

export namespace fl::io::net {

/// A big-endian number of a packet [rfc791 appendix B].
template <class T>
struct Big {
    std::array<u8, sizeof(T)> bytes{};

    constexpr Big() = default;
    constexpr Big(T value) {
        for (usize i = sizeof(T); i-- > 0; value = static_cast<T>(u64{value} >> 8)) {
            bytes[i] = static_cast<u8>(value);
        }
    }
    constexpr operator T() const {
        u64 value = 0;
        for (u8 byte : bytes) {
            value = value << 8 | byte;
        }
        return static_cast<T>(value);
    }
};
using Big16 = Big<u16>;
using Big32 = Big<u32>;
using Big64 = Big<u64>;

/// A structure made of bytes and of Big numbers, as it is in a packet.
template <class W>
concept Wire = std::is_trivially_copyable_v<W> && alignof(W) == 1;

/// The structure at the beginning of `from`, which has at least sizeof(W) bytes.
template <Wire W>
constexpr W take(std::span<const std::byte> from) {
    std::array<std::byte, sizeof(W)> bytes{};
    std::copy_n(from.begin(), sizeof(W), bytes.begin());
    return std::bit_cast<W>(bytes);
}
/// Writes the structure to the beginning of `into`, which has at least sizeof(W) bytes.
template <Wire W>
constexpr void put(std::span<std::byte> into, const W& value) {
    const auto bytes = std::bit_cast<std::array<std::byte, sizeof(W)>>(value);
    std::copy_n(bytes.begin(), sizeof(W), into.begin());
}

/// The sum of 16-bit words with end-around carry [rfc1071]. Sums little-endian words, eight bytes at a time, which only
/// exchanges the bytes of the result.
class InternetSum {
  public:
    /// All but the last piece have an even number of bytes.
    constexpr void add(std::span<const std::byte> piece) {
        std::array<std::byte, 8> word{};
        for (; piece.size() >= word.size(); piece = piece.subspan(word.size())) {
            std::copy_n(piece.begin(), word.size(), word.begin());
            add_number(std::bit_cast<u64>(word));
        }
        word = {};
        std::copy_n(piece.begin(), piece.size(), word.begin());
        add_number(std::bit_cast<u64>(word));
    }
    /// Adds a number of a packet.
    constexpr void add(u16 number) { add_number(static_cast<u64>(number >> 8 | (number & 0xff) << 8)); }
    /// The sum in the packet's order: 0xffff for a packet whose checksum is right.
    constexpr u16 sum() const {
        u64 s = (sum_ >> 32) + (sum_ & 0xffffffff);
        s = (s >> 32) + (s & 0xffffffff);
        s = (s >> 16) + (s & 0xffff);
        s = (s >> 16) + (s & 0xffff);
        return static_cast<u16>((s >> 8 & 0xff) | (s & 0xff) << 8);
    }
    /// The value of a checksum field that was zero in the sum.
    constexpr u16 checksum() const { return static_cast<u16>(~sum()); }

  private:
    constexpr void add_number(u64 number) {
        sum_ += number;
        sum_ += sum_ < number ? 1 : 0;
    }
    u64 sum_ = 0;
};

} // namespace fl::io::net
