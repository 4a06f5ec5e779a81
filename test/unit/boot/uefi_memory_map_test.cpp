#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import boot.handoff;
import boot.uefi.memory_map;

namespace {
using namespace fl;
using namespace fl::boot;

// Descriptors as laid out by the firmware, byte by byte from the specification: type at 0, physical start at 8, virtual
// start at 16, number of pages at 24, attributes at 32; the stride is larger, as with real firmware.
struct Map {
    static constexpr std::size_t stride = 48;
    std::vector<std::byte> bytes;

    void put(std::size_t at, std::uint64_t value, int size) {
        for (int i = 0; i < size; ++i) {
            bytes.at(at + static_cast<std::size_t>(i)) = static_cast<std::byte>(value >> (8 * i));
        }
    }
    Map& add(std::uint32_t type, std::uint64_t start, std::uint64_t pages, std::uint64_t attributes = 0xf) {
        const std::size_t at = bytes.size();
        bytes.resize(at + stride, std::byte{0xa5});
        put(at, type, 4);
        put(at + 8, start, 8);
        put(at + 16, 0x5555555555555555, 8);
        put(at + 24, pages, 8);
        put(at + 32, attributes, 8);
        return *this;
    }
};

std::vector<MemoryRange> ranges_of(const BootInfo& info) { return {info.memory().begin(), info.memory().end()}; }

TEST(UefiMemoryMap, NamesEveryType) {
    const MemoryKind expected[] = {
        MemoryKind::reserved,         // 0 EfiReservedMemoryType
        MemoryKind::usable,           // 1 EfiLoaderCode
        MemoryKind::usable,           // 2 EfiLoaderData
        MemoryKind::usable,           // 3 EfiBootServicesCode
        MemoryKind::usable,           // 4 EfiBootServicesData
        MemoryKind::reserved,         // 5 EfiRuntimeServicesCode
        MemoryKind::reserved,         // 6 EfiRuntimeServicesData
        MemoryKind::usable,           // 7 EfiConventionalMemory
        MemoryKind::unusable,         // 8 EfiUnusableMemory
        MemoryKind::acpi_reclaimable, // 9 EfiACPIReclaimMemory
        MemoryKind::acpi_nvs,         // 10 EfiACPIMemoryNVS
        MemoryKind::reserved,         // 11 EfiMemoryMappedIO
        MemoryKind::reserved,         // 12 EfiMemoryMappedIOPortSpace
        MemoryKind::reserved,         // 13 EfiPalCode
        MemoryKind::persistent,       // 14 EfiPersistentMemory
        MemoryKind::reserved,         // 15 EfiUnacceptedMemoryType
        MemoryKind::reserved,         // 16: not defined yet
    };
    for (std::uint32_t type = 0; type < std::size(expected); ++type) {
        EXPECT_EQ(uefi::kind_of(type, 0xf), expected[type]) << type;
    }
    EXPECT_EQ(uefi::kind_of(0x80000000, 0xf), MemoryKind::reserved);       // defined by an operating system
    EXPECT_EQ(uefi::kind_of(7, 0x8000000000000000), MemoryKind::reserved); // the firmware keeps using it
    EXPECT_EQ(uefi::kind_of(7, 0x40000), MemoryKind::reserved);            // special purpose
}

TEST(UefiMemoryMap, JoinsNeighboursOfOneKind) {
    Map map;
    map.add(7, 0, 0xa0)
        .add(3, 0x100000, 0x100)
        .add(2, 0x200000, 0x200)
        .add(7, 0x400000, 0x400)
        .add(9, 0x800000, 8)
        .add(4, 0x808000, 8);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    const auto r = ranges_of(info);
    ASSERT_EQ(r.size(), 4u);
    EXPECT_EQ(r[0].base, 0u);
    EXPECT_EQ(r[0].size, 0xa0000u);
    EXPECT_EQ(r[1].base, 0x100000u);
    EXPECT_EQ(r[1].size, 0x700000u);
    EXPECT_EQ(r[1].kind, MemoryKind::usable);
    EXPECT_EQ(r[2].base, 0x800000u);
    EXPECT_EQ(r[2].size, 0x8000u);
    EXPECT_EQ(r[2].kind, MemoryKind::acpi_reclaimable);
    EXPECT_EQ(r[3].base, 0x808000u);
    EXPECT_EQ(info.ranges_truncated, 0u);
}

TEST(UefiMemoryMap, SortsAndJoinsAMapInAnyOrder) {
    Map map;
    map.add(7, 0x400000, 0x400).add(2, 0x200000, 0x200).add(7, 0x100000, 0x100);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    ASSERT_EQ(info.range_count, 1u);
    EXPECT_EQ(info.ranges[0].base, 0x100000u);
    EXPECT_EQ(info.ranges[0].size, 0x700000u);
}

TEST(UefiMemoryMap, AMapOfManyPiecesStillFits) {
    Map map;
    for (std::uint64_t i = 0; i < 4000; ++i) {
        map.add(i % 2 == 0 ? 4 : 7, 0x100000 + i * 0x1000, 1); // all usable: one range
    }
    // In reverse order, so that no piece merges with the previous one.
    for (std::uint64_t i = 600; i-- > 0;) {
        map.add(7, 0x10000000 + i * 0x1000, 1);
    }
    map.add(10, 0x20000000, 16);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    EXPECT_EQ(info.range_count, 3u);
    EXPECT_EQ(info.ranges_truncated, 0u);
    EXPECT_EQ(info.ranges[1].size, 600u * 0x1000);
}

TEST(UefiMemoryMap, WhatDoesNotFitIsNotTheUsableMemory) {
    Map map;
    for (std::uint64_t i = 0; i < 300; ++i) {
        map.add(0, i * 0x10000, 1);
    }
    map.add(7, 0x10000000, 0x100);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    EXPECT_EQ(info.ranges_truncated, 1u);
    EXPECT_EQ(info.range_count, BootInfo::max_given_ranges);
    const auto usable = [](const MemoryRange& r) { return r.kind == MemoryKind::usable && r.base == 0x10000000; };
    const auto r = ranges_of(info);
    EXPECT_TRUE(std::any_of(r.begin(), r.end(), usable));
}

TEST(UefiMemoryMap, WhatDoesNotFitIsCutOutOfTheUsableMemory) {
    Map map;
    map.add(7, 0x10000000, 0x10000);
    for (std::uint64_t i = 0; i < 300; ++i) {
        map.add(0, i * 0x10000, 1);
    }
    map.add(0, 0x10008000, 0x10).add(7, 0x30000000, 0x100).add(0, 0x30000000, 0x80);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    EXPECT_EQ(info.ranges_truncated, 1u);
    info.kernel_phys = 0x10800000;
    info.kernel_size = 0x200000;
    normalise(info);
    std::uint64_t usable = 0;
    for (const MemoryRange& r : info.memory()) {
        if (r.kind == MemoryKind::usable) {
            usable += r.size;
            for (const auto& [base, size] :
                 {std::pair{0x10008000, 0x10000}, std::pair{0x30000000, 0x80000}, std::pair{0x10800000, 0x200000}}) {
                EXPECT_TRUE(r.base + r.size <= std::uint64_t(base) || std::uint64_t(base + size) <= r.base) << base;
            }
        }
    }
    EXPECT_GT(usable, 0x0d000000u);
}

TEST(UefiMemoryMap, AbsurdDescriptorsAreCut) {
    Map map;
    map.add(7, 0x100000, 0)
        .add(7, 0xfffffffffffff000, 0xffffffffffffffff)
        .add(7, 0x200000, 0xfffffffffffffff)
        .add(7, 0x300123, 1);
    BootInfo info{};
    ASSERT_TRUE(uefi::add_memory_map(info, map.bytes, Map::stride));
    for (const MemoryRange& r : info.memory()) {
        EXPECT_GT(r.base + r.size, r.base);
    }
    EXPECT_TRUE(uefi::windows_of(map.bytes, Map::stride));
}

TEST(UefiMemoryMap, RefusesAMapThatIsNone) {
    Map map;
    map.add(7, 0x100000, 1);
    BootInfo info{};
    EXPECT_FALSE(uefi::add_memory_map(info, map.bytes, 39));
    EXPECT_FALSE(uefi::add_memory_map(info, map.bytes, 0));
    EXPECT_FALSE(uefi::add_memory_map(info, map.bytes, 47));
    EXPECT_FALSE(uefi::add_memory_map(info, map.bytes, 1u << 20));
    EXPECT_FALSE(uefi::add_memory_map(info, {}, Map::stride));
    EXPECT_FALSE(uefi::windows_of({}, Map::stride));
    map.bytes.pop_back();
    EXPECT_FALSE(uefi::add_memory_map(info, map.bytes, Map::stride));
    EXPECT_EQ(info.range_count, 0u);
}

constexpr std::uint64_t gib = 1ull << 30;

TEST(UefiWindows, CoverTheFirstFourGibAndAllMemory) {
    Map map;
    map.add(7, 0, 0xa0)
        .add(7, 5 * gib + 0x1000, 1)
        .add(4, 6 * gib, 0x40000)
        .add(14, 100 * gib, 0x40000)
        .add(11, 200 * gib, 0x40000);
    const auto windows = uefi::windows_of(map.bytes, Map::stride);
    ASSERT_TRUE(windows);
    const auto w = windows->view();
    ASSERT_EQ(w.size(), 3u); // device ranges are excluded
    EXPECT_EQ(w[0].begin, 0u);
    EXPECT_EQ(w[0].end, 4 * gib);
    EXPECT_EQ(w[1].begin, 5 * gib);
    EXPECT_EQ(w[1].end, 7 * gib);
    EXPECT_EQ(w[2].begin, 100 * gib);
    EXPECT_EQ(w[2].end, 101 * gib);
}

TEST(UefiWindows, JoinTheClosestWhenThereAreTooMany) {
    uefi::Windows windows;
    for (std::uint64_t i = 0; i < 40; ++i) {
        windows.add((10 + i * 10 + (i == 20 ? 7 : 0)) * gib, 4096);
    }
    const auto w = windows.view();
    ASSERT_LE(w.size(), uefi::Windows::max_windows);
    for (std::size_t i = 0; i + 1 < w.size(); ++i) {
        EXPECT_LT(w[i].end, w[i + 1].begin);
    }
    for (std::uint64_t i = 0; i < 40; ++i) {
        const std::uint64_t at = (10 + i * 10 + (i == 20 ? 7 : 0)) * gib;
        EXPECT_TRUE(std::any_of(w.begin(), w.end(), [&](const uefi::Window& x) {
            return x.begin <= at && at + 4096 <= x.end;
        })) << i;
    }
}

TEST(UefiWindows, StopAtTheLowerHalf) {
    uefi::Windows windows;
    windows.add(1ull << 47, 4096);
    windows.add((1ull << 47) - gib, ~0ull);
    windows.add(~0ull, ~0ull);
    ASSERT_EQ(windows.view().size(), 2u);
    EXPECT_EQ(windows.view()[1].end, 1ull << 47);
}

} // namespace
