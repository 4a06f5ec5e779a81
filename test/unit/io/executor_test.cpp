#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
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
import io.latch;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::FakeMachine;
using fl::test::panic_prints;

/// Checks that every frame of a test has been freed.
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
    EXPECT_EQ(*executor.run(descend(500)), 500u) << "and everything was freed";
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
    EXPECT_FALSE(group.spawn([]() -> Task<Result<void>> { co_return Result<void>{}; }()))
        << "a frame for the task, none for its membership";
    EXPECT_EQ(group.running(), 0u);
}

TEST_F(TaskTest, PoolServesEverySizeAfterABurstOfOne) {
    void* kept = frame_pool().allocate(300); // at least one frame is always in use
    ASSERT_NE(kept, nullptr);
    for (const usize size : {100u, 192u, 200u, 384u, 500u, 1024u, 2000u, 4096u}) {
        std::vector<std::byte*> blocks;
        while (auto* block = static_cast<std::byte*>(frame_pool().allocate(size))) {
            ASSERT_EQ(reinterpret_cast<std::uintptr_t>(block) % 16, 0u);
            std::memset(block, static_cast<int>(blocks.size()), size); // detects overlaps
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
        use(); // more than the arena holds without reuse
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
        ASSERT_TRUE(group.spawn(note(executor, order, 3, 7_ms))); // not started yet
    }
    for (int i = 0; i < 10; ++i) {
        machine.time += 10_ms;
        executor.turn();
    }
    EXPECT_TRUE(order.empty());
}

Task<Result<bool>> wait_for(Signal& signal, Bound bound) { co_return co_await signal.wait(bound); }
Task<Result<bool>> wait_for(Signal& signal) { co_return co_await signal.wait(); }

TEST_F(ExecutorTest, SignalRaisedOrNot) {
    Signal signal(executor);
    EXPECT_FALSE(*executor.run(wait_for(signal, {executor, 20_ms}))) << "it was not raised";
    signal.raise();
    EXPECT_TRUE(*executor.run(wait_for(signal))) << "kept until a coroutine waits";
    EXPECT_FALSE(*executor.run(wait_for(signal, {executor, 1_ms}))) << "once";
    // From an "interrupt" while the processor sleeps.
    machine.on_idle_context = &signal;
    machine.on_idle = [](void* s) { static_cast<Signal*>(s)->raise(); };
    const Instant begun = machine.time;
    EXPECT_TRUE(*executor.run(wait_for(signal, {executor, 1_s})));
    EXPECT_LT(machine.time - begun, 1_ms) << "at once, not at a tick";
}

TEST_F(ExecutorTest, WaitingFramesMayBeDestroyed) {
    Signal signal(executor);
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn([](Signal& s) -> Task<Result<void>> {
            static_cast<void>(co_await s.wait());
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
            static_cast<void>(co_await s.wait());
            static_cast<void>(co_await s.wait());
            ADD_FAILURE() << "resumed after its end";
            co_return Result<void>{};
        }(signal)));
        executor.turn(); // takes the pending raise, waits again
        signal.raise();
        executor.turn(); // drained: now the frame is in the ready list
    }
    executor.turn();
    executor.turn();
}

template <class W>
Task<Result<void>> wait_forever(W& what) {
    static_cast<void>(co_await what.wait());
    co_return Result<void>{};
}
static_assert(!std::default_initializable<Latch> && !std::default_initializable<Signal>,
              "neither is usable without an executor");

TEST_F(ExecutorTest, ASecondWaiterIsAPanic) {
    EXPECT_DEATH(
        {
            panic_prints();
            Latch latch(executor);
            TaskGroup group(executor);
            static_cast<void>(group.spawn(wait_forever(latch)));
            static_cast<void>(group.spawn(wait_forever(latch)));
            executor.turn();
        },
        "io::Latch: .*one waiter at a time");
    EXPECT_DEATH(
        {
            panic_prints();
            Signal signal(executor);
            TaskGroup group(executor);
            static_cast<void>(group.spawn(wait_forever(signal)));
            static_cast<void>(group.spawn(wait_forever(signal)));
            executor.turn();
        },
        "io::Signal: .*one waiter at a time");
    // Woken but not resumed yet: another waiter must not take its event.
    EXPECT_DEATH(
        {
            panic_prints();
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
    const auto wait = [](Latch& l, Bound bound) -> Task<Result<bool>> { co_return co_await l.wait(bound); };
    const auto wait_forever = [](Latch& l) -> Task<Result<bool>> { co_return co_await l.wait(); };
    EXPECT_FALSE(*executor.run(wait(latch, {executor, 20_ms}))) << "it was not opened";
    latch.open();
    latch.open();
    EXPECT_TRUE(*executor.run(wait_forever(latch))) << "kept until a coroutine waits";
    EXPECT_FALSE(latch.is_open());
    EXPECT_FALSE(latch.awaited());
    EXPECT_FALSE(*executor.run(wait(latch, {executor, 1_ms}))) << "once";
}

// ---- stops of the machine ----

struct StopTest : Frames {
    struct Ticks final : Service {
        std::vector<Instant> at;
        bool drain() override { return false; }
        void tick(Instant now) override { at.push_back(now); }
    } ticks;
    fl::test::CapturedLog log;
    StopTest() { executor.add(ticks); }
    ~StopTest() override { executor.remove(ticks); }
    /// At the next idle, once: stops the machine for this time.
    void stop_in_idle(Nanoseconds length) {
        stop_length = length;
        machine.on_idle_context = this;
        machine.on_idle = [](void* self) {
            auto& test = *static_cast<StopTest*>(self);
            test.machine.time += std::exchange(test.stop_length, 0);
        };
    }
    Nanoseconds stop_length = 0;
};

TEST_F(StopTest, AStopInIdleIsNoTime) {
    stop_in_idle(7_s);
    const Instant begun = machine.time;
    const Nanoseconds slept = *executor.run(sleeper(executor, 50_ms));
    EXPECT_GE(slept, 50_ms);
    EXPECT_LT(slept, 50_ms + MachineTime::longest_step + 20_ms);
    EXPECT_GE(machine.time - begun, 7_s) << "elapsed time has it";
    EXPECT_GE(executor.elapsed(), executor.now() + 6_s);
    EXPECT_NE(executor.resumed_at(), 0u);
    EXPECT_TRUE(log.has("the machine was stopped"));
    for (usize i = 1; i < ticks.at.size(); ++i) {
        EXPECT_LT(ticks.at[i] - ticks.at[i - 1], MachineTime::longest_step + 20_ms) << "no tick sees a jump";
    }
}

// A timer keeps its length after a stop: the processor's sleep is given clock time, not machine time.
TEST_F(StopTest, TimersAfterAStop) {
    stop_in_idle(60_s);
    EXPECT_TRUE(executor.run(sleeper(executor, 50_ms)));
    const Instant clock = machine.time;
    const Nanoseconds slept = *executor.run(sleeper(executor, 3_s));
    EXPECT_GE(slept, 3_s);
    EXPECT_LT(slept, 3_s + 20_ms);
    EXPECT_LT(machine.time - clock, 3_s + 20_ms);
}

TEST_F(StopTest, AStopInsideATurnIsNoTime) {
    const auto stops = [](FakeMachine& m, Executor& e) -> Task<Result<Nanoseconds>> {
        const Instant begun = e.now();
        m.time += 7_s; // between two readings
        co_return e.now() - begun;
    };
    EXPECT_LE(*executor.run(stops(machine, executor)), MachineTime::longest_step + 1_ms);
    EXPECT_NE(executor.resumed_at(), 0u);
}

// A long computation that reads the clock counts; one that does not is limited to one step, and makes no bound expire
// too early.
TEST_F(StopTest, LongComputations) {
    const auto computes = [](FakeMachine& m, Executor& e) -> Task<Result<Nanoseconds>> {
        const Instant begun = e.now();
        for (u32 i = 0; i < 50; ++i) {
            m.time += 100_ms - m.step; // with the reading itself: the maximum length of a step
            static_cast<void>(e.now());
        }
        co_return e.now() - begun;
    };
    EXPECT_GE(*executor.run(computes(machine, executor)), 5_s);
    EXPECT_EQ(executor.resumed_at(), 0u) << "no stop";
}

TEST_F(StopTest, SleepingForEverIsNoStop) {
    executor.remove(ticks); // a processor without work: no ticks
    machine.on_idle_context = &machine;
    machine.on_idle = [](void* m) { static_cast<FakeMachine*>(m)->time += 3600_s; };
    executor.turn();
    executor.turn();
    EXPECT_EQ(executor.resumed_at(), 0u);
    EXPECT_EQ(executor.elapsed() / 1_s, executor.now() / 1_s) << "it counts as time that the machine ran";
    executor.add(ticks);
}

TEST_F(StopTest, WhatIsDoneBetweenTwoLoopsIsNoStop) {
    EXPECT_TRUE(executor.run(leaf(1)));
    machine.time += 10_s;
    EXPECT_TRUE(executor.run(leaf(1)));
    EXPECT_EQ(executor.resumed_at(), 0u);
}

Task<Result<Nanoseconds>> wait_long(Executor& executor, Latch& latch, Nanoseconds length) {
    const Instant begun = executor.now();
    if (co_await latch.wait({executor, length})) {
        co_return Error{Code::busy, "somebody opened it"};
    }
    co_return executor.now() - begun;
}

TEST_F(StopTest, ABoundHasItsWholeLengthAfterAStop) {
    Latch latch(executor);
    EXPECT_LT(*executor.run(wait_long(executor, latch, 5_s)), 5_s + 20_ms) << "without one: its length";
    // 4 s pass, the machine is stopped, and then there are 5 s again.
    struct At {
        FakeMachine& machine;
        Instant time;
        Nanoseconds length;
    } at{machine, machine.time + 4_s, 60_s};
    machine.on_idle_context = &at;
    machine.on_idle = [](void* c) {
        auto& stop = *static_cast<At*>(c);
        if (stop.machine.time >= stop.time) {
            stop.machine.time += std::exchange(stop.length, 0);
        }
    };
    const Nanoseconds waited = *executor.run(wait_long(executor, latch, 5_s));
    EXPECT_GE(waited, 9_s);
    EXPECT_LT(waited, 9_s + 200_ms);
}

// A stop too short for the log still restarts bounds.
TEST_F(StopTest, ABoundHasItsWholeLengthAfterAShortStop) {
    struct At {
        FakeMachine& machine;
        Instant time;
        Nanoseconds length;
    };
    for (const Nanoseconds length : {200_ms, 600_ms, 1'000_ms}) {
        Latch latch(executor);
        At at{machine, machine.time + 400_ms, length};
        machine.on_idle_context = &at;
        machine.on_idle = [](void* c) {
            auto& stop = *static_cast<At*>(c);
            if (stop.machine.time >= stop.time) {
                stop.machine.time += std::exchange(stop.length, 0);
            }
        };
        const Nanoseconds waited = *executor.run(wait_long(executor, latch, 500_ms));
        EXPECT_GE(waited, 900_ms) << length;
        EXPECT_LT(waited, 900_ms + 200_ms) << length;
    }
    EXPECT_FALSE(log.has("was stopped"));
}

TEST_F(StopTest, StopsMakeABoundAtMostTwiceAsLong) {
    Latch latch(executor);
    struct Every {
        FakeMachine& machine;
        Instant next;
    } every{machine, machine.time + 1_s};
    machine.on_idle_context = &every;
    machine.on_idle = [](void* c) {
        auto& stop = *static_cast<Every*>(c);
        if (stop.machine.time >= stop.next) {
            stop.machine.time += 7_s;
            stop.next = stop.machine.time + 1_s;
        }
    };
    const Nanoseconds waited = *executor.run(wait_long(executor, latch, 5_s));
    EXPECT_GE(waited, 10_s);
    EXPECT_LT(waited, 10_s + 200_ms);
    EXPECT_LT(*executor.run(sleeper(executor, 5_s)), 5_s + 200_ms)
        << "a plain sleep is none that anybody is waited for in";
}

TEST_F(StopTest, BoundOfALoop) {
    const auto polls = [](Executor& e, FakeMachine& m, Nanoseconds stop_after) -> Task<Result<Nanoseconds>> {
        const Instant begun = e.now();
        const Bound bound(e, 2_s);
        bool stopped = false;
        while (!bound.passed()) {
            co_await e.sleep(1_ms);
            if (!stopped && e.now() - begun >= stop_after) {
                stopped = true;
                m.time += 7_s;
            }
        }
        co_return e.now() - begun;
    };
    EXPECT_LT(*executor.run(polls(executor, machine, never)), 2_s + 20_ms);
    const Nanoseconds waited = *executor.run(polls(executor, machine, 1'500_ms));
    EXPECT_GE(waited, 3'500_ms);
    EXPECT_LT(waited, 3'500_ms + 200_ms);
    EXPECT_TRUE(Bound(executor, 0).passed());
    EXPECT_FALSE(Bound(executor, never).passed());
}

// Bounds of different lengths keep their order when they restart.
TEST_F(StopTest, BoundsStayInOrder) {
    Latch first(executor);
    Latch second(executor);
    Latch third(executor);
    std::vector<int> order;
    const auto note = [](Executor& e, Latch& l, Nanoseconds n, std::vector<int>& o, int which) -> Task<Result<void>> {
        static_cast<void>(co_await l.wait({e, n}));
        o.push_back(which);
        co_return Result<void>{};
    };
    const auto all = [&](TaskGroup& group) -> Task<Result<void>> {
        EXPECT_TRUE(group.spawn(note(executor, first, 3_s, order, 3)));
        EXPECT_TRUE(group.spawn(note(executor, second, 1_s, order, 1)));
        EXPECT_TRUE(group.spawn(note(executor, third, 2_s, order, 2)));
        co_return co_await group.join();
    };
    TaskGroup group(executor);
    stop_in_idle(60_s);
    EXPECT_TRUE(executor.run(all(group)));
    EXPECT_EQ(order, (std::vector{1, 2, 3}));
}

// A wake-up from another thread at an arbitrary time is never missed: the sleep is real here, and long.
TEST_F(ExecutorTest, NoWakeUpIsLost) {
    struct Real {
        std::atomic<u64> sleeps{0};
        std::atomic<bool> lost{false};
    } real;
    Executor live(
        {&real, [](void*) { return static_cast<Instant>(std::chrono::steady_clock::now().time_since_epoch().count()); },
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
            if (!co_await s.wait()) {
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
