// A Xen disk with several queues, each with the ring, the event channel and the processor of its own.
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
import hv.xen;
import drivers.driver;
import drivers.xen_blk;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_blk_fake.hpp"

namespace {
using namespace fl;
using fake::LanesMachine;
using fake::Offer;
using io::Status;
constexpr Nanoseconds ms = 1'000'000;
constexpr u32 no_multi_queue = to_underlying(drivers::Feature::multi_queue);
constexpr u32 no_persistent = to_underlying(drivers::Feature::persistent);

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(std::string_view what) const { return text.find(what) != std::string::npos; }
    u32 count(std::string_view what) const {
        u32 found = 0;
        for (usize at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
            ++found;
        }
        return found;
    }
    std::string text;
};

struct Parking final : hv::Parking {
    io::Task<Result<void>> park() override { co_return Result<void>{}; }
    void release() override {}
};

void pass(fake::Machine& m, Nanoseconds time) { ASSERT_TRUE(m.run(fake::sleep(m.executor, time))); }

/// A request on a lane, submitted and destroyed on that lane's processor.
struct LaneRequest {
    LaneRequest(LanesMachine& m, u32 lane, io::Op op, u64 lba, u32 bytes = 4096)
        : buffer(m.buffer(bytes)), processor(lane), disk(m.disk().lane(lane)) {
        std::memset(buffer.data, static_cast<int>(lba / 8 + 1), bytes);
        set_this_processor(lane);
        request.emplace(disk, op, lba, buffer);
        disk.submit(*request);
        set_this_processor(0);
    }
    ~LaneRequest() {
        set_this_processor(processor);
        request.reset();
        set_this_processor(0);
    }
    bool pending() const { return request->pending(); }
    Status status() const { return request->status; }
    DmaSpan buffer;
    u32 processor;
    io::BlockDevice& disk;
    std::optional<io::Request> request;
};

/// `each` writes on every lane, of different blocks of `bytes`.
struct Load {
    Load(LanesMachine& m, u32 each, u32 bytes = 4096) : machine(m), size(bytes) {
        for (u32 i = 0; i < each; ++i) {
            for (u32 lane = 0; lane < m.disk().queues(); ++lane) {
                const u64 lba = u64{i * m.disk().queues() + lane} * bytes / 512;
                all.push_back(std::make_unique<LaneRequest>(m, lane, io::Op::write, lba, bytes));
            }
        }
    }
    bool pending() const {
        return std::ranges::any_of(all, [](const auto& request) { return request->pending(); });
    }
    void check() {
        for (usize i = 0; i < all.size(); ++i) {
            ASSERT_FALSE(all[i]->pending()) << i;
            EXPECT_EQ(all[i]->status(), Status::ok) << i;
            EXPECT_EQ(std::memcmp(machine.back.disk.data() + i * size, all[i]->buffer.data, size), 0) << i;
        }
    }
    LanesMachine& machine;
    u32 size;
    std::vector<std::unique_ptr<LaneRequest>> all;
};

/// The toolstack detaches the disk: nothing of it is left.
void detach(LanesMachine& m) {
    Capture log;
    m.back.detach();
    pass(m, 100 * ms);
    EXPECT_FALSE(m.back.present) << log.text;
    EXPECT_EQ(m.xen.live_grants(), 0u);
    EXPECT_EQ(m.guest.in_use().grants, 0u);
    EXPECT_EQ(m.guest.in_use().event_channels, 1u) << "XenStore's";
    EXPECT_TRUE(m.xen.open_ports.empty());
}

const Offer plain{.sectors = 16384, .max_queues = "4"};
const Offer full{.sectors = 16384, .persistent = true, .indirect = 256, .ring_order = 1, .max_queues = "4"};

// The keys are those of blkif.h.
TEST(XenBlkLanes, EachProcessorHasAQueueWithItsOwnRingAndEvents) {
    for (const Offer& offer : {plain, full}) {
        LanesMachine m(offer, 4);
        ASSERT_TRUE(m.probe());
        EXPECT_EQ(m.disk().queues(), 4u);
        EXPECT_EQ(m.disk().identity().features.view(),
                  offer.persistent ? "flush persistent indirect ring-pages=2 queues=4" : "flush ring-pages=1 queues=4");
        EXPECT_EQ(m.xen.get(m.back.front + "/multi-queue-num-queues"), "4");
        std::set<u64> ports, refs;
        for (const std::string number : {"0", "1", "2", "3"}) {
            const std::string queue = "queue-" + number;
            ports.insert(m.back.front_number(queue + "/event-channel"));
            EXPECT_EQ(m.xen.port_vcpu[static_cast<u32>(m.back.front_number(queue + "/event-channel"))],
                      static_cast<u32>(number[0] - '0'));
            if (offer.ring_order) {
                refs.insert(m.back.front_number(queue + "/ring-ref0"));
                refs.insert(m.back.front_number(queue + "/ring-ref1"));
                EXPECT_FALSE(m.back.has_front(queue + "/ring-ref"));
                EXPECT_FALSE(m.back.has_front(queue + "/ring-page-order")) << "for all queues together";
            } else {
                refs.insert(m.back.front_number(queue + "/ring-ref"));
            }
        }
        EXPECT_EQ(ports.size(), 4u);
        EXPECT_EQ(refs.size(), offer.ring_order ? 8u : 4u);
        EXPECT_EQ(m.back.has_front("ring-page-order"), offer.ring_order.has_value());
        EXPECT_FALSE(m.back.has_front("ring-ref") || m.back.has_front("ring-ref0") || m.back.has_front("event-channel"))
            << "only in queue-N";
        ASSERT_EQ(m.back.further.size(), 3u);
        for (u32 lane = 0; lane < 4; ++lane) {
            const auto taken = [&] {
                std::array<u64, 4> all{m.back.requests_taken};
                for (u32 i = 1; i < 4; ++i) {
                    all[i] = m.back.further[i - 1].taken;
                }
                return all;
            };
            const auto before = taken();
            const u64 upcalls = m.guest.events().upcalls(lane);
            LaneRequest write(m, lane, io::Op::write, u64{lane} * 8);
            pass(m, ms);
            LaneRequest read(m, lane, io::Op::read, u64{lane} * 8);
            pass(m, ms);
            EXPECT_EQ(write.status(), Status::ok);
            EXPECT_EQ(read.status(), Status::ok);
            EXPECT_EQ(m.back.disk.data()[lane * 4096], static_cast<std::byte>(lane + 1));
            const auto after = taken();
            for (u32 i = 0; i < 4; ++i) {
                EXPECT_EQ(after[i] - before[i], i == lane ? 2u : 0u) << i << " of " << lane;
            }
            EXPECT_GT(m.guest.events().upcalls(lane), upcalls) << lane;
            EXPECT_GE(m.disk().lane(lane).counters().interrupts, 1u);
        }
        EXPECT_EQ(m.back.bad_grants, 0u);
        EXPECT_EQ(m.xen.bad_maps, 0u);
        detach(m);
    }
}

TEST(XenBlkLanes, AllAreUnderLoadTogether) {
    for (const Offer& offer : {plain, full}) {
        LanesMachine m(offer, 2);
        ASSERT_TRUE(m.probe());
        ASSERT_EQ(m.disk().queues(), 2u);
        m.back.at_once = 3;
        for (u32 round = 0; round < 8; ++round) {
            Load load(m, 30, 32 * 1024);
            pass(m, 20 * ms);
            load.check();
        }
        EXPECT_EQ(m.back.bad_grants, 0u);
        EXPECT_EQ(m.xen.bad_maps, 0u);
        detach(m);
    }
}

struct Count {
    Offer offer;
    u32 processors, withheld, queues;
};
TEST(XenBlkLanes, AsManyQueuesAsBothSidesHave) {
    const std::vector<Count> counts{
        {{.max_queues = "2"}, 4, 0, 2},                                  // as many as the back end serves
        {{.persistent = true, .max_queues = "64"}, 3, 0, 3},             // as there are processors
        {{.max_queues = "4294967296"}, 3, 0, 3},                         // not 0
        {{.max_queues = "18446744073709551615"}, 2, 0, 2},               //
        {{.max_queues = "100"}, 12, 0, 8},                               // the driver's own limit
        {{.max_queues = "0"}, 4, 0, 1},                                  // nothing that is a number of queues
        {{.max_queues = "1"}, 4, 0, 1},                                  //
        {{.max_queues = "-1"}, 4, 0, 1},                                 //
        {{.max_queues = "many"}, 4, 0, 1},                               //
        {{.max_queues = "4 "}, 4, 0, 1},                                 //
        {{.max_queues = std::string(100, '9')}, 4, 0, 1},                //
        {{}, 4, 0, 1},                                                   // no such key
        {{.persistent = true, .max_queues = "4"}, 4, no_multi_queue, 1}, // withheld
        {{.persistent = true, .max_queues = "4"}, 4, no_persistent, 4},
    };
    for (const Count& each : counts) {
        SCOPED_TRACE(each.offer.max_queues + " " + std::to_string(each.withheld));
        LanesMachine m(each.offer, each.processors, each.withheld);
        ASSERT_TRUE(m.probe());
        ASSERT_EQ(m.disk().queues(), each.queues);
        if (each.queues == 1) {
            EXPECT_TRUE(m.back.has_front("ring-ref") && m.back.has_front("event-channel"));
            EXPECT_FALSE(m.back.has_front("queue-0/ring-ref"));
        }
        Load load(m, 3);
        pass(m, 5 * ms);
        load.check();
        detach(m);
    }
}

// Each gets an equal part of the grants, and those of other disks stay.
TEST(XenBlkLanes, GrantsAreSharedAmongTheQueues) {
    for (const u32 frames : {1u, 2u, 64u}) {
        for (const Offer& offer : {plain, full}) {
            LanesMachine m(offer, 4);
            m.xen.grant_frames_limit = frames;
            ASSERT_TRUE(m.probe());
            SCOPED_TRACE(std::to_string(frames) + (offer.persistent ? " persistent" : ""));
            EXPECT_GE(m.guest.grants().obtainable(), frames * 512u / 4);
            m.back.dead = true; // nothing is answered: each takes what it gets
            const u32 each = frames == 64 ? 30 : 8;
            Load load(m, each, 32 * 1024);
            pass(m, ms);
            std::array<u32, 4> started{};
            for (u32 lane = 0; lane < 4; ++lane) {
                m.back.with_queue(lane, [&] { started[lane] = m.back.word(0) - m.back.req_cons; });
                EXPECT_GE(started[lane], 4u) << lane;
            }
            if (offer.persistent) {
                EXPECT_EQ(std::ranges::min(started), std::ranges::max(started));
            }
            m.back.dead = false;
            for (u32 lane = 0; lane < 4; ++lane) {
                m.back.with_queue(lane, [&] { m.back.more_work = true; });
            }
            pass(m, 100 * ms);
            load.check();
            detach(m);
        }
    }
}

// Without grants for all of them there are fewer, and the log says so.
TEST(XenBlkLanes, ShortOfGrants) {
    LanesMachine m(plain, 4, no_persistent);
    m.xen.grant_frames_limit = 1;
    EXPECT_TRUE(m.install());
    EXPECT_TRUE(m.start());
    while (m.guest.grants().available() > 80) {
        static_cast<void>(m.guest.grants().take());
    }
    Capture log;
    for (u32 i = 1; i < 4; ++i) {
        set_this_processor(i);
        EXPECT_TRUE(m.guest.join(i, *m.all[i]));
        set_this_processor(0);
    }
    ASSERT_TRUE(m.run(drivers::xen_blk::probe(m.environment, m.guest, m.device)));
    EXPECT_LT(m.disk().queues(), 4u);
    EXPECT_GT(m.disk().queues(), 1u);
    EXPECT_TRUE(log.has(" of 4 queues: ")) << log.text;
    Load load(m, 4);
    pass(m, 10 * ms);
    load.check();
}

TEST(XenBlkLanes, ShortOfEventChannels) {
    LanesMachine m(plain, 4);
    EXPECT_TRUE(m.install());
    EXPECT_TRUE(m.start());
    for (u32 i = 1; i < 4; ++i) {
        set_this_processor(i);
        EXPECT_TRUE(m.guest.join(i, *m.all[i]));
        set_this_processor(0);
    }
    m.xen.next_port = hv::xen::Events::capacity - 2; // Xen has more of them than this kernel has room for
    m.xen.last_port = 4095;
    Capture log;
    ASSERT_TRUE(m.run(drivers::xen_blk::probe(m.environment, m.guest, m.device)));
    EXPECT_EQ(m.disk().queues(), 2u);
    EXPECT_EQ(log.count("2 of 4 queues: an event channel's port is beyond what this kernel has room for"), 1u)
        << log.text;
    Load load(m, 4);
    pass(m, 10 * ms);
    load.check();
    detach(m);
}

// The first violation on any ring closes the disk, with one line.
TEST(XenBlkLanes, OneBrokenRingClosesTheDisk) {
    for (const Offer& offer : {plain, full}) {
        for (u32 broken = 0; broken < 2; ++broken) {
            LanesMachine m(offer, 2);
            ASSERT_TRUE(m.probe());
            m.back.hold = true;
            Load load(m, 3);
            pass(m, ms);
            ASSERT_EQ(m.back.held().size(), 6u);
            Capture log;
            m.back.with_queue(broken, [&] {
                m.back.violating = true;
                m.back.push(0x1234567, 0, 0);
            });
            m.xen.deliver();
            pass(m, ms);
            EXPECT_EQ(log.count("closed: "), 1u) << log.text;
            EXPECT_TRUE(log.has("xvda: closed: a response carries an id that is not in flight")) << log.text;
            for (const auto& request : load.all) {
                EXPECT_EQ(request->status(), Status::protocol_error) << request->processor;
            }
            m.back.violating = false;
            pass(m, 300 * ms);
            EXPECT_EQ(m.xen.live_grants(), 0u);
            EXPECT_EQ(m.guest.in_use().grants, 0u);
            EXPECT_TRUE(m.xen.open_ports.empty());
        }
    }
}

// A queue is not silent while others are answered; a silent disk is found by any of them.
TEST(XenBlkLanes, ASilentBackEndClosesTheDiskOnce) {
    LanesMachine m(plain, 3);
    ASSERT_TRUE(m.probe());
    m.back.dead = true;
    Capture log;
    Load load(m, 2);
    pass(m, 600 * ms);
    EXPECT_FALSE(load.pending());
    EXPECT_EQ(log.count("closed: "), 1u) << log.text;
}

struct Back {
    const char* name;
    Offer before, after;
};
class XenBlkLanesReturn : public testing::TestWithParam<Back> {};
TEST_P(XenBlkLanesReturn, EverythingUnderWayOnEveryQueueIsAskedAgain) {
    for (const bool taken : {false, true}) {
        LanesMachine m(GetParam().before, 4);
        ASSERT_TRUE(m.probe());
        const u32 queues = m.disk().queues();
        m.back.hold = m.back.hold_mapped = taken;
        m.back.dead = !taken;
        Load load(m, 5, 32 * 1024);
        pass(m, ms);
        ASSERT_TRUE(load.pending());
        m.back.die();
        pass(m, 20 * ms);
        m.back.hold = m.back.dead = false;
        m.back.offer = GetParam().after;
        Capture log;
        m.back.start_again();
        pass(m, 50 * ms);
        load.check();
        EXPECT_TRUE(log.has("xvda: connected again")) << log.text;
        EXPECT_EQ(m.disk().queues(), queues);
        EXPECT_EQ(m.back.further.size(), queues - 1);
        EXPECT_EQ(m.xen.open_ports.size(), queues) << "the old event channels are closed";
        EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
        EXPECT_EQ(m.back.bad_grants, 0u);
        Load more(m, 3);
        pass(m, 5 * ms);
        more.check();
        for (u32 lane = 1; lane < queues; ++lane) {
            EXPECT_NE(m.back.further[lane - 1].taken, 0u) << "each by its own ring";
        }
        detach(m);
    }
}
const Back backs[] = {
    {"same", plain, plain},
    {"same_full", full, full},
    {"loses_persistent", full, plain},
    {"gains_persistent", plain, full},
    {"serves_more", {.sectors = 16384, .max_queues = "2"}, plain},
    {"one_stays_one", {.sectors = 16384}, plain},
};
INSTANTIATE_TEST_SUITE_P(All, XenBlkLanesReturn, testing::ValuesIn(backs), [](const auto& i) { return i.param.name; });

TEST(XenBlkLanes, ABackEndThatReturnsWithFewerQueuesClosesTheDisk) {
    for (const char* fewer : {"2", "1", "", "none"}) {
        LanesMachine m(full, 4);
        ASSERT_TRUE(m.probe());
        m.back.hold = true;
        Load load(m, 2);
        pass(m, ms);
        m.back.die();
        m.back.hold = false;
        m.back.offer.max_queues = fewer;
        Capture log;
        m.back.start_again();
        pass(m, 500 * ms);
        EXPECT_TRUE(log.has("xvda: closed: the back end has returned with fewer queues (multi-queue-max-queues)"))
            << log.text;
        EXPECT_EQ(log.count("closed: "), 1u) << log.text;
        for (const auto& request : load.all) {
            EXPECT_EQ(request->status(), Status::device_gone);
        }
        EXPECT_EQ(m.guest.in_use().grants, 0u);
        EXPECT_TRUE(m.xen.open_ports.empty());
    }
}

TEST(XenBlkLanes, ASuspendedGuestHasItsQueuesAgainInAnotherDomain) {
    for (const Offer& offer : {plain, full}) {
        LanesMachine m(offer, 4);
        ASSERT_TRUE(m.probe());
        hv::DeviceList found;
        ASSERT_TRUE(m.run(m.guest.enumerate(found)));
        static_cast<void>(m.guest.changes());
        pass(m, ms);
        const hv::Xen::InUse in_use = m.guest.in_use();
        for (u32 i = 0; i < 3; ++i) {
            m.back.hold = i == 1; // then something is under way
            m.xen.on_suspend = [&m] {
                m.back.vanish();
                m.xen.move_to_another_domain();
                m.back.hold = false;
                m.back.appear();
                return i64{0};
            };
            Load load(m, 3, 16 * 1024);
            Parking parking;
            const auto moved = m.run(m.guest.suspend(parking));
            ASSERT_TRUE(moved);
            EXPECT_TRUE(*moved);
            pass(m, 100 * ms);
            load.check();
            EXPECT_EQ(m.back.further.size(), 3u);
            EXPECT_EQ(m.guest.in_use(), in_use);
            EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
        }
    }
}

// A suspension that is cancelled: nothing is connected anew, and every lane goes on.
TEST(XenBlkLanes, ACancelledSuspensionPausesEveryLane) {
    LanesMachine m(plain, 4);
    ASSERT_TRUE(m.probe());
    hv::DeviceList found;
    ASSERT_TRUE(m.run(m.guest.enumerate(found)));
    static_cast<void>(m.guest.changes());
    pass(m, ms);
    m.back.hold = true;
    Load load(m, 40); // a ring has 32 slots
    pass(m, ms);
    ASSERT_EQ(m.back.held().size(), 4 * 32u);
    // Every lane has paused when the first one is answered, and the last one a while later.
    m.world.device = [&, step = m.world.device, at = m.world.now + 5 * ms, queue = 0u]() mutable {
        if (queue < 4 && m.world.now >= at) {
            m.back.hold = false;
            for (u32 i = 0; i < 32; ++i) {
                m.back.answer(0, 0);
            }
            ++queue;
            at += 10 * ms;
        }
        return step();
    };
    u32 under_way = 1;
    std::array<u32, 4> waiting{};
    m.xen.on_suspend = [&] {
        under_way = 0;
        for (u32 lane = 0; lane < 4; ++lane) {
            m.back.with_queue(lane, [&] { under_way += m.back.word(0) - m.back.word(8); });
        }
        for (usize i = 0; i < load.all.size(); ++i) {
            waiting[i % 4] += load.all[i]->pending() ? 1 : 0;
        }
        return i64{1};
    };
    Parking parking;
    const auto moved = m.run(m.guest.suspend(parking));
    ASSERT_TRUE(moved);
    EXPECT_FALSE(*moved);
    EXPECT_EQ(under_way, 0u) << "the back end has answered what it had";
    for (const u32 requests : waiting) {
        EXPECT_EQ(requests, 8u) << "and no lane has sent more";
    }
    pass(m, 20 * ms);
    load.check();
    Load more(m, 3);
    pass(m, 20 * ms);
    more.check();
    EXPECT_EQ(m.back.state(), 4u);
}

// Added and removed under load, a thousand times: nothing is left each time.
TEST(XenBlkLanes, ComesAndGoesAThousandTimes) {
    LanesMachine m({.persistent = true, .max_queues = "4"}, 4);
    m.xen.memory.reuse = true;
    ASSERT_TRUE(m.probe());
    std::optional<u64> memory;
    for (u32 cycle = 0; cycle < 1000; ++cycle) {
        m.back.offer.persistent = cycle % 3 != 0;
        {
            Load load(m, 2);
            m.back.detach();
            pass(m, 30 * ms);
            ASSERT_FALSE(load.pending());
            ASSERT_FALSE(m.back.present) << cycle;
            for (auto& request : load.all) {
                m.xen.memory.free(request->buffer);
            }
        }
        ASSERT_EQ(m.guest.in_use().grants, 0u) << cycle;
        ASSERT_EQ(m.guest.in_use().event_channels, 1u) << cycle;
        ASSERT_EQ(m.xen.live_grants(), 0u) << cycle;
        ASSERT_EQ(m.guest.grants().in_quarantine(), 0u) << cycle;
        ASSERT_EQ(memory.value_or(m.xen.memory.outstanding), m.xen.memory.outstanding) << cycle;
        memory = m.xen.memory.outstanding;
        m.xen.next_port = 5; // the lowest free one, as Xen does
        m.back.appear();
        ASSERT_TRUE(m.run(drivers::xen_blk::probe(m.environment, m.guest, m.device))) << cycle;
        ASSERT_EQ(m.disk().queues(), 4u);
        if (cycle % 100 == 0) {
            Load load(m, 2);
            pass(m, 5 * ms);
            load.check();
            for (auto& request : load.all) {
                m.xen.memory.free(request->buffer);
            }
        }
    }
}

} // namespace
