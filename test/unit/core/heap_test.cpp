#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.heap;
import core.verdict;

namespace {
using namespace fl;
using test::panic_prints;

struct HeapTest : testing::Test {
    alignas(4096) static inline std::byte arena[1 << 20];
    Heap heap;
    void SetUp() override { heap.add(arena); }
};

TEST_F(HeapTest, AlignedAndApart) {
    for (const usize alignment : {1u, 8u, 16u, 32u, 64u, 256u, 4096u, 65536u}) {
        for (const usize size : {0u, 1u, 15u, 16u, 17u, 100u, 2032u, 2033u, 5000u}) {
            void* a = heap.allocate(size, alignment);
            void* b = heap.allocate(size, alignment);
            ASSERT_NE(a, nullptr);
            ASSERT_NE(b, nullptr);
            EXPECT_EQ(reinterpret_cast<usize>(a) % std::max<usize>(alignment, 16), 0u);
            EXPECT_GE(static_cast<usize>(std::abs(static_cast<std::byte*>(a) - static_cast<std::byte*>(b))),
                      std::max<usize>(size, 1));
            heap.free(a);
            heap.free(b);
        }
    }
    EXPECT_EQ(heap.blocks_in_use(), 0u);
    EXPECT_EQ(heap.allocations(), 8u * 9 * 2);
}

TEST_F(HeapTest, RunsJoinAgain) {
    const usize all = heap.free_bytes();
    std::vector<void*> blocks;
    for (;;) {
        void* block = heap.allocate(10'000);
        if (block == nullptr) {
            break;
        }
        blocks.push_back(block);
    }
    EXPECT_GT(blocks.size(), 100u);
    for (usize i = 0; i < blocks.size(); i += 2) {
        heap.free(blocks[i]);
    }
    for (usize i = 1; i < blocks.size(); i += 2) {
        heap.free(blocks[i]);
    }
    EXPECT_EQ(heap.free_bytes(), all);
    EXPECT_NE(heap.allocate(all - 64), nullptr);
}

TEST_F(HeapTest, TooMuchIsNullptr) {
    EXPECT_EQ(heap.allocate(2 << 20), nullptr);
    EXPECT_EQ(heap.allocate(~usize{0}), nullptr);
    EXPECT_EQ(heap.allocate(16, 3), nullptr);
    heap.free(nullptr);
}

TEST_F(HeapTest, WhatBytesForSaysIsEnough) {
    for (const usize alignment : {16u, 64u, 4096u}) {
        for (const usize size : {1u, 100u, 2048u, 4096u, 100'000u}) {
            Heap small;
            static std::byte memory[128 * 1024];
            small.add(std::span(memory).subspan(8, Heap::bytes_for(size, alignment)));
            EXPECT_NE(small.allocate(size, alignment), nullptr) << size << " at " << alignment;
        }
    }
}

TEST_F(HeapTest, DeathOnDoubleFreeAndForeignBlocks) {
    const auto free = [&](void* block) {
        panic_prints();
        heap.free(block);
    };
    // The header of an aligned block is not at the start of its memory, where the heap links free memory: it survives.
    for (const usize size : {100u, 5000u}) {
        SCOPED_TRACE(size);
        void* aligned = heap.allocate(size, 256);
        heap.free(aligned);
        EXPECT_DEATH(free(aligned), "heap: 0x[0-9a-f]+ is freed twice");
    }
    // Otherwise the link has overwritten it.
    for (const usize size : {100u, 5000u}) {
        SCOPED_TRACE(size);
        void* block = heap.allocate(size);
        heap.free(block);
        EXPECT_DEATH(free(block), "heap: 0x[0-9a-f]+ is not one of its blocks, or its header is overwritten");
    }
    EXPECT_DEATH(free(arena + 4096 * 100), "heap: 0x[0-9a-f]+ is not one of its blocks");
    EXPECT_EQ(heap.blocks_in_use(), 0u);
}

TEST_F(HeapTest, RandomBlocksKeepTheirBytes) {
    std::mt19937_64 random(3);
    struct Block {
        unsigned char* data;
        usize size;
        unsigned char fill;
    };
    std::vector<Block> blocks;
    for (int step = 0; step < 50'000; ++step) {
        if (blocks.empty() || random() % 100 < 52) {
            const usize size = random() % 20 == 0 ? random() % 20'000 : random() % 600;
            auto* data = static_cast<unsigned char*>(heap.allocate(size, usize{1} << random() % 8));
            if (data != nullptr) {
                const auto fill = static_cast<unsigned char>(random());
                std::memset(data, fill, size);
                blocks.push_back({data, size, fill});
                continue;
            }
        }
        std::swap(blocks[random() % blocks.size()], blocks.back());
        const Block b = blocks.back();
        blocks.pop_back();
        for (usize i = 0; i < b.size; ++i) {
            ASSERT_EQ(b.data[i], b.fill);
        }
        heap.free(b.data);
    }
    EXPECT_EQ(heap.blocks_in_use(), blocks.size());
}

TEST(Verdict, WorstWins) {
    EXPECT_EQ(worst(Verdict::success, Verdict::skip), Verdict::skip);
    EXPECT_EQ(worst(Verdict::crash, Verdict::failure), Verdict::crash);
    EXPECT_EQ(to_underlying(Verdict::success), 0x10u);
    EXPECT_EQ(to_underlying(Verdict::crash), 0x14u);
    EXPECT_EQ(name(Verdict::error), "ERROR");
}

} // namespace
