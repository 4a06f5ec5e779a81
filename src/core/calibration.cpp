module core.calibration;
import core.std;

namespace fl {

namespace {

constexpr u64 warm_up_us = 12;
constexpr u64 sample_us = 55;
constexpr u64 fewest_ticks = 128; // per sample
// If a tick lasts as long as many readings, the timer's changes are known as sharply as in samples of 55 us otherwise.
constexpr u64 sharp_readings = 8; // per tick, at least; many more are those of a timer that hardly counts
constexpr u64 max_sharp_readings = 128;
constexpr u64 sharp_sample_us = 9;
constexpr u64 sharp_fewest_ticks = 32;
constexpr u32 enough = 5;       // agreeing samples, if they are a third of all
constexpr u32 min_agreeing = 3; // agreeing samples, if they are more than half and no more can be taken
constexpr u32 max_samples = 24;
// Limit of all readings together, for a timer that counts, but too slowly for a result.
constexpr u32 max_readings = 65'536;
// Two rates agree if they differ by less than one part in this many, plus the uncertainty of their readings.
constexpr u64 agreement = 128;

struct Sample {
    u64 ticks = 0;
    u64 cycles = 0;
    bool disturbed = false;
    u64 rate = 0;  // Hz
    u64 slack = 0; // Hz: other rates agree within this distance
};

class Measurement {
  public:
    explicit Measurement(const ReferenceTimer& timer) : timer_(timer) {}

    /// Waits for the timer's first change. False: it does not change.
    bool begin() {
        TimerReading first;
        if (!read(first)) {
            return false;
        }
        for (u32 unchanged = 0; unchanged < timer_.max_unchanged; ++unchanged) {
            if (!read(last_)) {
                return false;
            }
            if (((last_.value ^ first.value) & timer_.mask) != 0) {
                return true;
            }
        }
        return false;
    }

    /// A sample from the last reading used to one at least `wanted` ticks later. Nothing: the timer has stopped, or the
    /// limit of readings is reached.
    std::optional<Sample> next(u64 wanted) {
        const TimerReading first = last_;
        TimerReading reading = first;
        Sample sample;
        for (u32 unchanged = 0; unchanged < timer_.max_unchanged;) {
            const u32 before = reading.value;
            if (!read(reading)) {
                return std::nullopt;
            }
            const u32 step = (reading.value - before) & timer_.mask;
            if (step == 0) {
                ++unchanged;
                continue;
            }
            unchanged = 0;
            // it went back, or wrapped around more often than can be detected
            sample.disturbed = sample.disturbed || step > timer_.mask / 2;
            sample.ticks += step;
            const u64 took = reading.after - reading.before;
            best_slack_ = std::min(best_slack_, took);
            // If a reading was interrupted, it is unknown when its value was read.
            if (sample.ticks < wanted || (took > 4 * best_slack_ + 64 && sample.ticks < 2 * wanted)) {
                continue;
            }
            last_ = reading;
            const u64 from = first.before + (first.after - first.before) / 2;
            const u64 to = reading.before + took / 2;
            sample.cycles = to - from;
            // The machine was stopped, or restored from a snapshot.
            constexpr u64 max_cycles = u64{1} << 30;
            sample.disturbed =
                sample.disturbed || sample.ticks > 4 * wanted || sample.cycles == 0 || sample.cycles > max_cycles;
            if (!sample.disturbed) {
                // The time of a timer change is known to within the length of a reading or, if readings take longer
                // than its ticks, to within a tick; at both ends.
                const u64 open = 2 * std::min(2 * best_slack_, sample.cycles / sample.ticks);
                sample.rate = sample.cycles * timer_.hz / sample.ticks;
                sample.slack = sample.rate / agreement + open * timer_.hz / sample.ticks;
            }
            return sample;
        }
        return std::nullopt;
    }

    u64 best_slack() const { return best_slack_; }
    u32 readings() const { return readings_; }

  private:
    bool read(TimerReading& into) {
        if (readings_ == max_readings) {
            return false;
        }
        ++readings_;
        into = timer_.read(timer_.context);
        return true;
    }

    const ReferenceTimer& timer_;
    TimerReading last_;
    u64 best_slack_ = ~u64{0} / 8; // cycles per reading
    u32 readings_ = 0;
};

// The largest group of samples that agree with one of them, combined into one long sample.
Calibration largest_group(std::span<const Sample> samples, u64 timer_hz) {
    Calibration best;
    for (const Sample& middle : samples) {
        u32 count = 0;
        u64 cycles = 0;
        u64 ticks = 0;
        for (const Sample& other : samples) {
            const u64 distance = other.rate > middle.rate ? other.rate - middle.rate : middle.rate - other.rate;
            if (distance <= middle.slack) {
                ++count;
                cycles += other.cycles;
                ticks += other.ticks;
            }
        }
        if (count > best.agreeing) {
            best = {.hz = cycles * timer_hz / ticks, .agreeing = count};
        }
    }
    return best;
}

} // namespace

Calibration calibrate(const ReferenceTimer& timer) {
    Measurement measurement(timer);
    std::array<Sample, max_samples> samples;
    usize kept = 0;
    u32 taken = 0;
    Calibration result;
    if (const auto first = measurement.begin() ? measurement.next(timer.hz * warm_up_us / 1'000'000) : std::nullopt) {
        const u64 tick = first->ticks == 0 ? 0 : first->cycles / first->ticks;
        const bool sharp = tick >= sharp_readings * measurement.best_slack() &&
                           tick <= max_sharp_readings * std::max<u64>(measurement.best_slack(), 1);
        // Slow readings need longer samples, within a bound: the uncertainty of a reading is about half its length.
        const u64 shortest = sharp ? std::max(timer.hz * sharp_sample_us / 1'000'000, sharp_fewest_ticks)
                                   : std::max(timer.hz * sample_us / 1'000'000, fewest_ticks);
        const u64 cycles = first->ticks == 0 ? 0 : shortest * first->cycles / first->ticks;
        const u64 wanted =
            cycles == 0 ? shortest : shortest * std::clamp<u64>(16 * measurement.best_slack() / cycles, 1, 16);
        while (taken < max_samples && (result.agreeing < enough || result.agreeing * 3 < taken)) {
            const auto sample = measurement.next(wanted);
            if (!sample) {
                break;
            }
            ++taken;
            if (!sample->disturbed) {
                samples[kept++] = *sample;
                result = largest_group(std::span(samples).first(kept), timer.hz);
            }
        }
    }
    const bool good = (result.agreeing >= enough && result.agreeing * 3 >= taken) ||
                      (result.agreeing >= min_agreeing && result.agreeing * 2 > taken);
    if (!good) {
        result = {};
    }
    result.samples = taken;
    result.readings = measurement.readings();
    return result;
}

} // namespace fl
