// The virtio SCSI driver on virtio-mmio: units, events, withheld features, hostile values, silence.
#include "gtest_macros.hpp"

#include <cstddef>
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.mmio;
import core.interrupt;
import io.executor;
import io.block;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.virtio.device;
import drivers.virtio_scsi;
import drivers.virtio_scsi.disk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/drivers/virtio_scsi_fake.hpp"

namespace {
using namespace fl;
using drivers::Feature;
namespace virtio_scsi = drivers::virtio_scsi;

constexpr u64 base = 0xfeb00000;
constexpr u32 gsi = 12;

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    std::vector<std::string> left; // "address: what"
    bool offered(u32) override { return true; }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
    void unused(const drivers::UnusedUnit& device) override {
        left.push_back(std::string(device.address) + ": " + std::string(device.what));
    }
};

struct Machine {
    Machine() {
        mapper.places[base] = {&host, 0x200};
        host.interrupt = [this] {
            host.isr |= 1;
            interrupts.raise(gsi);
        };
    }
    Result<void> probe(u32 withheld = 0) {
        drivers::Environment e{executor, memory, interrupts, sink, timeout, withheld, {}, nullptr, mapper};
        return executor.run(virtio_scsi::probe(e, base, gsi));
    }
    static io::Task<Result<void>> transfer(io::BlockDevice& disk, io::Op op, u64 lba, DmaSpan span) {
        io::BlockDevice::Transfer t(disk, op, lba, span);
        co_return co_await t;
    }
    Result<void> run(io::Op op, u64 lba = 0, DmaSpan span = {}, usize disk = 0) {
        return executor.run(transfer(*sink.disks.at(disk), op, lba, span));
    }
    io::Task<Result<void>> pause() {
        co_await executor.sleep(20'000'000);
        co_return Result<void>{};
    }
    void settle() {
        for (u32 i = 0; i < 20; ++i) {
            static_cast<void>(executor.run(pause()));
        }
    }

    static constexpr Nanoseconds timeout = 200'000'000;
    fl::test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    virtio_test::Memory memory;
    virtio_scsi_test::Host host{memory};
    pci_test::Mapper mapper;
    fl::test::Interrupts interrupts;
    Sink sink;
    fl::test::CapturedLog log;
};

void writes_and_reads(Machine& m, virtio_scsi_test::Unit& unit, usize disk = 0) {
    auto buffer = *m.memory.buffer(8192);
    for (u32 i = 0; i < 8192; ++i) {
        buffer.data()[i] = static_cast<std::byte>(i * 7);
    }
    const std::vector<std::byte> pattern(buffer.data(), buffer.data() + 8192);
    EXPECT_TRUE(m.run(io::Op::write, 16, buffer.span(), disk));
    EXPECT_EQ(std::memcmp(unit.medium.data() + 16 * 512, pattern.data(), 8192), 0);
    std::memset(buffer.data(), 0, 8192);
    EXPECT_TRUE(m.run(io::Op::read, 16, buffer.span(), disk));
    EXPECT_EQ(std::memcmp(buffer.data(), pattern.data(), 8192), 0);
}

// Typed from [virtio-1.2 §5.6.6.1] and [SBC-3 §5.15].
TEST(VirtioScsi, ARequestOnTheWire) {
    Machine m;
    m.host.add(2, 0);
    m.host.add(2, 0xa5);
    ASSERT_TRUE(m.probe());
    ASSERT_EQ(m.sink.disks.size(), 2u);
    auto buffer = *m.memory.buffer(4096);
    ASSERT_TRUE(m.run(io::Op::read, 0x123, buffer.span(), 1));
    std::vector<u8> seen = m.host.headers.back();
    std::fill_n(seen.begin() + 8, 8, u8{0}); // the id is the driver's choice
    std::vector<u8> expected{1,    2, 0x40, 0xa5, 0, 0, 0, 0, 0, 0,    0, 0, 0, 0, 0, 0,  // lun, id
                             0,    0, 0,                                                  // task_attr, prio, crn
                             0x88, 0, 0,    0,    0, 0, 0, 0, 1, 0x23, 0, 0, 0, 8, 0, 0}; // READ(16)
    expected.resize(51);
    EXPECT_EQ(seen, expected);
    EXPECT_EQ(virtio_scsi::address_of(7, 0x1234), (virtio_scsi::Address{1, 7, 0x52, 0x34, 0, 0, 0, 0}));
}

TEST(VirtioScsi, UnitsOfSeveralTargets) {
    Machine m;
    auto& a = m.host.add(0, 0);
    m.host.add(0, 1, 5); // a CD drive
    auto& b = m.host.add(3, 7);
    m.host.add(4, 0); // above max_target
    ASSERT_TRUE(m.probe());
    ASSERT_EQ(m.sink.disks.size(), 2u);
    EXPECT_EQ(m.sink.disks[0]->identity().name.view(), "sda");
    EXPECT_EQ(m.sink.disks[0]->identity().driver, "virtio_scsi");
    EXPECT_EQ(m.sink.disks[0]->identity().kind, io::Kind::synthetic);
    ASSERT_EQ(m.sink.left.size(), 1u);
    EXPECT_NE(m.sink.left[0].find("target 0 LUN 1: SCSI device of type 0x5"), std::string::npos) << m.sink.left[0];
    writes_and_reads(m, a, 0);
    writes_and_reads(m, b, 1);
    EXPECT_TRUE(m.run(io::Op::flush));
}

TEST(VirtioScsi, WithheldFeaturesAreNotAccepted) {
    struct Row {
        Feature feature;
        u64 bits;
    };
    for (const Row& row : {Row{Feature::indirect, u64{1} << 28}, Row{Feature::event_idx, u64{1} << 29}}) {
        Machine m;
        auto& unit = m.host.add(0, 0);
        ASSERT_TRUE(m.probe(to_underlying(row.feature)));
        EXPECT_EQ(m.host.accepted, m.host.offered & ~row.bits);
        writes_and_reads(m, unit);
    }
}

TEST(VirtioScsi, ImpossibleConfigurationsAreRefused) {
    struct Row {
        usize at;
        u32 value;
        Code code;
    };
    for (const Row& row : {Row{0, 0, Code::protocol}, Row{0, 0x10000, Code::protocol}, Row{4, 0, Code::protocol},
                           Row{8, 7, Code::not_supported}, Row{12, 0, Code::protocol}, Row{16, 17, Code::not_supported},
                           Row{20, 0, Code::protocol}, Row{20, 97, Code::protocol}, Row{24, 15, Code::protocol},
                           Row{24, 33, Code::protocol}}) {
        Machine m;
        m.host.add(0, 0);
        m.host.set<u32>(row.at, row.value);
        const auto probed = m.probe();
        ASSERT_FALSE(probed) << row.at << " " << row.value;
        EXPECT_EQ(probed.error().code, row.code) << row.at << " " << row.value;
        EXPECT_TRUE(m.sink.disks.empty());
    }
    for (const u32 size : {0u, 32769u}) {
        Machine m;
        m.host.queue_max = size;
        EXPECT_EQ(m.probe().error().code, Code::protocol) << size;
    }
    Machine large;
    auto& unit = large.host.add(0, 0);
    large.host.queue_max = 32768;
    ASSERT_TRUE(large.probe());
    writes_and_reads(large, unit);
}

TEST(VirtioScsi, InvalidAnswersCloseTheDisk) {
    struct Row {
        const char* what;
        std::function<void(std::array<u8, 108>&, u32&)> spoil;
    };
    for (const Row& row :
         {Row{"unwritten", [](auto& r, u32&) { r[11] = 0xff; }}, Row{"undefined", [](auto& r, u32&) { r[11] = 13; }},
          Row{"residual", [](auto& r, u32&) { r[6] = 1; }}, Row{"sense", [](auto& r, u32&) { r[0] = 97, r[10] = 2; }},
          Row{"length", [](auto&, u32& length) { length = 51 + 108 + 4096 + 1; }}}) {
        Machine m;
        m.host.add(0, 0);
        ASSERT_TRUE(m.probe());
        m.host.spoil = row.spoil;
        auto buffer = *m.memory.buffer(4096);
        EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span())) << row.what;
        m.settle();
        EXPECT_GE(m.host.resets, 1u) << row.what;
        m.host.spoil = nullptr;
        EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span())) << row.what << ": it stays closed";
    }
}

TEST(VirtioScsi, ABufferReturnedTwiceClosesTheDisk) {
    Machine m;
    m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    auto buffer = *m.memory.buffer(4096);
    ASSERT_TRUE(m.run(io::Op::read, 0, buffer.span()));
    m.host.push_again(m.host.last);
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
    m.settle();
    EXPECT_EQ(m.host.resets, 1u);
}

TEST(VirtioScsi, ResponsesOfTheTransport) {
    for (const u8 response : {1, 3, 6, 7, 8, 9}) {
        Machine m;
        m.host.add(0, 0);
        ASSERT_TRUE(m.probe());
        m.host.spoil = [&](auto& r, u32&) { r[11] = response; };
        auto buffer = *m.memory.buffer(4096);
        EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span())) << u32{response};
        EXPECT_EQ(m.host.resets, 0u) << "an error of the command only";
    }
    for (const u8 response : {2, 4, 5}) { // once, then it succeeds
        Machine m;
        m.host.add(0, 0);
        ASSERT_TRUE(m.probe());
        u32 times = 0;
        m.host.spoil = [&](auto& r, u32&) { r[11] = times++ == 0 ? response : u8{0}; };
        auto buffer = *m.memory.buffer(4096);
        EXPECT_TRUE(m.run(io::Op::read, 0, buffer.span())) << u32{response};
        EXPECT_EQ(times, 2u);
    }
}

TEST(VirtioScsi, EventsAddAndRemoveUnits) {
    Machine m;
    m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    for (u32 i = 0; i < 20; ++i) { // more than there are buffers: they are given back
        ASSERT_TRUE(m.host.event(0x55, 9, 9, 9)) << "unknown events have no effect";
        m.settle();
    }
    auto& fresh = m.host.add(1, 0);
    ASSERT_TRUE(m.host.event(1, 1, 0, 1)); // RESCAN
    m.settle();
    ASSERT_EQ(m.sink.disks.size(), 2u);
    writes_and_reads(m, fresh, 1);
    fresh.present = false;
    ASSERT_TRUE(m.host.event(1, 1, 0, 2)); // REMOVED
    m.settle();
    EXPECT_TRUE(m.sink.disks[1]->removed());
    EXPECT_FALSE(m.sink.disks[0]->removed());
    m.host.add(2, 1);
    ASSERT_TRUE(m.host.event(0x8000'0000, 0, 0, 0)); // NO_EVENT, EVENTS_MISSED
    m.settle();
    EXPECT_EQ(m.sink.disks.size(), 3u);
    ASSERT_TRUE(m.host.event(1, 2, 1, 2, 0)); // vhost-scsi does not say how much it has written
    m.settle();
    EXPECT_TRUE(m.sink.disks[2]->removed());
    EXPECT_EQ(m.host.resets, 0u);
    auto buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.run(io::Op::read, 0, buffer.span()));
}

TEST(VirtioScsi, ASilentDeviceIsAskedToResetItsUnits) {
    Machine m;
    auto& unit = m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    m.host.hold_io = true;
    auto buffer = *m.memory.buffer(4096);
    static_cast<void>(m.run(io::Op::read, 0, buffer.span()));
    EXPECT_EQ(m.host.unit_resets, 1u);
    EXPECT_EQ(m.host.resets, 0u);
    writes_and_reads(m, unit);
}

// [SPC-4 §6.33] Units are then probed by INQUIRY.
TEST(VirtioScsi, UnitsOfATargetThatDoesNotListThem) {
    for (const u8 key : {5, 4}) { // ILLEGAL REQUEST: not supported; HARDWARE ERROR
        Machine m;
        auto& first = m.host.add(0, 0);
        auto& second = m.host.add(0, 5);
        m.host.add(0, 200); // beyond those that are probed
        m.host.add(2, 0);
        m.host.report_luns = key;
        ASSERT_TRUE(m.probe()) << u32{key};
        ASSERT_EQ(m.sink.disks.size(), 3u) << u32{key};
        writes_and_reads(m, first, 0);
        writes_and_reads(m, second, 1);
    }
}

TEST(VirtioScsi, ATargetThatNeverListsItsUnits) {
    Machine m;
    m.host.add(0, 0);
    m.host.lists_nothing = true;
    static_cast<void>(m.probe());
    EXPECT_TRUE(m.sink.disks.empty());
    EXPECT_GE(m.host.resets, 1u);
    EXPECT_TRUE(m.log.has("timed out") || m.log.has("time-out") || m.log.has("not answer")) << m.log.text.view();
}

// Offered before the reset with which the driver begins, and not after it [virtio-1.2 §3.1.1].
TEST(VirtioScsi, FeaturesWithdrawnByTheResetAreNotUsed) {
    for (const u32 bit : {1u, 2u, 28u, 29u}) {
        Machine m;
        auto& unit = m.host.add(0, 0);
        m.host.status = 0x0f; // in use by firmware
        m.host.withdrawn = u64{1} << bit;
        ASSERT_TRUE(m.probe()) << bit;
        EXPECT_EQ(m.host.accepted, m.host.offered) << bit;
        EXPECT_EQ(m.host.offered >> bit & 1, 0u);
        writes_and_reads(m, unit);
    }
    Machine old;
    old.host.add(0, 0);
    old.host.status = 0x0f;
    old.host.withdrawn = u64{1} << 32; // VERSION_1
    EXPECT_FALSE(old.probe());
    EXPECT_TRUE(old.sink.disks.empty());
}

TEST(VirtioScsi, AResetOfTheUnitsThatIsRefused) {
    for (const u8 answer : {11, 12, 9, 0x77}) { // FUNCTION REJECTED, INCORRECT LUN, FAILURE, undefined
        Machine m;
        m.host.add(0, 0);
        ASSERT_TRUE(m.probe());
        m.host.hold_io = true;
        m.host.reset_answer = answer;
        auto buffer = *m.memory.buffer(4096);
        EXPECT_FALSE(m.run(io::Op::write, 0, buffer.span())) << u32{answer};
        m.settle();
        m.settle();
        EXPECT_EQ(m.host.unit_resets, 1u);
        EXPECT_EQ(m.host.resets, 1u) << "the write may still be carried out: the disk is closed";
        EXPECT_TRUE(m.log.has("LOGICAL UNIT RESET: ")) << u32{answer};
        EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
    }
}

TEST(VirtioScsi, AResetOfTheUnitsThatIsNotAnswered) {
    Machine m;
    auto& unit = m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    m.host.hold_io = m.host.silent_resets = true;
    auto buffer = *m.memory.buffer(4096);
    static_cast<void>(m.run(io::Op::read, 0, buffer.span()));
    EXPECT_EQ(m.host.unit_resets, 1u);
    EXPECT_EQ(m.host.resets, 0u) << "it was carried out: every command has been answered";
    m.settle();
    m.settle();
    EXPECT_TRUE(m.log.has("does not answer LOGICAL UNIT RESET"));
    writes_and_reads(m, unit);
    for (u32 i = 2; i <= 9; ++i) { // the device still has the earlier ones
        m.host.hold_io = true;
        static_cast<void>(m.run(io::Op::read, 0, buffer.span()));
        m.settle();
        m.settle();
        EXPECT_EQ(m.host.unit_resets, std::min(i, 8u)) << "there is room for eight";
    }
}

TEST(VirtioScsi, AChangedSizeIsRead) { // PARAM_CHANGE [virtio-1.2 §5.6.6.3]
    Machine m;
    auto& unit = m.host.add(0, 0);
    m.host.add(1, 0);
    ASSERT_TRUE(m.probe());
    ASSERT_EQ(m.sink.disks.size(), 2u);
    const u64 before = m.sink.disks[0]->geometry().sectors;
    unit.medium.resize(unit.medium.size() * 2);
    ASSERT_TRUE(m.host.event(3, 0, 0, 0x092a)); // CAPACITY DATA HAS CHANGED
    m.settle();
    const io::BlockDevice& disk = *m.sink.disks[m.sink.disks[0]->removed() ? m.sink.disks.size() - 1 : 0];
    EXPECT_EQ(disk.geometry().sectors, 2 * before);
    EXPECT_FALSE(disk.removed());
    EXPECT_FALSE(m.sink.disks[1]->removed()) << "the other one has not changed";
    EXPECT_EQ(m.sink.disks[1]->geometry().sectors, before);
}

TEST(VirtioScsi, ADeadDeviceIsResetAndItsDisksClose) {
    Machine m;
    m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    m.host.dead = true;
    auto buffer = *m.memory.buffer(4096);
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
    m.settle();
    m.settle();
    EXPECT_EQ(m.host.resets, 1u);
    m.host.dead = false;
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span())) << "it stays closed";
}

// Two silent targets cost a rescan two time-outs. A command of another target that is not answered meanwhile needs the
// reset of its unit at once: its own bound runs.
TEST(VirtioScsi, AResetDoesNotWaitForARescan) {
    Machine m;
    auto& unit = m.host.add(0, 0);
    for (const u8 target : {1, 2, 3}) {
        m.host.add(target, 0);
    }
    ASSERT_TRUE(m.probe());
    ASSERT_EQ(m.sink.disks.size(), 4u);
    m.host.silent = {1, 2, 3};
    ASSERT_TRUE(m.host.event(1, 1, 0, 1)); // RESCAN
    static_cast<void>(m.executor.run(m.pause()));
    m.host.hold_io = true;
    auto buffer = *m.memory.buffer(4096);
    const Instant begin = m.executor.now();
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span())) << "the one that timed out is not sent again";
    EXPECT_LT(m.executor.now() - begin, m.timeout + m.timeout / 4);
    EXPECT_GE(m.host.unit_resets, 1u);
    writes_and_reads(m, unit);
    m.settle();
    m.settle();
    EXPECT_EQ(m.host.resets, 0u);
    EXPECT_TRUE(m.log.has("targets do not answer: the targets after")) << m.log.text.view();
    writes_and_reads(m, unit);
}

// Each unit gets its own LOGICAL UNIT RESET: one that is not answered holds up neither the others nor later ones.
TEST(VirtioScsi, AResetThatIsNotAnsweredHoldsUpNoOther) {
    Machine m;
    m.host.add(0, 0);
    auto& unit = m.host.add(1, 0);
    ASSERT_TRUE(m.probe());
    m.host.silent = {0};
    for (u32 i = 1; i <= 3; ++i) {
        m.host.hold_io = true;
        auto buffer = *m.memory.buffer(4096);
        const Instant begin = m.executor.now();
        EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span(), 1));
        EXPECT_LT(m.executor.now() - begin, m.timeout + m.timeout / 4) << i;
        EXPECT_EQ(m.host.unit_resets, 2 * i);
        EXPECT_FALSE(m.host.hold_io) << "the reset of this unit was carried out";
        m.settle();
        writes_and_reads(m, unit, 1);
    }
    EXPECT_EQ(m.host.resets, 0u);
    EXPECT_TRUE(m.log.has("does not answer LOGICAL UNIT RESET")) << m.log.text.view();
}

// A rescan that has begun does not know of it.
TEST(VirtioScsi, ARemovalDuringARescanIsNotUndone) {
    Machine m;
    m.host.add(0, 0);
    ASSERT_TRUE(m.probe());
    m.host.add(1, 0);
    auto& gone = m.host.add(2, 0);
    ASSERT_TRUE(m.host.event(1, 2, 0, 1)); // RESCAN
    m.host.silent = {1};                   // the rescan waits for it
    static_cast<void>(m.executor.run(m.pause()));
    gone.present = false;
    ASSERT_TRUE(m.host.event(1, 2, 0, 2)); // REMOVED
    m.host.silent.clear();
    m.settle();
    EXPECT_EQ(m.sink.disks.size(), 2u) << "the second rescan finds target 1";
    EXPECT_FALSE(m.sink.disks[0]->removed());
}

} // namespace
