#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import io.task;
import io.executor;
import io.block;
import io.oldest_wait;
#include "unit/io_support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using Finding = OldestWait::Finding;

constexpr Nanoseconds ms = 1'000'000;
constexpr Nanoseconds timeout = 5'000 * ms;

/// A device that takes `each` for a request, `depth` of them under way all the time, looked at every 10 ms.
struct Device : testing::Test {
    fl::test::FakeMachine machine{.step = 0};
    Executor executor{machine.platform()};
    OldestWait wait;
    u64 first = 1; // the oldest one
    u64 last = 0;
    u64 answered = 0;

    struct Ticks final : Service {
        bool drain() override { return false; }
    } ticks;
    Device() { executor.add(ticks); }
    ~Device() override { executor.remove(ticks); }

    Finding tick() {
        executor.turn(); // sleeps until the next tick
        return wait.look(executor, {last < first ? 0 : first, last + 1 - first, answered}, timeout);
    }
    /// How long until something is found; never: nothing within `bound`.
    Nanoseconds found_after(Nanoseconds bound, Finding& finding) {
        const Instant begun = machine.time;
        while (machine.time - begun < bound) {
            finding = tick();
            if (finding != Finding::none) {
                return machine.time - begun;
            }
        }
        return never;
    }
};

TEST_F(Device, SlowOnesAreNeverFound) {
    for (const u64 depth : {1u, 2u, 32u, 128u}) {
        first = last + 1;
        last += depth;
        for (u32 n = 0; n < 300; ++n) { // 250 ms each
            for (u32 i = 0; i < 25; ++i) {
                ASSERT_EQ(tick(), Finding::none) << "depth " << depth << ", request " << n;
            }
            ++first; // answered, and one more is asked for
            ++last;
            ++answered;
        }
    }
}

TEST_F(Device, AsSlowAsTheTimeOutAllows) {
    last = 32;
    for (u32 n = 0; n < 32; ++n) { // nothing is issued behind them: the last one is answered after 32 time-outs
        for (Nanoseconds t = 0; t < timeout - 20 * ms; t += 10 * ms) {
            ASSERT_EQ(tick(), Finding::none) << n;
        }
        ++first;
        ++answered;
    }
}

TEST_F(Device, ASilentOneIsFoundAfterOneTimeOut) {
    for (const u64 depth : {1u, 32u}) {
        first = last + 1;
        last += depth;
        Finding finding = Finding::none;
        const Nanoseconds after = found_after(60'000 * ms, finding);
        EXPECT_EQ(finding, Finding::silent);
        EXPECT_GE(after, timeout - 10 * ms);
        EXPECT_LE(after, timeout + 20 * ms) << "depth " << depth;
    }
}

// Answers to others do not make up for one that never comes; how many others there are says how long that may take.
TEST_F(Device, ALostOneIsFound) {
    for (const Nanoseconds each : {10 * ms, 250 * ms}) {
        first = last + 1;
        last += 32; // the first one is lost
        const u64 passes = OldestWait::patience * 32;
        const Nanoseconds explained = passes * each; // so long a fair device may be busy with others
        Finding finding = Finding::none;
        Nanoseconds waited = 0;
        while (finding == Finding::none && waited < 600'000 * ms) {
            finding = tick();
            waited += 10 * ms;
            if (waited % each == 0) {
                ++answered;
                ++last;
            }
        }
        EXPECT_EQ(finding, Finding::lost);
        EXPECT_GE(waited, std::max(timeout, explained));
        EXPECT_LE(waited, std::max(timeout, explained) + 30 * ms);
    }
}

TEST_F(Device, TheOthersEndAndTheLostOneStays) {
    last = 2; // 1 is lost, 2 is answered after 4 s, and nothing more is asked for
    for (u32 i = 0; i < 400; ++i) {
        ASSERT_EQ(tick(), Finding::none);
    }
    ++answered;
    Finding finding = Finding::none;
    const Nanoseconds after = found_after(60'000 * ms, finding);
    EXPECT_EQ(finding, Finding::silent);
    EXPECT_LE(after, timeout + 20 * ms) << "since the last answer";
}

TEST_F(Device, EachOfSeveralLostOnesHasItsTime) {
    last = 3;
    for (u32 i = 0; i < 3; ++i) {
        Finding finding = Finding::none;
        const Nanoseconds after = found_after(60'000 * ms, finding);
        EXPECT_EQ(finding, Finding::silent);
        EXPECT_GE(after, timeout - 10 * ms);
        EXPECT_LE(after, timeout + 20 * ms);
        EXPECT_EQ(tick(), Finding::silent) << "until its driver has ended it";
        ++first;
    }
    EXPECT_EQ(tick(), Finding::none) << "nothing is left";
}

TEST_F(Device, AnIdleTimeIsNoSilence) {
    for (u32 i = 0; i < 1000; ++i) {
        ASSERT_EQ(tick(), Finding::none);
    }
    last = 1;
    Finding finding = Finding::none;
    EXPECT_GE(found_after(60'000 * ms, finding), timeout - 10 * ms);
}

TEST_F(Device, AStopGivesTheWholeTimeAnewAndNoMoreThanTwice) {
    last = 1;
    for (Nanoseconds t = 0; t < timeout - 500 * ms; t += 10 * ms) {
        ASSERT_EQ(tick(), Finding::none);
    }
    machine.time += 60'000 * ms; // stopped
    Finding finding = Finding::none;
    const Nanoseconds after = found_after(60'000 * ms, finding);
    EXPECT_EQ(finding, Finding::silent);
    EXPECT_GE(after, timeout - 20 * ms);
    EXPECT_LE(after, timeout + 20 * ms);
    // Stopped again and again: twice the time-out in machine time, and no longer.
    ++first;
    ++last;
    finding = tick();
    const Instant begun = executor.now();
    while (finding == Finding::none && executor.now() - begun < 60'000 * ms) {
        machine.time += 7'000 * ms;
        for (u32 i = 0; i < 100 && finding == Finding::none; ++i) {
            finding = tick();
        }
    }
    EXPECT_EQ(finding, Finding::silent);
    EXPECT_GE(executor.now() - begun, 2 * timeout - 20 * ms);
    EXPECT_LE(executor.now() - begun, 2 * timeout + 200 * ms);
}

} // namespace
