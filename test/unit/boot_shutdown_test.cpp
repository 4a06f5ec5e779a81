// An orderly end before the job is done.
#include <atomic>
#include <cstring>
#include <gtest/gtest.h>
#include <memory>
#include <optional>
#include <string>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.verdict;
import io.executor;
import io.task;
import io.block;
import io.shutdown;
import drivers.table;
import boot.options;
import boot.disks;
import boot.shutdown;

#include "unit/io_support.hpp"

namespace {
using namespace fl;

struct Kernel {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    drivers::Table table;
    drivers::Plan plan = table.plan(hv::VmGuest::hyperv, std::nullopt);
    boot::Disks disks{plan};
    std::vector<std::byte> data = std::vector<std::byte>(64 * 512);
    test::MemoryDisk disk{executor, data.data(), data.size()};
    io::Shutdown shutdown{executor};
    boot::Options options{};
    Kernel() {
        boot::Disks::Port port(disks, "storvsc");
        EXPECT_TRUE(port.announce(disk, boot::Disks::Port::no_twin));
    }
};

// Plays the driver that hears of the host's wish after a while.
io::Task<Result<void>> host(Kernel& k, bool& answered) {
    co_await k.executor.sleep(50'000'000);
    EXPECT_TRUE(k.shutdown.ask("the host"));
    EXPECT_FALSE(k.shutdown.ask("the host again")) << "the first one waits, and one alone may";
    const bool rested = co_await k.shutdown.rested({k.executor, 1'000'000'000});
    answered = rested && k.shutdown.at_rest();
    k.shutdown.answered();
    co_return Result<void>{};
}

io::Task<Result<boot::Outcome>> both(Kernel& k, bool& answered) {
    io::TaskGroup group(k.executor);
    static_cast<void>(group.spawn(host(k, answered)));
    auto outcome =
        co_await boot::run_until_shutdown(k.options, k.disks, {k.executor, k.dma, [] { return u64{0}; }}, k.shutdown);
    static_cast<void>(co_await group.join());
    co_return outcome;
}

TEST(Shutdown, TheJobEndsAndTheDisksAreAtRest) {
    Kernel k;
    k.options.job = boot::Job::idle;
    k.options.timeout = 60'000'000'000;
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(outcome->reason.view(), "shut down as the host asked");
    EXPECT_TRUE(answered);
    EXPECT_EQ(k.disk.flushes, 1u);
    EXPECT_LT(k.clock.time, 2'000'000'000u);
}

TEST(Shutdown, ADiskThatCannotBeFlushedIsAFailure) {
    Kernel k;
    k.options.job = boot::Job::idle;
    k.options.timeout = 60'000'000'000;
    k.disk.behaviour.never_answers = true;
    k.disk.set_timeout(100'000'000);
    bool answered = true;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::failure);
    EXPECT_FALSE(answered);
}

TEST(Shutdown, ADiskThatWasTakenAwayNeedsNoFlush) {
    Kernel k;
    k.options.job = boot::Job::idle;
    k.options.timeout = 60'000'000'000;
    k.disk.behaviour.removed = true;
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_TRUE(answered) << "the host is not refused for a disk that it took itself";
    EXPECT_EQ(k.disk.flushes, 0u);
}

TEST(Shutdown, AJobThatIsDoneEndsAsBefore) {
    Kernel k;
    const auto outcome = k.executor.run(
        boot::run_until_shutdown(k.options, k.disks, {k.executor, k.dma, [] { return u64{0}; }}, k.shutdown));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(outcome->reason.view(), "booted; disks: mem0");
    EXPECT_EQ(k.disk.flushes, 0u);
}

// A job whose requests are under way when the end is asked for.
struct Busy : Kernel {
    Busy() {
        options.job = boot::Job::boot; // reads the first block
        options.timeout = 1'000'000'000;
        disk.set_timeout(5'000'000'000);
    }
};

TEST(Shutdown, WhatIsUnderWayEndsBeforeTheJobDies) {
    Busy k;
    k.disk.behaviour.latency = 300'000'000; // asked for after 50 ms
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(k.disk.forgotten, 0u) << "the host had the buffer";
    EXPECT_EQ(k.disk.under_way(), 0u);
    EXPECT_EQ(k.disk.flushes, 1u);
    EXPECT_EQ(k.dma.outstanding, 0u);
    EXPECT_TRUE(answered);
}

TEST(Shutdown, MemoryThatTheHostMayStillReachIsGivenUp) {
    static Busy k; // what is given up stays
    k.disk.behaviour.never_answers = true;
    bool answered = true;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::failure);
    EXPECT_EQ(k.disk.forgotten, 0u);
    EXPECT_EQ(k.dma.outstanding, 1u) << "not freed";
}

TEST(Shutdown, AHeldDiskBeginsNothingButAFlush) {
    Kernel k;
    DmaBuffer buffer = *k.dma.buffer(4096);
    k.disk.hold();
    io::Request read(k.disk, io::Op::read, 0, buffer.span().subspan(0, 512));
    k.disk.submit(read);
    EXPECT_FALSE(read.pending());
    EXPECT_EQ(k.disk.under_way(), 0u);
    io::Request flush(k.disk, io::Op::flush, 0, {});
    k.disk.submit(flush);
    k.executor.turn();
    EXPECT_EQ(flush.status, io::Status::ok);
}

} // namespace
