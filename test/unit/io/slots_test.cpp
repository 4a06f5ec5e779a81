#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import io.slots;

namespace {
using namespace fl;
using namespace fl::io;
using Four = SlotTable<int, 4>;

TEST(Slots, AFrameIsFreedOnce) {
    Four table;
    u64 ids[4] = {};
    for (int i = 0; i < 4; ++i) {
        const auto id = table.take();
        ASSERT_TRUE(id);
        ids[i] = *id;
        table[*id] = i;
    }
    EXPECT_TRUE(table.full());
    EXPECT_FALSE(table.take());
    ASSERT_NE(table.find(ids[2]), nullptr);
    EXPECT_EQ(*table.find(ids[2]), 2);
    table.free(ids[2]);
    EXPECT_EQ(table.find(ids[2]), nullptr) << "repeated";
    const auto again = table.take();
    ASSERT_TRUE(again);
    EXPECT_EQ(Four::slot_of(*again), Four::slot_of(ids[2]));
    EXPECT_EQ(table.find(ids[2]), nullptr) << "late: the slot has a new owner";
    EXPECT_NE(table.find(*again), nullptr);
    table.free(*again);
    EXPECT_EQ(table.size(), 3u);
}

TEST(Slots, UnknownIdsFindNothing) {
    Four table;
    const u64 id = *table.take();
    for (const u64 bad :
         {id ^ 1, id + 4, id + 0x10000, id | u64{1} << 32, id | u64{1} << 63, u64{0xffff}, ~u64{0}, u64{0}}) {
        EXPECT_EQ(table.find(bad), nullptr) << bad;
    }
    EXPECT_EQ(table.find_slot(4), nullptr);
    EXPECT_EQ(table.find_slot(~u64{0}), nullptr);
    EXPECT_EQ(table.find_slot(Four::slot_of(id) ^ 1u), nullptr);
    EXPECT_NE(table.find_slot(Four::slot_of(id)), nullptr);
    EXPECT_NE(table.find(id), nullptr);
    table.free(id);
    EXPECT_TRUE(table.empty());
    EXPECT_EQ(table.find_slot(Four::slot_of(id)), nullptr);
}

TEST(Slots, NoIdRepeats) {
    SlotTable<int, 1> table;
    u64 last = 0;
    for (int i = 0; i < 200'000; ++i) { // far more than a 16-bit generation can distinguish
        const u64 id = *table.take();
        ASSERT_GT(id, last);
        ASSERT_EQ(table.find(last), nullptr) << "a late answer to the request before";
        last = id;
        ASSERT_NE(table.find(id), nullptr);
        table.free(id);
        ASSERT_EQ(table.find(id), nullptr);
    }
    EXPECT_TRUE(table.take());
}

TEST(Slots, RenewKeepsTheEntry) {
    Four table;
    const u64 id = *table.take();
    table[id] = 17;
    const u64 fresh = table.renew(id);
    EXPECT_GT(fresh, id);
    EXPECT_EQ(table.find(id), nullptr);
    ASSERT_NE(table.find(fresh), nullptr);
    EXPECT_EQ(*table.find(fresh), 17);
    EXPECT_EQ(table.size(), 1u);
}

TEST(Slots, VisitorMayGive) {
    SlotTable<int, 8> table;
    for (int i = 0; i < 3; ++i) {
        table[*table.take()] = i;
    }
    int visited = 0;
    int sum = 0;
    table.for_each([&](u64 id, int& item) {
        ++visited;
        sum += item;
        table.free(id);
    });
    EXPECT_EQ(visited, 3);
    EXPECT_EQ(sum, 3);
    EXPECT_TRUE(table.empty());
}

} // namespace
