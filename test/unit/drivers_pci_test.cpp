#include <gtest/gtest.h>
#include <map>
#include <tuple>
#include <vector>

#include "unit/drivers_pci_fake.hpp"

namespace {
using namespace pci_test;

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

    pci::DeviceList list;
    pci::enumerate(space, list);
    std::vector<u32> ids;
    for (const pci::Device& d : list.all()) {
        ids.push_back(u32{d.device} << 8 | d.at.bus);
    }
    EXPECT_EQ(ids, (std::vector<u32>{0x123700, 0x700000, 0x701000, 0x711300, 0x000100, 0x100105, 0x000105, 0x000105, 0x000105, 0x813902}));
    EXPECT_FALSE(list.truncated);

    Space empty;
    pci::DeviceList none;
    pci::enumerate(empty, none);
    EXPECT_EQ(none.count, 0u);
    EXPECT_LE(empty.reads, 32u);
}

TEST(Pci, MoreFunctionsThanTheListHoldsAreReported) {
    Space space;
    for (int d = 0; d < 32; ++d) {
        for (int f = 0; f < 8; ++f) {
            space.add(0, d, f, 1, 2, 0x010000).bytes[0x0e] = 0x80;
        }
    }
    pci::DeviceList list;
    pci::enumerate(space, list);
    EXPECT_EQ(list.count, pci::DeviceList::capacity);
    EXPECT_TRUE(list.truncated);
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
