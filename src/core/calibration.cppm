// Measures the frequency of the time stamp counter against a reference timer, and converts the counter to time.
// Portable: timers are read through a callback (I/O ports in core.machine.clock, models in tests).
export module core.calibration;
import core.std;
import core.time;

export namespace fl {

/// One reading of the reference timer, with the time stamp counter just before and just after it.
struct TimerReading {
    u32 value = 0;
    u64 before = 0;
    u64 after = 0;
};

/// A timer that counts up at a known rate and wraps around.
struct ReferenceTimer {
    u64 hz = 0;
    u32 mask = ~u32{0};      // implemented bits
    u32 max_unchanged = 400; // unchanged readings after which the timer is considered stopped or absent
    void* context = nullptr;
    TimerReading (*read)(void* context) = nullptr;
};

/// Result of calibrate().
struct Calibration {
    u64 hz = 0;       // frequency of the time stamp counter; 0: could not be measured
    u32 agreeing = 0; // samples that the result is based on
    u32 samples = 0;  // samples taken
    u32 readings = 0;
};

/// Takes samples of about 55 us, or 9 us of a timer that is read far faster than it ticks, until five of them agree and
/// make up a third of all, and returns the rate over those.
/// The first sample is discarded: it pays for cold caches and, on an emulator, for translation. A sample during which
/// the machine was stopped agrees with no other. Bounded by the number of readings, since no clock exists yet: a timer
/// that does not count costs `max_unchanged` of them. Returns 0 if samples do not agree.
Calibration calibrate(const ReferenceTimer& timer);

/// Converts the time stamp counter to nanoseconds since the kernel's entry.
class Timeline {
  public:
    constexpr Timeline() = default;
    constexpr Timeline(u64 entry_tsc, u64 hz) : entry_(entry_tsc), base_tsc_(entry_tsc), scale_(hz) {}

    constexpr Instant at(u64 tsc) const { return base_ + scale_.ns(tsc - base_tsc_); }
    constexpr u64 hz() const { return scale_.frequency_hz(); }
    /// Changes the frequency from `tsc` on. Instants never decrease: a clock that was fast continues from its current
    /// value and is then ahead() of the true time since entry; one that was slow is set forward.
    constexpr void correct(u64 tsc, u64 hz) {
        const CycleScale better(hz);
        const Instant before = at(tsc);
        const Instant right = better.ns(tsc - entry_);
        base_ = std::max(before, right);
        ahead_ = base_ - right;
        base_tsc_ = tsc;
        scale_ = better;
    }
    constexpr Nanoseconds ahead() const { return ahead_; }

  private:
    u64 entry_ = 0;
    u64 base_tsc_ = 0;
    Instant base_ = 0;
    Nanoseconds ahead_ = 0;
    CycleScale scale_;
};

} // namespace fl
