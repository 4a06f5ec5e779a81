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

#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/nvme_fake.hpp"

namespace {
using namespace fl;
using nvme_fake::Options;
namespace nvme = drivers::nvme;
using drivers::Feature;

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    std::vector<std::pair<std::string, std::string>> left; // address, reason
    bool offered(u32) override { return true; }
    void unused(const drivers::UnusedUnit& unit) override {
        left.emplace_back(std::string(unit.address), std::string(unit.reason));
    }
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
};

// Controllers live until machine shutdown: so does this.
struct Machine {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    test::Interrupts interrupts;
    Sink sink;
    pci_test::Space space;
    pci_test::Mapper mapper;
    nvme_fake::Controller device;
    drivers::Environment environment;

    explicit Machine(Options options = {}, u32 withheld = 0)
        : device(options), environment{executor, dma, interrupts, sink, 500'000'000, withheld} {
        auto& f = space.add(0, 3, 0, 0x1b36, 0x0010, 0x010802);
        f.set32(0x10, 0x0000'0004);
        f.set32(0x14, 0x0000'00f8);
        f.bar_mask[0] = 0xffff'c000; // 16 KiB
        f.bar_mask[1] = 0xffff'ffff;
        f.bytes[0x3c] = 11;
        f.bytes[0x3d] = 1;
        mapper.places[0xf8'0000'0000] = {&device, 0x4000};
        device.interrupt = [this](u16) { pending = true; };
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->deliver(); };
    }
    bool pending = false;
    void deliver() {
        device.look();
        if (pending && (device.mask & 1) == 0) {
            pending = false;
            interrupts.raise(11);
        }
    }
    Result<void> probe() {
        drivers::Environment with{
            executor, dma, interrupts, sink, environment.timeout, environment.withheld_features, {}, nullptr, mapper};
        return executor.run(nvme::probe(with, *pci_test::pci::look_up(space, {0, 3, 0}), 0));
    }
};
} // namespace

namespace {

std::unique_ptr<Machine> machine(Options options = {}, u32 withheld = 0) {
    return std::make_unique<Machine>(options, withheld);
}

std::string failure(Options options) {
    // kept: a task of a failed controller may refer to it
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(machine(options));
    const auto done = all.back()->probe();
    EXPECT_TRUE(all.back()->sink.disks.empty());
    return done ? std::string() : std::string(done.error().message);
}

// Never destroyed: an attached controller lives as long as its machine.
Machine& attached(Options options = {}, u32 withheld = 0) {
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(machine(options, withheld));
    EXPECT_TRUE(all.back()->probe());
    return *all.back();
}

std::string features(Machine& m) { return std::string(m.sink.disks.at(0)->identity().features.view()); }

io::Task<Result<void>> copy(io::BlockDevice& disk, DmaSpan from, DmaSpan into) {
    if (auto done = co_await disk.write(8, from); !done) {
        co_return done.error();
    }
    if (auto done = co_await disk.flush(); !done) {
        co_return done.error();
    }
    co_return co_await disk.read(8, into);
}

// A write, a flush and a read of `bytes` at an odd place in a page.
void exchange_data(Machine& m, u32 bytes) {
    auto from = *m.dma.buffer(bytes + 4096);
    auto into = *m.dma.buffer(bytes + 4096);
    for (u32 i = 0; i < bytes; ++i) {
        from.data()[512 + i] = static_cast<std::byte>(i * 7 + i / 251);
    }
    EXPECT_TRUE(
        m.executor.run(copy(*m.sink.disks.at(0), from.span().subspan(512, bytes), into.span().subspan(512, bytes))));
    EXPECT_EQ(std::memcmp(from.data() + 512, into.data() + 512, bytes), 0);
}

TEST(Nvme, SetUpAndTransfers) {
    Machine& m = attached();
    ASSERT_EQ(m.sink.disks.size(), 1u);
    const io::BlockDevice& disk = *m.sink.disks[0];
    EXPECT_EQ(disk.identity().name.view(), "nvme0n1");
    EXPECT_EQ(disk.identity().model.view(), "FAKE NVME");
    EXPECT_EQ(disk.identity().kind, io::Kind::emulated);
    EXPECT_EQ(disk.geometry().sectors, 8192u);
    EXPECT_EQ(features(m), "flush discard line queues=1 mdts=524288");
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
    EXPECT_EQ(features(attached(all)), "flush discard shadow-doorbells line queues=1 mdts=524288");
    EXPECT_EQ(features(attached(all, to_underlying(Feature::flush))),
              "discard shadow-doorbells line queues=1 mdts=524288");
    EXPECT_EQ(features(attached(all, to_underlying(Feature::discard))),
              "flush shadow-doorbells line queues=1 mdts=524288");
    Machine& plain = attached(all, to_underlying(Feature::shadow_doorbells));
    EXPECT_EQ(features(plain), "flush discard line queues=1 mdts=524288");
    EXPECT_EQ(plain.device.shadow, 0u);
    Machine& shadow = attached(all);
    exchange_data(shadow, 65536);
    shadow.device.polls = false; // its event index asks for the register
    exchange_data(shadow, 65536);
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
        for (int i = 0; i < 400 && read.pending(); ++i) {
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
    m.device.options.blocks = 4096;     // smaller
    m.device.report_event(0x0004'0002); // notice, namespace attribute changed, log page 4
    for (int i = 0; i < 50; ++i) {
        m.deliver();
        m.executor.turn();
    }
    EXPECT_TRUE(m.sink.disks[0]->removed());
    EXPECT_EQ(m.device.events.size(), 1u) << "and the next one";
    EXPECT_TRUE(std::ranges::any_of(m.device.admin, [](const auto& e) {
        return (e[0] & 0xff) == 2 && (e[10] & 0xff) == 4;
    })) << "the log page is read";
}

} // namespace
