// DMA mapping: every limit at its boundary, both models, the pool, and memory that a device may still access.
#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.dma_mapper;
import core.result;

using namespace fl;

namespace {

// Memory at bus addresses chosen by the test.
class Memory final : public DmaAllocator {
  public:
    u64 next = 0x10'0000;
    bool refuse = false;
    u64 limit = 0; // of the last allocation
    std::map<u64, std::vector<std::byte>> blocks;
    std::vector<u64> freed;

    Result<DmaSpan> allocate(u32 size, u64 below) override {
        limit = below;
        if (refuse || next + size > below) {
            return Error{Code::exhausted, "no memory"};
        }
        const DmaSpan span = place(next, size);
        next += size;
        return span;
    }
    void free(DmaSpan span) override {
        freed.push_back(span.bus);
        blocks.erase(span.bus);
    }
    DmaSpan place(u64 bus, u32 size) {
        auto& block = blocks[bus];
        block.assign(size, std::byte{0});
        return {block.data(), bus, size};
    }
    // The device's view of a byte.
    std::byte& at(u64 bus) {
        auto it = std::prev(blocks.upper_bound(bus));
        return it->second.at(bus - it->first);
    }
};

void fill(DmaSpan span, u8 seed) {
    for (u32 i = 0; i < span.size; ++i) {
        span.data[i] = static_cast<std::byte>(seed + i * 7 + i / 256);
    }
}

constexpr u64 four_gib = u64{1} << 32;
constexpr DmaLimits below_4g{.highest = four_gib - 1};

// DmaSegment as an unnamed type, for comparison.
using Pairs = std::vector<std::pair<u64, u32>>;

class Mapping : public testing::Test {
  protected:
    Memory memory;
    IdentityMapper identity;
    BounceMapper bounce{memory, 128 * 1024};
    std::array<DmaSegment, 64> room{};
    DmaMapping mapping{room};
    std::array<DmaSegment, 64> other_room{};
    DmaMapping other{other_room};

    static Pairs segments(const DmaMapping& of) {
        Pairs pairs;
        for (const DmaSegment& segment : of.segments()) {
            pairs.emplace_back(segment.bus, segment.size);
        }
        return pairs;
    }
    // Maps without data, unmaps, and returns the segments.
    Pairs split(std::vector<DmaSpan> spans, const DmaLimits& limits) {
        const auto bytes = identity.map(spans, DmaDirection::both, limits, mapping);
        if (!bytes) {
            return {};
        }
        Pairs pairs = segments(mapping);
        u32 sum = 0;
        for (const auto& [bus, size] : pairs) {
            sum += size;
        }
        EXPECT_EQ(sum, *bytes);
        EXPECT_EQ(mapping.bytes(), *bytes);
        identity.unmap(mapping, spans);
        return pairs;
    }
    static DmaSpan at(u64 bus, u32 size) { return {nullptr, bus, size}; }
    // The mapped bytes as the device sees them.
    std::vector<std::byte> seen(const DmaMapping& of) {
        std::vector<std::byte> bytes;
        for (const DmaSegment& segment : of.segments()) {
            for (u32 i = 0; i < segment.size; ++i) {
                bytes.push_back(memory.at(segment.bus + i));
            }
        }
        return bytes;
    }
    void device_writes(const DmaMapping& of, u8 seed) {
        u32 n = 0;
        for (const DmaSegment& segment : of.segments()) {
            for (u32 i = 0; i < segment.size; ++i, ++n) {
                memory.at(segment.bus + i) = static_cast<std::byte>(seed + n * 7 + n / 256);
            }
        }
    }
    void TearDown() override { clear_quarantine(); }
};

// ---- limits, without copying ----

TEST_F(Mapping, TheHighestAddress) {
    EXPECT_TRUE(below_4g.admits(at(four_gib - 4096 - 1, 4096)));
    EXPECT_TRUE(below_4g.admits(at(four_gib - 4096, 4096)));
    EXPECT_FALSE(below_4g.admits(at(four_gib - 4096 + 1, 4096)));
    EXPECT_FALSE(below_4g.admits(at(four_gib, 1)));
    EXPECT_TRUE(below_4g.admits(at(four_gib - 1, 1)));
    EXPECT_TRUE(below_4g.admits(at(0, 1)));
    EXPECT_TRUE(below_4g.admits(at(0, 0)));
    EXPECT_TRUE(below_4g.admits(at(four_gib, 0))) << "nothing is accessed";
    EXPECT_FALSE(below_4g.admits(at(~u64{0} - 10, 100))) << "wraps around";
    EXPECT_TRUE(DmaLimits{}.admits(at(~u64{0} - 99, 100)));
    EXPECT_EQ(split({at(four_gib - 4096, 4096)}, below_4g), (Pairs{{four_gib - 4096, 4096}}));
    const DmaSpan above = at(four_gib - 4095, 4096);
    const auto refused = identity.map({&above, 1}, DmaDirection::both, below_4g, mapping);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Code::not_supported);
    EXPECT_FALSE(mapping.active());
}

TEST_F(Mapping, TheBoundary) {
    const DmaLimits limits{.boundary = 65536};
    EXPECT_EQ(split({at(65536 - 4097, 4096)}, limits), (Pairs{{65536 - 4097, 4096}}));
    EXPECT_EQ(split({at(65536 - 4096, 4096)}, limits), (Pairs{{65536 - 4096, 4096}}));
    EXPECT_EQ(split({at(65536 - 4095, 4096)}, limits), (Pairs{{65536 - 4095, 4095}, {65536, 1}}));
    EXPECT_EQ(split({at(65536, 65536)}, limits), (Pairs{{65536, 65536}}));
    EXPECT_EQ(split({at(65536, 65537)}, limits), (Pairs{{65536, 65536}, {131072, 1}}));
    EXPECT_EQ(split({at(65536 - 512, 512), at(65536, 512)}, limits), (Pairs{{65536 - 512, 512}, {65536, 512}}))
        << "neighbours are not joined across it";
    EXPECT_EQ(split({at(four_gib - 1, 2)}, {.boundary = four_gib}), (Pairs{{four_gib - 1, 1}, {four_gib, 1}}));
}

TEST_F(Mapping, TheSizeOfASegment) {
    const DmaLimits limits{.max_segment = 8192};
    EXPECT_EQ(split({at(4096, 8191)}, limits), (Pairs{{4096, 8191}}));
    EXPECT_EQ(split({at(4096, 8192)}, limits), (Pairs{{4096, 8192}}));
    EXPECT_EQ(split({at(4096, 8193)}, limits), (Pairs{{4096, 8192}, {12288, 1}}));
    EXPECT_EQ(split({at(4096, 4096), at(8192, 4096), at(12288, 1)}, limits), (Pairs{{4096, 8192}, {12288, 1}}));
    // What follows a full segment must be aligned as well.
    EXPECT_EQ(split({at(4096, 2048)}, {.max_segment = 1023, .alignment = 512}),
              (Pairs{{4096, 512}, {4608, 512}, {5120, 512}, {5632, 512}}));
}

TEST_F(Mapping, NeighboursBecomeOneSegment) {
    EXPECT_EQ(split({at(4096, 4096), at(8192, 512), at(8704, 4096)}, {}), (Pairs{{4096, 8704}}));
    EXPECT_EQ(split({at(4096, 4096), at(8193, 512)}, {}), (Pairs{{4096, 4096}, {8193, 512}}));
    EXPECT_EQ(split({at(8192, 4096), at(4096, 4096)}, {}), (Pairs{{8192, 4096}, {4096, 4096}}));
    EXPECT_EQ(split({at(4096, 0), at(8192, 512), at(0, 0)}, {}), (Pairs{{8192, 512}}));
}

TEST_F(Mapping, TheNumberOfSegments) {
    const std::vector<DmaSpan> three{at(0x1000, 512), at(0x3000, 512), at(0x5000, 512)};
    EXPECT_EQ(split(three, {.max_segments = 4}).size(), 3u);
    EXPECT_EQ(split(three, {.max_segments = 3}).size(), 3u);
    EXPECT_EQ(split(three, {.max_segments = 2}), (Pairs{{0x1000, 512}, {0x3000, 512}})) << "a part";
    EXPECT_EQ(split(three, {.max_segments = 2, .granule = 1024}).size(), 2u);
    EXPECT_EQ(split({at(0x1000, 512), at(0x3000, 1024)}, {.max_segment = 512, .max_segments = 2, .granule = 1024}),
              (Pairs{{0x1000, 512}, {0x3000, 512}}));
    // 1536 bytes fit, of which one granule is kept: the second segment is cut, the third is dropped.
    EXPECT_EQ(split({at(0x1000, 768), at(0x3000, 512), at(0x5000, 256), at(0x7000, 512)},
                    {.max_segments = 3, .granule = 1024}),
              (Pairs{{0x1000, 768}, {0x3000, 256}}));
    const auto none = identity.map(three, DmaDirection::both, {.max_segments = 1, .granule = 1024}, mapping);
    ASSERT_FALSE(none);
    EXPECT_EQ(none.error().code, Code::bad_argument);
    EXPECT_FALSE(mapping.active());
    DmaMapping small(std::span(room).first(2));
    EXPECT_EQ(*identity.map(three, DmaDirection::both, {}, small), 1024u) << "the driver's room is a limit as well";
    identity.unmap(small, {});
}

TEST_F(Mapping, TheAlignment) {
    const DmaLimits limits{.alignment = 512};
    EXPECT_TRUE(limits.admits(at(1024, 100)));
    EXPECT_FALSE(limits.admits(at(1023, 512)));
    EXPECT_FALSE(limits.admits(at(1025, 512)));
    EXPECT_FALSE(limits.admits(at(1024 + 256, 512)));
}

TEST_F(Mapping, LimitsThatContradictEachOther) {
    const DmaSpan span = at(4096, 4096);
    for (const DmaLimits& wrong : {DmaLimits{.boundary = 3000}, DmaLimits{.alignment = 3}, DmaLimits{.alignment = 0},
                                   DmaLimits{.granule = 0}, DmaLimits{.max_segment = 256, .alignment = 512},
                                   DmaLimits{.boundary = 256, .alignment = 512}, DmaLimits{.alignment = 8192}}) {
        EXPECT_EQ(identity.map({&span, 1}, DmaDirection::both, wrong, mapping).error().code, Code::bad_argument);
        EXPECT_EQ(bounce.map({&span, 1}, DmaDirection::both, wrong, mapping).error().code, Code::bad_argument);
    }
}

TEST_F(Mapping, FourGigabytesAreCutToWhatANumberHolds) {
    const std::vector<DmaSpan> spans{at(0, ~u32{0}), at(u64{1} << 40, ~u32{0})};
    EXPECT_EQ(*identity.map(spans, DmaDirection::both, {.granule = 4096}, mapping), 0xffff'f000u);
    identity.unmap(mapping, spans);
}

// ---- bouncing ----

TEST_F(Mapping, WhatTheDeviceReachesIsNotCopied) {
    const DmaSpan low = memory.place(0x8000, 8192);
    EXPECT_EQ(*bounce.map({&low, 1}, DmaDirection::both, below_4g, mapping), 8192u);
    EXPECT_FALSE(mapping.bounced());
    EXPECT_EQ(segments(mapping), (Pairs{{0x8000, 8192}}));
    bounce.unmap(mapping, {&low, 1});
    EXPECT_EQ(memory.limit, 0u) << "no pool";
}

TEST_F(Mapping, ToTheDevice) {
    const DmaSpan high = memory.place(four_gib - 4095, 10'000); // one byte past the limit
    fill(high, 3);
    ASSERT_EQ(*bounce.map({&high, 1}, DmaDirection::to_device, below_4g, mapping), 10'000u);
    EXPECT_TRUE(mapping.bounced());
    EXPECT_EQ(memory.limit, four_gib) << "the pool is where the device reaches it";
    const auto bytes = seen(mapping);
    EXPECT_EQ(std::memcmp(bytes.data(), high.data, 10'000), 0);
    device_writes(mapping, 99); // which it must not do
    bounce.unmap(mapping, {&high, 1});
    std::vector<std::byte> expected(10'000);
    fill({expected.data(), 0, 10'000}, 3);
    EXPECT_EQ(std::memcmp(expected.data(), high.data, 10'000), 0) << "never copied back";
}

TEST_F(Mapping, FromTheDevice) {
    const DmaSpan high = memory.place(four_gib, 9000);
    fill(high, 50);
    ASSERT_TRUE(bounce.map({&high, 1}, DmaDirection::from_device, below_4g, mapping));
    for (const std::byte byte : seen(mapping)) {
        ASSERT_EQ(byte, std::byte{0}) << "never copied out";
    }
    device_writes(mapping, 4);
    bounce.unmap(mapping, {&high, 1});
    std::vector<std::byte> expected(9000);
    fill({expected.data(), 0, 9000}, 4);
    EXPECT_EQ(std::memcmp(expected.data(), high.data, 9000), 0);
    // The owner is gone, or the command failed.
    ASSERT_TRUE(bounce.map({&high, 1}, DmaDirection::from_device, below_4g, mapping));
    device_writes(mapping, 77);
    bounce.unmap(mapping, {});
    EXPECT_EQ(std::memcmp(expected.data(), high.data, 9000), 0) << "it was not requested";
}

TEST_F(Mapping, BothWays) {
    const DmaSpan high = memory.place(four_gib, 5000);
    fill(high, 50);
    ASSERT_TRUE(bounce.map({&high, 1}, DmaDirection::both, below_4g, mapping));
    EXPECT_EQ(std::memcmp(seen(mapping).data(), high.data, 5000), 0);
    device_writes(mapping, 4);
    bounce.unmap(mapping, {&high, 1});
    std::vector<std::byte> expected(5000);
    fill({expected.data(), 0, 5000}, 4);
    EXPECT_EQ(std::memcmp(expected.data(), high.data, 5000), 0);
}

TEST_F(Mapping, AListOfWhichSomeIsBounced) {
    const std::vector<DmaSpan> spans{memory.place(0x8000, 1024), memory.place(four_gib, 5000),
                                     memory.place(0x1'5000'0001, 100), memory.place(0xc000, 512)};
    u8 seed = 1;
    std::vector<std::byte> all;
    for (const DmaSpan& span : spans) {
        fill(span, seed++);
        all.insert(all.end(), span.data, span.data + span.size);
    }
    ASSERT_EQ(*bounce.map(spans, DmaDirection::both, below_4g, mapping), all.size());
    EXPECT_EQ(seen(mapping), all);
    EXPECT_EQ(mapping.segments().front().bus, 0x8000u);
    EXPECT_EQ(mapping.segments().back().bus, 0xc000u);
    device_writes(mapping, 9);
    bounce.unmap(mapping, spans);
    std::vector<std::byte> expected(all.size());
    fill({expected.data(), 0, static_cast<u32>(expected.size())}, 9);
    std::vector<std::byte> got;
    for (const DmaSpan& span : spans) {
        got.insert(got.end(), span.data, span.data + span.size);
    }
    EXPECT_EQ(got, expected);
}

TEST_F(Mapping, MisalignedMemoryIsBounced) {
    const DmaSpan odd = memory.place(0x8001, 4096);
    fill(odd, 8);
    const DmaLimits limits{.highest = four_gib - 1, .alignment = 4};
    ASSERT_EQ(*bounce.map({&odd, 1}, DmaDirection::to_device, limits, mapping), 4096u);
    EXPECT_TRUE(mapping.bounced());
    EXPECT_EQ(mapping.segments()[0].bus % 4096, 0u);
    EXPECT_EQ(std::memcmp(seen(mapping).data(), odd.data, 4096), 0);
    bounce.unmap(mapping, {});
}

TEST_F(Mapping, LimitsHoldForThePoolToo) {
    memory.next = 0xffff'0000 - 0x1000; // its pages cross a multiple of 64 KiB
    const DmaSpan high = memory.place(four_gib, 32 * 1024);
    fill(high, 1);
    const DmaLimits limits{.highest = four_gib - 1, .boundary = 65536, .max_segment = 6144, .granule = 512};
    ASSERT_EQ(*bounce.map({&high, 1}, DmaDirection::to_device, limits, mapping), 32u * 1024);
    for (const DmaSegment& segment : mapping.segments()) {
        EXPECT_LE(segment.size, 6144u);
        EXPECT_EQ(segment.bus / 65536, (segment.bus + segment.size - 1) / 65536);
        EXPECT_LE(segment.bus + segment.size - 1, limits.highest);
    }
    EXPECT_EQ(std::memcmp(seen(mapping).data(), high.data, high.size), 0);
    bounce.unmap(mapping, {});
    // A partial mapping: at most three segments of 6144 bytes, in whole sectors.
    DmaMapping small(std::span(room).first(2));
    const auto part = bounce.map({&high, 1}, DmaDirection::from_device, limits, small);
    ASSERT_TRUE(part);
    EXPECT_EQ(*part % 512, 0u);
    EXPECT_LT(*part, high.size);
    device_writes(small, 200);
    bounce.unmap(small, {&high, 1});
    std::vector<std::byte> before(high.size);
    fill({before.data(), 0, high.size}, 1);
    EXPECT_EQ(std::memcmp(before.data() + *part, high.data + *part, high.size - *part), 0) << "the rest is untouched";
    EXPECT_EQ(high.data[*part - 1], static_cast<std::byte>(200 + (*part - 1) * 7 + (*part - 1) / 256));
    EXPECT_EQ(bounce.available(), 16u) << "every page was freed";
}

TEST_F(Mapping, APartThatIsCutInsideAPageCopiesNoMore) {
    const std::vector<DmaSpan> spans{memory.place(four_gib, 700), memory.place(0x1'5000'0000, 700)};
    fill(spans[0], 1);
    fill(spans[1], 2);
    const std::vector<std::byte> second(spans[1].data, spans[1].data + 700);
    ASSERT_EQ(*bounce.map(spans, DmaDirection::from_device,
                          {.highest = four_gib - 1, .max_segments = 1, .granule = 512}, mapping),
              512u);
    device_writes(mapping, 9);
    bounce.unmap(mapping, spans);
    EXPECT_EQ(spans[0].data[511], static_cast<std::byte>(9 + 511 * 7 + 1));
    EXPECT_EQ(spans[0].data[512], static_cast<std::byte>(1 + 512 * 7 + 2));
    EXPECT_EQ(std::memcmp(second.data(), spans[1].data, 700), 0);
}

// ---- the pool ----

TEST_F(Mapping, ThePoolIsBounded) {
    const DmaSpan high = memory.place(four_gib, 256 * 1024);
    ASSERT_EQ(*bounce.map({&high, 1}, DmaDirection::from_device, below_4g, mapping), 128u * 1024)
        << "as much as it has";
    EXPECT_EQ(bounce.available(), 0u);
    const auto busy = bounce.map({&high, 1}, DmaDirection::from_device, below_4g, other);
    ASSERT_FALSE(busy);
    EXPECT_EQ(busy.error().code, Code::busy);
    EXPECT_FALSE(other.active());
    EXPECT_EQ(*bounce.map({&high, 1}, DmaDirection::both, {}, other), 256u * 1024) << "what needs no page has no wait";
    bounce.unmap(other, {});
    bounce.unmap(mapping, {&high, 1});
    EXPECT_EQ(bounce.available(), 32u);
    const auto blocks = memory.blocks.size();
    for (int i = 0; i < 100; ++i) {
        ASSERT_EQ(*bounce.map({&high, 1}, DmaDirection::from_device, below_4g, mapping), 128u * 1024);
        bounce.unmap(mapping, {&high, 1});
    }
    EXPECT_EQ(memory.blocks.size(), blocks) << "nothing is allocated for an I/O";
}

TEST_F(Mapping, PagesOfOneMappingAreNotAnothers) {
    const DmaSpan a = memory.place(four_gib, 5000);
    const DmaSpan b = memory.place(0x2'0000'0000, 5000);
    fill(a, 10);
    fill(b, 20);
    ASSERT_TRUE(bounce.map({&a, 1}, DmaDirection::to_device, below_4g, mapping));
    ASSERT_TRUE(bounce.map({&b, 1}, DmaDirection::to_device, below_4g, other));
    EXPECT_EQ(std::memcmp(seen(mapping).data(), a.data, 5000), 0);
    EXPECT_EQ(std::memcmp(seen(other).data(), b.data, 5000), 0);
    bounce.unmap(mapping, {});
    EXPECT_EQ(std::memcmp(seen(other).data(), b.data, 5000), 0);
    bounce.unmap(other, {});
}

TEST_F(Mapping, WithoutMemoryThereIsNoPool) {
    memory.refuse = true;
    const DmaSpan high = memory.place(four_gib, 4096);
    EXPECT_EQ(bounce.map({&high, 1}, DmaDirection::both, below_4g, mapping).error().code, Code::exhausted);
    EXPECT_FALSE(mapping.active());
    memory.refuse = false;
    EXPECT_TRUE(bounce.map({&high, 1}, DmaDirection::both, below_4g, mapping)) << "it is tried again";
    bounce.unmap(mapping, {});
    BounceMapper tiny(memory, 4096);
    EXPECT_EQ(tiny.map({&high, 1}, DmaDirection::both, below_4g, mapping).error().code, Code::exhausted);
}

// ---- memory that the device may still access ----

TEST_F(Mapping, PagesInQuarantineAreNotUsedAgain) {
    BounceMapper small(memory, 64 * 1024);
    const DmaSpan high = memory.place(four_gib, 64 * 1024);
    const DmaSpan one = high.subspan(0, 4096);
    ASSERT_TRUE(small.map({&one, 1}, DmaDirection::from_device, below_4g, mapping));
    const u64 page = mapping.segments()[0].bus;
    quarantine({nullptr, page, 4096}, this, 7);
    small.unmap(mapping, {});
    EXPECT_EQ(small.available(), 15u);
    ASSERT_EQ(*small.map({&high, 1}, DmaDirection::from_device, below_4g, mapping), 60u * 1024);
    for (const DmaSegment& segment : mapping.segments()) {
        EXPECT_FALSE(segment.bus <= page && page < segment.bus + segment.size);
    }
    EXPECT_EQ(small.map({&one, 1}, DmaDirection::from_device, below_4g, other).error().code, Code::busy);
    release_quarantine(this, 7);
    ASSERT_TRUE(small.map({&one, 1}, DmaDirection::from_device, below_4g, other));
    EXPECT_EQ(other.segments()[0].bus, page) << "released, and found when it was needed";
    small.unmap(other, {});
    small.unmap(mapping, {});
}

TEST_F(Mapping, AnAbandonedMappingKeepsItsPages) {
    const DmaSpan high = memory.place(four_gib, 128 * 1024);
    fill(high, 1);
    const DmaSpan one = high.subspan(0, 8192);
    const std::vector<std::byte> before(high.data, high.data + high.size);
    ASSERT_TRUE(bounce.map({&one, 1}, DmaDirection::from_device, below_4g, mapping));
    device_writes(mapping, 60);
    bounce.abandon(mapping);
    EXPECT_FALSE(mapping.active());
    EXPECT_EQ(std::memcmp(before.data(), high.data, high.size), 0) << "nothing is copied back";
    EXPECT_EQ(*bounce.map({&high, 1}, DmaDirection::from_device, below_4g, other), 120u * 1024);
    bounce.unmap(other, {});
    bounce.reclaim();
    EXPECT_EQ(*bounce.map({&high, 1}, DmaDirection::from_device, below_4g, other), 128u * 1024);
    bounce.unmap(other, {});
}

TEST_F(Mapping, ADestroyedMapperKeepsWhatTheDeviceHolds) {
    const DmaSpan high = memory.place(four_gib, 4096);
    const auto die = [&](bool abandoned, bool ended) {
        auto mapper = std::make_unique<BounceMapper>(memory, 64 * 1024);
        DmaMapping own(room);
        EXPECT_TRUE(mapper->map({&high, 1}, DmaDirection::from_device, below_4g, own));
        if (abandoned) {
            mapper->abandon(own);
        } else if (ended) {
            mapper->unmap(own, {});
        }
        memory.freed.clear();
        mapper.reset();
        return memory.freed.size();
    };
    EXPECT_EQ(die(false, true), 1u) << "its memory goes back";
    EXPECT_EQ(die(true, false), 0u) << "the device may still write there";
    EXPECT_EQ(die(false, false), 0u) << "the mapping was not ended";
    EXPECT_NE(quarantine_state().spans, 0u);
}

TEST_F(Mapping, EndingItTwiceIsFound) {
    const auto with_log = [](auto&& act) {
        test::panic_prints();
        act();
    };
    const DmaSpan high = memory.place(four_gib, 4096);
    ASSERT_TRUE(bounce.map({&high, 1}, DmaDirection::both, below_4g, mapping));
    EXPECT_DEATH(with_log([&] { (void)bounce.map({&high, 1}, DmaDirection::both, below_4g, mapping); }),
                 "begun while it is active");
    bounce.unmap(mapping, {});
    EXPECT_DEATH(with_log([&] { bounce.unmap(mapping, {}); }), "ended twice");
    EXPECT_DEATH(with_log([&] { bounce.abandon(mapping); }), "ended twice");
    EXPECT_DEATH(with_log([&] { identity.unmap(mapping, {}); }), "ended twice");
}

} // namespace
