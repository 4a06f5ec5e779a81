#include <gtest/gtest.h>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "unit/drivers_pci_fake.hpp"

namespace {
using namespace pci_test;

// What a walk finds.
struct Found {
    std::vector<pci::Device> devices;
    u32 unreachable = 0;
    explicit Found(pci::Config& config, u8 first = 0, std::optional<pci::Roots> (*ask)() = nullptr,
                   bool always = false) {
        const auto keep = [](void* context, const pci::Device& d) {
            static_cast<std::vector<pci::Device>*>(context)->push_back(d);
        };
        const pci::Enumerated counted = pci::enumerate(config, keep, &devices, first, ask, always);
        EXPECT_EQ(counted.functions, devices.size());
        unreachable = counted.unreachable;
    }
    std::vector<u32> ids() const {
        std::vector<u32> list;
        for (const pci::Device& d : devices) {
            list.push_back(u32{d.device} << 8 | d.at.bus);
        }
        return list;
    }
};

TEST(Pci, MechanismOneAddressesAsTheSpecificationDraws) {
    // bus 0x12, device 0x1f, function 7, register 0x3c: 1000'0000 0001'0010 1111'1111 0011'1100
    EXPECT_EQ(pci::MechanismOneAddress({0x12, 0x1f, 7}, 0x3d).value(), 0x8012ff3cu);
    EXPECT_EQ(pci::MechanismOneAddress({0, 0, 0}, 0).value(), 0x80000000u);
}

TEST(Pci, FindsFunctionsBehindBridgesOnce) {
    Space space;
    space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    Function& isa = space.add(0, 1, 0, 0x8086, 0x7000, 0x060100);
    isa.bytes[0x0e] = 0x80; // several functions
    space.add(0, 1, 1, 0x8086, 0x7010, 0x010180);
    space.add(0, 1, 3, 0x8086, 0x7113, 0x068000); // a gap at function 2
    space.add(0, 2, 1, 0x1af4, 0x1000, 0x020000); // no function 0: does not exist
    Function& up = space.add(0, 3, 0, 0x1b36, 0x0001, 0x060400);
    up.bytes[0x0e] = 1;
    up.bytes[0x19] = 5; // secondary bus
    space.add(5, 0, 0, 0x1af4, 0x1001, 0x010000);
    Function& loop = space.add(5, 1, 0, 0x1b36, 0x0001, 0x060400);
    loop.bytes[0x0e] = 1;
    loop.bytes[0x19] = 0; // claims to lead back
    Function& same = space.add(5, 2, 0, 0x1b36, 0x0001, 0x060400);
    same.bytes[0x0e] = 1;
    same.bytes[0x19] = 5; // claims to lead to itself
    Function& lower = space.add(5, 3, 0, 0x1b36, 0x0001, 0x060400);
    lower.bytes[0x0e] = 1;
    lower.bytes[0x19] = 2; // a number below its own
    space.add(2, 7, 0, 0x10ec, 0x8139, 0x020000);

    Found found(space);
    EXPECT_EQ(found.ids(), (std::vector<u32>{0x123700, 0x700000, 0x701000, 0x711300, 0x000100, 0x100105, 0x000105,
                                             0x000105, 0x000105, 0x813902}));

    Space empty;
    EXPECT_EQ(Found(empty).devices.size(), 0u);
    EXPECT_LE(empty.reads, 32u);
}

// A host bridge at 00:00.0 and a disk below another root bus, number 0x80; on request, what QEMU's expander shows on
// bus 0.
void two_roots(Space& space, bool expander) {
    space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    if (expander) {
        space.add(0, 3, 0, 0x1b36, 0x0009, 0x060000);
    }
    Function& bridge = space.add(0x80, 0, 0, 0x1b36, 0x0001, 0x060400);
    bridge.bytes[0x0e] = 1;
    bridge.bytes[0x19] = 0x81;
    space.add(0x81, 1, 0, 0x8086, 0x7010, 0x010180);
}
std::optional<pci::Roots> knows_0x80() {
    pci::Roots roots;
    roots.buses.add(0x80);
    return roots;
}
std::optional<pci::Roots> knows_one_of_two() {
    pci::Roots roots;
    roots.buses.add(0x80);
    roots.others = true;
    return roots;
}
std::optional<pci::Roots> knows_nothing() { return std::nullopt; }

TEST(PciRoots, WithOneHostBridgeNobodyIsAskedAndNoBusIsSearched) {
    Space space;
    two_roots(space, false);
    Found found(space, 0, [] {
        ADD_FAILURE() << "asked";
        return std::optional<pci::Roots>{};
    });
    EXPECT_EQ(found.ids(), (std::vector<u32>{0x123700}));
    EXPECT_LE(space.reads, 32u + 4u);
}

TEST(PciRoots, TheNumberThatTheFirmwareGivesIsWalked) {
    Space space;
    two_roots(space, true);
    Found found(space, 0, knows_0x80);
    EXPECT_EQ(found.ids(), (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081}));
    EXPECT_LE(space.reads, 3 * 32u + 20u) << "three buses, no search";
}

TEST(PciRoots, TheFirmwareIsAskedOnRequest) {
    Space space;
    two_roots(space, false);
    EXPECT_EQ(Found(space, 0, knows_0x80, true).ids(), (std::vector<u32>{0x123700, 0x000180, 0x701081}));
    Space quiet;
    two_roots(quiet, false);
    EXPECT_EQ(Found(quiet, 0, knows_nothing, true).ids(), (std::vector<u32>{0x123700}));
    EXPECT_LE(quiet.reads, 32u + 4u);
}

TEST(PciRoots, WithoutAnAnswerEveryBusIsSearched) {
    Space space;
    two_roots(space, true);
    EXPECT_EQ(Found(space, 0, knows_nothing).ids(), (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081}));
    Space none;
    two_roots(none, true);
    EXPECT_EQ(Found(none, 0, nullptr).ids().size(), 4u);
    EXPECT_LE(none.reads, 256u * 32 + 40);
    Space more; // a root whose number is computed
    two_roots(more, true);
    more.add(0xc0, 5, 0, 0x1af4, 0x1042, 0x010000);
    EXPECT_EQ(Found(more, 0, knows_one_of_two).ids(),
              (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081, 0x1042c0}));
}

TEST(PciRoots, AHostBridgeThatIgnoresTheBusNumberShowsNothingTwice) {
    struct Aliasing final : pci::Config {
        Space space;
        u32 read32(pci::Address at, u8 offset) override { return space.read32({0, at.device, at.function}, offset); }
        void write32(pci::Address, u8, u32) override {}
        void write16(pci::Address, u8, u16) override {}
    } config;
    config.space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    config.space.add(0, 1, 0, 0x8086, 0x7010, 0x010180);
    config.space.add(0, 2, 0, 0x8086, 0x1238, 0x060000);
    EXPECT_EQ(Found(config, 0, knows_nothing).devices.size(), 3u);
}

TEST(PciRoots, OfAnotherSegmentTheFirstBusIsTheRoot) {
    Space space;
    space.add(4, 0, 0, 0x8086, 0x0d57, 0x060000);
    space.add(4, 1, 0, 0x1af4, 0x1042, 0x010000);
    EXPECT_EQ(Found(space, 4, nullptr).ids(), (std::vector<u32>{0x0d5704, 0x104204}));
}

// A place whose registers cannot be mapped is not an empty one: it is counted, with all that may be behind it.
TEST(Pci, WhatCannotBeReachedIsCounted) {
    Space space;
    space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    Function& isa = space.add(0, 1, 0, 0x8086, 0x7000, 0x060100);
    isa.bytes[0x0e] = 0x80;
    space.add(0, 1, 1, 0x8086, 0x7010, 0x010180);
    space.add(0, 1, 3, 0x8086, 0x7113, 0x068000);
    Function& up = space.add(0, 3, 0, 0x1b36, 0x0001, 0x060400);
    up.bytes[0x0e] = 1;
    up.bytes[0x19] = 5;
    space.add(5, 0, 0, 0x1af4, 0x1001, 0x010000);
    EXPECT_EQ(Found(space).unreachable, 0u);

    space.unreachable = {{0, 1, 1}, {0, 1, 7}, {0, 9, 0}, {5, 0, 0}};
    Found some(space);
    EXPECT_EQ(some.ids(), (std::vector<u32>{0x123700, 0x700000, 0x711300, 0x000100}));
    EXPECT_EQ(some.unreachable, 4u);

    for (int device = 0; device < 32; ++device) { // the whole bus behind a bridge
        space.unreachable.insert({5, device, 0});
    }
    EXPECT_EQ(Found(space).unreachable, 3 + 32u);
    space.unreachable = {{0, 0, 0}, {0, 1, 0}, {0, 3, 0}};
    Found none(space, 0, knows_0x80, true);
    EXPECT_EQ(none.ids().size(), 0u);
    EXPECT_EQ(none.unreachable, 3u);
}

TEST(Pci, ABusFullOfRootPortsWithADeviceEach) {
    Space space;
    int bus = 1;
    for (int d = 0; d < 31; ++d) {
        for (int f = 0; f < 8; ++f, ++bus) {
            Function& port = space.add(0, d, f, 0x1b36, 0x000c, 0x060400);
            port.bytes[0x0e] = 0x81;
            port.bytes[0x19] = static_cast<u8>(bus);
            space.add(bus, 0, 0, 0x1af4, 0x1042, 0x010000);
        }
    }
    space.add(0, 31, 0, 0x8086, 0x7010, 0x010180);
    Found found(space);
    EXPECT_EQ(found.devices.size(), 2 * 248u + 1);
    EXPECT_EQ(found.devices.back().at, (pci::Address{248, 0, 0}));
}

TEST(Pci, SizesBarsAndPutsThemBack) {
    Space space;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010180);
    f.set16(4, 0x0007);
    f.set32(0x10, 0xc041);
    f.bar_mask[0] = 0xfff0; // 16 bits of ports, 16 of them
    f.set32(0x14, 0xfebd0008);
    f.bar_mask[1] = 0xffff0000;
    f.set32(0x18, 0xe000000c);
    f.set32(0x1c, 0x00000008);
    f.bar_mask[2] = 0xf0000000;
    f.bar_mask[3] = 0xffffffff;
    f.set32(0x24, 0x00000004); // 64 bits in the last register
    f.bar_mask[5] = 0xfffff000;
    const pci::Device d = *pci::look_up(space, {0, 1, 0});

    const pci::Bar io = *d.bar(0);
    EXPECT_EQ(io.kind, pci::Bar::Kind::io);
    EXPECT_EQ(io.base, 0xc040u);
    EXPECT_EQ(io.size, 16u);
    const pci::Bar memory = *d.bar(1);
    EXPECT_EQ(memory.kind, pci::Bar::Kind::memory32);
    EXPECT_TRUE(memory.prefetchable);
    EXPECT_EQ(memory.base, 0xfebd0000u);
    EXPECT_EQ(memory.size, 0x10000u);
    const pci::Bar wide = *d.bar(2);
    EXPECT_EQ(wide.kind, pci::Bar::Kind::memory64);
    EXPECT_EQ(wide.base, 0x8e0000000u);
    EXPECT_EQ(wide.size, 0x10000000u);
    EXPECT_EQ(d.bar(4)->kind, pci::Bar::Kind::none);
    EXPECT_EQ(d.bar(5).error().code, Code::protocol);
    EXPECT_EQ(d.bar(6).error().code, Code::bad_argument);

    EXPECT_FALSE(space.sized_while_decoding);
    EXPECT_EQ(f.get32(4) & 0xffff, 7u);
    EXPECT_EQ(f.get32(0x10), 0xc041u);
    EXPECT_EQ(f.get32(0x18), 0xe000000cu);
    EXPECT_EQ(f.get32(0x1c), 8u);
}

TEST(Pci, CapabilityListsWithLoopsEnd) {
    Space space;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010180);
    f.bytes[0x34] = 0x42; // low bits are to be ignored
    f.bytes[0x40] = 0x01;
    f.bytes[0x41] = 0x50;
    f.bytes[0x50] = 0x05;
    f.bytes[0x51] = 0x40; // back to the first
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    EXPECT_FALSE(d.capability(pci::CapabilityId::msi)) << "status says there is no list";
    f.set16(6, 0x0010);
    EXPECT_EQ(d.capability(pci::CapabilityId::msi), u8{0x50});
    EXPECT_FALSE(d.capability(pci::CapabilityId::msix));
}

TEST(Pci, CommandBitsAreWrittenOnlyWhenTheyChange) {
    Space space;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010180);
    f.set16(4, 0x0401);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    d.change_command(pci::Command::bus_master, pci::Command::interrupt_disable);
    EXPECT_EQ(f.get32(4), 5u);
    d.change_command(pci::Command::bus_master);
    EXPECT_EQ(space.command_writes, 1u);
}

TEST(Pci, MatchesWithWildcards) {
    const pci::Device d{.vendor = 0x8086, .device = 0x7010, .class_code = 1, .subclass = 1, .prog_if = 0x80};
    const pci::Match by_class[] = {{.class_code = 2}, {.class_code = 1, .subclass = 1}};
    const pci::Match by_id[] = {{.vendor = 0x8086, .device = 0x7111}};
    EXPECT_TRUE(pci::matches(by_class, d));
    EXPECT_FALSE(pci::matches(by_id, d));
    EXPECT_TRUE(pci::Match{}.matches(d));
}

} // namespace
