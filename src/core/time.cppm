// Points in time and lengths, as the whole kernel counts them.
export module core.time;
import core.std;

export namespace fl {

/// Nanoseconds since the kernel's entry, monotonic. `never` is later than everything.
using Instant = u64;
using Nanoseconds = u64;
inline constexpr Instant never = ~u64{0};

constexpr Instant after(Instant now, Nanoseconds length) { return length >= never - now ? never : now + length; }

/// Cycles of a constant-rate counter to nanoseconds: ns = (cycles * multiplier) >> 32, exact to 1 part in 2^31, no division in use.
class CycleScale {
  public:
    constexpr CycleScale() = default;
    /// frequency_hz > 0.
    constexpr explicit CycleScale(u64 frequency_hz) : frequency_hz_(frequency_hz) {
        // floor(10^9 * 2^32 / f) in two steps, so that nothing leaves 64 bits for any f from 1 Hz on.
        const u64 whole = 1'000'000'000u / frequency_hz;
        u64 rest = 1'000'000'000u % frequency_hz;
        u64 fraction = 0;
        for (int bit = 0; bit < 32; ++bit) {
            rest <<= 1;
            fraction <<= 1;
            if (rest >= frequency_hz) {
                rest -= frequency_hz;
                fraction |= 1;
            }
        }
        multiplier_ = (whole << 32) | fraction;
    }
    constexpr Nanoseconds ns(u64 cycles) const {
        // 64 x 64 -> 96 bits kept, in halves: a freestanding build has no 128-bit division but multiplication is one instruction.
        return static_cast<Nanoseconds>((static_cast<unsigned __int128>(cycles) * multiplier_) >> 32);
    }
    constexpr u64 frequency_hz() const { return frequency_hz_; }

  private:
    u64 multiplier_ = u64{1} << 32; // 1 GHz until told otherwise
    u64 frequency_hz_ = 1'000'000'000;
};

} // namespace fl
