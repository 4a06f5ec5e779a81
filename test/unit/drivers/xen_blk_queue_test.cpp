// The ring of a Xen disk against its bytes [xen-ring], which the test writes in the back end's place.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.dma;
import drivers.xen_blk.queue;

using namespace fl;
using namespace fl::drivers::xen_blk;

namespace {

// Words and slots of the ring page, as the specification has them.
constexpr usize request_producer = 0;
constexpr usize request_event = 4;
constexpr usize response_producer = 8;
constexpr usize response_event = 12;
constexpr usize first_slot = 64;
constexpr usize slot_size = 112;

class XenBlkQueue : public testing::Test {
  protected:
    explicit XenBlkQueue(u32 size = 4096)
        : memory(size / 8), span{reinterpret_cast<std::byte*>(memory.data()), 0, size} {
        EXPECT_TRUE(ring.lay_out(span));
    }
    u32 word(usize at) const {
        u32 value;
        std::memcpy(&value, span.data + at, sizeof value);
        return value;
    }
    void set_word(usize at, u32 value) { std::memcpy(span.data + at, &value, sizeof value); }
    void add(u8 value) {
        std::array<std::byte, 24> request;
        request.fill(std::byte{value});
        ring.add(request);
    }
    // Writes a response to the slot of its number, and makes it visible.
    void respond(u64 id, i16 status = 0) {
        const u32 number = word(response_producer);
        std::byte* slot = span.data + first_slot + number % ring.capacity() * slot_size;
        std::memset(slot, 0, 16);
        std::memcpy(slot, &id, sizeof id);
        std::memcpy(slot + 10, &status, sizeof status);
        set_word(response_producer, number + 1);
    }

    std::vector<u64> memory;
    DmaSpan span;
    Ring ring;
};

TEST_F(XenBlkQueue, BeginsEmptyAndWantsTheFirstEvents) {
    EXPECT_EQ(ring.capacity(), 32u);
    EXPECT_FALSE(ring.full());
    EXPECT_EQ(ring.owed(), 0u);
    EXPECT_EQ(word(request_producer), 0u);
    EXPECT_EQ(word(response_producer), 0u);
    EXPECT_EQ(word(request_event), 1u);
    EXPECT_EQ(word(response_event), 1u);
}

TEST(XenBlkQueueSize, ASlotForEach112BytesOfAPowerOfTwo) {
    for (const auto& [pages, slots] : std::map<u32, u32>{{1, 32}, {2, 64}, {4, 128}, {8, 128}}) {
        std::vector<u64> memory(pages * 512);
        Ring ring;
        ASSERT_TRUE(ring.lay_out({reinterpret_cast<std::byte*>(memory.data()), 0, pages * 4096}));
        EXPECT_EQ(ring.capacity(), slots) << pages;
    }
    std::vector<u64> memory(8);
    Ring ring;
    EXPECT_FALSE(ring.lay_out({reinterpret_cast<std::byte*>(memory.data()), 0, 64})) << "no room for a slot";
}

TEST_F(XenBlkQueue, RequestsAreVisibleWhenTheyArePublished) {
    add(0x11);
    add(0x22);
    EXPECT_EQ(word(request_producer), 0u);
    EXPECT_EQ(ring.owed(), 0u) << "the back end cannot answer them";
    EXPECT_TRUE(ring.publish()) << "it wants an event for the first one";
    EXPECT_EQ(word(request_producer), 2u);
    EXPECT_EQ(ring.owed(), 2u);
    EXPECT_EQ(span.data[first_slot], std::byte{0x11});
    EXPECT_EQ(span.data[first_slot + 23], std::byte{0x11});
    EXPECT_EQ(span.data[first_slot + 24], std::byte{0}) << "only what was given is written";
    EXPECT_EQ(span.data[first_slot + slot_size], std::byte{0x22});
    add(0x33);
    EXPECT_FALSE(ring.publish()) << "it is awake";
    set_word(request_event, 4);
    add(0x44);
    EXPECT_TRUE(ring.publish());
}

TEST_F(XenBlkQueue, IsFullWithoutResponses) {
    for (u32 i = 0; i < 32; ++i) {
        EXPECT_FALSE(ring.full());
        add(static_cast<u8>(i));
    }
    EXPECT_TRUE(ring.full());
    EXPECT_TRUE(ring.publish());
    respond(1);
    ASSERT_EQ(*ring.begin_batch(), 1u);
    Response response;
    EXPECT_TRUE(ring.take(response));
    EXPECT_TRUE(ring.full()) << "until the batch ends";
    EXPECT_TRUE(ring.end_batch());
    EXPECT_FALSE(ring.full());
    EXPECT_EQ(ring.owed(), 31u);
}

TEST_F(XenBlkQueue, ABatchIsWhatWasThereAtItsBeginning) {
    for (u8 i = 0; i < 3; ++i) {
        add(i);
    }
    EXPECT_TRUE(ring.publish());
    EXPECT_EQ(*ring.begin_batch(), 0u);
    EXPECT_FALSE(ring.in_batch());
    respond(7);
    respond(8, -1);
    EXPECT_EQ(*ring.begin_batch(), 2u);
    EXPECT_TRUE(ring.in_batch());
    respond(9); // belongs to the next one
    Response response;
    ASSERT_TRUE(ring.take(response));
    EXPECT_EQ(response.id, 7u);
    ASSERT_TRUE(ring.take(response));
    EXPECT_EQ(response.id, 8u);
    EXPECT_EQ(response.status, -1);
    EXPECT_FALSE(ring.take(response));
    EXPECT_TRUE(ring.end_batch());
    EXPECT_FALSE(ring.in_batch());
    EXPECT_EQ(ring.owed(), 1u);
    EXPECT_EQ(*ring.begin_batch(), 1u);
}

TEST_F(XenBlkQueue, MoreResponsesThanRequestsBreakIt) {
    add(0);
    EXPECT_TRUE(ring.publish());
    add(1); // not visible yet, so it cannot be answered
    set_word(response_producer, 2);
    const auto found = ring.begin_batch();
    ASSERT_FALSE(found);
    EXPECT_EQ(found.error().code, Code::protocol);
    set_word(response_producer, 1);
    EXPECT_FALSE(ring.begin_batch()) << "for ever";
}

TEST_F(XenBlkQueue, AsksForAnEventAndLooksOnceMore) {
    for (u8 i = 0; i < 4; ++i) {
        add(i);
    }
    EXPECT_TRUE(ring.publish());
    EXPECT_FALSE(*ring.arm(3));
    EXPECT_EQ(word(response_event), 3u);
    respond(0);
    EXPECT_TRUE(*ring.arm(4)) << "one is there";
    set_word(response_producer, 5);
    EXPECT_FALSE(ring.arm(4)) << "more than there can be";
}

} // namespace
