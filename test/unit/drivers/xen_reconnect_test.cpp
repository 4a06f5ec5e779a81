// Back ends of Xen devices that leave the connection and return, as after a crash of the process or an unbinding of the
// driver in dom0: what was under way is asked again, and nothing is lost or done twice.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import core.log;
import core.cpuid;
import io.executor;
import io.task;
import io.block;
import io.net;
import hv.xen;
import drivers.driver;
import drivers.xen_blk;
import drivers.xen_net;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_blk_fake.hpp"
#include "unit/drivers/xen_net_fake.hpp"

namespace {
using namespace fl;
using fake::DiskMachine;
using fake::NetMachine;
using fake::Offer;
using io::Status;
constexpr Nanoseconds ms = 1'000'000;

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(std::string_view what) const { return text.find(what) != std::string::npos; }
    std::string text;
};

/// Requests under way on a disk: `count` writes of `bytes` each, one after the other from LBA 0, then as many reads of
/// what lies behind them, and a flush.
struct UnderWay {
    UnderWay(DiskMachine& machine, u32 count, u32 bytes) : m(machine), size(bytes) {
        memory = m.buffer(2 * count * bytes);
        std::mt19937 random(count);
        for (u32 i = 0; i < 2 * count; ++i) {
            const DmaSpan buffer = memory.subspan(i * bytes, bytes);
            const u64 lba = u64{i} * bytes / 512;
            for (std::byte& b : buffer.bytes()) {
                b = static_cast<std::byte>(random());
            }
            if (i >= count) {
                std::memset(m.back.disk.data() + lba * 512, static_cast<int>(i), bytes);
            }
            requests.push_back(std::make_unique<io::BlockDevice::Transfer>(
                m.disk(), i < count ? io::Op::write : io::Op::read, lba, buffer));
        }
        if (m.disk().geometry().flush) {
            requests.push_back(std::make_unique<io::BlockDevice::Transfer>(m.disk(), io::Op::flush, 0, DmaSpan{}));
        }
        for (auto& request : requests) {
            m.disk().submit(*request);
        }
    }
    bool pending() const {
        return std::ranges::any_of(requests, [](const auto& request) { return request->pending(); });
    }
    /// All have succeeded, and the data is where it belongs.
    void check() {
        for (usize i = 0; i < requests.size(); ++i) {
            ASSERT_FALSE(requests[i]->pending()) << i;
            EXPECT_EQ(requests[i]->status, Status::ok) << i;
            if (requests[i]->op != io::Op::flush) {
                EXPECT_EQ(std::memcmp(m.back.disk.data() + i * size, memory.data + i * size, size), 0) << i;
            }
        }
    }
    DiskMachine& m;
    u32 size;
    DmaSpan memory;
    std::vector<std::unique_ptr<io::BlockDevice::Transfer>> requests;
};

void pass(fake::Machine& m, Nanoseconds time) { ASSERT_TRUE(m.run(fake::sleep(m.executor, time))); }

struct Return {
    const char* name;
    Offer before, after;
    std::string_view features; // afterwards
};
class XenBlkReturn : public testing::TestWithParam<Return> {};

TEST_P(XenBlkReturn, EverythingUnderWayIsAskedAgain) {
    for (const bool taken : {false, true}) { // by the back end that ends, or still in the ring
        DiskMachine m(GetParam().before);
        ASSERT_TRUE(m.probe());
        const u64 memory = m.xen.memory.outstanding;
        const hv::Xen::InUse in_use = m.guest.in_use();
        m.back.hold = m.back.hold_mapped = taken;
        m.back.dead = !taken;
        UnderWay load(m, 5, 100 * 1024);
        pass(m, ms);
        EXPECT_TRUE(load.pending());
        m.back.die();
        pass(m, 20 * ms);
        m.back.hold = m.back.dead = false;
        m.back.offer = GetParam().after;
        Capture log;
        m.back.start_again();
        pass(m, 50 * ms);
        load.check();
        EXPECT_EQ(m.disk().identity().features.view(), GetParam().features);
        EXPECT_TRUE(log.has("xvda: the back end has left the connection")) << log.text;
        EXPECT_TRUE(log.has("xvda: connected again"));
        EXPECT_EQ(m.back.state(), 4u);
        EXPECT_EQ(m.back.front_state(), 4u);
        EXPECT_EQ(m.back.bad_grants, 0u);
        EXPECT_EQ(m.xen.bad_maps, 0u);
        EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
        EXPECT_EQ(m.xen.open_ports.size(), 1u) << "the old event channel is closed";
        if (GetParam().before.persistent == GetParam().after.persistent) {
            EXPECT_EQ(m.guest.in_use().event_channels, in_use.event_channels);
            EXPECT_EQ(m.guest.in_use().watches, in_use.watches);
        }
        UnderWay more(m, 3, 64 * 1024);
        pass(m, ms);
        more.check();
        // and back again, which leaves what was there before
        m.back.die();
        m.back.offer = GetParam().before;
        m.back.start_again();
        pass(m, 50 * ms);
        EXPECT_EQ(m.guest.in_use(), in_use);
        EXPECT_EQ(m.xen.memory.outstanding - memory, (5 * 2 * 100 + 3 * 2 * 64) * 1024u) << "the buffers of this test";
    }
}

const Offer all{.persistent = true, .indirect = 256, .ring_order = 2};
const Return returns[] = {
    {"same", {}, {}, "flush ring-pages=1"},
    {"same_all", all, all, "flush persistent indirect ring-pages=4"},
    {"loses_persistent", all, {.indirect = 256, .ring_order = 2}, "flush indirect ring-pages=4"},
    {"loses_indirect", all, {.persistent = true, .ring_order = 2}, "flush persistent ring-pages=4"},
    {"smaller_ring", all, {.persistent = true, .indirect = 256}, "flush persistent indirect ring-pages=1"},
    {"loses_all", all, {}, "flush ring-pages=1"},
    {"gains_all", {}, all, "flush persistent indirect ring-pages=4"},
};
INSTANTIATE_TEST_SUITE_P(All, XenBlkReturn, testing::ValuesIn(returns), [](const auto& i) { return i.param.name; });

// A driver in dom0 that is unbound closes the device, which stays online.
TEST(XenBlkReturns, ABackEndThatClosesAndStaysOnlineMayReturn) {
    for (const u32 state : {5u, 6u, 1u, 2u, 3u}) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.back.hold = true;
        UnderWay load(m, 2, 4096);
        pass(m, ms);
        m.back.hold = false;
        m.back.forget();
        m.back.go(state);
        pass(m, 100 * ms);
        load.check();
        EXPECT_EQ(m.back.state(), 4u) << state;
    }
}

// blkback in dom0, bound again while the front end has not noticed that it was unbound: it sees that the front end is
// closing, and looks again only when that one has begun anew.
TEST(XenBlkReturns, ABackEndMayMissThatTheFrontEndHasClosed) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 2, 4096);
    pass(m, ms);
    m.back.hold = false;
    m.back.die();
    m.back.misses_closed = true;
    m.back.start_again();
    pass(m, 100 * ms);
    EXPECT_FALSE(m.back.misses_closed);
    load.check();
    EXPECT_EQ(m.back.state(), 4u);
    EXPECT_EQ(m.back.front_state(), 4u);
}

TEST(XenBlkReturns, ABackEndThatDoesNotReturnIsBounded) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 4, 4096);
    pass(m, ms);
    m.back.die();
    const Instant before = m.world.now;
    m.back.go(6);
    while (load.pending() && m.world.now - before < 10'000 * ms) {
        pass(m, ms);
    }
    EXPECT_LT(m.world.now - before, 700 * ms) << "the time-out is 200 ms";
    for (const auto& request : load.requests) {
        EXPECT_EQ(request->status, Status::device_gone);
        EXPECT_FALSE(request->buffer_lost);
    }
    pass(m, 300 * ms);
    EXPECT_EQ(m.guest.in_use().grants, 0u);
    EXPECT_EQ(m.xen.live_grants(), 0u);
}

// The time-out of requests does not run while there is no back end.
TEST(XenBlkReturns, TheWaitForTheBackEndIsNoSilence) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 2, 4096);
    pass(m, 150 * ms);
    m.back.die();
    m.back.go(6);
    pass(m, 150 * ms);
    EXPECT_TRUE(load.pending());
    m.back.hold = false;
    m.back.start_again();
    pass(m, 50 * ms);
    load.check();
}

TEST(XenBlkReturns, ASmallerDiskEndsWhatIsBeyondItsEnd) {
    DiskMachine m({.sectors = 4096});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    const DmaSpan buffer = m.buffer(16384);
    io::BlockDevice::Transfer inside(m.disk(), io::Op::write, 2040, buffer.subspan(0, 4096));
    io::BlockDevice::Transfer across(m.disk(), io::Op::write, 2041, buffer.subspan(4096, 4096));
    io::BlockDevice::Transfer beyond(m.disk(), io::Op::read, 4000, buffer.subspan(8192, 4096));
    for (io::Request* request : {&inside, &across, &beyond}) {
        m.disk().submit(*request);
    }
    pass(m, ms);
    m.back.die();
    m.back.hold = false;
    m.back.offer.sectors = 2048;
    Capture log;
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(inside.status, Status::ok);
    EXPECT_EQ(across.status, Status::out_of_range);
    EXPECT_EQ(beyond.status, Status::out_of_range);
    EXPECT_EQ(m.disk().geometry().sectors, 2048u);
    EXPECT_TRUE(log.has("xvda: the back end has returned with 2048 sectors instead of 4096")) << log.text;
    EXPECT_EQ(m.back.served[1], 1u) << "what is beyond the end is not asked for";
}

TEST(XenBlkReturns, AWriteProtectedDiskEndsWrites) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 1, 4096);
    pass(m, ms);
    m.back.die();
    m.back.hold = false;
    m.back.offer.read_only = true;
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(load.requests[0]->status, Status::read_only);
    EXPECT_EQ(load.requests[1]->status, Status::ok);
    EXPECT_TRUE(m.disk().geometry().read_only);
}

TEST(XenBlkReturns, ASecureDiscardIsNotSentToABackEndThatWouldOnlyDiscard) {
    DiskMachine m({.discard = true, .extra = {{"discard-secure", "1"}}});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    io::BlockDevice::Transfer under_way(m.disk(), io::Op::secure_discard, 16, DmaSpan{nullptr, 0, 8192});
    m.disk().submit(under_way);
    pass(m, ms);
    ASSERT_EQ(m.back.held().size(), 1u);
    m.back.die();
    m.back.hold = false;
    m.back.offer.extra["discard-secure"] = "0";
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(under_way.status, Status::not_supported);
    EXPECT_EQ(m.back.served[5], 0u);
    EXPECT_TRUE(m.disk().geometry().discard && !m.disk().geometry().secure_discard);
}

// What the flush was for may be lost with the old back end: the new one's answer counts, not its lack of a cache.
TEST(XenBlkReturns, AFlushIsNotAnsweredByTheLackOfACache) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    io::BlockDevice::Transfer flush(m.disk(), io::Op::flush, 0, DmaSpan{});
    m.disk().submit(flush);
    pass(m, ms);
    m.back.die();
    m.back.hold = false;
    m.back.offer.flush = false;
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(flush.status, Status::not_supported);
    EXPECT_TRUE(m.run(fake::flush(m.disk()))) << "a later one has nothing to do";
}

TEST(XenBlkReturns, AnotherSectorSizeIsAnotherDisk) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 1, 4096);
    pass(m, ms);
    m.back.die();
    m.back.hold = false;
    m.back.offer.sector_size = 4096;
    Capture log;
    m.back.start_again();
    pass(m, 500 * ms);
    EXPECT_TRUE(log.has("xvda: closed: the back end has returned with another sector size")) << log.text;
    for (const auto& request : load.requests) {
        EXPECT_EQ(request->status, Status::device_gone);
    }
    EXPECT_EQ(m.guest.in_use().grants, 0u);
}

// The back end has a buffer mapped although it has closed: that request cannot be asked again, the others are.
TEST(XenBlkReturns, ABufferThatIsStillMappedIsLost) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 2, 4096);
    pass(m, ms);
    const u32 ref = m.back.held()[3].refs[0]; // the second read
    ASSERT_NE(m.xen.map_grant(ref, 0, true), nullptr);
    m.back.die();
    m.back.hold = false;
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(load.requests[3]->status, Status::device_gone);
    EXPECT_TRUE(load.requests[3]->buffer_lost);
    for (const u32 i : {0u, 1u, 2u, 4u}) {
        EXPECT_EQ(load.requests[i]->status, Status::ok) << i;
        EXPECT_FALSE(load.requests[i]->buffer_lost) << i;
    }
    EXPECT_EQ(m.guest.grants().in_quarantine(), 1u);
    m.xen.unmap_grant(ref, true);
    m.disk().executor().wake();
    pass(m, 100 * ms);
    EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
}

// It dies again in the middle of the handshake, and again: the last one that lives is connected.
TEST(XenBlkReturns, DyingTwiceIsSurvived) {
    DiskMachine m({.persistent = true});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    UnderWay load(m, 3, 8192);
    pass(m, ms);
    m.back.hold = false;
    m.back.die();
    m.back.offer.never_connects = true;
    m.back.start_again();
    pass(m, 60 * ms);
    m.back.die();
    pass(m, 10 * ms);
    m.back.offer.never_connects = false;
    m.back.start_again();
    pass(m, 600 * ms);
    load.check();
    EXPECT_EQ(m.back.state(), 4u);
}

// Forgotten requests do not come back, and their slots are free.
TEST(XenBlkReturns, AbandonedRequestsAreNotAskedAgain) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    auto load = std::make_unique<UnderWay>(m, 2, 4096);
    pass(m, ms);
    const u64 written = m.back.served[1];
    load.reset();
    m.back.die();
    m.back.hold = false;
    m.back.start_again();
    pass(m, 50 * ms);
    EXPECT_EQ(m.back.served[1], written);
    UnderWay more(m, 2, 4096);
    pass(m, ms);
    more.check();
}

// ---- network cards ----

io::Task<Result<void>> send(io::NetDevice& card, std::span<const std::byte> frame, Nanoseconds bound,
                            io::SendStatus& status) {
    status = co_await card.send({frame}, bound);
    co_return Result<void>{};
}

TEST(XenNetReturn, TheCardStaysOpenAndFramesWait) {
    for (const u32 queues : {0u, 3u}) {
        NetMachine m({.queues = queues}, 0, queues == 0 ? 1 : 3);
        m.open();
        const hv::Xen::InUse in_use = m.guest.in_use();
        const u64 memory = m.xen.memory.outstanding;
        m.back.die();
        m.back.go(6);
        pass(m, 20 * ms);
        const std::array<std::byte, 60> frame{};
        EXPECT_TRUE(m.card().is_open());
        EXPECT_EQ(m.card().send_now({frame}), io::SendStatus::timed_out) << "no room now";
        io::SendStatus status = io::SendStatus::not_sent;
        io::TaskGroup group(m.executor);
        ASSERT_TRUE(group.spawn(send(m.card(), frame, 1000 * ms, status)));
        pass(m, ms);
        Capture log;
        m.back.start_again();
        pass(m, 50 * ms);
        EXPECT_EQ(status, io::SendStatus::sent);
        EXPECT_EQ(m.back.sent.size(), 1u);
        EXPECT_TRUE(log.has("eth0: connected again")) << log.text;
        m.back.deliver(std::string(60, 'x'));
        pass(m, ms);
        EXPECT_EQ(m.receiver.got.size(), 1u);
        EXPECT_EQ(m.card().lanes(), std::max(queues, 1u));
        EXPECT_EQ(m.guest.in_use(), in_use);
        EXPECT_EQ(m.xen.memory.outstanding, memory);
        EXPECT_TRUE(m.sink.withdrawn.empty());
    }
}

// The back end serves fewer queues than before, or this side cannot have more: the other lanes go on.
TEST(XenNetReturn, TheCardGoesOnWithFewerQueuesAndTakesTheRestBackLater) {
    const std::array<std::byte, 60> frame{};
    for (const bool short_here : {false, true}) {
        for (const u32 fewer : {1u, 2u}) {
            NetMachine m({.queues = 3}, 0, 3);
            m.open();
            std::array<fake::Receiver, 3> receivers;
            for (u32 lane = 0; lane < 3; ++lane) {
                m.card().lane(lane).set_receiver(&receivers[lane]);
            }
            const hv::Xen::InUse in_use = m.guest.in_use();
            const u64 memory = m.xen.memory.outstanding;
            const auto return_with = [&](u32 queues) {
                m.back.die();
                m.back.go(6);
                pass(m, 20 * ms);
                m.back.offer.queues = short_here ? 3 : queues;
                m.xen.most_ports = short_here ? m.xen.open_ports.size() + queues : ~usize{0};
                m.back.start_again();
                for (u32 i = 0; i < 5; ++i) { // the other processors take a turn in each sleep
                    pass(m, 10 * ms);
                }
                ASSERT_EQ(m.back.queues.size(), queues);
                EXPECT_EQ(m.card().lanes(), 3u) << "of the card, for ever";
                for (u32 lane = 0; lane < 3; ++lane) {
                    io::NetDevice& device = m.card().lane(lane);
                    EXPECT_EQ(device.is_open(), lane < queues) << lane;
                    EXPECT_EQ(device.send_now({frame}),
                              lane < queues ? io::SendStatus::sent : io::SendStatus::device_gone);
                    if (lane < queues) {
                        m.back.deliver(std::string(60, 'x'), 0, lane);
                    }
                }
                m.back.sent.clear();
                const std::array had{receivers[0].got.size(), receivers[1].got.size(), receivers[2].got.size()};
                pass(m, ms);
                EXPECT_EQ(m.back.sent.size(), queues);
                for (u32 lane = 0; lane < 3; ++lane) {
                    EXPECT_EQ(receivers[lane].got.size() - had[lane], lane < queues ? 1u : 0u) << lane;
                }
            };
            Capture log;
            return_with(fewer);
            EXPECT_TRUE(log.has("xen_net: device/vif/0: " + std::to_string(fewer) + " of 3 queues: " +
                                (short_here ? "Xen gives no event channel"
                                            : "the back end has returned with fewer queues (multi-queue-max-queues)")))
                << log.text;
            EXPECT_EQ(m.card().identity().features.view(),
                      fewer == 1 ? "scatter-gather checksum" : "scatter-gather checksum multi-queue");
            return_with(3);
            EXPECT_EQ(m.guest.in_use(), in_use);
            EXPECT_EQ(m.xen.memory.outstanding, memory);
            EXPECT_TRUE(m.sink.withdrawn.empty());
            for (u32 lane = 0; lane < 3; ++lane) {
                m.card().lane(lane).set_receiver(nullptr);
            }
        }
    }
}

TEST(XenNetReturn, NoQueueOrNoReturnClosesTheCard) {
    for (const bool back : {false, true}) {
        NetMachine m({.queues = 3}, 0, 3);
        m.open();
        m.back.die();
        m.back.go(6);
        pass(m, 10 * ms);
        if (back) {
            m.xen.most_ports = 0;
            m.back.start_again();
        }
        Capture log;
        for (u32 i = 0; i < 10; ++i) { // the other processors take a turn in each sleep
            pass(m, 200 * ms);
        }
        EXPECT_FALSE(m.card().is_open());
        EXPECT_EQ(log.has("Xen gives no event channel"), back) << log.text;
        EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{0}) << log.text;
        EXPECT_EQ(m.guest.in_use().grants, 0u);
        EXPECT_EQ(m.xen.open_ports.size(), 0u);
    }
}

} // namespace
