// The two virtqueues against a device written from the specification (unit/io/ring_virtqueue_fake.hpp), and against
// devices that violate the rules. Common behaviour is tested for both formats; format-specific tests follow.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import io.ring.any;
import io.ring.hostile;

#include "unit/io/ring_virtqueue_fake.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using virtqueue_fake::Chain;
using virtqueue_fake::Guest;
using virtqueue_fake::Piece;

struct Split {
    template <class M>
    using Queue = SplitQueue<M>;
    using Device = virtqueue_fake::SplitDevice;
    static constexpr bool packed = false;
};
struct Packed {
    template <class M>
    using Queue = PackedQueue<M>;
    using Device = virtqueue_fake::PackedDevice;
    static constexpr bool packed = true;
};

/// io.ring.any in one of its formats.
template <class M, bool is_packed>
struct OneFormat : AnyQueue<M> {
    static VirtqueueLayout layout(u32 size) { return AnyQueue<M>::layout(size, is_packed); }
    static Result<OneFormat> create(M memory, const VirtqueueLayout& at, u32 size, std::span<VirtqueueRow> rows,
                                    VirtqueueOptions options) {
        options.packed = is_packed;
        auto queue = AnyQueue<M>::create(memory, at, size, rows, options);
        if (!queue) {
            return queue.error();
        }
        EXPECT_EQ(queue->packed(), is_packed);
        return OneFormat{*queue};
    }
};
struct AnySplit : Split {
    template <class M>
    using Queue = OneFormat<M, false>;
};
struct AnyPacked : Packed {
    template <class M>
    using Queue = OneFormat<M, true>;
};

constexpr usize table_bytes = 16 * 64; // of each indirect table

/// A queue in guest memory, followed by `tables` indirect tables, and the device.
template <class Kind>
struct Rig {
    using Queue = typename Kind::template Queue<HostileMemory>;

    u32 size;
    VirtqueueOptions options;
    VirtqueueLayout layout;
    usize tables_at;
    Guest guest;
    HostileMemory::State state;
    std::vector<VirtqueueRow> rows;
    std::deque<HostileMemory::State> tables;
    Queue queue;
    typename Kind::Device device;

    explicit Rig(u32 queue_size, VirtqueueOptions with = {}, u32 table_count = 0)
        : size(queue_size), options(with), layout(Queue::layout(queue_size)),
          tables_at(align_up<usize>(layout.bytes, 64)), guest(tables_at + table_count * table_bytes),
          state{.storage = {guest.data(), layout.bytes}}, rows(queue_size), queue(make()),
          device(guest, {queue_size, guest.bus + layout.descriptors, guest.bus + layout.driver,
                         guest.bus + layout.device, with.event_index, with.in_order}) {
        for (u32 i = 0; i < table_count; ++i) {
            tables.push_back({.storage = {guest.data() + tables_at + i * table_bytes, table_bytes}});
        }
    }
    Queue make() {
        std::memset(guest.data(), 0xa5, guest.size()); // create() must write the zeroes
        return *Queue::create(HostileMemory(state), layout, size, rows, options);
    }
    u64 table_bus(u32 i) const { return guest.bus + tables_at + i * table_bytes; }

    /// Adds a buffer of `readable` and then `writable` elements, with addresses and lengths derived from the slot.
    std::vector<Piece> pieces(u16 slot, u32 readable, u32 writable) {
        std::vector<Piece> all;
        for (u32 i = 0; i < readable + writable; ++i) {
            all.push_back({0x2'0000'0000 + u64{slot} * 0x10000 + i * 0x100, 16 + slot % 7 + i, i >= readable});
        }
        return all;
    }
    static std::vector<BufferElement> elements(const std::vector<Piece>& pieces) {
        std::vector<BufferElement> all;
        for (const Piece& piece : pieces) {
            all.push_back({piece.bus, piece.length, piece.writable});
        }
        return all;
    }
    Result<void> add(u16 slot, u32 readable, u32 writable) {
        return queue.add(slot, elements(pieces(slot, readable, writable)));
    }
    /// One buffer of one writable element, published.
    void ask(u16 slot) {
        ASSERT_TRUE(add(slot, 0, 1));
        static_cast<void>(queue.publish());
    }
    Chain pop() {
        auto chain = device.pop();
        EXPECT_TRUE(chain) << "nothing there";
        return chain.value_or(Chain{});
    }
    UsedBuffer taken() {
        const auto used = queue.take();
        EXPECT_TRUE(used && *used) << (used ? "nothing" : used.error().message);
        return used && *used ? **used : UsedBuffer{0xdead, 0};
    }
    bool nothing() {
        const auto used = queue.take();
        return used && !*used;
    }
    /// take() reports the violated rule, on every later call as well.
    void expect_broken(std::string_view message, u64 expected, u64 seen) {
        const auto used = queue.take();
        ASSERT_FALSE(used);
        EXPECT_EQ(used.error().code, Code::protocol);
        EXPECT_EQ(used.error().message, message);
        EXPECT_EQ(used.error().expected, expected);
        EXPECT_EQ(used.error().seen, seen);
        EXPECT_TRUE(queue.broken());
        const u64 reads = state.reads;
        EXPECT_EQ(queue.take().error().message, message);
        EXPECT_EQ(queue.arm(1).error().message, message);
        EXPECT_EQ(add(0, 1, 0).error().code, Code::protocol);
        EXPECT_FALSE(queue.publish());
        EXPECT_EQ(state.reads, reads) << "nothing of the device's is read any more";
    }

    // Writes of a hostile device.
    template <class T>
    void poke(usize at, T value) {
        state.poke(at, value);
    }
    void raw_used(u32 position, u32 id, u32 length, u16 index) // split: an element, and the index
        requires(!Kind::packed)
    {
        poke<u32>(layout.device + 4 + 8 * (position % size), id);
        poke<u32>(layout.device + 8 + 8 * (position % size), length);
        poke<u16>(layout.device + 2, index);
    }
    void raw_used(u32 position, u16 id, u32 length, u16 flags) // packed: a descriptor
        requires(Kind::packed)
    {
        poke<u32>(16 * position + 8, length);
        poke<u16>(16 * position + 12, id);
        poke<u16>(16 * position + 14, flags);
    }
    /// A used entry with this id and length at the first position of a fresh queue.
    void first_used(u32 id, u32 length) {
        if constexpr (Kind::packed) {
            raw_used(0, static_cast<u16>(id), length, 0x8082);
        } else {
            raw_used(0, id, length, 1);
        }
    }
};

constexpr std::string_view unknown_id = "the device has returned a buffer that it does not hold";
constexpr std::string_view too_long = "the device says that it has written more than the buffer holds";
constexpr std::string_view too_many = "the device has returned more buffers than it holds";

template <class Kind>
class Virtqueues : public testing::Test {};
using Kinds = testing::Types<Split, Packed, AnySplit, AnyPacked>;
struct Names {
    template <class Kind>
    static std::string GetName(int) {
        return std::string(std::is_same_v<Kind, Split> || std::is_same_v<Kind, Packed> ? "" : "Any") +
               (Kind::packed ? "Packed" : "Split");
    }
};
TYPED_TEST_SUITE(Virtqueues, Kinds, Names);

template <class Kind>
std::vector<u32> sizes() {
    return Kind::packed ? std::vector<u32>{1, 2, 3, 5, 7, 8, 100} : std::vector<u32>{1, 2, 4, 8, 128};
}

// ---- common behaviour ----

TYPED_TEST(Virtqueues, ABufferArrivesAsItWasAddedAndComesBack) {
    Rig<TypeParam> rig(8);
    EXPECT_EQ(rig.queue.size(), 8u);
    ASSERT_TRUE(rig.add(42, 1, 2));
    EXPECT_EQ(rig.queue.free(), 5u);
    EXPECT_EQ(rig.queue.outstanding(), 1u);
    EXPECT_EQ(rig.device.pending(), 0u) << "nothing is seen before publish()";
    EXPECT_FALSE(rig.device.pop());
    EXPECT_TRUE(rig.queue.publish()) << "a fresh device wants to be notified";
    EXPECT_FALSE(rig.queue.publish()) << "nothing new";
    const Chain chain = rig.pop();
    EXPECT_EQ(chain.pieces, rig.pieces(42, 1, 2));
    EXPECT_FALSE(rig.device.pop());
    EXPECT_TRUE(rig.nothing());
    rig.device.push(chain, 17);
    const UsedBuffer used = rig.taken();
    EXPECT_EQ(used.slot, 42u);
    EXPECT_EQ(used.length, 17u);
    EXPECT_TRUE(rig.nothing());
    EXPECT_EQ(rig.queue.free(), 8u);
    EXPECT_EQ(rig.queue.outstanding(), 0u);
    EXPECT_EQ(rig.guest.fault, "");
}

// Buffers of all shapes, returned in any order, over many laps of queues of many sizes.
TYPED_TEST(Virtqueues, AnyOrderAnyShapeAnySize) {
    std::mt19937 random(7);
    for (const u32 size : sizes<TypeParam>()) {
        for (const bool event_index : {false, true}) {
            Rig<TypeParam> rig(size, {.event_index = event_index, .indirect = true}, 4);
            std::map<u16, std::vector<Piece>> outstanding; // by slot
            std::vector<bool> table_taken(4);
            std::map<u16, u32> table_of;
            std::vector<Chain> held;
            u16 slot = 0;
            u32 free = size;
            u64 back = 0;
            for (int turn = 0; turn < 2000; ++turn) {
                for (u32 n = random() % 4; n != 0; --n) {
                    const u32 count = 1 + random() % std::min(size, 6u);
                    const u32 readable = random() % (count + 1);
                    const auto pieces = rig.pieces(++slot, readable, count - readable);
                    const auto elements = rig.elements(pieces);
                    u32 table = 0;
                    while (table < 4 && table_taken[table]) {
                        ++table;
                    }
                    const bool indirect = table < 4 && random() % 3 == 0;
                    const u32 need = indirect ? 1 : count;
                    const auto added = indirect
                                           ? rig.queue.add_indirect(slot, elements, HostileMemory(rig.tables[table]),
                                                                    rig.table_bus(table))
                                           : rig.queue.add(slot, elements);
                    ASSERT_EQ(added.has_value(), need <= free);
                    if (!added) {
                        ASSERT_EQ(added.error().code, Code::exhausted);
                        continue;
                    }
                    free -= need;
                    ASSERT_EQ(rig.queue.free(), free);
                    outstanding[slot] = pieces;
                    if (indirect) {
                        table_taken[table] = true;
                        table_of[slot] = table;
                    }
                }
                static_cast<void>(rig.queue.publish());
                while (random() % 4 != 0) {
                    auto chain = rig.device.pop();
                    if (!chain) {
                        break;
                    }
                    held.push_back(*chain);
                }
                while (!held.empty() && random() % 3 != 0) {
                    const usize which = random() % held.size();
                    const u32 length = static_cast<u32>(random() % (held[which].writable() + 1));
                    rig.device.push(held[which], length);
                    const u16 given = static_cast<u16>((held[which].pieces.front().bus - 0x2'0000'0000) / 0x10000);
                    ASSERT_EQ(outstanding.at(given), held[which].pieces);
                    const u32 descriptors = held[which].descriptors;
                    held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
                    const UsedBuffer used = rig.taken();
                    ASSERT_EQ(used.slot, given);
                    ASSERT_EQ(used.length, length);
                    outstanding.erase(given);
                    if (const auto table = table_of.find(given); table != table_of.end()) {
                        table_taken[table->second] = false;
                        table_of.erase(table);
                    }
                    free += descriptors;
                    ++back;
                }
                ASSERT_EQ(rig.queue.free(), free);
                ASSERT_EQ(rig.queue.outstanding(), outstanding.size());
                ASSERT_EQ(rig.guest.fault, "") << "size " << size << ", turn " << turn;
            }
            EXPECT_GT(back, 500u);
        }
    }
}

// More buffers than a 16-bit index counts, each time with all of them in flight.
TYPED_TEST(Virtqueues, IndicesWrap) {
    Rig<TypeParam> rig(8, {.event_index = true});
    for (u32 turn = 0; turn < 70000 / 8; ++turn) {
        for (u16 slot = 0; slot < 8; ++slot) {
            ASSERT_TRUE(rig.add(slot, 0, 1));
        }
        ASSERT_FALSE(rig.add(8, 0, 1));
        static_cast<void>(rig.queue.publish());
        std::array<Chain, 8> chains;
        for (Chain& chain : chains) {
            chain = rig.pop();
        }
        ASSERT_FALSE(rig.device.pop());
        for (u32 i = 8; i != 0; --i) { // in reverse
            rig.device.push(chains[i - 1], i);
        }
        for (u32 i = 8; i != 0; --i) {
            const UsedBuffer used = rig.taken();
            ASSERT_EQ(used.slot, i - 1);
            ASSERT_EQ(used.length, i);
        }
        ASSERT_TRUE(rig.nothing());
    }
    EXPECT_EQ(rig.guest.fault, "");
}

TYPED_TEST(Virtqueues, TheLargestQueue) {
    Rig<TypeParam> rig(32768);
    for (u32 round = 0; round < 3; ++round) {
        for (u32 slot = 0; slot < 32768; ++slot) {
            ASSERT_TRUE(rig.add(static_cast<u16>(slot), 0, 1));
        }
        EXPECT_EQ(rig.queue.free(), 0u);
        EXPECT_EQ(rig.add(0, 1, 0).error().code, Code::exhausted);
        EXPECT_TRUE(rig.queue.publish());
        EXPECT_TRUE(rig.nothing());
        std::vector<Chain> chains;
        while (auto chain = rig.device.pop()) {
            chains.push_back(*chain);
        }
        ASSERT_EQ(chains.size(), 32768u);
        for (const Chain& chain : chains) {
            rig.device.push(chain, 1);
        }
        for (u32 slot = 0; slot < 32768; ++slot) {
            ASSERT_EQ(rig.taken().slot, slot);
        }
        EXPECT_TRUE(rig.nothing());
    }
    EXPECT_EQ(rig.guest.fault, "");
}

TYPED_TEST(Virtqueues, BuffersThatBreakARuleAreRefused) {
    Rig<TypeParam> rig(4, {.indirect = true}, 1);
    const HostileMemory table(rig.tables[0]);
    const auto refused = [&](const std::vector<BufferElement>& elements) {
        const auto direct = rig.queue.add(1, elements);
        const auto indirect = rig.queue.add_indirect(1, elements, table, rig.table_bus(0));
        return !direct && direct.error().code == Code::bad_argument && !indirect &&
               indirect.error().code == Code::bad_argument;
    };
    EXPECT_TRUE(refused({}));
    EXPECT_TRUE(refused({{0x1000, 0, false}})) << "no bytes";
    EXPECT_TRUE(refused({{0x1000, 1, true}, {0x2000, 1, false}})) << "readable after writable";
    EXPECT_TRUE(refused({{0x1000, 1, false}, {0x2000, 1, true}, {0x3000, 1, false}}));
    EXPECT_TRUE(refused(std::vector<BufferElement>(5, {0x1000, 1, false}))) << "more than the queue has";
    EXPECT_TRUE(refused({{0x1000, 0x8000'0000, false}, {0x2000, 0x8000'0000, true}})) << "2^32 bytes";
    EXPECT_TRUE(rig.queue.add(1, std::vector<BufferElement>{{0x1000, 0x8000'0000, false}, {0x2000, 0x7fff'ffff, true}}))
        << "the longest";
    HostileMemory::State small{.storage = rig.tables[0].storage.first(16)};
    const std::vector<BufferElement> two(2, {0x1000, 1, false});
    EXPECT_EQ(rig.queue.add_indirect(2, two, HostileMemory(small), rig.table_bus(0)).error().code, Code::bad_argument);
    EXPECT_EQ(rig.queue.free(), 2u);
    EXPECT_EQ(rig.queue.outstanding(), 1u);
    Rig<TypeParam> without(4, {}, 1);
    EXPECT_EQ(without.queue.add_indirect(1, two, HostileMemory(without.tables[0]), without.table_bus(0)).error().code,
              Code::not_supported);
}

TYPED_TEST(Virtqueues, AnIndirectTableTakesOneDescriptor) {
    Rig<TypeParam> rig(4, {.indirect = true}, 4);
    for (u16 slot = 0; slot < 4; ++slot) {
        ASSERT_TRUE(rig.queue.add_indirect(slot, rig.elements(rig.pieces(slot, 1, 3)), HostileMemory(rig.tables[slot]),
                                           rig.table_bus(slot)));
    }
    EXPECT_EQ(rig.queue.free(), 0u);
    EXPECT_EQ(
        rig.queue.add_indirect(4, rig.elements(rig.pieces(4, 1, 3)), HostileMemory(rig.tables[0]), rig.table_bus(0))
            .error()
            .code,
        Code::exhausted);
    EXPECT_TRUE(rig.queue.publish());
    for (u16 slot = 0; slot < 4; ++slot) {
        const Chain chain = rig.pop();
        EXPECT_TRUE(chain.indirect);
        EXPECT_EQ(chain.descriptors, 1u);
        EXPECT_EQ(chain.pieces, rig.pieces(slot, 1, 3));
        rig.device.push(chain, static_cast<u32>(chain.writable()));
        EXPECT_EQ(rig.taken().length, chain.writable());
    }
    EXPECT_EQ(rig.guest.fault, "");
}

// ---- notifications ----

// The driver notifies exactly when the position named by the device is passed, anywhere in the ring.
TYPED_TEST(Virtqueues, PublishNotifiesWhenTheEventIsPassed) {
    for (const u32 size : sizes<TypeParam>()) {
        Rig<TypeParam> rig(size, {.event_index = true});
        for (u32 start = 0; start < 3 * size + 3; ++start) {
            for (u32 batch = 1; batch <= size; batch += 1 + size / 10) {
                const u32 ahead = 1 + (start + batch) % (size + 1); // notify at this count
                rig.device.want(std::min(ahead, size));
                for (u32 i = 0; i < batch; ++i) {
                    ASSERT_TRUE(rig.add(static_cast<u16>(i), 1, 0));
                }
                ASSERT_EQ(rig.queue.publish(), batch >= std::min(ahead, size))
                    << "size " << size << ", " << batch << " buffers, wanted " << ahead;
                for (u32 i = 0; i < batch; ++i) {
                    rig.device.push(rig.pop(), 0);
                    rig.taken();
                }
            }
            // one more, so that the next round starts at another position
            rig.device.want_none();
            ASSERT_TRUE(rig.add(0, 1, 0));
            ASSERT_FALSE(rig.queue.publish()) << "not wanted";
            rig.device.push(rig.pop(), 0);
            rig.taken();
        }
        EXPECT_EQ(rig.guest.fault, "");
    }
}

TYPED_TEST(Virtqueues, PublishObeysTheFlags) {
    Rig<TypeParam> rig(4);
    for (int turn = 0; turn < 10; ++turn) {
        if (turn % 2 == 0) {
            rig.device.want(1);
        } else {
            rig.device.want_none();
        }
        ASSERT_TRUE(rig.add(1, 1, 0));
        EXPECT_EQ(rig.queue.publish(), turn % 2 == 0);
        rig.device.push(rig.pop(), 0);
        rig.taken();
    }
}

// With an event index, `count` buffers of equal length raise one event, after exactly that many.
TYPED_TEST(Virtqueues, ArmAsksForAnEventAfterSoMany) {
    for (const u32 length : {1u, 3u}) {
        for (const u32 size : sizes<TypeParam>()) {
            const u32 most = size / length;
            if (most == 0) {
                continue;
            }
            Rig<TypeParam> rig(size, {.event_index = true});
            for (u32 turn = 0; turn < 3 * size; ++turn) {
                const u32 batch = 1 + turn % most;
                const u32 count = 1 + turn / 2 % most;
                for (u32 i = 0; i < batch; ++i) {
                    ASSERT_TRUE(rig.add(static_cast<u16>(i), length, 0));
                }
                static_cast<void>(rig.queue.publish());
                static_cast<void>(rig.device.interrupt());
                const auto armed = rig.queue.arm(count);
                ASSERT_TRUE(armed && !*armed);
                for (u32 i = 1; i <= batch; ++i) {
                    rig.device.push(rig.pop(), 0);
                    ASSERT_EQ(rig.device.interrupt(), i == std::min(count, batch))
                        << "size " << size << ", " << count << " of " << batch;
                }
                for (u32 i = 0; i < batch; ++i) {
                    rig.taken();
                }
            }
            EXPECT_EQ(rig.guest.fault, "");
        }
    }
}

// Buffers of different lengths, in any order: an event after at most that many.
TYPED_TEST(Virtqueues, AnEventIsNeverLaterThanRequested) {
    std::mt19937 random(3);
    for (const u32 size : sizes<TypeParam>()) {
        Rig<TypeParam> rig(size, {.event_index = true});
        for (u32 turn = 0; turn < 500; ++turn) {
            u32 batch = 0;
            while (rig.add(static_cast<u16>(batch), 1 + random() % std::min(size, 4u), 0)) {
                ++batch;
                if (random() % 5 == 0) {
                    break;
                }
            }
            if (batch == 0) {
                continue;
            }
            static_cast<void>(rig.queue.publish());
            static_cast<void>(rig.device.interrupt());
            const u32 count = 1 + random() % batch;
            ASSERT_FALSE(*rig.queue.arm(count));
            std::vector<Chain> held;
            for (u32 i = 0; i < batch; ++i) {
                held.push_back(rig.pop());
            }
            std::shuffle(held.begin(), held.end(), random);
            bool event = false;
            for (u32 i = 1; i <= batch; ++i) {
                rig.device.push(held[i - 1], 0);
                event = rig.device.interrupt() || event;
                ASSERT_TRUE(event || i < count) << "size " << size << ", " << count << " of " << batch;
            }
            for (u32 i = 0; i < batch; ++i) {
                rig.taken();
            }
        }
        EXPECT_EQ(rig.guest.fault, "");
    }
}

TYPED_TEST(Virtqueues, ArmAndDisarmWithoutAnEventIndex) {
    Rig<TypeParam> rig(4);
    const auto one = [&] {
        rig.ask(1);
        rig.device.push(rig.pop(), 1);
        const bool event = rig.device.interrupt();
        rig.taken();
        return event;
    };
    EXPECT_TRUE(one()) << "a fresh queue wants events";
    rig.queue.disarm();
    EXPECT_FALSE(one());
    EXPECT_FALSE(one());
    EXPECT_FALSE(*rig.queue.arm(1));
    EXPECT_TRUE(one());
    EXPECT_FALSE(*rig.queue.arm(3)) << "a count cannot be expressed: the first raises it";
    EXPECT_TRUE(one());
    EXPECT_EQ(rig.guest.fault, "");
}

TYPED_TEST(Virtqueues, DisarmWithAnEventIndex) {
    Rig<TypeParam> rig(4, {.event_index = true});
    EXPECT_FALSE(*rig.queue.arm(1));
    rig.ask(1);
    rig.device.push(rig.pop(), 1);
    EXPECT_TRUE(rig.device.interrupt());
    rig.taken();
    rig.queue.disarm();
    for (int i = 0; i < 10; ++i) {
        rig.ask(1);
        rig.device.push(rig.pop(), 1);
        EXPECT_FALSE(rig.device.interrupt());
        rig.taken();
    }
    EXPECT_EQ(rig.guest.fault, "");
}

TYPED_TEST(Virtqueues, ArmFindsConcurrentArrivals) {
    for (const bool event_index : {false, true}) {
        Rig<TypeParam> rig(4, {.event_index = event_index});
        rig.ask(1);
        EXPECT_FALSE(*rig.queue.arm(1));
        rig.queue.disarm();
        rig.device.push(rig.pop(), 1);
        EXPECT_TRUE(*rig.queue.arm(1)) << "or it would sleep for ever";
        EXPECT_EQ(rig.taken().slot, 1u);
        EXPECT_FALSE(*rig.queue.arm(1));
    }
}

// Buffers that are added but not published cannot be returned, and are not waited for.
TYPED_TEST(Virtqueues, ArmCountsWhatIsPublished) {
    Rig<TypeParam> rig(8, {.event_index = true});
    rig.ask(1);
    ASSERT_TRUE(rig.add(2, 0, 1));
    ASSERT_TRUE(rig.add(3, 0, 1));
    static_cast<void>(rig.device.interrupt());
    EXPECT_FALSE(*rig.queue.arm(3));
    rig.device.push(rig.pop(), 1);
    EXPECT_TRUE(rig.device.interrupt());
}

TYPED_TEST(Virtqueues, NotificationData) {
    Rig<TypeParam> rig(4);
    u32 added = 0;
    for (int turn = 0; turn < 10; ++turn) {
        const u32 index = TypeParam::packed ? added % 4 | (added / 4 % 2 == 0 ? 0x8000u : 0u) : added;
        EXPECT_EQ(rig.queue.next_available(), index);
        rig.ask(1);
        ++added;
        rig.device.push(rig.pop(), 0);
        rig.taken();
    }
}

// ---- in order ----

TYPED_TEST(Virtqueues, InOrderOneEntryForSeveralBuffers) {
    std::mt19937 random(5);
    for (const u32 size : sizes<TypeParam>()) {
        Rig<TypeParam> rig(size, {.in_order = true});
        std::deque<u16> slots;
        std::vector<Chain> held;
        u16 slot = 0;
        for (int turn = 0; turn < 1000; ++turn) {
            while (random() % 4 != 0) {
                const u32 count = 1 + random() % std::min(size, 3u);
                if (!rig.add(slot, 0, count)) {
                    break;
                }
                slots.push_back(slot++);
            }
            static_cast<void>(rig.queue.publish());
            while (auto chain = rig.device.pop()) {
                held.push_back(*chain);
            }
            if (held.empty()) {
                continue;
            }
            const u32 batch = 1 + random() % held.size();
            rig.device.push_batch(std::span(held).first(batch), 3);
            for (u32 i = 0; i < batch; ++i) {
                const UsedBuffer used = rig.taken();
                ASSERT_EQ(used.slot, slots.front());
                ASSERT_EQ(used.length, i + 1 == batch ? 3 : held[i].writable()) << "passed over: used in full";
                slots.pop_front();
            }
            ASSERT_TRUE(rig.nothing());
            held.erase(held.begin(), held.begin() + batch);
            ASSERT_EQ(rig.queue.outstanding(), held.size());
            ASSERT_EQ(rig.guest.fault, "") << "size " << size << ", turn " << turn;
        }
    }
}

TYPED_TEST(Virtqueues, InOrderABatchIsNotForgottenWhenArming) {
    Rig<TypeParam> rig(8, {.event_index = true, .in_order = true});
    rig.ask(1);
    rig.ask(2);
    const std::array<Chain, 2> chains{rig.pop(), rig.pop()};
    rig.device.push_batch(chains, 1);
    EXPECT_EQ(rig.taken().slot, 1u);
    EXPECT_TRUE(*rig.queue.arm(1)) << "the second one of the batch is there";
    EXPECT_EQ(rig.taken().slot, 2u);
    EXPECT_FALSE(*rig.queue.arm(1));
}

// ---- devices that violate a rule ----

TYPED_TEST(Virtqueues, AnIdThatIsNoneIsRefused) {
    const std::vector<u32> ids = TypeParam::packed ? std::vector<u32>{4, 5, 0x7fff, 0xfffd, 0xfffe, 0xffff}
                                                   : std::vector<u32>{4, 5, 0xffff, 0x10000, 0xffff'ffff};
    for (const u32 id : ids) {
        Rig<TypeParam> rig(4);
        rig.ask(1);
        rig.first_used(id, 0);
        rig.expect_broken(unknown_id, 4, id);
    }
}

TYPED_TEST(Virtqueues, AnIdThatIsNotInFlightIsRefused) {
    Rig<TypeParam> rig(4);
    rig.ask(1);
    rig.first_used(1, 0); // never added
    rig.expect_broken(unknown_id, 4, 1);
}

TYPED_TEST(Virtqueues, AnIdThatIsNotPublishedIsRefused) {
    Rig<TypeParam> rig(4);
    rig.ask(1);
    ASSERT_TRUE(rig.add(2, 0, 1));
    ASSERT_TRUE(rig.add(3, 0, 1));
    rig.first_used(1, 0);
    rig.expect_broken(unknown_id, 4, 1);
}

TYPED_TEST(Virtqueues, ABufferThatComesBackTwiceIsRefused) {
    Rig<TypeParam> rig(4);
    rig.ask(1);
    rig.ask(2);
    const Chain first = rig.pop();
    rig.device.push(first, 1);
    EXPECT_EQ(rig.taken().slot, 1u);
    rig.device.push(first, 1);
    rig.expect_broken(unknown_id, 4, first.id);
}

// A returned id is reused as late as possible: a repeated completion does not hit the next buffer.
TYPED_TEST(Virtqueues, ARepeatedAnswerDoesNotHitTheNextBuffer) {
    Rig<TypeParam> rig(4);
    rig.ask(1);
    const Chain first = rig.pop();
    rig.device.push(first, 1);
    EXPECT_EQ(rig.taken().slot, 1u);
    rig.ask(2);
    rig.device.push(first, 1);
    rig.expect_broken(unknown_id, 4, first.id);
}

TYPED_TEST(Virtqueues, MoreThanTheBufferHoldsIsRefused) {
    for (const u32 length : {18u, 0x8000'0000u, 0xffff'ffffu}) {
        Rig<TypeParam> rig(4);
        rig.ask(1); // 17 bytes
        rig.first_used(0, length);
        rig.expect_broken(too_long, 17, length);
    }
    Rig<TypeParam> all(4);
    all.ask(1);
    all.first_used(0, 17);
    EXPECT_EQ(all.taken().length, 17u);
    Rig<TypeParam> readable(4);
    ASSERT_TRUE(readable.add(1, 2, 0));
    static_cast<void>(readable.queue.publish());
    readable.first_used(0, 1);
    readable.expect_broken(too_long, 0, 1);
}

TYPED_TEST(Virtqueues, AnIndirectBufferIsBoundedByItsTableEntries) {
    Rig<TypeParam> rig(4, {.indirect = true}, 1);
    const std::vector<BufferElement> elements{{0x1000, 100, false}, {0x2000, 10, true}, {0x3000, 1, true}};
    ASSERT_TRUE(rig.queue.add_indirect(1, elements, HostileMemory(rig.tables[0]), rig.table_bus(0)));
    static_cast<void>(rig.queue.publish());
    rig.first_used(0, 12);
    rig.expect_broken(too_long, 11, 12);
}

TYPED_TEST(Virtqueues, AnUnrequestedBufferIsRefused) {
    Rig<TypeParam> rig(4);
    rig.first_used(0, 0);
    rig.expect_broken(too_many, 0, 1);

    Rig<TypeParam> added(4);
    ASSERT_TRUE(added.add(1, 0, 1)); // not published
    added.first_used(0, 0);
    added.expect_broken(too_many, 0, 1);

    Rig<TypeParam> armed(4);
    armed.first_used(0, 0);
    const auto found = armed.queue.arm(1);
    if (found) { // found, and rejected when it is taken
        EXPECT_TRUE(*found);
        armed.expect_broken(too_many, 0, 1);
    } else {
        EXPECT_EQ(found.error().message, too_many);
        EXPECT_TRUE(armed.queue.broken());
    }
}

TYPED_TEST(Virtqueues, InOrderABufferThatIsNotTheOldestEndsTheOnesBefore) {
    Rig<TypeParam> rig(4, {.in_order = true});
    rig.ask(1);
    rig.ask(2);
    rig.first_used(0, 0);
    EXPECT_EQ(rig.taken().slot, 1u);
    // once more: not in flight
    if constexpr (TypeParam::packed) {
        rig.raw_used(1, 0, 0, 0x8080);
    } else {
        rig.raw_used(1, 0, 0, 2);
    }
    rig.expect_broken(unknown_id, 4, 0);
}

// The driver keeps its bookkeeping in private memory, out of the device's reach.
TYPED_TEST(Virtqueues, WhatTheDriverWroteIsNotReadAgain) {
    for (const bool in_order : {false, true}) {
        Rig<TypeParam> rig(8, {.in_order = in_order});
        for (u16 turn = 0; turn < 50; ++turn) {
            ASSERT_TRUE(rig.add(turn, 1, 2));
            ASSERT_TRUE(rig.add(turn + 100, 0, 1));
            static_cast<void>(rig.queue.publish());
            const std::array<Chain, 2> chains{rig.pop(), rig.pop()};
            if constexpr (TypeParam::packed) { // all but the flags read next
                for (u32 i = 0; i < 8; ++i) {
                    std::memset(rig.guest.data() + 16 * i, 0xff, 14);
                }
            } else {
                std::memset(rig.guest.data() + rig.layout.descriptors, 0xff, 16 * 8);
                std::memset(rig.guest.data() + rig.layout.driver + 4, 0xff, 2 * 8);
            }
            rig.device.push(chains[0], 5);
            rig.device.push(chains[1], 6);
            EXPECT_EQ(rig.taken().slot, turn);
            EXPECT_EQ(rig.taken().slot, turn + 100);
            ASSERT_EQ(rig.queue.free(), 8u);
        }
    }
}

// Garbage before every read: only buffers in flight are returned, each once, with a valid length.
TYPED_TEST(Virtqueues, GarbageBeforeEveryRead) {
    struct Noise {
        u64 value = 99;
        u64 next() { return value = value * 6364136223846793005u + 1442695040888963407u; }
    } noise;
    u32 broken = 0;
    u64 back = 0;
    for (u32 attempt = 0; attempt < 2000; ++attempt) {
        Rig<TypeParam> rig(4, {.event_index = attempt % 2 == 0, .in_order = attempt % 3 == 0});
        rig.state.context = &noise;
        rig.state.before_read = [](void* context, HostileMemory::State& s, usize offset, usize count) {
            const u64 r = static_cast<Noise*>(context)->next() >> 20;
            if (r % 64 == 0) { // garbage
                s.poke<u8>(offset + r / 64 % count, static_cast<u8>(r >> 16));
            } else if (count == 8) { // split: a used element
                s.poke<u32>(offset, r / 64 % 4);
                s.poke<u32>(offset + 4, (r >> 16) % 24);
            } else if (count == 6) { // packed: length and id
                s.poke<u32>(offset, (r >> 16) % 24);
                s.poke<u16>(offset + 4, r / 64 % 4);
            } else if (TypeParam::packed) { // flags: of either lap, or not used
                constexpr std::array<u16, 4> flags{0x8080, 0x8082, 0x0000, 0x0080};
                s.poke<u16>(offset, flags[r / 64 % 4]);
            } else { // split: an index advances, or not
                u16 value = 0;
                std::memcpy(&value, s.storage.data() + offset, 2);
                s.poke<u16>(offset, static_cast<u16>(value + r / 64 % 2));
            }
        };
        std::map<u16, u32> writable;
        u16 slot = 0;
        for (u32 look = 0; look < 200 && !rig.queue.broken(); ++look) {
            if (noise.next() >> 62 != 0 && rig.add(slot, look % 2, 1 + look % 2)) {
                u32 sum = 0;
                for (const Piece& piece : rig.pieces(slot, look % 2, 1 + look % 2)) {
                    sum += piece.writable ? piece.length : 0;
                }
                writable[slot++] = sum;
            }
            static_cast<void>(rig.queue.publish());
            if (const auto used = rig.queue.take(); used && *used) {
                ASSERT_EQ(writable.count((*used)->slot), 1u) << "not in flight";
                ASSERT_LE((*used)->length, writable[(*used)->slot]);
                writable.erase((*used)->slot);
                ++back;
            }
            ASSERT_EQ(rig.queue.outstanding(), writable.size());
            if (look % 5 == 0) {
                static_cast<void>(rig.queue.arm(1 + look % 3));
            }
        }
        broken += rig.queue.broken() ? 1 : 0;
    }
    EXPECT_GT(broken, 1000u);
    EXPECT_GT(back, 100u);
}

// ---- queue layout and options ----

TEST(AnyVirtqueue, TheLargestUsableSize) {
    using Queue = AnyQueue<FlatMemory>;
    for (const auto& [maximum, split, packed] : {std::array{0u, 0u, 0u},
                                                 {1u, 1u, 1u},
                                                 {3u, 2u, 3u},
                                                 {256u, 256u, 256u},
                                                 {1000u, 512u, 1000u},
                                                 {32767u, 16384u, 32767u},
                                                 {32768u, 32768u, 32768u},
                                                 {65535u, 32768u, 32768u},
                                                 {~0u, 32768u, 32768u}}) {
        EXPECT_EQ(Queue::usable_size(maximum, false), split) << maximum;
        EXPECT_EQ(Queue::usable_size(maximum, true), packed) << maximum;
    }
}

TYPED_TEST(Virtqueues, SizesAreChecked) {
    std::vector<VirtqueueRow> rows(65536);
    std::vector<u64> words(2 << 20);
    const FlatMemory memory(std::as_writable_bytes(std::span(words)));
    using Queue = typename TypeParam::template Queue<FlatMemory>;
    const auto accepted = [&](u32 size) {
        const auto queue = Queue::create(memory, Queue::layout(size), size, rows, {});
        EXPECT_TRUE(queue || queue.error().code == Code::bad_argument);
        return queue.has_value();
    };
    for (const u32 size : {1u, 2u, 4u, 256u, 1024u, 32768u}) {
        EXPECT_TRUE(accepted(size)) << size;
    }
    for (const u32 size : {3u, 5u, 100u, 32767u}) {
        EXPECT_EQ(accepted(size), TypeParam::packed) << size;
    }
    for (const u32 size : {0u, 32769u, 65535u, 65536u}) {
        EXPECT_FALSE(accepted(size)) << size;
    }
}

TYPED_TEST(Virtqueues, LayoutsAreChecked) {
    std::vector<VirtqueueRow> rows(8);
    using Queue = typename TypeParam::template Queue<FlatMemory>;
    const VirtqueueLayout good = Queue::layout(8);
    std::vector<u64> words(good.bytes / 8 + 64);
    const FlatMemory memory(std::as_writable_bytes(std::span(words)));
    const auto accepted = [&](const VirtqueueLayout& layout, u32 row_count = 8, usize bytes = ~usize{0}) {
        const FlatMemory part(std::as_writable_bytes(std::span(words)).first(std::min(bytes, words.size() * 8)));
        return Queue::create(part, layout, 8, std::span(rows).first(row_count), {}).has_value();
    };
    const auto with = [&](auto member, usize value) {
        VirtqueueLayout layout = good;
        layout.*member = value;
        return layout;
    };
    EXPECT_TRUE(accepted(good));
    EXPECT_FALSE(accepted(good, 7)) << "too few rows";
    EXPECT_FALSE(accepted(good, 8, good.device)) << "too little memory";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::descriptors, good.bytes + 256 + 8))) << "misaligned";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::driver, good.driver + 1))) << "misaligned";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::device, good.device + 2))) << "misaligned";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::device, words.size() * 8))) << "outside";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::device, ~usize{0} - 3))) << "outside";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::driver, good.descriptors + 4))) << "overlap";
    EXPECT_FALSE(accepted(with(&VirtqueueLayout::device, good.driver))) << "overlap";
    static_cast<void>(memory);
}

TYPED_TEST(Virtqueues, AQueueLeavesOtherMemoryAlone) {
    Rig<TypeParam> rig(4);
    std::vector<VirtqueueRow> rows(4);
    std::vector<std::byte> bytes(rig.layout.bytes + 64, std::byte{0x77});
    auto queue = *TypeParam::template Queue<FlatMemory>::create(FlatMemory(bytes), rig.layout, 4, rows, {});
    const std::array<BufferElement, 4> elements{{{1, 1, false}, {2, 2, false}, {3, 3, true}, {4, 4, true}}};
    ASSERT_TRUE(queue.add(1, elements));
    EXPECT_TRUE(queue.publish());
    EXPECT_FALSE(*queue.arm(1));
    for (usize i = rig.layout.bytes; i < bytes.size(); ++i) {
        EXPECT_EQ(bytes[i], std::byte{0x77});
    }
}

// ---- the order of the accesses ----

/// Ordinary memory that records stores, barriers and loads.
struct Record {
    struct Step {
        char what; // 'c' copy in, 's' store, 'S' store-release, 'l' load, 'L' load-acquire, 'B' barrier, 'o' copy out
        usize offset;
        usize count;
        bool operator==(const Step&) const = default;
    };
    std::vector<Step> steps;
};
std::ostream& operator<<(std::ostream& out, const Record::Step& step) {
    return out << step.what << ' ' << step.offset << '+' << step.count;
}
class RecordedMemory {
  public:
    RecordedMemory() = default;
    RecordedMemory(std::span<std::byte> storage, Record& record) : flat_(storage), record_(&record) {}
    usize size() const { return flat_.size(); }
    template <class W>
    W load_relaxed(usize at) const {
        record_->steps.push_back({'l', at, sizeof(W)});
        return flat_.load_relaxed<W>(at);
    }
    template <class W>
    W load_acquire(usize at) const {
        record_->steps.push_back({'L', at, sizeof(W)});
        return flat_.load_acquire<W>(at);
    }
    template <class W>
    void store_relaxed(usize at, W value) {
        record_->steps.push_back({'s', at, sizeof(W)});
        flat_.store_relaxed<W>(at, value);
    }
    template <class W>
    void store_release(usize at, W value) {
        record_->steps.push_back({'S', at, sizeof(W)});
        flat_.store_release<W>(at, value);
    }
    void full_barrier() const { record_->steps.push_back({'B', 0, 0}); }
    void copy_out(usize at, std::byte* into, usize count) const {
        record_->steps.push_back({'o', at, count});
        flat_.copy_out(at, into, count);
    }
    void copy_in(usize at, const std::byte* from, usize count) {
        record_->steps.push_back({'c', at, count});
        flat_.copy_in(at, from, count);
    }

  private:
    FlatMemory flat_;
    Record* record_ = nullptr;
};
using Steps = std::vector<Record::Step>;

const std::array<BufferElement, 2> request{{{0x1122'3344'5566'7788, 0x200, false}, {0x99, 0x11, true}}};

TEST(SplitVirtqueue, AccessesAreFewAndInOrder) {
    const VirtqueueLayout at = SplitQueue<RecordedMemory>::layout(4);
    alignas(64) std::array<std::byte, 256> bytes{};
    ASSERT_LE(at.bytes, bytes.size());
    Record record;
    std::array<VirtqueueRow, 4> rows;
    auto queue = *SplitQueue<RecordedMemory>::create(RecordedMemory(bytes, record), at, 4, rows, {.event_index = true});
    record.steps.clear();
    ASSERT_TRUE(queue.add(7, request));
    EXPECT_EQ(record.steps, (Steps{{'c', 0, 16}, {'c', 16, 16}, {'c', at.driver + 4, 2}}));
    record.steps.clear();
    EXPECT_TRUE(queue.publish());
    EXPECT_EQ(record.steps, (Steps{{'S', at.driver + 2, 2}, {'B', 0, 0}, {'l', at.device + 4 + 8 * 4, 2}}));
    record.steps.clear();
    EXPECT_FALSE(*queue.arm(1));
    EXPECT_EQ(record.steps, (Steps{{'s', at.driver + 4 + 2 * 4, 2}, {'B', 0, 0}, {'L', at.device + 2, 2}}));
    record.steps.clear();
    bytes[at.device + 2] = std::byte{1};
    EXPECT_TRUE(queue.take());
    EXPECT_EQ(record.steps, (Steps{{'L', at.device + 2, 2}, {'o', at.device + 4, 8}}));
}

TEST(PackedVirtqueue, AccessesAreFewAndInOrder) {
    const VirtqueueLayout at = PackedQueue<RecordedMemory>::layout(4);
    alignas(64) std::array<std::byte, 256> bytes{};
    ASSERT_LE(at.bytes, bytes.size());
    Record record;
    std::array<VirtqueueRow, 4> rows;
    auto queue =
        *PackedQueue<RecordedMemory>::create(RecordedMemory(bytes, record), at, 4, rows, {.event_index = true});
    record.steps.clear();
    ASSERT_TRUE(queue.add(7, request));
    ASSERT_TRUE(queue.add(8, std::span(request).first(1)));
    // The first flags are withheld; all other fields are written.
    EXPECT_EQ(record.steps, (Steps{{'c', 0, 14}, {'c', 16, 16}, {'c', 32, 16}}));
    record.steps.clear();
    EXPECT_TRUE(queue.publish());
    EXPECT_EQ(record.steps, (Steps{{'S', 14, 2}, {'B', 0, 0}, {'l', at.device, 4}}));
    record.steps.clear();
    EXPECT_FALSE(*queue.arm(1));
    EXPECT_EQ(record.steps, (Steps{{'s', at.driver, 4}, {'B', 0, 0}, {'L', 14, 2}}));
    record.steps.clear();
    bytes[14] = std::byte{0x80};
    bytes[15] = std::byte{0x80};
    EXPECT_TRUE(queue.take());
    EXPECT_EQ(record.steps, (Steps{{'L', 14, 2}, {'o', 8, 6}}));
}

// ---- split only ----

std::vector<u8> bytes_at(const std::byte* from, usize count) {
    std::vector<u8> all;
    for (usize i = 0; i < count; ++i) {
        all.push_back(std::to_integer<u8>(from[i]));
    }
    return all;
}
using Bytes = std::vector<u8>;

TEST(SplitVirtqueue, SizesAndAlignments) {
    using Queue = SplitQueue<MappedMemory>;
    constexpr VirtqueueLayout at = Queue::layout(256);
    static_assert(at.descriptors == 0 && at.driver == 4096 && at.device == 4096 + 576 &&
                  at.bytes == 4096 + 576 + 6 + 8 * 256);
    static_assert(Queue::layout(256, 4).device == 4096 + 6 + 2 * 256 + 2);
    // Legacy: the used ring starts at the next page [virtio-1.2 §2.7.2].
    static_assert(Queue::layout(256, 4096).device == 8192 && Queue::layout(8, 4096).device == 4096);
    static_assert(Queue::layout(32768).bytes == 524288 + 65600 + 6 + 262144);
}

TEST(SplitVirtqueue, BytesInMemory) {
    Rig<Split> rig(4, {.indirect = true}, 1);
    ASSERT_TRUE(rig.queue.add(7, request));
    ASSERT_TRUE(rig.queue.add_indirect(8, request, HostileMemory(rig.tables[0]), rig.table_bus(0)));
    static_cast<void>(rig.queue.publish());
    const std::byte* memory = rig.guest.data();
    EXPECT_EQ(bytes_at(memory, 48),
              (Bytes{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00, 0x02, 0, 0, 1, 0, 1, 0,    // NEXT, 1
                     0x99, 0,    0,    0,    0,    0,    0,    0,    0x11, 0,    0, 0, 2, 0, 0, 0,    // WRITE
                     0xc0, 0x00, 0,    0,    1,    0,    0,    0,    32,   0,    0, 0, 4, 0, 0, 0})); // INDIRECT
    ASSERT_EQ(rig.table_bus(0), 0x1'0000'00c0u);
    EXPECT_EQ(bytes_at(memory + 64, 8), (Bytes{0, 0, 2, 0, 0, 0, 2, 0})) << "flags, idx, heads 0 and 2";
    EXPECT_EQ(bytes_at(memory + rig.tables_at, 32),
              (Bytes{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00, 0x02, 0, 0, 1, 0, 1, 0,    // NEXT, 1
                     0x99, 0,    0,    0,    0,    0,    0,    0,    0x11, 0,    0, 0, 2, 0, 0, 0})); // WRITE
}

TEST(SplitVirtqueue, AnIndexThatCannotBeIsRefused) {
    for (const u16 index : {u16{3}, u16{4}, u16{0x8000}, u16{0xffff}}) { // two are in flight
        Rig<Split> rig(4);
        rig.ask(1);
        rig.ask(2);
        rig.raw_used(0, 0, 0, index);
        rig.expect_broken(too_many, 0, index);
    }
    Rig<Split> back(4); // backwards
    back.ask(1);
    back.ask(2);
    back.raw_used(0, 0, 0, 2);
    EXPECT_EQ(back.taken().slot, 1u);
    back.poke<u16>(back.layout.device + 2, 1);
    const auto found = back.queue.arm(1);
    ASSERT_FALSE(found);
    EXPECT_EQ(found.error().code, Code::protocol);
    EXPECT_TRUE(back.queue.broken());
    EXPECT_FALSE(back.queue.take());
}

TEST(SplitVirtqueue, ADescriptorInTheMiddleOfAChainIsNoBuffer) {
    Rig<Split> rig(4);
    ASSERT_TRUE(rig.add(1, 1, 2));
    static_cast<void>(rig.queue.publish());
    rig.first_used(1, 0);
    rig.expect_broken(unknown_id, 4, 1);
}

TEST(SplitVirtqueue, InOrderABatchThatTheIndexDoesNotCoverIsRefused) {
    Rig<Split> rig(4, {.in_order = true});
    rig.ask(1);
    rig.ask(2);
    rig.ask(3);
    rig.raw_used(0, 2, 0, 2); // the third buffer, so three of them, but an index that counts two
    rig.expect_broken(too_many, 2, 3);
}

// The announced entries are taken without rereading the index, and the device may advance meanwhile.
TEST(SplitVirtqueue, AnAdvancingIndexIsBoundedByTheBuffersInFlight) {
    Rig<Split> rig(4);
    for (u16 slot = 0; slot < 4; ++slot) {
        rig.ask(slot);
    }
    rig.state.before_read = [](void* context, HostileMemory::State&, usize offset, usize) {
        auto& r = *static_cast<Rig<Split>*>(context);
        if (offset == r.layout.device + 2) {
            r.raw_used(r.queue.size() - r.queue.outstanding(), r.queue.size() - r.queue.outstanding(), 0,
                       static_cast<u16>(r.queue.size() - r.queue.outstanding() + 1));
        }
    };
    rig.state.context = &rig;
    for (u16 slot = 0; slot < 4; ++slot) {
        EXPECT_EQ(rig.taken().slot, slot);
    }
    rig.expect_broken(too_many, 4, 5);
}

TEST(SplitVirtqueue, WithAnEventIndexTheFlagsAreIgnored) {
    Rig<Split> rig(4, {.event_index = true});
    rig.poke<u16>(rig.layout.device, 1); // NO_NOTIFY: the driver must ignore it [virtio-1.2 §2.7.10]
    rig.device.want(1);
    rig.poke<u16>(rig.layout.device, 1);
    ASSERT_TRUE(rig.add(1, 1, 0));
    EXPECT_TRUE(rig.queue.publish());
    Rig<Split> without(4);
    without.poke<u16>(without.layout.device + 4 + 8 * 4, 0x1234); // avail_event: ignored without the feature
    ASSERT_TRUE(without.add(1, 1, 0));
    EXPECT_TRUE(without.queue.publish());
}

// ---- packed only ----

TEST(PackedVirtqueue, SizesAndAlignments) {
    using Queue = PackedQueue<MappedMemory>;
    constexpr VirtqueueLayout at = Queue::layout(256);
    static_assert(at.descriptors == 0 && at.driver == 4096 && at.device == 4160 && at.bytes == 4224);
    static_assert(Queue::layout(5).driver == 128 && Queue::layout(1).driver == 64);
    static_assert(Queue::layout(32768).bytes == 524288 + 128);
}

TEST(PackedVirtqueue, BytesInMemory) {
    Rig<Packed> rig(5, {.indirect = true}, 1);
    ASSERT_TRUE(rig.queue.add(7, request));
    ASSERT_TRUE(rig.queue.add_indirect(8, request, HostileMemory(rig.tables[0]), rig.table_bus(0)));
    static_cast<void>(rig.queue.publish());
    const std::byte* memory = rig.guest.data();
    const Bytes first_lap{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00, 0x02, 0, 0, 0, 0, 0x81, 0, // NEXT
                          0x99, 0,    0,    0,    0,    0,    0,    0,    0x11, 0,    0, 0, 0, 0, 0x82, 0, // WRITE
                          0x00, 0x01, 0,    0,    1,    0,    0,    0,    32,   0,    0, 0, 1, 0, 0x84, 0};
    EXPECT_EQ(bytes_at(memory, 48), first_lap) << "AVAIL set, USED clear; id 0, 0, 1";
    ASSERT_EQ(rig.table_bus(0), 0x1'0000'0100u);
    EXPECT_EQ(bytes_at(memory + rig.tables_at, 32),
              (Bytes{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00, 0x02, 0, 0, 0, 0, 0, 0,    //
                     0x99, 0,    0,    0,    0,    0,    0,    0,    0x11, 0,    0, 0, 0, 0, 2, 0})); // WRITE
    rig.device.push(rig.pop(), 0);
    rig.device.push(rig.pop(), 0);
    rig.taken();
    rig.taken();
    // Positions 3 and 4, and then 0 in the second lap: AVAIL clear, USED set.
    const std::array<BufferElement, 3> three{{{1, 1, false}, {2, 2, true}, {3, 3, true}}};
    ASSERT_TRUE(rig.queue.add(9, three));
    static_cast<void>(rig.queue.publish());
    EXPECT_EQ(bytes_at(memory + 48, 32), (Bytes{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0x81, 0, //
                                                2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0x83, 0}));
    EXPECT_EQ(bytes_at(memory, 16), (Bytes{3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0x02, 0x80}));
}

TEST(PackedVirtqueue, FlagsThatDoNotMeanUsed) {
    Rig<Packed> rig(4);
    rig.ask(1);
    for (const u16 flags : {0x0000, 0x0080, 0x8000, 0x8002, 0x0082, 0x7f7f}) {
        rig.raw_used(0, 0, 0, flags);
        EXPECT_TRUE(rig.nothing()) << flags << ": not both, or those of another lap";
    }
    rig.raw_used(0, 0, 0, 0xffff);
    EXPECT_EQ(rig.taken().slot, 1u) << "bits that are reserved in a used descriptor are ignored";
}

// A device that marks positions ahead of the next one, or for the next lap: none is accepted early.
TEST(PackedVirtqueue, OnlyTheNextSlotIsRead) {
    Rig<Packed> rig(4);
    rig.ask(1);
    rig.ask(2);
    rig.raw_used(1, 1, 0, 0x8080);
    EXPECT_TRUE(rig.nothing());
    rig.raw_used(0, 0, 0, 0x8080);
    EXPECT_EQ(rig.taken().slot, 1u);
    EXPECT_EQ(rig.taken().slot, 2u);
    EXPECT_TRUE(rig.nothing());
    rig.raw_used(2, 0, 0, 0x8080); // nothing is in flight
    rig.expect_broken(too_many, 0, 1);
}

TEST(PackedVirtqueue, AMarkLeftForALaterLapIsOverwritten) {
    Rig<Packed> rig(2);
    rig.raw_used(1, 0, 0, 0x8080); // at the position of the second buffer
    rig.ask(1);
    EXPECT_TRUE(rig.nothing());
    rig.ask(2);
    const Chain first = rig.pop();
    const Chain second = rig.pop();
    rig.device.push(first, 1);
    EXPECT_EQ(rig.taken().slot, 1u);
    EXPECT_TRUE(rig.nothing()) << "the mark is gone: the driver's flags are there";
    rig.device.push(second, 1);
    EXPECT_EQ(rig.taken().slot, 2u);
}

TEST(PackedVirtqueue, WithoutTheWriteFlagALengthIsNoRule) {
    Rig<Packed> rig(4);
    rig.ask(1);
    rig.device.push_unflagged(rig.pop(), 17);
    EXPECT_EQ(rig.taken().length, 17u) << "QEMU does not set the flag";
    rig.ask(2);
    rig.raw_used(1, 1, 1000, 0x8080);
    EXPECT_EQ(rig.taken().length, 0u) << "the field is reserved";
    EXPECT_FALSE(rig.queue.broken());
}

TEST(PackedVirtqueue, AnyEventSuppressionIsHarmless) {
    for (const bool event_index : {false, true}) {
        for (u32 flags = 0; flags < 8; ++flags) {
            for (const u32 place : {0u, 1u, 2u, 3u, 4u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
                Rig<Packed> rig(3, {.event_index = event_index});
                rig.poke<u32>(rig.layout.device, place | flags << 16);
                ASSERT_TRUE(rig.add(1, 1, 0));
                ASSERT_TRUE(rig.add(2, 1, 0));
                const bool wanted = flags % 4 == 1                  ? false
                                    : flags % 4 == 2 && event_index ? place == 0x8000 || place == 0x8001
                                                                    : true;
                EXPECT_EQ(rig.queue.publish(), wanted) << flags << ' ' << place;
            }
        }
    }
}

TEST(PackedVirtqueue, TheEventStructureInMemory) {
    Rig<Packed> rig(5, {.event_index = true});
    const auto driver = [&] { return bytes_at(rig.guest.data() + rig.layout.driver, 4); };
    EXPECT_EQ(driver(), (Bytes{0, 0, 0, 0}));
    EXPECT_FALSE(*rig.queue.arm(1));
    EXPECT_EQ(driver(), (Bytes{0, 0x80, 2, 0})) << "place 0, first lap";
    rig.queue.disarm();
    EXPECT_EQ(driver(), (Bytes{0, 0, 1, 0}));
    for (u16 slot = 0; slot < 3; ++slot) {
        rig.ask(slot);
        rig.device.push(rig.pop(), 0);
        rig.taken();
    }
    for (u16 slot = 0; slot < 4; ++slot) {
        rig.ask(slot);
    }
    EXPECT_FALSE(*rig.queue.arm(2));
    EXPECT_EQ(driver(), (Bytes{4, 0x80, 2, 0}));
    EXPECT_FALSE(*rig.queue.arm(3));
    EXPECT_EQ(driver(), (Bytes{0, 0, 2, 0})) << "the second lap";
    EXPECT_FALSE(*rig.queue.arm(100));
    EXPECT_EQ(driver(), (Bytes{1, 0, 2, 0})) << "no more than are in flight";
    Rig<Packed> flags(5);
    EXPECT_FALSE(*flags.queue.arm(1));
    EXPECT_EQ(bytes_at(flags.guest.data() + flags.layout.driver, 4), (Bytes{0, 0, 0, 0}));
}

} // namespace
