// Error handling: errors, silence, lost and spurious interrupts, cancelled and abandoned requests.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"

#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;
import core.log;

namespace {
using namespace ata_test;

struct LogText final : log::Sink {
    std::string text;
    LogText() { log::attach(*this); }
    ~LogText() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(std::string_view what) const { return text.find(what) != std::string::npos; }
};

struct AtaErrors : testing::Test {
    Machine m;
    LogText log;
    Drive* drive = nullptr;
    std::vector<std::unique_ptr<io::Request>> requests;

    void SetUp() override {
        drive = &m.add(m.primary, 0);
        ASSERT_TRUE(m.attach());
    }
    io::BlockDevice& hda() { return m.disk(0); }
    DmaSpan buffer(u32 size = 4096) { return *m.memory.allocate(size, ~u64{0}); }
    io::Request& submit(u64 lba, DmaSpan at, io::Op op = io::Op::read) {
        requests.push_back(std::make_unique<io::Request>(hda(), op, lba, at));
        requests.back()->waiter = std::noop_coroutine();
        hda().submit(*requests.back());
        return *requests.back();
    }
    bool all_ended() {
        return m.turns_until(
            [&] { return std::ranges::none_of(requests, [](const auto& r) { return r->pending(); }); });
    }
};

TEST_F(AtaErrors, AnUnreadableSectorIsReportedAndHurtsOnlyItself) {
    m.primary.bad = {1011};
    DmaSpan b = buffer(8 * 4096);
    for (u32 i = 0; i < 8; ++i) {
        submit(1000 + 8 * i, b.subspan(4096 * i, 4096));
    }
    ASSERT_TRUE(all_ended());
    for (u32 i = 0; i < 8; ++i) {
        EXPECT_EQ(requests[i]->status, i == 1 ? io::Status::io_error : io::Status::ok) << i;
        EXPECT_TRUE(i == 1 || is_pattern(b.subspan(4096 * i, 4096), 1000 + 8 * i));
    }
    EXPECT_TRUE(log.has("hda: read of 4096 bytes at LBA 1008 failed: status 0x51, error 0x40 UNC (unreadable medium)"));
    EXPECT_EQ(m.primary.resets, 0u);
    EXPECT_EQ(hda().counters().errors, 1u);
}

TEST_F(AtaErrors, BusErrorsAreTriedOnceMoreAfterAReset) {
    DmaSpan b = buffer();
    m.primary.bus_error = 1;
    EXPECT_TRUE(m.read(hda(), 5, b));
    EXPECT_TRUE(is_pattern(b, 5));
    EXPECT_EQ(m.primary.resets, 1u);
    m.primary.bus_error = 2;
    EXPECT_EQ(m.read(hda(), 6, b).error().code, Code::io);
    EXPECT_TRUE(m.read(hda(), 7, b));
    m.primary.crc_error = 1;
    EXPECT_TRUE(m.read(hda(), 8, b));
    m.primary.short_transfer = 1;
    EXPECT_TRUE(m.read(hda(), 9, b));
    EXPECT_TRUE(is_pattern(b, 9));
    EXPECT_TRUE(log.has("bus-master error"));
    EXPECT_TRUE(log.has("ICRC"));
    EXPECT_TRUE(log.has("ended before all data was transferred"));
}

TEST_F(AtaErrors, ARefusedCommandIsNotRepeated) {
    m.primary.abort = 1;
    const u32 before = m.primary.commands;
    EXPECT_EQ(m.read(hda(), 5, buffer()).error().code, Code::io);
    EXPECT_EQ(m.primary.commands - before, 1u);
    m.primary.abort = 1;
    EXPECT_EQ(m.flush(hda()).error().code, Code::io);
    EXPECT_TRUE(m.flush(hda()));
    EXPECT_TRUE(log.has("ABRT (command refused)"));
}

TEST_F(AtaErrors, SilenceEndsInATimeOutAndTheOthersAreNotLost) {
    m.primary.hang = 1;
    DmaSpan b = buffer(3 * 4096);
    io::Request& first = submit(100, b.subspan(0, 4096));
    m.executor.turn();
    const Instant begin = m.clock.time;
    while (m.clock.time < begin + 60'000'000) {
        m.executor.turn();
    }
    io::Request& second = submit(200, b.subspan(4096, 4096));
    io::Request& third = submit(300, b.subspan(8192, 4096));
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(first.status, io::Status::timed_out);
    EXPECT_FALSE(first.buffer_lost);
    EXPECT_EQ(second.status, io::Status::ok);
    EXPECT_EQ(third.status, io::Status::ok);
    EXPECT_TRUE(is_pattern(b.subspan(4096, 4096), 200));
    EXPECT_EQ(m.primary.resets, 1u);
    EXPECT_LE(m.clock.time, begin + 200'000'000);
    EXPECT_TRUE(log.has("no answer to a command"));
}

TEST_F(AtaErrors, ADiskThatStaysSilentIsClosed) {
    m.primary.hang = 1000;
    const Instant begin = m.clock.time;
    for (int i = 0; i < 6; ++i) {
        const auto r = m.read(hda(), 5, buffer());
        ASSERT_FALSE(r);
        EXPECT_TRUE(r.error().code == Code::timed_out || r.error().code == Code::device_gone);
    }
    EXPECT_TRUE(m.queue().closed());
    EXPECT_EQ(m.read(hda(), 5, buffer()).error().code, Code::device_gone);
    EXPECT_LE(m.clock.time - begin, 2'000'000'000u);
    EXPECT_EQ(m.queue().resets(), 4u) << "the fourth without a success between them";
    EXPECT_TRUE(log.has("hda: closed: the disk does not answer, even after resets"));
}

TEST_F(AtaErrors, ADiskThatDoesNotComeBackFromResetIsClosed) {
    m.primary.hang = 1;
    m.primary.dead = true;
    io::Request& first = submit(5, buffer());
    ASSERT_TRUE(m.turns_until([&] { return !first.pending(); }));
    EXPECT_EQ(first.status, io::Status::timed_out);
    io::Request& second = submit(6, buffer());
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(second.status, io::Status::device_gone) << "it waited for the reset";
    EXPECT_TRUE(m.queue().closed());
    EXPECT_EQ(m.read(hda(), 5, buffer()).error().code, Code::device_gone);
}

TEST_F(AtaErrors, ALostInterruptIsFoundAndClearingBegins) {
    DmaSpan b = buffer();
    ASSERT_TRUE(m.read(hda(), 1, b));
    m.primary.lose_interrupt = 1;
    const Instant begin = m.clock.time;
    ASSERT_TRUE(m.read(hda(), 2, b));
    EXPECT_TRUE(is_pattern(b, 2));
    EXPECT_LE(m.clock.time - begin, 50'000'000u);
    EXPECT_EQ(m.queue().lost_interrupts(), 1u);
    EXPECT_EQ(m.primary.resets, 0u);
    const io::Counters before = hda().counters();
    ASSERT_TRUE(m.read(hda(), 3, b));
    EXPECT_EQ((hda().counters() - before).device_accesses, 8u);
    EXPECT_EQ(m.queue().lost_interrupts(), 1u);
}

TEST_F(AtaErrors, ASlowCommandIsNotALostInterrupt) {
    m.primary.latency = 75'000'000;
    DmaSpan b = buffer();
    ASSERT_TRUE(m.read(hda(), 2, b));
    EXPECT_TRUE(is_pattern(b, 2));
    EXPECT_EQ(m.queue().lost_interrupts(), 0u);
    EXPECT_FALSE(m.queue().channel().clear_always());
}

TEST_F(AtaErrors, SpuriousInterruptsEndNothing) {
    m.primary.latency = 15'000'000;
    DmaSpan b = buffer();
    ASSERT_TRUE(m.read(hda(), 1, b));
    for (int i = 0; i < 5; ++i) {
        m.primary.raise_line(); // nothing in flight
        m.executor.turn();
    }
    io::Request& r = submit(9, b);
    m.executor.turn();
    for (int i = 0; i < 5; ++i) {
        m.primary.raise_line(); // while the command is in progress
        m.executor.turn();
    }
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(r.status, io::Status::ok);
    EXPECT_TRUE(is_pattern(b, 9));
}

TEST_F(AtaErrors, CancelTakesOutWhatTheDeviceHasNotSeen) {
    m.primary.latency = 15'000'000; // longer than a tick
    DmaSpan b = buffer(3 * 4096);
    io::Request& first = submit(1, b.subspan(0, 4096));
    m.executor.turn();
    ASSERT_TRUE(m.primary.started());
    io::Request& second = submit(50, b.subspan(4096, 4096));
    io::Request& third = submit(100, b.subspan(8192, 4096));
    EXPECT_TRUE(hda().cancel(second));
    EXPECT_FALSE(hda().cancel(first)) << "the device has it";
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(first.status, io::Status::ok);
    EXPECT_EQ(second.status, io::Status::cancelled);
    EXPECT_EQ(third.status, io::Status::ok);
    EXPECT_EQ(hda().counters().submitted, 3u);
}

TEST_F(AtaErrors, AForgottenBufferIsNotTouchedAgain) {
    m.primary.latency = 15'000'000;
    DmaSpan b = buffer(4096);
    DmaSpan other = buffer(4096);
    submit(1, b);
    submit(9, other); // adjacent: same command
    submit(100, buffer());
    m.executor.turn();
    ASSERT_TRUE(m.primary.started());
    requests.erase(requests.begin()); // destroyed in flight
    EXPECT_FALSE(m.primary.started());
    std::memset(b.data, 0xee, 4096);
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(b.data[0], std::byte{0xee});
    EXPECT_EQ(b.data[4095], std::byte{0xee});
    EXPECT_EQ(requests[0]->status, io::Status::ok);
    EXPECT_EQ(requests[1]->status, io::Status::ok);
    EXPECT_TRUE(is_pattern(other, 9));
    EXPECT_EQ(m.primary.resets, 1u);
}

TEST_F(AtaErrors, RepeatedCancellationsDoNotCloseTheDisk) {
    m.primary.latency = 15'000'000;
    for (u32 i = 0; i < 12; ++i) {
        submit(1, buffer());
        m.executor.turn();
        requests.erase(requests.begin());
        for (u32 turns = 0; turns < 300; ++turns) { // until the reset ends
            m.executor.turn();
        }
    }
    submit(5, buffer());
    ASSERT_TRUE(all_ended());
    EXPECT_EQ(requests[0]->status, io::Status::ok);
}

TEST_F(AtaErrors, ClosingEndsEverything) {
    m.primary.latency = 15'000'000;
    submit(1, buffer());
    m.executor.turn();
    submit(2, buffer());
    m.queue().close();
    for (const auto& r : requests) {
        EXPECT_EQ(r->status, io::Status::device_gone);
    }
    EXPECT_FALSE(m.primary.started());
    EXPECT_TRUE(m.interrupts.lines.empty());
    m.executor.turn();
}

TEST_F(AtaErrors, RandomFaultsLoseNothing) {
    u32 seed = 1;
    const auto random = [&](u32 below) {
        seed = seed * 1664525 + 1013904223;
        return (seed >> 8) % below;
    };
    m.primary.latency = 1'000'000;
    DmaSpan b = buffer(64 * 4096);
    for (u32 round = 0; round < 200; ++round) {
        requests.clear();
        switch (random(8)) {
        case 0: m.primary.hang = 1; break;
        case 1: m.primary.bus_error = 1 + random(3); break;
        case 2: m.primary.crc_error = 1; break;
        case 3: m.primary.lose_interrupt = 1; break;
        case 4: m.primary.abort = 1; break;
        case 5: m.primary.short_transfer = 1; break;
        default: break;
        }
        const u32 count = 1 + random(64);
        u64 lba = random(1000);
        for (u32 i = 0; i < count; ++i) {
            lba = random(3) != 0 ? lba + 8 : random(100'000);
            submit(lba, b.subspan(4096 * i, 4096));
            if (random(10) == 0) {
                m.primary.raise_line();
                m.executor.turn();
            }
        }
        const Instant begin = m.clock.time;
        ASSERT_TRUE(all_ended());
        EXPECT_LE(m.clock.time - begin, 1'000'000'000u);
        for (u32 i = 0; i < count; ++i) {
            const io::Status s = requests[i]->status;
            EXPECT_TRUE(s == io::Status::io_error || s == io::Status::timed_out || s == io::Status::ok);
            EXPECT_TRUE(s != io::Status::ok || is_pattern(b.subspan(4096 * i, 4096), requests[i]->lba));
        }
        ASSERT_FALSE(m.queue().closed());
    }
    EXPECT_EQ(hda().counters().submitted, hda().counters().completed);
}

} // namespace
