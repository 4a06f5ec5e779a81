// The PVSCSI driver against an adapter in memory: set-up, targets, limits, refused commands, hostile values, hot plug,
// recovery, and the layouts of descriptors, as bytes typed from [pvscsi].
#include "gtest_macros.hpp"

#include "zeroed.hpp"

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
import drivers.pvscsi;
import drivers.scsi.unit;

#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/pvscsi_fake.hpp"

namespace {
using namespace fl;
namespace pvscsi = drivers::pvscsi;
using drivers::Feature;
using pvscsi_fake::Reply;

struct Sink final : drivers::DiskSink {
    std::vector<io::BlockDevice*> disks;
    std::vector<std::pair<std::string, std::string>> left; // address, reason
    bool offered(u32) override { return true; }
    void unused(const drivers::UnusedUnit& unit) override {
        left.emplace_back(std::string(unit.address), std::string(unit.reason));
    }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32) override {
        disks.push_back(&disk);
        return {};
    }
};

struct Machine {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    test::Interrupts interrupts;
    Sink sink;
    pci_test::Space space;
    pci_test::Mapper mapper;
    pvscsi_fake::Adapter device;
    drivers::Environment environment{executor, dma, interrupts, sink, 500'000'000, 0, {}, nullptr, mapper};

    Machine() {
        device.units[{0, 0}] = {.blocks = 8192};
        auto& f = space.add(0, 3, 0, 0x15ad, 0x07c0, 0x010000);
        f.set32(0x10, 0x0000'0001); // BAR 0: I/O ports
        f.bar_mask[0] = 0xffff'fff8;
        f.set32(0x14, 0xfe00'0004); // BAR 1: memory, 64 bits
        f.bar_mask[1] = 0xffff'8000;
        f.bar_mask[2] = 0xffff'ffff;
        f.bytes[0x3c] = 11;
        f.bytes[0x3d] = 1;
        mapper.places[0xfe00'0000] = {&device, 0x8000};
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->deliver(); };
    }
    void deliver() { // a level
        if (device.pending()) {
            interrupts.raise(11);
        }
    }
    void turns(u32 count) {
        for (u32 i = 0; i < count; ++i) {
            deliver();
            executor.turn();
        }
    }
    pci_test::Function& function() { return space.functions.begin()->second; }
    Result<void> probe() {
        return executor.run(pvscsi::probe(environment, *pci_test::pci::look_up(space, {0, 3, 0}), 0));
    }
};

// Never destroyed: an attached controller lives as long as its machine.
Machine& machine() {
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(std::make_unique<Machine>());
    return *all.back();
}
Machine& attached(const std::function<void(Machine&)>& change = {}) {
    Machine& m = machine();
    if (change) {
        change(m);
    }
    const auto done = m.probe();
    EXPECT_TRUE(done) << (done ? "" : done.error().message);
    return m;
}
std::string failure(const std::function<void(Machine&)>& change) {
    Machine& m = machine();
    change(m);
    const auto done = m.probe();
    EXPECT_TRUE(m.sink.disks.empty());
    EXPECT_FALSE(m.device.rings_valid) << "the adapter is left with rings that are freed";
    return done ? std::string() : std::string(done.error().message);
}
std::string features(Machine& m) { return std::string(m.sink.disks.at(0)->identity().features.view()); }

io::Task<Result<void>> copy(io::BlockDevice& disk, DmaSpan from, DmaSpan into) {
    if (auto done = co_await disk.write(8, from); !done) {
        co_return done.error();
    }
    if (auto done = co_await disk.write(8, from); !done) {
        co_return done.error();
    }
    if (auto done = co_await disk.flush(); !done) {
        co_return done.error();
    }
    co_return co_await disk.read(8, into);
}

io::Task<Result<void>> zeroes(io::BlockDevice& disk, u64 lba, u32 bytes) {
    co_return co_await disk.write_zeroes(lba, bytes);
}
Reply refusal() { // ILLEGAL REQUEST, invalid field in CDB
    return {.status = 2, .sense = {0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0, 0, 0}};
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

TEST(Pvscsi, SetUpAndTransfers) {
    Machine& m = attached();
    ASSERT_EQ(m.sink.disks.size(), 1u);
    const io::BlockDevice& disk = *m.sink.disks[0];
    EXPECT_EQ(disk.identity().name.view(), "sda");
    EXPECT_EQ(disk.identity().kind, io::Kind::synthetic);
    EXPECT_EQ(disk.geometry().sectors, 8192u);
    EXPECT_EQ(features(m), "flush discard hot-plug line max-transfer=524288");
    EXPECT_EQ(m.device.mask, 0xfu);
    for (const u32 bytes : {512u, 4096u, 65536u, 131072u, 1u << 20}) {
        exchange_data(m, bytes);
    }
    m.turns(2);
    EXPECT_GT(m.device.lists, 0u);
    EXPECT_GT(m.device.rw_kicks, 0u);
    EXPECT_GT(m.device.flushes, 0u);
    EXPECT_GT(m.device.acknowledgements, 0u);
}

TEST(Pvscsi, GoldenBytes) {
    Machine& m = attached();
    m.device.hold = true;
    auto data = *m.dma.buffer(4096);
    io::Request write(*m.sink.disks[0], io::Op::write, 0x123, data.span());
    m.sink.disks[0]->submit(write);
    m.executor.turn();
    ASSERT_EQ(m.device.held.size(), 1u);
    const auto& r = m.device.held[0];
    EXPECT_EQ(r.get<u64>(8), data.bus());
    EXPECT_EQ(r.get<u64>(16), 4096u);
    EXPECT_EQ(r.get<u32>(32), 96u);   // sense data
    EXPECT_EQ(r.get<u32>(36), 0x10u); // to the device, no list
    const std::array<u8, 16> cdb{0x8a, 0, 0, 0, 0, 0, 0, 0, 0x01, 0x23, 0, 0, 0, 8, 0, 0};
    EXPECT_TRUE(std::equal(cdb.begin(), cdb.end(), r.bytes.begin() + 40));
    EXPECT_EQ(r.bytes[56], 16);
    const std::array<u8, 12> rest{0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0}; // LUN, tag, bus, target, vcpuHint
    EXPECT_TRUE(std::equal(rest.begin(), rest.end(), r.bytes.begin() + 57));
    m.device.answer(0);
    m.turns(2);
    EXPECT_EQ(write.status, io::Status::ok);
}

/// The messages of one entry of an MSI-X table.
struct Messages final : InterruptController {
    InterruptHandler handler = nullptr;
    void* context = nullptr;
    u32 count = 0;
    static constexpr u8 vector = 0x51;
    Result<void> attach_line(InterruptLine, InterruptHandler, void*, u32) override {
        return Error{Code::not_supported, "no lines here"};
    }
    void detach_line(InterruptLine, InterruptHandler, void*) override {}
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error{Code::not_supported, "messages only"};
    }
    Result<InterruptVector> attach_message(u32 processor, InterruptHandler call, void* with) override {
        EXPECT_EQ(handler, nullptr);
        handler = call;
        context = with;
        return InterruptVector{vector, processor, processor};
    }
    Result<InterruptMessage> message_for(InterruptVector) const override {
        return InterruptMessage{0xfee0'3000, vector};
    }
    void detach_vector(InterruptVector) override { handler = nullptr; }
};

/// The adapter with an MSI-X capability, as VMware's has one; QEMU's has MSI alone.
struct MessageMachine : Machine {
    struct Table final : MmioModel {
        std::array<u8, 0x2000> memory{};
        u64 read(u64 at, u32 width) override {
            u64 value = 0;
            std::memcpy(&value, memory.data() + at, width);
            return value;
        }
        void write(u64 at, u32 width, u64 value) override { std::memcpy(memory.data() + at, &value, width); }
        u32 word(u32 at) const {
            u32 value = 0;
            std::memcpy(&value, memory.data() + at, 4);
            return value;
        }
    };
    Table table;
    Messages messages;
    bool raised = false;

    MessageMachine() {
        auto& f = function();
        f.set32(0x1c, 0xfe10'0000); // BAR 3: memory
        f.bar_mask[3] = 0xffff'e000;
        f.add_capability(0x50, 0x11);
        f.set16(0x52, 0); // one entry
        f.limit16(0x52, 0xc000);
        f.set32(0x54, 3);          // the table, in BAR 3
        f.set32(0x58, 0x1000 | 3); // pending bits
        table.memory[12] = 1;      // masked after a reset
        mapper.places[0xfe10'0000] = {&table, 0x2000};
        device.interrupt = [this] {
            raised = true;
            deliver_message();
        };
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<MessageMachine*>(self)->deliver_message(); };
    }
    void deliver_message() {
        if (!raised || (table.word(12) & 1) != 0) {
            return;
        }
        raised = false;
        EXPECT_EQ(table.word(0), 0xfee0'3000u);
        EXPECT_EQ(table.word(4), 0u);
        EXPECT_EQ(table.word(8), u32{Messages::vector});
        ASSERT_NE(messages.handler, nullptr) << "a message after the detaching";
        ++messages.count;
        messages.handler(messages.context);
    }
};

TEST(Pvscsi, MessagesByMsix) {
    static MessageMachine m; // an attached controller lives as long as its machine
    drivers::Environment with{m.executor, m.dma, m.messages, m.sink, 500'000'000, 0, {}, nullptr, m.mapper};
    ASSERT_TRUE(m.executor.run(pvscsi::probe(with, *pci_test::pci::look_up(m.space, {0, 3, 0}), 0)));
    EXPECT_EQ(features(m).find(" line"), std::string::npos);
    EXPECT_NE(features(m).find("msix"), std::string::npos) << features(m);
    EXPECT_EQ(m.function().get16(0x52) & 0xc000, 0x8000) << "MSI-X is on, and not masked";
    EXPECT_EQ(m.table.word(12) & 1, 0u);
    EXPECT_TRUE(m.interrupts.lines.empty());
    const u32 before = m.messages.count;
    auto from = *m.dma.buffer(4096);
    auto into = *m.dma.buffer(4096);
    std::memset(from.data(), 0x3c, 4096);
    EXPECT_TRUE(m.executor.run(copy(*m.sink.disks.at(0), from.span(), into.span())));
    EXPECT_EQ(std::memcmp(from.data(), into.data(), 4096), 0);
    EXPECT_GT(m.messages.count, before);
}

TEST(Pvscsi, TargetsAndUnits) {
    Machine& m = attached([](Machine& with) {
        with.device.units.clear();
        with.device.units[{2, 0}] = {.blocks = 8192};
        with.device.units[{2, 5}] = {.blocks = 4096};
        with.device.units[{4, 0}] = {.peripheral = 5, .vendor = "NECVMWar", .product = "CD-ROM          "};
        with.device.units[{9, 1}] = {.blocks = 1024, .block_bytes = 4096}; // no LUN 0
        with.device.units[{15, 0}] = {.empty = true};
        with.device.units[{15, 1}] = {.zero_bytes = true};
        with.device.units[{16, 0}] = {.blocks = 8192}; // beyond the default
    });
    ASSERT_EQ(m.sink.disks.size(), 3u);
    EXPECT_EQ(m.sink.disks[2]->geometry().sector_size, 4096u);
    ASSERT_EQ(m.sink.left.size(), 3u);
    EXPECT_EQ(m.sink.left[2], (std::pair<std::string, std::string>{"pvscsi0 target 15 LUN 1",
                                                                   "there is no medium in it, or it has 0 bytes"}));
    EXPECT_EQ(m.sink.left[0].first, "pvscsi0 target 4 LUN 0");
    EXPECT_NE(m.sink.left[0].second.find("CD drives"), std::string::npos);
    EXPECT_NE(m.sink.left[1].second.find("no medium"), std::string::npos);
    Machine& all = attached([](Machine& with) {
        with.device.targets = 65;
        with.device.units[{64, 0}] = {.blocks = 8192};
    });
    EXPECT_EQ(all.sink.disks.size(), 2u);
    Machine& many = attached([](Machine& with) { with.device.targets = 1'000'000; });
    EXPECT_EQ(many.sink.disks.size(), 1u);
    Machine& none = attached([](Machine& with) { with.device.targets = 0; });
    EXPECT_EQ(none.sink.disks.size(), 1u);
}

TEST(Pvscsi, WhatAnAdapterLacksIsNotUsed) {
    EXPECT_EQ(features(attached([](Machine& m) { m.device.has_messages = false; })),
              "flush discard line max-transfer=524288");
    Machine& threshold = attached([](Machine& m) { m.device.has_threshold = true; });
    EXPECT_EQ(features(threshold), "flush discard hot-plug call-threshold line max-transfer=524288");
    exchange_data(threshold, 65536);
    EXPECT_EQ(features(attached([](Machine& m) {
                  m.environment.withheld_features = to_underlying(Feature::flush) | to_underlying(Feature::discard);
              })),
              "hot-plug line max-transfer=524288");
    Machine& counts = attached([](Machine& m) { m.device.counts = true; });
    exchange_data(counts, 65536);
}

// The kick that the threshold holds back is made up in the next tick.
TEST(Pvscsi, RequestCallThreshold) {
    Machine& m = attached([](Machine& with) { with.device.has_threshold = true; });
    m.device.hold = true;
    pvscsi_fake::store<u32>(m.device.state + 24, 3);
    const u32 kicks = m.device.rw_kicks;
    auto data = *m.dma.buffer(4 * 4096);
    io::BlockDevice& disk = *m.sink.disks[0];
    io::Request first(disk, io::Op::read, 0, data.span().subspan(0, 4096));
    io::Request second(disk, io::Op::read, 8, data.span().subspan(4096, 4096));
    io::Request third(disk, io::Op::read, 16, data.span().subspan(8192, 4096));
    disk.submit(first);
    disk.submit(second);
    m.executor.turn();
    EXPECT_EQ(m.device.rw_kicks, kicks) << "two requests, and the adapter asks for three";
    disk.submit(third);
    m.executor.turn();
    EXPECT_EQ(m.device.rw_kicks, kicks + 1);
    EXPECT_EQ(m.device.held.size(), 3u);
    pvscsi_fake::store<u32>(m.device.state + 24, 0xffffffff); // never
    io::Request fourth(disk, io::Op::read, 24, data.span().subspan(12288, 4096));
    disk.submit(fourth);
    m.turns(5);
    EXPECT_EQ(m.device.held.size(), 4u);
    while (!m.device.held.empty()) {
        m.device.answer(0);
    }
    m.turns(3);
    EXPECT_TRUE(first.status == io::Status::ok && third.status == io::Status::ok && fourth.status == io::Status::ok);
}

TEST(Pvscsi, AdaptersThatCannotBeUsed) {
    EXPECT_NE(failure([](Machine& m) { m.device.absent = true; }).find("all ones"), std::string::npos);
    for (const u32 command : {1u, 3u}) {
        EXPECT_NE(failure([&](Machine& m) { m.device.refused = command; }).find("refuses a command"),
                  std::string::npos);
    }
    EXPECT_NE(failure([](Machine& m) { m.function().bar_mask = {}; }).find("no memory BAR"), std::string::npos);
    EXPECT_NE(failure([](Machine& m) { m.function().bar_mask[1] = 0xffff'c000; }).find("no memory BAR"),
              std::string::npos);
    EXPECT_NE(failure([](Machine& m) { m.function().set32(0x14, 4); }).find("no address"), std::string::npos)
        << "not assigned by the firmware, as on QEMU's microvm";
    for (const u32 at : {8u, 20u}) {
        EXPECT_NE(failure([&](Machine& m) {
                      m.device.on_setup = [=](u64 state) { pvscsi_fake::store<u32>(state + at, 31); };
                  }).find("not of the size"),
                  std::string::npos);
    }
    for (const u32 at : {0u, 4u, 12u, 16u}) {
        EXPECT_NE(failure([&](Machine& m) {
                      m.device.on_setup = [=](u64 state) { pvscsi_fake::store<u32>(state + at, 0x55); };
                  }).find("not empty"),
                  std::string::npos);
    }
    EXPECT_NE(failure([](Machine& m) { m.device.mute = true; }).find("did not answer"), std::string::npos);
    EXPECT_EQ(quarantine_state().spans, 0u) << "an adapter that was reset accesses no memory";
}

// Completions that break the protocol close the disk and reset the adapter.
TEST(Pvscsi, ViolationsCloseTheQueue) {
    const auto closes = [](const std::function<void(pvscsi_fake::Adapter&, u64)>& what) {
        Machine& m = attached();
        m.device.hold = m.device.hostile = true;
        const u32 resets = m.device.resets;
        auto data = *m.dma.buffer(4096);
        io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
        m.sink.disks[0]->submit(read);
        m.executor.turn();
        ASSERT_EQ(m.device.held.size(), 1u);
        what(m.device, m.device.held[0].context());
        m.turns(5);
        EXPECT_EQ(read.status, io::Status::protocol_error);
        EXPECT_EQ(m.device.resets, resets + 1);
        EXPECT_EQ(m.device.mask, 0u);
        EXPECT_EQ(quarantine_state().spans, 0u);
        EXPECT_TRUE(m.interrupts.lines.empty()) << "the interrupt is detached";
    };
    using pvscsi_fake::Adapter;
    closes([](Adapter& d, u64) { d.complete(0, 0, 0, 0, 0); });
    closes([](Adapter& d, u64) { d.complete(0x8001, 0, 0, 0, 0); });
    closes([](Adapter& d, u64 context) { d.complete(context | u64{1} << 32, 0, 0, 0, 0); });
    closes([](Adapter& d, u64 context) { d.complete(context ^ 0x10000, 0, 0, 0, 0); }); // another generation
    closes([](Adapter& d, u64 context) { d.complete(context, 4097, 0, 0, 0); });
    closes([](Adapter& d, u64 context) { d.complete(context, 0, 97, 0, 2); });
    closes([](Adapter& d, u64) {
        pvscsi_fake::store<u32>(d.state + 12, pvscsi_fake::load<u32>(d.state + 12) + 2); // more than are under way
        d.causes |= 1;
    });
    closes([](Adapter& d, u64) {
        pvscsi_fake::store<u32>(d.state + 128, 33); // more messages than the ring has
        d.causes |= 4;
    });
}

TEST(Pvscsi, Statuses) {
    const auto status = [](const Reply& reply, bool then_ok) {
        Machine& m = attached();
        m.device.hold = true;
        auto data = *m.dma.buffer(4096);
        io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
        m.sink.disks[0]->submit(read);
        m.executor.turn();
        m.device.answer(0, reply);
        m.device.hold = !then_ok;
        m.turns(10);
        return read.status;
    };
    const auto sense = [](u8 key, u8 asc) {
        return Reply{.status = 2, .sense = {0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, 0, 0, 0, 0, 0}};
    };
    EXPECT_EQ(status({}, false), io::Status::ok);
    EXPECT_EQ(status({.moved = 4096}, false), io::Status::ok);
    EXPECT_EQ(status({.moved = 512}, false), io::Status::io_error) << "part of the data";
    EXPECT_EQ(status({.host = 0x0c, .moved = 512}, false), io::Status::io_error);
    EXPECT_EQ(status({.host = 0x12}, false), io::Status::io_error);
    EXPECT_EQ(status({.host = 0x0a}, false), io::Status::ok) << "LINKED COMMAND COMPLETED";
    EXPECT_EQ(status({.host = 0x11}, false), io::Status::device_gone);
    EXPECT_EQ(status({.host = 0x20}, false), io::Status::io_error);
    EXPECT_EQ(status({.host = 0x77}, false), io::Status::io_error);
    EXPECT_EQ(status({.host = 0x25}, true), io::Status::ok) << "ended by a reset: sent again";
    EXPECT_EQ(status({.status = 8}, true), io::Status::ok) << "BUSY";
    EXPECT_EQ(status(sense(6, 0x29), true), io::Status::ok) << "UNIT ATTENTION";
    EXPECT_EQ(status(sense(3, 0x11), false), io::Status::io_error);
    EXPECT_EQ(status({.status = 2}, false), io::Status::io_error) << "no sense data";
}

TEST(Pvscsi, HotPlug) {
    Machine& m = attached();
    m.device.units[{7, 0}] = {.blocks = 4096};
    m.device.message(0, 0, 7);
    m.turns(200);
    ASSERT_EQ(m.sink.disks.size(), 2u);
    EXPECT_EQ(m.sink.disks[1]->geometry().sectors, 4096u);
    m.device.units.erase({7, 0});
    m.device.message(1, 0, 7);
    m.turns(200);
    EXPECT_TRUE(m.sink.disks[1]->removed());
    EXPECT_FALSE(m.sink.disks[0]->removed());
    m.device.units[{7, 0}] = {.blocks = 2048}; // another one in its place
    m.device.message(0, 0, 7);
    m.turns(200);
    ASSERT_EQ(m.sink.disks.size(), 3u);
    test::CapturedLog log;
    m.device.message(7, 0, 1); // nonsense is ignored
    m.device.message(0, 1, 1);
    m.device.message(0, 0, 65);
    m.device.message(0, 0, 0xffffffff);
    m.turns(50);
    EXPECT_NE(log.text.view().find("a message of type 7"), std::string_view::npos);
    EXPECT_NE(log.text.view().find("target 4294967295"), std::string_view::npos);
    EXPECT_EQ(m.sink.disks.size(), 3u);
    exchange_data(m, 4096);
}

TEST(Pvscsi, WriteZeroes) {
    for (const u32 block : {512u, 4096u}) {
        Machine& m = attached([&](Machine& with) {
            with.device.units[{0, 0}] = {
                .blocks = 8192 * 512 / block, .block_bytes = block, .max_write_same_blocks = 16};
        });
        io::BlockDevice& disk = *m.sink.disks.at(0);
        EXPECT_TRUE(disk.geometry().write_zeroes);
        EXPECT_NE(features(m).find("write-zeroes"), std::string::npos);
        std::memset(m.device.medium.data(), 0x5a, m.device.medium.size());
        const auto zero = [&](u64 lba, u32 blocks) { return m.executor.run(zeroes(disk, lba, blocks * block)); };
        EXPECT_TRUE(zero(3, 20));
        EXPECT_EQ(m.device.zeroings, 2u) << "16 and 4 blocks";
        const auto* medium = reinterpret_cast<const u8*>(m.device.medium.data());
        EXPECT_EQ(medium[3 * block - 1], 0x5a);
        EXPECT_EQ(std::count(medium + 3 * block, medium + 23 * block, u8{0}), 20 * block);
        EXPECT_EQ(medium[23 * block], 0x5a);
        u32 asked = 0;
        m.device.reply_override = [&](const pvscsi_fake::Request& r) -> std::optional<Reply> {
            return r.cdb(0) == 0x93 ? (++asked, std::optional(refusal())) : std::nullopt;
        };
        EXPECT_EQ(zero(0, 1).error().code, Code::not_supported);
        EXPECT_EQ(zero(0, 1).error().code, Code::not_supported);
        EXPECT_EQ(asked, 1u) << "it is not asked again";
    }
    Machine& withheld = attached([](Machine& with) {
        with.device.units[{0, 0}].max_write_same_blocks = 16;
        with.environment.withheld_features = to_underlying(Feature::write_zeroes);
    });
    EXPECT_FALSE(withheld.sink.disks.at(0)->geometry().write_zeroes);
}

TEST(Pvscsi, ANewSizeIsTakenOver) {
    Machine& m = attached();
    io::BlockDevice& disk = *m.sink.disks.at(0);
    for (const u64 blocks : {u64{4096}, u64{8000}}) {
        m.device.units[{0, 0}].blocks = blocks;
        bool told = false;
        m.device.reply_override = [&](const pvscsi_fake::Request& r) -> std::optional<Reply> {
            return r.transfers() && !std::exchange(told, true) // CAPACITY DATA HAS CHANGED
                       ? std::optional(
                             Reply{.status = 2, .sense = {0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x2a, 9, 0, 0, 0, 0}})
                       : std::nullopt;
        };
        exchange_data(m, 4096);
        m.turns(200);
        EXPECT_EQ(disk.geometry().sectors, blocks);
    }
    EXPECT_EQ(m.sink.disks.size(), 1u);
    EXPECT_FALSE(disk.removed());
}

TEST(Pvscsi, SilenceIsEndedByResets) {
    for (const bool answers : {true, false}) {
        Machine& m = attached();
        m.device.hold = true;
        m.device.completes_resets = answers;
        const u32 resets = m.device.resets;
        auto data = *m.dma.buffer(4096);
        io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
        m.sink.disks[0]->submit(read);
        for (u32 i = 0; i < 1000 && read.pending(); ++i) {
            m.turns(1);
        }
        EXPECT_EQ(read.status, io::Status::timed_out);
        EXPECT_NE(std::ranges::count(m.device.commands, 4u), 0) << "RESET_BUS";
        m.turns(5);
        EXPECT_EQ(m.device.resets, answers ? resets : resets + 1) << "ADAPTER_RESET";
        EXPECT_EQ(quarantine_state().spans, 0u);
        m.device.hold = false;
        if (answers) {
            exchange_data(m, 4096);
        } else {
            io::Request late(*m.sink.disks[0], io::Op::read, 0, data.span());
            m.sink.disks[0]->submit(late);
            EXPECT_EQ(late.status, io::Status::device_gone);
        }
    }
}

// One command is lost among others that are answered: aborted, or else the device is reset.
TEST(Pvscsi, ALostCommandIsAborted) {
    for (const bool aborts : {true, false}) {
        Machine& m = attached();
        m.device.hold = true;
        m.device.completes_aborts = aborts;
        io::BlockDevice& disk = *m.sink.disks[0];
        auto data = *m.dma.buffer(8192);
        io::Request lost(disk, io::Op::read, 0, data.span().subspan(0, 4096));
        disk.submit(lost);
        m.executor.turn();
        const u64 context = m.device.held.at(0).context();
        for (u32 i = 0; i < 3000 && lost.pending(); ++i) {
            io::Request other(disk, io::Op::read, 8, data.span().subspan(4096, 4096));
            disk.submit(other);
            m.executor.turn();
            while (m.device.held.size() > 1) {
                m.device.answer(1);
            }
            for (u32 n = 0; n < 10 && other.pending(); ++n) {
                m.turns(1);
                if (other.pending() && m.device.held.size() == 1 && m.device.held[0].context() != context) {
                    m.device.answer(0); // sent again after a reset
                }
            }
            EXPECT_FALSE(other.pending());
        }
        EXPECT_EQ(lost.status, io::Status::timed_out);
        EXPECT_EQ(m.device.aborted, context);
        EXPECT_EQ(std::ranges::count(m.device.commands, 5u) != 0, !aborts) << "RESET_DEVICE";
        EXPECT_FALSE(disk.removed());
        m.device.hold = false;
        exchange_data(m, 4096);
    }
}

// A command of a scan is not answered: aborted, or else its target is reset. The other targets notice nothing.
TEST(Pvscsi, ASilentTargetCostsOnlyItself) {
    enum class Ends : u8 { by_abort, by_device_reset, never };
    for (const Ends ends : {Ends::by_abort, Ends::by_device_reset, Ends::never}) {
        test::CapturedLog log;
        Machine& m = attached();
        m.device.completes_aborts = ends == Ends::by_abort;
        m.device.completes_resets = ends == Ends::by_device_reset;
        m.device.units[{7, 0}] = {.blocks = 4096};
        m.device.silent = {7};
        const u32 resets = m.device.resets;
        m.device.message(0, 0, 7);
        const Instant begin = m.executor.now();
        const auto waited = [&] { return m.executor.now() - begin; };
        const bool recovers = ends != Ends::never;
        const auto finished = [&] { return log.has("pvscsi0: target 7: ") || log.has("is reset and not used"); };
        u64 context = 0;
        for (u32 i = 0; i < 1000 && !finished(); ++i) {
            if (context == 0 && !m.device.held.empty()) {
                context = m.device.held.at(0).context();
            }
            if (waited() < 1'400'000'000) { // the third time-out ends after 1.5 s
                exchange_data(m, 4096);
            }
            m.turns(10);
        }
        EXPECT_LT(waited(), 1'700'000'000u);
        EXPECT_NE(context, 0u);
        EXPECT_EQ(m.device.aborted, context);
        EXPECT_EQ(std::ranges::count(m.device.commands, 5u), ends == Ends::by_abort ? 0 : 1) << "RESET_DEVICE";
        EXPECT_EQ(std::ranges::count(m.device.commands, 4u), 0) << "RESET_BUS";
        m.turns(5);
        EXPECT_EQ(m.device.resets, recovers ? resets : resets + 1) << log.text.view();
        EXPECT_EQ(m.sink.disks[0]->removed(), false);
        EXPECT_EQ(quarantine_state().spans, 0u);
        if (!recovers) {
            auto data = *m.dma.buffer(4096);
            io::Request late(*m.sink.disks[0], io::Op::read, 0, data.span());
            m.sink.disks[0]->submit(late);
            EXPECT_EQ(late.status, io::Status::device_gone) << "its memory may be written to until then";
            continue;
        }
        EXPECT_TRUE(m.device.held.empty());
        exchange_data(m, 65536);
        m.device.silent.clear(); // it can be scanned again
        m.device.message(0, 0, 7);
        m.turns(200);
        ASSERT_EQ(m.sink.disks.size(), 2u);
        EXPECT_EQ(m.sink.disks[1]->geometry().sectors, 4096u);
    }
}

TEST(Pvscsi, Removal) {
    Machine& m = attached();
    m.device.hold = true;
    auto data = *m.dma.buffer(4096);
    io::Request read(*m.sink.disks[0], io::Op::read, 0, data.span());
    m.sink.disks[0]->submit(read);
    m.executor.turn();
    m.device.absent = true;
    m.turns(10);
    EXPECT_EQ(read.status, io::Status::device_gone);
    EXPECT_TRUE(m.sink.disks[0]->removed());
    EXPECT_EQ(quarantine_state().spans, 0u);
}

// ---- what a processor that polls does with interrupts [io::Wait] ----

struct WaitingMachine {
    Machine& m;
    io::BlockDevice& disk = *m.sink.disks.at(0);
    DmaBuffer data = *m.dma.buffer(4096);

    explicit WaitingMachine(io::Wait wait) : m(attached()) {
        m.turns(20);
        m.executor.set_wait(wait);
        m.device.hold = true;
    }
    u64 interrupts() const { return disk.counters().interrupts; }
    /// A read that is answered after `turns` turns.
    void read(u32 turns) {
        io::Request request(disk, io::Op::read, 8, data.span());
        disk.submit(request);
        m.turns(turns);
        ASSERT_EQ(m.device.held.size(), 1u);
        m.device.answer(0);
        m.turns(3);
        ASSERT_FALSE(request.pending());
        EXPECT_EQ(request.status, io::Status::ok);
    }
};

TEST(PvscsiWait, APollingProcessorMasksCompletions) {
    WaitingMachine w(io::Wait::poll);
    const u64 before = w.interrupts();
    for (int i = 0; i < 100; ++i) {
        w.read(3);
    }
    EXPECT_LE(w.interrupts() - before, 1u) << "the one that showed that they are not needed";
    EXPECT_EQ(w.m.device.mask, 0xcu) << "messages only";
    w.m.device.hold = false;
    w.m.device.units[{3, 0}] = {.blocks = 8192};
    w.m.device.message(0, 0, 3);
    w.m.turns(200);
    EXPECT_EQ(w.m.sink.disks.size(), 2u) << "a target that was added";
    // As before, for a processor that does not poll any more.
    w.m.device.hold = true;
    w.m.executor.set_wait(io::Wait::interrupt);
    const u64 asleep = w.interrupts();
    for (int i = 0; i < 10; ++i) {
        w.read(3);
        EXPECT_EQ(w.m.device.mask, 0xfu);
    }
    EXPECT_GE(w.interrupts() - asleep, 10u);
}

TEST(PvscsiWait, AnAdaptiveProcessorIsInterruptedAfterItsWindow) {
    WaitingMachine w(io::Wait::adaptive);
    const u64 before = w.interrupts();
    for (int i = 0; i < 100; ++i) {
        w.read(3); // well within the window
    }
    EXPECT_LE(w.interrupts() - before, 1u);
    EXPECT_EQ(w.m.device.mask, 0xcu);
    const u64 slow = w.interrupts();
    const u64 idles = w.m.clock.idles;
    w.m.clock.step = 20'000;
    for (int i = 0; i < 10; ++i) {
        w.read(10);
        EXPECT_EQ(w.m.device.mask, 0xfu) << "an interrupt that wakes is wanted";
    }
    EXPECT_GE(w.m.clock.idles - idles, 10u);
    EXPECT_GE(w.interrupts() - slow, 10u);
}

} // namespace
