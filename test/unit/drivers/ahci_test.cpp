// The AHCI driver: wire formats, attaching, I/O and its accesses, errors, and HBAs that break the rules.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
// depends on the includes above
#include "unit/drivers/ata_machine.hpp"
// depends on the includes above
#include "unit/drivers/ahci_fake.hpp"
import test.gtest;
import host.std;
import core.log;
import core.dma;
import io.block_queue;
import io.slots;
#include "unit/io/support.hpp"

namespace {
using namespace ahci_test;
using Left = std::map<std::string, drivers::Unused>;
using Bytes = std::vector<u8>;

template <class T>
Bytes bytes_of(const T& value) {
    Bytes bytes(sizeof(T));
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
}

// ---- wire formats: typed from the figures of [sata §10.5.5], [ACS §7], [ahci-1.3.1 §4.2] ----

TEST(AhciProtocol, CommandFises) {
    EXPECT_EQ(
        bytes_of(ahci::queued_fis(false, 0x0000'1234'5678'9abc & 0xffff'ffff'ffff, 8, 31)),
        (Bytes{0x27, 0x80, 0x60, 0x08, 0xbc, 0x9a, 0x78, 0x40, 0x56, 0x34, 0x12, 0x00, 0xf8, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::queued_fis(true, 1, 65536, 3)),
              (Bytes{0x27, 0x80, 0x61, 0x00, 1, 0, 0, 0x40, 0, 0, 0, 0x00, 0x18, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::queued_fis(true, 1, 0x0180, 0)),
              (Bytes{0x27, 0x80, 0x61, 0x80, 1, 0, 0, 0x40, 0, 0, 0, 0x01, 0x00, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::dma_fis(false, true, 0x0000'1122'3344'5566, 0x0102)),
              (Bytes{0x27, 0x80, 0x25, 0, 0x66, 0x55, 0x44, 0x40, 0x33, 0x22, 0x11, 0, 0x02, 0x01, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::dma_fis(true, false, 0x0a11'2233, 256)),
              (Bytes{0x27, 0x80, 0xca, 0, 0x33, 0x22, 0x11, 0x4a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::plain_fis(ahci::Opcode::flush_cache_ext)),
              (Bytes{0x27, 0x80, 0xea, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::trim_fis()),
              (Bytes{0x27, 0x80, 0x06, 1, 0, 0, 0, 0x40, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::error_log_fis()),
              (Bytes{0x27, 0x80, 0x2f, 0, 0x10, 0, 0, 0x40, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}));
}

TEST(AhciProtocol, MemoryStructures) {
    EXPECT_EQ(bytes_of(ahci::Prd::of(0x0000'0012'3456'7000, 4096)),
              (Bytes{0x00, 0x70, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0xff, 0x0f, 0, 0}));
    EXPECT_EQ(bytes_of(ahci::Prd::of(0x1000, ahci::Prd::max_bytes)),
              (Bytes{0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0x3f, 0}));
    EXPECT_EQ(ahci::CommandHeader::flags_of(true, 2), 0x0002'0045u);
    EXPECT_EQ(ahci::CommandHeader::flags_of(false, 1), 0x0001'0005u);
    std::array<u64, 64> block{};
    ahci::fill_trim(block, 0x1234, 65535 + 7);
    EXPECT_EQ(bytes_of(block[0]), (Bytes{0x34, 0x12, 0, 0, 0, 0, 0xff, 0xff}));
    EXPECT_EQ(bytes_of(block[1]), (Bytes{0x33, 0x12, 0x01, 0, 0, 0, 0x07, 0x00}));
    EXPECT_EQ(block[2], 0u);
}

TEST(AhciProtocol, ErrorLog) {
    std::array<u8, 512> page{};
    page[0] = 0x1e;
    page[2] = 0x41;
    page[3] = 0x40;
    page[511] = static_cast<u8>(-(0x1e + 0x41 + 0x40));
    const auto error = ahci::decode_error_log(page);
    ASSERT_TRUE(error);
    EXPECT_EQ(error->tag, 30);
    EXPECT_TRUE(error->error.uncorrectable() && error->status.error());
    page[511] += 1;
    EXPECT_FALSE(ahci::decode_error_log(page)) << "checksum";
    page[511] -= 1;
    page[0] |= 0x80;
    page[511] -= 0x80;
    EXPECT_FALSE(ahci::decode_error_log(page)) << "a command that is not queued";
}

TEST(AhciProtocol, IdentifyData) {
    ata::IdentifyData id = ata_test::identify_words(1000);
    EXPECT_EQ(ahci::decode_sata(id).queue_depth, 0u);
    id.words[75] = 0xffff; // reserved bits
    id.words[76] = 0x0100;
    id.words[169] = 1;
    EXPECT_EQ(ahci::decode_sata(id).queue_depth, 32u);
    EXPECT_TRUE(ahci::decode_sata(id).trim);
    id.words[76] = 0xffff; // no Serial ATA disk
    EXPECT_EQ(ahci::decode_sata(id).queue_depth, 0u);
}

// ---- attaching ----

TEST(Ahci, FindsDisksAndReportsTheRest) {
    Machine m;
    m.add(0).hold = false;
    m.add(2, 100, 4096, 0);
    m.add(3).signature = 0xeb140101;
    m.add(4).signature = 0x96690101;
    m.add(5).drive->id.words[49] = 0;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.controller->disks(), 2u);
    EXPECT_EQ(m.controller->interrupt(), "msi");
    EXPECT_EQ(m.disk(0).identity().name.view(), "sda");
    EXPECT_EQ(m.disk(0).identity().driver, "ahci");
    EXPECT_EQ(m.disk(0).identity().kind, io::Kind::emulated);
    EXPECT_EQ(m.disk(0).identity().features.view(), "ncq32 msi lba48 flush discard");
    EXPECT_EQ(m.disk(2).identity().features.view(), "msi lba48 flush discard");
    EXPECT_EQ(m.disk(2).geometry().sector_size, 4096u);
    EXPECT_EQ(m.disk(2).geometry().sectors, 100u);
    // Port 1 is empty, and nothing is said of it.
    EXPECT_EQ(m.sink.left, (Left{{"port 3", drivers::Unused::not_a_disk},
                                 {"port 4", drivers::Unused::no_driver},
                                 {"port 5", drivers::Unused::no_driver}}))
        << m.sink.reasons;
    EXPECT_FALSE(m.hba.ports[3].running() || m.hba.ports[4].running() || m.hba.ports[5].running());
    EXPECT_EQ(m.hba.resets, 1u);
    EXPECT_FALSE(m.space.sized_while_decoding);
    m.controller.reset();
    EXPECT_EQ(m.hba.read(4, 4), 0x80000000u) << "GHC: no interrupts";
    EXPECT_FALSE(m.hba.ports[0].running() || m.hba.ports[2].running());
}

TEST(Ahci, WithoutDisksThePortsAreWatched) {
    Machine m;
    m.add(1).signature = 0xeb140101;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.controller->disks(), 0u);
    EXPECT_EQ(m.sink.left, (Left{{"port 1", drivers::Unused::not_a_disk}}));
    EXPECT_FALSE(m.hba.ports[1].running());
    EXPECT_EQ(m.hba.ports[1].read(m.hba, 0x14), is_prcs | is_pcs) << "PxIE: changes of the link, nothing else";
    const u64 accesses = m.hba.accesses;
    for (u32 i = 0; i < 100; ++i) {
        m.executor.turn();
    }
    EXPECT_EQ(m.hba.accesses, accesses) << "nothing is polled";
    m.controller.reset();
    EXPECT_TRUE(m.interrupts.messages.empty() && m.interrupts.lines.empty());
}

TEST(Ahci, TakesTheHbaFromTheFirmware) {
    Machine m;
    m.add(0);
    m.hba.cap2 = 1;
    m.hba.bohc = 1;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.hba.bohc & 3, 2u);
    EXPECT_EQ(m.controller->disks(), 1u);

    Machine stubborn;
    stubborn.add(0);
    stubborn.hba.cap2 = 1;
    stubborn.hba.bohc = 1 | 0x10; // and busy
    stubborn.hba.firmware_releases = false;
    test::CapturedLog log;
    const Instant begun = stubborn.clock.time;
    ASSERT_TRUE(stubborn.attach());
    EXPECT_LT(stubborn.clock.time - begun, 2'500'000'000u);
    EXPECT_TRUE(log.has("does not release the HBA"));
    EXPECT_EQ(stubborn.controller->disks(), 1u);
}

TEST(Ahci, PortsThatCannotBe) {
    const auto caps = ahci::Capabilities::from(0xc0001f00 | 1); // two ports
    EXPECT_EQ(ahci::usable_ports(0b1010'0000, caps, 0x2000)->usable, 0b1010'0000u);
    const auto more = ahci::usable_ports(0b1111, caps, 0x2000);
    EXPECT_EQ(more->usable, 0b11u);
    EXPECT_EQ(more->dropped, 0b1100u);
    const auto beyond = ahci::usable_ports(0b110, caps, 0x200); // registers of two ports
    EXPECT_EQ(beyond->usable, 0b10u);
    EXPECT_EQ(beyond->dropped, 0b100u);
    EXPECT_EQ(ahci::usable_ports(0, caps, 0x2000).error().code, Code::protocol);
    EXPECT_EQ(ahci::usable_ports(1, caps, 0x80).error().code, Code::protocol);
}

TEST(Ahci, HbasThatCannotBeUsed) {
    {
        Machine m;
        m.function.bar_mask[5] = 0;
        EXPECT_EQ(m.attach().error().code, Code::not_supported) << "no BAR 5";
    }
    {
        Machine m;
        m.function.bar_mask[5] = 0xffffff00; // 256 bytes
        EXPECT_EQ(m.attach().error().code, Code::protocol);
    }
    {
        Machine m;
        m.hba.gone = true;
        EXPECT_EQ(m.attach().error().code, Code::device_gone);
    }
    {
        Machine m;
        m.hba.pi = 0;
        EXPECT_EQ(m.attach().error().code, Code::protocol);
    }
    {
        Machine m;
        m.add(0);
        m.hba.hangs_in_reset = true;
        const Instant begun = m.clock.time;
        EXPECT_EQ(m.attach().error().code, Code::timed_out);
        EXPECT_LT(m.clock.time - begun, 1'500'000'000u);
    }
}

TEST(Ahci, WithoutAnInterruptThePortsAreStopped) {
    Machine m;
    m.add(0);
    m.add(3);
    m.interrupts.full = true;
    EXPECT_EQ(m.attach().error().code, Code::exhausted);
    EXPECT_EQ(m.controller->disks(), 0u);
    for (const u32 port : {0u, 3u}) {
        EXPECT_EQ(m.hba.ports[port].read(m.hba, 0x18) & (cmd_st | cmd_fre | cmd_fr | cmd_cr), 0u)
            << "it would store FISes in memory that is not the driver's any more";
    }
}

TEST(Ahci, ATwinThatAnotherDriverHasIsLeftAlone) {
    Machine m;
    m.add(0);
    Port& second = m.add(1);
    m.add(5);
    m.sink.twins = true;
    m.sink.offer[1] = false;
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.controller->disks(), 2u);
    EXPECT_EQ(m.sink.left, (Left{{"port 1", drivers::Unused::taken}}));
    EXPECT_TRUE(second.codes.empty());
    EXPECT_TRUE(m.sink.disks.contains(0) && m.sink.disks.contains(5));

    Machine another; // the second HBA, or no twins in this machine
    another.add(1);
    another.sink.twins = true;
    another.sink.offer[1] = false;
    another.controller.emplace(another.environment, false);
    ASSERT_TRUE(another.executor.run(another.controller->attach(*pci::look_up(another.space, {0, 31, 2}))));
    EXPECT_EQ(another.controller->disks(), 1u);
    EXPECT_TRUE(another.sink.disks.contains(drivers::no_twin));
}

TEST(Ahci, ADiskThatIsNeverReadyDoesNotStopTheOthers) {
    Machine m;
    m.add(0).busy = true;
    m.add(1).dead = true;
    m.add(2);
    const Instant begun = m.clock.time;
    ASSERT_TRUE(m.attach());
    EXPECT_LT(m.clock.time - begun, 1'500'000'000u);
    EXPECT_EQ(m.controller->disks(), 1u);
    EXPECT_EQ(m.disk(2).identity().name.view(), "sda");
    EXPECT_EQ(m.sink.left, (Left{{"port 0", drivers::Unused::failed}, {"port 1", drivers::Unused::failed}}));
}

TEST(Ahci, WithheldFeatures) {
    Machine m;
    m.add(0);
    for (const auto f :
         {drivers::Feature::ncq, drivers::Feature::messages, drivers::Feature::flush, drivers::Feature::discard}) {
        m.withhold(f);
    }
    ASSERT_TRUE(m.attach());
    EXPECT_EQ(m.disk().identity().features.view(), "line lba48 write-through");
    EXPECT_TRUE(m.hba.ports[0].cache_off);
    EXPECT_FALSE(m.disk().geometry().flush || m.disk().geometry().discard);
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.read(m.disk(), 40, buffer.span()));
    EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 40));
    EXPECT_EQ(m.hba.ports[0].codes, (Bytes{0xec, 0xef, 0x25}));
}

TEST(Ahci, AWriteCacheThatCannotBeSwitchedOffIsReported) {
    Machine m;
    m.add(0).keeps_cache = true;
    m.withhold(drivers::Feature::flush);
    test::CapturedLog log;
    ASSERT_TRUE(m.attach());
    EXPECT_TRUE(log.has("a volatile write cache, which is neither flushed"));
    EXPECT_EQ(m.disk().identity().features.view(), "ncq32 msi lba48 discard");
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.read(m.disk(), 40, buffer.span()));
}

// ---- I/O ----

io::Task<Result<void>> reads(io::BlockDevice& d, DmaSpan into, u32 count, u32 each) {
    for (u32 i = 0; i < count; ++i) {
        if (auto done = co_await d.read(u64{i} * 8 + each * 1000, into); !done) {
            co_return done;
        }
    }
    co_return Result<void>{};
}

TEST(Ahci, AccessesOfAReadAlone) {
    for (const bool line : {false, true}) {
        Machine m;
        m.add(0);
        if (line) {
            m.withhold(drivers::Feature::messages);
        }
        ASSERT_TRUE(m.attach());
        const DmaBuffer buffer = *m.memory.buffer(4096);
        ASSERT_TRUE(m.executor.run(reads(m.disk(), buffer.span(), 1, 0)));
        const io::Counters before = m.disk().counters();
        const u64 seen = m.hba.accesses;
        ASSERT_TRUE(m.executor.run(reads(m.disk(), buffer.span(), 100, 0)));
        const io::Counters used = m.disk().counters() - before;
        EXPECT_EQ(used.device_accesses, line ? 600u : 400u);
        EXPECT_EQ(m.hba.accesses - seen, used.device_accesses) << "all accesses are counted";
        EXPECT_EQ(used.interrupts, 100u);
        EXPECT_EQ(used.notifications, 100u);
    }
}

/// Starts `count` reads of 4 KiB in one turn.
struct Batch {
    Batch(Machine& machine, u32 count, u64 first = 0) : m(machine) {
        for (u32 i = 0; i < count; ++i) {
            buffers.push_back(*m.memory.buffer(4096));
            items.push_back(std::make_unique<io::Request>(m.disk(), io::Op::read, first + i * 8,
                                                          buffers.back().span().subspan(0, 4096)));
            m.disk().submit(*items.back());
        }
    }
    bool done() const {
        return std::ranges::none_of(items, [](const auto& r) { return r->pending(); });
    }
    Machine& m;
    std::vector<DmaBuffer> buffers;
    std::vector<std::unique_ptr<io::Request>> items;
};

TEST(Ahci, CommandsOfATurnAreIssuedByOnePairOfWrites) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.hold = true;
    const u32 issues = port.issues;
    const io::Counters before = m.disk().counters();
    Batch batch(m, 32);
    m.executor.turn();
    EXPECT_EQ(port.held().size(), 32u);
    EXPECT_EQ(port.issues, issues + 1);
    port.answer_all(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    const io::Counters used = m.disk().counters() - before;
    EXPECT_EQ(used.device_accesses, 4u); // PxSACT, PxCI; PxIS, IS
    EXPECT_EQ(used.interrupts, 1u);
    for (u32 i = 0; i < 32; ++i) {
        EXPECT_EQ(batch.items[i]->status, io::Status::ok);
        EXPECT_TRUE(ata_test::is_pattern(batch.items[i]->buffer, i * 8));
    }
}

// ---- what a processor that polls does with interrupts [io::Wait] ----

constexpr u32 only_errors = 0x7840'0040; // PxIE: TFES, HBFS, HBDS, IFS, PRCS, PCS
constexpr u32 all_causes = only_errors | is_sdbs | is_dhrs;

/// As Machine::turns_until, while time passes although the executor does not sleep.
template <class F>
bool polls_until(Machine& m, F&& f, Nanoseconds bound = 1'000'000'000) {
    const std::atomic<bool> awake{false};
    for (const Instant end = m.clock.time + bound; !f() && m.clock.time < end;) {
        m.executor.turn();
        m.clock.idle(m.clock.time + 1000, awake);
    }
    return f();
}

/// A read that is answered after `turns` turns.
void read_held(Machine& m, Port& port, u64 lba, u32 turns) {
    Batch batch(m, 1, lba);
    for (u32 i = 0; i < turns; ++i) {
        m.executor.turn();
    }
    ASSERT_EQ(port.held().size(), 1u);
    port.answer(m.hba, 0, Port::How::ok);
    for (u32 i = 0; i < 3; ++i) {
        m.executor.turn();
    }
    ASSERT_TRUE(batch.done());
    EXPECT_EQ(batch.items[0]->status, io::Status::ok);
}

TEST(AhciWait, APollingProcessorFindsTheFis) {
    for (const u32 depth : {32u, 0u}) { // with and without NCQ
        for (const bool line : {false, true}) {
            Machine m;
            Port& port = m.add(0, 1 << 20, 512, depth);
            if (line) {
                m.withhold(drivers::Feature::messages);
            }
            ASSERT_TRUE(m.attach());
            m.executor.set_wait(io::Wait::poll);
            port.hold = true;
            read_held(m, port, 0, 3);
            const io::Counters before = m.disk().counters();
            for (u32 i = 1; i <= 100; ++i) {
                read_held(m, port, 8 * i, 3);
            }
            const io::Counters used = m.disk().counters() - before;
            EXPECT_EQ(used.interrupts, 0u) << "after the one that showed that they are not needed";
            // PxSACT and PxCI, and one of them read; once more before there is a FIS, because the machine has slept for
            // longer than 20 ms
            EXPECT_LE(used.device_accesses, depth != 0 ? 402u : 302u);
            EXPECT_EQ(port.read(m.hba, 0x14), only_errors);
            // An error interrupts all the same.
            port.bad.insert(4000);
            Batch bad(m, 1, 4000);
            m.executor.turn();
            port.answer(m.hba, 0, Port::How::ok);
            port.hold = false;
            ASSERT_TRUE(polls_until(m, [&] { return bad.done(); }));
            EXPECT_EQ(bad.items[0]->status, io::Status::io_error);
            port.hold = true;
            read_held(m, port, 0, 3);
            // As before, for a processor that does not poll any more.
            m.executor.set_wait(io::Wait::interrupt);
            const io::Counters asleep = m.disk().counters();
            for (u32 i = 1; i <= 10; ++i) {
                read_held(m, port, 8 * i, 3);
                EXPECT_EQ(port.read(m.hba, 0x14), all_causes);
            }
            EXPECT_EQ((m.disk().counters() - asleep).interrupts, 10u);
        }
    }
}

// Each FIS overwrites the last one: the register shows what they have ended.
TEST(AhciWait, OverwrittenFisesLoseNothing) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    m.executor.set_wait(io::Wait::poll);
    port.hold = true;
    read_held(m, port, 0, 3);
    const io::Counters before = m.disk().counters();
    Batch batch(m, 8);
    m.executor.turn();
    for (int i = 0; i < 5; ++i) {
        port.answer(m.hba, 0, Port::How::ok);
    }
    m.executor.turn();
    EXPECT_EQ(std::ranges::count_if(batch.items, [](const auto& r) { return r->pending(); }), 3);
    // And a FIS that is not understood delays the answer, no more.
    port.nonsense = true;
    while (!port.held().empty()) {
        port.answer(m.hba, 0, Port::How::ok);
    }
    ASSERT_TRUE(polls_until(m, [&] { return batch.done(); }, 30'000'000));
    EXPECT_EQ((m.disk().counters() - before).interrupts, 0u);
    for (const auto& item : batch.items) {
        EXPECT_EQ(item->status, io::Status::ok);
    }
}

TEST(AhciWait, AnAdaptiveProcessorIsInterruptedAfterItsWindow) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    m.executor.set_wait(io::Wait::adaptive);
    port.hold = true;
    read_held(m, port, 0, 2);
    const io::Counters before = m.disk().counters();
    for (u32 i = 0; i < 100; ++i) {
        read_held(m, port, 8 * i, 2); // well within the window
    }
    EXPECT_LE((m.disk().counters() - before).interrupts, 1u);
    const io::Counters fast = m.disk().counters();
    for (u32 i = 0; i < 10; ++i) {
        Batch batch(m, 1, 8 * i);
        const u64 idles = m.executor.idles();
        ASSERT_TRUE(polls_until(m, [&] { return m.executor.idles() != idles; }));
        EXPECT_EQ(port.read(m.hba, 0x14), all_causes) << "asleep";
        m.clock.at(m.clock.time + 100'000, [&] { port.answer(m.hba, 0, Port::How::ok); });
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    }
    EXPECT_EQ((m.disk().counters() - fast).interrupts, 10u);
}

// Tags of commands that are not issued mean nothing, and cost nothing [sata].
TEST(Ahci, FurtherTagsInTheReceivedFisMeanNothing) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.hold = true;
    port.extra_tags = 0xffff'0000;
    const io::Counters before = m.disk().counters();
    Batch batch(m, 3);
    m.executor.turn();
    port.answer_all(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    const io::Counters used = m.disk().counters() - before;
    EXPECT_EQ(used.device_accesses, 4u) << "PxSACT is not read";
}

TEST(Ahci, TheQueueDepthIsTheLesserOfDiskAndHba) {
    for (const auto& [disk, slots] : {std::pair{32u, 8u}, {4u, 32u}, {1u, 32u}}) {
        Machine m;
        Port& port = m.add(0, 1 << 20, 512, disk);
        m.hba.cap = (m.hba.cap & ~0x1f00u) | (slots - 1) << 8;
        ASSERT_TRUE(m.attach());
        port.hold = true;
        Batch batch(m, 40);
        m.executor.turn();
        EXPECT_EQ(port.held().size(), std::min(disk, slots));
        port.hold = false;
        for (usize n = port.held().size(); n != 0; --n) {
            port.answer(m.hba, 0, Port::How::ok);
        }
        EXPECT_TRUE(m.turns_until([&] { return batch.done(); }));
    }
}

TEST(Ahci, AFlushIsNotMixedWithQueuedCommands) {
    Machine m; // the fake fails the test otherwise
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.hold = true;
    Batch before(m, 3);
    io::Request flush(m.disk(), io::Op::flush, 0, {});
    m.disk().submit(flush);
    Batch after(m, 3, 800);
    m.executor.turn();
    EXPECT_EQ(port.held().size(), 3u);
    port.answer_all(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return port.held().size() == 1; }));
    EXPECT_EQ(port.held()[0].op(), io::Op::flush);
    EXPECT_TRUE(before.done());
    port.answer(m.hba, 0, Port::How::ok);
    ASSERT_TRUE(m.turns_until([&] { return port.held().size() == 3; }));
    EXPECT_EQ(flush.status, io::Status::ok);
    port.answer_all(m.hba);
    EXPECT_TRUE(m.turns_until([&] { return after.done(); }));
}

TEST(Ahci, DiscardsAreTrims) {
    Machine m;
    Port& port = m.add(0, 1 << 24);
    ASSERT_TRUE(m.attach());
    const u32 sectors = 65535 + 100;
    const DmaBuffer unused = *m.memory.buffer(sectors * 512);
    io::Request discard(m.disk(), io::Op::discard, 4096, unused.span().subspan(0, sectors * 512));
    m.disk().submit(discard);
    ASSERT_TRUE(m.turns_until([&] { return !discard.pending(); }));
    EXPECT_EQ(discard.status, io::Status::ok);
    EXPECT_EQ(port.trimmed, (std::vector<std::pair<u64, u64>>{{4096, 65535}, {4096 + 65535, 100}}));
}

TEST(Ahci, SectorsOf4096Bytes) {
    Machine m;
    m.add(0, 1 << 16, 4096);
    ASSERT_TRUE(m.attach());
    const DmaBuffer buffer = *m.memory.buffer(65536);
    ASSERT_TRUE(m.read(m.disk(), 77, buffer.span()));
    EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 77, 4096));
    EXPECT_TRUE(m.write(m.disk(), 5, buffer.span()));
    EXPECT_EQ(m.hba.ports[0].drive->written.size(), 16u);
}

TEST(Ahci, ADiskWithout48BitAddresses) {
    Machine m;
    Port& port = m.add(0, 1 << 20, 512, 32);
    port.drive->id.words[83] = 0x5000;
    ASSERT_TRUE(m.attach());
    const DmaBuffer buffer = *m.memory.buffer(512 * 512);
    ASSERT_TRUE(m.read(m.disk(), 0xabcde, buffer.span()));
    EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 0xabcde));
    EXPECT_EQ(port.codes, (Bytes{0xec, 0xc8, 0xc8})) << "256 sectors each";
    ASSERT_TRUE(m.write(m.disk(), 0, buffer.span()));
    ASSERT_TRUE(m.flush(m.disk()));
    EXPECT_EQ(port.codes.back(), 0xe7);
}

TEST(Ahci, MemoryThatTheHbaCannotReachIsBounced) {
    Machine m;
    m.add(0);
    m.hba.cap &= 0x7fffffff;
    m.memory.high_bus = u64{1} << 32;
    ASSERT_TRUE(m.attach()); // the fake checks every address
    EXPECT_TRUE(m.disk().identity().features.view().ends_with(" dma32"));
    const DmaBuffer buffer = *m.memory.buffer(256 * 1024);
    ASSERT_GE(buffer.bus(), u64{1} << 32);
    ASSERT_TRUE(m.read(m.disk(), 64, buffer.span()));
    EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 64));
    ASSERT_TRUE(m.write(m.disk(), 0, buffer.span()));
    EXPECT_EQ(std::memcmp(m.hba.ports[0].drive->written.at(9).data(), buffer.data() + 9 * 512, 512), 0);
}

// ---- errors ----

TEST(Ahci, AnErrorOfAQueuedCommandIsItsOwn) {
    for (const bool log : {true, false}) {
        Machine m;
        Port& port = m.add(0);
        ASSERT_TRUE(m.attach());
        port.no_log = !log;
        port.bad = {8 * 5 + 3};
        Batch batch(m, 12);
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        for (u32 i = 0; i < 12; ++i) {
            EXPECT_EQ(batch.items[i]->status, i == 5 ? io::Status::io_error : io::Status::ok) << i << log;
        }
        EXPECT_EQ(std::ranges::count(port.codes, 0x2f), 1);
        // Without the log the commands are repeated one by one.
        EXPECT_EQ(std::ranges::count(port.codes, 0x25) != 0, !log);
        EXPECT_EQ(port.resets, log ? 0u : 1u) << "the disk refuses all else until it is reset";
    }
}

// Before it sends the log the device ends all tags by a FIS [sata], also those that will be used again.
TEST(Ahci, TheFisBeforeTheErrorLogEndsNothing) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.hold = true;
    Batch batch(m, 3);
    m.executor.turn();
    port.answer(m.hba, 1, Port::How::unreadable);
    ASSERT_TRUE(m.turns_until([&] { return port.held().size() == 2 && port.held()[0].queued; }));
    m.hba.spurious();
    m.executor.turn();
    m.executor.turn();
    EXPECT_TRUE(batch.items[0]->pending() && !batch.items[1]->pending() && batch.items[2]->pending());
    port.answer_all(m.hba);
    EXPECT_TRUE(m.turns_until([&] { return batch.done(); }));
    EXPECT_EQ(batch.items[1]->status, io::Status::io_error);
    EXPECT_TRUE(ata_test::is_pattern(batch.items[2]->buffer, 16));
}

TEST(Ahci, AnAnswerIsTakenOnce) {
    for (const u32 depth : {32u, 0u}) {
        Machine m;
        Port& port = m.add(0, 1 << 20, 512, depth);
        ASSERT_TRUE(m.attach());
        port.hold = true;
        for (u32 i = 0; i < 3; ++i) { // in the same slot
            Batch batch(m, 1, i * 8);
            m.executor.turn();
            m.hba.spurious();
            m.executor.turn();
            m.executor.turn();
            EXPECT_TRUE(batch.items[0]->pending()) << "ended by the answer to the last one";
            port.answer(m.hba, 0, Port::How::ok);
            ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
            EXPECT_TRUE(ata_test::is_pattern(batch.items[0]->buffer, i * 8));
        }
    }
}

TEST(Ahci, ABadErrorLogIsNotBelieved) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.bad_log = true;
    port.bad = {8};
    Batch batch(m, 4);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    for (u32 i = 0; i < 4; ++i) {
        EXPECT_EQ(batch.items[i]->status, i == 1 ? io::Status::io_error : io::Status::ok);
    }
}

TEST(Ahci, AReadThatEndsEarlyIsRepeated) {
    Machine m;
    Port& port = m.add(0, 1 << 20, 512, 0);
    ASSERT_TRUE(m.attach());
    port.short_reads = 1;
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.read(m.disk(), 8, buffer.span()));
    EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 8));
    EXPECT_EQ(port.codes, (Bytes{0xec, 0x25, 0x25}));
    port.short_reads = 2;
    EXPECT_FALSE(m.read(m.disk(), 8, buffer.span()));
}

TEST(Ahci, AnInterfaceErrorResetsThePort) {
    for (const bool line : {false, true}) {
        Machine m;
        Port& port = m.add(0);
        if (line) {
            m.withhold(drivers::Feature::messages);
        }
        ASSERT_TRUE(m.attach());
        port.hold = true;
        Batch batch(m, 5);
        m.executor.turn();
        for (u32 i = 1; i <= 3; ++i) { // more often than a request is resent for an error of its own
            port.event(m.hba, is_ifs);
            ASSERT_TRUE(m.turns_until([&] { return port.held().size() == 5 && port.resets == i; }));
        }
        port.answer_all(m.hba);
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        for (const auto& item : batch.items) {
            EXPECT_EQ(item->status, io::Status::ok);
        }
    }
}

TEST(Ahci, LostInterruptsAreFound) {
    for (const bool line : {false, true}) {
        for (const u32 depth : {32u, 0u}) {
            Machine m;
            Port& port = m.add(0, 1 << 20, 512, depth);
            if (line) {
                m.withhold(drivers::Feature::messages);
            }
            ASSERT_TRUE(m.attach());
            const auto lines = std::exchange(m.interrupts.lines, {});
            const auto messages = std::exchange(m.interrupts.messages, {});
            test::CapturedLog log;
            Batch batch(m, 3);
            ASSERT_TRUE(m.turns_until([&] { return batch.done(); }, 300'000'000));
            EXPECT_TRUE(log.has("ended without an interrupt"));
            EXPECT_EQ(port.resets, 0u);
            EXPECT_FALSE(port.pending()) << "the interrupt is not cleared";
            m.interrupts.lines = lines;
            m.interrupts.messages = messages;
        }
    }
}

// ---- HBAs and disks that break the rules, or go away ----

TEST(Ahci, CommandsNeverIssuedCloseTheDisk) {
    for (const u32 depth : {32u, 0u}) {
        Machine m;
        Port& port = m.add(0, 1 << 20, 512, depth);
        ASSERT_TRUE(m.attach());
        test::CapturedLog log;
        port.hold = true;
        Batch batch(m, 2);
        m.executor.turn();
        port.stray = 1u << 20;
        m.hba.spurious();
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_EQ(batch.items[0]->status, io::Status::protocol_error);
        EXPECT_TRUE(log.has("never issued"));
        EXPECT_FALSE(port.running());
    }
}

TEST(Ahci, NonsenseInTheReceivedFisEndsNothing) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    port.nonsense = true; // no tag, reserved bits, an error code without ERR
    Batch batch(m, 20);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    EXPECT_TRUE(std::ranges::all_of(batch.items, [](const auto& r) { return r->status == io::Status::ok; }));

    port.nonsense = false;
    port.hold = true;
    Batch held(m, 3);
    m.executor.turn();
    std::byte* const area = port.fis_area(m.memory);
    for (const u8 type : {0xa1, 0x34, 0xff, 0x00}) { // tags that were never issued; an unknown type
        const std::array<u8, 8> fis{type, 0x40, 0x40, 0, 0x00, 0x00, 0x00, 0xff};
        std::memcpy(area + 0x58, fis.data(), 8);
        std::memcpy(area + 0x40, fis.data(), 8);
        m.hba.spurious();
        m.executor.turn();
        m.executor.turn();
        EXPECT_TRUE(std::ranges::all_of(held.items, [](const auto& r) { return r->pending(); }));
    }
    port.answer_all(m.hba);
    EXPECT_TRUE(m.turns_until([&] { return held.done(); }));
}

TEST(Ahci, ARemovedHbaIsFoundWithinATick) {
    for (const u32 count : {1u, 32u}) {
        for (const bool interrupts : {false, true}) {
            Machine m;
            Port& port = m.add(0);
            ASSERT_TRUE(m.attach());
            test::CapturedLog log;
            port.hold = true;
            Batch batch(m, count);
            m.executor.turn();
            m.hba.gone = true;
            if (interrupts) {
                m.hba.spurious();
            }
            ASSERT_TRUE(m.turns_until([&] { return batch.done(); }, 90'000'000)) << "less than the time-out";
            EXPECT_EQ(batch.items[0]->status, io::Status::device_gone);
            EXPECT_TRUE(m.disk().removed());
            EXPECT_TRUE(log.has("removed"));
        }
    }
}

// ---- disks that come, go, or are replaced ----

/// By a message with one port in use and with two, and by a line.
struct Wiring {
    bool line;
    bool second;
};
constexpr std::array<Wiring, 4> wirings{{{false, false}, {false, true}, {true, false}, {true, true}}};
void wire(Machine& m, Wiring w) {
    if (w.second) {
        m.add(4);
    }
    if (w.line) {
        m.withhold(drivers::Feature::messages);
    }
}
bool all_have(const Batch& batch, io::Status status) {
    return std::ranges::all_of(batch.items, [&](const auto& r) { return r->status == status; });
}

TEST(Ahci, AnUnpluggedDiskIsClosed) {
    for (const Wiring w : wirings) {
        Machine m;
        Port& port = m.add(0);
        wire(m, w);
        ASSERT_TRUE(m.attach());
        test::CapturedLog log;
        ahci::Disk& disk = m.disk();
        port.hold = true;
        Batch batch(m, 4);
        m.executor.turn();
        port.unplug(m.hba);
        const Instant begun = m.clock.time;
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_LT(m.clock.time - begun, 1'200'000'000u);
        EXPECT_TRUE(all_have(batch, io::Status::device_gone));
        EXPECT_TRUE(log.has("unplugged"));
        EXPECT_TRUE(disk.removed());
        const DmaBuffer buffer = *m.memory.buffer(4096);
        EXPECT_EQ(m.read(disk, 0, buffer.span()).error().code, Code::device_gone);
        ASSERT_TRUE(m.turns_until([&] { return m.controller->disk(0) == nullptr; }));
        if (w.second) {
            EXPECT_TRUE(m.read(m.disk(4), 0, buffer.span())) << "the other disk goes on";
        }
    }
}

TEST(Ahci, ALinkThatComesBackGoesOnWithTheSameDisk) {
    for (const Wiring w : wirings) {
        Machine m;
        Port& port = m.add(0);
        wire(m, w);
        ASSERT_TRUE(m.attach());
        port.hold = true;
        Batch batch(m, 6);
        m.executor.turn();
        port.unplug(m.hba);
        port.plug(m.hba);
        port.link_from = m.clock.time + 700'000'000;
        port.codes.clear();
        ASSERT_TRUE(m.turns_until([&] { return port.held().size() == 6; }));
        EXPECT_EQ(port.codes, (Bytes{0xec, 0x60, 0x60, 0x60, 0x60, 0x60, 0x60})) << "first IDENTIFY DEVICE";
        port.answer_all(m.hba);
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_TRUE(all_have(batch, io::Status::ok));
        EXPECT_FALSE(m.disk().removed());
    }
}

TEST(Ahci, AReplacedDiskGetsNoCommandOfTheOldOne) {
    for (const Wiring w : wirings) {
        for (const bool size : {false, true}) {
            Machine m;
            Port& port = m.add(0);
            wire(m, w);
            ASSERT_TRUE(m.attach());
            test::CapturedLog log;
            ahci::Disk& old = m.disk();
            port.hold = true;
            const DmaBuffer buffer = *m.memory.buffer(4096);
            Batch batch(m, 3);
            io::Request before(old, io::Op::write, 800, buffer.span());
            old.submit(before);
            m.executor.turn();
            port.hold = false;
            m.replace(0, size ? 0 : 77);
            if (size) {
                port.drive->id.words[101] = 1;
            }
            io::Request after(old, io::Op::write, 808, buffer.span()); // the interrupt has not been looked at
            old.submit(after);
            ASSERT_TRUE(m.turns_until([&] { return batch.done() && !before.pending() && !after.pending(); }));
            EXPECT_TRUE(all_have(batch, io::Status::device_gone));
            EXPECT_EQ(before.status, io::Status::device_gone);
            EXPECT_EQ(after.status, io::Status::device_gone);
            EXPECT_TRUE(old.removed());
            EXPECT_TRUE(port.drive->written.empty()) << "a write for another disk";
            EXPECT_EQ(port.codes, (Bytes{0xec}));
            EXPECT_TRUE(log.has("port 0: expected FAKE DISK 9000 with serial number 00000000000000000000 and 1048576 "
                                "sectors"));
            EXPECT_TRUE(log.has(size ? "and 65536 sectors" : "seen FAKE DISK 9000 with serial number 0000"));
            // It is attached as another disk.
            ASSERT_TRUE(
                m.turns_until([&] { return m.controller->disk(0) != nullptr && m.controller->disk(0) != &old; }));
            ASSERT_TRUE(m.turns_until([&] { return m.disk().queue().is_open(); }));
            EXPECT_NE(m.disk().identity().name.view(), old.identity().name.view());
            EXPECT_TRUE(m.write(m.disk(), 16, buffer.span()));
            EXPECT_EQ(port.drive->written.size(), 8u);
            EXPECT_EQ(m.read(old, 0, buffer.span()).error().code, Code::device_gone);
        }
    }
}

TEST(Ahci, AnotherDiskThatComesBetweenIdentifyAndTheFirstRequestIsSeen) {
    Machine m;
    Port& port = m.add(0);
    m.interrupts.on_attach = [&] { m.replace(0, 5); }; // after IDENTIFY DEVICE, before the disk is announced
    ASSERT_TRUE(m.attach());
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_FALSE(m.write(m.disk(), 0, buffer.span()));
    EXPECT_TRUE(port.drive->written.empty());
}

TEST(Ahci, WithoutASerialNumberADiskIsNotTheSameAfterAChangeOfTheLink) {
    Machine m;
    Port& port = m.add(0);
    std::fill_n(port.drive->id.words.begin() + 10, 10, u16{0x2020});
    ASSERT_TRUE(m.attach());
    port.hold = true;
    Batch batch(m, 2);
    m.executor.turn();
    port.event(m.hba, is_ifs); // the driver's own reset: it goes on
    ASSERT_TRUE(m.turns_until([&] { return port.resets == 1 && port.held().size() == 2; }));
    port.unplug(m.hba);
    port.plug(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    EXPECT_TRUE(all_have(batch, io::Status::device_gone));
}

TEST(Ahci, TheLinkMayChangeAgainDuringTheRecovery) {
    for (const Wiring w : wirings) {
        Machine m;
        Port& port = m.add(0);
        wire(m, w);
        ASSERT_TRUE(m.attach());
        m.hba.latency = 25'000'000;
        port.hold = true;
        Batch batch(m, 2);
        m.executor.turn();
        port.event(m.hba, is_ifs);
        ASSERT_TRUE(m.turns_until([&] { return !port.held().empty() && port.held()[0].code == 0xec; }));
        m.replace(0, 9); // while IDENTIFY DEVICE is under way
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_TRUE(all_have(batch, io::Status::device_gone));
        EXPECT_EQ(std::ranges::count(port.codes, 0x60), 0);
    }
}

TEST(Ahci, ADiskThatDoesNotIdentifyItselfAfterAResetIsClosed) {
    for (const bool refuses : {false, true}) {
        Machine m;
        Port& port = m.add(0);
        ASSERT_TRUE(m.attach());
        port.hold = true;
        Batch batch(m, 2);
        m.executor.turn();
        port.codes.clear();
        port.fail_codes_left = refuses ? 100 : 0;
        port.dead = !refuses;
        const Instant begun = m.clock.time;
        port.event(m.hba, is_ifs);
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_LT(m.clock.time - begun, 1'000'000'000u);
        EXPECT_TRUE(all_have(batch, io::Status::device_gone));
        EXPECT_EQ(port.codes, Bytes(4, 0xec));
    }
}

TEST(Ahci, TheWriteCacheIsSwitchedOffAgainAfterAReset) {
    Machine m;
    Port& port = m.add(0);
    m.withhold(drivers::Feature::flush);
    ASSERT_TRUE(m.attach());
    port.hold = true;
    Batch batch(m, 2);
    m.executor.turn();
    port.codes.clear();
    port.event(m.hba, is_ifs);
    ASSERT_TRUE(m.turns_until([&] { return port.resets == 1 && port.held().size() == 2; }));
    EXPECT_EQ(port.codes, (Bytes{0xec, 0xef, 0x60, 0x60}));
    EXPECT_TRUE(port.cache_off);
    port.answer_all(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
    EXPECT_TRUE(all_have(batch, io::Status::ok));
}

TEST(Ahci, APluggedDiskIsAttached) {
    for (const bool line : {false, true}) {
        for (const bool others : {false, true}) {
            Machine m;
            if (others) {
                m.add(0);
            }
            Port& late = m.add(3);
            late.link = false;
            if (line) {
                m.withhold(drivers::Feature::messages);
            }
            ASSERT_TRUE(m.attach());
            EXPECT_EQ(m.controller->disks(), others ? 1u : 0u);
            late.plug(m.hba);
            ASSERT_TRUE(m.turns_until([&] { return m.controller->disks() == (others ? 2u : 1u); }, 2'000'000'000));
            const DmaBuffer buffer = *m.memory.buffer(4096);
            const u32 reads = line || others ? 6 : 4;
            for (const u32 port : {3u, 0u}) {
                if (port == 0 && !others) {
                    continue;
                }
                ASSERT_TRUE(m.read(m.disk(port), 8, buffer.span()));
                EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 8));
                const u64 before = m.hba.accesses;
                ASSERT_TRUE(m.read(m.disk(port), 16, buffer.span()));
                EXPECT_EQ(m.hba.accesses - before, reads) << "the interrupt has the mode for its ports";
            }
            // It goes, and another one comes: also beside requests of the first disk.
            ahci::Disk& old = m.disk(3);
            late.unplug(m.hba);
            ASSERT_TRUE(m.turns_until([&] { return m.controller->disk(3) == nullptr; }));
            EXPECT_TRUE(old.removed());
            Machine::set_serial_number(*late.drive, 8);
            late.plug(m.hba);
            ASSERT_TRUE(m.turns_until([&] { return m.controller->disks() == (others ? 3u : 2u); }, 2'000'000'000));
            EXPECT_TRUE(m.read(m.disk(3), 24, buffer.span()));
            EXPECT_TRUE(ata_test::is_pattern(buffer.span(), 24));
        }
    }
}

TEST(Ahci, ADiskInThePlaceOfACdDriveIsAttached) {
    Machine m;
    m.add(0);
    Port& port = m.add(1);
    port.signature = 0xeb140101;
    ASSERT_TRUE(m.attach());
    port.unplug(m.hba);
    for (u32 i = 0; i < 10; ++i) {
        m.executor.turn();
    }
    port.signature = 0x101;
    port.plug(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return m.controller->disks() == 2; }, 3'000'000'000));
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.read(m.disk(1), 8, buffer.span()));
}

TEST(Ahci, APlugWhileRequestsAreUnderWayLosesNoInterrupt) {
    Machine m;
    Port& port = m.add(0);
    Port& late = m.add(3);
    late.link = false;
    ASSERT_TRUE(m.attach());
    test::CapturedLog log;
    late.plug(m.hba);
    for (u32 i = 0; m.controller->disks() != 2; ++i) {
        ASSERT_LT(i, 10'000u);
        Batch batch(m, 3, i * 8 % 4096);
        ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
        EXPECT_TRUE(all_have(batch, io::Status::ok));
    }
    EXPECT_FALSE(log.has("ended without an interrupt"));
    EXPECT_EQ(port.resets, 0u);
}

TEST(Ahci, ADiskThatHasFailedIsTriedAgainOnlyAfterItWasUnplugged) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    ahci::Disk& old = m.disk();
    port.dead = true;
    Batch batch(m, 2);
    ASSERT_TRUE(m.turns_until([&] { return batch.done() && !old.queue().is_open(); }));
    for (u32 i = 0; i < 1000; ++i) {
        m.executor.turn();
    }
    EXPECT_EQ(m.controller->disk(0), &old);
    EXPECT_FALSE(old.removed());
    port.dead = false;
    port.unplug(m.hba);
    port.plug(m.hba);
    ASSERT_TRUE(m.turns_until([&] { return m.controller->disks() == 2; }, 3'000'000'000));
    EXPECT_TRUE(old.removed());
    const DmaBuffer buffer = *m.memory.buffer(4096);
    EXPECT_TRUE(m.read(m.disk(), 8, buffer.span()));
}

// ---- silence ----

// Whether the HBA stops at once or later: the command that timed out ends so, and the others are resent.
TEST(Ahci, TheCommandThatTimedOutEndsAsTimedOut) {
    for (const u32 depth : {32u, 0u}) {
        for (const Nanoseconds stops_after : {0u, 30'000'000u}) {
            Machine m;
            Port& port = m.add(0, 1 << 20, 512, depth);
            ASSERT_TRUE(m.attach());
            port.hold = true;
            port.stops_after = stops_after;
            Batch batch(m, 3);
            m.executor.turn();
            ASSERT_TRUE(m.turns_until([&] { return port.resets == 1; }));
            port.hold = false;
            ASSERT_TRUE(m.turns_until([&] { return batch.done(); }));
            EXPECT_EQ(batch.items[0]->status, io::Status::timed_out) << depth << ' ' << stops_after;
            EXPECT_EQ(batch.items[1]->status, io::Status::ok);
            EXPECT_EQ(batch.items[2]->status, io::Status::ok);
            EXPECT_TRUE(ata_test::is_pattern(batch.items[2]->buffer, 16));
        }
    }
}

TEST(Ahci, AnHbaThatDoesNotStopClosesTheDisk) {
    Machine m;
    Port& port = m.add(0);
    ASSERT_TRUE(m.attach());
    test::CapturedLog log;
    port.hold = port.runs_on = true;
    Batch batch(m, 2);
    ASSERT_TRUE(m.turns_until([&] { return batch.done(); }, 2'000'000'000));
    EXPECT_TRUE(log.has("PxCMD.CR"));
    EXPECT_EQ(batch.items[0]->status, io::Status::timed_out);
    EXPECT_EQ(batch.items[1]->status, io::Status::device_gone);
    EXPECT_TRUE(batch.items[0]->buffer_lost) << "the HBA may still write to it";
    EXPECT_TRUE(is_quarantined(batch.items[0]->buffer));
    batch.buffers.clear();
    m.controller.reset();
    clear_quarantine();
}

} // namespace
