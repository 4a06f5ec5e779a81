// Two lanes of one disk, each a channel on its own processor: progress on any channel counts for a request's time-out.
// A bus reset is sent on the first channel, and its completion arrives there; both channels belong to one host.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.processor;
import io.executor;
import io.task;
import io.block;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/drivers/storvsc_fake.hpp"

namespace {
using namespace fl;
using drivers::storvsc::Disk;
using drivers::storvsc::Queue;
using drivers::storvsc::Shared;
using drivers::storvsc::Version;
using fake::Command;
using fake::Reply;

constexpr Nanoseconds timeout = 1'000'000'000;
constexpr Nanoseconds ms = 1'000'000;
constexpr u32 read_16 = 0x88;

struct StorvscLanes : testing::Test {
    struct Lane {
        Lane(io::Platform platform, u32 processor, Shared& shared)
            : executor(platform, processor), queue(executor, channel, shared, processor == 0) {}
        io::Executor executor;
        hv::hyperv::Channel channel;
        std::atomic<u32> events{0};
        fake::StorageHost host;
        Queue queue;
        DmaBuffer parameters;
        std::optional<Disk> disk;
        Nanoseconds each = 0; // the host's time per request of this lane
        Instant next = 0;     // when it completes the next one
    };
    test::FakeMachine clock; // one clock for both: elapsed time is the same everywhere
    test::HeapDma dma;
    test::CapturedLog log;
    hv::hyperv::Hypercalls hypercalls;
    Shared shared;
    std::array<std::optional<Lane>, 2> lanes;
    std::vector<DmaBuffer> buffers;
    std::vector<std::unique_ptr<io::Request>> requests;
    Instant stop_at = never; // stops the machine once, for stop_length
    Nanoseconds stop_length = 0;

    void SetUp() override {
        hv::hyperv::Gate gate;
        gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
        ASSERT_TRUE(hypercalls.install(gate, dma));
        hv::hyperv::Channel::Signalling signalling;
        signalling.hypercalls = &hypercalls;
        io::Geometry geometry;
        geometry.flush = true;
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("sda");
        Disk::Unit unit;
        unit.max_transfer = 32768;
        for (u32 i = 0; i < 2; ++i) {
            set_this_processor(i);
            Lane& lane = lanes[i].emplace(clock.platform(), i, shared);
            auto rings = dma.buffer(2 * fake::StorageHost::ring_size);
            lane.host.attach(rings->data());
            ASSERT_TRUE(
                lane.channel.attach({}, i, std::move(*rings), fake::StorageHost::ring_size, signalling, lane.events));
            lane.queue.set_terms({Version::win10, 32768});
            lane.parameters = *dma.buffer(4096);
            lane.queue.start(lane.parameters, timeout);
            geometry.sectors = lane.host.disk.size() / 512;
            lane.disk.emplace(lane.queue, unit, geometry, identity);
            lane.disk->link(lane.executor);
        }
        set_this_processor(0);
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<StorvscLanes*>(self)->idle(); };
    }
    void TearDown() override {
        requests.clear();
        for (u32 i = 0; i < 2; ++i) {
            set_this_processor(i);
            lanes[i]->queue.stop();
            lanes[i]->disk.reset();
            lanes[i]->channel.detach().reset();
        }
        set_this_processor(0);
    }
    // Stops the machine if due; then each host takes new requests and completes those that are due.
    void idle() {
        if (clock.time >= stop_at) {
            stop_at = never;
            clock.time += stop_length;
            for (auto& lane : lanes) { // the host was stopped as well
                lane->next += stop_length;
            }
            return;
        }
        for (auto& lane : lanes) {
            const u64 wanted = lane->host.signals_wanted;
            if (lane->host.hold) {
                continue;
            }
            if (lane->host.take() && lane->next < clock.time) {
                lane->next = clock.time + lane->each;
            }
            while (!lane->host.commands.empty() && clock.time >= lane->next) {
                lane->host.answer();
                lane->next = clock.time + lane->each;
            }
            if (lane->host.signals_wanted != wanted) {
                lane->events.fetch_add(1);
                lane->executor.wake();
            }
        }
    }
    void turn() {
        for (u32 i = 0; i < 2; ++i) {
            set_this_processor(i);
            lanes[i]->executor.turn();
        }
        set_this_processor(0);
    }
    io::Request& ask(u32 lane, io::Op op = io::Op::read, u64 lba = 0) {
        buffers.push_back(*dma.buffer(4096));
        set_this_processor(lane);
        requests.push_back(
            std::make_unique<io::Request>(*lanes[lane]->disk, op, lba, buffers.back().span().subspan(0, 4096)));
        lanes[lane]->disk->submit(*requests.back());
        set_this_processor(0);
        return *requests.back();
    }
    bool all_ended() const {
        return std::ranges::none_of(requests, [](const auto& r) { return r->pending(); });
    }
    /// Time until all requests have ended; never: not within `bound`.
    Nanoseconds settle(Nanoseconds bound = 600'000 * ms) {
        const Instant begin = clock.time;
        while (!all_ended()) {
            if (clock.time - begin > bound) {
                return never;
            }
            turn();
        }
        return clock.time - begin;
    }
    u32 good() const {
        return static_cast<u32>(
            std::ranges::count_if(requests, [](const auto& r) { return r->status == io::Status::ok; }));
    }
    u64 resets() const { return lanes[0]->host.resets + lanes[1]->host.resets; }
    bool open() const { return lanes[0]->queue.is_open() && lanes[1]->queue.is_open(); }
    /// Both lanes still work.
    void use_both() {
        requests.clear();
        ask(0, io::Op::write, 16);
        ask(1, io::Op::read, 32);
        EXPECT_LT(settle(), 100 * ms);
        EXPECT_EQ(good(), 2u);
    }
    void lose_reads(u32 lane, u32 count) {
        auto left = std::make_shared<u32>(count);
        lanes[lane]->host.reply_override = [left](const Command& c) {
            Reply reply;
            if (c.operation() == 3 && c.cdb(0) == read_16 && *left != 0) {
                --*left;
                reply.never = true;
            }
            return reply;
        };
    }
};

// The second channel gets no messages at all; the first one shows that the host is alive, because it completes the
// reset there.
TEST_F(StorvscLanes, AReadLostOnTheSecondChannelEndsAloneWhenTheResetIsAnsweredOnTheFirst) {
    lose_reads(1, 1);
    const io::Request& lost = ask(1);
    const Nanoseconds took = settle();
    EXPECT_GE(took, 2 * timeout - 20 * ms) << "a time-out, and the same for what the reset does";
    EXPECT_LE(took, 2 * timeout + 100 * ms);
    EXPECT_EQ(lost.status, io::Status::timed_out);
    EXPECT_TRUE(lost.buffer_lost) << "no answer has come: the host may still write there";
    EXPECT_EQ(lanes[0]->host.resets, 1u);
    EXPECT_EQ(lanes[1]->host.resets, 0u) << "the reset goes out on the first channel";
    EXPECT_TRUE(open()) << log.text.view();
    EXPECT_TRUE(log.has("asking the host to reset the bus"));
    EXPECT_FALSE(log.has("closed")) << log.text.view();
    use_both();
}

TEST_F(StorvscLanes, AReadLostOnTheFirstChannelEndsAloneToo) {
    lose_reads(0, 1);
    const io::Request& lost = ask(0);
    EXPECT_LE(settle(), 2 * timeout + 100 * ms);
    EXPECT_EQ(lost.status, io::Status::timed_out);
    EXPECT_EQ(resets(), 1u);
    EXPECT_TRUE(open()) << log.text.view();
    use_both();
}

TEST_F(StorvscLanes, AHostThatDoesNotEvenResetClosesBothChannels) {
    lanes[0]->host.hold = lanes[1]->host.hold = true;
    const io::Request& lost = ask(1);
    EXPECT_LE(settle(), 2 * timeout + 100 * ms);
    EXPECT_EQ(lost.status, io::Status::timed_out);
    turn();
    turn();
    EXPECT_FALSE(lanes[0]->queue.is_open());
    EXPECT_FALSE(lanes[1]->queue.is_open());
    EXPECT_TRUE(lanes[0]->queue.quiescent() && lanes[1]->queue.quiescent());
    EXPECT_TRUE(log.has("the host has not answered anything for a whole time-out")) << log.text.view();
}

// The host may carry an abandoned write out at any time until it has answered it, whatever the other channel writes.
TEST_F(StorvscLanes, AWriteWaitsForAnAbandonedOneOnTheOtherChannel) {
    lanes[0]->host.hold = true;
    ask(0, io::Op::write, 64);
    turn();
    set_this_processor(0);
    requests.clear(); // abandoned
    EXPECT_EQ(shared.late_writes(), 1u);
    io::Request& read = ask(1, io::Op::read, 64);
    io::Request& write = ask(1, io::Op::write, 64);
    for (u32 i = 0; i < 10; ++i) {
        turn();
    }
    EXPECT_FALSE(read.pending()) << "reads need not wait";
    EXPECT_TRUE(write.pending());
    lanes[0]->host.hold = false;
    EXPECT_LT(settle(), 100 * ms);
    EXPECT_EQ(write.status, io::Status::ok);
    EXPECT_EQ(shared.late_writes(), 0u);
    EXPECT_EQ(resets(), 0u);
    use_both();
}

// If it is never answered, its own channel's time-out decides, and the writes that wait for it have no time-out of
// their own.
TEST_F(StorvscLanes, AnAbandonedWriteThatIsNeverAnsweredClosesBothChannels) {
    lanes[0]->host.hold = true;
    ask(0, io::Op::write, 64);
    turn();
    set_this_processor(0);
    requests.clear();
    io::Request& write = ask(1, io::Op::write, 64);
    EXPECT_LE(settle(), 2 * timeout + 100 * ms);
    EXPECT_EQ(write.status, io::Status::device_gone);
    turn();
    EXPECT_FALSE(lanes[0]->queue.is_open() || lanes[1]->queue.is_open());
    EXPECT_FALSE(log.has("every slot is held")) << log.text.view();
}

// Both channels share one disk that serves one request at a time: those of the first channel precede the one of the
// second.
TEST_F(StorvscLanes, AHostBusyWithTheOtherChannelIsNotSilent) {
    lanes[0]->each = timeout * 6 / 10;
    for (u32 i = 0; i < 8; ++i) {
        ask(0, io::Op::read, 8 * i);
    }
    lanes[1]->host.hold = true;
    ask(1);
    while (std::ranges::count_if(requests, [](const auto& r) { return r->pending(); }) != 1) {
        ASSERT_LT(clock.time, 60'000 * ms);
        turn();
    }
    EXPECT_GE(clock.time, 4 * timeout) << "several time-outs";
    lanes[1]->host.hold = false;
    EXPECT_LT(settle(), 100 * ms);
    EXPECT_EQ(good(), 9u);
    EXPECT_EQ(resets(), 0u) << log.text.view();
    EXPECT_TRUE(open());
}

// The time-out is 1 s. Both processors and the host are stopped for longer than that, with requests in flight on both
// channels; afterwards the host needs most of a time-out for each completion.
TEST_F(StorvscLanes, AStoppedMachineIsNoSilentHost) {
    for (const io::Op op : {io::Op::read, io::Op::write}) {
        for (const u32 depth : {1u, 32u}) {
            for (const Nanoseconds length : {7'000 * ms, 60'000 * ms}) {
                for (const Nanoseconds after : {5 * ms, 500 * ms, 790 * ms}) {
                    SCOPED_TRACE(testing::Message() << io::name(op) << " depth " << depth << ", " << length / ms
                                                    << " ms after " << after / ms);
                    requests.clear();
                    buffers.clear();
                    for (u32 i = 0; i < 2; ++i) {
                        lanes[i]->each = timeout * 8 / 10;
                        for (u32 n = 0; n < depth; ++n) {
                            ask(i, op, 8 * n);
                        }
                    }
                    const Instant begin = clock.time;
                    stop_at = clock.time + after;
                    stop_length = length;
                    ASSERT_NE(settle(), never);
                    EXPECT_EQ(stop_at, never) << "the machine was stopped";
                    EXPECT_GE(clock.time - begin, length);
                    ASSERT_EQ(good(), 2 * depth) << log.text.view();
                    ASSERT_EQ(resets(), 0u);
                    ASSERT_TRUE(open());
                }
            }
        }
    }
    EXPECT_FALSE(log.has("no answer within"));
}

// What a closed channel had under way is not with the host any more: it does not make the others more patient.
TEST_F(StorvscLanes, AClosedChannelTakesItsCountsWithIt) {
    lanes[1]->host.hold = true;
    for (u32 i = 0; i < 20; ++i) {
        ask(1, io::Op::read, 8 * i);
    }
    lanes[0]->host.hold = true;
    ask(0);
    for (u32 i = 0; i < 5; ++i) {
        turn();
    }
    EXPECT_EQ(shared.in_flight(), 21u);
    lanes[0]->host.hold = false;
    for (u32 i = 0; i < 5; ++i) {
        turn();
    }
    EXPECT_EQ(shared.in_flight(), 20u);
    EXPECT_EQ(shared.answered(), 1u);
    set_this_processor(1);
    lanes[1]->queue.stop();
    set_this_processor(0);
    EXPECT_EQ(shared.in_flight(), 0u);
    EXPECT_EQ(shared.answered(), 1u) << "what was answered stays answered";
    EXPECT_TRUE(lanes[1]->queue.quiescent());
}

// A dead host is detected nevertheless, in machine time: each of the two waits is at most doubled.
TEST_F(StorvscLanes, ADeadHostIsFoundInMachineTimeAlsoWithAStop) {
    lanes[0]->host.hold = lanes[1]->host.hold = true;
    for (u32 i = 0; i < 2; ++i) {
        ask(i);
    }
    stop_at = clock.time + 600 * ms;
    stop_length = 60'000 * ms;
    const Instant begin = lanes[1]->executor.now();
    ASSERT_NE(settle(), never);
    EXPECT_EQ(stop_at, never);
    EXPECT_EQ(good(), 0u);
    EXPECT_LE(lanes[1]->executor.now() - begin, 4 * timeout + 2 * MachineTime::longest_step + 100 * ms);
    turn();
    EXPECT_FALSE(lanes[0]->queue.is_open() || lanes[1]->queue.is_open());
}

} // namespace
