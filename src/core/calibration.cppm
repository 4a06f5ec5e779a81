// How fast the time stamp counter counts, measured against a timer whose frequency is known, and the time that is made
// of it. Portable: the machine's timers are ports (core.machine.clock), a test's are models.
export module core.calibration;
import core.std;
import core.time;

export namespace fl {

/// One look at a timer, and the time stamp counter just before and just after it.
struct TimerReading {
    u32 value = 0;
    u64 before = 0;
    u64 after = 0;
};

/// A timer that counts up at a known rate and wraps.
struct ReferenceTimer {
    u64 hz = 0;
    u32 mask = ~u32{0};   // of the bits that count
    u32 most_still = 400; // readings without a change before it is taken to stand still, or not to be there
    void* context = nullptr;
    TimerReading (*read)(void* context) = nullptr;
};

struct Calibration {
    u64 hz = 0;       // of the time stamp counter; 0: it could not be measured
    u32 agreeing = 0; // samples that it is made of
    u32 samples = 0;  // that were taken
    u32 readings = 0;
};

/// Takes samples of about 55 us until five agree and are a third of all, and gives the rate over all of those. The
/// first one is not counted: it pays for cold caches, and on an emulator for translation. A sample across which the
/// machine stood still agrees with no other. Bounded in readings, since no clock exists yet: a timer that does not move
/// costs `most_still` of them. Samples that do not agree give 0.
Calibration calibrate(const ReferenceTimer& timer);

/// Nanoseconds since the kernel's entry, of the time stamp counter.
class Timeline {
  public:
    constexpr Timeline() = default;
    constexpr Timeline(u64 entry_tsc, u64 hz) : entry_(entry_tsc), base_tsc_(entry_tsc), scale_(hz) {}

    constexpr Instant at(u64 tsc) const { return base_ + scale_.ns(tsc - base_tsc_); }
    constexpr u64 hz() const { return scale_.frequency_hz(); }
    /// From `tsc` on at another frequency. Instants never go back: a clock that was fast goes on from where it was, and
    /// is then ahead() of the true time since the entry; one that was slow is set forward.
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
