// What counts as silence on an IDE channel: machine time only, and only for the command in progress.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"

#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;
import core.log;

namespace {
using namespace ata_test;

constexpr Nanoseconds timeout = 100'000'000; // as in Machine

struct AtaTime : testing::Test {
    Machine m;
    Drive* drive = nullptr;
    std::vector<std::unique_ptr<io::Request>> requests;

    void SetUp() override {
        drive = &m.add(m.primary, 0);
        ASSERT_TRUE(m.attach());
    }
    /// `count` reads, adjacent or not, all submitted at once.
    void ask(u32 count, bool neighbours = false) {
        const DmaSpan b = *m.memory.allocate(count * 4096, ~u64{0});
        for (u32 i = 0; i < count; ++i) {
            requests.push_back(std::make_unique<io::Request>(m.disk(0), io::Op::read, 1000 + (neighbours ? 8 : 100) * i,
                                                             b.subspan(4096 * i, 4096)));
            requests.back()->waiter = std::noop_coroutine();
            m.disk(0).submit(*requests.back());
        }
    }
    bool all_ended() {
        return m.turns_until([&] { return std::ranges::none_of(requests, [](const auto& r) { return r->pending(); }); },
                             600'000'000'000);
    }
    void all_ok() {
        ASSERT_TRUE(all_ended());
        for (const auto& r : requests) {
            EXPECT_EQ(r->status, io::Status::ok) << r->lba;
        }
        EXPECT_EQ(m.primary.resets, 0u);
        EXPECT_EQ(m.queue().resets(), 0u);
        EXPECT_EQ(m.queue().lost_interrupts(), 0u);
        EXPECT_FALSE(m.queue().closed());
    }
};

TEST_F(AtaTime, ASlowDiskIsNeverReset) {
    m.primary.latency = timeout * 6 / 10;
    ask(32); // the last one completes after 19 time-outs
    all_ok();
    EXPECT_GE(m.clock.time, 32 * m.primary.latency);
}

// A disk of limited bandwidth: one request takes a fifth of the time-out, 32 adjacent ones in one command would take
// six.
TEST_F(AtaTime, GatheringDoesNotOutlastTheTimeOut) {
    m.primary.latency_per_sector = timeout / 5 / 8;
    ask(1);
    all_ok();
    requests.clear();
    ask(32, true);
    all_ok();
    m.primary.latency_per_sector = 0; // fast again: the next commands gather more and more requests
    requests.clear();
    ask(32, true);
    const u64 before = m.primary.commands;
    all_ok();
    EXPECT_LE(m.primary.commands - before, 8u);
}

// A completed command whose interrupt is lost is not silence, however late in the time-out it completes, and wherever
// between two ticks.
TEST_F(AtaTime, ALostInterruptAtTheEndOfTheTimeOutIsNoSilence) {
    constexpr Nanoseconds ms = 1'000'000;
    for (Nanoseconds phase = 0; phase < 10 * ms; phase += ms) {
        for (Nanoseconds latency = timeout - 12 * ms; latency < timeout; latency += ms) {
            Machine fresh;
            fresh.add(fresh.primary, 0);
            ASSERT_TRUE(fresh.attach());
            fresh.clock.time += phase;
            fresh.primary.latency = latency;
            fresh.primary.lose_interrupt = 1;
            EXPECT_TRUE(fresh.read(fresh.disk(0), 5, *fresh.memory.allocate(4096, ~u64{0}))) << phase << " " << latency;
            EXPECT_EQ(fresh.queue().lost_interrupts(), 1u) << phase << " " << latency;
            EXPECT_EQ(fresh.primary.resets, 0u) << phase << " " << latency;
        }
    }
}

TEST_F(AtaTime, AStoppedMachineIsNoSilentDisk) {
    for (const u32 depth : {1u, 32u}) {
        for (const Nanoseconds length : {7'000'000'000u, 60'000'000'000u}) {
            for (const Nanoseconds when : {1'000'000u, 25'000'000u, 45'000'000u, 65'000'000u}) {
                m.primary.latency = 50'000'000;
                m.clock.at(m.clock.time + when, [this, length] { m.clock.time += length; });
                ask(depth);
                all_ok();
                requests.clear();
            }
        }
    }
}

// Stops of less than a second, one per command: the disk needs nearly the whole time-out for a command and is stopped
// together with the machine. Each stop counts as a step of machine time, so without a restart of the bound the disk
// would be considered silent.
TEST(AtaStops, ShortStopsOfASlowDiskLoseNothing) {
    for (const Nanoseconds limit : {Nanoseconds{500'000'000}, Nanoseconds{5'000'000'000}}) {
        for (const u32 depth : {1u, 32u}) {
            for (const Nanoseconds length : {200'000'000u, 600'000'000u, 1'000'000'000u}) {
                for (const Nanoseconds when : {10'000'000u, 250'000'000u, 440'000'000u}) {
                    Machine m(limit);
                    m.add(m.primary, 0);
                    ASSERT_TRUE(m.attach());
                    m.primary.latency = limit - 50'000'000;
                    u32 stops = 0;
                    std::function<void()> stop = [&] {
                        ++stops;
                        m.clock.stop(length);
                        m.clock.at(m.clock.time + m.primary.latency, stop);
                    };
                    m.clock.at(m.clock.time + when, stop);
                    std::vector<std::unique_ptr<io::Request>> requests;
                    const DmaSpan buffer = *m.memory.allocate(depth * 4096, ~u64{0});
                    for (u32 i = 0; i < depth; ++i) {
                        requests.push_back(std::make_unique<io::Request>(m.disk(0), io::Op::read, 1000 + 100 * i,
                                                                         buffer.subspan(4096 * i, 4096)));
                        requests.back()->waiter = std::noop_coroutine();
                        m.disk(0).submit(*requests.back());
                    }
                    const auto ended = [](const auto& r) { return !r->pending(); };
                    ASSERT_TRUE(m.turns_until([&] { return std::ranges::all_of(requests, ended); }, 600'000'000'000));
                    for (const auto& r : requests) {
                        EXPECT_EQ(r->status, io::Status::ok) << r->lba;
                    }
                    EXPECT_GE(stops, depth);
                    EXPECT_EQ(m.queue().resets(), 0u) << limit << ", " << length << " after " << when;
                    EXPECT_FALSE(m.queue().closed());
                }
            }
        }
    }
}

TEST_F(AtaTime, ADeadDiskIsFoundInMachineTimeAlsoWithStops) {
    for (const u32 stops : {0u, 1u, 5u}) {
        Machine fresh;
        fresh.add(fresh.primary, 0);
        ASSERT_TRUE(fresh.attach());
        fresh.primary.hang = 1;
        io::Request request(fresh.disk(0), io::Op::read, 5, *fresh.memory.allocate(4096, ~u64{0}));
        fresh.disk(0).submit(request);
        const Instant begin = fresh.executor.now();
        Instant next = fresh.clock.time + timeout / 2;
        for (u32 left = stops; request.pending() && fresh.executor.now() - begin < 20 * timeout;) {
            if (left != 0 && fresh.clock.time >= next) {
                --left;
                fresh.clock.time += 7'000'000'000;
                static_cast<void>(fresh.executor.now());
                next = fresh.clock.time + timeout / 2;
            }
            fresh.executor.turn();
        }
        EXPECT_EQ(request.status, io::Status::timed_out);
        EXPECT_EQ(fresh.queue().resets(), 1u);
        const Nanoseconds took = fresh.executor.now() - begin;
        EXPECT_GE(took, timeout);
        EXPECT_LE(took, stops == 0 ? timeout + 30'000'000 : 2 * timeout + MachineTime::longest_step + 30'000'000)
            << stops << " stops";
    }
}

// A disk is busy after a reset when the machine is stopped: its time restarts, and it is not closed.
TEST_F(AtaTime, AStopDuringAResetIsNoSilentDisk) {
    constexpr Nanoseconds stop = 7'000'000'000;
    m.primary.hang = 1; // reset after one time-out
    m.primary.reset_latency = 30'000'000 + stop + 30'000'000;
    ask(1);
    ASSERT_TRUE(m.turns_until([&] { return m.primary.resets == 1; }));
    m.clock.at(m.clock.time + 30'000'000, [&] { m.clock.time += stop; });
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(requests[0]->status, io::Status::timed_out);
    requests.clear();
    ask(1);
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(requests[0]->status, io::Status::ok);
    EXPECT_FALSE(m.queue().closed());
    EXPECT_EQ(m.queue().resets(), 1u);
}

// A command with several requests is not completed: only the request that causes the silence ends as timed_out.
TEST_F(AtaTime, GatheredNeighboursAreTriedAlone) {
    m.primary.hang = 2; // the gathered one, and the first of its requests
    ask(8, true);
    ASSERT_TRUE(all_ended());
    for (u32 i = 0; i < 8; ++i) {
        EXPECT_EQ(requests[i]->status, i == 0 ? io::Status::timed_out : io::Status::ok) << i;
    }
    EXPECT_EQ(m.queue().resets(), 2u);
    EXPECT_FALSE(m.queue().closed());
}

} // namespace
