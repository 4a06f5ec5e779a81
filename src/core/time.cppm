// Points in time and lengths, as the whole kernel counts them.
export module core.time;
import core.std;

export namespace fl {

/// Nanoseconds since the kernel's entry, monotonic. `never` is later than everything. Two scales, never mixed: elapsed
/// time, which the clock counts and every processor shares, and machine time, which each executor counts for itself
/// (MachineTime).
using Instant = u64;
using Nanoseconds = u64;
inline constexpr Instant never = ~u64{0};

constexpr Instant after(Instant now, Nanoseconds length) { return length >= never - now ? never : now + length; }

/// Time that this machine ran, from readings of a clock that goes on while the machine is stopped (paused by its host,
/// migrated, saved and restored): waits are bounded in it, so that a stop is not taken for the silence of the other
/// side. For the readings of one processor or of one loop, in their order. A step between two readings counts up to
/// longest_step beyond what was asked for; the rest is a stop and does not count. A clock that is set back (a restored
/// counter) makes a stop, too: machine time never goes back.
class MachineTime {
  public:
    static constexpr Nanoseconds longest_step = 100'000'000;
    /// A stop that the other side may have noticed: resumed_at() tells of those.
    static constexpr Nanoseconds long_stop = 1'000'000'000;

    /// Machine time at a reading of the clock.
    constexpr Instant read(Instant elapsed) {
        const Instant latest = after(std::max(last_, rest_until_), longest_step);
        rest_until_ = 0;
        if (elapsed > latest) [[unlikely]] {
            stopped(elapsed - latest, elapsed);
        } else if (elapsed < last_) [[unlikely]] {
            stopped_ -= last_ - elapsed;
            if (last_ - elapsed >= long_stop) {
                resumed_at_ = elapsed - stopped_;
                last_stop_ = 0;
            }
        }
        last_ = elapsed;
        return elapsed - stopped_;
    }
    /// The next reading may come as late as this, by the clock: nothing is to be done before. `never`, too, which is
    /// what a new one begins with.
    constexpr void rest_until(Instant elapsed) { rest_until_ = elapsed; }
    /// When the clock will show this machine time, if the machine is not stopped until then.
    constexpr Instant elapsed(Instant machine) const { return machine == never ? never : machine + stopped_; }
    /// Machine time at the end of the last long stop; 0: there was none.
    constexpr Instant resumed_at() const { return resumed_at_; }
    /// All that did not count; modulo 2^64, when the clock was set back.
    constexpr Nanoseconds stopped() const { return stopped_; }
    /// The length of the last long stop; 0: there was none, or it was one at which the clock was set back.
    constexpr Nanoseconds last_stop() const { return last_stop_; }

  private:
    constexpr void stopped(Nanoseconds length, Instant elapsed) {
        stopped_ += length;
        if (length >= long_stop) {
            resumed_at_ = elapsed - stopped_;
            last_stop_ = length;
        }
    }

    Instant last_ = 0;
    Instant rest_until_ = never;
    Nanoseconds stopped_ = 0; // modulo 2^64, when the clock was set back
    Instant resumed_at_ = 0;
    Nanoseconds last_stop_ = 0;
};

/// The bound of a loop that reads the clock each time round and has no executor. In machine time.
class SpinBound {
  public:
    constexpr SpinBound(Instant elapsed, Nanoseconds length) : end_(after(time_.read(elapsed), length)) {}
    constexpr bool passed(Instant elapsed) { return time_.read(elapsed) >= end_; }

  private:
    MachineTime time_;
    Instant end_;
};

/// Cycles of a constant-rate counter to nanoseconds: ns = (cycles * multiplier) >> 32, exact to 1 part in 2^31, no
/// division in use.
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
        // 64 x 64 -> 96 bits kept, in halves: a freestanding build has no 128-bit division but multiplication is one
        //   instruction.
        return static_cast<Nanoseconds>((static_cast<unsigned __int128>(cycles) * multiplier_) >> 32);
    }
    constexpr u64 frequency_hz() const { return frequency_hz_; }

  private:
    u64 multiplier_ = u64{1} << 32; // 1 GHz until told otherwise
    u64 frequency_hz_ = 1'000'000'000;
};

} // namespace fl
