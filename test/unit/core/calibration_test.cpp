// The time stamp counter against model timers: the effect of a disturbed sample, a wrapping timer, a stopped timer and
// a pause of the machine.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.time;
import core.calibration;

namespace {
using namespace fl;

constexpr u64 pm_hz = 3'579'545;
constexpr u64 pit_hz = 1'193'182;

/// A machine with a counter and a timer. Each reading takes time.
struct Model {
    double tsc_hz = 2.4e9;
    double timer_hz = pm_hz;
    u64 mask = 0xffffff;
    double reading = 1e-6; // seconds per reading
    u64 first_value = 0;
    bool counts = true;
    std::function<void(Model&)> disturb; // before each reading
    // seconds between the timer's value and the second reading of the counter, for one reading
    double late = 0;

    double time = 1.0;
    double timer_time = 0; // time counted by the timer
    double extra_cycles = 0;
    u32 readings = 0;

    void pass(double seconds) {
        time += seconds;
        timer_time += seconds;
    }
    u64 tsc() const { return static_cast<u64>(time * tsc_hz + extra_cycles); }
    TimerReading read() {
        ++readings;
        if (disturb) {
            disturb(*this);
        }
        TimerReading r;
        r.before = tsc();
        pass(reading / 2);
        r.value = counts ? static_cast<u32>((first_value + static_cast<u64>(timer_time * timer_hz)) & mask)
                         : static_cast<u32>(mask);
        pass(reading / 2 + std::exchange(late, 0));
        r.after = tsc();
        return r;
    }
    Calibration run(u32 max_unchanged = 400) {
        return calibrate({.hz = static_cast<u64>(timer_hz),
                          .mask = static_cast<u32>(mask),
                          .max_unchanged = max_unchanged,
                          .context = this,
                          .read = [](void* m) { return static_cast<Model*>(m)->read(); }});
    }
};

void expect_within(const Calibration& found, double hz, double parts_per_million) {
    EXPECT_NEAR(static_cast<double>(found.hz), hz, hz * parts_per_million / 1e6)
        << found.agreeing << " of " << found.samples;
}

TEST(Calibration, FiveSamplesOfAQuietMachineInAThirdOfAMillisecond) {
    Model m;
    m.reading = 50e-9; // edges are detected
    const double begin = m.time;
    const Calibration found = m.run();
    expect_within(found, 2.4e9, 400);
    EXPECT_EQ(found.samples, 5u);
    EXPECT_EQ(found.agreeing, 5u);
    EXPECT_GT(m.time - begin, 275e-6);
    EXPECT_LT(m.time - begin, 300e-6);
    EXPECT_EQ(found.readings, m.readings);
}

TEST(Calibration, ShortSamplesWhereAReadingTakesAFractionOfATick) {
    for (const bool pit : {false, true}) {
        Model m;
        m.timer_hz = pit ? pit_hz : pm_hz;
        m.reading = 20e-9;
        const double begin = m.time;
        const Calibration found = m.run();
        expect_within(found, 2.4e9, 400);
        EXPECT_EQ(found.agreeing, 5u);
        EXPECT_LT(m.time - begin, pit ? 160e-6 : 65e-6);
    }
}

TEST(Calibration, ReadingsThatExitAreLessSharpAndStillGood) {
    for (const double reading : {1e-6, 5e-6, 50e-6}) {
        Model m;
        m.reading = reading;
        const Calibration found = m.run();
        expect_within(found, 2.4e9, 2000);
        EXPECT_GE(found.agreeing, 5u) << reading;
        EXPECT_LT(m.time, 1.0 + 20e-3) << reading;
    }
}

TEST(Calibration, ColdCodeSpoilsOnlyWhatIsNotCounted) {
    Model m;
    m.reading = 50e-9;
    // Binary translation: the first readings take microseconds after the value has been read.
    m.disturb = [](Model& self) {
        if (self.readings <= 40 || self.readings == 200) {
            self.late = 4e-6;
        }
    };
    expect_within(m.run(), 2.4e9, 1200); // 4 of 300 us would be 13,000
}

TEST(Calibration, TheTimersWrap) {
    for (const u64 mask : {u64{0xffff}, u64{0xffffff}, u64{0xffffffff}}) {
        Model m;
        m.timer_hz = mask == 0xffff ? pit_hz : pm_hz;
        m.mask = mask;
        m.first_value = mask - 300; // wraps after about the second sample
        const Calibration found = m.run();
        expect_within(found, 2.4e9, 2500);
        EXPECT_EQ(found.agreeing, found.samples);
    }
}

TEST(Calibration, SamplesAcrossAMachineStopAreLeftOut) {
    // The counter advances and the timer does not (a paused virtual machine); then vice versa (the counter was set
    // back).
    for (const double cycles : {2.4e9 * 7, 2.4e9 * 50e-6, -2.4e9 * 30e-6}) {
        Model m;
        m.reading = 50e-9;
        m.disturb = [cycles](Model& self) {
            if (self.readings == 1600 || self.readings == 3600) { // in the second sample and in the fourth
                self.extra_cycles += cycles;
            }
        };
        const Calibration found = m.run();
        expect_within(found, 2.4e9, 300);
        EXPECT_EQ(found.agreeing, 5u);
        EXPECT_GT(found.samples, 5u);
    }
}

TEST(Calibration, APauseInWhichBothRunOn) { // SIGSTOP of the monitor: also longer than the timer's range
    for (const double seconds : {1e-3, 0.060, 7.0}) {
        for (const bool pit : {false, true}) {
            Model m;
            m.timer_hz = pit ? pit_hz : pm_hz;
            m.mask = pit ? 0xffff : 0xffffff;
            m.reading = 1e-6;
            m.disturb = [seconds](Model& self) {
                if (self.readings == 150) {
                    self.pass(seconds);
                }
            };
            expect_within(m.run(), 2.4e9, 2500);
        }
    }
}

TEST(Calibration, AStoppedTimerCostsABoundedNumberOfReadings) {
    Model absent;
    absent.counts = false; // an unassigned port: all ones
    absent.reading = 50e-6;
    const Calibration found = absent.run(200);
    EXPECT_EQ(found.hz, 0u);
    EXPECT_LE(absent.readings, 201u);
    EXPECT_LE(absent.time, 1.0 + 11e-3);

    Model stops; // stops after it has started
    stops.disturb = [](Model& self) { self.counts = self.readings < 100; };
    EXPECT_EQ(stops.run(200).hz, 0u);
    EXPECT_LE(stops.readings, 302u);
}

TEST(Calibration, ATimerThatHardlyMovesIsGivenUp) {
    Model m;
    m.timer_hz = pm_hz;
    m.timer_time = 1.0;
    m.disturb = [](Model& self) { self.timer_time -= 0.999e-6; }; // one tick in 279 readings
    EXPECT_EQ(m.run().hz, 0u);
    EXPECT_LE(m.readings, 65'536u);
}

TEST(Calibration, NoiseThatAgreesWithNothingIsNoResult) {
    Model m;
    u32 random = 1;
    m.disturb = [&random](Model& self) {
        random = random * 1664525 + 1013904223;
        if (self.readings % 30 == 0) {
            self.extra_cycles += static_cast<double>(random >> 8) / 10; // up to 700 us, once or twice in each sample
        }
    };
    const Calibration found = m.run();
    EXPECT_LE(found.samples, 24u);
    EXPECT_EQ(found.hz, 0u);
}

TEST(Timeline, ACorrectionNeverGoesBack) {
    Timeline fast(1000, 1'000'000'000); // assumed; actually 2.5 GHz, so time runs 2.5 times too fast
    EXPECT_EQ(fast.at(1000), 0u);
    EXPECT_EQ(fast.at(1000 + 2'500'000), 2'500'000u);
    fast.correct(1000 + 2'500'000, 2'500'000'000);
    EXPECT_EQ(fast.at(1000 + 2'500'000), 2'500'000u) << "goes on from where it was";
    EXPECT_NEAR(static_cast<double>(fast.ahead()), 1'500'000, 1) << "a millisecond has passed since the entry";
    EXPECT_NEAR(static_cast<double>(fast.at(1000 + 5'000'000)), 3'500'000, 1);
    EXPECT_EQ(fast.hz(), 2'500'000'000u);

    Timeline slow(1000, 2'000'000'000); // actually 1 GHz
    slow.correct(1000 + 1'000'000, 1'000'000'000);
    EXPECT_EQ(slow.at(1000 + 1'000'000), 1'000'000u) << "set forward to the true time";
    EXPECT_EQ(slow.ahead(), 0u);
    EXPECT_EQ(slow.at(1000 + 3'000'000), 3'000'000u);

    // A second correction is also relative to the entry.
    fast.correct(1000 + 10'000'000, 2'500'000'000);
    EXPECT_NEAR(static_cast<double>(fast.at(1000 + 10'000'000)), 5'500'000, 2);
    EXPECT_NEAR(static_cast<double>(fast.ahead()), 1'500'000, 2);
}

} // namespace
