#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.result;
import core.memory;

namespace {
using namespace fl;

constexpr u64 M = 1 << 20;

TEST(Frames, GivesTheHighestRunThatFits) {
    FrameAllocator a;
    a.add(1 * M, 1 * M);
    a.add(16 * M, 4 * M);
    EXPECT_EQ(*a.allocate({.frames = 1}), 20 * M - 4096);
    EXPECT_EQ(*a.allocate({.frames = 512, .alignment = 2 * M}), 16 * M + 0 * M);
    EXPECT_EQ(*a.allocate({.frames = 1, .limit = 16 * M}), 2 * M - 4096);
    EXPECT_EQ(*a.allocate({.frames = 1, .floor = 1 * M, .limit = 1 * M + 4096}), 1 * M);
    EXPECT_EQ(a.free_bytes(), 5 * M - 2 * M - 3 * 4096);
}

TEST(Frames, NeverPageZeroAndLowMemoryOnlyOnDemand) {
    FrameAllocator a;
    a.add(0, 0x9fc00);
    EXPECT_FALSE(a.allocate({}));
    EXPECT_EQ(*a.allocate({.floor = 0}), 0x9e000u); // the last whole frame
    for (int i = 0; i < 0x9d; ++i) {
        const auto frame = a.allocate({.floor = 0});
        ASSERT_TRUE(frame);
        EXPECT_NE(*frame, 0u);
    }
    EXPECT_FALSE(a.allocate({.floor = 0}));
}

// Where secondary processors start. The maps are those of a PC, of Xen 4.20's PVH (memory from 0 without a hole) and
// two unusual ones.
TEST(Frames, AProcessorStartsWhereAStartupIpiCanNameAFreePage) {
    const auto taken = [](std::initializer_list<FrameAllocator::Range> map) {
        FrameAllocator a;
        for (const auto& [begin, end] : map) {
            a.add(begin, end - begin);
        }
        const auto frame = allocate_start_frame(a);
        return frame ? *frame : 0;
    };
    EXPECT_EQ(taken({{0, 0x9fc00}, {1 * M, 128 * M}}), 0x9e000u);
    EXPECT_EQ(taken({{0, 0x200000}, {0x400000, 128 * M}}), 0x9f000u) << "the vectors 0xa0 to 0xbf are reserved";
    EXPECT_EQ(taken({{0xa0000, 0x200000}}), 0xff000u);
    EXPECT_EQ(taken({{0, 0x2000}}), 0x1000u);
    EXPECT_EQ(taken({{0, 0x1000}, {0xa0000, 0xc0000}, {1 * M, 2 * M}}), 0u)
        << "page 0, reserved vectors, and what lies above 1 MiB";
}

TEST(Frames, CutsAtPartialFrames) {
    FrameAllocator a;
    a.add(2 * M + 1, 3 * 4096);
    EXPECT_EQ(a.free_bytes(), 2u * 4096);
    EXPECT_EQ(*a.allocate({.frames = 2}), 2 * M + 4096);
    a.add(~u64{0} - 100, ~u64{0});
    EXPECT_EQ(a.free_bytes(), 0u);
}

TEST(Frames, ReservesAcrossRanges) {
    FrameAllocator a;
    a.add(1 * M, 1 * M);
    a.add(3 * M, 1 * M);
    a.reserve(1 * M + 4096, 2 * M); // overlaps one frame more on each side than it fills
    EXPECT_EQ(a.free_bytes(), 4096 + 1 * M - 4096);
    a.reserve(1 * M + 10, 1);
    EXPECT_EQ(a.free_bytes(), 1 * M - 4096);
}

TEST(Frames, OverlapsCountOnceAndNeighboursJoin) {
    FrameAllocator a;
    a.add(2 * M, 1 * M);
    a.add(3 * M, 1 * M);
    a.add(2 * M + 4096, 3 * M);
    EXPECT_EQ(a.ranges().size(), 1u);
    EXPECT_EQ(a.free_bytes(), 3 * M + 4096);
}

TEST(Frames, SaysWhatIsWrong) {
    FrameAllocator a;
    a.add(2 * M, 1 * M);
    EXPECT_EQ(a.allocate({.frames = 0}).error().code, Code::bad_argument);
    EXPECT_EQ(a.allocate({.frames = 1, .alignment = 3}).error().code, Code::bad_argument);
    EXPECT_EQ(a.allocate({.frames = ~u64{0} / 2}).error().code, Code::bad_argument);
    const auto error = a.allocate({.frames = 257}).error();
    EXPECT_EQ(error.code, Code::exhausted);
    EXPECT_EQ(error.expected, 257u * 4096);
    EXPECT_EQ(error.seen, 1 * M);
}

TEST(FramesDeathTest, FreeingTwiceIsAPanic) {
    FrameAllocator a;
    a.add(2 * M, 1 * M);
    const u64 frame = *a.allocate({});
    a.free(frame, 1);
    const auto free = [&](u64 base, u64 frames) {
        test::panic_prints();
        a.free(base, frames);
    };
    EXPECT_DEATH(free(frame, 1), "frames: 0x2ff000 is freed twice");
    EXPECT_DEATH(free(frame - 4096, 2), "frames: 0x2fe000 is freed twice");
    EXPECT_DEATH(free(frame + 1, 1), "frames: 1 at 0x2ff001 cannot be freed");
    EXPECT_DEATH(free(0, 1), "frames: 1 at 0x0 cannot be freed");
    EXPECT_DEATH(free(frame, 0), "frames: 0 at 0x2ff000 cannot be freed");
}

TEST(Frames, AFullListLosesFreedMemoryAndCountsIt) {
    FrameAllocator a;
    a.add(16 * M, 64 * M);
    std::vector<u64> all;
    for (;;) {
        const auto frame = a.allocate({});
        if (!frame) {
            break;
        }
        all.push_back(*frame);
    }
    ASSERT_EQ(all.size(), 64 * M / 4096);
    u64 given = 0;
    for (usize i = 0; i < all.size(); i += 2, given += 4096) {
        a.free(all[i], 1);
    }
    EXPECT_EQ(a.ranges().size(), FrameAllocator::capacity);
    EXPECT_EQ(a.free_bytes() + a.lost_bytes(), given);
    EXPECT_GT(a.lost_bytes(), 0u);
}

// Compares with a set of free frames.
TEST(Frames, RandomAgainstAModel) {
    std::mt19937_64 random(1);
    FrameAllocator a;
    std::set<u64> model;
    const auto free_range = [&](u64 base, u64 size) {
        a.add(base, size);
        for (u64 at = base; at < base + size; at += 4096) {
            model.insert(at);
        }
    };
    free_range(2 * M, 1 * M);
    free_range(8 * M, 2 * M);
    free_range(32 * M, 1 * M);
    struct Run {
        u64 base, frames;
    };
    std::vector<Run> held;
    for (int step = 0; step < 20'000; ++step) {
        if (held.empty() || random() % 2 == 0) {
            const u64 frames = 1 + random() % 20;
            const u64 alignment = 4096u << random() % 5;
            const u64 limit = random() % 3 == 0 ? 9 * M : ~u64{0};
            const auto got = a.allocate({.frames = frames, .alignment = alignment, .limit = limit});
            // The model's result: the highest aligned run.
            std::optional<u64> best;
            for (const u64 base : model) {
                bool whole = base % alignment == 0 && base + frames * 4096 <= limit;
                for (u64 i = 0; whole && i < frames; ++i) {
                    whole = model.contains(base + i * 4096);
                }
                best = whole ? base : best;
            }
            ASSERT_EQ(static_cast<bool>(got), best.has_value());
            if (got) {
                ASSERT_EQ(*got, *best);
                for (u64 i = 0; i < frames; ++i) {
                    ASSERT_EQ(model.erase(*got + i * 4096), 1u);
                }
                held.push_back({*got, frames});
            }
        } else {
            std::swap(held[random() % held.size()], held.back());
            const Run run = held.back();
            held.pop_back();
            a.free(run.base, run.frames);
            for (u64 i = 0; i < run.frames; ++i) {
                model.insert(run.base + i * 4096);
            }
        }
        ASSERT_EQ(a.free_bytes(), model.size() * 4096);
        step += step % 7 == 0 ? 0 : 9; // the model is slow
    }
    for (const Run& run : held) {
        a.free(run.base, run.frames);
    }
    EXPECT_EQ(a.ranges().size(), 3u);
    EXPECT_EQ(a.free_bytes(), 4 * M);
}

} // namespace
