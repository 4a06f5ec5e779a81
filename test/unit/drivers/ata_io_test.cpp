// Reading, writing, flushing: the cost, and the correctness of the data.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"

#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;

namespace {
using namespace ata_test;

struct AtaIo : testing::Test {
    Machine m;
    Drive* drive = nullptr;

    void begin(u64 sectors = 1 << 20, u32 sector_size = 512) {
        drive = &m.add(m.primary, 0, sectors, sector_size);
        ASSERT_TRUE(m.attach());
    }
    io::BlockDevice& hda() { return m.disk(0); }
    DmaSpan buffer(u32 size) { return *m.memory.allocate(size, ~u64{0}); }
    DmaSpan filled(u32 size, u8 seed) {
        DmaSpan b = buffer(size);
        for (u32 i = 0; i < size; ++i) {
            b.data[i] = static_cast<std::byte>(seed + i / 512 * 7 + i);
        }
        return b;
    }
    bool holds(u64 lba, DmaSpan b) {
        std::vector<std::byte> sector(drive->sector_size);
        for (u32 i = 0; i < b.size / drive->sector_size; ++i) {
            drive->read(lba + i, sector.data());
            if (std::memcmp(sector.data(), b.data + u64{i} * drive->sector_size, sector.size()) != 0) {
                return false;
            }
        }
        return true;
    }
};

TEST_F(AtaIo, AReadOf4KiBIsSevenAccessesAndOneInterrupt) {
    begin();
    DmaSpan b = buffer(4096);
    EXPECT_EQ(hda().counters().device_accesses, 0u);
    ASSERT_TRUE(m.read(hda(), 8, b)); // the first one writes direction and table
    EXPECT_EQ(hda().counters().device_accesses, 11u) << "and selects the disk: the probe looked for a second one";
    m.primary.tracing = true;
    const io::Counters before = hda().counters();
    const u64 seen = m.primary.accesses;
    const u32 allocations = m.memory.allocations;
    ASSERT_TRUE(m.read(hda(), 0x0abcd8, b));
    EXPECT_TRUE(is_pattern(b, 0x0abcd8));
    const io::Counters cost = hda().counters() - before;
    EXPECT_EQ(cost.device_accesses, 7u);
    EXPECT_EQ(m.primary.accesses - seen, 7u) << "every access is counted";
    EXPECT_EQ(cost.interrupts, 1u);
    EXPECT_EQ(cost.notifications, 1u);
    EXPECT_EQ(cost.completed, 1u);
    EXPECT_EQ(m.memory.allocations, allocations);
    const std::vector<std::string> expected{"out16 cmd+2", "out16 cmd+4", "out16 cmd+6", "out8 bm+0",
                                            "in8 cmd+7",   "in8 bm+2",    "out8 bm+0"};
    EXPECT_EQ(m.primary.trace, expected);
}

TEST_F(AtaIo, NoAllocationsAndTheSameCostForever) {
    begin();
    DmaSpan b = buffer(4096);
    ASSERT_TRUE(m.read(hda(), 8, b));
    struct Loop {
        static io::Task<Result<void>> run(io::BlockDevice& d, DmaSpan at, u64& frames) {
            frames = io::frame_pool().allocations();
            for (u64 i = 0; i < 1000; ++i) {
                auto r = co_await d.read(i * 977 % 100'000, at);
                if (!r || !is_pattern(at, i * 977 % 100'000)) {
                    co_return Error{Code::corrupt, "wrong data"};
                }
            }
            frames = io::frame_pool().allocations() - frames;
            co_return Result<void>{};
        }
    };
    u64 frames = 0;
    const io::Counters before = hda().counters();
    const u32 allocations = m.memory.allocations;
    ASSERT_TRUE(m.executor.run(Loop::run(hda(), b, frames)));
    EXPECT_EQ(frames, 0u);
    EXPECT_EQ(m.memory.allocations, allocations);
    const io::Counters cost = hda().counters() - before;
    EXPECT_EQ(cost.device_accesses, 7000u);
    EXPECT_EQ(cost.interrupts, 1000u);
    EXPECT_EQ(m.queue().lost_interrupts(), 0u);
}

TEST_F(AtaIo, WritesWhatItIsGivenAndFlushes) {
    begin();
    DmaSpan b = filled(4096, 3);
    ASSERT_TRUE(m.write(hda(), 1000, b));
    EXPECT_TRUE(holds(1000, b));
    EXPECT_FALSE(drive->is_flushed);
    ASSERT_TRUE(m.flush(hda()));
    EXPECT_TRUE(drive->is_flushed);
    EXPECT_EQ(m.primary.codes.back(), 0xea);
    DmaSpan c = buffer(4096);
    ASSERT_TRUE(m.read(hda(), 1000, c));
    EXPECT_EQ(std::memcmp(b.data, c.data, 4096), 0);
}

TEST_F(AtaIo, AReadAfterAWriteSetsTheDirectionOnce) {
    begin();
    DmaSpan b = buffer(4096);
    ASSERT_TRUE(m.read(hda(), 8, b));
    const io::Counters before = hda().counters();
    ASSERT_TRUE(m.write(hda(), 8, b));
    ASSERT_TRUE(m.write(hda(), 16, b));
    EXPECT_EQ((hda().counters() - before).device_accesses, 15u);
}

TEST_F(AtaIo, BackToBackTheDirectionCostsNothing) {
    begin();
    DmaSpan b = buffer(16 * 4096);
    ASSERT_TRUE(m.read(hda(), 8, b));
    const io::Counters before = hda().counters();
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 16; ++i) {
        requests.push_back(std::make_unique<io::Request>(hda(), i % 2 ? io::Op::write : io::Op::read, 100 * i,
                                                         b.subspan(4096 * i, 4096)));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
    }
    ASSERT_TRUE(m.turns_until([&] { return (hda().counters() - before).completed == 16; }));
    EXPECT_EQ((hda().counters() - before).device_accesses, 16u * 7);
    EXPECT_EQ((hda().counters() - before).errors, 0u);
}

TEST_F(AtaIo, DisksWithout48BitsFlushWithTheShortCommand) {
    drive = &m.add(m.primary, 0, 10000);
    drive->id.words[83] = 0x5000; // FLUSH CACHE, no 48 bits
    ASSERT_TRUE(m.attach());
    ASSERT_TRUE(m.flush(hda()));
    EXPECT_EQ(m.primary.codes.back(), 0xe7);
    DmaSpan b = filled(1 << 20, 9); // at most 256 sectors per command
    const u32 before = m.primary.commands;
    ASSERT_TRUE(m.write(hda(), 10000 - 2048, b));
    EXPECT_EQ(m.primary.commands - before, 8u);
    EXPECT_TRUE(holds(10000 - 2048, b));
}

TEST_F(AtaIo, ADiskWithoutACacheNeedsNoFlush) {
    drive = &m.add(m.primary, 0);
    drive->id.words[85] = 0x4000;
    ASSERT_TRUE(m.attach());
    const u64 before = m.primary.accesses;
    ASSERT_TRUE(m.flush(hda()));
    EXPECT_EQ(m.primary.accesses, before);
}

TEST_F(AtaIo, Crosses28Bits) {
    const u64 edge = 0x0fffffff; // the limit of 28-bit addressing
    begin(u64{1} << 33);
    DmaSpan b = buffer(4096);
    ASSERT_TRUE(m.read(hda(), edge - 8, b));
    EXPECT_EQ(m.primary.codes.back(), 0xc8);
    EXPECT_TRUE(is_pattern(b, edge - 8));
    ASSERT_TRUE(m.read(hda(), edge - 7, b));
    EXPECT_EQ(m.primary.codes.back(), 0x25);
    EXPECT_TRUE(is_pattern(b, edge - 7));
    const io::Counters before = hda().counters();
    ASSERT_TRUE(m.read(hda(), 0x1'2345'6780, b));
    EXPECT_TRUE(is_pattern(b, 0x1'2345'6780));
    EXPECT_EQ((hda().counters() - before).device_accesses, 9u);
    DmaSpan w = filled(4096, 77);
    ASSERT_TRUE(m.write(hda(), (u64{1} << 33) - 8, w));
    EXPECT_EQ(m.primary.codes.back(), 0x35);
    EXPECT_TRUE(holds((u64{1} << 33) - 8, w));
}

TEST_F(AtaIo, LongTransfersAreOneCommand) {
    begin();
    m.memory.next_bus = 0x20'1000; // so that it crosses 64 KiB boundaries
    DmaSpan b = buffer(128 * 1024);
    m.primary.codes.clear();
    ASSERT_TRUE(m.read(hda(), 100, b));
    EXPECT_TRUE(is_pattern(b, 100));
    EXPECT_EQ(m.primary.codes, std::vector<u8>{0xc8}) << "256 sectors fit 28-bit commands";
    DmaSpan large = filled(1 << 20, 1);
    ASSERT_TRUE(m.write(hda(), 4096, large));
    EXPECT_TRUE(holds(4096, large));
    EXPECT_EQ(m.primary.codes.back(), 0x35);
    EXPECT_EQ(m.primary.codes.size(), 2u);
    DmaSpan huge = buffer(5 << 19); // 2.5 MiB: three commands
    ASSERT_TRUE(m.read(hda(), 10'777, huge));
    EXPECT_TRUE(is_pattern(huge, 10'777));
    EXPECT_EQ(m.primary.codes.size(), 5u);
}

TEST_F(AtaIo, SectorsOf4096Bytes) {
    begin(100'000, 4096);
    EXPECT_EQ(hda().geometry().sector_size, 4096u);
    DmaSpan b = buffer(8192);
    ASSERT_TRUE(m.read(hda(), 99'998, b));
    EXPECT_TRUE(is_pattern(b, 99'998, 4096));
    EXPECT_EQ(m.read(hda(), 99'999, b).error().code, Code::bad_argument);
    EXPECT_EQ(m.read(hda(), 0, b.subspan(0, 512)).error().code, Code::bad_argument);
    DmaSpan large = filled(1 << 20, 5);
    ASSERT_TRUE(m.write(hda(), 5000, large));
    EXPECT_TRUE(holds(5000, large));
}

TEST_F(AtaIo, MemoryAbove4GiBIsBounced) {
    begin();
    const DmaSpan high = m.memory.place(0x1'0000'0000 - 4096, 192 * 1024); // starts below 4 GiB, ends above
    ASSERT_TRUE(m.read(hda(), 64, high));
    EXPECT_TRUE(is_pattern(high, 64));
    for (u32 i = 0; i < high.size; ++i) {
        high.data[i] = static_cast<std::byte>(i * 13 + i / 4096);
    }
    const u32 allocations = m.memory.allocations;
    ASSERT_TRUE(m.write(hda(), 2048, high));
    EXPECT_TRUE(holds(2048, high));
    EXPECT_EQ(m.memory.allocations, allocations) << "the bounce buffer is made once";

    Machine poor;
    poor.add(poor.primary, 0);
    ASSERT_TRUE(poor.attach());
    poor.memory.refuse = true;
    EXPECT_EQ(poor.read(poor.disk(0), 0, poor.memory.place(0x2'0000'0000, 4096)).error().code, Code::io);
    poor.memory.refuse = false;
    EXPECT_TRUE(poor.read(poor.disk(0), 0, *poor.memory.allocate(4096, ~u64{0})));
}

TEST_F(AtaIo, NeighboursInTheQueueBecomeOneCommand) {
    begin();
    DmaSpan b = buffer(32 * 4096);
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 32; ++i) {
        requests.push_back(std::make_unique<io::Request>(hda(), io::Op::read, 800 + 8 * i, b.subspan(4096 * i, 4096)));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
    }
    const u32 before = m.primary.commands;
    ASSERT_TRUE(m.turns_until([&] { return hda().counters().completed == 32; }));
    EXPECT_EQ(m.primary.commands - before, 1u);
    EXPECT_TRUE(is_pattern(b, 800));
    for (const auto& r : requests) {
        EXPECT_EQ(r->status, io::Status::ok);
    }
    // Not gathered: another operation, a gap, another direction of the head, more than fits.
    const u32 commands = m.primary.commands;
    requests.clear();
    DmaSpan large = buffer(1 << 20);
    const auto add = [&](io::Op op, u64 lba, DmaSpan at) {
        requests.push_back(std::make_unique<io::Request>(hda(), op, lba, at));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
    };
    add(io::Op::read, 100, b.subspan(0, 4096));
    add(io::Op::write, 108, b.subspan(0, 4096));
    add(io::Op::write, 124, b.subspan(0, 4096));
    add(io::Op::write, 116, b.subspan(0, 4096));
    add(io::Op::flush, 0, {});
    add(io::Op::read, 124, large);
    add(io::Op::read, 124 + 2048, b.subspan(0, 4096));
    ASSERT_TRUE(m.turns_until([&] { return hda().counters().completed == 39; }));
    EXPECT_EQ(m.primary.commands - commands, 7u);
}

TEST_F(AtaIo, AFullTableOfRegionsEndsTheCommand) {
    constexpr u32 count = 512 + 88; // the table is one page with 8 bytes for each region [BMIDE §1.2]
    begin();
    // No request's memory adjoins the next one's.
    DmaSpan b = buffer(count * 1024);
    std::vector<std::unique_ptr<io::Request>> requests;
    const auto part = [&](u32 i) { return b.subspan(1024 * (count - 1 - i), 512); };
    for (u32 i = 0; i < count; ++i) {
        requests.push_back(std::make_unique<io::Request>(hda(), io::Op::read, 800 + i, part(i)));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
    }
    const u32 before = m.primary.commands;
    ASSERT_TRUE(m.turns_until([&] { return hda().counters().completed == count; }));
    EXPECT_EQ(m.primary.commands - before, 2u);
    EXPECT_EQ(hda().counters().errors, 0u);
    for (u32 i = 0; i < count; ++i) {
        EXPECT_EQ(requests[i]->status, io::Status::ok) << i;
        EXPECT_TRUE(is_pattern(part(i), 800 + i)) << i;
    }
}

// The engine reaches the first 4 GiB: a neighbour above is a command of its own, and bounced.
TEST_F(AtaIo, ANeighbourAbove4GiBIsNotGathered) {
    begin();
    DmaSpan low = buffer(4096);
    m.memory.high_bus = u64{1} << 32;
    DmaSpan high = buffer(4096);
    ASSERT_GE(high.bus, u64{1} << 32);
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 2; ++i) {
        requests.push_back(std::make_unique<io::Request>(hda(), io::Op::read, 800 + 8 * i, i == 0 ? low : high));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
    }
    const u32 before = m.primary.commands;
    ASSERT_TRUE(m.turns_until([&] { return hda().counters().completed == 2; }));
    EXPECT_EQ(m.primary.commands - before, 2u);
    EXPECT_TRUE(is_pattern(low, 800));
    EXPECT_TRUE(is_pattern(high, 808));
}

TEST_F(AtaIo, TheTwoDisksOfAChannelTakeTurns) {
    drive = &m.add(m.primary, 0);
    Drive& slave = m.add(m.primary, 1, 5000);
    ASSERT_TRUE(m.attach());
    DmaSpan b = buffer(64 * 4096);
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 32; ++i) {
        io::BlockDevice& d = m.disk(i / 16);
        requests.push_back(
            std::make_unique<io::Request>(d, i % 2 ? io::Op::write : io::Op::read, 20 * i, b.subspan(4096 * i, 4096)));
        requests.back()->waiter = std::noop_coroutine();
        d.submit(*requests.back());
    }
    ASSERT_TRUE(m.turns_until([&] { return m.disk(0).counters().completed == 8; }));
    EXPECT_GE(m.disk(1).counters().completed, 7u);
    ASSERT_TRUE(m.turns_until([&] { return m.disk(0).counters().completed + m.disk(1).counters().completed == 32; }));
    for (u32 i = 0; i < 32; ++i) {
        EXPECT_EQ(requests[i]->status, io::Status::ok);
        EXPECT_TRUE(i % 2 == 1 || is_pattern(b.subspan(4096 * i, 4096), 20 * i));
    }
    EXPECT_TRUE(slave.written.contains(20 * 17));
    EXPECT_FALSE(drive->written.contains(20 * 17));
    EXPECT_EQ(m.disk(0).counters().interrupts + m.disk(1).counters().interrupts, 32u);
    EXPECT_GT(m.disk(1).counters().device_accesses, 0u);
}

TEST_F(AtaIo, TheTwoChannelsAreIndependent) {
    drive = &m.add(m.primary, 0);
    m.add(m.secondary, 0);
    m.primary.latency = 5'000'000;
    ASSERT_TRUE(m.attach());
    DmaSpan b = buffer(8192);
    io::Request slow(m.disk(0), io::Op::read, 1, b.subspan(0, 4096));
    io::Request fast(m.disk(2), io::Op::read, 2, b.subspan(4096, 4096));
    slow.waiter = fast.waiter = std::noop_coroutine();
    m.disk(0).submit(slow);
    m.disk(2).submit(fast);
    ASSERT_TRUE(m.turns_until([&] { return !fast.pending(); }));
    EXPECT_TRUE(slow.pending());
    ASSERT_TRUE(m.turns_until([&] { return !slow.pending(); }));
    EXPECT_TRUE(is_pattern(b.subspan(0, 4096), 1));
    EXPECT_TRUE(is_pattern(b.subspan(4096, 4096), 2));
}

TEST_F(AtaIo, NativeModeSharesALine) {
    m.set_native();
    drive = &m.add(m.primary, 0);
    m.add(m.secondary, 0);
    ASSERT_TRUE(m.attach());
    ASSERT_EQ(m.interrupts.lines.size(), 2u);
    EXPECT_EQ(m.interrupts.lines[0].line.gsi, 11u);
    EXPECT_TRUE(m.interrupts.lines[0].line.level && !m.interrupts.lines[0].line.isa);
    DmaSpan b = buffer(4096);
    ASSERT_TRUE(m.read(m.disk(0), 40, b));
    EXPECT_TRUE(is_pattern(b, 40));
    const io::Counters other = m.disk(2).counters();
    const io::Counters before = m.disk(0).counters();
    for (int i = 0; i < 10; ++i) {
        m.primary.raise_line(); // another device on the line
    }
    ASSERT_TRUE(m.read(m.disk(0), 48, b));
    const io::Counters cost = m.disk(0).counters() - before;
    EXPECT_EQ(cost.interrupts, 1u) << "those of others are not counted";
    EXPECT_EQ(cost.device_accesses, 8u + 10u) << "three in the handler, one for each of the others'";
    EXPECT_EQ((m.disk(2).counters() - other).interrupts, 0u);
    ASSERT_TRUE(m.read(m.disk(2), 56, b));
    EXPECT_TRUE(is_pattern(b, 56));
}

// On a shared line the handler reads the status; what it read before a command was issued says nothing about it.
TEST_F(AtaIo, AStatusReadBeforeACommandDoesNotEndIt) {
    m.set_native();
    drive = &m.add(m.primary, 0);
    ASSERT_TRUE(m.attach());
    DmaSpan b = buffer(4096);
    ASSERT_TRUE(m.read(hda(), 40, b));
    m.primary.raise_own(); // the status says that a command has ended
    m.executor.turn();
    std::memset(b.data, 0xee, b.size);
    m.primary.hold = true;
    io::Request r(hda(), io::Op::read, 48, b);
    r.waiter = std::noop_coroutine();
    hda().submit(r);
    ASSERT_TRUE(m.turns_until([&] { return m.primary.held().has_value(); }));
    m.primary.raise_own(); // the status says that the command is in progress
    for (int i = 0; i < 5; ++i) {
        m.executor.turn();
    }
    EXPECT_TRUE(r.pending());
    EXPECT_TRUE(m.primary.held());
    m.primary.release();
    ASSERT_TRUE(m.turns_until([&] { return !r.pending(); }));
    EXPECT_EQ(r.status, io::Status::ok);
    EXPECT_TRUE(is_pattern(b, 48));
}

} // namespace
