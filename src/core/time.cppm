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
    /// A stop of this length is worth a line in the log: long_stops() counts those.
    static constexpr Nanoseconds long_stop = 1'000'000'000;

    /// Machine time at a reading of the clock.
    constexpr Instant read(Instant elapsed) {
        const Instant latest = after(std::max(last_, rest_until_), longest_step);
        rest_until_ = 0;
        if (elapsed > latest) [[unlikely]] {
            stopped(elapsed - latest, elapsed);
        } else if (elapsed < last_) [[unlikely]] {
            const Nanoseconds back = last_ - elapsed;
            stopped_ -= back;
            if (back > longest_step) { // less is no restored counter, but one that is not kept exactly
                resumed_at_ = elapsed - stopped_;
            }
            if (back >= long_stop) {
                ++long_stops_;
                last_long_stop_ = 0;
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
    /// Machine time at the end of the last stop, however short; 0: there was none.
    constexpr Instant resumed_at() const { return resumed_at_; }
    /// When a wait of `length` that began at `begun` is over: after a stop it has its whole length anew, and all stops
    /// together make it at most twice as long.
    constexpr Instant end_of_bound(Instant begun, Nanoseconds length) const {
        const Instant end = after(begun, length);
        return resumed_at_ <= begun ? end : std::min(after(resumed_at_, length), after(end, length));
    }
    /// All that did not count; modulo 2^64, when the clock was set back.
    constexpr Nanoseconds stopped() const { return stopped_; }
    /// How many stops were of `long_stop` and more.
    constexpr u32 long_stops() const { return long_stops_; }
    /// The length of the last one of them; 0: there was none, or the clock was set back at it.
    constexpr Nanoseconds last_long_stop() const { return last_long_stop_; }

  private:
    constexpr void stopped(Nanoseconds length, Instant elapsed) {
        stopped_ += length;
        resumed_at_ = elapsed - stopped_;
        if (length >= long_stop) {
            ++long_stops_;
            last_long_stop_ = length;
        }
    }

    Instant last_ = 0;
    Instant rest_until_ = never;
    Nanoseconds stopped_ = 0; // modulo 2^64, when the clock was set back
    Instant resumed_at_ = 0;
    Nanoseconds last_long_stop_ = 0;
    u32 long_stops_ = 0;
};

/// The bound of a loop that reads the clock each time round and has no executor. In machine time; anew after a stop.
class SpinBound {
  public:
    constexpr SpinBound(Instant elapsed, Nanoseconds length) : begun_(time_.read(elapsed)), length_(length) {}
    constexpr bool passed(Instant elapsed) { return time_.read(elapsed) >= time_.end_of_bound(begun_, length_); }

  private:
    MachineTime time_;
    Instant begun_;
    Nanoseconds length_;
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
