#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <gtest/gtest.h>
#include <new>
#include <thread>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import io.task;
import io.executor;
import io.block;
import io.latch;
import core.panic;
#include "unit/io_support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::FakeMachine;

/// Every frame that a test takes is given back.
struct Frames : testing::Test {
    FakeMachine machine;
    Executor executor{machine.platform()};
    usize before = frame_pool().in_use();
    ~Frames() override {
        frame_pool().fail_after(~u64{0});
        EXPECT_EQ(frame_pool().in_use(), before) << "coroutine frames leaked";
    }
};
using TaskTest = Frames;
using ExecutorTest = Frames;

Task<Result<u64>> leaf(u64 value) { co_return value; }
Task<Result<u64>> sum_of_leaves(u64 count, std::uintptr_t& lowest, std::uintptr_t& highest) {
    u64 sum = 0;
    for (u64 i = 0; i < count; ++i) {
        const auto value = co_await leaf(i);
        char here = 0;
        lowest = std::min(lowest, reinterpret_cast<std::uintptr_t>(&here));
        highest = std::max(highest, reinterpret_cast<std::uintptr_t>(&here));
        sum += *value;
    }
    co_return sum;
}

TEST_F(TaskTest, ManyChildrenDoNotGrowTheStack) {
    std::uintptr_t lowest = ~std::uintptr_t{0};
    std::uintptr_t highest = 0;
    EXPECT_EQ(*executor.run(sum_of_leaves(100'000, lowest, highest)), u64{100'000} * 99'999 / 2);
    EXPECT_LT(highest - lowest, 4096u) << "each child returns by symmetric transfer";
}

Task<Result<u64>> descend(u64 depth) {
    if (depth == 0) {
        co_return u64{0};
    }
    const auto below = co_await descend(depth - 1);
    if (!below) {
        co_return below.error();
    }
    co_return *below + 1;
}

TEST_F(TaskTest, DeepChainUntilThePoolIsDry) {
    EXPECT_EQ(*executor.run(descend(500)), 500u);
    const auto result = executor.run(descend(1'000'000));
    ASSERT_FALSE(result) << "512 KiB of frames cannot hold a million";
    EXPECT_EQ(result.error().code, Code::exhausted);
    EXPECT_EQ(*executor.run(descend(500)), 500u) << "and everything came back";
    void* other = frame_pool().allocate(4000);
    ASSERT_NE(other, nullptr) << "also for frames of another size";
    frame_pool().free(other, 4000);
}

TEST_F(TaskTest, NoFrameIsAnErrorValueEverywhere) {
    for (u64 n = 0; n < 4; ++n) {
        frame_pool().fail_after(n);
        const auto result = executor.run(descend(3)); // a root and four frames
        ASSERT_FALSE(result);
        EXPECT_EQ(result.error().code, Code::exhausted);
    }
    TaskGroup group(executor);
    frame_pool().fail_after(0);
    EXPECT_FALSE(group.spawn([]() -> Task<Result<void>> { co_return Result<void>{}; }()));
    frame_pool().fail_after(1);
    EXPECT_FALSE(group.spawn([]() -> Task<Result<void>> { co_return Result<void>{}; }())) << "a frame for the task, none for its membership";
    EXPECT_EQ(group.running(), 0u);
}

TEST_F(TaskTest, PoolServesEverySizeAfterABurstOfOne) {
    void* kept = frame_pool().allocate(300); // somebody always has a frame
    ASSERT_NE(kept, nullptr);
    for (const usize size : {100u, 192u, 200u, 384u, 500u, 1024u, 2000u, 4096u}) {
        std::vector<std::byte*> blocks;
        while (auto* block = static_cast<std::byte*>(frame_pool().allocate(size))) {
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(block) % 16, 0u);
            std::memset(block, static_cast<int>(blocks.size()), size); // overlaps would show
            blocks.push_back(block);
        }
        EXPECT_GE(blocks.size() * size, FramePool::arena_bytes / 2) << size;
        for (usize i = 0; i < blocks.size(); ++i) {
            ASSERT_EQ(blocks[i][0], static_cast<std::byte>(i));
            ASSERT_EQ(blocks[i][size - 1], static_cast<std::byte>(i));
        }
        for (usize i = 0; i < blocks.size(); i += 2) { // every other one first
            frame_pool().free(blocks[i], size);
        }
        for (usize i = 1; i < blocks.size(); i += 2) {
            frame_pool().free(blocks[i], size);
        }
    }
    frame_pool().free(kept, 300);
    EXPECT_EQ(frame_pool().allocate(4097), nullptr);
}

TEST_F(TaskTest, BlocksAreUsedAgain) {
    const auto use = [&] { EXPECT_TRUE(executor.run(leaf(1))); };
    use();
    const u64 allocations = frame_pool().allocations();
    for (int i = 0; i < 10'000; ++i) {
        use(); // more than the arena could give without reuse
    }
    EXPECT_EQ(frame_pool().allocations(), allocations + 20'000);
}

Task<Result<u64>> sleeper(Executor& executor, Nanoseconds length) {
    const Instant begun = executor.now();
    co_await executor.sleep(length);
    co_return executor.now() - begun;
}

TEST_F(ExecutorTest, SleepLastsAtLeastItsLength) {
    const auto slept = executor.run(sleeper(executor, 50_ms));
    EXPECT_GE(*slept, 50_ms);
    EXPECT_LT(*slept, 51_ms);
}

Task<Result<void>> note(Executor& executor, std::vector<int>& order, int number, Nanoseconds length) {
    co_await executor.sleep(length);
    order.push_back(number);
    co_return Result<void>{};
}
Task<Result<void>> all_of(Executor& executor, std::vector<int>& order) {
    TaskGroup group(executor);
    const Nanoseconds lengths[] = {30_ms, 10_ms, 20_ms, 10_ms};
    for (int i = 0; i < 4; ++i) {
        if (auto spawned = group.spawn(note(executor, order, i, lengths[i])); !spawned) {
            co_return spawned;
        }
    }
    co_return co_await group.join();
}

TEST_F(ExecutorTest, TimersFireInOrder) {
    std::vector<int> order;
    EXPECT_TRUE(executor.run(all_of(executor, order)));
    EXPECT_EQ(order, (std::vector<int>{1, 3, 2, 0}));
}

Task<Result<void>> failing(Executor& executor) {
    co_await executor.sleep(1_ms);
    co_return Error{Code::io, "first"};
}
Task<Result<void>> group_with_error(Executor& executor, std::vector<int>& order) {
    TaskGroup group(executor);
    static_cast<void>(group.spawn(note(executor, order, 1, 5_ms)));
    static_cast<void>(group.spawn(failing(executor)));
    co_return co_await group.join();
}

TEST_F(ExecutorTest, GroupKeepsTheFirstErrorAndWaitsForAll) {
    std::vector<int> order;
    const auto result = executor.run(group_with_error(executor, order));
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().message, "first");
    EXPECT_EQ(order.size(), 1u);
}

TEST_F(ExecutorTest, GroupDestroysWhatHasNotFinished) {
    std::vector<int> order;
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn(note(executor, order, 1, 5_ms)));
        ASSERT_TRUE(group.spawn(note(executor, order, 2, 7_ms)));
        executor.turn();                                          // both sleep
        ASSERT_TRUE(group.spawn(note(executor, order, 3, 7_ms))); // this one has not begun
    }
    for (int i = 0; i < 10; ++i) {
        machine.time += 10_ms;
        executor.turn();
    }
    EXPECT_TRUE(order.empty());
}

Task<Result<bool>> wait_for(Signal& signal, Instant deadline) { co_return co_await signal.wait(deadline); }

TEST_F(ExecutorTest, SignalRaisedOrNot) {
    Signal signal(executor);
    EXPECT_FALSE(*executor.run(wait_for(signal, after(executor.now(), 20_ms)))) << "nobody raised it";
    signal.raise();
    EXPECT_TRUE(*executor.run(wait_for(signal, never))) << "kept until somebody waits";
    EXPECT_FALSE(*executor.run(wait_for(signal, after(executor.now(), 1_ms)))) << "once";
    // From an "interrupt", while the processor sleeps.
    machine.on_idle_context = &signal;
    machine.on_idle = [](void* s) { static_cast<Signal*>(s)->raise(); };
    const Instant begun = machine.time;
    EXPECT_TRUE(*executor.run(wait_for(signal, after(executor.now(), 1_s))));
    EXPECT_LT(machine.time - begun, 1_ms) << "at once, not at a tick";
}

TEST_F(ExecutorTest, WaitingFramesMayDie) {
    Signal signal(executor);
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn([](Signal& s) -> Task<Result<void>> {
            static_cast<void>(co_await s.wait(never));
            ADD_FAILURE() << "resumed after its end";
            co_return Result<void>{};
        }(signal)));
        executor.turn();
        executor.turn();
    }
    signal.raise();
    executor.turn();
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn([](Signal& s) -> Task<Result<void>> {
            static_cast<void>(co_await s.wait(never));
            static_cast<void>(co_await s.wait(never));
            ADD_FAILURE() << "resumed after its end";
            co_return Result<void>{};
        }(signal)));
        executor.turn(); // takes the raise that was kept, waits again
        signal.raise();
        executor.turn(); // drained: now the frame is in the ready list
    }
    executor.turn();
    executor.turn();
}

// A panic with its message on stderr, where a death test finds it.
void panics_aloud() {
    set_panic_hook([](std::string_view message) {
        std::fprintf(stderr, "panic: %.*s\n", static_cast<int>(message.size()), message.data());
        std::abort();
    });
}
template <class W>
Task<Result<void>> wait_forever(W& what) {
    static_cast<void>(co_await what.wait(never));
    co_return Result<void>{};
}
static_assert(!std::default_initializable<Latch> && !std::default_initializable<Signal>, "neither is usable without an executor");

TEST_F(ExecutorTest, ASecondWaiterIsAPanic) {
    EXPECT_DEATH(
        {
            panics_aloud();
            Latch latch(executor);
            TaskGroup group(executor);
            static_cast<void>(group.spawn(wait_forever(latch)));
            static_cast<void>(group.spawn(wait_forever(latch)));
            executor.turn();
        },
        "io::Latch: .*one waiter at a time");
    EXPECT_DEATH(
        {
            panics_aloud();
            Signal signal(executor);
            TaskGroup group(executor);
            static_cast<void>(group.spawn(wait_forever(signal)));
            static_cast<void>(group.spawn(wait_forever(signal)));
            executor.turn();
        },
        "io::Signal: .*one waiter at a time");
    // Woken, and not resumed yet: what woke it is not another one's to take.
    EXPECT_DEATH(
        {
            panics_aloud();
            Latch latch(executor);
            TaskGroup group(executor);
            static_cast<void>(group.spawn(wait_forever(latch)));
            executor.turn();
            static_cast<void>(group.spawn(wait_forever(latch))); // ready before the first one
            latch.open();
            executor.turn();
        },
        "io::Latch: .*one waiter at a time");
}

TEST_F(ExecutorTest, ALatchOpensOnceForEachWait) {
    Latch latch(executor);
    const auto wait = [](Latch& l, Instant until) -> Task<Result<bool>> { co_return co_await l.wait(until); };
    EXPECT_FALSE(*executor.run(wait(latch, after(executor.now(), 20_ms)))) << "nobody opened it";
    latch.open();
    latch.open();
    EXPECT_TRUE(*executor.run(wait(latch, never))) << "kept until somebody waits";
    EXPECT_FALSE(latch.is_open());
    EXPECT_FALSE(latch.awaited());
    EXPECT_FALSE(*executor.run(wait(latch, after(executor.now(), 1_ms)))) << "once";
}

// A wake-up that comes from another thread at any moment is never slept through: the sleep is real here, and long.
TEST_F(ExecutorTest, NoWakeUpIsLost) {
    struct Real {
        std::atomic<u64> sleeps{0};
        std::atomic<bool> lost{false};
    } real;
    Executor live({&real, [](void*) { return static_cast<Instant>(std::chrono::steady_clock::now().time_since_epoch().count()); },
                   [](void* c, Instant, const std::atomic<bool>& wake) {
                       auto& r = *static_cast<Real*>(c);
                       ++r.sleeps;
                       const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
                       while (!wake.load(std::memory_order_acquire)) {
                           if (std::chrono::steady_clock::now() > limit) {
                               r.lost = true;
                               return;
                           }
                           std::this_thread::yield();
                       }
                   }});
    Signal signal(live);
    constexpr u64 rounds = 2000;
    std::atomic<u64> answered{0};
    std::thread other([&] {
        for (u64 i = 0; i < rounds && !real.lost; ++i) {
            signal.raise();
            while (answered.load() == i && !real.lost) {
                std::this_thread::yield();
            }
        }
    });
    const auto result = live.run([](Signal& s, std::atomic<u64>& count) -> Task<Result<u64>> {
        for (u64 i = 0; i < rounds; ++i) {
            if (!co_await s.wait(never)) {
                co_return Error{Code::timed_out, "never has passed"};
            }
            ++count;
        }
        co_return count.load();
    }(signal, answered));
    other.join();
    EXPECT_FALSE(real.lost);
    EXPECT_EQ(*result, rounds);
}

TEST_F(ExecutorTest, ServiceMayRemoveTheNextOne) {
    struct Next final : Service {
        int drained = 0;
        bool drain() override {
            ++drained;
            return false;
        }
    } next;
    struct First final : Service {
        Executor& e;
        Service& victim;
        First(Executor& ex, Service& v) : e(ex), victim(v) {}
        bool drain() override {
            e.remove(victim);
            return false;
        }
    } first(executor, next);
    executor.add(next);
    executor.add(first); // visited first
    executor.turn();
    EXPECT_EQ(next.drained, 0);
    executor.remove(first);
}

TEST(ReadyListTest, NodesLeaveWhereverTheyStand) {
    ReadyList list;
    ReadyList other;
    ReadyNode a;
    ReadyNode c;
    {
        ReadyNode b;
        list.push(a);
        list.push(b);
        list.push(c);
        list.push(a); // already there
        other.take_all(list);
        EXPECT_TRUE(list.empty());
    }
    EXPECT_EQ(other.pop(), &a);
    EXPECT_EQ(other.pop(), &c);
    EXPECT_EQ(other.pop(), nullptr);
    EXPECT_FALSE(a.queued());
}

} // namespace
