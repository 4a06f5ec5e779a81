#include "gtest_macros.hpp"
#include "unit/core/physical_fake.hpp"
import test.gtest;
import host.std;
import core.result;
import core.physical;
import boot.handoff;
import boot.pvh;

namespace {
using namespace fl;
using namespace fl::boot;

struct Memory final : PhysicalReader, Pieces {
    bool read(u64 address, std::span<std::byte> into) override { return copy(address, into.data(), into.size()); }
};

// Written from xen/include/public/arch-x86/hvm/start_info.h, not from the structures under test.
std::vector<std::uint8_t> golden_start_info() {
    // magic "xEn3" with the top bit, version, flags, modules
    return {0x78, 0xc5, 0x6e, 0x33, 1,    0,    0, 0, 0, 0, 0, 0,
            1,    0,    0,    0,    0x00, 0x20, 0, 0, 0, 0, 0, 0, // modules at 0x2000
            0x00, 0x30, 0,    0,    0,    0,    0, 0,             // command line at 0x3000
            0x50, 0x52, 0x0f, 0,    0,    0,    0, 0,             // RSDP at 0xf5250
            0x00, 0x10, 0,    0,    0,    0,    0, 0,             // memory map at 0x1000
            3,    0,    0,    0,    0,    0,    0, 0};            // entries, reserved
}

struct Pvh : testing::Test {
    Memory memory;
    std::unique_ptr<BootInfo> info = std::make_unique<BootInfo>();
    void SetUp() override {
        memory.put(0x500, golden_start_info());
        memory.put(0x1000, {0, 0, 0,    0,    0, 0, 0, 0, 0x00, 0xfc, 0x09, 0,    0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, //
                            0, 0, 0x10, 0,    0, 0, 0, 0, 0,    0,    0xf0, 0x07, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, //
                            0, 0, 0xfc, 0xff, 0, 0, 0, 0, 0,    0,    4,    0,    0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0});
        memory.put(0x2000,
                   {0, 0, 0x40, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
        memory.put_text(0x3000, std::string("job=boot log=debug\0", 19) + std::string(200, 'x'));
        memory.put_text(0x400000, "# map\n");
    }
    Result<PvhNotes> gather(u64 at = 0x500) {
        *info = {};
        return gather_pvh(memory, at, 1234, *info);
    }
};

TEST_F(Pvh, Version1) {
    const auto notes = gather();
    ASSERT_TRUE(notes);
    EXPECT_FALSE(notes->no_memory_map || notes->cmdline_unreadable || notes->modules_unreadable);
    EXPECT_EQ(notes->extra_modules, 0u);
    EXPECT_TRUE(is_valid(*info));
    EXPECT_EQ(info->entry, Entry::pvh);
    EXPECT_EQ(info->entry_tsc, 1234u);
    EXPECT_EQ(info->rsdp, 0xf5250u);
    EXPECT_EQ(info->cmdline_text(), "job=boot log=debug");
    EXPECT_EQ(info->map_file_text(), "# map\n");
    ASSERT_EQ(info->range_count, 3u);
    EXPECT_EQ(info->ranges[1].base, 0x100000u);
    EXPECT_EQ(info->ranges[1].size, 0x7f00000u);
    EXPECT_EQ(info->ranges[2].base, 0xfffc0000u);
    EXPECT_EQ(info->ranges[2].kind, MemoryKind::reserved);
}

TEST_F(Pvh, Version0HasNoMapAndMayBeShort) {
    auto bytes = golden_start_info();
    bytes.resize(40);
    bytes[4] = 0;
    memory.put(0x500, bytes);
    const auto notes = gather();
    ASSERT_TRUE(notes);
    EXPECT_TRUE(notes->no_memory_map);
    EXPECT_EQ(info->range_count, 0u);
    EXPECT_EQ(info->cmdline_text(), "job=boot log=debug");
    bytes[4] = 1; // claims the longer structure, which is absent
    memory.put(0x500, bytes);
    EXPECT_EQ(gather().error().code, Code::protocol);
}

TEST_F(Pvh, NothingOptionalIsNeeded) {
    auto bytes = golden_start_info();
    for (usize i = 12; i < 40; ++i) {
        bytes[i] = 0;
    }
    memory.put(0x500, bytes);
    const auto notes = gather();
    ASSERT_TRUE(notes);
    EXPECT_FALSE(notes->cmdline_unreadable || notes->modules_unreadable);
    EXPECT_EQ(info->has_map_file, 0u);
    EXPECT_EQ(info->cmdline_size, 0u);
    EXPECT_EQ(info->rsdp, 0u);
}

TEST_F(Pvh, WrongMagicAndPointersToNowhere) {
    EXPECT_EQ(gather(0).error().code, Code::protocol);
    EXPECT_EQ(gather(0x501).error().expected, 0x336ec578u);
    EXPECT_EQ(gather(0xfffffffff0).error().code, Code::protocol);
    EXPECT_EQ(gather(~u64{0}).error().code, Code::protocol);
}

TEST_F(Pvh, PointersOutsideTheMapAreNotRead) {
    // The fake could read at this address; but the loader's own map says that it is not memory.
    memory.put_text(0x20003000, std::string("log=debug\0", 10) + std::string(100, 'x'));
    memory.put(0x20002000, memory[0x2000]);
    auto bytes = golden_start_info();
    bytes[24 + 3] = 0x20; // command line at 0x20003000, module list at 0x20002000
    bytes[16 + 3] = 0x20;
    memory.put(0x500, bytes);
    const auto notes = gather();
    ASSERT_TRUE(notes);
    EXPECT_TRUE(notes->cmdline_unreadable);
    EXPECT_TRUE(notes->modules_unreadable);
    EXPECT_EQ(info->cmdline_size, 0u);
    EXPECT_EQ(info->has_map_file, 0u);

    bytes = golden_start_info();
    bytes[24 + 4] = 1; // command line above 4 GiB
    memory.put(0x500, bytes);
    EXPECT_TRUE(gather()->cmdline_unreadable);
}

TEST_F(Pvh, ModuleThatLeavesItsMemory) {
    memory[0x2000][8] = 0xff;
    memory[0x2000][9] = 0x3f; // 16383 bytes, where the fake holds 6
    EXPECT_TRUE(gather()->modules_unreadable);
    memory[0x2000][3] = 0x90; // outside the map
    memory[0x2000][8] = 6;
    memory[0x2000][9] = 0;
    EXPECT_TRUE(gather()->modules_unreadable);
    memory[0x2000][8] = 0; // an empty file is one
    EXPECT_FALSE(gather()->modules_unreadable);
    EXPECT_EQ(info->has_map_file, 1u);
    EXPECT_EQ(info->map_file_size, 0u);
}

TEST_F(Pvh, LongTextsAreCutAndMarked) {
    memory.put_text(0x3000, std::string(8192, 'a'));
    memory.put_text(0x400000, std::string(20000, 'b'));
    memory[0x2000][8] = 0x20;
    memory[0x2000][9] = 0x4e; // 20000
    auto bytes = golden_start_info();
    bytes[12] = 3;
    memory.put(0x500, bytes);
    const auto notes = gather();
    ASSERT_TRUE(notes);
    EXPECT_EQ(notes->extra_modules, 2u);
    EXPECT_EQ(info->cmdline_size, BootInfo::max_cmdline);
    EXPECT_EQ(info->cmdline_truncated, 1u);
    EXPECT_EQ(info->map_file_size, BootInfo::max_map_file);
    EXPECT_EQ(info->map_file_truncated, 1u);
    EXPECT_TRUE(is_valid(*info));
}

TEST_F(Pvh, HugeMapEndsAtTheTable) {
    auto bytes = golden_start_info();
    for (usize i = 48; i < 52; ++i) {
        bytes[i] = 0xff;
    }
    memory.put(0x500, bytes);
    EXPECT_EQ(gather()->no_memory_map, false);
    EXPECT_EQ(info->range_count, 3u); // the fake ends there
    bytes[41] = 0;                    // a map of really that length, at 0x10000
    bytes[42] = 1;
    memory.put(0x500, bytes);
    auto& map = memory.at(0x10000, 24 * 1000);
    for (usize i = 0; i < 1000; ++i) {
        map[24 * i + 9] = 0x10;
        map[24 * i + 16] = 1;
    }
    ASSERT_TRUE(gather());
    EXPECT_EQ(info->range_count, BootInfo::max_given_ranges);
    EXPECT_EQ(info->ranges_truncated, 1u);
}

// All memory reads as zeroes, except for the start_info: a map whose entries are all empty.
struct EmptyMemory final : PhysicalReader {
    std::vector<std::uint8_t> start_info;
    std::uint64_t reads = 0;
    std::uint64_t highest = 0;
    bool read(u64 address, std::span<std::byte> into) override {
        ++reads;
        highest = std::max(highest, address + into.size());
        std::fill(into.begin(), into.end(), std::byte{0});
        if (address == 0x500) {
            std::memcpy(into.data(), start_info.data(), std::min(into.size(), start_info.size()));
        }
        return true;
    }
};

TEST(PvhMap, CountIsBounded) {
    EmptyMemory empty;
    empty.start_info = golden_start_info();
    for (usize i = 48; i < 52; ++i) {
        empty.start_info[i] = 0xff;
    }
    auto info = std::make_unique<BootInfo>();
    const auto notes = gather_pvh(empty, 0x500, 0, *info);
    ASSERT_TRUE(notes);
    EXPECT_TRUE(notes->no_memory_map);
    EXPECT_TRUE(notes->memory_map_cut);
    EXPECT_LT(empty.reads, 10'000u);
    EXPECT_LT(empty.highest, 0x100000u); // the map is at 0x1000: no device register was accessed
}

TEST_F(Pvh, TheLongestMapIsReadToItsEnd) {
    auto bytes = golden_start_info();
    bytes[41] = 0;
    bytes[42] = 1;    // the map at 0x10000
    bytes[49] = 0x10; // 4099 entries
    memory.put(0x500, bytes);
    auto& map = memory.at(0x10000, 24 * 4099);
    for (const usize i : {4095, 4096}) {
        map[24 * i + 9] = 0x10 * static_cast<std::uint8_t>(i - 4094);
        map[24 * i + 16] = 1;
    }
    EXPECT_TRUE(gather()->memory_map_cut);
    ASSERT_EQ(info->range_count, 1u);
    EXPECT_EQ(info->ranges[0].size, 0x1000u);
    bytes[48] = 0; // 4096
    memory.put(0x500, bytes);
    EXPECT_FALSE(gather()->memory_map_cut);
    EXPECT_EQ(info->range_count, 1u);
}

void put_number(std::vector<std::uint8_t>& bytes, usize at, std::uint64_t value) {
    for (usize i = 0; i < 8; ++i) {
        bytes[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
}

TEST_F(Pvh, WhatAFullTableHasNoRoomForIsStillProtected) {
    auto bytes = golden_start_info();
    put_number(bytes, 40, 0x10000);
    put_number(bytes, 48, 400);
    memory.put(0x500, bytes);
    auto& map = memory.at(0x10000, 24 * 400);
    for (usize i = 0; i < 400; ++i) {
        // 396 pieces of 1 MiB, each followed by a gap; then reserved ranges in them.
        put_number(map, 24 * i, 0x100000 + 0x200000 * i);
        put_number(map, 24 * i + 8, 0x100000);
        map[24 * i + 16] = 1;
    }
    // a page of the first piece, most of the second, all of the third, one beyond the table
    put_number(map, 24 * 396, 0x110000);
    put_number(map, 24 * 397, 0x308000);
    put_number(map, 24 * 398, 0x4ff000);
    put_number(map, 24 * 399, 0x100000 + 0x200000 * 390);
    put_number(map, 24 * 396 + 8, 0x1000);
    put_number(map, 24 * 397 + 8, 0x80000);
    put_number(map, 24 * 398 + 8, 0x102000);
    for (usize i = 396; i < 400; ++i) {
        map[24 * i + 16] = 2;
    }
    ASSERT_TRUE(gather());
    info->kernel_phys = 0x700000;
    info->kernel_size = 0x80000;
    normalise(*info);
    EXPECT_TRUE(is_valid(*info));
    EXPECT_EQ(info->ranges_truncated, 1u);
    std::uint64_t usable = 0;
    for (const MemoryRange& r : info->memory()) {
        if (r.kind == MemoryKind::usable) {
            usable += r.size;
            for (const auto& [base, size] : {std::pair{0x110000, 0x1000}, std::pair{0x308000, 0x80000},
                                             std::pair{0x4ff000, 0x102000}, std::pair{0x700000, 0x80000}}) {
                EXPECT_TRUE(r.base + r.size <= std::uint64_t(base) || std::uint64_t(base + size) <= r.base)
                    << base << " is used";
            }
        }
    }
    EXPECT_GE(usable, 250u * 0x100000);
}

TEST_F(Pvh, RandomBytesNeverLeaveABrokenBootInfo) {
    std::mt19937 random(5);
    for (int round = 0; round < 5000; ++round) {
        auto bytes = golden_start_info();
        for (int i = 0; i < 3; ++i) {
            bytes[4 + random() % 52] = static_cast<std::uint8_t>(random());
        }
        memory.put(0x500, bytes);
        if (gather()) {
            EXPECT_TRUE(is_valid(*info));
        }
    }
}

// The permitted use of each byte of memory, before and after: normalise() must follow "the least usable kind wins"
// everywhere.
int rank(MemoryKind kind) {
    switch (kind) {
    case MemoryKind::usable: return 0;
    case MemoryKind::acpi_reclaimable: return 1;
    case MemoryKind::persistent: return 2;
    case MemoryKind::acpi_nvs: return 3;
    case MemoryKind::unusable: return 5;
    case MemoryKind::kernel: return 6;
    default: return 4;
    }
}
/// The rank of each of the first `cells` pages according to the ranges; -1: in none. The ranges must be sorted,
/// disjoint and not empty.
std::vector<int> painted(const BootInfo& info, u32 cells) {
    std::vector<int> seen(cells, -1);
    u64 last_end = 0;
    for (const MemoryRange& r : info.memory()) {
        EXPECT_GE(r.base, last_end);
        EXPECT_GT(r.size, 0u);
        last_end = r.base + r.size;
        for (u64 c = r.base / 4096; c < last_end / 4096; ++c) {
            seen.at(c) = rank(r.kind);
        }
    }
    return seen;
}

TEST(Normalise, SortsJoinsAndMarksTheImage) {
    auto info = std::make_unique<BootInfo>();
    begin(*info, Entry::uefi, 0);
    info->kernel_phys = 0x200000;
    info->kernel_size = 0x5000;
    add_range(*info, 0x100000, 0x700000, MemoryKind::usable);
    add_range(*info, 0, 0x9f000, MemoryKind::usable);
    add_range(*info, 0x800000, 0x1000, MemoryKind::usable);
    normalise(*info);
    ASSERT_EQ(info->range_count, 4u);
    EXPECT_EQ(info->ranges[1].base, 0x100000u);
    EXPECT_EQ(info->ranges[1].size, 0x100000u);
    EXPECT_EQ(info->ranges[2].kind, MemoryKind::kernel);
    EXPECT_EQ(info->ranges[2].size, 0x5000u);
    EXPECT_EQ(info->ranges[3].base, 0x205000u);
    EXPECT_EQ(info->ranges[3].size, 0x5fc000u);
    const auto once = *info;
    normalise(*info); // a loader may have done it already
    ASSERT_EQ(info->range_count, once.range_count);
    for (u32 i = 0; i < once.range_count; ++i) {
        EXPECT_EQ(info->ranges[i].base, once.ranges[i].base);
        EXPECT_EQ(info->ranges[i].size, once.ranges[i].size);
    }
}

TEST(Normalise, AFullTableKeepsTheImage) {
    auto info = std::make_unique<BootInfo>();
    begin(*info, Entry::pvh, 0);
    info->kernel_phys = 0x200000;
    info->kernel_size = 0x5000;
    add_range(*info, 0x100000, 0x700000, MemoryKind::usable);
    for (std::uint64_t i = 0; i < 400; ++i) {
        add_range(*info, 0x1000000 + 0x10000 * i, 0x1000, i % 3 == 0 ? MemoryKind::reserved : MemoryKind::usable);
    }
    normalise(*info);
    EXPECT_TRUE(is_valid(*info));
    EXPECT_EQ(info->ranges_truncated, 1u);
    EXPECT_EQ(info->ranges[0].kind, MemoryKind::kernel); // 1 MiB below the image was dropped, 6 MiB above it remain
    EXPECT_EQ(info->ranges[0].base, 0x200000u);
    EXPECT_EQ(info->ranges[0].size, 0x5000u);
    EXPECT_EQ(info->ranges[1].base, 0x205000u);
    EXPECT_EQ(info->ranges[1].size, 0x5fb000u);
    EXPECT_EQ(info->ranges[1].kind, MemoryKind::usable);
    const auto once = *info;
    normalise(*info);
    ASSERT_EQ(info->range_count, once.range_count);
    for (u32 i = 0; i < once.range_count; ++i) {
        EXPECT_EQ(info->ranges[i].base, once.ranges[i].base);
        EXPECT_EQ(info->ranges[i].size, once.ranges[i].size);
    }
}

TEST(ClipRanges, OnlyWhatWouldBeMapped) {
    constexpr std::uint64_t end = std::uint64_t{1} << 36;
    auto info = std::make_unique<BootInfo>();
    begin(*info, Entry::pvh, 0);
    add_range(*info, 0, 0x80000000, MemoryKind::usable);
    add_range(*info, 0xfd00000000, 0x300000000, MemoryKind::reserved); // as QEMU reports for every machine
    add_range(*info, end - 0x1000, 0x1000, MemoryKind::acpi_nvs);
    EXPECT_FALSE(clip_ranges(*info, end));
    EXPECT_EQ(info->range_count, 3u);

    add_range(*info, end - 0x10000, 0x20000, MemoryKind::usable);
    add_range(*info, end, 0x40000000, MemoryKind::usable);
    add_range(*info, ~u64{0} - 0x2000, 0x1000, MemoryKind::acpi_reclaimable);
    EXPECT_TRUE(clip_ranges(*info, end));
    normalise(*info);
    for (const MemoryRange& r : info->memory()) {
        EXPECT_TRUE(r.kind == MemoryKind::reserved || r.base + r.size <= end);
        EXPECT_GT(r.size, 0u);
    }
    ASSERT_EQ(info->range_count, 4u);
    EXPECT_EQ(info->ranges[1].base, end - 0x10000);
    EXPECT_EQ(info->ranges[1].size, 0xf000u);
    EXPECT_EQ(info->ranges[2].kind, MemoryKind::acpi_nvs);
    EXPECT_FALSE(clip_ranges(*info, end));
}

TEST(ClipRanges, NothingMayBeLeft) {
    auto info = std::make_unique<BootInfo>();
    begin(*info, Entry::pvh, 0);
    add_range(*info, u64{1} << 46, 0x40000000, MemoryKind::usable);
    EXPECT_TRUE(clip_ranges(*info, u64{1} << 46));
    normalise(*info);
    EXPECT_EQ(info->range_count, 0u);
}

TEST(Normalise, RandomFullTablesLoseNoProtection) {
    constexpr u32 cells = 1000;
    const MemoryKind kinds[] = {MemoryKind::reserved, MemoryKind::acpi_reclaimable, MemoryKind::acpi_nvs,
                                MemoryKind::unusable, MemoryKind::persistent};
    std::mt19937 random(12);
    auto info = std::make_unique<BootInfo>();
    u32 truncated = 0;
    u64 uncut = 0; // in truncated tables: cells of usable ranges from which nothing is cut
    for (int round = 0; round < 2000; ++round) {
        *info = {};
        begin(*info, Entry::pvh, 0);
        std::vector<int> expected(cells, -1); // of all ranges
        std::vector<int> taken(cells, -1);    // of those for which the table has room
        std::vector<bool> usable_taken(cells);
        const auto add = [&](MemoryKind kind, u32 most) {
            const u32 from = random() % cells;
            const u32 size = 1 + random() % std::min(most, cells - from);
            const u32 before = info->range_count;
            add_range(*info, u64{from} * 4096, u64{size} * 4096, kind);
            const bool room = info->range_count > before;
            ASSERT_TRUE(room || info->ranges_truncated == 1) << "a range is left out only if that is reported";
            for (u32 c = from; c < from + size; ++c) {
                expected[c] = std::max(expected[c], rank(kind));
                taken[c] = room ? std::max(taken[c], rank(kind)) : taken[c];
                usable_taken[c] = usable_taken[c] || (room && kind == MemoryKind::usable);
            }
        };
        const u32 usable = random() % 300;
        for (u32 i = 0; i < usable; ++i) {
            add(MemoryKind::usable, round % 2 == 0 ? 3 : 400);
        }
        const u32 others = random() % 300;
        for (u32 i = 0; i < others; ++i) {
            add(kinds[random() % std::size(kinds)], round % 3 == 0 ? 100 : 2);
        }
        if (random() % 2 == 0) { // as the loader does
            normalise(*info);
            ASSERT_LE(info->range_count, BootInfo::max_given_ranges);
        }
        info->kernel_phys = 500 * 4096;
        info->kernel_size = 4 * 4096;
        for (u32 c = 500; c < 504; ++c) {
            expected[c] = 6;
        }
        normalise(*info);
        ASSERT_TRUE(is_valid(*info));
        truncated += info->ranges_truncated;
        const std::vector<int> seen = painted(*info, cells);
        for (u32 c = 0; c < cells; ++c) {
            if (seen[c] != -1) {
                // A range may be replaced by another unused kind.
                ASSERT_EQ(seen[c] == 0 ? expected[c] : 0, 0) << "round " << round << ", cell " << c;
                ASSERT_NE(expected[c], -1) << "round " << round << ", cell " << c;
            }
            if (c >= 500 && c < 504) {
                ASSERT_EQ(seen[c], 6) << "round " << round;
            }
            if (info->ranges_truncated == 0) {
                ASSERT_EQ(seen[c], expected[c]) << "round " << round;
            }
            // A protected range in the table stays, as what it is or as something less usable.
            if (taken[c] > 0) {
                ASSERT_GE(seen[c], taken[c]) << "round " << round << ", cell " << c;
            }
        }
        // Adjacent usable ranges are one. It loses a part only where something is cut out of it.
        for (u32 begin = 0, end = 0; begin < cells; begin = end + 1) {
            const auto whole = [&](u32 c) { return usable_taken[c] && expected[c] == 0; };
            for (end = begin; end < cells && usable_taken[end]; ++end) {
            }
            bool cut = false;
            for (u32 c = begin; c < end; ++c) {
                cut = cut || !whole(c);
            }
            for (u32 c = begin; c < end && !cut; ++c) {
                ASSERT_EQ(seen[c], 0) << "round " << round << ", cell " << c;
                uncut += info->ranges_truncated;
            }
        }
    }
    EXPECT_GT(truncated, 500u);
    EXPECT_GT(uncut, 10'000u);
}

TEST(Normalise, RandomAgainstAByteMap) {
    constexpr u32 cells = 64;
    const MemoryKind kinds[] = {MemoryKind::usable,         MemoryKind::reserved, MemoryKind::acpi_reclaimable,
                                MemoryKind::acpi_nvs,       MemoryKind::unusable, MemoryKind::persistent,
                                static_cast<MemoryKind>(77)};
    std::mt19937 random(11);
    auto info = std::make_unique<BootInfo>();
    for (int round = 0; round < 3000; ++round) {
        *info = {};
        begin(*info, Entry::pvh, 0);
        std::vector<int> expected(cells, -1);
        const u32 count = random() % 12;
        for (u32 i = 0; i < count; ++i) {
            const u32 from = random() % cells;
            const u32 size = random() % (cells - from + 1);
            const MemoryKind kind = kinds[random() % std::size(kinds)];
            add_range(*info, u64{from} * 4096, u64{size} * 4096, kind);
            for (u32 c = from; c < from + size; ++c) {
                expected[c] = std::max(expected[c], rank(kind));
            }
        }
        if (random() % 2 == 0) {
            info->kernel_phys = 8 * 4096;
            info->kernel_size = 4 * 4096;
            for (u32 c = 8; c < 12; ++c) {
                expected[c] = 6;
            }
        }
        normalise(*info);
        const std::vector<int> seen = painted(*info, cells);
        ASSERT_EQ(seen, expected) << "round " << round;
    }
}

} // namespace
