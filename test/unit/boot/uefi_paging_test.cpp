#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import boot.handoff;
import boot.uefi.memory_map;
import boot.uefi.paging;

namespace {
using namespace fl;
using namespace fl::boot;

constexpr std::uint64_t gib = 1ull << 30;
constexpr std::uint64_t mib = 1ull << 20;

// A processor's four-level page walk, written from the manual: bit 0 present, bit 1 writable, bit 7 a page instead of a
// table.
struct Machine {
    std::uint64_t at = 0x7654000;
    std::vector<std::uint64_t> memory;

    explicit Machine(std::size_t tables) : memory(tables * 512, 0xdeadbeefdeadbeef) {}

    std::optional<std::uint64_t> translate(std::uint64_t root, std::uint64_t address) const {
        std::uint64_t table = root;
        for (int shift : {39, 30, 21, 12}) {
            const std::uint64_t index = (address >> shift) & 511;
            const std::uint64_t place = (table - at) / 8 + index;
            const std::uint64_t entry = place < memory.size() ? memory[place] : 0;
            if ((entry & 3) != 3) {
                return std::nullopt;
            }
            if (shift != 39 && (entry & 0x80) != 0) {
                const std::uint64_t mask = (1ull << shift) - 1;
                EXPECT_EQ(entry & 0x000ffffffffff000 & mask, 0u);
                return (entry & 0x000ffffffffff000) | (address & mask);
            }
            table = entry & 0x000ffffffffff000;
        }
        return std::nullopt;
    }
};

void check_kernel_tables(bool huge) {
    uefi::Windows windows;
    windows.add(4 * gib, 3 * gib);
    windows.add(600 * gib, gib);
    const std::size_t needed = uefi::PageTables::tables_needed(windows.view(), huge);
    Machine m(needed);
    auto tables = uefi::PageTables::create(m.memory, m.at);
    ASSERT_TRUE(tables);
    for (const uefi::Window& w : windows.view()) {
        ASSERT_TRUE(tables->map(w.begin, w.begin, w.end - w.begin, huge));
    }
    ASSERT_TRUE(tables->map(0xffffffff80000000, 0x5600000, 6 * mib, huge));
    EXPECT_EQ(tables->tables_used(), needed);
    for (std::uint64_t a :
         {std::uint64_t{0}, std::uint64_t{0x1234567}, 4 * gib - 1, 7 * gib - 1, 600 * gib, 601 * gib - 1}) {
        EXPECT_EQ(m.translate(tables->root(), a), a) << std::hex << a;
    }
    for (std::uint64_t a :
         {7 * gib, 599 * gib, 601 * gib, std::uint64_t{0xffffffff80600000}, std::uint64_t{0xffffffff7fffffff}}) {
        EXPECT_EQ(m.translate(tables->root(), a), std::nullopt) << std::hex << a;
    }
    EXPECT_EQ(m.translate(tables->root(), 0xffffffff80000000), 0x5600000u);
    EXPECT_EQ(m.translate(tables->root(), 0xffffffff805fffff), 0x5bfffffu);
}

TEST(UefiPaging, MapsMemoryAndImageWithLargePages) { check_kernel_tables(false); }
TEST(UefiPaging, MapsMemoryAndImageWithHugePages) { check_kernel_tables(true); }

TEST(UefiPaging, ReportsWhenTablesRunOut) {
    Machine m(3);
    auto tables = uefi::PageTables::create(m.memory, m.at);
    ASSERT_TRUE(tables);
    EXPECT_TRUE(tables->map(0, 0, gib, false));
    const auto second = tables->map(gib, gib, 2 * mib, false);
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code, Code::exhausted);
}

TEST(UefiPaging, RefusesMistakes) {
    Machine m(8);
    EXPECT_FALSE(uefi::PageTables::create(m.memory, m.at + 8));
    EXPECT_FALSE(uefi::PageTables::create({}, m.at));
    EXPECT_FALSE(uefi::PageTables::create(std::span(m.memory).first(513), m.at));
    auto tables = uefi::PageTables::create(m.memory, m.at);
    ASSERT_TRUE(tables);
    EXPECT_FALSE(tables->map(4096, 0, 2 * mib, false));
    EXPECT_FALSE(tables->map(0, 4096, 2 * mib, false));
    EXPECT_FALSE(tables->map(0, 0, 4096, false));
    EXPECT_TRUE(tables->map(0, 0, gib, true));
    EXPECT_FALSE(tables->map(0, 0, gib, true));
    EXPECT_FALSE(tables->map(2 * mib, 2 * mib, 2 * mib, false)); // inside a huge page
    EXPECT_TRUE(tables->map(gib, gib, 2 * mib, true));
    EXPECT_FALSE(tables->map(gib, gib, 2 * mib, false));
    EXPECT_FALSE(tables->map(gib, gib, gib, true)); // there is a table already
}

} // namespace
