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

} // namespace nvme_machine
