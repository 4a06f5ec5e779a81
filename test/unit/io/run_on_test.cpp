#include "core/thread_annotations.hpp"
#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.result;
import core.processor;
import core.spinlock;
import core.time;
import io.task;
import io.executor;
import io.run_on;
#include "unit/io/processors.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::ThreadPlatform;
using fl::test::ThreadProcessor;

/// The test's thread is the boot processor. At the end every frame has been freed, and no wake-up was missed.
struct RunOnTest : testing::Test {
    usize before = frame_pool().in_use();
    ThreadPlatform platform;
    Executor home{platform.platform(), 0};
    ThreadProcessor one{1};
    ThreadProcessor two{2};
    ~RunOnTest() override {
        one.stop();
        two.stop();
        frame_pool().fail_after(~u64{0});
        EXPECT_EQ(frame_pool().in_use(), before) << "coroutine frames leaked";
        EXPECT_EQ(platform.overslept + one.platform.overslept + two.platform.overslept, 0u)
            << "a processor slept through a wake-up";
    }
};

Task<Result<u32>> where(u32 value) { co_return value * 10 + this_processor(); }
Task<Result<u32>> processors_of(Executor& there) {
    const auto first = co_await run_on(there, where(4));
    if (!first) {
        co_return first.error();
    }
    co_return *first * 100 + this_processor() * 10 + (Executor::current()->processor());
}

TEST_F(RunOnTest, RunsThereAndResumesHere) {
    EXPECT_EQ(*home.run(processors_of(one.executor)), 4100u);
    EXPECT_EQ(*home.run(processors_of(two.executor)), 4200u);
    EXPECT_EQ(*home.run(processors_of(home)), 4000u) << "on its own processor it is a turn's delay and nothing more";
    EXPECT_EQ(Executor::current(), nullptr);
}

Task<Result<u64>> failing() { co_return Error{Code::io, "the disk is on fire"}; }
Task<Result<u64>> await_failure(Executor& there) { co_return co_await run_on(there, failing()); }

TEST_F(RunOnTest, ErrorsComeBack) {
    const auto result = home.run(await_failure(one.executor));
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::io);
}

TEST_F(RunOnTest, NoFrameIsAnErrorWhereverItIsMissing) {
    // Frames: the root, await_failure, failing, the runner.
    for (u64 n = 0; n < 4; ++n) {
        frame_pool().fail_after(n);
        const auto result = home.run(await_failure(one.executor));
        ASSERT_FALSE(result);
        EXPECT_EQ(result.error().code, Code::exhausted) << n;
        frame_pool().fail_after(~u64{0});
    }
}

Task<Result<void>> add_asleep(std::atomic<u64>& sum, u64 value) {
    co_await Executor::current()->sleep(value * 100'000);
    sum += value * 1000 + this_processor();
    co_return Result<void>{};
}
Task<Result<void>> send(Executor& there, std::atomic<u64>& sum, u64 value) {
    co_return co_await run_on(there, add_asleep(sum, value));
}
Task<Result<void>> many(Executor& home, Executor& one, Executor& two, std::atomic<u64>& sum) {
    TaskGroup group(home);
    for (u64 i = 1; i <= 40; ++i) {
        if (auto spawned = group.spawn(send(i % 2 == 0 ? one : two, sum, i)); !spawned) {
            co_return spawned;
        }
    }
    co_return co_await group.join();
}

TEST_F(RunOnTest, ManyAtOnceOnTwoProcessorsThatSleep) {
    std::atomic<u64> sum = 0;
    ASSERT_TRUE(home.run(many(home, one.executor, two.executor, sum)));
    EXPECT_EQ(sum, 820u * 1000 + 20 * 1 + 20 * 2);
}

Task<Result<void>> ping(Executor& a, Executor& b, u32 rounds) {
    for (u32 i = 0; i < rounds; ++i) {
        const auto at_a = co_await run_on(a, where(i));
        const auto at_b = co_await run_on(b, where(i));
        if (!at_a || !at_b || *at_a != i * 10 + 1 || *at_b != i * 10 + 2 || this_processor() != 0) {
            co_return Error{Code::corrupt, "ran somewhere else"};
        }
    }
    co_return Result<void>{};
}

TEST_F(RunOnTest, NoWakeUpIsLostInTenThousandRounds) {
    EXPECT_TRUE(home.run(ping(one.executor, two.executor, 10'000)));
    EXPECT_GT(one.platform.kicks, 0u);
}

/// Reports the processor on which it was destroyed.
struct DestructionRecorder {
    std::atomic<u32>& destroyed_on;
    ~DestructionRecorder() { destroyed_on = this_processor(); }
};
Task<Result<void>> run_forever(std::atomic<bool>& begun, std::atomic<u32>& destroyed_on, const u64& in_the_frame) {
    const DestructionRecorder recorder{destroyed_on};
    begun = true;
    for (;;) {
        co_await Executor::current()->sleep(50'000);
        if (in_the_frame != 0x5a5a) { // the waiting frame must live as long as this one
            std::abort();
        }
    }
}
Task<Result<void>> await_remote(Executor& there, std::atomic<bool>& begun, std::atomic<u32>& destroyed_on) {
    const u64 local = 0x5a5a;
    co_return co_await run_on(there, run_forever(begun, destroyed_on, local));
}
Task<Result<void>> give_up(Executor& home, Executor& there, std::atomic<u32>& destroyed_on) {
    std::atomic<bool> begun = false;
    TaskGroup group(home);
    if (auto spawned = group.spawn(await_remote(there, begun, destroyed_on)); !spawned) {
        co_return spawned;
    }
    while (!begun) {
        co_await home.sleep(20'000);
    }
    co_return Result<void>{}; // destroys the group, and with it the waiting frame
}

TEST_F(RunOnTest, AbandonedTaskIsDestroyedOnItsOwnProcessorFirst) {
    for (u32 i = 0; i < 50; ++i) {
        std::atomic<u32> destroyed_on = 99;
        ASSERT_TRUE(home.run(give_up(home, one.executor, destroyed_on)));
        EXPECT_EQ(destroyed_on, 1u) << "and before run() returned";
    }
}

Task<Result<void>> there_and_back(Executor& home, Executor& there, std::atomic<bool>& begun,
                                  std::atomic<u32>& destroyed_on) {
    co_return co_await run_on(there, await_remote(home, begun, destroyed_on));
}
Task<Result<void>> give_up_nested(Executor& home, Executor& there, std::atomic<u32>& destroyed_on) {
    std::atomic<bool> begun = false;
    TaskGroup group(home);
    if (auto spawned = group.spawn(there_and_back(home, there, begun, destroyed_on)); !spawned) {
        co_return spawned;
    }
    while (!begun) {
        co_await home.sleep(20'000);
    }
    co_return Result<void>{};
}

TEST_F(RunOnTest, TwoProcessorsThatWaitForEachOthersAbandonedTasks) {
    for (u32 i = 0; i < 50; ++i) {
        std::atomic<u32> destroyed_on = 99;
        ASSERT_TRUE(home.run(give_up_nested(home, one.executor, destroyed_on)));
        EXPECT_EQ(destroyed_on, 0u) << "the innermost task ran here, and this processor took it apart while it waited";
    }
}

Task<Result<void>> quick(std::atomic<u32>& ran) {
    ++ran;
    co_return Result<void>{};
}
Task<Result<void>> send_quick(Executor& there, std::atomic<u32>& ran) { co_return co_await run_on(there, quick(ran)); }
Task<Result<void>> race(Executor& home, Executor& there, std::atomic<u32>& ran, u32 turns) {
    TaskGroup group(home);
    if (auto spawned = group.spawn(send_quick(there, ran)); !spawned) {
        co_return spawned;
    }
    for (u32 i = 0; i < turns; ++i) { // it may be in any state by now: not started, running, ended, reported, resumed
        co_await home.sleep(i * 1000);
    }
    co_return Result<void>{};
}

TEST_F(RunOnTest, AbandonedAtEveryMomentOfItsLife) {
    std::atomic<u32> ran = 0;
    for (u32 i = 0; i < 3000; ++i) {
        ASSERT_TRUE(home.run(race(home, one.executor, ran, i % 12)));
    }
    EXPECT_GT(ran, 0u);
}

const Platform sleepless{nullptr, [](void*) -> Instant { return 0; }, [](void*, Instant, const std::atomic<bool>&) {}};

/// Two executors in one thread: posts not started yet can be withdrawn without running the other executor.
TEST(RunOnOneThread, AbandonedBeforeItBegins) {
    const usize before = frame_pool().in_use();
    ThreadPlatform platform;
    Executor home(platform.platform(), 0);
    Executor there(sleepless, 0);
    std::atomic<u32> ran = 0;
    ASSERT_TRUE(home.run(race(home, there, ran, 2)));
    there.turn();
    EXPECT_EQ(ran, 0u);
    EXPECT_EQ(frame_pool().in_use(), before);
}

struct Numbered : Post {
    std::vector<u32>* into = nullptr;
    u32 number = 0;
    static void note(Post& post) {
        auto& self = static_cast<Numbered&>(post);
        self.into->push_back(self.number);
    }
};

TEST(ExecutorPost, InOrderOnceAndNeverWhenWithdrawn) {
    Executor executor(sleepless, 0);
    std::vector<u32> seen;
    std::array<Numbered, 6> posts;
    for (u32 i = 0; i < posts.size(); ++i) {
        posts[i].run = Numbered::note;
        posts[i].into = &seen;
        posts[i].number = i;
        posts[i].urgent = i == 4;
        ASSERT_TRUE(executor.post(posts[i]));
    }
    EXPECT_TRUE(executor.withdraw(posts[2]));
    EXPECT_TRUE(executor.withdraw(posts[5])); // the last one: the next post is appended to its predecessor
    EXPECT_FALSE(executor.withdraw(posts[5])) << "not there any more";
    executor.run_urgent();
    EXPECT_EQ(seen, (std::vector<u32>{4}));
    ASSERT_TRUE(executor.post(posts[5]));
    executor.turn();
    EXPECT_EQ(seen, (std::vector<u32>{4, 0, 1, 3, 5}));
    ASSERT_TRUE(executor.post(posts[0]));
    executor.turn();
    EXPECT_EQ(seen.back(), 0u) << "a post may be used again";
    EXPECT_EQ(seen.size(), 6u);
}

TEST_F(RunOnTest, AProcessorThatHasStoppedIsAnErrorAtOnce) {
    one.stop();
    for (u32 i = 0; i < 3; ++i) {
        const auto result = home.run(await_failure(one.executor));
        ASSERT_FALSE(result);
        EXPECT_EQ(result.error().code, Code::device_gone);
    }
    Numbered post;
    EXPECT_FALSE(one.executor.post(post));
}

TEST_F(RunOnTest, AProcessorThatStopsEndsWhatWasSentToIt) {
    std::atomic<bool> begun = false;
    std::atomic<u32> destroyed_on = 99;
    std::thread stopper([&] {
        set_this_processor(3);
        while (!begun) {
            std::this_thread::yield();
        }
        one.stop();
    });
    const auto result = home.run(await_remote(one.executor, begun, destroyed_on));
    stopper.join();
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::device_gone);
    EXPECT_EQ(destroyed_on, 1u) << "on its own processor";
}

Task<Result<void>> sleeps_for_ever() {
    for (;;) {
        co_await Executor::current()->sleep(20'000);
    }
}
Task<Result<void>> send_on(Executor& there) { co_return co_await run_on(there, sleeps_for_ever()); }

// Sends, cancellations and stops at arbitrary relative times: everything ends, and nothing is left.
Task<Result<void>> hop(Executor& first, Executor& second) { co_return co_await run_on(first, send_on(second)); }
TEST_F(RunOnTest, StoppingAtAnyMomentEndsEverything) {
    for (u32 round = 0; round < 60; ++round) {
        ThreadProcessor a{3};
        ThreadProcessor b{4};
        std::thread stopper([&] {
            set_this_processor(5);
            std::this_thread::sleep_for(std::chrono::microseconds(round * 17));
            (round % 2 == 0 ? a : b).stop();
            (round % 2 == 0 ? b : a).stop();
        });
        ASSERT_FALSE(home.run(hop(a.executor, b.executor))) << "for ever, or until one of the two stops";
        stopper.join();
    }
}

TEST(SpinLockTest, OneAtATime) {
    SpinLock lock;
    u64 count = 0; // not atomic: protected by the lock
    std::vector<std::thread> threads;
    for (u32 n = 1; n <= 3; ++n) {
        threads.emplace_back([&, n] {
            set_this_processor(n);
            for (u32 i = 0; i < 20'000; ++i) {
                const Locked locked(lock);
                EXPECT_TRUE(lock.held_here());
                ++count;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(count, 60'000u);
    EXPECT_FALSE(lock.held_here());
}

// Misuse that the compiler rejects if it can see it.
void take(SpinLock& lock) NO_THREAD_SAFETY_ANALYSIS {
    test::panic_prints();
    lock.lock();
}

TEST(SpinLockDeathTest, TwiceOnOneProcessorPanicsRatherThanHang) {
    SpinLock lock;
    lock.lock();
    EXPECT_DEATH(take(lock), "a lock is taken twice on processor 0");
    lock.unlock();
}

} // namespace
