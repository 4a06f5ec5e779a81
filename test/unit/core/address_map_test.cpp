#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.address_map;
import core.paging;
import core.result;

namespace {
using namespace fl;

constexpr u64 K4 = 4096;
constexpr u64 TiB = u64{1} << 40;

class Tables final : public TableMemory {
  public:
    Result<u64> new_table() override {
        if (left == 0) {
            return Error(Code::exhausted, "no table");
        }
        --left;
        const u64 at = 0x100000 + frames.size() * K4;
        frames[at].assign(512, 0);
        return at;
    }
    u64* view(u64 physical) override {
        ++views;
        return frames.at(physical).data();
    }
    std::map<u64, std::vector<u64>> frames;
    u64 left = 1000;
    u64 views = 0;
};

struct Machine {
    Tables tables;
    AddressSpace space{tables};
    MmioSpace mmio{space};
    explicit Machine(u32 bits = 52) {
        EXPECT_TRUE(space.create({.no_execute = true, .gigabyte_pages = true, .physical_end = u64{1} << bits}));
    }
    // Every page of the range is mapped at that address, uncached.
    void check(u64 address, u64 physical, u64 size) const {
        for (u64 done = 0; done < size;) {
            const auto there = space.find(address + done);
            ASSERT_TRUE(there) << std::hex << address + done;
            EXPECT_EQ(there->physical, physical + done);
            EXPECT_EQ(there->protection, (Protection{.write = true, .uncached = true}));
            done += there->page - (address + done) % there->page;
        }
        EXPECT_EQ(mmio.physical_of(address), physical);
        EXPECT_EQ(mmio.physical_of(address + size - 1), physical + size - 1);
    }
};

// Literal values, not taken from the map: what a mapping of any physical address must not touch.
TEST(AddressMap, TheRegionsAreApart) {
    EXPECT_TRUE(are_disjoint(address_regions));
    EXPECT_EQ(direct_map.begin + (u64{1} << 46), 0xffffc00000000000u);
    EXPECT_LE(direct_map.begin + direct_map.size, mmio_map.begin);
    EXPECT_LE(mmio_map.begin + mmio_map.size, 0xffffe00000000000u) << "stacks";
    EXPECT_LE(stack_map.begin + stack_map.size, mmio_windows.begin);
    EXPECT_LE(mmio_windows.begin + mmio_windows.size, 0xffffffff80000000u) << "the image";
    EXPECT_EQ(image_map.end(), 0u);

    EXPECT_FALSE(
        are_disjoint(std::array{AddressRegion{0xffff800000000000, 2 * TiB}, AddressRegion{0xffff810000000000, 1}}));
    EXPECT_FALSE(are_disjoint(std::array{AddressRegion{0xffffc00000000000, u64{1} << 47}})) << "past the end";
    EXPECT_FALSE(are_disjoint(std::array{AddressRegion{0x7fff00000000, TiB}})) << "the lower half";
    EXPECT_FALSE(are_disjoint(std::array{AddressRegion{0xffffc00000000000, 0}}));
    EXPECT_TRUE(
        are_disjoint(std::array{AddressRegion{0xffff800000000000, TiB}, AddressRegion{0xffff810000000000, TiB}}));
}

TEST(MmioSpace, EveryPhysicalAddressCanBeMapped) {
    Machine m;
    std::map<u64, u64> taken; // address, end
    // The local APIC, a BAR at the end of 46 bits, around 32 TiB, at the ends of 48 and 52 bits.
    const u64 bases[] = {0xfee00000,          0x3fffffffc000, 32 * TiB - K4,   32 * TiB,
                         0xfffffff00000 + K4, u64{1} << 51,   0xffffffffff000, 0x0000fc0000000000};
    for (const u64 base : bases) {
        const auto at = m.mmio.map(base, K4);
        ASSERT_TRUE(at) << std::hex << base;
        m.check(*at, base, K4);
        EXPECT_TRUE(mmio_map.has(*at) || mmio_windows.has(*at));
        EXPECT_EQ(mmio_map.has(*at), base < 32 * TiB);
        EXPECT_TRUE(taken.emplace(*at, *at + K4).second);
        EXPECT_EQ(*m.mmio.map(base, K4), *at) << "the same address for the same range";
        EXPECT_EQ(*m.mmio.map(base + 0x123, 4), *at + 0x123);
    }
    EXPECT_EQ(m.mmio.map(u64{1} << 52, K4).error().code, Code::bad_argument);
    EXPECT_EQ(m.mmio.map(0xffffffffff000, K4 + 1).error().code, Code::bad_argument);
    EXPECT_EQ(m.mmio.map(~u64{0} - 10, 100).error().code, Code::bad_argument);
    EXPECT_EQ(m.mmio.map(0xfee00000, 0).error().code, Code::bad_argument);
    Machine small(40);
    EXPECT_EQ(small.mmio.map(TiB, K4).error().code, Code::bad_argument);
    EXPECT_TRUE(small.mmio.map(TiB - K4, K4));
}

TEST(MmioSpace, ARangeAcrossTheEndOfTheFixedPartIsOneWindow) {
    Machine m;
    const u64 base = 32 * TiB - 2 * K4;
    const u64 at = *m.mmio.map(base, 4 * K4);
    EXPECT_TRUE(mmio_windows.has(at));
    m.check(at, base, 4 * K4);
}

TEST(MmioSpace, WindowsDoNotOverlap) {
    Machine m;
    const u64 base = 0xf00000000000;
    const u64 first = *m.mmio.map(base, 0x4000);
    const u64 second = *m.mmio.map(base + 0x10000000000, 3_GiB);
    const u64 third = *m.mmio.map(base + 0x4000, 0x4000); // adjacent to the first
    m.check(first, base, 0x4000);
    m.check(second, base + 0x10000000000, 3_GiB);
    m.check(third, base + 0x4000, 0x4000);
    EXPECT_EQ(m.space.find(second)->page, 1_GiB) << "large pages where they fit";
    for (const u64 end : {first + 0x4000, second + 3_GiB, third + 0x4000}) {
        EXPECT_FALSE(m.space.find(end)) << "a gap after each";
    }
    // Within an existing mapping: the same address. Past its end: a new mapping for all of it.
    EXPECT_EQ(*m.mmio.map(base + 0x1004, 8), first + 0x1004);
    EXPECT_EQ(*m.mmio.map(base + 0x10000000000 + 2_GiB + 0x5000, 0x1000), second + 2_GiB + 0x5000);
    const u64 both = *m.mmio.map(base, 0x8000);
    EXPECT_NE(both, first);
    m.check(both, base, 0x8000);
    EXPECT_EQ(*m.mmio.map(base, 0x8000), both);
    EXPECT_EQ(*m.mmio.map(base + 0x3000, 0x2000), both + 0x3000);
    m.check(first, base, 0x4000);
}

TEST(MmioSpace, RunningOutIsAnError) {
    Machine m;
    const u64 base = u64{1} << 50;
    const u64 size = u64{1} << 42;
    ASSERT_TRUE(m.mmio.map(base, size));
    const auto second = m.mmio.map(base + size, size); // 8 TiB without the gap
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code, Code::exhausted);
    EXPECT_TRUE(m.mmio.map(base + size, size / 2));
    m.tables.left = 0;
    EXPECT_EQ(m.mmio.map(0xfee00000, K4).error().code, Code::exhausted);
    EXPECT_EQ(m.mmio.map(base + 2 * size, K4).error().code, Code::exhausted);
    m.tables.left = 100;
    EXPECT_TRUE(m.mmio.map(0xfee00000, K4));
}

TEST(MmioSpace, MemoryIsNoPlaceForRegisters) {
    Machine m;
    ASSERT_TRUE(m.space.map(direct_map.begin + 0x100000, 0x100000, 0x80000, {.write = true}));
    EXPECT_EQ(m.mmio.check_no_memory(0x100000, 4).error().code, Code::protocol);
    EXPECT_EQ(m.mmio.check_no_memory(0x17ffff, 1).error().code, Code::protocol);
    EXPECT_EQ(m.mmio.check_no_memory(0xff000, 0x1001).error().seen, 0x100000u);
    EXPECT_EQ(m.mmio.check_no_memory(0, 1_GiB).error().code, Code::protocol);
    EXPECT_TRUE(m.mmio.check_no_memory(0xff000, 0x1000));
    EXPECT_TRUE(m.mmio.check_no_memory(0x180000, 64_GiB));
    EXPECT_TRUE(m.mmio.check_no_memory(u64{1} << 46, TiB)) << "beyond what the direct map has";
    EXPECT_TRUE(m.mmio.check_no_memory((u64{1} << 46) - K4, TiB));
    m.tables.views = 0;
    EXPECT_TRUE(m.mmio.check_no_memory(1 * TiB, 32 * TiB));
    EXPECT_LT(m.tables.views, 1000u) << "empty tables are passed over at once";
}

TEST(MmioSpace, WhatIsMappedStaysAndGapsAreFilled) {
    Machine m;
    ASSERT_TRUE(m.mmio.map(0xfeb03000, K4));
    ASSERT_TRUE(m.mmio.map(0xfea00000, 0x200000)); // 2 MiB page below it, and the missing part around it
    m.check(mmio_map.begin + 0xfea00000, 0xfea00000, 0x200000);
    const u64 at = *m.mmio.map(0xfeb02ffe, 4);
    EXPECT_EQ(at, mmio_map.begin + 0xfeb02ffe);
}

TEST(AddressMap, CountsWhatIsNotMapped) {
    Machine m;
    const u64 base = direct_map.begin;
    ASSERT_TRUE(m.space.map(base + 2_GiB + 0x5000, 0x5000, K4, {}));
    EXPECT_EQ(m.space.unmapped(base, 4_GiB), 2_GiB + 0x5000);
    EXPECT_EQ(m.space.unmapped(base + 2_GiB + 0x5000, K4), 0u);
    EXPECT_EQ(m.space.unmapped(base + 2_GiB + 0x6000, K4), K4);
    EXPECT_EQ(m.space.unmapped(base + 2_GiB + 0x6000, 8 * TiB), 8 * TiB);
    EXPECT_EQ(m.space.unmapped(base, 0x1000), 0x1000u);
    // From the middle of an absent table to just after it.
    ASSERT_TRUE(m.space.map(base + 5_GiB, 0x5000, K4, {}));
    EXPECT_EQ(m.space.unmapped(base + 4_GiB + 512_MiB, 1_GiB), 512_MiB);
}

} // namespace
