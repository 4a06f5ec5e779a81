// The virtio block driver on virtio-mmio: negotiation, limits, withheld features, hostile values, silence, changes.
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
import drivers.virtio_blk;
import drivers.virtio_blk.disk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/drivers/virtio_blk_fake.hpp"

namespace {
using namespace fl;
using drivers::Feature;
using io::Status;
namespace virtio_blk = drivers::virtio_blk;

constexpr u64 base = 0xfeb00000;
constexpr u32 gsi = 12;
constexpr u64 f_size_max = 1 << 1, f_seg_max = 1 << 2, f_ro = 1 << 5, f_blk_size = 1 << 6, f_flush = 1 << 9,
              f_topology = 1 << 10, f_config_wce = 1 << 11, f_discard = 1 << 13, f_write_zeroes = 1 << 14,
              f_indirect = 1 << 28, f_event_idx = 1 << 29, f_version_1 = u64{1} << 32, f_packed = u64{1} << 34,
              f_in_order = u64{1} << 35;

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    std::vector<std::tuple<std::string, drivers::Unused, std::string>> left; // address, why, reason
    bool refuse = false;
    bool offered(u32) override { return true; }
    void unused(const drivers::UnusedUnit& unit) override {
        left.emplace_back(std::string(unit.bus) + " " + std::string(unit.address), unit.why, std::string(unit.reason));
    }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        if (refuse) {
            return Error{Code::exhausted, "no room"};
        }
        disks.push_back(&disk);
        return {};
    }
};

struct Machine {
    static constexpr u64 sectors = 2048;
    explicit Machine(u32 version = 2) : registers(backend, version) {
        registers.offered =
            f_seg_max | f_blk_size | f_flush | f_discard | f_indirect | f_event_idx | (version == 2 ? f_version_1 : 0);
        registers.set<u64>(0, sectors);
        registers.set<u32>(12, 126); // seg_max
        registers.set<u32>(20, 512); // blk_size
        registers.set<u32>(36, 256); // max_discard_sectors
        mapper.places[base] = {&registers, 0x200};
        backend.interrupt = [this] {
            registers.isr |= 1;
            interrupts.raise(gsi);
        };
    }
    Result<void> probe(u32 withheld = 0) {
        drivers::Environment e{executor, memory, interrupts, sink, timeout, withheld, {}, nullptr, mapper};
        return executor.run(virtio_blk::probe(e, base, gsi));
    }
    static io::Task<Result<void>> erase(io::BlockDevice& disk, io::Op op, u64 lba, u32 bytes) {
        if (op == io::Op::discard) {
            co_return co_await disk.discard(lba, bytes);
        }
        co_return co_await disk.write_zeroes(lba, bytes);
    }
    Result<void> erase(io::Op op, u64 lba, u32 bytes) { return executor.run(erase(*sink.disks.at(0), op, lba, bytes)); }
    void change_config() {
        ++registers.generation;
        registers.isr |= 2;
        interrupts.raise(gsi);
        turns(3);
    }
    std::string_view features() const { return sink.disks.at(0)->identity().features.view(); }
    static io::Task<Result<void>> transfer(io::BlockDevice& disk, io::Op op, u64 lba, DmaSpan span) {
        io::BlockDevice::Transfer t(disk, op, lba, span);
        co_return co_await t;
    }
    Result<void> run(io::Op op, u64 lba = 0, DmaSpan span = {}) {
        return executor.run(transfer(*sink.disks.at(0), op, lba, span));
    }
    void turns(u32 count) {
        for (u32 i = 0; i < count; ++i) {
            executor.turn();
        }
    }
    u8 status() const { return registers.status; }

    static constexpr Nanoseconds timeout = 200'000'000;
    fl::test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    virtio_test::Memory memory;
    virtio_test::Backend backend{memory, sectors};
    virtio_test::MmioRegisters registers;
    pci_test::Mapper mapper;
    fl::test::Interrupts interrupts;
    Sink sink;
    fl::test::CapturedLog log;
};

void writes_and_reads(Machine& m) {
    auto buffer = *m.memory.buffer(8192);
    for (u32 i = 0; i < 8192; ++i) {
        buffer.data()[i] = static_cast<std::byte>(i * 7);
    }
    const std::vector<std::byte> pattern(buffer.data(), buffer.data() + 8192);
    EXPECT_TRUE(m.run(io::Op::write, 16, buffer.span()));
    EXPECT_EQ(std::memcmp(m.backend.disk.data() + 16 * 512, pattern.data(), 8192), 0);
    std::memset(buffer.data(), 0, 8192);
    EXPECT_TRUE(m.run(io::Op::read, 16, buffer.span()));
    EXPECT_EQ(std::memcmp(buffer.data(), pattern.data(), 8192), 0);
}

TEST(VirtioBlk, SetsStatusBitsInOrderAndAcceptsWhatItKnows) {
    Machine m;
    m.registers.offered |=
        u64{1} << 4 | u64{1} << 16 | u64{1} << 37 | u64{1} << 40; // GEOMETRY, SECURE_ERASE, SR_IOV, RING_RESET
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.registers.statuses, (std::vector<u32>{1, 3, 11, 15}));
    EXPECT_EQ(m.registers.accepted,
              f_seg_max | f_blk_size | f_flush | f_discard | f_indirect | f_event_idx | f_version_1);
    ASSERT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(m.log.has("offered, and not used by this driver: GEOMETRY, SECURE_ERASE, SR_IOV, RING_RESET\n"))
        << m.log.text.view();
    const auto& identity = m.sink.disks[0]->identity();
    EXPECT_EQ(identity.name.view(), "vda");
    EXPECT_EQ(identity.driver, "virtio_blk");
    EXPECT_EQ(identity.kind, io::Kind::synthetic);
    EXPECT_EQ(identity.model.view(), "virtio block device SERIAL-7");
    EXPECT_EQ(identity.features.view(), "flush discard event-idx indirect line queues=1 queue-size=256");
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, Machine::sectors);
    writes_and_reads(m);
    EXPECT_TRUE(m.run(io::Op::flush));
    EXPECT_EQ(m.backend.flushes, 1u);
}

TEST(VirtioBlk, ALegacyDeviceHasNoFeaturesOk) {
    Machine m(1);
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.registers.statuses, (std::vector<u32>{1, 3, 7}));
    EXPECT_EQ(m.backend.setup().device % 4096, 0u);
    writes_and_reads(m);
}

TEST(VirtioBlk, ADeviceInUseIsResetFirst) {
    Machine m;
    m.registers.status = 15;
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.registers.statuses, (std::vector<u32>{0, 1, 3, 11, 15}));
    Machine stuck;
    stuck.registers.status = 15;
    stuck.registers.unresettable = true;
    EXPECT_EQ(stuck.probe().error().code, Code::timed_out);
    EXPECT_TRUE(stuck.sink.disks.empty());
}

TEST(VirtioBlk, FeaturesThatAResetWithdrawsAreNotUsed) {
    Machine m;
    m.registers.status = 15; // in use by a loader
    m.registers.offered |= f_packed;
    m.registers.on_reset = [&] { m.registers.offered = f_version_1 | f_blk_size; };
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.registers.accepted, f_version_1 | f_blk_size);
    const io::Geometry& geometry = m.sink.disks[0]->geometry();
    EXPECT_FALSE(geometry.flush || geometry.discard);
    EXPECT_EQ(m.features(), "write-through line queues=1 queue-size=256");
    writes_and_reads(m);
}

TEST(VirtioBlk, PackedQueues) {
    Machine m;
    m.registers.offered |= f_packed;
    m.registers.queue_max = 100;
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.backend.setup().size, 100u);
    EXPECT_TRUE(m.sink.disks[0]->identity().features.view().find("packed") != std::string_view::npos);
    writes_and_reads(m);
}

TEST(VirtioBlk, WithheldFeaturesAreNotAccepted) {
    struct Row {
        Feature feature;
        u64 bits;
    };
    for (const Row& row :
         {Row{Feature::flush, f_flush}, Row{Feature::discard, f_discard}, Row{Feature::indirect, f_indirect},
          Row{Feature::event_idx, f_event_idx}, Row{Feature::packed, f_packed}, Row{Feature::in_order, f_in_order},
          Row{Feature::write_zeroes, f_write_zeroes}, Row{Feature::config_wce, f_config_wce}}) {
        Machine m;
        m.registers.offered |= f_packed | f_in_order | f_write_zeroes | f_config_wce;
        ASSERT_TRUE(m.probe(to_underlying(row.feature)));
        EXPECT_EQ(m.registers.accepted, m.registers.offered & ~row.bits) << row.bits;
        if ((m.registers.accepted & f_in_order) == 0) { // the fake does not return buffers in order by itself
            writes_and_reads(m);
        }
    }
}

TEST(VirtioBlk, RefusedFeaturesEndWithFailed) {
    Machine m;
    m.registers.refuses = true;
    EXPECT_EQ(m.probe().error().code, Code::not_supported);
    EXPECT_EQ(m.status() & 0x80, 0x80);
    Machine old;
    old.registers.offered &= ~f_version_1;
    EXPECT_EQ(old.probe().error().code, Code::not_supported);
    EXPECT_TRUE(old.log.has("VERSION_1"));
    EXPECT_EQ(old.status() & 0x80, 0x80);
}

TEST(VirtioBlk, ImpossibleConfigurationsAreRefused) {
    struct Row {
        const char* what;
        std::function<void(Machine&)> change;
        Code code;
    };
    const Row rows[] = {
        {"changes all the time", [](Machine& m) { m.registers.restless = true; }, Code::protocol},
        {"block size 0", [](Machine& m) { m.registers.set<u32>(20, 0); }, Code::not_supported},
        {"block size 768", [](Machine& m) { m.registers.set<u32>(20, 768); }, Code::not_supported},
        {"block size 8192", [](Machine& m) { m.registers.set<u32>(20, 8192); }, Code::not_supported},
        {"too many", [](Machine& m) { m.registers.set<u64>(0, ~u64{0}); }, Code::protocol},
        {"segments below a sector",
         [](Machine& m) {
             m.registers.offered |= f_size_max;
             m.registers.set<u32>(8, 511);
         },
         Code::not_supported},
        {"no queue", [](Machine& m) { m.registers.queue_max = 0; }, Code::protocol},
        {"a queue beyond the specification", [](Machine& m) { m.registers.queue_max = 65536; }, Code::protocol},
        {"a queue of two", [](Machine& m) { m.registers.queue_max = 2; }, Code::not_supported},
        {"no room for the disk", [](Machine& m) { m.sink.refuse = true; }, Code::exhausted},
        {"no memory", [](Machine& m) { m.memory.refuse = true; }, Code::exhausted},
    };
    for (const Row& row : rows) {
        Machine m;
        row.change(m);
        const auto result = m.probe();
        ASSERT_FALSE(result) << row.what;
        EXPECT_EQ(result.error().code, row.code) << row.what;
        EXPECT_EQ(m.status() & 4, 0) << row.what << ": still running";
        EXPECT_EQ(m.memory.outstanding, 0u) << row.what << ": memory is lost";
        EXPECT_TRUE(m.interrupts.lines.empty()) << row.what;
    }
}

TEST(VirtioBlk, QueuesAreAtMost256Descriptors) {
    Machine m;
    m.registers.queue_max = 32768;
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.backend.setup().size, 256u);
    Machine odd;
    odd.registers.queue_max = 100;
    ASSERT_TRUE(odd.probe());
    EXPECT_EQ(odd.backend.setup().size, 64u) << "a power of two for a split queue";
    writes_and_reads(odd);
}

TEST(VirtioBlk, TheSmallestAndOddQueues) {
    for (const bool packed : {false, true}) {
        for (const auto& [maximum, size] : {std::pair{3u, packed ? 3u : 0u},
                                            {4u, 4u},
                                            {5u, packed ? 5u : 4u},
                                            {255u, packed ? 255u : 128u},
                                            {257u, 256u},
                                            {32767u, 256u}}) {
            Machine m;
            m.registers.offered |= packed ? f_packed : 0;
            m.registers.queue_max = maximum;
            const auto probed = m.probe();
            if (size == 0) { // too small for header, data and status once it is a power of two
                EXPECT_EQ(probed.error().code, Code::not_supported);
                EXPECT_EQ(m.memory.outstanding, 0u);
                continue;
            }
            ASSERT_TRUE(probed) << maximum;
            EXPECT_EQ(m.backend.setup().size, size) << maximum;
            writes_and_reads(m);
        }
    }
}

TEST(VirtioBlk, BlockSizeTopologyAndReadOnly) {
    Machine m;
    m.registers.offered |= f_topology | f_ro;
    m.registers.set<u32>(20, 4096);
    m.registers.set<u8>(24, 1);
    ASSERT_TRUE(m.probe());
    const io::Geometry& geometry = m.sink.disks[0]->geometry();
    EXPECT_EQ(geometry.sector_size, 4096u);
    EXPECT_EQ(geometry.physical_sector_size, 8192u);
    EXPECT_EQ(geometry.sectors, Machine::sectors / 8);
    EXPECT_TRUE(geometry.read_only && !geometry.discard);
    auto buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.run(io::Op::read, 3, buffer.span()));
}

TEST(VirtioBlk, SegmentsAreAsLongAsTheDeviceTakesThem) {
    Machine m;
    m.registers.offered |= f_size_max;
    m.registers.set<u32>(8, 4096 + 100);
    m.registers.set<u32>(12, 2);
    ASSERT_TRUE(m.probe());
    m.backend.hold = true;
    auto buffer = *m.memory.buffer(16384);
    auto task = m.transfer(*m.sink.disks[0], io::Op::read, 0, buffer.span());
    io::TaskGroup group(m.executor);
    ASSERT_TRUE(group.spawn(std::move(task)));
    m.turns(2);
    ASSERT_EQ(m.backend.taken.size(), 2u) << "16 KiB in requests of two segments";
    for (const auto& taken : m.backend.taken) {
        EXPECT_EQ(taken.bytes, 8192u);
        EXPECT_EQ(taken.chain.pieces.size(), 4u);
        EXPECT_EQ(taken.chain.pieces[1].length, 4096u) << "whole sectors";
    }
    m.backend.complete(1, 0);
    m.backend.complete(0, 0);
    m.turns(3);
}

TEST(VirtioBlk, AMissingStatusClosesTheDiskAndResetsTheDevice) {
    Machine m;
    ASSERT_TRUE(m.probe());
    m.backend.withhold_status = true;
    auto buffer = *m.memory.buffer(4096);
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
    EXPECT_TRUE(m.log.has("a status that is not defined"));
    m.turns(5);
    EXPECT_EQ(m.status(), 0) << "it was reset";
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
    EXPECT_TRUE(m.interrupts.lines.empty());
}

TEST(VirtioBlk, ASilentDeviceIsResetAndItsBuffersAreFree) {
    for (const bool unresettable : {false, true}) {
        Machine m;
        ASSERT_TRUE(m.probe());
        m.backend.hold = true;
        m.registers.unresettable = unresettable;
        auto buffer = *m.memory.buffer(4096);
        const DmaSpan span = buffer.span();
        const Instant begun = m.clock.time;
        EXPECT_EQ(m.run(io::Op::read, 0, span).error().code, Code::timed_out);
        EXPECT_LT(m.clock.time - begun, 3 * Machine::timeout);
        m.turns(unresettable ? 200 : 5);
        EXPECT_EQ(is_quarantined(span), unresettable) << "the device could still write to it";
        EXPECT_EQ(m.log.has("its memory is not reused"), unresettable);
        clear_quarantine();
    }
}

TEST(VirtioBlk, WriteZeroes) {
    for (const bool unmap : {false, true}) {
        Machine m;
        m.registers.offered |= f_write_zeroes;
        m.registers.set<u32>(48, 64); // max_write_zeroes_sectors
        m.registers.set<u8>(56, unmap ? 1 : 0);
        ASSERT_TRUE(m.probe());
        EXPECT_TRUE(m.sink.disks[0]->geometry().write_zeroes);
        EXPECT_NE(m.features().find("write-zeroes"), std::string_view::npos);
        std::memset(m.backend.disk.data(), 0x77, 200 * 512);
        m.backend.hold = true;
        io::TaskGroup group(m.executor);
        ASSERT_TRUE(group.spawn(m.erase(*m.sink.disks[0], io::Op::write_zeroes, 10, 100 * 512)));
        m.turns(2);
        ASSERT_EQ(m.backend.taken.size(), 2u) << "in requests of at most 64 sectors";
        EXPECT_TRUE(m.backend.taken[0].kind == virtio_test::Kind::write_zeroes && m.backend.taken[0].sector == 10 &&
                    m.backend.taken[0].bytes == 64 * 512);
        EXPECT_TRUE(m.backend.taken[1].sector == 74 && m.backend.taken[1].bytes == 36 * 512);
        EXPECT_EQ(m.backend.taken[0].flags, unmap ? 1u : 0u) << "deallocates where the device permits it";
        m.backend.complete(0, 0);
        m.backend.complete(0, 0);
        m.turns(3);
        for (u32 i = 0; i < 200; ++i) {
            EXPECT_EQ(m.backend.disk.data()[i * 512], std::byte{i < 10 || i >= 110 ? u8{0x77} : u8{0}}) << i;
        }
    }
}

TEST(VirtioBlk, WriteZeroesOnlyWhereItIsPossible) {
    const std::function<void(Machine&)> changes[] = {
        [](Machine& m) { m.registers.offered &= ~f_write_zeroes; },
        [](Machine& m) { m.registers.set<u32>(48, 0); },
        [](Machine& m) { m.registers.offered |= f_ro; },
        [](Machine& m) { // less than a sector
            m.registers.set<u32>(20, 4096);
            m.registers.set<u32>(48, 7);
        },
    };
    for (const auto& change : changes) {
        Machine m;
        m.registers.offered |= f_write_zeroes;
        m.registers.set<u32>(48, 64);
        change(m);
        ASSERT_TRUE(m.probe());
        EXPECT_FALSE(m.sink.disks[0]->geometry().write_zeroes);
        EXPECT_EQ(m.features().find("write-zeroes"), std::string_view::npos);
        EXPECT_FALSE(m.erase(io::Op::write_zeroes, 0, 4096));
    }
    Machine withheld;
    withheld.registers.offered |= f_write_zeroes;
    withheld.registers.set<u32>(48, 64);
    ASSERT_TRUE(withheld.probe(to_underlying(Feature::write_zeroes)));
    EXPECT_FALSE(withheld.sink.disks[0]->geometry().write_zeroes);
    EXPECT_EQ(withheld.erase(io::Op::write_zeroes, 0, 4096).error().code, Code::not_supported);
}

TEST(VirtioBlk, WithoutFlushTheCacheIsWriteThrough) {
    struct Row {
        const char* what;
        u64 offered;
        u8 writeback; // before
        u32 withheld;
        u32 writes; // of the field
        bool write_through;
    };
    const u32 flush = to_underlying(Feature::flush);
    const u32 wce = to_underlying(Feature::config_wce);
    for (const Row& row :
         {Row{"flushed", f_flush | f_config_wce, 1, 0, 0, false},
          Row{"flushed, and write-through", f_flush | f_config_wce, 0, 0, 0, true},
          Row{"not flushed", f_flush | f_config_wce, 1, flush, 1, true}, Row{"no flush", f_config_wce, 1, 0, 1, true},
          Row{"no choice", f_flush, 1, flush, 0, true}, // the device's duty
          Row{"neither", f_flush | f_config_wce, 1, flush | wce, 0, true},
          Row{"flush without a choice", f_flush, 1, 0, 0, false}}) {
        Machine m;
        m.registers.offered = (m.registers.offered & ~f_flush) | row.offered;
        m.registers.set<u8>(32, row.writeback);
        ASSERT_TRUE(m.probe(row.withheld)) << row.what;
        EXPECT_EQ(m.registers.config_writes, row.writes) << row.what;
        EXPECT_EQ(m.features().find("write-through") != std::string_view::npos, row.write_through) << row.what;
        EXPECT_EQ(m.registers.config[32], row.writes != 0 ? 0 : row.writeback) << row.what;
        EXPECT_FALSE(m.log.has("write cache")) << row.what;
        writes_and_reads(m);
    }
    Machine stuck;
    stuck.registers.offered |= f_config_wce;
    stuck.registers.set<u8>(32, 1);
    stuck.registers.wce_stuck = true;
    ASSERT_TRUE(stuck.probe(flush));
    EXPECT_TRUE(stuck.log.has("its write cache cannot be flushed"));
    EXPECT_EQ(stuck.features().find("write-through"), std::string_view::npos);
}

TEST(VirtioBlk, AResizeTakesEffectAtOnce) {
    Machine m;
    ASSERT_TRUE(m.probe());
    const io::BlockDevice& disk = *m.sink.disks[0];
    auto buffer = *m.memory.buffer(4096);
    const auto read = [&](u64 lba) { return m.run(io::Op::read, lba, buffer.span()); };
    EXPECT_FALSE(read(Machine::sectors - 4));
    m.registers.set<u64>(0, Machine::sectors / 2); // shrunk: the fake's medium is not larger than at first
    m.change_config();
    EXPECT_TRUE(m.log.has("resized from 2048 to 1024 sectors"));
    EXPECT_EQ(disk.geometry().sectors, Machine::sectors / 2);
    EXPECT_TRUE(read(Machine::sectors / 2 - 8));
    EXPECT_EQ(read(Machine::sectors / 2 - 4).error().code, Code::bad_argument);
    m.registers.set<u64>(0, Machine::sectors); // grown
    m.change_config();
    EXPECT_TRUE(m.log.has("resized from 1024 to 2048 sectors"));
    EXPECT_TRUE(read(Machine::sectors - 8));
    m.registers.set<u64>(0, 0);
    m.change_config();
    EXPECT_FALSE(read(0));
    m.registers.set<u64>(0, Machine::sectors);
    m.change_config();
    writes_and_reads(m);
    const usize lines = m.log.text.size();
    m.change_config(); // nothing has changed
    EXPECT_EQ(m.log.text.size(), lines);
}

TEST(VirtioBlk, AnImpossibleSizeIsNotTaken) {
    Machine m;
    ASSERT_TRUE(m.probe());
    m.registers.set<u64>(0, ~u64{0});
    m.change_config();
    EXPECT_TRUE(m.log.has("vda: the disk keeps its size: the virtio disk has an impossible size"));
    m.registers.set<u64>(0, 8);
    m.registers.restless = true; // the generation changes with each read
    m.change_config();
    EXPECT_TRUE(m.log.has("the device's configuration changes each time that it is read"));
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, Machine::sectors);
    writes_and_reads(m);
}

// There is no generation: a size that changes between the reads of its halves is seen by reading it again
// [virtio-1.2 §2.5.4].
TEST(VirtioBlk, ALegacyDevicesSizeIsReadUntilItIsConsistent) {
    constexpr u64 before = (u64{1} << 32) - 8, after = (u64{3} << 32) + 16;
    const auto change_between_halves = [](Machine& m, u64 from, u64 to) {
        m.registers.set<u64>(0, from);
        m.registers.on_config_read = [&m, to](u64 at) {
            if (at == 4) {
                m.registers.set<u64>(0, to);
                m.registers.on_config_read = nullptr;
            }
        };
    };
    Machine m(1);
    change_between_halves(m, before, after);
    ASSERT_TRUE(m.probe());
    ASSERT_EQ(m.sink.disks.size(), 1u);
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, after) << "when it is attached";
    change_between_halves(m, after, before);
    m.change_config();
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, before) << "when it changes";
    m.registers.on_config_read = [&](u64) { m.registers.config[0] += 8; };
    m.change_config();
    EXPECT_TRUE(m.log.has("the device's configuration changes each time that it is read"));
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, before);
    Machine restless(1);
    restless.registers.on_config_read = [&](u64) { restless.registers.config[0] += 8; };
    EXPECT_EQ(restless.probe().error().code, Code::protocol);
}

TEST(VirtioBlk, ADiskOfZeroBytesIsReportedAndUsedOnceItHasSome) {
    for (const u64 few : {u64{0}, u64{7}}) { // of 512 bytes, with sectors of 4096
        Machine m;
        m.registers.set<u64>(0, few);
        m.registers.set<u32>(20, 4096);
        ASSERT_TRUE(m.probe());
        EXPECT_TRUE(m.sink.disks.empty());
        ASSERT_EQ(m.sink.left.size(), 1u);
        EXPECT_EQ(m.sink.left[0], std::tuple("virtio-mmio 0xfeb00000", drivers::Unused::empty, "it has 0 bytes"));
        m.registers.set<u64>(0, few);
        m.change_config();
        EXPECT_TRUE(m.sink.disks.empty());
        m.registers.set<u64>(0, Machine::sectors);
        m.change_config();
        ASSERT_EQ(m.sink.disks.size(), 1u);
        EXPECT_EQ(m.sink.disks[0]->geometry().sectors, Machine::sectors / 8);
        auto buffer = *m.memory.buffer(4096);
        EXPECT_TRUE(m.run(io::Op::write, 1, buffer.span()));
        EXPECT_FALSE(m.log.has("warning:") || m.log.has("error:")) << m.log.text.view();
    }
}

// One line for each device says what features= does to it.
TEST(VirtioBlk, WithheldFeaturesAreNamed) {
    Machine m;
    ASSERT_TRUE(m.probe(to_underlying(Feature::event_idx) | to_underlying(Feature::packed) |
                        to_underlying(Feature::config_wce) | to_underlying(Feature::ncq)));
    EXPECT_TRUE(m.log.has("features= withholds EVENT_IDX; without effect, because the device does not offer them: "
                          "CONFIG_WCE, RING_PACKED"))
        << m.log.text.view();
    Machine all;
    ASSERT_TRUE(all.probe(to_underlying(Feature::flush)));
    EXPECT_TRUE(all.log.has("features= withholds FLUSH; without effect, because the device does not offer them: none"))
        << all.log.text.view();
    Machine none;
    ASSERT_TRUE(none.probe(to_underlying(Feature::ncq)));
    EXPECT_FALSE(none.log.has("not used by this driver"));
    EXPECT_FALSE(none.log.has("withholds")) << "the kernel reports what no driver knows";
}

TEST(VirtioBlk, ASizeIsInWholeSectors) {
    Machine m;
    m.registers.set<u32>(20, 4096);
    ASSERT_TRUE(m.probe());
    m.registers.set<u64>(0, 8 * 100 + 7);
    m.change_config();
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, 100u);
}

TEST(VirtioBlk, AFailureClosesTheDisk) {
    Machine m;
    ASSERT_TRUE(m.probe());
    m.registers.status |= 64; // DEVICE_NEEDS_RESET
    m.registers.isr |= 2;
    m.interrupts.raise(gsi);
    m.turns(5);
    EXPECT_TRUE(m.log.has("DEVICE_NEEDS_RESET"));
    auto buffer = *m.memory.buffer(4096);
    EXPECT_FALSE(m.run(io::Op::read, 0, buffer.span()));
}

TEST(VirtioBlk, AnotherDeviceOnTheLineChangesNothing) {
    Machine m;
    ASSERT_TRUE(m.probe());
    const u64 before = m.sink.disks[0]->counters().interrupts;
    for (u32 i = 0; i < 1000; ++i) {
        m.interrupts.raise(gsi);
    }
    m.turns(3);
    EXPECT_EQ(m.sink.disks[0]->counters().interrupts, before);
    writes_and_reads(m);
}

TEST(VirtioBlk, CountsEachAccess) {
    Machine m;
    ASSERT_TRUE(m.probe());
    auto buffer = *m.memory.buffer(4096);
    const io::Counters before = m.sink.disks[0]->counters();
    const u32 notified = m.registers.notifications;
    for (u32 i = 0; i < 10; ++i) {
        EXPECT_TRUE(m.run(io::Op::read, i, buffer.span()));
    }
    const io::Counters used = m.sink.disks[0]->counters() - before;
    EXPECT_EQ(used.notifications, 10u);
    EXPECT_EQ(m.registers.notifications - notified, 10u);
    EXPECT_EQ(used.device_accesses, 10u + 2 * used.interrupts) << "status and acknowledgement of each interrupt";
}

// Typed from [virtio-1.2 §5.2.6].
TEST(VirtioBlk, RequestsOnTheWire) {
    const virtio_blk::RequestHeader header{virtio_blk::RequestType::out, 0, 0x1122334455667788};
    const u8 bytes[] = {1, 0, 0, 0, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11};
    static_assert(sizeof(header) == sizeof(bytes));
    EXPECT_EQ(std::memcmp(&header, bytes, sizeof bytes), 0);
    const virtio_blk::RangeSegment segment{0x0102030405060708, 0x0a0b0c0d, virtio_blk::segment_unmap};
    const u8 range[] = {8, 7, 6, 5, 4, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 1, 0, 0, 0};
    EXPECT_EQ(std::memcmp(&segment, range, sizeof range), 0);
    EXPECT_EQ(to_underlying(virtio_blk::RequestType::write_zeroes), 13u);
    EXPECT_EQ(to_underlying(virtio_blk::RequestType::discard), 11u);
    EXPECT_EQ(to_underlying(virtio_blk::RequestType::get_id), 8u);
}
} // namespace
