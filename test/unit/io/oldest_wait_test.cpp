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
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using Finding = OldestWait::Finding;

constexpr Nanoseconds ms = 1'000'000;
constexpr Nanoseconds timeout = 5'000 * ms;

/// A device that takes `each` per request, with `depth` of them always in flight, checked every 10 ms.
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
        return wait.check(executor, {last < first ? 0 : first, last + 1 - first, answered}, timeout);
    }
    /// Time until a fault is found; never: none within `bound`.
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
            ++first; // completed, and another one is submitted
            ++last;
            ++answered;
        }
    }
}

TEST_F(Device, AsSlowAsTheTimeOutAllows) {
    last = 32;
    for (u32 n = 0; n < 32; ++n) { // no further requests: the last one is completed after 32 time-outs
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

// Completions of others do not excuse one that never completes; the number of others limits how long that may take.
TEST_F(Device, ALostOneIsFound) {
    for (const Nanoseconds each : {10 * ms, 250 * ms}) {
        first = last + 1;
        last += 32; // the first one is lost
        const u64 passes = OldestWait::max_passes * 32;
        const Nanoseconds explained = passes * each; // the time that a fair device may be busy with others
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
    last = 2; // 1 is lost, 2 completes after 4 s, and nothing more is submitted
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

TEST_F(Device, AStopRestartsTheBoundAtMostTwice) {
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
    // Stopped repeatedly: at most twice the time-out in machine time.
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
