// Which services a turn of the executor visits, what wakes it, and the cost of its timers: counted, not timed.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.processor;
import io.task;
import io.executor;
import io.timer_heap;
import io.latch;
import io.block;
import io.block_queue;
import io.oldest_wait;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::FakeMachine;

struct Visits {
    u64 flushes = 0;
    u64 drains = 0;
    u64 arms = 0;
    u64 ticks = 0;
    u64 all() const { return flushes + drains + arms + ticks; }
    bool operator==(const Visits&) const = default;
};

/// A queue with one request at a time, completed by its "device" on a test's request.
struct Queue final : Service {
    Executor& executor;
    Visits visits;
    bool in_flight = false;
    std::atomic<bool> answered{false}; // by the device
    bool found_by_arm = false;         // the next arm() finds a completion
    bool ticks_wanted = false;         // without any reason
    ReadyNode* waiter = nullptr;
    Instant last_tick = 0;

    explicit Queue(Executor& e) : executor(e) { executor.add(*this); }
    ~Queue() { executor.remove(*this); }
    void submit(ReadyNode& node) {
        waiter = &node;
        in_flight = true;
        executor.touch(*this);
    }
    void interrupt() { // like a handler
        answered = true;
        executor.raise(*this);
    }
    void flush() override { ++visits.flushes; }
    bool drain() override {
        ++visits.drains;
        if (!in_flight || !answered.exchange(false)) {
            return false;
        }
        in_flight = false;
        if (waiter != nullptr) {
            executor.make_ready(*std::exchange(waiter, nullptr));
        }
        return true;
    }
    bool arm() override {
        ++visits.arms;
        return std::exchange(found_by_arm, false);
    }
    void tick(Instant now) override {
        ++visits.ticks;
        last_tick = now;
    }
    bool wants_tick() const override { return in_flight || ticks_wanted; }
    bool awaits_answer() const override { return in_flight; }
};

struct Turns : testing::Test {
    FakeMachine machine;
    Executor executor{machine.platform()};
    /// No service is active any more.
    void settle() {
        machine.on_idle = nullptr;
        for (u32 i = 0; i < 4; ++i) {
            machine.time += 20_ms;
            executor.turn();
        }
    }
};

struct Submission {
    Queue& queue;
    ReadyNode node{};
    bool await_ready() const { return false; }
    void await_suspend(std::coroutine_handle<> h) {
        node.waiter = h;
        queue.submit(node);
    }
    void await_resume() const {}
};
Task<Result<void>> use(Queue& queue, u32 times) {
    for (u32 i = 0; i < times; ++i) {
        Submission request{queue};
        co_await request;
    }
    co_return Result<void>{};
}

// The cost of a turn does not grow with the number of services: one in use, with 0, 7, 63 and 255 idle ones.
TEST_F(Turns, CostTheSameHoweverManyServicesAreIdle) {
    std::vector<Visits> of_used;
    std::vector<u64> turns;
    for (const usize count : {1u, 8u, 64u, 256u}) {
        std::vector<std::unique_ptr<Queue>> queues;
        for (usize i = 0; i < count; ++i) {
            queues.push_back(std::make_unique<Queue>(executor));
        }
        settle();
        Queue& used = *queues[count / 2];
        std::vector<Visits> before;
        for (const auto& queue : queues) {
            before.push_back(queue->visits);
            EXPECT_GT(queue->visits.drains, 0u) << "visited when it is new";
            EXPECT_GT(queue->visits.arms, 0u);
        }
        machine.on_idle_context = &used;
        machine.on_idle = [](void* queue) { static_cast<Queue*>(queue)->interrupt(); };
        const u64 turns_before = executor.turns();
        const u64 readings_before = machine.readings;
        ASSERT_TRUE(executor.run(use(used, 1000)));
        EXPECT_LE(machine.readings - readings_before, 1000u + 5)
            << "one reading of the clock ends the sleep, and is the time of the turn that continues the coroutine too";
        turns.push_back(executor.turns() - turns_before);
        u64 others = 0;
        for (usize i = 0; i < count; ++i) {
            others += queues[i].get() != &used ? queues[i]->visits.all() - before[i].all() : 0;
        }
        EXPECT_EQ(others, 0u) << count << " services: the idle ones are not visited at all";
        const Visits& u = before[count / 2];
        of_used.push_back({used.visits.flushes - u.flushes, used.visits.drains - u.drains, used.visits.arms - u.arms,
                           used.visits.ticks - u.ticks});
        EXPECT_EQ(of_used.back().flushes, 1000u);
        EXPECT_EQ(of_used.back(), of_used.front()) << count;
        EXPECT_EQ(turns.back(), turns.front()) << count;
        // A turn that submits and sleeps, and one that takes the completion: two drains and one arm per pair.
        EXPECT_LE(of_used.back().drains, 2u * 1000 + 2);
        EXPECT_LE(of_used.back().arms, 1000u + 2);
        machine.on_idle = nullptr;
    }
}

TEST_F(Turns, ServicesArePassiveBetweenArmAndRaise) {
    Queue queue(executor);
    settle();
    const Visits quiet = queue.visits;
    for (u32 i = 0; i < 10; ++i) {
        machine.time += 20_ms;
        executor.turn();
    }
    EXPECT_EQ(queue.visits, quiet) << "nothing happened";

    executor.raise(queue);
    executor.raise(queue);
    executor.turn();
    EXPECT_EQ(queue.visits.drains, quiet.drains + 1) << "raised twice, taken once";
    EXPECT_EQ(queue.visits.arms, quiet.arms + 1);
    EXPECT_EQ(queue.visits.flushes, quiet.flushes);
    executor.turn();
    EXPECT_EQ(queue.visits.drains, quiet.drains + 1);
    executor.raise(queue);
    executor.turn();
    EXPECT_EQ(queue.visits.drains, quiet.drains + 2) << "and again";

    executor.poll(queue);
    executor.turn();
    EXPECT_EQ(queue.visits.drains, quiet.drains + 3) << "without anything to publish";
    EXPECT_EQ(queue.visits.flushes, quiet.flushes);

    // While arm() finds something, the service stays active and the processor does not sleep.
    const u64 idles = executor.idles();
    queue.found_by_arm = true;
    executor.touch(queue);
    executor.turn();
    EXPECT_EQ(executor.idles(), idles);
    EXPECT_EQ(queue.visits.flushes, quiet.flushes + 1);
    executor.turn();
    EXPECT_EQ(executor.idles(), idles + 1);
    EXPECT_EQ(queue.visits.drains, quiet.drains + 5);
    EXPECT_EQ(queue.visits.arms, quiet.arms + 5);
}

TEST_F(Turns, ActiveServicesAreDrainedInEachTurnUntilTheProcessorMaySleep) {
    Queue queue(executor);
    settle();
    const Visits before = queue.visits;
    executor.touch(queue);
    const auto busy = [](Executor& e) -> Task<Result<void>> {
        struct Again {
            Executor& executor;
            ReadyNode node{};
            bool await_ready() const { return false; }
            void await_suspend(std::coroutine_handle<> h) {
                node.waiter = h;
                executor.make_ready(node);
            }
            void await_resume() const {}
        };
        for (u32 i = 0; i < 50; ++i) {
            Again again{e};
            co_await again;
        }
        co_return Result<void>{};
    };
    ASSERT_TRUE(executor.run(busy(executor)));
    EXPECT_GE(queue.visits.drains, before.drains + 50);
    EXPECT_EQ(queue.visits.arms, before.arms) << "no processor was about to sleep";
}

TEST_F(Turns, WakeVisitsEveryService) {
    std::vector<std::unique_ptr<Queue>> queues;
    for (u32 i = 0; i < 20; ++i) {
        queues.push_back(std::make_unique<Queue>(executor));
    }
    settle();
    std::vector<u64> drains;
    for (const auto& queue : queues) {
        drains.push_back(queue->visits.drains);
    }
    for (u32 round = 1; round <= 3; ++round) {
        executor.wake();
        executor.turn();
        for (usize i = 0; i < queues.size(); ++i) {
            EXPECT_EQ(queues[i]->visits.drains, drains[i] + round);
        }
    }
}

// wake() also announces a condition that the loop tests between turns. Here it is called after the test and before the
// turn clears the wake flag, while an earlier wake() has not been taken: the processor must not sleep.
TEST(TurnsOfALoop, AConditionThatIsAnnouncedByWakeIsSeenBeforeTheProcessorSleeps) {
    for (const bool earlier : {false, true}) {
        struct Late {
            std::atomic<bool> stop{false};
            Executor* executor = nullptr;
            u64 readings = 0;
            bool earlier = false;
            bool slept = false;
        } late;
        late.earlier = earlier;
        Executor executor({&late,
                           [](void* c) -> Instant {
                               auto& self = *static_cast<Late*>(c);
                               if (++self.readings ==
                                   6) { // the first action of a turn; the last one of the turn before is a reading too
                                   if (self.earlier) {
                                       self.executor->wake();
                                   }
                                   self.stop.store(true, std::memory_order_release);
                                   self.executor->wake();
                               }
                               return 1000 + self.readings;
                           },
                           [](void* c, Instant, const std::atomic<bool>&) {
                               auto& self = *static_cast<Late*>(c);
                               self.slept = self.slept || self.stop.load(std::memory_order_acquire);
                           }});
        late.executor = &executor;
        executor.serve(late.stop);
        EXPECT_GE(late.readings, 6u);
        EXPECT_FALSE(late.slept) << earlier;
    }
}

TEST_F(Turns, AListenerRaisesTheServiceOfItsExecutorAlone) {
    Queue first(executor);
    Queue second(executor);
    Executor other(machine.platform());
    settle();
    Listener listener;
    EXPECT_FALSE(listener.is_set());
    EXPECT_FALSE(listener.raise_on(executor)) << "the handler wakes the whole executor then";
    listener.raise();
    listener.set(executor, first);
    EXPECT_FALSE(listener.raise_on(other));
    const u64 drains = first.visits.drains;
    EXPECT_TRUE(listener.raise_on(executor));
    executor.turn();
    EXPECT_EQ(first.visits.drains, drains + 1);
    listener.raise();
    executor.turn();
    EXPECT_EQ(first.visits.drains, drains + 2);
    listener.clear();
    EXPECT_FALSE(listener.raise_on(executor));
    listener.raise();
    listener.set(executor, second);
    const u64 of_second = second.visits.drains;
    EXPECT_TRUE(listener.raise_on(executor));
    executor.turn();
    EXPECT_EQ(first.visits.drains, drains + 2);
    EXPECT_EQ(second.visits.drains, of_second + 1);
}

TEST_F(Turns, ServicesThatAreRaisedMayBeRemoved) {
    Queue stays(executor);
    settle();
    const u64 drains = stays.visits.drains;
    {
        Queue goes(executor);
        settle();
        executor.raise(goes);
        executor.raise(stays);
        executor.touch(goes);
    } // removed together with all that are due
    executor.turn();
    EXPECT_EQ(stays.visits.drains, drains + 1) << "the flags beside it are not lost";
    {
        Queue again(executor);
        settle();
        const Visits before = again.visits;
        executor.remove(again);
        again.interrupt(); // a handler detached later
        executor.turn();
        EXPECT_EQ(again.visits, before);
        executor.add(again);
        executor.turn();
        EXPECT_EQ(again.visits.drains, before.drains + 1) << "new services are visited";
        executor.raise(again);
        executor.turn();
        EXPECT_EQ(again.visits.drains, before.drains + 2);
    }
    // Removed within the loop over the active services, each by its neighbour.
    struct Remover final : Service {
        Executor& executor;
        std::vector<Queue*> victims;
        explicit Remover(Executor& e) : executor(e) {}
        bool drain() override {
            for (Queue* victim : std::exchange(victims, {})) {
                executor.remove(*victim);
            }
            return false;
        }
    } remover(executor);
    std::array<std::unique_ptr<Queue>, 5> queues;
    for (usize i = 0; i < queues.size(); ++i) {
        queues[i] = std::make_unique<Queue>(executor);
        if (i == 2) {
            executor.add(remover);
        }
    }
    for (const auto& queue : queues) {
        remover.victims.push_back(queue.get());
    }
    executor.turn();
    executor.wake();
    executor.turn();
    for (usize i = 0; i < queues.size(); ++i) {
        EXPECT_EQ(queues[i]->visits.drains, i > 2 ? 1u : 0u) << i; // the last one added is visited first
    }
    executor.remove(remover);
}

// ---- ticks ----

TEST_F(Turns, APollingProcessorNeitherArmsNorSleepsWhileADeviceWorks) {
    Queue queue(executor);
    Queue idle(executor);
    executor.turn();
    executor.set_wait(Wait::poll);
    ReadyNode waiter;
    queue.submit(waiter);
    const u64 arms = queue.visits.arms;
    const u64 idles = executor.idles();
    for (u32 i = 0; i < 1000; ++i) {
        executor.turn();
    }
    EXPECT_EQ(queue.visits.arms, arms);
    EXPECT_EQ(executor.idles(), idles);
    EXPECT_GE(executor.polls(), 999u);
    queue.answered = true; // without an interrupt
    waiter.waiter = std::noop_coroutine();
    executor.turn();
    EXPECT_FALSE(queue.in_flight);
    executor.turn(); // resumes the waiter, and then there is nothing to poll for
    executor.turn();
    EXPECT_GT(executor.idles(), idles);
    EXPECT_EQ(queue.visits.arms, arms + 1);
}

TEST_F(Turns, AnAdaptiveProcessorPollsForAWindowAndThenSleeps) {
    Queue queue(executor);
    executor.turn();
    executor.set_wait(Wait::adaptive);
    ReadyNode waiter;
    queue.submit(waiter);
    const u64 idles = executor.idles();
    const Instant begun = executor.now();
    u64 turns = 0;
    while (executor.idles() == idles && ++turns < 1000) {
        machine.time += 1000;
        executor.turn();
    }
    EXPECT_GE(executor.now() - begun, Executor::poll_window);
    EXPECT_GE(turns, Executor::poll_window / 1000 - 1);
    EXPECT_LE(turns, Executor::poll_window / 1000 + 3);
    const u64 polls = executor.polls();
    queue.interrupt();
    waiter.waiter = std::noop_coroutine();
    executor.turn();
    EXPECT_FALSE(queue.in_flight) << "woken by its interrupt";
    EXPECT_EQ(executor.polls(), polls);
}

TEST_F(Turns, AnIdleMachineSleepsWithoutAnEnd) {
    Queue queue(executor);
    settle();
    EXPECT_EQ(machine.until, never);
    const u64 ticks = queue.visits.ticks;
    const u64 idles = executor.idles();
    const auto sleeps = [](Executor& e) -> Task<Result<void>> {
        co_await e.sleep(60_s);
        co_return Result<void>{};
    };
    ASSERT_TRUE(executor.run(sleeps(executor)));
    EXPECT_LE(executor.idles() - idles, 2u) << "a minute in one piece";
    EXPECT_EQ(queue.visits.ticks, ticks);
}

TEST_F(Turns, ATickForThoseThatWantOneAndOneMore) {
    Queue idle(executor);
    Queue used(executor);
    settle();
    const Visits idle_before = idle.visits;
    used.in_flight = true;
    executor.poll(used);
    executor.turn();
    const u64 ticks = used.visits.ticks;
    for (u32 i = 1; i <= 5; ++i) {
        EXPECT_LE(machine.until, machine.time + Executor::tick_length) << "the processor wakes for it";
        const u64 drains = used.visits.drains;
        executor.turn();
        EXPECT_EQ(used.visits.ticks, ticks + i);
        EXPECT_EQ(used.visits.drains, drains + 1) << "drained first: an interrupt may have got lost";
    }
    used.in_flight = false;
    executor.turn();
    EXPECT_EQ(used.visits.ticks, ticks + 6) << "once more, in which it may forget what it timed";
    executor.turn();
    executor.turn();
    EXPECT_EQ(used.visits.ticks, ticks + 6);
    EXPECT_EQ(machine.until, never);
    EXPECT_EQ(idle.visits, idle_before);
}

// A queue on a processor that never sleeps is ticked nevertheless.
TEST_F(Turns, TicksComeToAProcessorThatNeverSleeps) {
    Queue queue(executor);
    settle();
    queue.in_flight = true;
    executor.touch(queue);
    const u64 ticks = queue.visits.ticks;
    const auto busy = [](Executor& e, FakeMachine& m) -> Task<Result<void>> {
        struct Again {
            Executor& executor;
            ReadyNode node{};
            bool await_ready() const { return false; }
            void await_suspend(std::coroutine_handle<> h) {
                node.waiter = h;
                executor.make_ready(node);
            }
            void await_resume() const {}
        };
        for (u32 i = 0; i < 50; ++i) {
            m.time += 1_ms;
            Again again{e};
            co_await again;
        }
        co_return Result<void>{};
    };
    ASSERT_TRUE(executor.run(busy(executor, machine)));
    EXPECT_GE(queue.visits.ticks, ticks + 4);
    EXPECT_LE(queue.visits.ticks, ticks + 6);
    queue.in_flight = false;
}

// A bounded wait restarts after a stop of the machine, even if no service wants a tick.
TEST_F(Turns, ABoundNeedsTicks) {
    fl::test::CapturedLog log;
    Latch latch(executor);
    const auto waits = [](Executor& e, Latch& l) -> Task<Result<Nanoseconds>> {
        const Instant begun = e.now();
        if (co_await l.wait({e, 5_s})) {
            co_return Error{Code::busy, "somebody opened it"};
        }
        co_return e.now() - begun;
    };
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
    const auto waited = executor.run(waits(executor, latch));
    ASSERT_TRUE(waited);
    EXPECT_GE(*waited, 9_s);
    EXPECT_LT(*waited, 9_s + 200_ms);
    executor.turn();
    EXPECT_EQ(machine.until, never) << "and no other one does";
}

TEST_F(Turns, AnIntervalNeedsNone) {
    Latch latch(executor);
    const auto waits = [](Executor& e, Latch& l) -> Task<Result<bool>> {
        co_return co_await l.wait_until(after(e.now(), 30_s));
    };
    const u64 idles = executor.idles();
    EXPECT_FALSE(*executor.run(waits(executor, latch)));
    EXPECT_LE(executor.idles() - idles, 2u);
}

/// A transport whose device completes on command.
class Held : public TransportDefaults {
  public:
    using Disk = QueueDisk<Held>;
    using Command = fl::io::Command<Held>;
    struct Wire {};
    static constexpr std::string_view driver = "held";
    static constexpr u32 max_commands = 256;
    bool answers = false;

    void use(CommandTable<Held>&) {}
    Fit prepare(Command&) { return Fit::ok; }
    SendResult send(Command&, u64 id) {
        ids_.push_back(id);
        return SendResult::sent;
    }
    Next next(Completion& completion) {
        if (!answers || ids_.empty()) {
            return Next::none;
        }
        completion.id = ids_.back();
        ids_.pop_back();
        return Next::one;
    }
    bool finish(Command&, Status) { return true; }
    Fence fence(Command&) { return Fence::done; }
    Recovery recover(const Command&, OldestWait::Finding, std::string_view) { return {}; }

  private:
    std::vector<u64> ids_;
};
class HeldDisk final : public QueueDisk<Held> {
  public:
    BlockQueue<Held> queue;
    explicit HeldDisk(Executor& e) : QueueDisk(e, queue), queue(e) {
        set_geometry({.sectors = 1 << 20});
        queue.add(*this);
        queue.open(timeout());
    }
    ~HeldDisk() { queue.remove(*this); }
};

// 8,192 requests in flight in 32 queues: no timer is started for them, and a tick is one call per queue.
TEST_F(Turns, ATickWith8192RequestsInFlight) {
    constexpr u32 queues = 32;
    constexpr u32 each = Held::max_commands;
    std::vector<std::unique_ptr<HeldDisk>> disks;
    fl::test::HeapDma memory;
    const DmaSpan buffer = *memory.allocate(4096, ~u64{0});
    std::vector<std::unique_ptr<Request>> requests;
    for (u32 i = 0; i < queues; ++i) {
        disks.push_back(std::make_unique<HeldDisk>(executor));
        for (u32 n = 0; n < each; ++n) {
            requests.push_back(std::make_unique<Request>(*disks[i], Op::read, 8 * n, buffer));
            requests.back()->waiter = std::noop_coroutine();
            disks[i]->submit(*requests.back());
        }
    }
    ASSERT_EQ(requests.size(), 8192u);
    executor.turn();
    for (const auto& disk : disks) {
        ASSERT_EQ(disk->queue.in_flight(), each);
    }
    const u64 idles = executor.idles();
    for (u32 i = 0; i < 100; ++i) {
        const Instant before = machine.time;
        executor.turn(); // and sleeps until the next tick
        EXPECT_GE(machine.time - before, Executor::tick_length - 1000) << "the tick alone wakes it";
    }
    EXPECT_EQ(executor.idles(), idles + 100);
    for (const auto& disk : disks) {
        disk->queue.transport().answers = true;
        executor.raise(disk->queue);
    }
    executor.turn();
    executor.turn();
    for (const auto& request : requests) {
        EXPECT_EQ(request->status, Status::ok);
    }
    settle();
    EXPECT_EQ(machine.until, never) << "nothing is in flight, nothing can expire";
    disks.clear();
    memory.free(buffer);
}

// ---- raised on other processors ----

// Three threads raise three of many services at arbitrary times while the owner really sleeps: each raise is drained.
TEST_F(Turns, NoRaiseIsLost) {
    struct Real {
        std::atomic<bool> lost{false};
        const std::atomic<bool>* stop = nullptr;
    } real;
    Executor live(
        {&real, [](void*) { return static_cast<Instant>(std::chrono::steady_clock::now().time_since_epoch().count()); },
         [](void* c, Instant, const std::atomic<bool>& wake) {
             const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
             while (!wake.load(std::memory_order_acquire)) {
                 if (std::chrono::steady_clock::now() > limit) {
                     static_cast<Real*>(c)->lost = true;
                     return;
                 }
                 std::this_thread::yield();
             }
         }});
    struct Counted final : Service {
        std::atomic<u64> asked{0};
        std::atomic<u64> done{0};
        bool drain() override {
            done.store(asked.load(std::memory_order_relaxed), std::memory_order_release);
            return true;
        }
        bool wants_tick() const override { return false; }
    };
    std::array<Counted, 40> services;
    for (Counted& service : services) {
        live.add(service);
    }
    constexpr u64 rounds = 1500;
    std::atomic<u32> finished{0};
    std::vector<std::thread> others;
    for (u32 n = 0; n < 3; ++n) {
        others.emplace_back([&, n] {
            Counted& own = services[n * 13 + 1];
            for (u64 i = 1; i <= rounds && !real.lost; ++i) {
                own.asked.store(i, std::memory_order_relaxed);
                live.raise(own);
                while (own.done.load(std::memory_order_acquire) != i && !real.lost) {
                    std::this_thread::yield();
                }
            }
            finished.fetch_add(1);
            live.wake();
        });
    }
    while (finished != 3) {
        live.turn();
    }
    for (std::thread& other : others) {
        other.join();
    }
    EXPECT_FALSE(real.lost);
    for (u32 n = 0; n < 3; ++n) {
        EXPECT_EQ(services[n * 13 + 1].done, rounds);
    }
    for (Counted& service : services) {
        live.remove(service);
    }
}

// ---- timers ----

struct Entry : HeapLinks<Entry> {
    u64 due = 0;
    u64 number = 0;
    bool in = false;
};
u64 comparisons = 0;
struct Counting {
    bool operator()(const Entry& a, const Entry& b) const {
        ++comparisons;
        return a.due != b.due ? a.due < b.due : a.number < b.number;
    }
};
struct Order {
    bool operator()(const Entry* a, const Entry* b) const {
        return a->due != b->due ? a->due < b->due : a->number < b->number;
    }
};

TEST(TimerHeap, AgreesWithASortedSet) {
    std::mt19937 random(7);
    PairingHeap<Entry, Counting> heap;
    std::set<Entry*, Order> model;
    std::vector<Entry> entries(500);
    u64 number = 0;
    for (u32 i = 0; i < 200'000; ++i) {
        Entry& entry = entries[random() % entries.size()];
        if (random() % 997 == 0) { // all of them are added again later
            heap.take_all([&](Entry& each) {
                model.erase(&each);
                each.due += random() % 50;
                model.insert(&each);
                heap.add(each);
            });
        } else if (random() % 4 == 0 && !heap.empty()) {
            Entry& first = *heap.first();
            ASSERT_EQ(&first, *model.begin());
            heap.remove(first);
            model.erase(&first);
            first.in = false;
        } else if (!entry.in) {
            entry.due = random() % 300;
            entry.number = ++number;
            entry.in = true;
            heap.add(entry);
            model.insert(&entry);
        } else {
            heap.remove(entry);
            model.erase(&entry);
            entry.in = false;
        }
        ASSERT_EQ(heap.first(), model.empty() ? nullptr : *model.begin());
    }
}

// The cost of 8,192 requests with a bound each, in comparisons, which are independent of the machine.
TEST(TimerHeap, ComparisonsWith8192Timers) {
    constexpr u32 count = 8192; // 2^13
    std::mt19937 random(11);
    PairingHeap<Entry, Counting> heap;
    std::vector<Entry> entries(count);
    u64 number = 0;
    const auto start = [&](Entry& entry, u64 due) {
        entry.due = due;
        entry.number = ++number;
        const u64 before = comparisons;
        heap.add(entry);
        return comparisons - before;
    };
    u64 most = 0;
    for (u32 i = 0; i < count; ++i) { // equal bounds, started in sequence: the usual case
        most = std::max(most, start(entries[i], 5'000'000 + i));
    }
    EXPECT_LE(most, 1u) << "starting is one comparison";
    // Completions in random order: each timer is cancelled and restarted, as under load.
    u64 starting = 0;
    u64 cancelling = 0;
    constexpr u32 rounds = 100'000;
    for (u32 i = 0; i < rounds; ++i) {
        Entry& entry = entries[random() % count];
        const u64 before = comparisons;
        heap.remove(entry);
        cancelling += comparisons - before;
        starting += start(entry, 5'010'000 + i);
    }
    RecordProperty("comparisons_per_1000_starts", static_cast<int>(starting * 1000 / rounds));
    RecordProperty("comparisons_per_1000_cancels", static_cast<int>(cancelling * 1000 / rounds));
    EXPECT_EQ(starting, rounds);
    EXPECT_LE(cancelling, 2u * 13 * rounds) << "O(log n): 13 is the logarithm of 8,192";
    // All of them expire.
    const u64 before = comparisons;
    u64 last = 0;
    for (u32 i = 0; i < count; ++i) {
        Entry& first = *heap.first();
        ASSERT_GE(first.due, last);
        last = first.due;
        heap.remove(first);
    }
    RecordProperty("comparisons_per_1000_expiries", static_cast<int>((comparisons - before) * 1000 / count));
    EXPECT_LE(comparisons - before, 2u * 13 * count);
    EXPECT_TRUE(heap.empty());
}

TEST_F(Turns, TimersThatAreDueTogetherFireInOrderOfStart) {
    std::vector<int> order;
    const auto wait_for = [](Executor& e, Instant due, std::vector<int>& o, int which) -> Task<Result<void>> {
        Latch latch(e);
        static_cast<void>(co_await latch.wait_until(due));
        o.push_back(which);
        co_return Result<void>{};
    };
    const auto all = [&](TaskGroup& group) -> Task<Result<void>> {
        const Instant due = after(executor.now(), 50_ms);
        for (int i = 0; i < 200; ++i) {
            // every other one is due at the same time, the rest before or after
            const Instant at = i % 2 == 0 ? due : i % 4 == 1 ? due - 10_ms : due + 10_ms;
            EXPECT_TRUE(group.spawn(wait_for(executor, at, order, i)));
        }
        co_return co_await group.join();
    };
    TaskGroup group(executor);
    ASSERT_TRUE(executor.run(all(group)));
    std::vector<int> expected;
    for (const int rest : {1, 0, 3}) {
        for (int i = 0; i < 200; ++i) {
            if (rest == 0 ? i % 2 == 0 : i % 4 == rest) {
                expected.push_back(i);
            }
        }
    }
    EXPECT_EQ(order, expected);
}

// ---- coroutine frames of several processors ----

struct FramesTest : testing::Test {
    usize before = frame_pool().in_use();
    ~FramesTest() override {
        set_this_processor(0);
        EXPECT_EQ(frame_pool().in_use(), before);
    }
};

TEST_F(FramesTest, AProcessorServesItselfWithoutTheArena) {
    for (const usize size : {100u, 200u, 256u, 300u, 500u, 1000u}) {
        frame_pool().free(frame_pool().allocate(size), size); // the first one may come from the arena
        const u64 calls = frame_pool().arena_calls();
        const u64 allocations = frame_pool().allocations();
        for (u32 i = 0; i < 1000; ++i) {
            void* a = frame_pool().allocate(size);
            ASSERT_NE(a, nullptr);
            frame_pool().free(a, size);
        }
        EXPECT_EQ(frame_pool().arena_calls(), calls) << size;
        EXPECT_EQ(frame_pool().allocations(), allocations + 1000) << "and they are counted";
    }
    Task<Result<u64>> (*nested)(u32) = [](u32 depth) -> Task<Result<u64>> { co_return u64{depth}; };
    FakeMachine machine;
    Executor executor(machine.platform());
    ASSERT_TRUE(executor.run(nested(1)));
    const u64 calls = frame_pool().arena_calls();
    for (u32 i = 0; i < 100; ++i) {
        ASSERT_TRUE(executor.run(nested(i)));
    }
    EXPECT_EQ(frame_pool().arena_calls(), calls);
}

TEST_F(FramesTest, AFrameGoesToTheProcessorThatFreesIt) {
    constexpr usize size = 640; // a size not used by anything else
    set_this_processor(40);
    void* block = frame_pool().allocate(size);
    ASSERT_NE(block, nullptr);
    EXPECT_EQ(frame_pool().in_use(), before + 1);
    set_this_processor(41);
    frame_pool().free(block, size);
    EXPECT_EQ(frame_pool().in_use(), before);
    const u64 calls = frame_pool().arena_calls();
    void* again = frame_pool().allocate(size);
    EXPECT_EQ(again, block);
    EXPECT_EQ(frame_pool().arena_calls(), calls);
    set_this_processor(40);
    void* other = frame_pool().allocate(size);
    EXPECT_NE(other, block);
    EXPECT_EQ(frame_pool().arena_calls(), calls + 1) << "it had none";
    frame_pool().free(other, size);
    frame_pool().free(again, size);
}

/// Number of half-page blocks available now.
usize obtainable() {
    std::vector<void*> blocks;
    while (void* block = frame_pool().allocate(2048)) {
        blocks.push_back(block);
    }
    for (void* block : blocks) {
        frame_pool().free(block, 2048);
    }
    return blocks.size();
}
/// Allocates and frees a block on every processor.
void use_every_processor(usize size) {
    for (u32 processor = 0; processor < max_processors; ++processor) {
        set_this_processor(processor);
        frame_pool().free(frame_pool().allocate(size), size);
    }
    set_this_processor(0);
}

TEST_F(FramesTest, WhatProcessorsKeepIsBoundedAndComesBackWhenTheArenaIsEmpty) {
    static_cast<void>(obtainable()); // empties the arena: cached blocks are returned
    use_every_processor(128);
    const usize all = obtainable();
    use_every_processor(128); // as above
    constexpr usize size = 256;
    std::vector<void*> blocks;
    for (u32 i = 0; i < max_processors * 24; ++i) {
        void* block = frame_pool().allocate(size);
        ASSERT_NE(block, nullptr);
        blocks.push_back(block);
    }
    for (u32 i = 0; i < blocks.size(); ++i) {
        set_this_processor(i % max_processors);
        frame_pool().free(blocks[i], size);
    }
    set_this_processor(0);
    const usize rest = obtainable();
    const usize kept_pages = max_processors * FramePool::max_cached_blocks * size / FramePool::page_bytes;
    EXPECT_GE(rest, all - 2 * (kept_pages + 4)) << "no processor keeps more than a few";
    EXPECT_LE(rest, all - 2 * (kept_pages - 4)) << "and each keeps some";
    use_every_processor(128); // the arena was found empty
    EXPECT_GE(obtainable() + 2, all) << "all of it was freed";
}

// The last block is never one that the processor caches.
TEST_F(FramesTest, AnEmptyArenaTakesBackWhatTheProcessorKeeps) {
    set_this_processor(50);
    std::vector<void*> blocks;
    while (void* block = frame_pool().allocate(1024)) {
        blocks.push_back(block);
    }
    ASSERT_GE(blocks.size(), 100u);
    for (u32 i = 0; i < 4; ++i) { // the last page: as much as a processor caches
        frame_pool().free(blocks.back(), 1024);
        blocks.pop_back();
    }
    void* last = frame_pool().allocate(4096);
    EXPECT_NE(last, nullptr) << "one page was held by what this processor kept";
    EXPECT_EQ(frame_pool().allocate(4096), nullptr) << "and running out is an answer";
    EXPECT_EQ(frame_pool().allocate(1024), nullptr);
    if (last != nullptr) {
        frame_pool().free(last, 4096);
    }
    for (void* block : blocks) {
        frame_pool().free(block, 1024);
    }
}

} // namespace
