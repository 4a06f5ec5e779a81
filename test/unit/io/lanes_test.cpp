#include "gtest_macros.hpp"
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
import test.gtest;
import host.std;
import core.result;
import core.processor;
import core.time;
import core.dma;
import core.text;
import io.task;
import io.executor;
import io.block;
import io.verify;
import io.bench;
#include "unit/io/processors.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::ThreadPlatform;
using fl::test::ThreadProcessor;

struct Dma final : DmaAllocator {
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u32 rounded = (size + 4095) & ~4095u;
        void* p = std::aligned_alloc(4096, rounded);
        return DmaSpan{static_cast<std::byte*>(p), reinterpret_cast<u64>(p), size};
    }
    void free(DmaSpan span) override { std::free(span.data); }
};

/// Shared by the lanes of one disk: bytes that only each sector's owner writes while they run.
struct Platter {
    std::vector<std::byte> bytes;
    u64 bad_lba = ~u64{0}; // reads of it fail
    Status bad_status = Status::io_error;
    u64 corrupt_lba = ~u64{0}; // one of its bytes is corrupted
};

class Lane final : public BlockDevice {
  public:
    Lane(Executor& executor, Platter& platter) : BlockDevice(executor), platter_(platter) {
        identity_.name = FixedText<16>("lanes0");
        geometry_.sectors = platter.bytes.size() / 512;
        geometry_.flush = true;
    }
    std::vector<Lane*> others;
    u64 wrong_processor = 0;
    u64 flushes = 0;
    u64 first_written = ~u64{0};
    u64 last_written = 0;
    std::vector<u64> lbas_read;
    std::chrono::milliseconds delay{0}; // of each read

    u32 queues() const override { return static_cast<u32>(others.size()) + 1; }
    BlockDevice& queue_lane(u32 index) override { return index == 0 ? *this : *others[index - 1]; }

  protected:
    void start(Request& r) override {
        wrong_processor += this_processor() != executor().processor();
        std::byte* at = platter_.bytes.data() + r.lba * 512;
        if (r.op == Op::flush) {
            ++flushes;
        } else if (r.op == Op::write) {
            first_written = std::min(first_written, r.lba);
            last_written = std::max(last_written, r.lba);
            std::memcpy(at, r.buffer.data, r.buffer.size);
        } else if (lbas_read.push_back(r.lba); r.lba == platter_.bad_lba) {
            return complete(r, platter_.bad_status);
        } else {
            std::this_thread::sleep_for(delay);
            std::memcpy(r.buffer.data, at, r.buffer.size);
            if (r.lba == platter_.corrupt_lba) {
                r.buffer.data[77] ^= std::byte{4};
            }
        }
        complete(r, Status::ok);
    }
    bool cancel_now(Request&) override { return false; }
    void forget(Request&) override {}

  private:
    Platter& platter_;
};

struct Lanes : testing::Test {
    usize before = frame_pool().in_use();
    Dma dma;
    Platter platter{std::vector<std::byte>(1024 * 1024 + 4096)};
    ThreadPlatform platform;
    Executor home{platform.platform(), 0};
    ThreadProcessor one{1};
    ThreadProcessor two{2};
    Lane disk{home, platter};
    Lane lane1{one.executor, platter};
    Lane lane2{two.executor, platter};
    Lanes() { disk.others = {&lane1, &lane2}; }
    ~Lanes() override {
        one.stop();
        two.stop();
        EXPECT_EQ(frame_pool().in_use(), before);
        EXPECT_EQ(disk.wrong_processor + lane1.wrong_processor + lane2.wrong_processor, 0u)
            << "a request on another processor than its lane's";
        EXPECT_EQ(platform.overslept + one.platform.overslept + two.platform.overslept, 0u);
    }
    VerifyReport verify_all(VerifyPlan plan) {
        auto result = home.run(verify(disk, plan, dma));
        EXPECT_TRUE(result);
        return *result;
    }
};

TEST_F(Lanes, VerifyCoversTheDiskInRegions) {
    const VerifyReport report = verify_all({.qd = 4, .scratch = true});
    EXPECT_EQ(report.lanes, 3u);
    EXPECT_TRUE(report.ok());
    EXPECT_EQ(report.blocks, 257u);
    EXPECT_EQ(report.written, 257u);
    EXPECT_EQ(report.read, 257u);
    for (u64 block = 0; block < 257; ++block) { // the image is the same as with one lane
        EXPECT_EQ(check_stamp(std::span(platter.bytes).subspan(block * 4096, 4096), {.lba = block * 8}).what,
                  Mismatch::none)
            << block;
    }
    EXPECT_EQ(disk.first_written, 0u);
    EXPECT_EQ(disk.last_written, 85u * 8);
    EXPECT_EQ(lane1.first_written, 86u * 8);
    EXPECT_EQ(lane1.last_written, 171u * 8);
    EXPECT_EQ(lane2.first_written, 172u * 8);
    EXPECT_EQ(lane2.last_written, 256u * 8);
    EXPECT_EQ(disk.flushes + lane1.flushes + lane2.flushes, 3u) << "each lane flushes what it has written";
}

TEST_F(Lanes, VerifyReportsTheErrorsOfEveryLane) {
    platter.corrupt_lba = 200 * 8;
    VerifyReport report = verify_all({.scratch = true});
    EXPECT_FALSE(report.ok());
    EXPECT_EQ(report.bad, 1u);
    ASSERT_EQ(report.bad_blocks().size(), 1u);
    EXPECT_EQ(report.bad_blocks()[0].lba, 200u * 8);
    EXPECT_EQ(report.bad_blocks()[0].check.what, Mismatch::crc);
    platter.corrupt_lba = ~u64{0};
    platter.bad_lba = 100 * 8;
    report = verify_all({.scratch = true});
    EXPECT_EQ(report.read, 256u);
    ASSERT_TRUE(report.first_error);
    EXPECT_EQ(report.first_error->code, Code::io);
}

// A lane lists its first eight bad blocks and counts all; so does the whole.
TEST_F(Lanes, VerifyCountsMoreBadBlocksThanItLists) {
    ASSERT_TRUE(verify_all({.scratch = true}).ok());
    for (u64 block = 90; block < 110; ++block) { // of the second lane
        platter.bytes[block * 4096 + 100] ^= std::byte{1};
    }
    platter.bytes[250 * 4096 + 100] ^= std::byte{1}; // of the third
    const VerifyReport report = verify_all({.write = false});
    EXPECT_EQ(report.bad, 21u);
    ASSERT_EQ(report.bad_blocks().size(), 8u);
    for (u64 i = 0; i < 8; ++i) {
        EXPECT_EQ(report.bad_blocks()[i].lba, (90 + i) * 8);
    }
}

TEST_F(Lanes, VerifyOfFewBlocksUsesFewLanes) {
    EXPECT_EQ(verify_all({.count = 2, .scratch = true}).lanes, 2u);
    EXPECT_EQ(verify_all({.count = 1, .scratch = true}).lanes, 1u);
}

struct LanesBench : Lanes {
    std::unique_ptr<Bench> runners[3]{std::make_unique<Bench>(), std::make_unique<Bench>(), std::make_unique<Bench>()};
    Bench* list[3]{runners[0].get(), runners[1].get(), runners[2].get()};
    Result<BenchReport> run(const char* workload, u32 lanes) {
        return home.run(Bench::run_lanes(std::span<Bench* const>(list).first(lanes), disk, *parse_workload(workload),
                                         {.dma = &dma, .scratch = true}));
    }
};

TEST_F(LanesBench, SharesTheWorkOut) {
    for (Executor* each : {&home, &disk.lane(1).executor(), &disk.lane(2).executor()}) {
        each->time_sleep(true);
    }
    const auto report = run("randread,qd=4,count=1000", 3);
    ASSERT_TRUE(report);
    EXPECT_EQ(report->lanes, 3u);
    EXPECT_EQ(report->read.ios, 1000u);
    EXPECT_EQ(report->errors, 0u);
    EXPECT_EQ(report->counters.completed, 1000u);
    EXPECT_EQ(disk.counters().completed, 334u);
    EXPECT_EQ(lane1.counters().completed, 333u);
    EXPECT_EQ(lane2.counters().completed, 333u);
    EXPECT_EQ(report->allocations, 0u) << "frames are taken before the lanes begin";
    EXPECT_GE(report->runtime_ns, report->read.max);
    EXPECT_GT(report->busy_ns, 0u);
    EXPECT_LE(report->busy_ns, 3 * report->runtime_ns) << "of three processors";
}

TEST_F(LanesBench, OnePairOfMarksForAllLanes) {
    static std::vector<u32> marks; // the first belongs to another processor; read after all have ended
    marks.clear();
    marks.reserve(2);
    static LanesBench* self;
    static std::vector<u64> done;
    self = this;
    done.clear();
    done.reserve(2);
    const auto mark = [](u32 phase) {
        marks.push_back(phase);
        done.push_back(self->disk.counters().completed + self->lane1.counters().completed +
                       self->lane2.counters().completed);
    };
    const BenchOptions options{.dma = &dma, .scratch = true, .mark = mark, .phase = 3};
    ASSERT_TRUE(home.run(Bench::run_lanes(list, disk, *parse_workload("randread,qd=4,count=1000"), options)));
    EXPECT_EQ(marks, (std::vector<u32>{3, 0}));
    EXPECT_EQ(done, (std::vector<u64>{0, 1000}));
    EXPECT_FALSE(home.run(Bench::run_lanes(list, disk, *parse_workload("randread,count=2"), options)));
    EXPECT_EQ(marks.size(), 2u) << "nothing was measured";
}

TEST_F(LanesBench, StolenTimeIsThatOfAllProcessors) {
    static thread_local bool here = false;
    static std::atomic<bool> told_here{true};
    here = true; // not on the other processors
    BenchOptions options{.dma = &dma, .scratch = true};
    options.stolen = []() -> std::optional<Nanoseconds> {
        static thread_local Nanoseconds told = 0;
        return here && !told_here.load() ? std::nullopt : std::optional(told += 10);
    };
    auto report = home.run(Bench::run_lanes(list, disk, *parse_workload("randread,qd=4,count=100"), options));
    ASSERT_TRUE(report);
    EXPECT_EQ(report->stolen_ns, 30u);
    told_here.store(false);
    report = home.run(Bench::run_lanes(list, disk, *parse_workload("randread,qd=4,count=100"), options));
    ASSERT_TRUE(report);
    EXPECT_EQ(report->stolen_ns, std::nullopt) << "one of them is not told it";
}

TEST_F(LanesBench, SequentialInStretches) {
    const auto report = run("write,qd=2,count=240", 3);
    ASSERT_TRUE(report);
    EXPECT_EQ(report->write.ios, 240u);
    EXPECT_EQ(disk.first_written, 0u);
    EXPECT_EQ(disk.last_written, 79u * 8);
    EXPECT_EQ(lane1.first_written, 85u * 8);
    EXPECT_EQ(lane1.last_written, (85u + 79) * 8);
    EXPECT_EQ(lane2.first_written, 170u * 8);
}

TEST_F(LanesBench, ErrorsOfAnyLaneCount) {
    platter.bad_lba = 0;
    const auto report = run("read,qd=1,count=90", 3); // block 0 belongs to the first lane
    ASSERT_TRUE(report);
    EXPECT_EQ(report->errors, 1u);
    EXPECT_EQ(report->read.ios, 89u);
    ASSERT_TRUE(report->first_error);
    EXPECT_EQ(report->first_error->code, Code::io);
}

TEST_F(LanesBench, WhatIsNotStartedAfterAnErrorIsAnErrorToo) {
    platter.bad_lba = 0;
    platter.bad_status = Status::device_gone;
    const auto report = run("read,qd=1,count=90", 3); // the first of the first lane's 30 fails
    ASSERT_TRUE(report);
    EXPECT_EQ(disk.counters().submitted, 1u);
    EXPECT_EQ(report->errors, 30u);
    EXPECT_EQ(report->read.ios, 60u);
    ASSERT_TRUE(report->first_error);
    EXPECT_EQ(report->first_error->code, Code::device_gone);
}

TEST_F(LanesBench, EachLaneHasASeedOfItsOwn) {
    ASSERT_TRUE(run("randread,qd=1,count=300,seed=7", 3));
    const std::vector<u64> first = disk.lbas_read;
    const std::vector<u64> second = lane1.lbas_read;
    ASSERT_EQ(first.size(), 100u);
    ASSERT_EQ(second.size(), 100u);
    EXPECT_NE(first, second);
    EXPECT_NE(first, lane2.lbas_read);
    EXPECT_NE(second, lane2.lbas_read);
    for (Lane* lane : {&disk, &lane1, &lane2}) {
        lane->lbas_read.clear();
    }
    ASSERT_TRUE(run("randread,qd=1,count=300,seed=8", 3));
    EXPECT_EQ(disk.lbas_read, second) << "seed + lane";
}

TEST_F(LanesBench, ItEndsWithTheSlowestLane) {
    lane1.delay = std::chrono::milliseconds(20);
    const auto report = run("read,qd=1,count=9", 3);
    ASSERT_TRUE(report);
    EXPECT_GE(report->runtime_ns, 3u * 20'000'000);
    EXPECT_GE(report->read.max, 20'000'000u);
}

// Two processors in one thread: the second one runs while the first one sleeps, or never. Each reading of their clock
// takes a millisecond.
struct LateLane : testing::Test {
    usize frames = frame_pool().in_use();
    Instant time = 1'000'000'000;
    Dma dma;
    Platter platter{std::vector<std::byte>(1024 * 1024)};
    Executor home{platform(), 0};
    Executor other{platform(), 1};
    Lane disk{home, platter};
    Lane lane1{other, platter};
    std::unique_ptr<Bench> first = std::make_unique<Bench>();
    std::unique_ptr<Bench> second = std::make_unique<Bench>();
    LateLane() {
        disk.others = {&lane1};
        alarm(60); // ends the program if a wait without a bound does not even read the clock
    }
    ~LateLane() override {
        alarm(0);
        EXPECT_EQ(frame_pool().in_use(), frames);
    }

    Platform platform() {
        return {this,
                [](void* c) {
                    auto& self = *static_cast<LateLane*>(c);
                    self.time += 1'000'000;
                    if (self.time > 60'000'000'000) {
                        std::fprintf(stderr, "a wait without a bound\n");
                        std::abort(); // rather than wait for ever
                    }
                    return self.time;
                },
                [](void* c, Instant, const std::atomic<bool>&) {
                    if (this_processor() == 0) {
                        set_this_processor(1);
                        static_cast<LateLane*>(c)->other.turn();
                        set_this_processor(0);
                    }
                },
                [](void*) {}};
    }
    void run(Code expected, std::string_view message) {
        Bench* const runners[]{first.get(), second.get()};
        const Instant begun = time;
        const auto report =
            home.run(Bench::run_lanes(runners, disk, *parse_workload("randread,qd=4,count=100"), {.dma = &dma}));
        ASSERT_FALSE(report);
        EXPECT_EQ(report.error().code, expected);
        EXPECT_EQ(report.error().message, message);
        EXPECT_GE(time - begun, 5'000'000'000u);
        EXPECT_LT(time - begun, 6'000'000'000u);
        EXPECT_EQ(disk.counters().submitted + lane1.counters().submitted, 0u) << "nothing was measured";
    }
};

TEST_F(LateLane, IsReportedWithinTheBoundOfTheCommonStart) {
    run(Code::timed_out, "the lanes of a disk did not all reach their common start");
}

TEST_F(LateLane, OfAStoppedProcessorKeepsNoLaneWaiting) {
    const std::atomic<bool> stop{true};
    set_this_processor(1);
    other.serve(stop); // ends at once: it takes no work any more
    set_this_processor(0);
    run(Code::device_gone, "the processor that a task was sent to has stopped");
}

TEST_F(LanesBench, WhatCannotBe) {
    EXPECT_EQ(run("randread,count=2", 3).error().code, Code::bad_argument) << "an I/O for each lane";
    EXPECT_EQ(run("read,count=257", 3).error().code, Code::bad_argument) << "stretches are smaller than the disk";
    disk.others.pop_back();
    EXPECT_EQ(run("randread", 3).error().code, Code::bad_argument);
    Lane twin(home, platter);
    disk.others = {&twin};
    EXPECT_EQ(run("randread", 2).error().code, Code::not_supported)
        << "they would wait for each other on one processor";
}

} // namespace
