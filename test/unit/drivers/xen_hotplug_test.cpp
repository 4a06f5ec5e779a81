// Xen devices that the toolstack adds and removes while the guest runs: found by the bus, attached and ended by their
// drivers, through the sinks of the kernel.
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
import drivers.table;
import drivers.xen_blk;
import drivers.xen_net;
import boot.sinks;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_blk_fake.hpp"
#include "unit/drivers/xen_net_fake.hpp"

namespace {
using namespace fl;
using fake::Blkback;
using fake::Netback;
constexpr Nanoseconds ms = 1'000'000;

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    std::string text;
};

/// A guest that offers late devices to the drivers of disks and network cards, as boot.binder does.
struct Guest : fake::Machine {
    explicit Guest(usize bytes = 48u << 20)
        : Machine(bytes), attached(plan), disks(attached, "xen_blk"), nets(attached, "xen_net"),
          disk_environment{executor, xen.memory, xen.interrupts, disks.disks, 200 * ms},
          net_environment{executor, xen.memory, xen.interrupts, nets.disks, 200 * ms}, tasks(executor) {
        xen.memory.reuse = true;
        net_environment.nets = &nets.nets;
        world.device = [this] {
            bool did = false;
            for (auto& back : block) {
                did = back->step() || did;
            }
            for (auto& back : net) {
                did = back->step() || did;
            }
            return did;
        };
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
    }
    ~Guest() {
        for (auto& back : net) {
            EXPECT_EQ(back->rules_broken, std::vector<std::string>{});
        }
    }
    /// Lists and attaches what is there, and begins to watch.
    void begin() {
        hv::DeviceList found;
        ASSERT_TRUE(run(guest.enumerate(found)));
        for (const hv::SyntheticDevice& device : found.all()) {
            ASSERT_TRUE(run(probe(device)));
        }
        ASSERT_TRUE(tasks.spawn(offer()));
        pass(ms);
    }
    io::Task<Result<void>> probe(hv::SyntheticDevice device) {
        offered.push_back(std::string(device.type.view()) + " " + std::string(device.address.view()));
        auto done = device.type == "vbd" ? co_await drivers::xen_blk::probe(disk_environment, guest, device)
                                         : co_await drivers::xen_net::probe(net_environment, guest, device);
        failed += done ? 0 : 1;
        co_return done;
    }
    io::Task<Result<void>> offer() {
        for (;;) {
            static_cast<void>(co_await guest.changes().wait());
            while (const auto device = guest.next_device()) {
                static_cast<void>(co_await probe(*device));
            }
        }
    }
    void pass(Nanoseconds time) { ASSERT_TRUE(run(fake::sleep(executor, time))); }
    Blkback& add_disk(const fake::Offer& how, u32 number) {
        return *block.emplace_back(std::make_unique<Blkback>(xen, how, number));
    }
    io::BlockDevice* disk(std::string_view name) const {
        io::BlockDevice* const found = attached.disks.find(name);
        return found != nullptr && !found->removed() ? found : nullptr;
    }
    io::NetDevice* card(std::string_view name) const {
        io::NetDevice* const found = attached.nets.find(name);
        return found != nullptr && found->is_open() ? found : nullptr;
    }

    drivers::Table table;
    drivers::Plan plan = table.plan(hv::VmGuest::xen, std::nullopt);
    boot::Attached attached;
    boot::DriverSinks disks, nets;
    drivers::Environment disk_environment, net_environment;
    std::vector<std::unique_ptr<Blkback>> block;
    std::vector<std::unique_ptr<Netback>> net;
    std::vector<std::string> offered;
    u32 failed = 0;
    io::TaskGroup tasks;
};

// ---- the bus ----

/// Only the bus: no driver takes what it finds.
struct Bus : fake::Machine {
    Bus() {
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
        hv::DeviceList found;
        add(51712);
        EXPECT_TRUE(run(guest.enumerate(found)));
        EXPECT_EQ(found.count(), 1u);
        static_cast<void>(guest.changes());
        pass();
    }
    static std::string path(u32 number) { return "/local/domain/1/device/vbd/" + std::to_string(number); }
    void add(u32 number, const std::string& state = "1") { xen.set(path(number) + "/state", state); }
    void pass() { EXPECT_TRUE(run(fake::sleep(executor, ms))); }
    std::vector<u32> all() {
        pass();
        std::vector<u32> numbers;
        while (const auto device = guest.next_device()) {
            EXPECT_EQ(device->type.view(), "vbd");
            EXPECT_EQ(device->address.view(), std::to_string(device->number));
            numbers.push_back(device->number);
        }
        return numbers;
    }
};

TEST(XenHotplugBus, FindsWhatIsAddedOnce) {
    Bus bus;
    EXPECT_FALSE(bus.guest.changes().is_open()) << "what enumerate() has listed is not new";
    EXPECT_FALSE(bus.guest.next_device());
    bus.add(51728);
    bus.pass();
    EXPECT_TRUE(bus.guest.changes().is_open());
    EXPECT_EQ(bus.all(), std::vector<u32>{51728});
    bus.guest.changes().close();
    bus.add(51728, "4");
    EXPECT_EQ(bus.all(), std::vector<u32>{});
    EXPECT_FALSE(bus.guest.changes().is_open());
    bus.xen.set("/local/domain/1/device/suspend/event-channel", "");
    bus.xen.set("/local/domain/1/device/vbd/unknown/state", "1");
    EXPECT_EQ(bus.all(), std::vector<u32>{}) << "no devices";
}

TEST(XenHotplugBus, WaitsUntilADeviceIsWhole) {
    Bus bus;
    bus.xen.set(Bus::path(51728) + "/backend", "/nowhere");
    EXPECT_EQ(bus.all(), std::vector<u32>{}) << "its state is the last node";
    bus.add(51728);
    EXPECT_EQ(bus.all(), std::vector<u32>{51728});
}

TEST(XenHotplugBus, ForgetsWhatIsRemoved) {
    Bus bus;
    bus.add(51728);
    bus.add(51744);
    bus.pass();
    bus.xen.remove(Bus::path(51728));
    EXPECT_EQ(bus.all(), std::vector<u32>{51744}) << "the other one has never been taken";
    bus.add(51728);
    EXPECT_EQ(bus.all(), std::vector<u32>{51728});
    bus.xen.remove(Bus::path(51728));
    bus.pass();
    bus.add(51728);
    EXPECT_EQ(bus.all(), std::vector<u32>{51728}) << "another device of the same number";
}

struct Ended final : hv::xen::BusDevice {
    explicit Ended(u32 number) : BusDevice("vbd", number) {}
    bool holds_grants() const override { return false; }
    io::Task<Result<void>> pause() override { co_return Result<void>{}; }
    void lost() override {}
    void resumed(bool) override {}
};

TEST(XenHotplugBus, AnEndedDeviceIsFoundAgainOnceItIsMadeAnew) {
    Bus bus;
    bus.add(51712, "6");
    bus.guest.ended(Ended(51712));
    EXPECT_EQ(bus.all(), std::vector<u32>{}) << "still the old one, which is closed";
    bus.add(51712, "1"); // between two listings
    EXPECT_EQ(bus.all(), std::vector<u32>{51712});
    EXPECT_EQ(bus.all(), std::vector<u32>{}) << "once";
    bus.add(51712, "1");
    EXPECT_EQ(bus.all(), std::vector<u32>{}) << "its driver has not ended it";
}

TEST(XenHotplugBus, TheQueueIsBounded) {
    Bus bus;
    constexpr u32 room = hv::xen::DeviceWatch::max_pending;
    for (u32 i = 0; i < room + 3; ++i) {
        bus.add(268435456 + i * 256);
    }
    bus.pass();
    EXPECT_EQ(bus.guest.new_dropped(), 3u);
    EXPECT_EQ(bus.guest.new_dropped(), 0u) << "each is reported once";
    EXPECT_EQ(bus.all().size(), room);
    bus.add(268435456);
    EXPECT_EQ(bus.all().size(), 0u);
    bus.xen.remove(Bus::path(268435456 + 256 * room)); // one of those that were dropped: the order is of texts
    bus.add(268435456 + 256 * (room + 7));
    EXPECT_EQ(bus.all().size(), 1u);
    EXPECT_EQ(bus.guest.new_dropped(), 0u);
}

// ---- disks ----

// Attached and detached again and again: nothing is left behind, and the disk has its name each time.
TEST(XenHotplug, AThousandDisksLeaveNothing) {
    Guest m(24u << 20);
    m.add_disk({}, 51712);
    m.begin();
    const DmaSpan buffer = *m.xen.memory.allocate(64 * 1024, ~u64{0});
    Blkback& back = m.add_disk({.sectors = 2048, .persistent = true, .indirect = 256, .ring_order = 2}, 51728);
    const auto cycle = [&](u32 i) {
        m.pass(ms);
        io::BlockDevice* const disk = m.disk("xvdb");
        ASSERT_NE(disk, nullptr) << i;
        std::memset(buffer.data, static_cast<int>(i), buffer.size);
        ASSERT_TRUE(m.run(fake::write(*disk, i % 1000, buffer))) << i;
        ASSERT_EQ(back.disk[i % 1000 * 512 + buffer.size - 1], static_cast<std::byte>(i));
        back.detach();
        m.pass(60 * ms);
        ASSERT_FALSE(back.present) << i;
        ASSERT_EQ(m.disk("xvdb"), nullptr) << i;
        ASSERT_TRUE(disk->removed());
        EXPECT_EQ(m.run(fake::write(*disk, 0, buffer)).error().code, Code::device_gone);
        // what the back end offers differs from time to time
        back.offer.persistent = i % 2 == 0;
        back.offer.indirect = i % 3 == 0 ? 0 : 256;
        back.offer.ring_order = i % 5 == 0 ? std::nullopt : std::optional(i % 3);
        back.appear();
    };
    back.appear();
    for (u32 i = 0; i < 4; ++i) {
        cycle(i);
    }
    back.vanish();
    m.pass(60 * ms);
    const hv::Xen::InUse in_use = m.guest.in_use();
    const u64 memory = m.xen.memory.outstanding;
    const usize frames = io::frame_pool().in_use();
    const usize ports = m.xen.open_ports.size(), watches = m.xen.watches.size();
    const u32 grants = m.xen.live_grants();
    io::BlockDevice* const same = m.attached.disks.find("xvdb");
    back.appear();
    for (u32 i = 0; i < 1000; ++i) {
        m.xen.next_port = 5; // the fake never gives a port twice
        while (m.xen.open_ports.contains(m.xen.next_port)) {
            ++m.xen.next_port;
        }
        cycle(i);
        if (HasFatalFailure()) {
            return;
        }
    }
    back.vanish();
    m.pass(60 * ms);
    EXPECT_EQ(m.guest.in_use(), in_use);
    EXPECT_EQ(m.xen.memory.outstanding, memory);
    EXPECT_EQ(io::frame_pool().in_use(), frames);
    EXPECT_EQ(m.xen.open_ports.size(), ports);
    EXPECT_EQ(m.xen.watches.size(), watches);
    EXPECT_EQ(m.xen.live_grants(), grants);
    EXPECT_EQ(m.guest.grants().in_quarantine(), 0u);
    EXPECT_EQ(m.attached.disks.all().size(), 2u) << "one object for all of them";
    EXPECT_EQ(m.attached.disks.find("xvdb"), same);
    m.block[0]->detach();
    m.pass(60 * ms);
    EXPECT_EQ(m.guest.in_use().grants, 0u);
    Capture log;
    m.guest.uninstall();
    EXPECT_EQ(log.text.find("error"), std::string::npos) << log.text;
    ASSERT_TRUE(m.guest.grants().take());
    m.guest.uninstall();
    EXPECT_NE(log.text.find("1 grant entries are left behind"), std::string::npos) << log.text;
    EXPECT_EQ(m.failed, 0u);
    EXPECT_EQ(m.xen.bad_maps, 0u);
}

TEST(XenHotplug, ADiskThatIsDetachedInUseEndsItsRequestsAndComesBack) {
    Guest m;
    Blkback& first = m.add_disk({}, 51712);
    Blkback& second = m.add_disk({}, 51728);
    m.begin();
    second.hold = true;
    const DmaSpan buffer = *m.xen.memory.allocate(8192, ~u64{0});
    io::BlockDevice& disk = *m.disk("xvdb");
    io::BlockDevice::Transfer a(disk, io::Op::write, 0, buffer.subspan(0, 4096));
    io::BlockDevice::Transfer b(disk, io::Op::read, 8, buffer.subspan(4096, 4096));
    disk.submit(a);
    disk.submit(b);
    m.pass(ms);
    ASSERT_EQ(second.held().size(), 2u);
    Capture log;
    second.detach();
    m.pass(60 * ms);
    EXPECT_EQ(a.status, io::Status::device_gone);
    EXPECT_EQ(b.status, io::Status::device_gone);
    EXPECT_FALSE(a.buffer_lost);
    EXPECT_TRUE(disk.removed());
    EXPECT_NE(log.text.find("xvdb: closed: the back end has closed the device"), std::string::npos);
    EXPECT_FALSE(first.held().size());
    EXPECT_TRUE(m.run(fake::write(*m.disk("xvda"), 0, buffer))) << "the other one works";
    second.hold = false;
    second.offer.sectors = 2048; // another disk
    second.offer.sector_size = 4096;
    second.offer.read_only = true;
    second.appear();
    m.pass(ms);
    ASSERT_EQ(m.disk("xvdb"), &disk);
    EXPECT_EQ(disk.geometry().sectors, 256u);
    EXPECT_EQ(disk.geometry().sector_size, 4096u);
    EXPECT_TRUE(disk.geometry().read_only);
    EXPECT_TRUE(m.run(fake::read(disk, 255, buffer.subspan(0, 4096))));
    EXPECT_EQ(m.run(fake::read(disk, 256, buffer.subspan(0, 4096))).error().code, Code::bad_argument);
    EXPECT_EQ(m.failed, 0u);
}

// `xl block-detach --force`: the nodes go first, and nothing that is written afterwards makes them anew.
TEST(XenHotplug, ADiskThatIsRemovedByForceLeavesNothing) {
    Guest m;
    m.begin();
    const hv::Xen::InUse in_use = m.guest.in_use();
    Blkback& back = m.add_disk({.persistent = true}, 51728);
    back.appear();
    m.pass(ms);
    ASSERT_NE(m.disk("xvdb"), nullptr);
    EXPECT_NE(m.guest.in_use(), in_use);
    back.vanish();
    m.pass(60 * ms);
    EXPECT_EQ(m.disk("xvdb"), nullptr);
    EXPECT_FALSE(m.xen.tree.contains(back.front + "/state"));
    EXPECT_EQ(m.guest.in_use(), in_use);
    // removed and made anew before the guest has looked
    back.appear();
    m.pass(ms);
    ASSERT_NE(m.disk("xvdb"), nullptr);
    back.vanish();
    back.appear();
    m.pass(100 * ms);
    ASSERT_NE(m.disk("xvdb"), nullptr);
    EXPECT_EQ(back.state(), 4u);
    EXPECT_EQ(m.offered.size(), 3u);
    EXPECT_EQ(m.failed, 0u);
}

// A back end that keeps the ring: its Vbd is never used again, and the name goes to a new one.
TEST(XenHotplug, WhatABackEndKeepsIsNotUsedForTheNextDisk) {
    Guest m;
    m.begin();
    Blkback& back = m.add_disk({}, 51728);
    back.appear();
    m.pass(ms);
    io::BlockDevice* const old = m.disk("xvdb");
    ASSERT_NE(old, nullptr);
    back.dead = back.never_closes = back.offer.never_connects = true;
    back.put("online", 0);
    back.go(5);
    m.pass(1000 * ms);
    EXPECT_EQ(m.disk("xvdb"), nullptr);
    const u32 kept = m.guest.in_use().grants;
    EXPECT_EQ(kept, 1u) << "the ring";
    back.dead = back.never_closes = back.offer.never_connects = false;
    back.vanish();
    back.appear();
    m.pass(100 * ms);
    ASSERT_NE(m.disk("xvdb"), nullptr);
    EXPECT_NE(m.disk("xvdb"), old);
    EXPECT_EQ(m.failed, 0u);
}

// ---- network cards ----

TEST(XenHotplug, AThousandCardsLeaveNothing) {
    Guest m(24u << 20);
    m.begin();
    Netback& back = *m.net.emplace_back(std::make_unique<Netback>(m.xen, fake::NetOffer{}, 3));
    const std::array<std::byte, 60> frame{};
    const auto cycle = [&](u32 i) {
        m.pass(ms);
        io::NetDevice* const card = m.card("eth0");
        ASSERT_NE(card, nullptr) << i;
        ASSERT_EQ(card->send_now({frame}), io::SendStatus::sent);
        m.pass(ms);
        ASSERT_EQ(back.sent.size(), 1u);
        back.sent.clear();
        back.detach();
        m.pass(60 * ms);
        ASSERT_FALSE(back.present) << i;
        ASSERT_EQ(card->send_now({frame}), io::SendStatus::device_gone);
        back.appear();
    };
    back.appear();
    for (u32 i = 0; i < 3; ++i) {
        cycle(i);
    }
    back.vanish();
    m.pass(60 * ms);
    const hv::Xen::InUse in_use = m.guest.in_use();
    const u64 memory = m.xen.memory.outstanding;
    const usize frames = io::frame_pool().in_use();
    back.appear();
    for (u32 i = 0; i < 1000; ++i) {
        m.xen.next_port = 5;
        cycle(i);
        if (HasFatalFailure()) {
            return;
        }
    }
    back.vanish();
    m.pass(60 * ms);
    EXPECT_EQ(m.guest.in_use(), in_use);
    EXPECT_EQ(m.guest.in_use().grants, 0u);
    EXPECT_EQ(m.xen.live_grants(), 0u);
    EXPECT_EQ(m.xen.memory.outstanding, memory);
    EXPECT_EQ(io::frame_pool().in_use(), frames);
    EXPECT_EQ(m.attached.nets.all().size(), 1u);
    EXPECT_EQ(m.failed, 0u);
}

} // namespace
