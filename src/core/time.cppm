// Time points and durations.
export module core.time;
import core.std;

export namespace fl {

/// Nanoseconds since the kernel's entry, monotonic. `never` is later than any other value. There are two scales that
/// must not be mixed: elapsed time, which the clock counts and all processors share, and machine time, which each
/// executor counts for itself (MachineTime).
using Instant = u64;
using Nanoseconds = u64;
inline constexpr Instant never = ~u64{0};

constexpr Instant after(Instant now, Nanoseconds length) { return length >= never - now ? never : now + length; }

/// Machine time: time during which this machine ran, derived from readings of a clock that continues while the machine
/// is stopped (paused by its host, migrated, saved and restored). Bounds of waits are in machine time, so that a stop
/// does not look like an unresponsive device. Use one object per processor or loop, with readings in order. Of the gap
/// between two readings, up to longest_step beyond the requested rest counts; the remainder is a stop and does not
/// count. A clock that is set back (a restored counter) also counts as a stop: machine time never decreases.
class MachineTime {
  public:
    static constexpr Nanoseconds longest_step = 100'000'000;
    /// Minimum length of a stop that is worth logging, in nanoseconds; long_stops() counts them.
    static constexpr Nanoseconds long_stop = 1'000'000'000;

    /// Machine time for a reading of the clock.
    constexpr Instant read(Instant elapsed) {
        const Instant latest = after(std::max(last_, rest_until_), longest_step);
        rest_until_ = 0;
        if (elapsed > latest) [[unlikely]] {
            stopped(elapsed - latest, elapsed);
        } else if (elapsed < last_) [[unlikely]] {
            const Nanoseconds back = last_ - elapsed;
            stopped_ -= back;
            if (back > longest_step) { // smaller steps back are clock inaccuracy, not a restored counter
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
    /// The next reading may be as late as this (elapsed time) without being taken for a stop: there is nothing to do
    /// before. `never` is permitted, and is the initial value.
    constexpr void rest_until(Instant elapsed) { rest_until_ = elapsed; }
    /// Elapsed time at which this machine time will be reached, if the machine is not stopped before.
    constexpr Instant elapsed(Instant machine) const { return machine == never ? never : machine + stopped_; }
    /// Machine time at the end of the last stop of any length; 0: none.
    constexpr Instant resumed_at() const { return resumed_at_; }
    /// End of a wait of `length` that began at `begun`: a stop restarts the whole length, but all stops together at
    /// most double it.
    constexpr Instant end_of_bound(Instant begun, Nanoseconds length) const {
        const Instant end = after(begun, length);
        return resumed_at_ <= begun ? end : std::min(after(resumed_at_, length), after(end, length));
    }
    /// Total time that did not count; modulo 2^64 if the clock was set back.
    constexpr Nanoseconds stopped() const { return stopped_; }
    /// Number of stops of at least `long_stop`.
    constexpr u32 long_stops() const { return long_stops_; }
    /// Length of the last of them; 0: none, or the clock was set back.
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
    Nanoseconds stopped_ = 0; // modulo 2^64 if the clock was set back
    Instant resumed_at_ = 0;
    Nanoseconds last_long_stop_ = 0;
    u32 long_stops_ = 0;
};

/// Bound for a loop that polls the clock and has no executor. In machine time; restarted by a stop.
class SpinBound {
  public:
    constexpr SpinBound(Instant elapsed, Nanoseconds length) : begun_(time_.read(elapsed)), length_(length) {}
    constexpr bool passed(Instant elapsed) { return time_.read(elapsed) >= time_.end_of_bound(begun_, length_); }

  private:
    MachineTime time_;
    Instant begun_;
    Nanoseconds length_;
};

/// Converts cycles of a constant-rate counter to nanoseconds: ns = (cycles * multiplier) >> 32, exact to 1 part in
/// 2^31, without a division per conversion.
class CycleScale {
  public:
    constexpr CycleScale() = default;
    /// `frequency_hz` must not be 0.
    constexpr explicit CycleScale(u64 frequency_hz) : frequency_hz_(frequency_hz) {
        // floor(10^9 * 2^32 / f) in two steps, so that no intermediate value exceeds 64 bits for any f >= 1 Hz.
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
        // One 64 x 64 -> 128-bit multiplication; a freestanding build has no 128-bit division.
        return static_cast<Nanoseconds>((static_cast<unsigned __int128>(cycles) * multiplier_) >> 32);
    }
    constexpr u64 frequency_hz() const { return frequency_hz_; }

  private:
    u64 multiplier_ = u64{1} << 32; // 1 GHz by default
    u64 frequency_hz_ = 1'000'000'000;
};

} // namespace fl
