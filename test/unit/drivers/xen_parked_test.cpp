// How the other processors are stopped for a suspension, on real threads.
#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import io.executor;
import io.task;
import io.block;
import drivers.driver;
import drivers.xen_control;

#include "unit/core/interrupt_fake.hpp"
#include "unit/io/processors.hpp"

namespace {
using namespace fl;
using drivers::xen_control::Parked;

struct NoDisks final : drivers::DiskSink {
    bool offered(u32) override { return false; }
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice&, u32) override { return {}; }
};
struct NoMemory final : DmaAllocator {
    Result<DmaSpan> allocate(u32, u64) override { return Error{Code::exhausted, "none"}; }
    void free(DmaSpan) override {}
};

struct XenParked : testing::Test {
    test::ThreadPlatform platform;
    io::Executor executor{platform.platform(), 0};
    test::ThreadProcessor first{1}, second{2};
    std::array<io::Executor*, 3> executors{&executor, &first.executor, &second.executor};
    NoMemory memory;
    NoDisks disks;
    test::Interrupts interrupts;
    drivers::Environment environment{.executor = executor,
                                     .dma = memory,
                                     .interrupts = interrupts,
                                     .disks = disks,
                                     .timeout = 2'000'000'000,
                                     .executors = executors};
    Parked parked{environment};
};

// A post that increments `counted` and queues itself again on its processor until `more` is false.
struct Count : io::Post {
    io::Executor* executor = nullptr;
    std::atomic<u64> counted{0};
    std::atomic<bool> more{true};
    std::atomic<bool> ended{false};
    explicit Count(io::Executor& e) : executor(&e) {
        run = [](io::Post& self) {
            auto& count = static_cast<Count&>(self);
            count.counted.fetch_add(1);
            if (!count.more.load() || !count.executor->post(count)) {
                count.ended.store(true);
            }
        };
    }
};

io::Task<Result<void>> nothing_runs(Parked& parked, Count& a, Count& b, u64& moved) {
    auto done = co_await parked.park();
    const u64 before = a.counted.load() + b.counted.load();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    moved = a.counted.load() + b.counted.load() - before;
    parked.release();
    co_return done;
}

TEST_F(XenParked, TheOthersDoNothingUntilItsRelease) {
    Count a(first.executor);
    Count b(second.executor);
    ASSERT_TRUE(first.executor.post(a));
    ASSERT_TRUE(second.executor.post(b));
    u64 moved = 0;
    ASSERT_TRUE(executor.run(nothing_runs(parked, a, b, moved)));
    EXPECT_EQ(moved, 0u);
    const u64 at_release = a.counted.load();
    while (a.counted.load() == at_release) {
        std::this_thread::yield();
    }
    a.more = b.more = false;
    while (!a.ended.load() || !b.ended.load()) {
        std::this_thread::yield();
    }
}

io::Task<Result<void>> many(Parked& parked, u32 times) {
    for (u32 i = 0; i < times; ++i) {
        auto done = co_await parked.park();
        parked.release();
        if (!done) {
            co_return done;
        }
    }
    co_return Result<void>{};
}

// A processor that the host does not run when it is released must not be held by the next suspension instead.
TEST_F(XenParked, ASlowProcessorLeavesTheSuspensionThatItStoppedFor) {
    constexpr u32 times = 300;
    const auto done = executor.run(many(parked, times));
    ASSERT_TRUE(done);
    first.stop();
    second.stop();
    // The timers of all are armed anew: what was armed before may be lost.
    EXPECT_EQ(platform.rearmed.load(), times);
    EXPECT_EQ(first.platform.rearmed.load(), times);
    EXPECT_EQ(second.platform.rearmed.load(), times);
}

} // namespace
