// The NVMe driver against a controller in memory: set-up, namespaces, limits, withheld features, hostile values,
// events, and the layouts of commands, as bytes typed from [nvme-1.4].
#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.mmio;
import core.log;
import core.processor;
import io.executor;
import io.task;
import io.block;
import io.block_queue;
import drivers.driver;
import drivers.pci;
import drivers.nvme;

#include "unit/drivers/nvme_machine.hpp"

namespace {
using namespace nvme_machine;

TEST(Nvme, SetUpAndTransfers) {
    Machine& m = attached();
    ASSERT_EQ(m.sink.disks.size(), 1u);
    const io::BlockDevice& disk = *m.sink.disks[0];
    EXPECT_EQ(disk.identity().name.view(), "nvme0n1");
    EXPECT_EQ(disk.identity().model.view(), "FAKE NVME");
    EXPECT_EQ(disk.identity().kind, io::Kind::emulated);
    EXPECT_EQ(disk.geometry().sectors, 8192u);
    EXPECT_EQ(features(m), "flush discard write-zeroes line queues=1 mdts=524288");
    for (const u32 bytes : {512u, 4096u, 8192u, 65536u, 1u << 20}) {
        exchange_data(m, bytes);
    }
}

TEST(Nvme, GoldenBytes) {
    Machine& m = attached();
    m.device.hold = true;
    auto data = *m.dma.buffer(8192);
    io::Request read(*m.sink.disks[0], io::Op::read, 0x123, data.span());
    m.sink.disks[0]->submit(read);
    m.executor.turn();
    ASSERT_EQ(m.device.held.size(), 1u);
    const auto& e = m.device.held[0].entry;
    EXPECT_EQ(e[0] & 0xffff, 0x0002u);            // Read, PRP, not fused
    EXPECT_EQ(e[1], 1u);                          // NSID
    EXPECT_EQ(e[2] | e[3] | e[4] | e[5], 0u);     // reserved, MPTR
    EXPECT_EQ(nvme_fake::wide(e, 6), data.bus()); // PRP1
    EXPECT_EQ(nvme_fake::wide(e, 8), data.bus() + 4096);
    EXPECT_EQ(nvme_fake::wide(e, 10), 0x123u); // SLBA
    EXPECT_EQ(e[12], 15u);                     // NLB, 0's based
    EXPECT_EQ(e[13] | e[14] | e[15], 0u);
    m.device.answer(0);
    m.deliver();
    m.executor.turn();
    EXPECT_EQ(read.status, io::Status::ok);
}

TEST(Nvme, FeaturesWithheld) {
    Options all;
    all.doorbell_buffers = true;
    EXPECT_EQ(features(attached(all)), "flush discard write-zeroes shadow-doorbells line queues=1 mdts=524288");
    EXPECT_EQ(features(attached(all, to_underlying(Feature::flush))),
              "discard write-zeroes write-through shadow-doorbells line queues=1 mdts=524288");
    EXPECT_EQ(features(attached(all, to_underlying(Feature::discard))),
              "flush write-zeroes shadow-doorbells line queues=1 mdts=524288");
    Machine& plain = attached(all, to_underlying(Feature::shadow_doorbells));
    EXPECT_EQ(features(plain), "flush discard write-zeroes line queues=1 mdts=524288");
    EXPECT_EQ(plain.device.shadow, 0u);
    Machine& shadow = attached(all);
    exchange_data(shadow, 65536);
    shadow.device.polls = false; // its event index asks for the register
    exchange_data(shadow, 65536);
}

TEST(Nvme, WithoutFlushesTheVolatileCacheIsOffOrReported) {
    test::CapturedLog log;
    constexpr u32 withheld = to_underlying(Feature::flush);
    Machine& off = attached({}, withheld);
    EXPECT_EQ(off.device.features.at(6), 0u);
    EXPECT_FALSE(log.has("volatile"));
    Options without;
    without.write_cache = false;
    EXPECT_EQ(features(attached(without, withheld)), "discard write-zeroes line queues=1 mdts=524288");
    EXPECT_FALSE(log.has("volatile"));
    Options stubborn;
    stubborn.keeps_cache = true;
    EXPECT_EQ(features(attached(stubborn, withheld)), "discard write-zeroes line queues=1 mdts=524288");
    EXPECT_TRUE(log.has("warning: nvme0: it has a volatile write cache, which is neither flushed (features=-flush) nor "
                        "can be switched off"));
}

TEST(Nvme, Limits) {
    Options o;
    o.mdts = 1; // 8 KiB
    Machine& small = attached(o);
    EXPECT_NE(features(small).find("mdts=8192"), std::string::npos);
    exchange_data(small, 65536); // the fake checks MDTS
    Options two;
    two.cap = (two.cap & ~u64{0xffff}) | 1; // MQES 1: two entries
    exchange_data(attached(two), 16384);
    Options stride;
    stride.cap |= u64{1} << 32;
    stride.doorbell_buffers = true;
    exchange_data(attached(stride), 16384);
    Options large;
    large.lba_shift = 12;
    large.blocks = 1024;
    Machine& m = attached(large);
    EXPECT_EQ(m.sink.disks[0]->geometry().sector_size, 4096u);
    auto from = *m.dma.buffer(8192);
    auto into = *m.dma.buffer(8192);
    std::memset(from.data(), 0x5a, 8192);
    EXPECT_TRUE(m.executor.run(copy(*m.sink.disks[0], from.span(), into.span())));
    EXPECT_EQ(std::memcmp(from.data(), into.data(), 8192), 0);
}

TEST(Nvme, Namespaces) {
    Options holes;
    holes.list = {2, 7};
    Machine& m = attached(holes);
    ASSERT_EQ(m.sink.disks.size(), 2u);
    EXPECT_EQ(m.sink.disks[0]->identity().name.view(), "nvme0n2");
    EXPECT_EQ(m.sink.disks[1]->identity().name.view(), "nvme0n7");
    const auto reason = [](Options o) {
        Machine& with = attached(o);
        EXPECT_TRUE(with.sink.disks.empty());
        return with.sink.left.empty() ? std::string() : with.sink.left[0].second;
    };
    Options o;
    o.metadata = 8;
    EXPECT_NE(reason(o).find("metadata"), std::string::npos);
    o = {};
    o.protection = 1;
    EXPECT_NE(reason(o).find("protection information"), std::string::npos);
    o = {};
    o.blocks = 0;
    EXPECT_NE(reason(o).find("no blocks"), std::string::npos);
    o = {};
    o.lba_shift = 11;
    EXPECT_NE(reason(o).find("neither 512 nor 4096"), std::string::npos);
    o = {};
    o.list = {5, 5};
    EXPECT_NE(failure(o).find("does not ascend"), std::string::npos);
}

TEST(Nvme, NamespacesOfAnotherCommandSetAreReported) {
    const auto left = [](Options o) {
        Machine& m = attached(o);
        EXPECT_EQ(m.sink.disks.size(), o.command_set == 0 ? 1u : 0u);
        std::vector<std::string> addresses;
        for (const auto& [address, reason] : m.sink.left) {
            addresses.push_back(address);
            EXPECT_NE(reason.find("another I/O command set than NVM"), std::string::npos) << reason;
        }
        return addresses;
    };
    using Addresses = std::vector<std::string>;
    Options o;
    o.zoned = {2, 9};
    o.elsewhere = {5};
    EXPECT_EQ(left(o), Addresses()) << "it has none, says CAP.CSS, and is not asked";
    o.cap |= u64{1} << 43;
    EXPECT_EQ(left(o), (Addresses{"nvme0n2", "nvme0n9"}));
    o.refuses_list = true;
    EXPECT_EQ(left(o), Addresses());
    o = {};
    o.command_set = 2; // active all the same
    EXPECT_EQ(left(o), Addresses{"nvme0n1"});
}

TEST(Nvme, ControllersThatCannotBeUsed) {
    Options o;
    o.never_ready = true;
    EXPECT_NE(failure(o).find("does not become ready"), std::string::npos);
    o = {};
    o.fatal = true;
    EXPECT_NE(failure(o).find("CSTS.CFS"), std::string::npos);
    o = {};
    o.absent = true;
    EXPECT_NE(failure(o).find("all ones"), std::string::npos);
    o = {};
    o.cap |= u64{1} << 48;
    EXPECT_NE(failure(o).find("MPSMIN"), std::string::npos);
    o = {};
    o.cap &= ~(u64{1} << 37);
    EXPECT_NE(failure(o).find("CSS"), std::string::npos);
    o = {};
    o.cap &= ~u64{0xffff};
    EXPECT_NE(failure(o).find("MQES"), std::string::npos);
    auto mute = machine();
    mute->device.mute = true;
    const auto done = mute->probe();
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, Code::timed_out);
    EXPECT_EQ(mute->device.cc & 1, 0u) << "disabled, before its memory is freed";
    auto small = machine();
    small->space.functions.begin()->second.bar_mask[0] = 0xffff'f000; // 4 KiB: no doorbells
    EXPECT_FALSE(small->probe());
    auto without = machine();
    without->space.functions.begin()->second.bar_mask = {};
    EXPECT_FALSE(without->probe());
}

// A completion that violates the protocol closes the disk and disables the controller.
void expect_closed(std::array<u32, 4> dwords) {
    Machine& m = attached();
    m.device.hold = true;
    auto data = *m.dma.buffer(4096);
    io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
    m.sink.disks[0]->submit(read);
    m.executor.turn();
    ASSERT_EQ(m.device.held.size(), 1u);
    dwords[3] |= dwords[3] == 0 ? u32{m.device.held[0].cid()} : 0;
    m.device.post(1, dwords);
    for (int i = 0; i < 100; ++i) {
        m.deliver();
        m.executor.turn();
    }
    EXPECT_EQ(read.status, io::Status::protocol_error);
    EXPECT_EQ(m.device.cc & 1, 0u) << "the controller is still enabled";
    EXPECT_FALSE(read.pending());
}

TEST(Nvme, ViolationsCloseTheController) {
    expect_closed({0, 0, 1 | 2 << 16, 0});      // another submission queue
    expect_closed({0, 0, 2 | 1 << 16, 0});      // a head beyond the tail
    expect_closed({0, 0, 0xffff | 1 << 16, 0}); // a head beyond the queue
    expect_closed({0, 0, 1 | 1 << 16, 0xffff}); // ids that are not in flight
    expect_closed({0, 0, 1 | 1 << 16, 0x7e});
}

TEST(Nvme, StatusesAndFailures) {
    const auto status = [](u16 code) {
        Machine& m = attached();
        m.device.hold = true;
        auto data = *m.dma.buffer(4096);
        io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
        m.sink.disks[0]->submit(read);
        m.executor.turn();
        m.device.answer(0, code);
        m.deliver();
        m.executor.turn();
        return read.status;
    };
    EXPECT_EQ(status(0x001), io::Status::not_supported);
    EXPECT_EQ(status(0x020), io::Status::read_only);
    EXPECT_EQ(status(0x182), io::Status::read_only);
    EXPECT_EQ(status(0x080), io::Status::out_of_range);
    EXPECT_EQ(status(0x281), io::Status::io_error);
    EXPECT_EQ(status(0x4006), io::Status::io_error); // DNR
    // Data Transfer Error without DNR: sent again, and completed.
    Machine& m = attached();
    m.device.hold = true;
    auto data = *m.dma.buffer(4096);
    io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
    m.sink.disks[0]->submit(read);
    m.executor.turn();
    m.device.answer(0, 0x006);
    m.device.hold = false;
    for (int i = 0; i < 20 && read.pending(); ++i) {
        m.deliver();
        m.executor.turn();
    }
    EXPECT_EQ(read.status, io::Status::ok);
}

TEST(Nvme, FatalStatusRemovalAndSilence) {
    for (int kind = 0; kind < 3; ++kind) {
        Machine& m = attached();
        m.device.hold = true;
        auto data = *m.dma.buffer(4096);
        io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
        m.sink.disks[0]->submit(read);
        m.executor.turn();
        m.device.options.fatal = kind == 0;
        m.device.options.absent = kind == 1;
        for (int i = 0; i < 4000 && read.pending(); ++i) {
            m.deliver();
            m.executor.turn();
        }
        EXPECT_EQ(read.status, kind == 2 ? io::Status::timed_out : io::Status::device_gone) << kind;
        EXPECT_EQ(m.sink.disks[0]->removed(), kind == 1);
        for (int i = 0; i < 100; ++i) {
            m.deliver();
            m.executor.turn();
        }
        EXPECT_EQ(m.device.cc & 1, kind == 1 ? 1u : 0u) << "disabled, unless it is gone";
        EXPECT_EQ(quarantine_state().spans, 0u) << "a controller that is disabled or gone accesses no memory";
    }
}

TEST(Nvme, Events) {
    Machine& m = attached();
    m.executor.turn();
    for (int i = 0; i < 50 && m.device.events.empty(); ++i) {
        m.deliver();
        m.executor.turn();
    }
    ASSERT_EQ(m.device.events.size(), 1u) << "an event request is with the controller";
    m.device.options.blocks = 4096; // smaller
    m.device.changed = {1};
    m.device.report_event(0x0004'0002); // notice, namespace attribute changed, log page 4
    for (int i = 0; i < 50; ++i) {
        m.deliver();
        m.executor.turn();
    }
    EXPECT_FALSE(m.sink.disks[0]->removed());
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, 4096u);
    EXPECT_EQ(m.device.events.size(), 1u) << "and the next one";
    EXPECT_TRUE(std::ranges::any_of(m.device.admin, [](const auto& e) {
        return (e[0] & 0xff) == 2 && (e[10] & 0xff) == 4;
    })) << "the log page is read";
}

// ---- what a processor that polls does with interrupts [io::Wait] ----

struct WaitingMachine {
    MessageMachine& m;
    io::BlockDevice& disk = *m.sink.disks.at(0);
    const u32 vector; // of the I/O queue
    DmaBuffer data = *m.dma.buffer(4096);

    WaitingMachine(io::Wait wait, u32 vectors) : m(attached_by_messages({}, 1, vectors)), vector(vectors == 1 ? 0 : 1) {
        settle();
        m.executors[0]->set_wait(wait);
        m.device.hold = true;
    }
    void settle() {
        for (u32 i = 0; i < 20; ++i) {
            m.turn();
        }
    }
    bool masked() const { return (m.table.word(vector, 12) & 1) != 0; }
    u64 interrupts() const { return disk.counters().interrupts; }
    /// A read that is answered after `turns` turns.
    void read(u32 turns) {
        start();
        end(turns);
        EXPECT_TRUE(requests.empty());
    }
    void start() {
        requests.push_back(std::make_unique<io::Request>(disk, io::Op::read, 8, data.span()));
        disk.submit(*requests.back());
    }
    /// The oldest one is answered after `turns` turns.
    void end(u32 turns) {
        for (u32 i = 0; i < turns; ++i) {
            m.turn();
        }
        ASSERT_EQ(m.device.held.size(), requests.size());
        m.device.answer(0);
        ASSERT_TRUE(m.turn_until([&] { return !requests.front()->pending(); }, 5));
        EXPECT_EQ(requests.front()->status, io::Status::ok);
        requests.pop_front();
    }
    std::deque<std::unique_ptr<io::Request>> requests;
};

TEST(NvmeWait, APollingProcessorMasksItsMessage) {
    for (const u32 vectors : {MessageMachine::entries, 1u}) { // one: shared with the admin queue
        WaitingMachine w(io::Wait::poll, vectors);
        const u64 before = w.interrupts();
        w.start();
        for (int i = 0; i < 100; ++i) { // never idle
            w.start();
            w.end(3);
        }
        EXPECT_TRUE(w.masked());
        w.end(3);
        EXPECT_LE(w.interrupts() - before, 1u) << "the one that showed that they are not needed";
        EXPECT_EQ(w.masked(), vectors != 1) << "idle, the admin queue's event request unmasks what it shares";
        // An event of the controller arrives nevertheless.
        w.m.device.changed = {1};
        w.m.device.options.blocks = 4096;
        w.m.device.report_event(0x0004'0002);
        EXPECT_TRUE(w.m.turn_until([&] { return w.disk.geometry().sectors == 4096; }, 100));
        w.settle();
        // As before, for a processor that does not poll any more.
        w.m.executors[0]->set_wait(io::Wait::interrupt);
        const u64 asleep = w.interrupts();
        for (int i = 0; i < 10; ++i) {
            w.read(3);
            EXPECT_FALSE(w.masked());
        }
        EXPECT_GE(w.interrupts() - asleep, 10u);
    }
}

TEST(NvmeWait, AnAdaptiveProcessorIsInterruptedAfterItsWindow) {
    WaitingMachine w(io::Wait::adaptive, MessageMachine::entries);
    const u64 before = w.interrupts();
    for (int i = 0; i < 100; ++i) {
        w.read(3); // well within the window
    }
    EXPECT_LE(w.interrupts() - before, 1u);
    EXPECT_TRUE(w.masked());
    // Idle: nothing can arrive, so it stays masked. Then a slow answer: it sleeps, and is woken each time.
    w.m.clock.time += 10 * io::Executor::poll_window;
    w.settle();
    EXPECT_TRUE(w.masked());
    const u64 slow = w.interrupts();
    const u64 idles = w.m.clock.idles;
    w.m.clock.step = 20'000;
    for (int i = 0; i < 10; ++i) {
        w.read(10);
        EXPECT_FALSE(w.masked()) << "an interrupt that wakes is wanted";
    }
    EXPECT_GE(w.m.clock.idles - idles, 10u);
    EXPECT_GE(w.interrupts() - slow, 10u);
}

} // namespace
