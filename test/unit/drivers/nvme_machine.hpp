// An NVMe controller in memory behind PCI, with the driver's environment, for the tests of drivers.nvme. Include after
// the imports.
#pragma once
#include "gtest_macros.hpp"

#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/nvme_fake.hpp"
import test.gtest;
import host.std;

namespace nvme_machine {
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
/// Turns until `done`, at most `turns`.
template <class Done>
bool turn_until(Machine& m, Done done, u32 turns = 4000) {
    for (u32 i = 0; i < turns && !done(); ++i) {
        m.deliver();
        m.executor.turn();
    }
    return done();
}

inline std::unique_ptr<Machine> machine(Options options = {}, u32 withheld = 0) {
    return std::make_unique<Machine>(options, withheld);
}

inline std::string failure(Options options) {
    // kept: a task of a failed controller may refer to it
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(machine(options));
    const auto done = all.back()->probe();
    EXPECT_TRUE(all.back()->sink.disks.empty());
    return done ? std::string() : std::string(done.error().message);
}

// Never destroyed: an attached controller lives as long as its machine.
inline Machine& attached(Options options = {}, u32 withheld = 0) {
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(machine(options, withheld));
    EXPECT_TRUE(all.back()->probe());
    return *all.back();
}

inline std::string features(Machine& m) { return std::string(m.sink.disks.at(0)->identity().features.view()); }

inline io::Task<Result<void>> copy(io::BlockDevice& disk, DmaSpan from, DmaSpan into) {
    if (auto done = co_await disk.write(8, from); !done) {
        co_return done.error();
    }
    if (auto done = co_await disk.flush(); !done) {
        co_return done.error();
    }
    co_return co_await disk.read(8, into);
}

// A write, a flush and a read of `bytes` at an odd place in a page.
inline void exchange_data(Machine& m, u32 bytes) {
    auto from = *m.dma.buffer(bytes + 4096);
    auto into = *m.dma.buffer(bytes + 4096);
    for (u32 i = 0; i < bytes; ++i) {
        from.data()[512 + i] = static_cast<std::byte>(i * 7 + i / 251);
    }
    EXPECT_TRUE(
        m.executor.run(copy(*m.sink.disks.at(0), from.span().subspan(512, bytes), into.span().subspan(512, bytes))));
    EXPECT_EQ(std::memcmp(from.data() + 512, into.data() + 512, bytes), 0);
}

/// A request of 4 KiB at block 8, in a controller that keeps what it gets.
struct Pending {
    Machine& m;
    DmaBuffer data;
    io::Request request;
    explicit Pending(Machine& machine, io::Op op = io::Op::read)
        : m(machine), data(*m.dma.buffer(4096)), request(*m.sink.disks.at(0), op, 8, data.span()) {
        m.device.hold = true;
        m.sink.disks[0]->submit(request);
        m.executor.turn();
        EXPECT_EQ(m.device.held.size(), 1u);
    }
    bool ended() const { return !request.pending(); }
    /// The controller has a command, and answers what it gets from now on.
    void answer() {
        ASSERT_FALSE(m.device.held.empty());
        m.device.hold = false;
        m.device.answer(0);
    }
};

/// Processors and messages: MSI-X with its table behind BAR 4, and an executor for each of several processors.
struct Messages final : InterruptController {
    struct Held {
        u32 processor;
        u8 vector;
        InterruptHandler handler;
        void* context;
    };
    std::vector<Held> held;
    Result<void> attach_line(InterruptLine, InterruptHandler, void*, u32) override {
        return Error{Code::not_supported, "no lines here"};
    }
    void detach_line(InterruptLine, InterruptHandler, void*) override {}
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error{Code::not_supported, "messages only"};
    }
    Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) override {
        const u8 vector = static_cast<u8>(0x30 + held.size());
        held.push_back({processor, vector, handler, context});
        return InterruptVector{vector, processor, processor};
    }
    Result<InterruptMessage> message_for(InterruptVector v) const override {
        return InterruptMessage{0xfee00000 | u64{v.processor} << 12, v.vector};
    }
    void detach_vector(InterruptVector v) override {
        std::erase_if(held, [&](const Held& h) { return h.vector == v.vector; });
    }
    void deliver(u64 to, u32 data) {
        for (const Held& h : held) {
            if (h.vector == data && h.processor == (to >> 12 & 0xff)) {
                const u32 before = this_processor();
                set_this_processor(h.processor);
                h.handler(h.context);
                set_this_processor(before);
                return;
            }
        }
        ADD_FAILURE() << "a message that nothing is attached for: " << to << " " << data;
    }
};

struct MessageMachine {
    struct Table final : MmioModel {
        std::array<u8, 0x4000> memory{};
        u64 read(u64 at, u32 width) override {
            u64 value = 0;
            std::memcpy(&value, memory.data() + at, width);
            return value;
        }
        void write(u64 at, u32 width, u64 value) override { std::memcpy(memory.data() + at, &value, width); }
        u32 word(u32 vector, u32 at) const {
            u32 value = 0;
            std::memcpy(&value, memory.data() + 0x2000 + 16 * vector + at, 4);
            return value;
        }
    };
    static constexpr u32 entries = 9;
    test::FakeMachine clock;
    std::vector<std::unique_ptr<io::Executor>> executors;
    std::vector<io::Executor*> list;
    test::HeapDma dma;
    Messages interrupts;
    Sink sink;
    pci_test::Space space;
    pci_test::Mapper mapper;
    Table table;
    nvme_fake::Controller device;
    std::vector<bool> pending = std::vector<bool>(entries);
    std::optional<io::TaskGroup> tasks;

    MessageMachine(Options options, u32 processors, u32 vectors = entries, u32 table_at = 0x2000) : device(options) {
        for (u32 i = 0; i < processors; ++i) {
            set_this_processor(i);
            executors.push_back(std::make_unique<io::Executor>(clock.platform(), i));
            list.push_back(executors.back().get());
        }
        set_this_processor(0);
        auto& f = space.add(0, 3, 0, 0x1b36, 0x0010, 0x010802);
        f.set32(0x10, 0x0000'0004);
        f.set32(0x14, 0x0000'00f8);
        f.bar_mask[0] = 0xffff'c000;
        f.bar_mask[1] = 0xffff'ffff;
        f.set32(0x20, 0x0000'000c);
        f.set32(0x24, 0x0000'00f9);
        f.bar_mask[4] = 0xffff'c000;
        f.bar_mask[5] = 0xffff'ffff;
        f.add_capability(0x50, 0x11);
        f.set16(0x52, static_cast<u16>(vectors - 1));
        f.limit16(0x52, 0xc000);
        f.set32(0x54, table_at | 4);
        f.set32(0x58, 0x3000 | 4);
        for (u32 i = 0; i < vectors && 0x2000 + 16 * i + 12 < 0x4000; ++i) {
            table.memory[0x2000 + 16 * i + 12] = 1; // masked after reset
        }
        mapper.places[0xf8'0000'0000] = {&device, 0x4000};
        mapper.places[0xf9'0000'0000] = {&table, 0x4000};
        device.interrupt = [this](u16 vector) { pending.at(vector) = true; };
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<MessageMachine*>(self)->deliver(); };
    }
    void deliver() {
        device.look();
        for (u32 v = 0; v < pending.size(); ++v) {
            if (pending[v] && (table.word(v, 12) & 1) == 0 && table.word(v, 8) != 0) {
                pending[v] = false;
                interrupts.deliver(table.word(v, 0), table.word(v, 8));
            }
        }
    }
    void turn() {
        for (u32 i = 0; i < executors.size(); ++i) {
            set_this_processor(i);
            deliver();
            executors[i]->turn();
        }
        set_this_processor(0);
    }
    template <class Done>
    bool turn_until(Done done, u32 turns = 4000) {
        for (u32 i = 0; i < turns && !done(); ++i) {
            turn();
        }
        return done();
    }
    std::optional<Result<void>> probed;
    Result<void> probe() {
        drivers::Environment with{*executors[0], dma, interrupts, sink, 500'000'000, 0, list, nullptr, mapper};
        tasks.emplace(*executors[0]);
        EXPECT_TRUE(tasks->spawn(run(with)));
        turn_until([&] { return probed.has_value(); });
        return probed.value_or(Error{Code::timed_out, "the probe does not end"});
    }
    io::Task<Result<void>> run(drivers::Environment with) {
        probed = co_await nvme::probe(with, *pci_test::pci::look_up(space, {0, 3, 0}), 0);
        co_return Result<void>{};
    }
};

inline MessageMachine& attached_by_messages(Options options, u32 processors, u32 vectors = MessageMachine::entries,
                                            u32 table_at = 0x2000) {
    static std::vector<std::unique_ptr<MessageMachine>> all; // as attached()
    all.push_back(std::make_unique<MessageMachine>(options, processors, vectors, table_at));
    EXPECT_TRUE(all.back()->probe());
    return *all.back();
}

} // namespace nvme_machine
