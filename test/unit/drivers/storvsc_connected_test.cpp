// Guest and host in one process: the drivers on the real bus against the test host, conforming and with every fault it
// can inject.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.log;
import core.processor;
import core.wall_clock;
import io.executor;
import io.task;
import io.block;
import io.shutdown;
import hv.backend;
import hv.hyperv;
import drivers.driver;
import drivers.storvsc;
import drivers.hv_util;
import host.vmbus;
import host.storvsp;
import host.services;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/storvsc_connected.hpp"

namespace {
using namespace fl;
using connected::Machine;
namespace storvsc = drivers::storvsc;

io::Task<Result<void>> one(io::BlockDevice& disk, io::Op op, u64 lba, DmaSpan buffer) {
    io::BlockDevice::Transfer transfer(disk, op, lba, buffer);
    co_return co_await transfer;
}

struct Store {
    explicit Store(usize bytes = 4096 * 512) : data(bytes), store(data) {}
    std::vector<std::byte> data;
    host::MemoryStore store;
};

// Writes and reads random ranges and compares with the image.
void verify(Machine& m, io::BlockDevice& disk, Store& store, u32 rounds) {
    const u32 sector = disk.geometry().sector_size;
    std::mt19937_64 random(5);
    std::vector<std::byte> model(store.data);
    DmaSpan buffer = m.buffer(512 * 1024);
    for (u32 i = 0; i < rounds; ++i) {
        const u64 lba = random() % disk.geometry().sectors;
        const u32 most =
            static_cast<u32>(std::min<u64>(disk.geometry().sectors - lba, i % 4 == 0 ? 480 * 1024 / sector : 16));
        const u32 count = static_cast<u32>(1 + random() % most);
        DmaSpan span = buffer.subspan(static_cast<u32>(random() % 4) * sector, count * sector);
        if (i % 2 == 0) {
            for (std::byte& b : span.bytes()) {
                b = static_cast<std::byte>(random());
            }
            std::memcpy(model.data() + lba * sector, span.data, span.size);
            ASSERT_TRUE(m.run(one(disk, io::Op::write, lba, span)));
        } else {
            std::memset(span.data, 0xee, span.size);
            ASSERT_TRUE(m.run(one(disk, io::Op::read, lba, span)));
            ASSERT_EQ(std::memcmp(model.data() + lba * sector, span.data, span.size), 0);
        }
    }
    EXPECT_TRUE(model == store.data);
    EXPECT_TRUE(m.run(one(disk, io::Op::flush, 0, {})));
}

TEST(Connected, TwoUnitsOverTheRealBus) {
    Machine m;
    test::CapturedLog log;
    Store a;
    Store b(1024 * 4096);
    host::LunConfig second{.lun = 7, .store = &b.store, .block_size = 4096};
    second.write_cache = false;
    m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &a.store}, second}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class)))) << log.text.view();
    ASSERT_EQ(m.sink.disks.size(), 2u) << log.text.view() << m.lines.text;
    io::BlockDevice& first = *m.sink.disks[0].first;
    EXPECT_EQ(m.sink.disks[0].second, drivers::DiskSink::no_twin);
    EXPECT_EQ(first.geometry().sectors, 4096u);
    EXPECT_TRUE(first.geometry().flush);
    EXPECT_TRUE(first.geometry().discard);
    EXPECT_EQ(m.sink.disks[1].first->geometry().sector_size, 4096u);
    EXPECT_FALSE(m.sink.disks[1].first->geometry().flush);
    verify(m, first, a, 100);
    verify(m, *m.sink.disks[1].first, b, 60);
    std::memset(a.data.data(), 1, a.data.size());
    ASSERT_TRUE(m.run(one(first, io::Op::discard, 8, m.buffer(64 * 512))));
    EXPECT_EQ(a.data[8 * 512], std::byte{0});
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
    EXPECT_EQ(first.counters().errors, 0u);
}

// A unit with impossible replies is reported and skipped; the units before and after it are disks.
TEST(Connected, MoreUnitsThanSixtyFour) {
    Machine m;
    test::CapturedLog log;
    Store store;
    std::vector<host::LunConfig> units;
    for (u32 lun = 0; lun < 255; lun += lun < 100 ? 1 : 31) { // 0 to 100, then 131, 162, 193, 224
        units.push_back({.lun = static_cast<u8>(lun), .store = &store.store});
    }
    m.server->add(host::StorageDevice::scsi({}, units));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class)))) << log.text.view();
    EXPECT_EQ(m.sink.disks.size(), units.size());
    EXPECT_EQ(units.back().lun, 224);
    EXPECT_TRUE(m.sink.left.empty());
    verify(m, *m.sink.disks.back().first, store, 10);
}

// Disks refused by the sink are reported, one by one.
TEST(Connected, RefusedUnitsAreReported) {
    struct Full final : drivers::DiskSink {
        u32 announced = 0;
        std::vector<drivers::Unused> left;
        bool offered(u32) override { return true; }
        FixedText<16> free_name(std::string_view prefix) override { return drivers::disk_name(prefix, announced); }
        Result<void> announce(io::BlockDevice&, u32) override {
            if (announced == 2) {
                return Error{Code::exhausted, "no room"};
            }
            ++announced;
            return {};
        }
        void unused(const drivers::UnusedUnit& unit) override {
            left.push_back(unit.why);
            EXPECT_EQ(unit.reason, "no room");
        }
    } full;
    Machine m;
    Store store;
    m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &store.store},
                                                 {.lun = 1, .store = &store.store},
                                                 {.lun = 2, .store = &store.store},
                                                 {.lun = 3, .store = &store.store}}));
    ASSERT_TRUE(m.connect());
    drivers::Environment environment{m.executor, m.arena, m.interrupts, full, 500'000'000};
    ASSERT_TRUE(m.run(storvsc::attach(environment, m.bus, *m.offer(storvsc::scsi_class))));
    EXPECT_EQ(full.announced, 2u);
    EXPECT_EQ(full.left, (std::vector<drivers::Unused>{drivers::Unused::no_room, drivers::Unused::no_room}));
}

TEST(Connected, OneInvalidUnitDoesNotHideTheOthers) {
    Machine m;
    test::CapturedLog log;
    Store a;
    Store nothing(0); // its last block would be 2^64 - 1
    Store b;
    m.server->add(host::StorageDevice::scsi(
        {}, {{.lun = 0, .store = &a.store}, {.lun = 1, .store = &nothing.store}, {.lun = 2, .store = &b.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class)))) << log.text.view();
    ASSERT_EQ(m.sink.disks.size(), 2u) << log.text.view() << m.lines.text;
    EXPECT_EQ(m.sink.left, (std::vector<std::pair<std::string, drivers::Unused>>{{"LUN 1", drivers::Unused::failed}}));
    verify(m, *m.sink.disks[0].first, a, 20);
    verify(m, *m.sink.disks[1].first, b, 20);
}

class ConnectedVersion : public testing::TestWithParam<u16> {};
TEST_P(ConnectedVersion, StepsDown) {
    Machine m;
    Store a;
    host::StorageConfig config;
    std::erase_if(config.versions, [](u16 v) { return v > GetParam(); });
    m.server->add(host::StorageDevice::scsi(config, {{.lun = 0, .store = &a.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class))));
    ASSERT_EQ(m.sink.disks.size(), 1u) << m.lines.text;
    verify(m, *m.sink.disks[0].first, a, 40);
    FixedText<16> version;
    print(version, "version={}.{}", GetParam() >> 8, GetParam() & 0xff);
    const std::string features(m.sink.disks[0].first->identity().features.view());
    EXPECT_NE(features.find(std::string(version.view())), std::string::npos) << features;
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
}
INSTANTIATE_TEST_SUITE_P(All, ConnectedVersion, testing::Values(0x0602, 0x0600, 0x0501, 0x0402, 0x0200));

TEST(Connected, AnIdeChannelIsTheDiskOfItsPath) {
    Machine m;
    Store a;
    m.server->add(host::StorageDevice::ide(1, 0, {}, {.lun = 0, .store = &a.store}));
    ASSERT_TRUE(m.connect());
    const auto offer = m.offer(storvsc::ide_class);
    ASSERT_TRUE(offer);
    m.sink.offers = false;
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *offer)));
    EXPECT_TRUE(m.sink.disks.empty()) << "another driver has it";
    EXPECT_EQ(m.server->counters().packets_in, 0u) << "and it was not touched";
    m.sink.offers = true;
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *offer)));
    ASSERT_EQ(m.sink.disks.size(), 1u) << m.lines.text;
    EXPECT_EQ(m.sink.disks[0].second, 2u) << "secondary master";
    verify(m, *m.sink.disks[0].first, a, 40);
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
}

TEST(Connected, HotAddAndRemove) {
    Machine m;
    test::CapturedLog log;
    Store a;
    Store b;
    host::StorageDevice& controller = m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &a.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class))));
    ASSERT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(controller.add_lun({.lun = 4, .store = &b.store}));
    for (u32 i = 0; i < 200 && m.sink.disks.size() < 2; ++i) {
        m.executor.turn();
    }
    ASSERT_EQ(m.sink.disks.size(), 2u) << log.text.view();
    verify(m, *m.sink.disks[1].first, b, 20);
    EXPECT_TRUE(controller.remove_lun(4));
    for (u32 i = 0; i < 200 && !log.has("removed the disk"); ++i) {
        m.executor.turn();
    }
    EXPECT_TRUE(log.has("the host has removed the disk")) << log.text.view();
    EXPECT_EQ(m.run(one(*m.sink.disks[1].first, io::Op::read, 0, m.buffer(512))).error().code, Code::device_gone);
    verify(m, *m.sink.disks[0].first, a, 20);
    m.server->remove(controller);
    for (u32 i = 0; i < 200 && !log.has("controller away"); ++i) {
        m.executor.turn();
    }
    EXPECT_TRUE(log.has("rescinded the storage controller")) << log.text.view();
    EXPECT_EQ(m.run(one(*m.sink.disks[0].first, io::Op::read, 0, m.buffer(512))).error().code, Code::device_gone);
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
}

TEST(Connected, AReplacedDiskGetsANewName) {
    Machine m;
    test::CapturedLog log;
    Store a;
    Store b;
    Store c(2048 * 512);
    host::StorageDevice& controller =
        m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &a.store}, {.lun = 4, .store = &b.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class))));
    ASSERT_EQ(m.sink.disks.size(), 2u);
    EXPECT_TRUE(controller.remove_lun(4)); // before the guest scans
    EXPECT_TRUE(controller.add_lun({.lun = 4, .store = &c.store, .serial = "another"}));
    for (u32 i = 0; i < 200 && m.sink.disks.size() < 3; ++i) {
        m.executor.turn();
    }
    ASSERT_EQ(m.sink.disks.size(), 3u) << log.text.view();
    EXPECT_TRUE(log.has("the host has put another disk in its place: it gets a new name")) << log.text.view();
    io::BlockDevice& before = *m.sink.disks[1].first;
    io::BlockDevice& now = *m.sink.disks[2].first;
    EXPECT_NE(before.identity().name.view(), now.identity().name.view());
    EXPECT_EQ(now.geometry().sectors, 2048u);
    EXPECT_EQ(m.run(one(before, io::Op::read, 0, m.buffer(512))).error().code, Code::device_gone);
    verify(m, now, c, 20);
    verify(m, *m.sink.disks[0].first, a, 20);
    EXPECT_EQ(m.sink.disks.size(), 3u) << "the others are what they were";
}

TEST(Connected, AResizedDiskKeepsItsName) {
    for (const u64 sectors : {u64{2048}, u64{16384}}) {
        Machine m;
        test::CapturedLog log;
        Store a;
        Store b(sectors * 512);
        host::StorageDevice& controller = m.server->add(host::StorageDevice::scsi({}, {{.lun = 4, .store = &a.store}}));
        ASSERT_TRUE(m.connect());
        ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class))));
        ASSERT_EQ(m.sink.disks.size(), 1u);
        io::BlockDevice& disk = *m.sink.disks[0].first;
        EXPECT_EQ(disk.geometry().sectors, 4096u);
        EXPECT_TRUE(controller.remove_lun(4)); // before the guest scans: the same serial number
        EXPECT_TRUE(controller.add_lun({.lun = 4, .store = &b.store}));
        for (u32 i = 0; i < 200 && disk.geometry().sectors != sectors; ++i) {
            m.executor.turn();
        }
        EXPECT_EQ(disk.geometry().sectors, sectors) << log.text.view();
        EXPECT_TRUE(log.has("resized from 4096 to")) << log.text.view();
        EXPECT_EQ(m.sink.disks.size(), 1u);
        verify(m, disk, b, 20);
        EXPECT_TRUE(m.run(one(disk, io::Op::read, sectors - 1, m.buffer(512))));
        EXPECT_EQ(m.run(one(disk, io::Op::read, sectors, m.buffer(512))).error().code, Code::bad_argument);
        EXPECT_FALSE(disk.geometry().write_zeroes) << "Hyper-V gets no WRITE SAME";
    }
}

// The host rescinds a controller and offers it again, before and after the guest has released it.
TEST(Connected, AReofferedControllersDiskGetsANewName) {
    for (const bool at_once : {true, false}) {
        Machine m;
        test::CapturedLog log;
        Store a;
        const auto offer = [&]() -> host::StorageDevice& {
            return m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &a.store}}));
        };
        host::StorageDevice& controller = offer();
        ASSERT_TRUE(m.connect());
        const auto first = m.bus.take_new();
        ASSERT_TRUE(first);
        ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *first)));
        ASSERT_EQ(m.sink.disks.size(), 1u);
        const auto wait_for = [&](auto done) {
            for (u32 i = 0; i < 300 && !done(); ++i) {
                m.executor.turn();
            }
        };
        m.server->remove(controller);
        if (!at_once) {
            wait_for([&] { return log.has("controller away"); });
            wait_for([] { return false; });
        }
        offer();
        std::optional<hv::hyperv::Offer> second;
        wait_for([&] { return (second = m.bus.take_new()).has_value(); });
        ASSERT_TRUE(second) << log.text.view() << m.lines.text;
        EXPECT_EQ(second->instance, first->instance);
        ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *second))) << log.text.view() << m.lines.text;
        ASSERT_EQ(m.sink.disks.size(), 2u);
        io::BlockDevice& before = *m.sink.disks[0].first;
        io::BlockDevice& now = *m.sink.disks[1].first;
        EXPECT_NE(before.identity().name.view(), now.identity().name.view());
        EXPECT_EQ(m.run(one(before, io::Op::read, 0, m.buffer(512))).error().code, Code::device_gone);
        verify(m, now, a, 20);
        EXPECT_TRUE(m.sink.withdrawn.empty()) << "it has no number";
        EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
    }
}

TEST(Connected, ARescindedIdeChannelReleasesItsNumber) {
    Machine m;
    test::CapturedLog log;
    Store a;
    host::StorageDevice& channel = m.server->add(host::StorageDevice::ide(1, 0, {}, {.lun = 0, .store = &a.store}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::ide_class))));
    ASSERT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(m.sink.withdrawn.empty());
    m.server->remove(channel);
    for (u32 i = 0; i < 300 && m.sink.withdrawn.empty(); ++i) {
        m.executor.turn();
    }
    EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{2});
}

// One lane per processor, each with its own channel.
TEST(Connected, SubChannels) {
    Machine m({}, 2);
    Store a;
    host::StorageConfig config;
    config.sub_channels = 4;
    m.server->add(host::StorageDevice::scsi(config, {{.lun = 0, .store = &a.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class))));
    ASSERT_EQ(m.sink.disks.size(), 1u) << m.lines.text;
    io::BlockDevice& disk = *m.sink.disks[0].first;
    ASSERT_EQ(disk.lanes(), 2u) << "as many as processors";
    io::BlockDevice& lane = disk.lane(1);
    EXPECT_EQ(&lane.executor(), &m.second);
    EXPECT_EQ(lane.geometry().sectors, disk.geometry().sectors);
    verify(m, disk, a, 40);
    DmaSpan buffer = m.buffer(4096);
    std::memset(buffer.data, 0x77, buffer.size);
    io::Request there(lane, io::Op::write, 24, buffer);
    set_this_processor(1); // the lane's processor
    lane.submit(there);
    set_this_processor(0);
    for (u32 i = 0; i < 200 && there.pending(); ++i) {
        m.executor.turn();
        m.idle();
    }
    EXPECT_EQ(there.status, io::Status::ok);
    EXPECT_EQ(a.data[24 * 512 + 4095], std::byte{0x77});
    EXPECT_EQ(lane.counters().completed, 1u);
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
    // Each channel's events go to the processor of its lane only.
    std::set<u16> first;
    std::set<u16> second;
    for (const auto& [flag, count] : m.flagged[0]) {
        first.insert(flag);
    }
    for (const auto& [flag, count] : m.flagged[1]) {
        second.insert(flag);
        EXPECT_FALSE(first.contains(flag)) << "channel " << flag;
    }
    EXPECT_EQ(first.size(), 1u);
    EXPECT_EQ(second.size(), 1u);
}

TEST(Connected, NoMoreSubChannelsThanTheHostAllows) {
    test::FakeMachine third_clock;
    io::Executor third(third_clock.platform(), 2);
    Machine m({}, 2);
    test::CapturedLog log;
    const std::array<io::Executor*, 3> three{&m.executor, &m.second, &third};
    m.environment.executors = three;
    Store a;
    host::StorageConfig config;
    config.sub_channels = 1;
    m.server->add(host::StorageDevice::scsi(config, {{.lun = 0, .store = &a.store}}));
    ASSERT_TRUE(m.connect());
    ASSERT_TRUE(m.run(storvsc::attach(m.environment, m.bus, *m.offer(storvsc::scsi_class)))) << log.text.view();
    ASSERT_EQ(m.sink.disks.size(), 1u) << m.lines.text;
    io::BlockDevice& disk = *m.sink.disks[0].first;
    EXPECT_EQ(disk.queues(), 2u) << "the channel and one more, for three processors";
    EXPECT_FALSE(log.has("warning: ")) << log.text.view();
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
    verify(m, disk, a, 10);
}

// Every fault of the host: bounded, reported in one line or survived, and no acknowledged data is lost.
class ConnectedFault : public testing::TestWithParam<host::FaultName> {};
TEST_P(ConnectedFault, BoundedAndNothingAcknowledgedIsLost) {
    host::ServerConfig config;
    config.fault = {GetParam().fault, 0, 1};
    const std::string name(GetParam().name);
    const bool in_use = name.find("version") == std::string::npos && name.find("gpadl") == std::string::npos &&
                        name.find("open") == std::string::npos && name.find("message") == std::string::npos &&
                        name != "duplicate-relid";
    config.fault.after = in_use ? 20 : 0; // once the disk is in use
    Machine m(config);
    test::CapturedLog log;
    Store a;
    m.server->add(host::StorageDevice::scsi({}, {{.lun = 0, .store = &a.store}}));
    const Instant start = m.clock.time;
    const auto done = m.connect();
    const auto offer = m.offer(storvsc::scsi_class);
    Result<void> attached;
    if (done && offer) {
        attached = m.run(storvsc::attach(m.environment, m.bus, *offer));
    }
    u64 failed = 0;
    std::map<u64, std::byte> acknowledged;
    if (!m.sink.disks.empty()) {
        io::BlockDevice& disk = *m.sink.disks[0].first;
        for (u32 i = 0; i < 60; ++i) {
            DmaSpan buffer = m.buffer(4096);
            std::memset(buffer.data, static_cast<int>(i + 1), buffer.size);
            const u64 lba = i % 16 * 8;
            if (m.run(one(disk, io::Op::write, lba, buffer))) {
                acknowledged[lba] = static_cast<std::byte>(i + 1);
            } else {
                acknowledged.erase(lba);
                ++failed;
            }
            DmaSpan back = m.buffer(4096);
            if (m.run(one(disk, io::Op::read, lba, back)) && acknowledged.contains(lba)) {
                EXPECT_EQ(back.data[4095], acknowledged[lba]);
            }
        }
    }
    EXPECT_LT(m.clock.time - start, 30'000'000'000u);
    for (const auto& [lba, value] : acknowledged) {
        EXPECT_EQ(a.data[lba * 512], value) << lba;
        EXPECT_EQ(a.data[lba * 512 + 4095], value) << lba;
    }
    const bool reported = log.has("error: ") || log.has("warning: ") || !done || !attached;
    const bool harmless = name == "rewrite" || name == "packet-trailer" || name == "unit-attention" ||
                          name == "refuse-new-versions" || name == "unknown-message" || name == "short-message" ||
                          name == "signal-storm" || name == "no-version-response";
    EXPECT_TRUE(reported || harmless || m.server->faults_injected() == 0) << log.text.view();
    EXPECT_TRUE(m.server->faults_injected() != 0 || !in_use || name == "early-completion")
        << "the fault did not happen";
    EXPECT_TRUE(failed == 0 || reported) << "nothing fails without a word";
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
}
INSTANTIATE_TEST_SUITE_P(All, ConnectedFault, testing::ValuesIn(host::fault_names), [](const auto& info) {
    std::string name(info.param.name);
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
});

TEST(Connected, IntegrationServices) {
    Machine m;
    test::CapturedLog log;
    host::ShutdownService& shutdown = m.server->add(std::make_unique<host::ShutdownService>());
    host::HeartbeatService& heartbeat = m.server->add(std::make_unique<host::HeartbeatService>());
    m.server->add(std::make_unique<host::TimeSyncService>(
        [] { return u64{116'444'736'000'000'000} + 17'640'000'000'000'000; }, [] { return u64{1000}; }));
    ASSERT_TRUE(m.connect());
    for (const std::string_view type :
         {drivers::hv_util::shutdown_class, drivers::hv_util::heartbeat_class, drivers::hv_util::time_sync_class}) {
        ASSERT_TRUE(m.offer(type)) << type;
        ASSERT_TRUE(m.run(drivers::hv_util::attach(m.environment, m.bus, *m.offer(type))));
    }
    for (u32 i = 0; i < 3000 && heartbeat.answers() < 2; ++i) {
        m.executor.turn();
    }
    EXPECT_GE(heartbeat.answers(), 2u) << log.text.view() << m.lines.text;
    EXPECT_TRUE(log.has("the host's time is 2025-11-24 16:00:00 UTC")) << log.text.view();
    ASSERT_TRUE(wall_clock(m.clock.time));
    shutdown.request_shutdown();
    for (u32 i = 0; i < 200 && !m.shutdown.requested(); ++i) {
        m.executor.turn();
    }
    ASSERT_TRUE(m.shutdown.requested()) << log.text.view() << m.lines.text;
    EXPECT_NE(shutdown.state(), host::ShutdownState::accepted) << "not before the disks are at rest";
    m.shutdown.quiesced(true);
    for (u32 i = 0; i < 200 && shutdown.state() == host::ShutdownState::requested; ++i) {
        m.executor.turn();
    }
    EXPECT_EQ(shutdown.state(), host::ShutdownState::accepted) << m.lines.text;
    EXPECT_EQ(m.server->counters().violations, 0u) << m.lines.text;
}

} // namespace
