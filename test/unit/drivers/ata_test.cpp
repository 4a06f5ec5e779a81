// Attaching: which registers are accessed, which devices are recognised, which are rejected.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"

#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;
import drivers.table;
import boot.disks;
import boot.sinks;

namespace {
using namespace ata_test;
using Left = std::map<std::string, drivers::Unused>;

TEST(AtaProtocol, DecodesIdentifyBytes) {
    // Bytes in bus order, written from the specification's table: word n is bytes 2n (low) and 2n+1.
    std::array<u8, 512> raw{};
    const auto set = [&](unsigned word, u8 low, u8 high) {
        raw[2 * word] = low;
        raw[2 * word + 1] = high;
    };
    set(0, 0x40, 0x00);
    const char* model = "EQUMH RADDSI K "; // "QEMU HARDDISK" with each pair of characters swapped
    for (int i = 0; i < 14; ++i) {
        raw[54 + i] = static_cast<u8>(model[i]);
    }
    for (int i = 14; i < 40; ++i) {
        raw[54 + i] = ' ';
    }
    set(49, 0x00, 0x0b); // LBA, DMA, IORDY
    set(53, 0x07, 0x00); // words 64-70 and 88 are valid
    set(60, 0xff, 0xff); // 0x0fffffff sectors with 28 bits
    set(61, 0xff, 0x0f);
    set(63, 0x07, 0x00);  // multiword 0-2 supported, none selected
    set(82, 0x21, 0x40);  // write cache
    set(83, 0x00, 0x74);  // valid, FLUSH CACHE EXT, FLUSH CACHE, 48 bits
    set(85, 0x20, 0x40);  // write cache on
    set(87, 0x00, 0x40);  // valid
    set(88, 0x3f, 0x20);  // Ultra DMA 0-5 supported, 5 selected
    set(100, 0x00, 0x00); // 0x0000'0002'0000'0000 sectors: 4 TiB
    set(102, 0x02, 0x00);
    set(106, 0x03, 0x60); // valid, 2^3 logical sectors in a physical one
    ata::IdentifyData data;
    std::memcpy(data.words.data(), raw.data(), 512);
    auto info = ata::decode(data);
    ASSERT_TRUE(info);
    EXPECT_EQ(info->model.view(), "QEMU HARDDISK");
    EXPECT_EQ(info->sectors, 0x200000000u);
    EXPECT_EQ(info->sector_size, 512u);
    EXPECT_EQ(info->physical_sector_size, 4096u);
    EXPECT_TRUE(info->lba48 && info->write_cache && info->flush && info->flush_ext);
    EXPECT_EQ(info->ultra_dma, 5);
    EXPECT_EQ(info->multiword_dma, -1);
    EXPECT_EQ(info->multiword_best, 2);

    set(85, 0x00, 0x40);  // cache off
    set(106, 0x00, 0x50); // logical sectors longer than 256 words
    set(117, 0x00, 0x08); // 2048 words
    std::memcpy(data.words.data(), raw.data(), 512);
    info = ata::decode(data);
    ASSERT_TRUE(info);
    EXPECT_FALSE(info->write_cache);
    EXPECT_EQ(info->sector_size, 4096u);
    EXPECT_EQ(info->physical_sector_size, 4096u);
    set(117, 0x08, 0x01); // 528 bytes
    std::memcpy(data.words.data(), raw.data(), 512);
    EXPECT_EQ(ata::decode(data).error().seen, 528u);
}

TEST(AtaProtocol, RefusesWhatItCannotUse) {
    const auto with = [](unsigned word, u16 value) {
        ata::IdentifyData id = identify_words(1 << 20);
        id.words[word] = value;
        return ata::decode(id);
    };
    EXPECT_TRUE(with(0, 0x0040));
    EXPECT_EQ(with(0, 0x8580).error().code, Code::not_supported);
    EXPECT_EQ(with(49, 0x0200).error().code, Code::not_supported);
    EXPECT_EQ(with(103, 1).error().code, Code::protocol);
    EXPECT_EQ(with(255, 0x00a5).error().code, Code::corrupt);
    ata::IdentifyData id = identify_words(1 << 20);
    u32 sum = 0xa5;
    for (int i = 0; i < 255; ++i) {
        sum += (id.words[i] & 0xff) + (id.words[i] >> 8);
    }
    id.words[255] = static_cast<u16>(0xa5 | (0x100 - (sum & 0xff)) << 8);
    EXPECT_TRUE(ata::decode(id));
    id = identify_words(0);
    EXPECT_EQ(ata::decode(id).error().code, Code::not_supported);
    id = identify_words(1 << 20);
    id.words[63] = 0;
    id.words[88] = 0;
    EXPECT_EQ(ata::decode(id).error().code, Code::not_supported);
}

// Bits written from [ATA-7 §6.7, §6.9, §6.14] and [BMIDE §2].
TEST(AtaProtocol, RegistersAreThoseOfTheManual) {
    EXPECT_TRUE(ata::Status{0x80}.busy() && ata::Status{0x40}.ready() && ata::Status{0x20}.device_fault());
    EXPECT_TRUE(ata::Status{0x08}.data_request() && ata::Status{0x01}.error());
    EXPECT_FALSE(ata::Status{0x76}.in_progress() || ata::Status{0x7e}.error());
    EXPECT_TRUE(ata::Status{0xff}.floating() && ata::Status{0x7f}.floating() && !ata::Status{0xfe}.floating());
    EXPECT_TRUE(ata::ErrorRegister{0x80}.interface_crc() && ata::ErrorRegister{0x40}.uncorrectable());
    EXPECT_TRUE(ata::ErrorRegister{0x10}.id_not_found() && ata::ErrorRegister{0x04}.aborted());
    EXPECT_EQ(ata::device_register(0), 0xe0u);
    EXPECT_EQ(ata::device_register(1, 0x0a), 0xfau);
    EXPECT_EQ(ata::device_register(2, 0xf5), 0xe5u);
    EXPECT_EQ(ata::bus_master_start, 1u);
    EXPECT_EQ(ata::bus_master_to_memory, 8u);
    EXPECT_TRUE(ata::BusMasterStatus{0x80}.simplex() && ata::BusMasterStatus{0x04}.interrupt());
    EXPECT_TRUE(ata::BusMasterStatus{0x02}.error() && ata::BusMasterStatus{0x01}.active());
    EXPECT_FALSE(ata::BusMasterStatus{0x78}.simplex() || ata::BusMasterStatus{0xf8}.active());
}

TEST(AtaProtocol, DescribesErrors) {
    FixedText<200> text;
    ata::describe(text, {0x51}, {0x40}, {0x05});
    EXPECT_EQ(text.view(), "status 0x51, error 0x40 UNC (unreadable medium), ended before all data was transferred");
}

TEST(AtaAttach, AnnouncesADisk) {
    Machine m;
    m.add(m.primary, 0);
    ASSERT_TRUE(m.attach());
    ASSERT_EQ(m.sink.disks.size(), 1u);
    const io::BlockDevice& d = m.disk(0);
    EXPECT_EQ(d.identity().name.view(), "hda");
    EXPECT_EQ(d.identity().driver, "ata");
    EXPECT_EQ(d.identity().model.view(), "FAKE DISK 9000");
    EXPECT_EQ(d.identity().features.view(), "udma5 lba48 flush words");
    EXPECT_EQ(d.geometry().sectors, u64{1 << 20});
    EXPECT_TRUE(d.geometry().flush);
    EXPECT_EQ(m.primary.resets, 0u) << "a device that answers is not reset";
    EXPECT_EQ(m.clock.time, 1'000'000u) << "and costs no waiting";
    EXPECT_EQ(m.function.get32(4) & 0x405, 0x005u);
    EXPECT_EQ(m.interrupts.lines.size(), 1u);
    EXPECT_TRUE(m.interrupts.lines[0].line.isa);
}

TEST(AtaAttach, NumbersAllFour) {
    Machine m;
    for (int unit = 0; unit < 2; ++unit) {
        m.add(m.primary, unit);
        m.add(m.secondary, unit);
    }
    ASSERT_TRUE(m.attach());
    ASSERT_EQ(m.sink.disks.size(), 4u);
    EXPECT_EQ(m.disk(1).identity().name.view(), "hdb");
    EXPECT_EQ(m.disk(2).identity().name.view(), "hdc");
    EXPECT_EQ(m.disk(3).identity().name.view(), "hdd");
}

TEST(AtaAttach, WhatIsNotOfferedIsNotTouched) {
    Machine m;
    m.add(m.primary, 0);
    m.add(m.secondary, 0);
    m.sink.offer[0] = m.sink.offer[1] = false;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.primary.accesses, 0u);
    EXPECT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(m.sink.disks.contains(2));
    EXPECT_EQ(m.sink.left, (Left{{"hda", drivers::Unused::taken}, {"hdb", drivers::Unused::taken}}));

    Machine none;
    none.add(none.primary, 0);
    none.sink.offer.assign(8, false);
    ASSERT_TRUE(none.attach());
    EXPECT_EQ(none.primary.accesses + none.secondary.accesses, 0u);
    EXPECT_EQ(none.space.command_writes, 0u);
}

TEST(AtaAttach, AFloatingBusCostsOneAccess) {
    Machine m;
    m.primary.floating = true;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.primary.accesses, 1u);
    EXPECT_EQ(m.sink.disks.size(), 0u);
    EXPECT_EQ(m.clock.time, 1'000'000u);
    EXPECT_EQ(m.interrupts.lines.size(), 0u);
    EXPECT_EQ(m.memory.allocations, 0u);
}

TEST(AtaAttach, AbsentDevicesAreSeenAtOnce) {
    for (const bool shadow : {false, true}) {
        Machine m;
        m.add(m.primary, 0);
        m.primary.answers_for_absent = shadow;
        ASSERT_TRUE(m.attach());
        EXPECT_EQ(m.sink.disks.size(), 1u);
        EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 flush words") << "the absent one has no say";
        EXPECT_EQ(m.clock.time, 1'000'000u);
    }
    Machine slave_only;
    slave_only.add(slave_only.primary, 1);
    ASSERT_TRUE(slave_only.attach());
    EXPECT_EQ(slave_only.disk(1).identity().name.view(), "hdb");
}

TEST(AtaAttach, PacketDevicesAreLeftAlone) {
    Machine m;
    m.add(m.primary, 0);
    m.add(m.primary, 1).packet = true;
    m.add(m.secondary, 0).packet = true;
    m.secondary.drives[0]->no_signature = true;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.sink.disks.size(), 1u);
    EXPECT_EQ(m.primary.resets + m.secondary.resets, 0u);
    EXPECT_EQ(m.sink.left, (Left{{"hdb", drivers::Unused::not_a_disk}, {"hdc", drivers::Unused::not_a_disk}}));
}

TEST(AtaAttach, ASlaveWithoutAMasterKeepsItsWords) {
    Machine m;
    m.add(m.primary, 1);
    m.primary.empty_master = true;
    ASSERT_TRUE(m.attach());
    ASSERT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(m.sink.left.empty()) << "an empty place is no broken disk: " << m.sink.reasons;
    EXPECT_EQ(m.primary.resets, 0u);
    EXPECT_EQ(m.clock.time, 1'000'000u) << "and costs no waiting";
    EXPECT_EQ(m.disk(1).identity().features.view(), "udma5 lba48 flush words");
    DmaSpan b = *m.memory.allocate(4096, ~0ull);
    ASSERT_TRUE(m.read(m.disk(1), 1, b));
    const u64 before = m.primary.accesses;
    ASSERT_TRUE(m.read(m.disk(1), 0x54321, b));
    EXPECT_EQ(m.primary.accesses - before, 7u);

    Machine empty; // both devices like that
    empty.primary.empty_master = true;
    ASSERT_TRUE(empty.attach());
    EXPECT_TRUE(empty.sink.disks.empty() && empty.sink.left.empty());

    Machine faulty; // a device fault does not mean absence
    faulty.add(faulty.primary, 0);
    faulty.primary.abort = 100;
    faulty.primary.abort_status = 0x71;
    ASSERT_TRUE(faulty.attach());
    EXPECT_EQ(faulty.sink.left, (Left{{"hda", drivers::Unused::failed}}));
}

TEST(AtaAttach, OneDeviceAtBothPlacesIsOneDisk) {
    Machine m;
    Drive& d = m.add(m.primary, 0);
    m.primary.one_device = true;
    d.id.words[10] = 0x4142;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.sink.disks.size(), 1u);
    EXPECT_EQ(m.sink.left, (Left{{"hdb", drivers::Unused::taken}}));

    Machine old; // without READ MULTIPLE it cannot be determined
    old.add(old.primary, 0).no_multiple = true;
    old.primary.one_device = true;
    old.primary.drives[0]->id.words[10] = 0x4142;
    ASSERT_TRUE(old.attach());
    EXPECT_EQ(old.sink.left, (Left{{"hdb", drivers::Unused::taken}}));

    Machine clones; // two disks with the same serial number
    clones.add(clones.primary, 0).id.words[10] = 0x4142;
    clones.add(clones.primary, 1).id.words[10] = 0x4142;
    ASSERT_TRUE(clones.attach());
    EXPECT_EQ(clones.sink.disks.size(), 2u);
    EXPECT_TRUE(clones.sink.left.empty()) << clones.sink.reasons;

    Machine two; // disks that differ in their serial numbers, and disks that have none
    two.add(two.primary, 0).id.words[10] = 0x4142;
    two.add(two.primary, 1).id.words[10] = 0x4143;
    two.add(two.secondary, 0);
    two.add(two.secondary, 1);
    ASSERT_TRUE(two.attach());
    EXPECT_EQ(two.sink.disks.size(), 4u);
}

TEST(AtaAttach, ADiskOfZeroBytesIsReportedAndNoFailure) {
    Machine m;
    m.add(m.primary, 0).id = identify_words(0);
    m.add(m.primary, 1);
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.sink.left, (Left{{"hda", drivers::Unused::empty}}));
    EXPECT_EQ(m.sink.disks.size(), 1u);
}

TEST(AtaAttach, AChannelThatIsSwitchedOffLeavesTheOtherOne) {
    Machine m;
    m.set_native();
    m.add(m.primary, 0);
    m.add(m.secondary, 0);
    m.function.set32(0x10, 1); // no ports
    m.function.set32(0x14, 1);
    m.primary.floating = true;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.primary.accesses, 0u);
    EXPECT_EQ(m.sink.disks.size(), 1u);
    EXPECT_TRUE(m.sink.disks.contains(2));
}

// Two controllers, as shown by a chipset in IDE mode: the first in compatibility mode, the second in native mode.
TEST(AtaAttach, ASecondControllerHasNumbersAndClaimsOfItsOwn) {
    Machine a, b;
    b.set_native();
    a.add(a.primary, 0);
    b.add(b.primary, 0);
    b.add(b.secondary, 1);
    EXPECT_TRUE(ata::is_legacy(*pci::look_up(a.space, {0, 1, 1})));
    EXPECT_FALSE(ata::is_legacy(*pci::look_up(b.space, {0, 1, 1})));
    drivers::Table table;
    const drivers::Plan plan = table.plan(hv::VmGuest::xen, std::nullopt);
    boot::Attached attached{plan};
    const boot::Disks& disks = attached.disks;
    boot::DriverSinks ata_sinks{attached, "ata"};
    boot::DriverSinks xen_blk_sinks{attached, "xen_blk"};
    boot::DriverDiskSink& port = ata_sinks.disks;
    boot::DriverDiskSink& ring = xen_blk_sinks.disks;
    drivers::Environment first{a.executor, a.memory, a.interrupts, port, 100'000'000, 0};
    drivers::Environment second{b.executor, b.memory, b.interrupts, port, 100'000'000, 0};
    ata::Controller<Ports> one{first, Ports{&a.all}};
    ata::Controller<Ports> two{second, Ports{&b.all}};
    ASSERT_TRUE(a.executor.run(one.attach(*pci::look_up(a.space, {0, 1, 1}), 0)));
    ASSERT_TRUE(b.executor.run(two.attach(*pci::look_up(b.space, {0, 1, 1}), 4)));
    EXPECT_EQ(disks.names().view(), "hda, hde, hdh");
    EXPECT_FALSE(ring.offered(0)) << "ata has hda";
    for (u32 n = 1; n < 8; ++n) {
        EXPECT_TRUE(ring.offered(n)) << "the twin of disk " << n << " belongs to no device";
    }
    DmaSpan buffer = *b.memory.allocate(4096, ~0ull);
    ASSERT_TRUE(b.read(*disks.find("hdh"), 77, buffer));
    EXPECT_TRUE(is_pattern(buffer, 77));
}

TEST(AtaAttach, NamesGoOnAfterZ) {
    EXPECT_EQ(ata::disk_name(25).view(), "hdz");
    EXPECT_EQ(ata::disk_name(26).view(), "hdaa");
    EXPECT_EQ(ata::disk_name(701).view(), "hdzz");
    EXPECT_EQ(ata::disk_name(702).view(), "hdaaa");
}

TEST(AtaAttach, DoesWithoutWords) {
    Machine m;
    m.add(m.primary, 0);
    m.primary.words = false;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 flush");
    DmaSpan b = *m.memory.allocate(4096, ~0ull);
    ASSERT_TRUE(m.read(m.disk(0), 0x123456, b).error().code == Code::bad_argument);
    ASSERT_TRUE(m.read(m.disk(0), 0x12345, b));
    EXPECT_TRUE(is_pattern(b, 0x12345));
    const u64 before = m.primary.accesses;
    ASSERT_TRUE(m.read(m.disk(0), 0x54321, b));
    EXPECT_EQ(m.primary.accesses - before, 9u) << "device holds what it must: 4 registers and the command byte by byte";

    Machine half;
    half.add(half.primary, 0);
    half.primary.command_words = false;
    ASSERT_TRUE(half.attach());
    EXPECT_EQ(half.disk(0).identity().features.view(), "udma5 lba48 flush");
    b = *half.memory.allocate(4096, ~0ull);
    ASSERT_TRUE(half.read(half.disk(0), 99, b));
    EXPECT_TRUE(is_pattern(b, 99));
}

TEST(AtaAttach, WaitsForASlowDeviceAndResetsAHungOne) {
    Machine slow;
    slow.add(slow.primary, 0);
    slow.primary.pio_latency = 30'000'000;
    ASSERT_TRUE(slow.attach());
    EXPECT_EQ(slow.sink.disks.size(), 1u);
    EXPECT_EQ(slow.primary.resets, 0u);

    Machine hung;
    hung.add(hung.primary, 0);
    hung.primary.hang = 1;
    ASSERT_TRUE(hung.attach());
    EXPECT_EQ(hung.sink.disks.size(), 1u);
    EXPECT_EQ(hung.primary.resets, 1u);

    Machine dead;
    dead.add(dead.primary, 0);
    dead.primary.hang = 100;
    dead.primary.dead = true;
    dead.add(dead.secondary, 0);
    ASSERT_TRUE(dead.attach());
    EXPECT_EQ(dead.sink.left, (Left{{"hda", drivers::Unused::failed}}));
    EXPECT_EQ(dead.sink.disks.size(), 1u) << "the other channel works";
    EXPECT_LE(dead.clock.time, 700'000'000u);
}

TEST(AtaAttach, SelectsAModeWhenTheFirmwareHasNot) {
    Machine m;
    Drive& d = m.add(m.primary, 0);
    d.id.words[88] = 0x003f;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.disk(0).identity().features.view(), "mwdma2 lba48 flush words");
    EXPECT_EQ(m.primary.codes.back(), 0xef);
}

TEST(AtaAttach, ReleasesADiskThatAnotherDriverHas) {
    Machine m;
    m.add(m.primary, 0);
    m.sink.busy = true;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.controller.disks(), 0u);
}

TEST(AtaAttach, HonoursWithheldFlush) {
    Machine m;
    m.add(m.primary, 0);
    m.environment.withheld_features = to_underlying(drivers::Feature::flush);
    ata::Controller<Ports> controller{m.environment, Ports{&m.all}};
    ASSERT_TRUE(m.executor.run(controller.attach(*pci::look_up(m.space, {0, 1, 1}))));
    EXPECT_FALSE(m.disk(0).geometry().flush);
    EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 write-through words");
    EXPECT_TRUE(m.primary.drives[0]->cache_off);
    EXPECT_EQ(m.primary.codes, (std::vector<u8>{0xec, 0xef}));
    EXPECT_EQ(m.primary.resets, 0u);
}

/// A second controller at the same ports as the first.
struct Second {
    explicit Second(Machine& machine) : m(machine) {
        m.space.add(0, 2, 0, 0x8086, 0x7111, 0x010180);
        function().set32(0x20, 0xc061);
        function().bar_mask[4] = 0xfff0;
    }
    pci_test::Function& function() { return m.space.functions[{0, 2, 0}]; }
    void native(u8 prog_if, std::array<u32, 4> bases) {
        function().bytes[9] = prog_if;
        for (u32 i = 0; i < 4; ++i) {
            function().set32(0x10 + 4 * i, bases[i] | 1);
            function().bar_mask[i] = i % 2 == 0 ? 0xfff8 : 0xfffc;
        }
    }
    Result<void> attach() { return m.executor.run(controller.attach(*pci::look_up(m.space, {0, 2, 0}), 4)); }

    Machine& m;
    ata::PortClaims claims;
    ata::Controller<Ports> first{m.environment, Ports{&m.all}, &claims};
    ata::Controller<Ports> controller{m.environment, Ports{&m.all}, &claims};
};

// Anything at those ports belongs to the first one: nothing is sent there for the second one, and nothing is waited
// for.
TEST(AtaPorts, ASecondControllerAtTheSamePortsIsRefusedAtOnce) {
    for (const bool offered : {true, false}) {
        Machine m;
        m.add(m.primary, 0);
        m.add(m.secondary, 1);
        Second second(m);
        for (u32 n = 0; n < 4; ++n) {
            m.sink.offer[n] = offered;
        }
        ASSERT_TRUE(m.executor.run(second.first.attach(*pci::look_up(m.space, {0, 1, 1}))));
        EXPECT_EQ(m.sink.disks.size(), offered ? 2u : 0u);
        const u64 accesses = m.primary.accesses + m.secondary.accesses;
        const Instant before = m.clock.time;
        const auto refused = second.attach();
        ASSERT_FALSE(refused);
        EXPECT_EQ(drivers::unused_because(refused.error().code), drivers::Unused::failed) << "a disk may be on it";
        EXPECT_EQ(m.primary.accesses + m.secondary.accesses, accesses);
        EXPECT_EQ(m.clock.time, before);
        EXPECT_EQ(m.sink.disks.size(), offered ? 2u : 0u);
        EXPECT_EQ(second.controller.disks(), 0u);
    }
}

// In native mode with overlapping addresses: each channel is checked separately.
TEST(AtaPorts, OfAControllerInNativeModeTheOverlappingChannelIsRefused) {
    struct Row {
        std::array<u32, 4> bases;
        bool primary, secondary; // usable
    };
    for (const Row& row : {
             Row{{0xd000, 0xd010, 0xd020, 0xd030}, true, true},
             Row{{0x1f0, 0x3f4, 0xd020, 0xd030}, false, true},   // overlaps the first one's primary ports in one byte
             Row{{0x1e8, 0xd010, 0xd020, 0xd030}, true, true},   // adjacent, no overlap
             Row{{0xd000, 0x374, 0xd020, 0xd030}, false, true},  // the control register only
             Row{{0xd000, 0xd010, 0xc040, 0xd030}, true, false}, // its bus-master registers
             Row{{0xd000, 0xd010, 0xd000, 0xd030}, true, false}, // the controller's other channel
             Row{{0x1f0, 0x3f4, 0x170, 0x374}, false, false},
         }) {
        SCOPED_TRACE(testing::Message() << std::hex << row.bases[0] << ' ' << row.bases[1] << ' ' << row.bases[2]);
        Machine m;
        m.add(m.primary, 0);
        Second second(m);
        second.native(0x85, row.bases);
        Channel third{m.clock, m.memory, m.interrupts};
        Channel fourth{m.clock, m.memory, m.interrupts};
        for (Channel* c : {&third, &fourth}) {
            const u32 at = c == &third ? 0 : 2;
            c->command = static_cast<u16>(row.bases[at]);
            c->control = static_cast<u16>(row.bases[at + 1] + 2);
            c->bus_master = c == &third ? 0xc060 : 0xc068;
            c->gsi = 11;
            c->level = true;
            m.all.push_back(c);
            m.add(*c, 0);
        }
        second.function().bytes[0x3c] = 11;
        ASSERT_TRUE(m.executor.run(second.first.attach(*pci::look_up(m.space, {0, 1, 1}))));
        const u64 accesses = m.primary.accesses + m.secondary.accesses;
        const Instant before = m.clock.time;
        const auto attached = second.attach();
        EXPECT_EQ(attached.has_value(), row.primary || row.secondary);
        EXPECT_EQ(m.sink.disks.contains(drivers::DiskSink::no_twin), row.primary || row.secondary);
        EXPECT_EQ(second.controller.disks(), u32{row.primary} + u32{row.secondary});
        EXPECT_EQ(m.primary.accesses + m.secondary.accesses, accesses);
        EXPECT_LE(m.clock.time - before, 1'000'000u);
        EXPECT_EQ(m.sink.left.contains("hde"), !row.primary && row.secondary);
        EXPECT_EQ(m.sink.left.contains("hdg"), row.primary && !row.secondary);
        for (const auto& [name, why] : m.sink.left) {
            EXPECT_EQ(why, drivers::Unused::failed) << name;
        }
    }
}

TEST(AtaAttach, ReportsAControllerThatCannotBeUsed) {
    Machine m;
    m.function.bytes[9] = 0x00;
    EXPECT_EQ(m.attach().error().code, Code::not_supported);
    Machine unassigned;
    unassigned.function.set32(0x20, 1);
    EXPECT_EQ(unassigned.attach().error().code, Code::not_supported);
}

TEST(AtaAttach, TheControllerOnTheHeapLives) {
    Machine m;
    m.add(m.primary, 0);
    static io::BlockDevice* kept = nullptr; // reachable, as in the kernel
    ASSERT_TRUE(m.executor.run(ata::probe(m.environment, *pci::look_up(m.space, {0, 1, 1}), Ports{&m.all})));
    kept = m.sink.disks.at(0);
    DmaSpan b = *m.memory.allocate(4096, ~0ull);
    ASSERT_TRUE(m.read(*kept, 5, b));
    EXPECT_TRUE(is_pattern(b, 5));
    Machine empty;
    empty.primary.floating = true;
    ASSERT_TRUE(
        empty.executor.run(ata::probe(empty.environment, *pci::look_up(empty.space, {0, 1, 1}), Ports{&empty.all})));
}

} // namespace
