// Lanes without a queue: what travels, what comes back, and what happens to what is abandoned on the way.
#include "gtest_macros.hpp"
#include <cstdlib>
import test.gtest;
import host.std;
import core.result;
import core.processor;
import core.time;
import core.dma;
import core.log;
import core.text;
import core.vector;
import io.task;
import io.executor;
import io.block;
import io.shared_lane;
import io.verify;
#include "unit/io/processors.hpp"
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using fl::test::FakeMachine;
using fl::test::HeapDma;
using fl::test::ThreadPlatform;
using fl::test::ThreadProcessor;

/// A disk that holds its requests until the test ends them.
class HeldDisk final : public BlockDevice {
  public:
    explicit HeldDisk(Executor& executor) : BlockDevice(executor) {
        identity_.name = FixedText<16>("held0");
        geometry_ = {.sectors = 4096, .flush = true, .discard = true};
    }
    std::vector<Request*> held;
    std::vector<std::string> trace; // "write 8", "forget 8", "cancel 8"
    std::atomic<u32> started{0};
    bool gone = false;
    std::vector<HeldDisk*> others; // further queues

    bool removed() const override { return gone; }
    u32 queues() const override { return static_cast<u32>(others.size()) + 1; }
    BlockDevice& queue_lane(u32 index) override { return index == 0 ? *this : *others[index - 1]; }
    void end(usize index, Status status, bool lost = false) {
        Request& request = *held[index];
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
        request.buffer_lost = lost;
        complete(request, status);
    }

  protected:
    void start(Request& request) override {
        EXPECT_EQ(this_processor(), executor().processor());
        trace.push_back(std::string(name(request.op)) + " " + std::to_string(request.lba));
        held.push_back(&request);
        ++started;
    }
    bool cancel_now(Request& request) override {
        trace.push_back("cancel " + std::to_string(request.lba));
        std::erase(held, &request);
        complete(request, Status::cancelled);
        return true;
    }
    void forget(Request& request) override {
        EXPECT_EQ(this_processor(), executor().processor());
        trace.push_back("forget " + std::to_string(request.lba));
        std::erase(held, &request);
    }
};

using Job = fl::test::StartedTask;

struct Item {
    Request* request = nullptr;
    u32 ended = 0;
    Status status = Status::not_written;
    bool lost = false;
    std::coroutine_handle<> frame;
    ~Item() {
        if (frame) {
            frame.destroy();
        }
    }
};

Job run(Item& item, BlockDevice& disk, Op op, u64 lba, DmaSpan span) {
    BlockDevice::Transfer transfer(disk, op, lba, span);
    item.request = &transfer;
    static_cast<void>(co_await transfer);
    item.status = transfer.status;
    item.lost = transfer.buffer_lost;
    item.request = nullptr;
    ++item.ended;
}

/// Processor 0 has the disk's queue, processor 1 a shared lane. Both run on the calling thread, in turns.
struct SharedLaneTest : testing::Test {
    HeapDma dma;
    FakeMachine machine;
    Executor there{machine.platform(), 0};
    Executor home{machine.platform(), 1};
    HeldDisk disk{there};
    std::optional<SharedLane> place{std::in_place, home, disk};
    SharedLane& lane = *place;
    DmaBuffer buffer = *dma.buffer(64 * 1024);
    std::deque<Item> items;

    ~SharedLaneTest() override {
        set_this_processor(1);
        items.clear();
        turn_home();
        turn_target();
        turn_home();
        set_this_processor(0);
        place.reset();
    }
    void turn_target() {
        set_this_processor(0);
        there.turn();
    }
    void turn_home() {
        set_this_processor(1);
        home.turn();
    }
    Item& start(Op op, u64 lba, u32 bytes = 512) {
        set_this_processor(1);
        Item& item = items.emplace_back();
        item.frame = run(item, lane, op, lba, op == Op::flush ? DmaSpan{} : buffer.span().subspan(0, bytes)).handle;
        return item;
    }
    void forget(Item& item) {
        set_this_processor(1);
        std::exchange(item.frame, nullptr).destroy();
        item.request = nullptr;
    }
    void end(usize index, Status status, bool lost = false) {
        set_this_processor(0);
        disk.end(index, status, lost);
    }
};

using Trace = std::vector<std::string>;

TEST_F(SharedLaneTest, RequestsTravelTogetherAndEndAtHome) {
    Item& a = start(Op::write, 8, 4096);
    Item& b = start(Op::read, 16);
    Item& c = start(Op::flush, 0);
    EXPECT_TRUE(disk.trace.empty()) << "submitted on another processor than the queue's";
    turn_target();
    EXPECT_EQ(disk.trace, (Trace{"write 8", "read 16", "flush 0"})) << "one turn, in order";
    EXPECT_EQ(disk.held[0]->buffer.bus, buffer.bus());
    EXPECT_EQ(disk.held[0]->buffer.size, 4096u);
    end(2, Status::ok);
    end(0, Status::io_error);
    end(0, Status::timed_out, true);
    turn_home();
    EXPECT_EQ(a.ended + b.ended + c.ended, 0u) << "not yet sent back";
    turn_target();
    turn_home();
    EXPECT_EQ(a.ended + b.ended + c.ended, 3u);
    EXPECT_EQ(a.status, Status::io_error);
    EXPECT_FALSE(a.lost);
    EXPECT_EQ(b.status, Status::timed_out);
    EXPECT_TRUE(b.lost);
    EXPECT_EQ(c.status, Status::ok);
    EXPECT_EQ(lane.counters().submitted, 3u);
    EXPECT_EQ(lane.counters().completed, 3u);
    EXPECT_EQ(lane.counters().errors, 2u);
    EXPECT_EQ(disk.counters().completed, 3u);
}

TEST_F(SharedLaneTest, TheLaneChecksAndIsTheSameDisk) {
    Item& bad = start(Op::read, 4096);
    turn_home();
    EXPECT_EQ(bad.status, Status::out_of_range) << "without a trip";
    EXPECT_EQ(lane.identity().name, disk.identity().name.view());
    EXPECT_EQ(lane.geometry().sectors, 4096u);
    EXPECT_TRUE(lane.geometry().discard);
    EXPECT_FALSE(lane.removed());
    disk.gone = true;
    EXPECT_TRUE(lane.removed());
}

TEST_F(SharedLaneTest, EveryLaneLearnsANewSizeOnItsProcessor) {
    std::array<BlockDevice*, 1> lanes{&lane};
    disk.share(lanes);
    set_this_processor(0);
    disk.resize(8192);
    EXPECT_EQ(disk.geometry().sectors, 8192u);
    EXPECT_EQ(lane.geometry().sectors, 4096u) << "only its own processor writes to it";
    disk.resize(16384); // before the first has arrived
    turn_home();
    EXPECT_EQ(lane.geometry().sectors, 16384u);
    Item& grown = start(Op::write, 16383);
    EXPECT_EQ(grown.ended, 0u);
    turn_target();
    ASSERT_EQ(disk.held.size(), 1u);
    end(0, Status::ok);
    turn_target();
    turn_home();
    EXPECT_EQ(grown.status, Status::ok);
    set_this_processor(0);
    disk.resize(100);
    turn_home();
    Item& beyond = start(Op::read, 100);
    turn_home();
    EXPECT_EQ(beyond.status, Status::out_of_range);
    set_this_processor(0);
    disk.resize(0);
    disk.resize(0);
    turn_home();
    EXPECT_EQ(lane.geometry().sectors, 0u);
}

TEST_F(SharedLaneTest, EveryLaneLearnsWhatTheDiskOffersNow) {
    std::array<BlockDevice*, 1> lanes{&lane};
    disk.share(lanes);
    // Each property alone, so that none is taken for another one.
    const Geometry offers[] = {{.sectors = 9, .read_only = true},
                               {.sectors = 8, .flush = true},
                               {.sectors = 7, .discard = true},
                               {.sectors = 6, .write_zeroes = true},
                               {.sectors = 5, .secure_discard = true},
                               {.sectors = 4, .sector_size = 4096},
                               {.sectors = 3, .physical_sector_size = 65536}};
    for (const Geometry& offer : offers) {
        set_this_processor(0);
        disk.renew(offer);
        turn_home();
        const Geometry& seen = lane.geometry();
        EXPECT_EQ(seen.sectors, offer.sectors);
        EXPECT_EQ(seen.sector_size, offer.sector_size) << offer.sectors;
        EXPECT_EQ(seen.physical_sector_size, offer.physical_sector_size) << offer.sectors;
        EXPECT_EQ(seen.read_only, offer.read_only) << offer.sectors;
        EXPECT_EQ(seen.flush, offer.flush) << offer.sectors;
        EXPECT_EQ(seen.discard, offer.discard) << offer.sectors;
        EXPECT_EQ(seen.write_zeroes, offer.write_zeroes) << offer.sectors;
        EXPECT_EQ(seen.secure_discard, offer.secure_discard) << offer.sectors;
    }
}

TEST_F(SharedLaneTest, WhatExceedsTheLimitWaitsInOrder) {
    constexpr u32 count = 3 * SharedLane::max_forwarded + 5;
    for (u32 i = 0; i < count; ++i) {
        start(Op::read, i);
    }
    u32 seen = 0;
    for (u32 round = 0; round < 8 && seen < count; ++round) {
        turn_target();
        EXPECT_LE(disk.held.size(), SharedLane::max_forwarded);
        while (!disk.held.empty()) {
            EXPECT_EQ(disk.held[0]->lba, seen++);
            end(0, Status::ok);
        }
        turn_target();
        turn_home();
    }
    EXPECT_EQ(seen, count);
    for (const Item& item : items) {
        EXPECT_EQ(item.ended, 1u);
    }
}

TEST_F(SharedLaneTest, Cancel) {
    Item& travelling = start(Op::read, 1);
    for (u32 i = 1; i < SharedLane::max_forwarded; ++i) {
        start(Op::read, 100 + i);
    }
    Item& waiting = start(Op::read, 2);
    EXPECT_TRUE(lane.cancel(*waiting.request)) << "the target has not seen it";
    EXPECT_FALSE(lane.cancel(*travelling.request)) << "the target decides";
    EXPECT_FALSE(lane.cancel(*travelling.request));
    turn_home();
    EXPECT_EQ(waiting.status, Status::cancelled);
    turn_target();
    EXPECT_EQ(std::ranges::count(disk.trace, "cancel 1"), 1);
    turn_target();
    turn_home();
    EXPECT_EQ(travelling.status, Status::cancelled);
    // a cancel that meets its request's end on the way
    Item& late = start(Op::read, 3);
    turn_target();
    end(disk.held.size() - 1, Status::ok);
    set_this_processor(1);
    EXPECT_FALSE(lane.cancel(*late.request));
    turn_target();
    turn_target();
    turn_home();
    EXPECT_EQ(late.status, Status::ok);
    EXPECT_EQ(std::ranges::count(disk.trace, "cancel 3"), 0);
    // its entry is used for the next request, which nothing cancels
    Item& next = start(Op::read, 4);
    turn_target();
    turn_target();
    turn_home();
    EXPECT_EQ(next.ended, 0u);
    EXPECT_EQ(std::ranges::count(disk.trace, "cancel 4"), 0);
}

TEST_F(SharedLaneTest, AnAbandonedRequestIsForgottenBeforeLaterOnesAreSubmitted) {
    Item& old = start(Op::write, 8);
    turn_target();
    forget(old);
    EXPECT_TRUE(is_quarantined(buffer.span().subspan(0, 512))) << "the target has not been stopped yet";
    start(Op::write, 8);
    turn_target();
    EXPECT_EQ(disk.trace, (Trace{"write 8", "forget 8", "write 8"}));
    turn_home();
    EXPECT_FALSE(is_quarantined(buffer.span().subspan(0, 512))) << "the target's queue does not hold it either";
    EXPECT_EQ(lane.in_flight(), 1u);
    EXPECT_EQ(disk.in_flight(), 1u);
}

TEST_F(SharedLaneTest, AbandonedWhileItTravelsWaitsOrReturns) {
    Item& travelling = start(Op::write, 1);
    forget(travelling);
    turn_target();
    EXPECT_EQ(disk.trace, (Trace{"write 1", "forget 1"}));
    turn_home();
    Item& returning = start(Op::read, 2);
    turn_target();
    end(0, Status::ok);
    turn_target(); // `done` is on its way
    forget(returning);
    EXPECT_TRUE(is_quarantined(buffer.span().subspan(0, 512)));
    turn_home();
    EXPECT_TRUE(is_quarantined(buffer.span().subspan(0, 512))) << "the answer to `forget` is still missing";
    turn_target();
    turn_home();
    EXPECT_FALSE(is_quarantined(buffer.span().subspan(0, 512)));
    EXPECT_EQ(returning.ended, 0u);
    for (u32 i = 0; i < SharedLane::max_forwarded; ++i) {
        start(Op::read, 10 + i);
    }
    Item& waiting = start(Op::read, 3);
    forget(waiting);
    turn_target();
    EXPECT_EQ(std::ranges::count(disk.trace, "read 3"), 0);
    EXPECT_EQ(disk.held.size(), SharedLane::max_forwarded) << "every entry was free again";
}

TEST_F(SharedLaneTest, HeldLanesLetWhatTheyAcceptedEnd) {
    Item& before = start(Op::write, 1);
    set_this_processor(0);
    disk.hold(); // as at shutdown: the lanes of other processors follow
    turn_target();
    ASSERT_EQ(disk.held.size(), 1u) << "the lane accepted it before its own hold()";
    set_this_processor(1);
    lane.hold();
    Item& after = start(Op::write, 2);
    Item& flush = start(Op::flush, 0);
    turn_target();
    EXPECT_EQ(disk.trace, (Trace{"write 1", "flush 0"}));
    end(0, Status::ok);
    end(0, Status::ok);
    turn_target();
    turn_home();
    EXPECT_EQ(before.ended, 1u);
    EXPECT_EQ(flush.ended, 1u);
    EXPECT_EQ(after.ended, 0u);
    EXPECT_EQ(lane.in_flight(), 0u);
}

TEST_F(SharedLaneTest, ARequestRefusedAtTheTargetReturns) {
    Item& item = start(Op::read, 5);
    turn_target();
    end(0, Status::device_gone);
    turn_target();
    turn_home();
    EXPECT_EQ(item.status, Status::device_gone);
}

TEST_F(SharedLaneTest, NoFrameForTheLane) {
    frame_pool().fail_after(0);
    const SharedLane other(home, disk);
    frame_pool().fail_after(~u64{0});
    ASSERT_FALSE(other.usable());
    EXPECT_EQ(other.usable().error().code, Code::exhausted);
    EXPECT_TRUE(lane.usable());
}

TEST(SharedLaneStop, WhatTheTargetHasEndsWhenItsProcessorStops) {
    FakeMachine machine;
    Executor home(machine.platform(), 0);
    ThreadProcessor other(1);
    HeldDisk disk(other.executor);
    SharedLane lane(home, disk);
    HeapDma dma;
    DmaBuffer buffer = *dma.buffer(4096);
    Item a;
    a.frame = run(a, lane, Op::read, 1, buffer.span()).handle;
    for (u32 i = 0; i < 10'000 && disk.started == 0; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    other.stop();
    home.turn();
    EXPECT_EQ(a.ended, 1u);
    EXPECT_EQ(a.status, Status::device_gone);
    EXPECT_EQ(disk.trace, (Trace{"read 1", "forget 1"}));
    Item b;
    b.frame = run(b, lane, Op::read, 2, buffer.span()).handle;
    home.turn();
    EXPECT_EQ(b.status, Status::device_gone) << "nobody is there to submit it";
    EXPECT_EQ(lane.in_flight(), 0u);
}

TEST(SharedLaneStop, WhatHasEndedThereKeepsItsStatus) {
    FakeMachine machine;
    Executor home(machine.platform(), 0);
    Executor there(machine.platform(), 1);
    HeldDisk disk(there);
    SharedLane lane(home, disk);
    HeapDma dma;
    DmaBuffer buffer = *dma.buffer(4096);
    Item ended;
    Item open;
    ended.frame = run(ended, lane, Op::read, 1, buffer.span().subspan(0, 512)).handle;
    open.frame = run(open, lane, Op::read, 2, buffer.span().subspan(512, 512)).handle;
    set_this_processor(1);
    there.turn();
    disk.end(0, Status::io_error);
    const std::atomic<bool> stop{true};
    there.serve(stop); // ends at once, before the collector is resumed
    set_this_processor(0);
    home.turn();
    EXPECT_EQ(ended.status, Status::io_error);
    EXPECT_EQ(open.status, Status::device_gone);
}

struct SharedLanesTest : testing::Test {
    FakeMachine machine;
    std::array<Executor, 4> executors{Executor{machine.platform(), 0}, Executor{machine.platform(), 1},
                                      Executor{machine.platform(), 2}, Executor{machine.platform(), 3}};
    std::array<Executor*, 4> list{&executors[0], &executors[1], &executors[2], &executors[3]};
    HeldDisk disk{executors[0]};
    HeldDisk second{executors[2]};
    ~SharedLanesTest() override { vector_detail::fail_after(~u64{0}); }
};

TEST_F(SharedLanesTest, EachProcessorHasOneLane) {
    disk.others = {&second};
    SharedLanes lanes;
    ASSERT_TRUE(lanes.add_to(disk, list));
    ASSERT_EQ(disk.lanes(), 4u);
    EXPECT_EQ(disk.queues(), 2u);
    EXPECT_EQ(&disk.lane(0), &disk);
    EXPECT_EQ(&disk.lane(1), &second);
    EXPECT_EQ(&disk.lane(2).executor(), list[1]);
    EXPECT_EQ(&disk.lane(3).executor(), list[3]);
    EXPECT_EQ(&static_cast<SharedLane&>(disk.lane(2)).target(), &disk);
    EXPECT_EQ(&static_cast<SharedLane&>(disk.lane(3)).target(), &second) << "the queues take turns";
}

TEST_F(SharedLanesTest, WithoutFurtherProcessors) {
    SharedLanes lanes;
    ASSERT_TRUE(lanes.add_to(disk, std::span(list).first(1)));
    EXPECT_EQ(disk.lanes(), 1u);
}

TEST_F(SharedLanesTest, ThoseThatCouldBeMadeWork) {
    SharedLanes lanes;
    frame_pool().fail_after(2);
    const auto added = lanes.add_to(disk, list);
    frame_pool().fail_after(~u64{0});
    ASSERT_FALSE(added);
    EXPECT_EQ(added.error().code, Code::exhausted);
    EXPECT_EQ(disk.lanes(), 3u);
    EXPECT_EQ(&disk.lane(2).executor(), list[2]);
}

TEST_F(SharedLanesTest, MostFramesAreLeftToRequests) {
    std::vector<void*> frames;
    while (frame_pool().in_use() < SharedLanes::max_frames - 1) {
        frames.push_back(frame_pool().allocate(128));
        ASSERT_NE(frames.back(), nullptr);
    }
    {
        SharedLanes lanes;
        const auto added = lanes.add_to(disk, list);
        ASSERT_FALSE(added);
        EXPECT_EQ(added.error().code, Code::exhausted);
        EXPECT_EQ(disk.lanes(), 2u);
        disk.share({});
    }
    for (void* frame : frames) {
        frame_pool().free(frame, 128);
    }
}

TEST_F(SharedLanesTest, NoMemoryForTheList) {
    SharedLanes lanes;
    vector_detail::fail_after(0);
    ASSERT_FALSE(lanes.add_to(disk, list));
    EXPECT_EQ(disk.lanes(), 1u);
}

/// Bytes in memory; completes at once. Everything is accessed on its executor's processor.
class Bytes final : public BlockDevice {
  public:
    explicit Bytes(Executor& executor) : BlockDevice(executor), bytes(4 * 1024 * 1024) {
        identity_.name = FixedText<16>("bytes0");
        geometry_ = {.sectors = bytes.size() / 512, .flush = true};
    }
    std::vector<std::byte> bytes;
    u64 wrong_processor = 0;

  protected:
    void start(Request& r) override {
        wrong_processor += this_processor() != executor().processor();
        std::byte* at = bytes.data() + r.lba * 512;
        if (r.op == Op::write) {
            std::memcpy(at, r.buffer.data, r.buffer.size);
        } else if (r.op == Op::read) {
            std::memcpy(r.buffer.data, at, r.buffer.size);
        }
        complete(r, Status::ok);
    }
    bool cancel_now(Request&) override { return false; }
    void forget(Request&) override {}
};

/// HeapDma is not for several threads.
struct Pages final : DmaAllocator {
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u32 rounded = align_up<u32>(size, 4096);
        void* p = std::aligned_alloc(4096, rounded);
        return DmaSpan{static_cast<std::byte*>(p), reinterpret_cast<u64>(p), size};
    }
    void free(DmaSpan span) override { std::free(span.data); }
};

TEST(SharedLaneThreads, VerifyOnThreeProcessorsWithOneQueue) {
    Pages dma;
    ThreadPlatform platform;
    Executor home(platform.platform(), 0);
    ThreadProcessor one(1);
    ThreadProcessor two(2);
    Bytes disk(home);
    SharedLanes lanes;
    const std::array<Executor*, 3> executors{&home, &one.executor, &two.executor};
    ASSERT_TRUE(lanes.add_to(disk, executors));
    const auto report = home.run(verify(disk, {.qd = 16, .scratch = true}, dma));
    ASSERT_TRUE(report);
    EXPECT_TRUE(report->ok());
    EXPECT_EQ(report->lanes, 3u);
    EXPECT_EQ(report->written, 1024u);
    EXPECT_EQ(disk.wrong_processor, 0u);
    one.stop();
    two.stop();
    EXPECT_EQ(platform.overslept + one.platform.overslept + two.platform.overslept, 0u);
}

} // namespace
