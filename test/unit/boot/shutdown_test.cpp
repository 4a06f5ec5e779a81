// A shutdown request before the job is done.
#include "gtest_macros.hpp"
#if __has_feature(address_sanitizer)
#    include <sanitizer/lsan_interface.h>
#endif
import test.gtest;
import host.std;
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
import boot.sinks;
import drivers.driver;
import boot.shutdown;

#include "unit/io/support.hpp"

namespace {
using namespace fl;

struct Kernel {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    drivers::Table table;
    drivers::Plan plan = table.plan(hv::VmGuest::hyperv, std::nullopt);
    boot::Attached attached{plan};
    boot::Disks& disks = attached.disks;
    boot::DriverSinks storvsc{attached, "storvsc"};
    std::vector<std::byte> data = std::vector<std::byte>(64 * 512);
    test::MemoryDisk disk{executor, data.data(), data.size()};
    io::Shutdown shutdown{executor};
    boot::Options options{};
    Kernel() { EXPECT_TRUE(storvsc.disks.announce(disk, drivers::no_twin)); }
};

// Acts as the driver that receives the host's shutdown request after a while.
io::Task<Result<void>> host(Kernel& k, bool& answered) {
    co_await k.executor.sleep(50'000'000);
    EXPECT_TRUE(k.shutdown.request("the host"));
    EXPECT_FALSE(k.shutdown.request("the host again")) << "the first one waits, and only one may";
    static_cast<void>(co_await k.shutdown.await_quiesced());
    answered = k.shutdown.flushed();
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
    EXPECT_EQ(outcome->reason.view(), "shut down as requested by the host");
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

TEST(Shutdown, ARemovedDiskNeedsNoFlush) {
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

// A job with requests in flight when the shutdown is requested.
struct Busy : Kernel {
    Busy() {
        options.job = boot::Job::boot; // reads the first block
        options.timeout = 1'000'000'000;
        disk.set_timeout(5'000'000'000);
    }
};

TEST(Shutdown, RequestsInFlightEndBeforeTheJobIsDestroyed) {
    Busy k;
    k.disk.behaviour.latency = 300'000'000; // requested after 50 ms
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(k.disk.forgotten, 0u) << "the host had the buffer";
    EXPECT_EQ(k.disk.in_flight(), 0u);
    EXPECT_EQ(k.disk.flushes, 1u);
    EXPECT_EQ(k.dma.outstanding, 0u);
    EXPECT_TRUE(answered);
}

// LeakSanitizer ignores allocations made during its lifetime.
struct NoLeakCheck {
#if __has_feature(address_sanitizer)
    NoLeakCheck() { __lsan_disable(); }
    ~NoLeakCheck() { __lsan_enable(); }
#else
    NoLeakCheck() {} // nontrivial, so that the variable counts as used
#endif
    NoLeakCheck(const NoLeakCheck&) = delete;
    NoLeakCheck& operator=(const NoLeakCheck&) = delete;
};

TEST(Shutdown, MemoryThatTheHostMayStillAccessIsNotReused) {
    const NoLeakCheck given_up; // the job's memory is deliberately leaked, which this tests
    static Busy k;              // leaked memory remains in use
    k.disk.behaviour.never_answers = true;
    bool answered = true;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::failure);
    EXPECT_EQ(k.disk.forgotten, 0u);
    EXPECT_EQ(k.dma.outstanding, 1u) << "not freed";
}

// A job with 32 requests on a disk that takes 250 ms each: the request arrives after 50 ms, the last one completes
// after 8 s.
struct SlowDisk : Kernel {
    SlowDisk() {
        options.job = boot::Job::bench;
        options.timeout = 1'000'000'000;
        EXPECT_TRUE(options.workloads.add("randread,qd=32,count=64"));
        disk.behaviour.each = 250'000'000;
        disk.set_timeout(60'000'000'000);
    }
};

TEST(Shutdown, ASlowDiskThatAnswersIsWaitedFor) {
    SlowDisk k;
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(k.disk.max_in_flight, 32u);
    EXPECT_EQ(k.disk.counters().completed, 32u + 1u) << "nothing more was begun, but the flush";
    EXPECT_EQ(k.disk.counters().errors, 0u);
    EXPECT_EQ(k.disk.forgotten, 0u);
    EXPECT_EQ(k.dma.outstanding, 0u) << "the job's buffers were freed";
    EXPECT_TRUE(answered);
    EXPECT_GE(k.clock.time, 8'000'000'000u);
    EXPECT_LE(k.clock.time, 9'000'000'000u);
}

// Slow at first, then dead: detected one time-out after its last completion.
TEST(Shutdown, ASlowDiskThatStopsRespondingIsGivenUp) {
    static SlowDisk k;
    k.disk.set_timeout(20'000'000'000); // ends the flush
    static Instant died = 0;
    k.clock.on_idle = [](void*) {
        if (k.disk.counters().completed == 5 && died == 0) {
            k.disk.behaviour.never_answers = true;
            died = k.clock.time;
        }
    };
    static Instant given_up = 0;
    struct EventRecorder final : log::Sink {
        void write(std::string_view t) override {
            if (t.find("memory is given up") != t.npos) {
                given_up = k.clock.time;
            }
        }
    } capture;
    log::attach(capture);
    bool answered = true;
    const auto outcome = k.executor.run(both(k, answered));
    log::detach(capture);
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::failure);
    EXPECT_FALSE(answered) << "the host is not informed that the disks are flushed";
    ASSERT_NE(died, 0u);
    EXPECT_GE(given_up - died, 950'000'000u);
    EXPECT_LE(given_up - died, 1'050'000'000u);
    EXPECT_EQ(k.disk.forgotten, 0u);
}

// Disks of one host, and lanes of one disk, wait for each other: none is silent while another one makes progress.
TEST(Shutdown, ADiskQueuedAfterASlowOneIsNotSilent) {
    SlowDisk k;
    static SlowDisk* all = nullptr;
    static test::MemoryDisk* last = nullptr;
    std::vector<std::byte> data(64 * 512);
    test::MemoryDisk second{k.executor, data.data(), data.size()};
    all = &k;
    last = &second;
    second.rename("mem1");
    second.behaviour.never_answers = true;
    second.set_timeout(60'000'000'000);
    ASSERT_TRUE(k.storvsc.disks.announce(second, drivers::no_twin));
    k.clock.on_idle = [](void*) { last->behaviour.never_answers = all->disk.in_flight() != 0; };
    DmaBuffer buffer = *k.dma.buffer(4096);
    io::Request read(second, io::Op::read, 0, buffer.span().subspan(0, 512));
    second.submit(read);
    bool answered = false;
    const auto outcome = k.executor.run(both(k, answered));
    ASSERT_TRUE(outcome);
    EXPECT_EQ(outcome->verdict, Verdict::success);
    EXPECT_EQ(read.status, io::Status::ok);
    EXPECT_TRUE(answered);
    EXPECT_GE(k.clock.time, 8'000'000'000u);
}

TEST(Shutdown, AHeldDiskBeginsNothingButAFlush) {
    Kernel k;
    DmaBuffer buffer = *k.dma.buffer(4096);
    k.disk.hold();
    io::Request read(k.disk, io::Op::read, 0, buffer.span().subspan(0, 512));
    k.disk.submit(read);
    EXPECT_FALSE(read.pending());
    EXPECT_EQ(k.disk.in_flight(), 0u);
    io::Request flush(k.disk, io::Op::flush, 0, {});
    k.disk.submit(flush);
    k.executor.turn();
    EXPECT_EQ(flush.status, io::Status::ok);
}

} // namespace
