// A guest that is suspended by its toolstack and goes on, in another domain (restored, migrated) or in its own (the
// suspension was cancelled). What the fake keeps for a guest is gone in another domain, as with Xen.
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

struct Parking final : hv::Parking {
    io::Task<Result<void>> park() override {
        ++parked;
        co_return refuse ? Result<void>(Error{Code::timed_out, "a processor does not stop"}) : Result<void>{};
    }
    void release() override { ++released; }
    u32 parked = 0, released = 0;
    bool refuse = false;
};

void pass(fake::Machine& m, Nanoseconds time) { ASSERT_TRUE(m.run(fake::sleep(m.executor, time))); }

/// The toolstack saves the domain, destroys it and restores it with a new back end.
template <class Back>
void move_with(fake::Machine& m, Back& back) {
    m.xen.on_suspend = [&m, &back] {
        back.vanish();
        m.xen.move_to_another_domain();
        back.appear();
        return i64{0};
    };
}

const Offer offers[] = {{}, {.persistent = true, .indirect = 256, .ring_order = 2}};

TEST(XenSuspend, EverythingIsSetUpAnewInAnotherDomain) {
    for (const Offer& offer : offers) {
        DiskMachine m(offer);
        m.xen.offers_fifo = &offer != offers; // the second time
        ASSERT_TRUE(m.probe());
        hv::DeviceList found;
        ASSERT_TRUE(m.run(m.guest.enumerate(found)));
        static_cast<void>(m.guest.changes());
        pass(m, ms);
        const hv::Xen::InUse in_use = m.guest.in_use();
        const u64 memory = m.xen.memory.outstanding;
        const u64 callback = m.xen.callback;
        const std::byte* const shared = m.xen.shared;
        const auto frames = m.xen.grant_frames;
        const auto watches = m.xen.watches;
        ASSERT_NE(callback, 0u);
        for (u32 i = 0; i < 3; ++i) {
            move_with(m, m.back);
            Parking parking;
            Capture log;
            const auto moved = m.run(m.guest.suspend(parking));
            ASSERT_TRUE(moved);
            EXPECT_TRUE(*moved);
            EXPECT_EQ(m.xen.shutdown_reason, 2u);
            EXPECT_EQ(parking.parked, 1u);
            EXPECT_EQ(parking.released, 1u);
            EXPECT_EQ(m.xen.callback, callback);
            EXPECT_EQ(m.guest.events().fifo(), m.xen.offers_fifo);
            EXPECT_EQ(m.xen.fifo, m.xen.offers_fifo);
            EXPECT_EQ(m.xen.event_cpus[0].control != nullptr && m.xen.words != nullptr, m.xen.offers_fifo);
            EXPECT_EQ(m.xen.shared, shared) << "at the same place";
            EXPECT_EQ(m.xen.grant_frames, frames);
            pass(m, 50 * ms);
            EXPECT_TRUE(log.has("xvda: connected again")) << log.text;
            EXPECT_EQ(m.guest.in_use(), in_use);
            EXPECT_EQ(m.xen.memory.outstanding, memory);
            EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
            EXPECT_EQ(m.xen.open_ports.size(), 1u);
            EXPECT_EQ(m.xen.watches.size(), watches.size());
            const DmaSpan buffer = m.buffer(64 * 1024);
            std::memset(buffer.data, static_cast<int>(i + 1), buffer.size);
            ASSERT_TRUE(m.run(fake::write(m.disk(), 8, buffer)));
            EXPECT_EQ(m.back.disk[8 * 512 + buffer.size - 1], static_cast<std::byte>(i + 1));
            m.xen.memory.free(buffer);
            // devices that are added are found, by the watch in the new store
            m.xen.set("/local/domain/1/device/vbd/" + std::to_string(51728 + 16 * i) + "/state", "1");
            pass(m, ms);
            const auto late = m.guest.next_device();
            ASSERT_TRUE(late);
            EXPECT_EQ(late->number, 51728 + 16 * i);
            EXPECT_FALSE(m.guest.next_device()) << "the disk is the same one";
        }
    }
}

TEST(XenSuspend, ProcessorsAreKickedInAnotherDomain) {
    fake::LanesMachine m({}, 2);
    m.xen.console_answer = 0; // Xen itself
    std::vector<u32> kicked;
    m.guest.take_kicks([](void* list) { static_cast<std::vector<u32>*>(list)->push_back(this_processor()); }, &kicked);
    ASSERT_TRUE(m.probe());
    const u32 ports = m.guest.events().open_ports();
    for (u32 i = 0; i < 3; ++i) {
        move_with(m, m.back);
        Parking parking;
        ASSERT_TRUE(m.run(m.guest.suspend(parking)));
        pass(m, 50 * ms);
        EXPECT_EQ(m.guest.events().open_ports(), ports);
        kicked.clear();
        for (const u32 cpu : {1u, 0u}) {
            EXPECT_TRUE(m.guest.kick(cpu)) << cpu;
            EXPECT_TRUE(m.xen.deliver());
            EXPECT_EQ(std::exchange(kicked, {}), std::vector<u32>{cpu});
        }
    }
}

// The timer of a virtual CPU is Xen's: in another domain it is not armed, and its event channel is gone. Executors arm
// it again after every suspension.
TEST(XenSuspend, AnArmedTimerIsLostAndTheTimerWorksAgain) {
    for (const bool refused : {false, true}) {
        DiskMachine m(Offer{});
        ASSERT_TRUE(m.probe());
        m.xen.set_time(0, __builtin_ia32_rdtsc(), 5'000'000'000);
        u32 expired = 0;
        ASSERT_TRUE(m.guest.timer()->start([](void* n) { ++*static_cast<u32*>(n); }, &expired));
        ASSERT_TRUE(m.guest.timer()->arm(ms));
        move_with(m, m.back);
        m.xen.refuse_virqs = refused;
        Parking parking;
        Capture log;
        ASSERT_TRUE(m.run(m.guest.suspend(parking)));
        EXPECT_FALSE(m.xen.event_cpus[0].expiry);
        m.xen.set_time(0, __builtin_ia32_rdtsc(), 1'000'000'000);
        EXPECT_EQ(m.guest.timer()->arm(ms), !refused);
        EXPECT_EQ(log.has("has no timer any more"), refused) << log.text;
        if (!refused) {
            EXPECT_LT(*m.xen.event_cpus[0].expiry, 5'000'000'000u) << "by the other domain's time";
            m.xen.expire(0);
            EXPECT_TRUE(m.xen.deliver());
            EXPECT_EQ(expired, 1u);
        }
    }
}

// Another domain's times begin at 0: what was stolen before is kept, and nothing is counted twice.
TEST(XenSuspend, StolenTimeGoesOn) {
    DiskMachine m(Offer{});
    ASSERT_TRUE(m.probe());
    m.xen.steal(0, 300, 20);
    EXPECT_EQ(m.guest.stolen(), 320u);
    for (u64 i = 1; i < 3; ++i) {
        move_with(m, m.back);
        Parking parking;
        ASSERT_TRUE(m.run(m.guest.suspend(parking)));
        EXPECT_EQ(m.guest.stolen(), 314 + 6 * i);
        m.xen.steal(0, 5, 1);
        EXPECT_EQ(m.guest.stolen(), 320 + 6 * i);
    }
    m.xen.offers_runstate = false;
    move_with(m, m.back);
    Parking parking;
    ASSERT_TRUE(m.run(m.guest.suspend(parking)));
    EXPECT_EQ(m.guest.stolen(), std::nullopt) << "the other Xen does not tell";
}

TEST(XenSuspend, ACancelledSuspensionLeavesTheTimerArmed) {
    DiskMachine m(Offer{});
    ASSERT_TRUE(m.probe());
    m.xen.set_time(0, __builtin_ia32_rdtsc(), 5'000'000'000);
    u32 expired = 0;
    ASSERT_TRUE(m.guest.timer()->start([](void* n) { ++*static_cast<u32*>(n); }, &expired));
    ASSERT_TRUE(m.guest.timer()->arm(ms));
    m.xen.on_suspend = [] { return i64{1}; };
    Parking parking;
    ASSERT_TRUE(m.run(m.guest.suspend(parking)));
    m.xen.expire(0);
    EXPECT_TRUE(m.xen.deliver());
    EXPECT_EQ(expired, 1u);
}

// A back end that is too slow to answer before: what it has is asked again.
TEST(XenSuspend, WhatIsUnderWayIsAskedAgain) {
    for (const bool taken : {false, true}) {
        for (const Offer& offer : offers) {
            DiskMachine m(offer);
            ASSERT_TRUE(m.probe());
            m.back.hold = m.back.hold_mapped = taken;
            m.back.dead = !taken;
            const DmaSpan buffer = m.buffer(8 * 65536);
            std::vector<std::unique_ptr<io::BlockDevice::Transfer>> load;
            for (u32 i = 0; i < 8; ++i) {
                const DmaSpan part = buffer.subspan(i * 65536, 65536);
                std::memset(part.data, static_cast<int>(i + 1), part.size);
                load.push_back(std::make_unique<io::BlockDevice::Transfer>(m.disk(), io::Op::write, i * 128, part));
                m.disk().submit(*load.back());
            }
            pass(m, ms);
            m.xen.on_suspend = [&] {
                m.back.vanish();
                m.xen.move_to_another_domain();
                m.back.hold = m.back.dead = false;
                m.back.appear();
                return i64{0};
            };
            Parking parking;
            Capture log;
            const auto moved = m.run(m.guest.suspend(parking));
            ASSERT_TRUE(moved);
            EXPECT_TRUE(log.has("vbd 51712 is not quiet")) << log.text;
            pass(m, 50 * ms);
            for (u32 i = 0; i < 8; ++i) {
                EXPECT_EQ(load[i]->status, Status::ok) << i;
                EXPECT_EQ(m.back.disk[(i + 1) * 65536 - 1], static_cast<std::byte>(i + 1)) << i;
            }
            EXPECT_EQ(m.back.bad_grants, 0u);
            EXPECT_EQ(m.xen.bad_maps, 0u);
        }
    }
}

// Requests that come while the machine is about to be suspended wait, and nothing is under way then.
TEST(XenSuspend, TheDiskIsQuietBefore) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold = true;
    const DmaSpan buffer = m.buffer(8192);
    io::BlockDevice::Transfer first(m.disk(), io::Op::write, 0, buffer.subspan(0, 4096));
    io::BlockDevice::Transfer second(m.disk(), io::Op::write, 8, buffer.subspan(4096, 4096));
    m.disk().submit(first);
    pass(m, ms);
    m.world.device = [&, rounds = 0]() mutable {
        if (++rounds == 20) { // in the middle of the suspension
            m.disk().submit(second);
        }
        if (rounds == 40) {
            m.back.hold = false;
            m.back.answer(0, 0);
            return true;
        }
        return m.back.step() || rounds < 40;
    };
    u32 calls = 0;
    m.xen.on_suspend = [&] {
        ++calls;
        EXPECT_EQ(first.status, Status::ok);
        EXPECT_TRUE(second.pending());
        EXPECT_EQ(m.back.served[1], 1u);
        return i64{1};
    };
    Parking parking;
    const auto moved = m.run(m.guest.suspend(parking));
    ASSERT_TRUE(moved);
    EXPECT_FALSE(*moved);
    EXPECT_EQ(calls, 1u);
    pass(m, ms);
    EXPECT_EQ(second.status, Status::ok);
}

TEST(XenSuspend, ACancelledSuspensionChangesNothing) {
    DiskMachine m({.persistent = true});
    ASSERT_TRUE(m.probe());
    m.xen.on_suspend = [] { return i64{1}; };
    const auto watches = m.xen.watches;
    const auto tree = m.xen.tree;
    const auto ports = m.xen.open_ports;
    const hv::Xen::InUse in_use = m.guest.in_use();
    Parking parking;
    const auto moved = m.run(m.guest.suspend(parking));
    ASSERT_TRUE(moved);
    EXPECT_FALSE(*moved);
    EXPECT_EQ(parking.released, 1u);
    pass(m, 50 * ms);
    EXPECT_EQ(m.xen.watches, watches);
    EXPECT_EQ(m.xen.tree, tree);
    EXPECT_EQ(m.xen.open_ports, ports);
    EXPECT_EQ(m.guest.in_use(), in_use);
    const DmaSpan buffer = m.buffer(4096);
    EXPECT_TRUE(m.run(fake::write(m.disk(), 0, buffer)));
}

TEST(XenSuspend, WithoutXenOrTheOtherProcessorsTheGuestGoesOn) {
    for (const bool parks : {false, true}) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.xen.on_suspend = [] { return i64{-38}; };
        Parking parking;
        parking.refuse = !parks;
        const auto moved = m.run(m.guest.suspend(parking));
        ASSERT_FALSE(moved);
        EXPECT_EQ(moved.error().code, parks ? Code::not_supported : Code::timed_out);
        EXPECT_EQ(m.xen.shutdown_reason, parks ? 2u : 99u);
        EXPECT_EQ(parking.released, 1u);
        const DmaSpan buffer = m.buffer(4096);
        EXPECT_TRUE(m.run(fake::write(m.disk(), 0, buffer)));
        EXPECT_EQ(m.back.state(), 4u);
    }
}

// A transaction would be unknown to another store.
TEST(XenSuspend, OpenTransactionsAreWaitedFor) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    auto& store = m.guest.store();
    const auto transaction = m.run(store.begin());
    ASSERT_TRUE(transaction);
    m.xen.on_suspend = [] { return i64{1}; };
    Parking parking;
    const auto refused = m.run(m.guest.suspend(parking));
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Code::timed_out) << "it does not end";
    EXPECT_EQ(m.xen.shutdown_reason, 99u);
    ASSERT_TRUE(m.run(store.write("data/x", "1", *transaction))) << "others go on";
    ASSERT_TRUE(*m.run(store.commit(*transaction)));
    EXPECT_TRUE(m.run(m.guest.suspend(parking)));
    EXPECT_EQ(m.xen.shutdown_reason, 2u);
}

TEST(XenSuspend, ACardStaysOpen) {
    NetMachine m({});
    m.open();
    const hv::Xen::InUse in_use = m.guest.in_use();
    const u64 memory = m.xen.memory.outstanding;
    const std::array<std::byte, 60> frame{};
    for (u32 i = 0; i < 3; ++i) {
        move_with(m, m.back);
        Parking parking;
        ASSERT_TRUE(m.run(m.guest.suspend(parking)));
        pass(m, 50 * ms);
        EXPECT_TRUE(m.card().is_open());
        m.back.sent.clear();
        EXPECT_EQ(m.card().send_now({frame}), io::SendStatus::sent);
        m.back.deliver(std::string(60, 'x'));
        pass(m, ms);
        EXPECT_EQ(m.back.sent.size(), 1u);
        EXPECT_EQ(m.receiver.got.size(), i + 1);
        EXPECT_EQ(m.guest.in_use(), in_use);
        EXPECT_EQ(m.xen.memory.outstanding, memory);
    }
}

// The new domain's back end never appears: the disk is closed within its bound, and a card too.
TEST(XenSuspend, WithoutABackEndAfterwardsTheDiskIsClosed) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.xen.on_suspend = [&] {
        m.back.vanish();
        m.xen.move_to_another_domain();
        return i64{0};
    };
    Parking parking;
    ASSERT_TRUE(m.run(m.guest.suspend(parking)));
    pass(m, 1000 * ms);
    const DmaSpan buffer = m.buffer(4096);
    EXPECT_EQ(m.run(fake::write(m.disk(), 0, buffer)).error().code, Code::device_gone);
    EXPECT_EQ(m.guest.in_use().grants, 0u);
}

TEST(XenSuspend, AnotherFrequencyIsReported) {
    for (const bool same : {true, false}) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.xen.on_suspend = [&] {
            m.back.vanish();
            m.xen.move_to_another_domain();
            m.back.appear();
            return i64{0};
        };
        // 2.5 GHz, as in the CPUID leaf: 2^32 / 2.5; or half of it
        m.xen.on_shared_info = [&](std::byte* page) {
            fake::Xen::field<u32>(reinterpret_cast<u64>(page), 32 + 24) = same ? 1717986918 : 3435973836;
        };
        Parking parking;
        Capture log;
        ASSERT_TRUE(m.run(m.guest.suspend(parking)));
        EXPECT_NE(log.has("xen: the time stamp counter runs at 1250"), same) << log.text;
    }
}

} // namespace
