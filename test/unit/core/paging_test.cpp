#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.paging;

namespace {
using namespace fl;

constexpr u64 K4 = 4096;
constexpr u64 M2 = 2 << 20;
constexpr u64 G1 = 1 << 30;
constexpr u64 base = 0xffff800000000000;

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
    u64* view(u64 physical) override { return frames.at(physical).data(); }
    void invalidate(u64 address) override { invalidated.push_back(address); }

    std::map<u64, std::vector<u64>> frames;
    std::vector<u64> invalidated;
    u64 left = 1000;
};

struct Paging : testing::Test {
    Tables tables;
    AddressSpace space{tables};
    void SetUp() override {
        ASSERT_TRUE(space.create({.no_execute = true, .gigabyte_pages = true, .physical_end = u64{1} << 40}));
    }
};

// The entries as the processor reads them [SDM-3 4.5], written by hand.
TEST_F(Paging, EntriesAreWhatTheProcessorReads) {
    ASSERT_TRUE(space.map(base + 0x5000, 0xabc000, K4, {.write = true}));
    const auto& root = tables.frames.at(space.root());
    EXPECT_EQ(root[256] & 0xfff, 3u);
    const u64 pdpt = root[256] & 0x000ffffffffff000;
    const u64 pd = tables.frames.at(pdpt)[0] & 0x000ffffffffff000;
    const u64 pt = tables.frames.at(pd)[0] & 0x000ffffffffff000;
    EXPECT_EQ(tables.frames.at(pt)[5], 0x8000000000abc003u);
    ASSERT_TRUE(space.map(base + 0x6000, 0xfee00000, K4, {.write = true, .uncached = true}));
    EXPECT_EQ(tables.frames.at(pt)[6], 0x80000000fee0001bu);
    ASSERT_TRUE(space.map(base + 0x7000, 0x200000, K4, {.execute = true}));
    EXPECT_EQ(tables.frames.at(pt)[7], 0x200001u);
    ASSERT_TRUE(space.map(base + M2, 4 * M2, M2, {.write = true}));
    EXPECT_EQ(tables.frames.at(pd)[1], 0x8000000000800083u);
    ASSERT_TRUE(space.map(base + G1, 3 * G1, G1, {.write = true}));
    EXPECT_EQ(tables.frames.at(pdpt)[1], 0x80000000c0000083u);
}

TEST_F(Paging, LargestPagesThatFit) {
    // 4 KiB pages up to the next 2 MiB boundary, 2 MiB up to the next 1 GiB, one of 1 GiB, and down again.
    const u64 begin = G1 - M2 - K4;
    ASSERT_TRUE(space.map(base + begin, begin, M2 + K4 + G1 + M2 + K4, {.write = true}));
    EXPECT_EQ(space.find(base + begin)->page, K4);
    EXPECT_EQ(space.find(base + G1 - M2)->page, M2);
    EXPECT_EQ(space.find(base + G1 + 12345)->page, G1);
    EXPECT_EQ(space.find(base + G1 + 12345)->physical, G1 + 12345);
    EXPECT_EQ(space.find(base + 2 * G1)->page, M2);
    EXPECT_EQ(space.find(base + 2 * G1 + M2)->page, K4);
    EXPECT_FALSE(space.find(base + 2 * G1 + M2 + K4));
    EXPECT_FALSE(space.find(base + begin - 1));
}

TEST_F(Paging, WithoutGigabytePagesAndWithoutNx) {
    Tables others;
    AddressSpace plain(others);
    ASSERT_TRUE(plain.create({}));
    ASSERT_TRUE(plain.map(base, 0, G1, {}));
    EXPECT_EQ(plain.find(base)->page, M2);
    EXPECT_EQ(others.frames.size(), 3u); // root, pointers, one directory
    EXPECT_TRUE(plain.find(base)->protection.execute);
}

TEST_F(Paging, PhysicalAndVirtualMustBeAlignedAlikeForLargePages) {
    ASSERT_TRUE(space.map(base, K4, M2, {}));
    EXPECT_EQ(space.find(base)->page, K4);
    EXPECT_EQ(space.find(base + M2 - 1)->physical, M2 + K4 - 1);
}

TEST_F(Paging, RefusesToMapTwiceAndLeavesNothing) {
    ASSERT_TRUE(space.map(base + 4 * M2, 0, K4, {}));
    EXPECT_EQ(space.map(base + M2, 0, 4 * M2, {}).error().code, Code::busy);
    EXPECT_FALSE(space.find(base + M2));
    EXPECT_FALSE(space.find(base + 3 * M2));
    EXPECT_EQ(space.map(base + 4 * M2, 0, K4, {}).error().code, Code::busy);
    ASSERT_TRUE(space.map(base + 8 * M2, 0, M2, {}));
    EXPECT_EQ(space.map(base + 8 * M2 + K4, 0, K4, {}).error().code, Code::busy);
}

TEST_F(Paging, ATableLeftEmptyTakesPagesAgain) {
    ASSERT_TRUE(space.map(base, 0, K4, {}));
    ASSERT_TRUE(space.unmap(base, K4));
    EXPECT_EQ(tables.invalidated, std::vector<u64>{base});
    ASSERT_TRUE(space.map(base, 0, 2 * M2, {}));
    EXPECT_EQ(space.find(base)->page, K4);
    EXPECT_EQ(space.find(base + M2)->page, M2);
}

TEST_F(Paging, NoTableLeftLeavesNothing) {
    tables.left = 2;
    EXPECT_EQ(space.map(base, 0, K4, {}).error().code, Code::exhausted);
    tables.left = 1; // the first leaf table and no more: the upper ones exist already
    EXPECT_EQ(space.map(base + M2 - K4, 0, 2 * K4, {}).error().code, Code::exhausted);
    EXPECT_FALSE(space.find(base + M2 - K4));
}

TEST_F(Paging, LargePagesAreChangedWhole) {
    ASSERT_TRUE(space.map(base, 0, M2, {.write = true}));
    const usize before = tables.frames.size();
    EXPECT_EQ(space.unmap(base, 2 * M2).error().code, Code::not_found);
    EXPECT_TRUE(space.find(base));
    ASSERT_TRUE(space.protect(base, M2, {.execute = true}));
    EXPECT_EQ(space.find(base)->protection, (Protection{.execute = true}));
    EXPECT_EQ(space.find(base)->page, M2);
    ASSERT_TRUE(space.unmap(base, M2));
    EXPECT_FALSE(space.find(base));
    EXPECT_EQ(tables.frames.size(), before) << "no table for that";
}

// A page in the middle of a large one, like the processors' startup page if memory has no hole below 1 MiB.
TEST_F(Paging, LargePagesAreSplitWhereAPartIsChanged) {
    ASSERT_TRUE(space.map(base, 0, M2, {.write = true}));
    const u64 page = 0x9f000;
    ASSERT_TRUE(space.protect(base + page, K4, {}));
    EXPECT_EQ(space.find(base + page)->protection, (Protection{}));
    EXPECT_EQ(space.find(base + page)->page, K4);
    for (u64 at = 0; at < M2; at += K4) {
        ASSERT_TRUE(space.find(base + at));
        EXPECT_EQ(space.find(base + at)->physical, at);
        EXPECT_EQ(space.find(base + at)->protection.write, at != page);
        EXPECT_FALSE(space.find(base + at)->protection.execute);
    }
    // Invalidated once as a large page, once as the page itself.
    EXPECT_EQ(tables.invalidated.size(), 2u);
    const u64 pdpt = tables.frames.at(space.root())[256] & 0x000ffffffffff000;
    const u64 pd = tables.frames.at(pdpt)[0] & 0x000ffffffffff000;
    EXPECT_EQ(tables.frames.at(pd)[0] & 0x8000000000000fff, 3u)
        << "a table: writable, executable as far as its entries let it";
    const u64 pt = tables.frames.at(pd)[0] & 0x000ffffffffff000;
    EXPECT_EQ(tables.frames.at(pt)[0x9e], 0x800000000009e003u);
    EXPECT_EQ(tables.frames.at(pt)[0x9f], 0x800000000009f001u);
    ASSERT_TRUE(space.protect(base + page, K4, {.write = true}));
    ASSERT_TRUE(space.unmap(base, M2));
    EXPECT_FALSE(space.find(base + M2 - K4));
}

TEST_F(Paging, AGigabytePageIsSplitAsFarAsNeeded) {
    ASSERT_TRUE(space.map(base + G1, G1, 2 * G1, {.write = true, .uncached = true}));
    ASSERT_TRUE(space.unmap(base + 2 * G1 - 3 * K4, 3 * K4 + M2 + K4)); // the end of one, the start of the next
    EXPECT_EQ(space.find(base + G1)->page, M2);
    EXPECT_EQ(space.find(base + 2 * G1 - M2)->page, K4);
    EXPECT_FALSE(space.find(base + 2 * G1 - 3 * K4));
    EXPECT_FALSE(space.find(base + 2 * G1 + M2));
    EXPECT_EQ(space.find(base + 2 * G1 + M2 + K4)->physical, 2 * G1 + M2 + K4);
    EXPECT_EQ(space.find(base + 2 * G1 + M2 + K4)->page, K4);
    EXPECT_EQ(space.find(base + 3 * G1 - 1)->page, M2);
    EXPECT_EQ(space.find(base + 3 * G1 - 1)->protection, (Protection{.write = true, .uncached = true}));
}

TEST_F(Paging, NoTableForASplitChangesNothing) {
    ASSERT_TRUE(space.map(base, 0, G1, {.write = true}));
    for (u64 left : {0u, 1u, 1u}) {
        tables.left = left;
        EXPECT_EQ(space.unmap(base + K4, G1 - 2 * K4).error().code, Code::exhausted) << left;
        for (const u64 at : {u64{0}, K4, M2, G1 - K4}) {
            ASSERT_TRUE(space.find(base + at));
            EXPECT_EQ(space.find(base + at)->physical, at);
            EXPECT_EQ(space.find(base + at)->protection, (Protection{.write = true}));
        }
    }
    tables.left = 1; // the last one needed
    EXPECT_TRUE(space.unmap(base + K4, G1 - 2 * K4));
}

TEST_F(Paging, BadRanges) {
    EXPECT_EQ(space.map(base + 1, 0, K4, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(base, 1, K4, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(base, 0, 0, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(0x0000800000000000, 0, K4, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(0x00007ffffffff000, 0, 2 * K4, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(base, u64{1} << 40, K4, {}).error().code, Code::bad_argument);
    EXPECT_EQ(space.map(base, (u64{1} << 40) - K4, 2 * K4, {}).error().code, Code::bad_argument);
    EXPECT_TRUE(space.map(0xfffffffffffff000, 0, K4, {}));
    EXPECT_FALSE(space.find(0x0000800000000000));
}

TEST_F(Paging, RandomAgainstAModel) {
    std::mt19937_64 random(7);
    std::map<u64, u64> model; // page -> physical
    for (int step = 0; step < 3000; ++step) {
        const u64 at = base + random() % 2048 * K4;
        const u64 size = (1 + random() % 600) * K4;
        if (random() % 2 == 0) {
            const u64 physical = random() % 4096 * K4;
            bool free = true;
            for (u64 i = 0; i < size; i += K4) {
                free = free && !model.contains(at + i);
            }
            ASSERT_EQ(static_cast<bool>(space.map(at, physical, size, {.write = true})), free);
            for (u64 i = 0; free && i < size; i += K4) {
                model[at + i] = physical + i;
            }
        } else {
            bool all = true;
            for (u64 i = 0; i < size; i += K4) {
                all = all && model.contains(at + i);
            }
            ASSERT_EQ(static_cast<bool>(space.unmap(at, size)), all);
            for (u64 i = 0; all && i < size; i += K4) {
                ASSERT_EQ(model.erase(at + i), 1u);
            }
        }
        const u64 probe = base + random() % 2700 * K4;
        const auto found = space.find(probe + 5);
        ASSERT_EQ(found.has_value(), model.contains(probe));
        if (found) {
            ASSERT_EQ(found->physical, model[probe] + 5);
        }
    }
}

} // namespace
