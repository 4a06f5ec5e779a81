// The fuzzer's input, consumed from the front; zeroes after its end. Include after the imports.
#pragma once

namespace fuzz {
using namespace fl;

class Input {
  public:
    Input(const unsigned char* data, std::size_t size) : rest_(data, size) {}
    bool empty() const { return rest_.empty(); }
    u8 byte() {
        const u8 value = rest_.empty() ? u8{0} : rest_.front();
        rest_ = rest_.subspan(rest_.empty() ? 0 : 1);
        return value;
    }
    u32 word() {
        const u32 low = byte();
        const u32 second = byte();
        const u32 third = byte();
        return low | second << 8 | third << 16 | u32{byte()} << 24;
    }
    /// At most `most` bytes, fewer at the end of the input.
    std::span<const std::byte> take(usize most) {
        const usize n = std::min(most, rest_.size());
        const auto bytes = std::as_bytes(rest_.first(n));
        rest_ = rest_.subspan(n);
        return bytes;
    }

  private:
    std::span<const unsigned char> rest_;
};

/// Aborts if a condition that must always hold does not.
inline void require(bool so) {
    if (!so) {
        __builtin_trap();
    }
}

} // namespace fuzz
