#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import io.ring;
import io.ring.hostile;

namespace {
using namespace fl;
using namespace fl::io;

constexpr u32 size = 4;
constexpr RingLayout layout{.index = 0, .event = 8, .consumed = 16, .entries = 64, .stride = 8};

template <class W>
struct Pair {
    using Positions = FreeRunning<W>;
    alignas(64) std::array<std::byte, 64 + size * 8> storage{};
    FlatMemory memory{storage};
    Producer<FlatMemory, Positions, ReachedEvent> producer;
    Consumer<FlatMemory, Positions, ReachedEvent> consumer;

    explicit Pair(W start)
        : producer(*Producer<FlatMemory, Positions, ReachedEvent>::create(memory, layout, Positions(size), {}, start)),
          consumer(
              *Consumer<FlatMemory, Positions, ReachedEvent>::create(memory, layout, Positions(size), {}, {}, start)) {
        memory.template store_relaxed<W>(layout.index, start);
        memory.template store_relaxed<W>(layout.consumed, start);
        memory.template store_relaxed<W>(layout.event, static_cast<W>(start + 1));
    }
};

template <class W>
void check_wrap(W start) {
    Pair<W> ring(start);
    u64 sent = 0;
    u64 got = 0;
    for (int turn = 0; turn < 20; ++turn) {
        const u64 batch = 1 + turn % size;
        for (u64 i = 0; i < batch; ++i) {
            ASSERT_TRUE(ring.producer.produce(sent++));
        }
        EXPECT_EQ(*ring.consumer.available(), 0u) << "nothing is seen before publish()";
        EXPECT_TRUE(ring.producer.publish());
        ASSERT_EQ(*ring.consumer.available(), batch);
        u64 value = 0;
        while (ring.consumer.take(value)) {
            ASSERT_EQ(value, got++);
        }
        ring.consumer.release();
        EXPECT_FALSE(*ring.consumer.arm(1));
        ASSERT_TRUE(ring.producer.observe());
        EXPECT_EQ(ring.producer.in_flight(), 0u);
    }
    EXPECT_EQ(sent, got);
}

TEST(Ring, WrapsAtTheEndOfItsWord) {
    check_wrap<u32>(0);
    check_wrap<u32>(0xffff'fffa); // wraps at 2^32
    check_wrap<u16>(0xfffa);
}

TEST(Ring, FullRefusesAndKeepsWhatIsThere) {
    Pair<u32> ring(0xffff'fffe);
    for (u64 i = 0; i < size; ++i) {
        EXPECT_EQ(ring.producer.free(), size - i);
        EXPECT_TRUE(ring.producer.produce(i));
    }
    EXPECT_TRUE(ring.producer.full());
    EXPECT_FALSE(ring.producer.produce(u64{99}));
    EXPECT_EQ(ring.producer.unpublished(), size);
    EXPECT_EQ(ring.producer.owed(), 0u);
    EXPECT_TRUE(ring.producer.publish());
    EXPECT_EQ(ring.producer.owed(), size);
    EXPECT_FALSE(ring.producer.publish()) << "nothing new, nothing to notify";
    ASSERT_EQ(*ring.consumer.available(), size);
    u64 value = 0;
    for (u64 i = 0; i < size; ++i) {
        ASSERT_TRUE(ring.consumer.take(value));
        EXPECT_EQ(value, i);
    }
    EXPECT_FALSE(ring.consumer.take(value));
    EXPECT_TRUE(ring.producer.retire(3));
    EXPECT_FALSE(ring.producer.retire(2)) << "more answers than requests";
    EXPECT_EQ(ring.producer.free(), 3u);
}

TEST(Ring, WithdrawnEntriesAreNeverSeen) {
    Pair<u32> ring(0);
    EXPECT_TRUE(ring.producer.produce(u64{1}));
    ring.producer.withdraw();
    EXPECT_FALSE(ring.producer.publish());
    EXPECT_EQ(*ring.consumer.available(), 0u);
    EXPECT_EQ(ring.producer.free(), size);
}

TEST(Ring, EntryLongerThanASlotIsRefused) {
    Pair<u32> ring(0);
    std::array<std::byte, 9> entry{};
    EXPECT_FALSE(ring.producer.produce(std::span<const std::byte>(entry)));
    EXPECT_FALSE(ring.producer.append(std::span<const std::byte>(entry))) << "not a ring of bytes";
    EXPECT_TRUE(ring.producer.produce(std::span<const std::byte>(entry).first(3))) << "the first bytes of a slot";
    EXPECT_TRUE(ring.producer.publish());
    EXPECT_EQ(*ring.consumer.available(), 1u);
    EXPECT_FALSE(ring.consumer.take(std::span<std::byte>(entry)));
}

TEST(Ring, PeerBeyondWhatCanBeBreaksIt) {
    for (const u32 bad : {size + 1, 0x8000'0000u, 0xffff'ffffu}) {
        Pair<u32> ring(0);
        ring.memory.store_release<u32>(layout.index, bad);
        const auto available = ring.consumer.available();
        ASSERT_FALSE(available) << bad;
        EXPECT_EQ(available.error().code, Code::protocol);
        EXPECT_EQ(available.error().seen, bad);
        EXPECT_TRUE(ring.consumer.broken());
        // It stays broken when the other side restores the value.
        ring.memory.store_release<u32>(layout.index, 1);
        EXPECT_FALSE(ring.consumer.available());
        EXPECT_FALSE(ring.consumer.arm(1));
    }
    Pair<u32> ring(0);
    ring.memory.store_release<u32>(layout.index, 3);
    EXPECT_FALSE(ring.consumer.available(2)) << "three answers to two questions";
}

TEST(Ring, PeerGoingBackwardsBreaksIt) {
    Pair<u32> ring(0);
    ring.memory.store_release<u32>(layout.index, 3);
    ASSERT_EQ(*ring.consumer.available(), 3u);
    u64 value = 0;
    ASSERT_TRUE(ring.consumer.take(value));
    ring.memory.store_release<u32>(layout.index, 2); // before 3, and before what was taken
    EXPECT_FALSE(ring.consumer.available());

    Pair<u32> taken(0);
    taken.memory.store_release<u32>(layout.index, 2);
    ASSERT_EQ(*taken.consumer.available(), 2u);
    ASSERT_TRUE(taken.consumer.skip(2));
    taken.memory.store_release<u32>(layout.index, 1);
    EXPECT_FALSE(taken.consumer.available());
}

TEST(Ring, ConsumerPositionsAreChecked) {
    Pair<u32> ring(0);
    for (u64 i = 0; i < 3; ++i) {
        ASSERT_TRUE(ring.producer.produce(i));
    }
    EXPECT_FALSE(ring.producer.observe(1)) << "not published yet";
    EXPECT_TRUE(ring.producer.publish());
    EXPECT_TRUE(ring.producer.observe(2));
    EXPECT_FALSE(ring.producer.observe(1)) << "backwards";
    EXPECT_FALSE(ring.producer.observe(4)) << "in front of the producer";
    EXPECT_TRUE(ring.producer.observe(3));
}

TEST(Ring, EventIndexDetectsExactlyWhenItIsPassed) {
    Pair<u32> ring(0xffff'fffe);
    const auto publish = [&](u32 event, u32 count) {
        Pair<u32> fresh(0xffff'fffe);
        fresh.memory.store_relaxed<u32>(layout.event, event);
        for (u64 i = 0; i < count; ++i) {
            EXPECT_TRUE(fresh.producer.produce(i));
        }
        return fresh.producer.publish();
    };
    EXPECT_FALSE(publish(0xffff'fffe, 2)) << "passed before";
    EXPECT_TRUE(publish(0xffff'ffff, 2));
    EXPECT_TRUE(publish(0, 2));
    EXPECT_FALSE(publish(1, 2)) << "not reached";
    EXPECT_TRUE(publish(1, 3));
    EXPECT_FALSE(publish(0x7fff'ffff, 4)) << "no request";
}

TEST(Ring, ArmAsksForAnEventAfterSoManyMore) {
    Pair<u32> ring(100);
    EXPECT_FALSE(*ring.consumer.arm(2));
    EXPECT_EQ(ring.memory.load_relaxed<u32>(layout.event), 102u);
}

TEST(Ring, ArmFindsConcurrentArrivals) {
    Pair<u32> ring(0);
    EXPECT_EQ(*ring.consumer.available(), 0u);
    ASSERT_TRUE(ring.producer.produce(u64{1}));
    ring.memory.store_relaxed<u32>(layout.event, 77); // no event is requested
    EXPECT_FALSE(ring.producer.publish());
    EXPECT_TRUE(*ring.consumer.arm(1)) << "or it would sleep for ever";
}

TEST(Ring, LayoutsAreChecked) {
    alignas(64) std::array<std::byte, 96> storage{};
    const FlatMemory memory{storage};
    using P = Producer<FlatMemory, FreeRunning<u32>, ReachedEvent>;
    using C = Consumer<FlatMemory, FreeRunning<u32>, ReachedEvent>;
    EXPECT_TRUE(P::create(memory, {.index = 0, .event = 8, .entries = 64, .stride = 8}, FreeRunning<u32>(4)));
    EXPECT_FALSE(P::create(memory, {.index = 0, .event = 8, .entries = 64, .stride = 8}, FreeRunning<u32>(8)))
        << "too long";
    EXPECT_FALSE(P::create(memory, {.index = 0, .event = 8, .entries = 64, .stride = 8}, FreeRunning<u32>(3)))
        << "no power of two";
    EXPECT_FALSE(P::create(memory, {.index = 2, .event = 8, .entries = 64, .stride = 8}, FreeRunning<u32>(4)))
        << "misaligned";
    EXPECT_FALSE(P::create(memory, {.index = 0, .event = 96, .entries = 64, .stride = 8}, FreeRunning<u32>(4)))
        << "outside";
    EXPECT_FALSE(P::create(memory, {.index = 0, .entries = 64, .stride = 8}, FreeRunning<u32>(4)))
        << "the rule needs an event";
    EXPECT_FALSE(C::create(memory, {.event = 8, .entries = 64, .stride = 8}, FreeRunning<u32>(4)))
        << "nothing to look at";
    EXPECT_FALSE(C::create(memory, {.index = 0, .event = 8, .entries = 1000, .stride = 8}, FreeRunning<u32>(4)));
    EXPECT_FALSE(FreeRunning<u16>(65536).valid());
    EXPECT_TRUE(FreeRunning<u16>(32768).valid());
    EXPECT_FALSE(Wrapped<u32>(1).valid());
    EXPECT_EQ(ring_entries(4096, 64, 112), 32u);
    EXPECT_EQ(ring_entries(100, 64, 112), 0u);
}

TEST(Ring, BytesGoRoundTheEnd) {
    alignas(64) std::array<std::byte, 64 + 24> storage{};
    const MappedMemory memory(storage.data(), storage.size());
    constexpr RingLayout bytes{.index = 0, .event = 8, .consumed = 16, .entries = 64, .stride = 1};
    auto out = *Producer<MappedMemory, Wrapped<u32>, EmptyToNonEmpty>::create(memory, bytes, Wrapped<u32>(24));
    auto in = *Consumer<MappedMemory, Wrapped<u32>, EmptyToNonEmpty>::create(memory, bytes, Wrapped<u32>(24));
    u8 next = 0;
    u8 expected = 0;
    for (int turn = 0; turn < 100; ++turn) {
        std::vector<std::byte> message(1 + turn % 23);
        for (auto& b : message) {
            b = static_cast<std::byte>(next++);
        }
        ASSERT_TRUE(out.append(message));
        ASSERT_FALSE(out.append(std::span<const std::byte>(storage).first(24 - message.size())))
            << "one byte stays free";
        EXPECT_TRUE(out.publish());
        ASSERT_EQ(*in.available(), message.size());
        std::vector<std::byte> got(message.size());
        ASSERT_TRUE(in.remove(got));
        for (const auto b : got) {
            ASSERT_EQ(std::to_integer<u8>(b), expected++);
        }
        in.release();
        ASSERT_TRUE(out.observe());
    }
    EXPECT_FALSE(out.observe(24)) << "no position at all";
}

// A host that rewrites the index and the entries between any two reads: every value is read once, and the checked value
// is the one used.
TEST(Ring, HostileMemoryIsReadOnce) {
    alignas(64) std::array<std::byte, 64 + size * 8> storage{};
    HostileMemory::State state{.storage = storage};
    const HostileMemory memory(state);
    using C = Consumer<HostileMemory, FreeRunning<u32>, ReachedEvent>;
    auto consumer = *C::create(memory, layout, FreeRunning<u32>(size));
    state.poke<u32>(0, 2);
    state.poke<u64>(64, 7);
    state.before_read = [](void*, HostileMemory::State& s, usize offset, usize) {
        if (s.reads > 1 && offset == 0) { // a second read of the index gets garbage
            s.poke<u32>(0, 0xdead);
        }
    };
    ASSERT_EQ(*consumer.available(), 2u);
    EXPECT_EQ(state.reads, 1u);
    u64 value = 0;
    ASSERT_TRUE(consumer.take(value));
    EXPECT_EQ(value, 7u);
    EXPECT_EQ(state.reads, 2u) << "one copy of the entry";
    ASSERT_TRUE(consumer.take(value));
    EXPECT_EQ(consumer.ready(), 0u);
    EXPECT_FALSE(consumer.available()) << "now it looks, and sees the nonsense";

    // Random garbage in every word before every read: never more entries than the ring holds, never a crash, broken in
    // the end.
    u64 random = 12345;
    state.context = &random;
    state.before_read = [](void* context, HostileMemory::State& s, usize offset, usize count) {
        u64& r = *static_cast<u64*>(context);
        r = r * 6364136223846793005u + 1442695040888963407u;
        if (offset < 64) {
            s.poke<u32>(offset, static_cast<u32>(r >> 33) % 7);
        } else {
            std::memset(s.storage.data() + offset, static_cast<int>(r >> 56), count);
        }
    };
    u32 broken = 0;
    for (int attempt = 0; attempt < 1000; ++attempt) {
        auto c = *C::create(memory, layout, FreeRunning<u32>(size));
        for (int look = 0; look < 100; ++look) {
            const auto available = c.available();
            if (!available) {
                ++broken;
                break;
            }
            ASSERT_LE(*available, size);
            while (c.take(value)) {
            }
        }
    }
    EXPECT_EQ(broken, 1000u);
}

} // namespace
