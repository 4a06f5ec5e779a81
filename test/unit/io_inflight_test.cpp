#include <gtest/gtest.h>
#include <vector>
import core.std;
import io.inflight;

namespace {
using namespace fl;
using namespace fl::io;
using Four = Inflight<int, 4>;

TEST(Inflight, GivesBackWhatWasTakenOnce) {
    Four table;
    int items[5] = {};
    u64 ids[4] = {};
    for (int i = 0; i < 4; ++i) {
        const auto id = table.take(items[i]);
        ASSERT_TRUE(id);
        ids[i] = *id;
    }
    EXPECT_TRUE(table.full());
    EXPECT_FALSE(table.take(items[4]));
    EXPECT_EQ(table.peek(ids[2]), &items[2]);
    EXPECT_EQ(table.give(ids[2]), &items[2]);
    EXPECT_EQ(table.give(ids[2]), nullptr) << "repeated";
    EXPECT_EQ(table.peek(ids[2]), nullptr);
    const auto again = table.take(items[4]);
    ASSERT_TRUE(again);
    EXPECT_EQ(Four::slot_of(*again), Four::slot_of(ids[2]));
    EXPECT_EQ(table.give(ids[2]), nullptr) << "late: the slot has a new owner";
    EXPECT_EQ(table.give(*again), &items[4]);
    EXPECT_EQ(table.size(), 3u);
}

TEST(Inflight, UnknownIdsAreNobody) {
    Four table;
    int item = 0;
    const u64 id = *table.take(item);
    for (const u64 bad : {id ^ 1, id + 4, id + 0x10000, id | u64{1} << 32, u64{0xffff}, ~u64{0}, u64{0}}) {
        if (bad != id) {
            EXPECT_EQ(table.give(bad), nullptr) << bad;
            EXPECT_EQ(table.peek(bad), nullptr) << bad;
        }
    }
    EXPECT_EQ(table.give_slot(4), nullptr);
    EXPECT_EQ(table.give_slot(~u64{0}), nullptr);
    EXPECT_EQ(table.give(id), &item);
    EXPECT_TRUE(table.empty());
}

TEST(Inflight, NoIdComesTwice) {
    Inflight<int, 1> table;
    int item = 0;
    u64 last = 0;
    for (int i = 0; i < 200'000; ++i) { // far beyond what 16 bits of generation would tell apart
        const u64 id = *table.take(item);
        ASSERT_GT(id, last);
        ASSERT_EQ(table.give(last), nullptr) << "a late answer to the request before";
        last = id;
        ASSERT_EQ(table.give(id), &item);
        ASSERT_EQ(table.give(id), nullptr);
    }
    EXPECT_TRUE(table.take(item));
}

TEST(Inflight, VisitorMayGive) {
    Inflight<int, 8> table;
    int items[3] = {};
    for (int& item : items) {
        ASSERT_TRUE(table.take(item));
    }
    int visited = 0;
    table.for_each([&](u64 id, int& item) {
        ++visited;
        EXPECT_EQ(table.give(id), &item);
    });
    EXPECT_EQ(visited, 3);
    EXPECT_TRUE(table.empty());
}

} // namespace
