#include "gtest_macros.hpp"

#include "unit/core/registers_mock.hpp"
#include "unit/drivers/pci_fake.hpp"
import test.gtest;
import host.std;
import drivers.pci.access;

namespace {
using namespace pci_test;

// What a bus walk finds.
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
    EXPECT_EQ(pci::PortAddress::to({0x12, 0x1f, 7}, 0x3d).raw, 0x8012ff3cu);
    EXPECT_EQ(pci::PortAddress::to({0, 0, 0}, 0).raw, 0x80000000u);
    const auto address = pci::PortAddress::to({0x12, 0x1f, 7}, 0x3d);
    EXPECT_EQ(address.get(pci::PortAddress::bus), 0x12u);
    EXPECT_EQ(address.get(pci::PortAddress::device), 0x1fu);
    EXPECT_EQ(address.get(pci::PortAddress::function), 7u);
    EXPECT_EQ(address.get(pci::PortAddress::dword), 0xfu);
}

TEST(Pci, FindsFunctionsBelowBridgesOnce) {
    Space space;
    space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    Function& isa = space.add(0, 1, 0, 0x8086, 0x7000, 0x060100);
    isa.bytes[0x0e] = 0x80; // multifunction
    space.add(0, 1, 1, 0x8086, 0x7010, 0x010180);
    space.add(0, 1, 3, 0x8086, 0x7113, 0x068000); // a gap at function 2
    space.add(0, 2, 1, 0x1af4, 0x1000, 0x020000); // no function 0: ignored
    Function& up = space.add(0, 3, 0, 0x1b36, 0x0001, 0x060400);
    up.bytes[0x0e] = 1;
    up.bytes[0x19] = 5; // secondary bus
    space.add(5, 0, 0, 0x1af4, 0x1001, 0x010000);
    Function& loop = space.add(5, 1, 0, 0x1b36, 0x0001, 0x060400);
    loop.bytes[0x0e] = 1;
    loop.bytes[0x19] = 0; // claims to lead back to bus 0
    Function& same = space.add(5, 2, 0, 0x1b36, 0x0001, 0x060400);
    same.bytes[0x0e] = 1;
    same.bytes[0x19] = 5; // claims to lead to its own bus
    Function& lower = space.add(5, 3, 0, 0x1b36, 0x0001, 0x060400);
    lower.bytes[0x0e] = 1;
    lower.bytes[0x19] = 2; // a number below its own bus
    space.add(2, 7, 0, 0x10ec, 0x8139, 0x020000);

    Found found(space);
    EXPECT_EQ(found.ids(), (std::vector<u32>{0x123700, 0x700000, 0x701000, 0x711300, 0x000100, 0x100105, 0x000105,
                                             0x000105, 0x000105, 0x813902}));

    Space empty;
    EXPECT_EQ(Found(empty).devices.size(), 0u);
    EXPECT_LE(empty.reads, 32u);
}

// A host bridge at 00:00.0 and a disk below another root bus, number 0x80; optionally, what QEMU's expander shows on
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
std::optional<pci::Roots> root_0x80() {
    pci::Roots roots;
    roots.buses.add(0x80);
    return roots;
}
std::optional<pci::Roots> one_root_of_two() {
    pci::Roots roots;
    roots.buses.add(0x80);
    roots.others = true;
    return roots;
}
std::optional<pci::Roots> no_roots() { return std::nullopt; }

TEST(PciRoots, WithOneHostBridgeNoRootsAreSearched) {
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
    Found found(space, 0, root_0x80);
    EXPECT_EQ(found.ids(), (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081}));
    EXPECT_LE(space.reads, 3 * 32u + 20u) << "three buses, no search";
}

TEST(PciRoots, TheFirmwareIsQueriedOnRequest) {
    Space space;
    two_roots(space, false);
    EXPECT_EQ(Found(space, 0, root_0x80, true).ids(), (std::vector<u32>{0x123700, 0x000180, 0x701081}));
    Space quiet;
    two_roots(quiet, false);
    EXPECT_EQ(Found(quiet, 0, no_roots, true).ids(), (std::vector<u32>{0x123700}));
    EXPECT_LE(quiet.reads, 32u + 4u);
}

TEST(PciRoots, WithoutAnAnswerEveryBusIsSearched) {
    Space space;
    two_roots(space, true);
    EXPECT_EQ(Found(space, 0, no_roots).ids(), (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081}));
    Space none;
    two_roots(none, true);
    EXPECT_EQ(Found(none, 0, nullptr).ids().size(), 4u);
    EXPECT_LE(none.reads, 256u * 32 + 40);
    Space more; // a root whose number is computed
    two_roots(more, true);
    more.add(0xc0, 5, 0, 0x1af4, 0x1042, 0x010000);
    EXPECT_EQ(Found(more, 0, one_root_of_two).ids(),
              (std::vector<u32>{0x123700, 0x000900, 0x000180, 0x701081, 0x1042c0}));
}

TEST(PciRoots, AHostBridgeThatIgnoresTheBusNumberShowsNothingTwice) {
    struct Aliasing final : pci::Config {
        Space space;
        u32 read(pci::Address at, u16 offset, u32 width) override {
            return space.read({0, at.device, at.function}, offset, width);
        }
        void write(pci::Address, u16, u32, u32) override {}
        bool reaches_extended(pci::Address) const override { return false; }
    } config;
    config.space.add(0, 0, 0, 0x8086, 0x1237, 0x060000);
    config.space.add(0, 1, 0, 0x8086, 0x7010, 0x010180);
    config.space.add(0, 2, 0, 0x8086, 0x1238, 0x060000);
    EXPECT_EQ(Found(config, 0, no_roots).devices.size(), 3u);
}

TEST(PciRoots, OfAnotherSegmentTheFirstBusIsTheRoot) {
    Space space;
    space.add(4, 0, 0, 0x8086, 0x0d57, 0x060000);
    space.add(4, 1, 0, 0x1af4, 0x1042, 0x010000);
    EXPECT_EQ(Found(space, 4, nullptr).ids(), (std::vector<u32>{0x0d5704, 0x104204}));
}

// A function whose registers cannot be mapped is not treated as absent: it is counted, with everything possibly below
// it.
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

    for (int device = 0; device < 32; ++device) { // the whole bus below a bridge
        space.unreachable.insert({5, device, 0});
    }
    EXPECT_EQ(Found(space).unreachable, 3 + 32u);
    space.unreachable = {{0, 0, 0}, {0, 1, 0}, {0, 3, 0}};
    Found none(space, 0, root_0x80, true);
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
    f.set32(0x24, 0x00000004); // 64-bit in the last register
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
    f.bytes[0x34] = 0x42; // the low bits must be ignored
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
    d.change_command(pci::Command::of(pci::Command::bus_master), pci::Command::of(pci::Command::interrupt_disable));
    EXPECT_EQ(f.get32(4), 5u);
    d.change_command(pci::Command::of(pci::Command::bus_master));
    EXPECT_EQ(space.command_writes, 1u);
}

// Offsets and bits, written from [PCI-3.0 §6, appendix H] and [PCIe-5.0 §7.5].
TEST(PciRegisters, AreWhereTheSpecificationPutsThem) {
    using namespace pci;
    EXPECT_EQ(Command::offset, 4u);
    EXPECT_EQ(Command::of(Command::interrupt_disable).raw, 0x400u);
    EXPECT_EQ(Command::of(Command::bus_master, Command::memory_space, Command::io_space).raw, 7u);
    EXPECT_EQ(Status::offset, 6u);
    EXPECT_TRUE(Status::from(0x10).get(Status::capabilities_list));
    EXPECT_EQ(Status{}.clear(Status::received_master_abort).raw, 0x2000u);
    EXPECT_EQ(ClassCode::from(0x01080203).get(ClassCode::base_class), 1u);
    EXPECT_EQ(ClassCode::from(0x01080203).get(ClassCode::subclass), 8u);
    EXPECT_EQ(ClassCode::from(0x01080203).get(ClassCode::interface), 2u);
    EXPECT_EQ(ClassCode::from(0x01080203).get(ClassCode::revision), 3u);
    EXPECT_TRUE(HeaderType::from(0x00810000).get(HeaderType::multi_function));
    EXPECT_EQ(HeaderType::from(0x00810000).get(HeaderType::type), 1u);
    EXPECT_EQ(BusNumbers::from(0x00332211).get(BusNumbers::secondary), 0x22u);
    EXPECT_EQ(InterruptPin::from(0x020b).get(InterruptPin::pin), 2u);
    EXPECT_EQ(InterruptPin::from(0x020b).get(InterruptPin::line), 11u);
    EXPECT_EQ(MsiControl::from(0x018b).get(MsiControl::multiple_message_capable), 5u);
    EXPECT_TRUE(
        MsiControl::from(0x018b).has(MsiControl::per_vector_masking, MsiControl::address_64, MsiControl::enable));
    EXPECT_EQ(MsiControl{}.set(MsiControl::multiple_message_enable, 3).raw, 0x30u);
    EXPECT_EQ(msi_data(MsiControl::from(0)), 8u);
    EXPECT_EQ(msi_mask(MsiControl::from(0x100)), 12u);
    EXPECT_EQ(msi_data(MsiControl::from(0x80)), 12u);
    EXPECT_EQ(msi_mask(MsiControl::from(0x180)), 16u);
    EXPECT_EQ(MsixControl::from(0x87ff).get(MsixControl::last_entry), 0x7ffu);
    EXPECT_EQ(MsixControl::of(MsixControl::enable, MsixControl::function_mask).raw, 0xc000u);
    EXPECT_EQ(8 * MsixTable::from(0x3004).get(MsixTable::qword), 0x3000u);
    EXPECT_EQ(MsixTable::from(0x3004).get(MsixTable::bar), 4u);
    EXPECT_EQ(ExtendedCapabilityHeader::from(0x1481000b).get(ExtendedCapabilityHeader::next_dword) * 4, 0x148u);
    EXPECT_EQ(ExtendedCapabilityHeader::from(0x1481000b).get(ExtendedCapabilityHeader::id), 0xbu);
    EXPECT_TRUE(ExpressDeviceCapabilities::from(1u << 28).get(ExpressDeviceCapabilities::function_level_reset));
}

// The entries of a list: id and offset.
std::vector<std::pair<u32, u32>> all_of(pci::Capabilities list) {
    std::vector<std::pair<u32, u32>> all;
    while (const auto c = list.next()) {
        all.emplace_back(c->id, c->offset);
        EXPECT_LE(all.size(), 1024u);
    }
    return all;
}
using Places = std::vector<std::pair<u32, u32>>;

TEST(PciCapabilities, AllOfOneIdAreFound) {
    Space space;
    Function& f = space.add(0, 1, 0, 0x1af4, 0x1042, 0x010000);
    f.add_capability(0x98, 0x11);
    for (u8 at : {0x84, 0x70, 0x60, 0x50}) { // as in QEMU's virtio-blk-pci
        f.add_capability(at, 0x09);
        f.bytes[at + 2] = 0x10;
    }
    f.add_capability(0x40, 0x01);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    EXPECT_EQ(all_of(d.capabilities()), (Places{{0x11, 0x98}, {9, 0x84}, {9, 0x70}, {9, 0x60}, {9, 0x50}, {1, 0x40}}));
    Places vendor;
    for (auto list = d.capabilities(); const auto c = list.next(pci::CapabilityId::vendor);) {
        vendor.emplace_back(c->offset, pci::VendorLength::read(d, c->offset).raw);
    }
    EXPECT_EQ(vendor, (Places{{0x84, 16}, {0x70, 16}, {0x60, 16}, {0x50, 16}}));
    EXPECT_EQ(d.capability(pci::CapabilityId::vendor), u16{0x84});
    EXPECT_FALSE(d.capability(pci::CapabilityId::express));
}

TEST(PciCapabilities, EachPlaceIsVisitedOnce) {
    Space space;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010180);
    f.add_capability(0x40, 1);
    f.add_capability(0x48, 9);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    f.bytes[0x49] = 0x48; // itself
    EXPECT_EQ(all_of(d.capabilities()), (Places{{1, 0x40}, {9, 0x48}}));
    f.bytes[0x49] = 0x40; // the first
    EXPECT_EQ(all_of(d.capabilities()), (Places{{1, 0x40}, {9, 0x48}}));
    f.bytes[0x49] = 0x3c; // the header
    EXPECT_EQ(all_of(d.capabilities()), (Places{{1, 0x40}, {9, 0x48}}));
    f.bytes[0x49] = 0xff; // the last dword: its contents end the list
    f.set16(0xfc, 0xffff);
    EXPECT_EQ(all_of(d.capabilities()), (Places{{1, 0x40}, {9, 0x48}}));
    f.set16(0xfc, 0x0009);
    EXPECT_EQ(all_of(d.capabilities()), (Places{{1, 0x40}, {9, 0x48}, {9, 0xfc}}));
    // Every dword in turn, and then back to the first.
    for (u32 at = 0x40; at < 0x100; at += 4) {
        f.bytes[at] = 9;
        f.bytes[at + 1] = static_cast<u8>(at + 4 < 0x100 ? at + 4 : 0x40);
    }
    EXPECT_EQ(all_of(d.capabilities()).size(), 48u);
    f.bytes[0x34] = 0;
    EXPECT_EQ(all_of(d.capabilities()), Places{});
}

Function& express(Space& space) {
    Function& f = space.add(0, 1, 0, 0x8086, 0x10d3, 0x020000);
    f.add_capability(0xe0, 0x10);
    f.set32(0x100, 0x14010001); // error reporting, next 0x140
    f.set32(0x140, 0x1481000b); // vendor, next 0x148
    f.set32(0x148, 0x0002000b); // vendor, the last one
    return f;
}

TEST(PciCapabilities, ExtendedOnes) {
    Space space;
    Function& f = express(space);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    EXPECT_EQ(all_of(d.extended_capabilities()), (Places{{1, 0x100}, {0xb, 0x140}, {0xb, 0x148}}));
    auto list = d.extended_capabilities();
    EXPECT_EQ(list.next(pci::ExtendedCapabilityId::vendor)->version, 1u);
    EXPECT_EQ(list.next(pci::ExtendedCapabilityId::vendor)->version, 2u);
    EXPECT_FALSE(list.next(pci::ExtendedCapabilityId::vendor));
    f.set32(0x148, 0x1402000b); // a loop
    EXPECT_EQ(all_of(d.extended_capabilities()).size(), 3u);
    f.set32(0x148, 0x0402000b); // into the first 256 bytes
    EXPECT_EQ(all_of(d.extended_capabilities()).size(), 3u);
    f.set32(0x148, 0xfff2000b); // the low bits must be ignored; the entry is empty
    EXPECT_EQ(all_of(d.extended_capabilities()).size(), 3u);
    f.set32(0xffc, 0x0001000b);
    EXPECT_EQ(all_of(d.extended_capabilities()).back(), (std::pair<u32, u32>{0xb, 0xffc}));
    f.set32(0x100, 0); // none at all
    EXPECT_EQ(all_of(d.extended_capabilities()), Places{});
    f.set32(0x100, ~u32{0});
    EXPECT_EQ(all_of(d.extended_capabilities()), Places{});
}

TEST(PciCapabilities, ExtendedOnesAreSoughtOnlyWhereTheyCanBe) {
    Space space;
    Function& f = express(space);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    space.extended = false;
    EXPECT_EQ(all_of(d.extended_capabilities()), Places{});
    space.extended = true;
    f.bytes[0xe0] = 0x12; // no PCI Express capability: offset 0x100 may alias the header
    EXPECT_EQ(all_of(d.extended_capabilities()), Places{});
}

TEST(Pci, PowerOnWritesTheStateAndNothingElse) {
    Space space;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010180);
    const pci::Device d = *pci::look_up(space, {0, 1, 0});
    EXPECT_EQ(d.power_on(), 0u) << "no power management";
    f.add_capability(0x50, 1);
    f.set16(0x54, 0x8100); // PME status, which is write-one-to-clear, and PME enable
    f.cleared_by_ones[0x55] = 0x80;
    u32 writes = 0;
    space.written = [&](u32, u32, u32) { ++writes; };
    EXPECT_EQ(d.power_on(), 0u);
    EXPECT_EQ(writes, 0u);
    f.set16(0x54, 0x8103);
    EXPECT_EQ(d.power_on(), 10'000'000u);
    EXPECT_EQ(f.get16(0x54), 0x8100u);
    f.set16(0x54, 0x8102);
    EXPECT_EQ(d.power_on(), 200'000u);
    EXPECT_EQ(writes, 2u);
}

// ---- mapped BARs ----

struct BarMachine {
    register_test::AccessScript script;
    register_test::ScriptedMmio registers{script, "device"};
    Space space;
    Mapper mapper;
    Function& f = space.add(0, 1, 0, 1, 2, 0x010802);
    BarMachine() {
        f.set32(0x10, 0x00000004); // 64-bit, above 4 GiB
        f.set32(0x14, 0x000000f8);
        f.bar_mask[0] = 0xffffc000;
        f.bar_mask[1] = 0xffffffff;
        f.set32(0x18, 0xc041);
        f.bar_mask[2] = 0xfff0;
        f.set32(0x1c, 0);
        f.bar_mask[3] = 0xfffff000; // no address
        f.set32(0x20, 0x00001000);
        f.bar_mask[4] = 0xfffff000; // overlaps memory
        mapper.places[0xf800000000] = {&registers, 0x4000};
    }
    pci::Device device() { return *pci::look_up(space, {0, 1, 0}); }
};

TEST(PciBars, ARegionOfA64BitBar) {
    BarMachine m;
    m.script.expect_write(0x1014, 4, 7, "device");
    const Mmio region = *m.device().map_bar(m.mapper, 0, 0x1000, 0x20);
    EXPECT_EQ(region.size(), 0x20u);
    region.write<u32>(0x14, 7);
    EXPECT_EQ(m.mapper.maps, (std::vector<std::pair<u64, u64>>{{0xf800001000, 0x20}}));
    EXPECT_EQ(m.f.get16(4), 2u) << "memory decoding";
    EXPECT_EQ(m.device().map_bar(m.mapper, 0)->size(), 0x4000u);
    EXPECT_TRUE(m.device().map_bar(m.mapper, 0, 0x3ff0, 0x10));
}

TEST(PciBars, WhatCannotBeMappedSaysWhy) {
    BarMachine m;
    const auto error = [&](u8 bar, u64 at, u64 size) { return m.device().map_bar(m.mapper, bar, at, size).error(); };
    EXPECT_EQ(error(0, 0x3ff1, 0x10).code, Code::protocol);
    EXPECT_EQ(error(0, 0x4001, 0).code, Code::protocol);
    EXPECT_EQ(error(0, 8, ~u64{0} - 4).code, Code::protocol);
    EXPECT_EQ(m.mapper.maps.size(), 0u) << "bounds come first";
    EXPECT_EQ(error(1, 0, 4).code, Code::protocol);
    EXPECT_NE(error(1, 0, 4).message.find("upper half"), std::string_view::npos);
    EXPECT_EQ(error(2, 0, 4).code, Code::not_supported);
    EXPECT_NE(error(2, 0, 4).message.find("I/O ports"), std::string_view::npos);
    EXPECT_EQ(error(3, 0, 4).code, Code::not_supported);
    EXPECT_NE(error(3, 0, 4).message.find("no address"), std::string_view::npos);
    EXPECT_EQ(error(4, 0, 4).code, Code::protocol) << "the mapper's";
    EXPECT_EQ(error(5, 0, 4).code, Code::not_supported);
    EXPECT_NE(error(5, 0, 4).message.find("does not implement"), std::string_view::npos);
    EXPECT_EQ(error(6, 0, 4).code, Code::bad_argument);
    EXPECT_EQ(error(7, 0, 4).code, Code::bad_argument);
    EXPECT_EQ(m.f.get16(4), 0u) << "nothing was mapped, nothing is decoded";
}

// The upper half of a 64-bit address is not a BAR, even if its bits look like a BAR type.
TEST(PciBars, TheUpperHalfIsNotTakenForARegister) {
    BarMachine m;
    m.f.set32(0x14, 0x4);
    m.f.set32(0x18, 0xd0000000);
    m.f.bar_mask[2] = 0xfffff000;
    m.mapper.places[0xd0000000] = {&m.registers, 0x1000};
    EXPECT_TRUE(m.device().map_bar(m.mapper, 2, 0, 0x1000));
}

// ---- access methods of configuration space ----

using register_test::AccessScript;
using register_test::ScriptedAccess;
using register_test::ScriptedMmio;

TEST(PciPorts, EachAccessIsTheAddressAndThenTheData) {
    AccessScript script;
    pci::PortConfig<ScriptedAccess> ports(ScriptedAccess(script, "port"));
    const pci::Address at{0x12, 0x1f, 7};
    script.expect_write(0xcf8, 4, 0x8012ff3c, "port").expect_read(0xcfc, 4, 0x11223344, "port");
    EXPECT_EQ(ports.read(at, 0x3c, 4), 0x11223344u);
    script.expect_write(0xcf8, 4, 0x8012ff3c, "port").expect_read(0xcfe, 2, 0x1122, "port");
    EXPECT_EQ(ports.read(at, 0x3e, 2), 0x1122u);
    script.expect_write(0xcf8, 4, 0x8012ff3c, "port").expect_read(0xcfd, 1, 0x33, "port");
    EXPECT_EQ(ports.read(at, 0x3d, 1), 0x33u);
    script.expect_write(0xcf8, 4, 0x8012ff04, "port").expect_write(0xcfe, 2, 0xf900, "port");
    ports.write(at, 6, 2, 0xf900);
    script.expect_write(0xcf8, 4, 0x8012ff10, "port").expect_write(0xcfc, 4, 5, "port");
    ports.write(at, 0x10, 4, 5);
    script.expect_write(0xcf8, 4, 0x8012ff3c, "port").expect_write(0xcff, 1, 5, "port");
    ports.write(at, 0x3f, 1, 5);
}

TEST(PciPorts, ArePresentWhenTheAddressIsKept) {
    AccessScript script;
    pci::PortConfig<ScriptedAccess> ports(ScriptedAccess(script, "port"));
    script.expect_read(0xcf8, 4, 0x12345678, "port").expect_write(0xcf8, 4, 0x80000000, "port");
    script.expect_read(0xcf8, 4, 0x80000000, "port").expect_write(0xcf8, 4, 0x12345678, "port");
    EXPECT_TRUE(ports.present());
    script.expect_read(0xcf8, 4, ~u32{0}, "port").expect_write(0xcf8, 4, 0x80000000, "port");
    script.expect_read(0xcf8, 4, ~u32{0}, "port").expect_write(0xcf8, 4, ~u32{0}, "port");
    EXPECT_FALSE(ports.present());
}

TEST(PciPorts, WhatTheyDoNotReachIsAllOnesOrEcams) {
    AccessScript script;
    pci::PortConfig<ScriptedAccess> ports(ScriptedAccess(script, "port"));
    EXPECT_EQ(ports.read({0, 1, 0}, 0x100, 4), ~u32{0});
    EXPECT_EQ(ports.read({0, 1, 0, 1}, 0, 4), ~u32{0}) << "another segment";
    ports.write({0, 1, 0}, 0x100, 4, 0); // no access
    ports.write({0, 1, 0, 1}, 4, 2, 0);
    EXPECT_FALSE(ports.reaches_extended({0, 1, 0}));

    ScriptedMmio memory(script, "ecam");
    Mapper mapper;
    mapper.places[0xb0000000] = {&memory, 0x200000};
    mapper.places[0xc0000000] = {&memory, 0x10000000};
    pci::Ecam low(mapper, 0xb0000000, 0, 1);
    pci::Ecam other(mapper, 0xc0000000, 0, 255, 7);
    ports.use_beyond(low);
    ports.use_beyond(other);
    EXPECT_TRUE(ports.reaches_extended({1, 2, 3}));
    EXPECT_FALSE(ports.reaches_extended({2, 2, 3}));
    script.expect_read(0x113100, 4, 9, "ecam");
    EXPECT_EQ(ports.read({1, 2, 3}, 0x100, 4), 9u);
    script.expect_write(0x113ffe, 2, 9, "ecam");
    ports.write({1, 2, 3}, 0xffe, 2, 9);
    script.expect_read(0x113004, 1, 9, "ecam");
    EXPECT_EQ(ports.read({1, 2, 3, 7}, 4, 1), 9u);
    EXPECT_EQ(ports.read({2, 2, 3}, 0x100, 4), ~u32{0}) << "a bus of no range";
    script.expect_write(0xcf8, 4, 0x80011300, "port").expect_read(0xcfc, 4, 9, "port");
    EXPECT_EQ(ports.read({1, 2, 3}, 0, 4), 9u) << "the first 256 bytes stay with the ports";
}

TEST(PciEcam, ReachesItsBusesOfItsSegment) {
    AccessScript script;
    ScriptedMmio memory(script, "ecam");
    Mapper mapper;
    mapper.places[0x3f0000400000] = {&memory, 0x300000}; // buses 4 to 6; bus 0 would be at 0x3f0000000000
    pci::Ecam ecam(mapper, 0x3f0000000000, 4, 6, 2);
    script.expect_read(0x1ff000, 4, 0x10008086, "ecam").expect_write(0x1ff0fc, 4, 3, "ecam");
    EXPECT_EQ(ecam.read({5, 31, 7, 2}, 0, 4), 0x10008086u);
    ecam.write({5, 31, 7, 2}, 0xfc, 4, 3);
    EXPECT_EQ(mapper.maps.size(), 1u) << "a page is mapped once";
    EXPECT_EQ(ecam.failed_reads(), 0u);
    EXPECT_EQ(ecam.read({3, 0, 0, 2}, 0, 4), ~u32{0});
    EXPECT_EQ(ecam.read({7, 0, 0, 2}, 0, 4), ~u32{0});
    EXPECT_EQ(ecam.read({5, 31, 7, 0}, 0, 4), ~u32{0}) << "another segment";
    EXPECT_EQ(ecam.failed_reads(), 3u);
    ecam.write({5, 31, 7, 0}, 4, 2, 1); // no access
    EXPECT_FALSE(ecam.reaches_extended({5, 31, 7, 1}));
    mapper.places.clear();
    EXPECT_EQ(ecam.read({4, 0, 0, 2}, 0, 4), ~u32{0}) << "no memory for page tables";
    EXPECT_EQ(ecam.failed_reads(), 4u);
}

TEST(PciRoots, FunctionsKnowTheirSegment) {
    Space space;
    space.number = 3;
    space.add(4, 0, 0, 0x8086, 0x0d57, 0x060000);
    Function& up = space.add(4, 3, 0, 0x1b36, 0x0001, 0x060400);
    up.bytes[0x0e] = 1;
    up.bytes[0x19] = 5;
    space.add(5, 2, 0, 0x1af4, 0x1042, 0x010000);
    Found found(space, 4, nullptr);
    ASSERT_EQ(found.devices.size(), 3u);
    EXPECT_EQ(found.devices[2].at, (pci::Address{5, 2, 0, 3}));
    EXPECT_EQ(found.devices[2].read<u16>(2), 0x1042u);
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
