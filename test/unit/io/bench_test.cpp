#include "gtest_macros.hpp"
#include <cstdlib>
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
import io.histogram;
import io.random;
import io.bench;
#include "unit/io/support.hpp"

namespace {
// Counts every allocation of the test program, to assert that an I/O makes none.
std::atomic<fl::u64> heap_allocations{0};
fl::u64 count_heap_allocations() { return heap_allocations.load(); }
void* counted(std::size_t size, std::size_t alignment) {
    heap_allocations.fetch_add(1);
    void* block = nullptr;
    return posix_memalign(&block, std::max(alignment, sizeof(void*)), std::max<std::size_t>(size, 1)) == 0 ? block
                                                                                                           : nullptr;
}
} // namespace
namespace fl::test {
u64 all_allocations() { return count_heap_allocations(); } // for the conformance suite
} // namespace fl::test

void* operator new(std::size_t size) { return counted(size, 16); }
void* operator new[](std::size_t size) { return counted(size, 16); }
void* operator new(std::size_t size, std::align_val_t a) { return counted(size, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t size, std::align_val_t a) { return counted(size, static_cast<std::size_t>(a)); }
// The nothrow forms too: a sanitizer brings its own, which are not counted, and their blocks must not be passed to
// free().
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return counted(size, 16); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return counted(size, 16); }
void* operator new(std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
    return counted(size, static_cast<std::size_t>(a));
}
void* operator new[](std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
    return counted(size, static_cast<std::size_t>(a));
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete[](void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::test;

struct BenchTest : testing::Test {
    FakeMachine machine;
    Executor executor{machine.platform()};
    std::vector<std::byte> storage = std::vector<std::byte>(1024 * 4096);
    MemoryDisk disk{executor, storage.data(), storage.size()};
    HeapDma dma;
    std::unique_ptr<Bench> bench = std::make_unique<Bench>();
    usize frames = frame_pool().in_use();
    ~BenchTest() override {
        EXPECT_EQ(frame_pool().in_use(), frames);
        EXPECT_EQ(dma.outstanding, lost) << "buffers leaked";
    }
    u32 lost = 0;

    Result<BenchReport> run(std::string_view text, bool scratch = false) {
        const auto workload = parse_workload(text);
        EXPECT_TRUE(workload) << text;
        return executor.run(
            bench->run(disk, *workload, {.dma = &dma, .scratch = scratch, .allocations = count_heap_allocations}));
    }
};

TEST(WorkloadText, Parses) {
    const auto w = parse_workload("randrw,bs=128k,qd=8,count=500,seed=0x10,mix=30");
    ASSERT_TRUE(w);
    EXPECT_EQ(w->pattern, Pattern::randrw);
    EXPECT_EQ(w->bs, 131072u);
    EXPECT_EQ(w->qd, 8u);
    EXPECT_EQ(w->count, 500u);
    EXPECT_EQ(w->seed, 16u);
    EXPECT_EQ(w->mix, 30u);
    EXPECT_TRUE(w->writes());
    const auto d = parse_workload("randread");
    ASSERT_TRUE(d);
    EXPECT_EQ(d->bs, 4096u);
    EXPECT_EQ(d->count, 2000u);
    EXPECT_FALSE(d->writes());
    EXPECT_FALSE(parse_workload("randrw,mix=100")->writes());
}

TEST(WorkloadText, SaysWhatWasMeant) {
    const auto message = [](std::string_view text) {
        const auto w = parse_workload(text);
        return w ? std::string("accepted") : std::string(w.error().message);
    };
    EXPECT_NE(message("ranread").find("is randread meant?"), std::string::npos);
    EXPECT_NE(message("writes").find("is write meant?"), std::string::npos);
    EXPECT_NE(message("").find("There are randread"), std::string::npos);
    EXPECT_NE(message("read,cuont=1").find("is count= meant?"), std::string::npos);
    EXPECT_NE(message("read,sed=1").find("is seed= meant?"), std::string::npos);
    EXPECT_NE(message("read,a-key-of-more-than-sixteen-letters=1").find("unknown key"), std::string::npos);
    EXPECT_NE(message("read,bs=4x").find("need a number"), std::string::npos);
    EXPECT_NE(message("read,bs").find("need a number"), std::string::npos);
    EXPECT_NE(message("read,").find("unknown key"), std::string::npos);
    EXPECT_NE(message("read,bs=1000").find("multiple of 512"), std::string::npos);
    EXPECT_NE(message("read,bs=2m").find("at most 1m"), std::string::npos);
    EXPECT_NE(message("read,qd=0").find("1 to 256"), std::string::npos);
    EXPECT_NE(message("read,qd=4294967297").find("1 to 256"), std::string::npos);
    EXPECT_NE(message("read,count=0").find("count"), std::string::npos);
    EXPECT_NE(message("read,startdelay=1000000001").find("at most a second"), std::string::npos);
    EXPECT_NE(message("read,thinktime=1000001").find("at most a millisecond"), std::string::npos);
    EXPECT_NE(message("read,thinktine=1").find("is thinktime= meant?"), std::string::npos);
    EXPECT_NE(message("randrw,mix=101").find("percentage"), std::string::npos);
    EXPECT_NE(message("read,count=18446744073709551615k").find("need a number"), std::string::npos);
}

TEST_F(BenchTest, ReadsAtQueueDepth) {
    const auto r = run("randread,qd=32,count=2000");
    ASSERT_TRUE(r);
    EXPECT_EQ(r->errors, 0u);
    EXPECT_EQ(r->read.ios, 2000u);
    EXPECT_EQ(r->read.bytes, 2000u * 4096);
    EXPECT_EQ(r->write.ios, 0u);
    EXPECT_EQ(r->counters.submitted, 2000u);
    EXPECT_EQ(disk.max_in_flight, 32u);
    EXPECT_LE(r->counters.notifications, 2000u / 32 + 2) << "one for each turn, not for each request";
    EXPECT_GT(r->runtime_ns, 0u);
    EXPECT_GT(r->read.min, 0u);
    EXPECT_LE(r->read.min, r->read.mean);
    EXPECT_LE(r->read.mean, r->read.max);
    EXPECT_TRUE(std::is_sorted(r->read.percentiles.begin(), r->read.percentiles.end()));
}

// Recorded at a mark: the phase, and the I/Os submitted and completed so far.
struct Marked {
    u32 phase;
    u64 submitted;
    u64 completed;
    Instant at;
    bool operator==(const Marked&) const = default;
};
std::vector<Marked> marked;
BenchTest* marked_test = nullptr;

TEST_F(BenchTest, MarksLieAroundWhatIsMeasured) {
    marked.clear();
    marked_test = this;
    BenchOptions options{.dma = &dma, .allocations = count_heap_allocations};
    options.mark = [](u32 phase) {
        const Counters& counters = marked_test->disk.counters();
        marked.push_back({phase, counters.submitted, counters.completed, marked_test->executor.now()});
    };
    marked.reserve(4);
    for (u32 phase : {7u, 8u}) {
        options.phase = phase;
        const auto r = executor.run(bench->run(disk, *parse_workload("randread,qd=32,count=500"), options));
        ASSERT_TRUE(r);
        const Marked& begin = marked[marked.size() - 2];
        EXPECT_LE(r->runtime_ns, marked.back().at - begin.at);
        EXPECT_EQ(r->counters.submitted, 500u);
        EXPECT_EQ(r->allocations, 0u);
    }
    ASSERT_EQ(marked.size(), 4u);
    const u64 counts[]{0, 500, 500, 1000};
    const u32 phases[]{7, 0, 8, 0};
    for (usize i = 0; i < 4; ++i) {
        EXPECT_EQ(marked[i], (Marked{phases[i], counts[i], counts[i], marked[i].at})) << i;
    }
    EXPECT_FALSE(executor.run(bench->run(disk, *parse_workload("randwrite"), options))) << "the disk is no scratch";
    EXPECT_EQ(marked.size(), 4u) << "nothing was measured";
}

TEST_F(BenchTest, AllocatesNothingPerIo) {
    for (const char* text : {"randread,qd=1,count=1000", "randread,qd=32,count=5000", "randrw,qd=7,count=1000"}) {
        const auto r = run(text, true);
        ASSERT_TRUE(r);
        EXPECT_EQ(r->allocations, 0u) << text;
    }
    // Checks that the counter counts: the buffers are allocated before the measured part, but the counter sees them.
    const u64 before = count_heap_allocations();
    EXPECT_TRUE(dma.buffer(4096));
    EXPECT_EQ(count_heap_allocations(), before + 1);
}

TEST_F(BenchTest, EveryPatternTouchesWhatItShould) {
    std::memset(storage.data(), 0, storage.size());
    auto r = run("write,bs=4k,qd=4,count=100", true);
    ASSERT_TRUE(r);
    EXPECT_EQ(r->write.ios, 100u);
    EXPECT_NE(storage[0], std::byte{0});
    EXPECT_NE(storage[99 * 4096], std::byte{0});
    EXPECT_EQ(storage[100 * 4096], std::byte{0});
    r = run("randrw,count=1000,mix=70", true);
    ASSERT_TRUE(r);
    EXPECT_NEAR(static_cast<double>(r->read.ios), 700, 60);
    EXPECT_EQ(r->read.ios + r->write.ios, 1000u);
    r = run("read,bs=128k,qd=8,count=32");
    ASSERT_TRUE(r);
    EXPECT_EQ(r->read.bytes, 4u << 20);
}

TEST_F(BenchTest, AddressesAreWithinTheDiskAlignedAndTheSameForASeed) {
    const auto touched = [&](std::string_view text) {
        std::memset(storage.data(), 0, storage.size());
        EXPECT_TRUE(run(text, true));
        std::set<usize> blocks;
        for (usize i = 0; i < 1024; ++i) {
            if (storage[i * 4096] != std::byte{0}) {
                blocks.insert(i);
            }
        }
        return blocks;
    };
    const auto one = touched("randwrite,qd=1,count=300,seed=5");
    EXPECT_EQ(touched("randwrite,qd=32,count=300,seed=5"), one);
    EXPECT_NE(touched("randwrite,qd=1,count=300,seed=6"), one);
    EXPECT_GT(one.size(), 200u) << "spread out";
    EXPECT_GT(*one.rbegin(), 1000u);
}

TEST_F(BenchTest, RefusesBeforeAnythingIsSubmitted) {
    const auto refused = [&](std::string_view text, bool scratch, std::string_view why) {
        const auto r = run(text, scratch);
        ASSERT_FALSE(r) << text;
        EXPECT_EQ(r.error().code, Code::bad_argument);
        EXPECT_NE(r.error().message.find(why), std::string_view::npos) << r.error().message;
    };
    refused("randwrite", false, "scratch=");
    refused("randrw", false, "scratch=");
    refused("read,count=1025", false, "at most as many blocks of bs bytes as the disk has");
    EXPECT_EQ(run("read,count=1025", false).error().expected, 1024u);
    EXPECT_EQ(run("read,count=1025", false).error().seen, 1025u);
    disk.change_geometry().sectors = 7;
    refused("randread", false, "bs of a workload in bytes: at most the whole disk");
    EXPECT_EQ(run("randread", false).error().expected, 3584u);
    EXPECT_EQ(run("randread", false).error().seen, 4096u);
    disk.change_geometry().sectors = 8192;
    disk.change_geometry().sector_size = 4096;
    refused("randread,bs=512", false, "multiple of the disk's sector size");
    disk.change_geometry().sector_size = 512;
    disk.change_geometry().read_only = true;
    refused("write,count=1", true, "read-only");
    EXPECT_EQ(disk.counters().submitted, 0u);
}

TEST_F(BenchTest, NoBuffersOrFramesIsAnError) {
    dma.left = 3;
    auto r = run("randread,qd=8");
    ASSERT_FALSE(r);
    EXPECT_EQ(r.error().code, Code::exhausted);
    dma.left = ~0u;
    frame_pool().fail_after(6);
    r = run("randread,qd=8");
    frame_pool().fail_after(~u64{0});
    ASSERT_FALSE(r);
    EXPECT_EQ(r.error().code, Code::exhausted);
    EXPECT_EQ(disk.counters().submitted, 0u);
    EXPECT_TRUE(run("randread,qd=8"));
}

TEST_F(BenchTest, BadSectorsAreCountedAndTheRestIsDone) {
    disk.behaviour.fail_lba = 8;
    const auto r = run("read,qd=4,count=100");
    ASSERT_TRUE(r);
    EXPECT_EQ(r->errors, 1u);
    EXPECT_EQ(r->read.ios, 99u);
    ASSERT_TRUE(r->first_error);
    EXPECT_EQ(r->first_error->code, Code::io);
}

TEST_F(BenchTest, ADiskThatIsGoneEndsTheRun) {
    disk.behaviour.fail_lba = 8;
    disk.behaviour.fail_status = Status::device_gone;
    const auto r = run("read,qd=1,count=100");
    ASSERT_TRUE(r);
    EXPECT_EQ(r->read.ios, 1u);
    EXPECT_EQ(r->errors, 99u);
    EXPECT_EQ(disk.counters().submitted, 2u);
}

TEST_F(BenchTest, AHostThatNeverAnswersCostsOneTimeOutAndItsBuffers) {
    disk.behaviour.never_answers = true;
    const Instant begun = machine.time;
    const auto r = run("randread,qd=4,count=1000");
    ASSERT_TRUE(r);
    EXPECT_EQ(r->errors, 1000u);
    EXPECT_LT(machine.time - begun, 6_s);
    EXPECT_EQ(r->first_error->code, Code::timed_out);
    lost = 4; // the host may still write to them
}

TEST_F(BenchTest, LatencyIsWhatPassed) {
    disk.behaviour.latency = 100'000;
    const auto r = run("randread,qd=1,count=50");
    ASSERT_TRUE(r);
    EXPECT_GE(r->read.min, 100'000u - machine.step) << "the disk's latency begins with the turn";
    EXPECT_LT(r->read.max, 200'000u);
    EXPECT_GE(r->runtime_ns, 50u * (100'000 - machine.step));
}

TEST_F(BenchTest, AStartDelayComesBeforeTheFirstIo) {
    machine.step = 100;
    disk.behaviour.latency = 1000;
    const auto at_once = run("randread,qd=1,count=10");
    const Instant begun = machine.time;
    const auto later = run("randread,qd=1,count=10,startdelay=700000");
    ASSERT_TRUE(at_once && later);
    EXPECT_GE(machine.time - begun, 700'000u);
    EXPECT_LT(machine.time - begun, 900'000u);
    // a few clock readings
    EXPECT_NEAR(static_cast<double>(later->runtime_ns), static_cast<double>(at_once->runtime_ns), 500);
    EXPECT_EQ(later->thinktime_ns, 0u);
}

TEST_F(BenchTest, ThinkTimeIsDrawnFromTheSeedAndNotCounted) {
    machine.step = 100;
    disk.behaviour.latency = 1000;
    const auto without = run("randread,qd=1,count=640");
    const Instant begun = machine.time;
    const auto with = run("randread,qd=1,count=640,thinktime=50000");
    const Nanoseconds took = machine.time - begun;
    const auto again = run("randread,qd=1,count=640,thinktime=50000");
    const auto other = run("randread,qd=1,count=640,thinktime=50000,seed=2");
    const auto short_run = run("randread,qd=1,count=63,thinktime=50000");
    ASSERT_TRUE(without && with && again && other && short_run);
    EXPECT_GT(with->thinktime_ns, 10u * 10'000) << "ten pauses";
    EXPECT_LT(with->thinktime_ns, 10u * 50'200);
    EXPECT_NEAR(static_cast<double>(with->runtime_ns), static_cast<double>(without->runtime_ns),
                0.02 * static_cast<double>(without->runtime_ns))
        << "the disk's latency begins with the turn, so each pause hides a part of one";
    EXPECT_GE(took, with->runtime_ns + with->thinktime_ns);
    EXPECT_EQ(again->thinktime_ns, with->thinktime_ns);
    EXPECT_NE(other->thinktime_ns, with->thinktime_ns);
    EXPECT_EQ(short_run->thinktime_ns, 0u) << "after every 64 I/Os";
    CapturedLog log;
    print_record(disk, *with);
    EXPECT_TRUE(log.has("\"mix\":70,\"startdelay\":0,\"thinktime\":50000,\"thinktime_ns\":"));
}

// Where the host emulates the counter a reading is an exit: one for all that a turn has completed.
TEST_F(BenchTest, ReadsTheClockOnceForEverythingThatEndsTogether) {
    const u64 before = machine.readings;
    ASSERT_TRUE(run("randread,qd=32,count=3200")); // the disk answers at once, and reads the clock three times for each
    EXPECT_LE(machine.readings - before, 3 * 3200 + 3 * 3200 / 32 + 10);
}

TEST_F(BenchTest, TimeAsleepIsNotBusy) {
    EXPECT_FALSE(run("randread,qd=1,count=1")->busy_ns) << "it takes readings of the clock, and is counted on request";
    executor.time_sleep(true);
    const auto awake = run("randread,qd=4,count=100,thinktime=50000"); // the disk answers at once
    ASSERT_TRUE(awake);
    EXPECT_EQ(awake->sleeps, 0u);
    EXPECT_EQ(awake->busy_ns, awake->runtime_ns) << "neither has the pauses";
    disk.behaviour.each = 1'000'000; // found by the next tick
    const u64 idles = executor.idles();
    const auto asleep = run("randread,qd=1,count=20,startdelay=100000");
    ASSERT_TRUE(asleep);
    EXPECT_EQ(asleep->sleeps, executor.idles() - idles);
    EXPECT_GE(asleep->sleeps, 20u);
    EXPECT_LE(asleep->sleeps, 21u);
    EXPECT_GT(asleep->runtime_ns, 19 * Executor::tick_length);
    EXPECT_GT(asleep->busy_ns, 0u);
    EXPECT_LT(asleep->busy_ns, asleep->runtime_ns / 1000);
}

TEST_F(BenchTest, StolenTimeIsThatOfTheRunAndNamedOnlyIfItIsTold) {
    static std::optional<Nanoseconds> told;
    static Nanoseconds each = 0;
    const auto with_told = [&](std::optional<Nanoseconds> first, Nanoseconds more) {
        told = first;
        each = more;
        BenchOptions options{.dma = &dma};
        options.stolen = [] {
            const auto now = told;
            told = now ? std::optional(*now + each) : now;
            return now;
        };
        return *executor.run(bench->run(disk, *parse_workload("randread,qd=1,count=10"), options));
    };
    const auto record_of = [&](const BenchReport& report) {
        CapturedLog log;
        print_record(disk, report);
        return log.has("\"stolen_ns\":70,") ? 1 : log.has("stolen") ? 2 : 0;
    };
    EXPECT_EQ(record_of(with_told(1'000, 70)), 1) << "one reading before the run and one after it";
    EXPECT_EQ(with_told(1'000, Nanoseconds{0} - 5).stolen_ns, 0u) << "a host whose time goes backwards";
    EXPECT_EQ(record_of(with_told(std::nullopt, 0)), 0);
    const auto without = run("randread,qd=1,count=10");
    ASSERT_TRUE(without);
    EXPECT_EQ(without->stolen_ns, std::nullopt);
    EXPECT_EQ(record_of(*without), 0);
}

TEST_F(BenchTest, RecordHasEveryField) {
    const auto r = run("randread,qd=2,count=10");
    ASSERT_TRUE(r);
    CapturedLog log;
    print_record(disk, *r);
    for (const char* field : {"@{\"record\":\"result\"",
                              "\"disk\":\"mem0\"",
                              "\"driver\":\"memory\"",
                              "\"kind\":\"synthetic\"",
                              "\"workload\":\"randread\"",
                              "\"bs\":4096",
                              "\"qd\":2",
                              "\"count\":10",
                              "\"seed\":1",
                              "\"mix\":70",
                              "\"runtime_ns\":",
                              "\"errors\":0",
                              "\"device_accesses\":0",
                              "\"hypercalls\":0",
                              "\"notifications\":",
                              "\"interrupts\":0",
                              "\"allocations\":0",
                              "\"lanes\":1,\"sleeps\":0,\"read\"",
                              "\"read\":{\"ios\":10,\"bytes\":40960,\"lat_ns\":{\"min\":",
                              "\"N\":10",
                              "\"percentile\":{\"1.000000\":",
                              "\"99.500000\":",
                              "\"99.990000\":",
                              "\"write\":{\"ios\":0,",
                              "}}}}\n"}) {
        EXPECT_TRUE(log.has(field)) << field;
    }
    EXPECT_FALSE(log.text.truncated());
}

TEST_F(BenchTest, LatenciesStandBeforeTheResult) {
    const auto r = run("randread,qd=1,count=3");
    ASSERT_TRUE(r);
    auto counts = std::make_unique<Histogram>();
    counts->record(5);
    counts->record(7);
    counts->record(7);
    counts->record(300); // 256 to 511 in steps of two: the 23rd bucket of them
    auto report = *r;
    report.read.histogram = counts.get();
    CapturedLog log;
    print_record(disk, report);
    EXPECT_TRUE(log.has("@{\"record\":\"latencies\",\"disk\":\"mem0\",\"op\":\"read\",\"bucket\":5,\"counts\":[1,2,2,"
                        "271,1]}\n@{\"record\":\"result\""));
    EXPECT_FALSE(log.has("\"op\":\"write\"")); // nothing was written
}

TEST_F(BenchTest, LatenciesAreAllInRecordsOfBoundedLength) {
    const auto r = run("randread,qd=1,count=1");
    ASSERT_TRUE(r);
    auto counts = std::make_unique<Histogram>();
    std::map<usize, u64> wanted;
    for (usize i = 0; i < 1000; ++i) {
        const u64 value = Histogram::highest_of(i * 4);
        for (u64 times = 0; times <= i % 3; ++times) {
            counts->record(value);
            ++wanted[i * 4];
        }
    }
    auto report = *r;
    report.write.histogram = counts.get();
    report.read.histogram = nullptr;
    CapturedLog log;
    print_record(disk, report);
    ASSERT_FALSE(log.text.truncated());
    std::map<usize, u64> found;
    std::istringstream lines(std::string(log.text.view()));
    for (std::string line; std::getline(lines, line);) {
        EXPECT_LT(line.size(), 1024u + (line.find("\"result\"") == std::string::npos ? 0 : 1024)) << line;
        const auto begin = line.find("\"bucket\":");
        if (begin == std::string::npos) {
            continue;
        }
        usize bucket = std::stoul(line.substr(begin + 9));
        std::istringstream numbers(line.substr(line.find('[') + 1));
        u64 number = 0;
        char comma = 0;
        for (bool count = true; numbers >> number; count = !count, numbers >> comma) {
            count ? static_cast<void>(found[bucket] += number) : static_cast<void>(bucket += number);
        }
    }
    EXPECT_EQ(found, wanted);
}

TEST(Random, IsSplitMix64) {
    SplitMix64 r(1234567); // the first numbers of the reference implementation
    EXPECT_EQ(r.next(), 6457827717110365317u);
    EXPECT_EQ(r.next(), 3203168211198807973u);
    EXPECT_EQ(r.next(), 9817491932198370423u);
    for (int i = 0; i < 1000; ++i) {
        EXPECT_LT(r.below(7), 7u);
    }
}

} // namespace
