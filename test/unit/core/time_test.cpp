#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.time;

namespace {
using namespace fl;

constexpr Nanoseconds ms = 1'000'000;
constexpr Nanoseconds s = 1'000'000'000;
constexpr Nanoseconds step = MachineTime::longest_step;

TEST(MachineTimeTest, CountsTheClockAsLongAsItIsRead) {
    MachineTime time;
    EXPECT_EQ(time.read(7 * s), 7 * s) << "the first reading follows nothing";
    Instant clock = 7 * s;
    for (int i = 0; i < 1000; ++i) {
        clock += step; // as late as possible
        ASSERT_EQ(time.read(clock), clock);
    }
    EXPECT_EQ(time.stopped(), 0u);
    EXPECT_EQ(time.resumed_at(), 0u);
}

TEST(MachineTimeTest, AStopCountsAsOneStep) {
    MachineTime time;
    static_cast<void>(time.read(1 * s));
    EXPECT_EQ(time.read(8 * s), 1 * s + step);
    EXPECT_EQ(time.stopped(), 7 * s - step);
    EXPECT_EQ(time.resumed_at(), 1 * s + step);
    EXPECT_EQ(time.read(8 * s + 5 * ms), 1 * s + step + 5 * ms) << "and it goes on from there";
    EXPECT_EQ(time.elapsed(2 * s), 2 * s + 7 * s - step) << "what the clock shows then";
    EXPECT_EQ(time.elapsed(never), never);
}

// The other party was stopped as well, however short the stop: it gets its whole time again. Only long stops are
// logged.
TEST(MachineTimeTest, ShortStopsAreCountedAndNotLogged) {
    for (const Nanoseconds length : {101 * ms, 200 * ms, 800 * ms, 1099 * ms, 1100 * ms}) {
        MachineTime time;
        static_cast<void>(time.read(1 * s));
        EXPECT_EQ(time.read(1 * s + length), 1 * s + step);
        EXPECT_EQ(time.resumed_at(), 1 * s + step) << length;
        EXPECT_EQ(time.long_stops(), length - step >= 1 * s ? 1u : 0u) << length;
        EXPECT_EQ(time.last_long_stop(), length - step >= 1 * s ? 1 * s : 0u) << length;
    }
    MachineTime back;
    static_cast<void>(back.read(100 * s));
    EXPECT_EQ(back.read(99 * s + 500 * ms), 100 * s) << "a counter that was restored to half a second ago";
    EXPECT_EQ(back.resumed_at(), 100 * s);
    EXPECT_EQ(back.long_stops(), 0u);
    MachineTime exact;
    static_cast<void>(exact.read(100 * s));
    EXPECT_EQ(exact.read(100 * s - step), 100 * s);
    EXPECT_EQ(exact.read(100 * s), 100 * s + step);
    EXPECT_EQ(exact.resumed_at(), 0u) << "a step that long is none, in neither direction";
}

TEST(MachineTimeTest, ARequestedSleepIsNoStop) {
    MachineTime time;
    static_cast<void>(time.read(1 * s));
    time.rest_until(30 * s);
    EXPECT_EQ(time.read(30 * s + step), 30 * s + step) << "a timer is late as a step is long";
    EXPECT_EQ(time.stopped(), 0u);
    time.rest_until(40 * s);
    EXPECT_EQ(time.read(31 * s), 31 * s) << "woken before";
    EXPECT_EQ(time.read(39 * s), 31 * s + step) << "the rest is over with the first reading";
    time.rest_until(never);
    const Instant before = time.read(39 * s);
    EXPECT_EQ(time.read(100 * s), before + step) << "and so is one for ever";
    time.rest_until(never);
    EXPECT_EQ(time.read(200 * s), before + step + 100 * s);
}

TEST(MachineTimeTest, AStopDuringARest) {
    MachineTime time;
    static_cast<void>(time.read(1 * s));
    time.rest_until(1 * s + 10 * ms);
    EXPECT_EQ(time.read(61 * s), 1 * s + 10 * ms + step);
    EXPECT_EQ(time.resumed_at(), 1 * s + 10 * ms + step);
}

TEST(MachineTimeTest, AClockThatIsSetBack) {
    MachineTime time;
    static_cast<void>(time.read(100 * s));
    EXPECT_EQ(time.read(2 * s), 100 * s) << "a counter reset by the restoration of the machine";
    EXPECT_EQ(time.resumed_at(), 100 * s);
    EXPECT_EQ(time.long_stops(), 1u);
    EXPECT_EQ(time.last_long_stop(), 0u) << "its length is unknown";
    EXPECT_EQ(time.read(2 * s + 3 * ms), 100 * s + 3 * ms);
    EXPECT_EQ(time.elapsed(100 * s + 10 * ms), 2 * s + 10 * ms);
    EXPECT_EQ(time.read(2 * s + 1 * ms), 100 * s + 3 * ms) << "never back, however little";
}

TEST(MachineTimeTest, SpinBound) {
    SpinBound bound(5 * s, 1 * s);
    Instant clock = 5 * s;
    EXPECT_FALSE(bound.passed(clock += 60 * s)) << "stopped between two looks";
    u32 looks = 0;
    while (!bound.passed(clock += 50 * ms)) {
        ++looks;
    }
    EXPECT_EQ(looks, 19u) << "its whole length after the stop";
    SpinBound often(5 * s, 1 * s);
    clock = 5 * s;
    looks = 0;
    while (!often.passed(clock += 60 * s)) {
        ++looks;
    }
    EXPECT_EQ(looks, 19u) << "stopped between all looks: each counts 100 ms, and twice the length is the most";
}

// As when one processor starts another: 100 ms, not reduced by a stop.
TEST(MachineTimeTest, AShortSpinBoundOutlastsAStop) {
    for (const Nanoseconds length : {200 * ms, 1000 * ms}) {
        SpinBound bound(5 * s, 100 * ms);
        EXPECT_FALSE(bound.passed(5 * s + length)) << length;
        EXPECT_FALSE(bound.passed(5 * s + length + 99 * ms)) << length;
        EXPECT_TRUE(bound.passed(5 * s + length + 100 * ms)) << length;
    }
}

} // namespace
