// The accesses of MappedMemory's copies, counted by width: which bytes of a shared field are accessed together.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import io.ring;

namespace {
using namespace fl;
using namespace fl::io;

struct Access {
    const std::byte* at;
    u32 width;
    bool write;
};
std::vector<Access> accesses;

/// VolatileAccess that records its accesses.
struct RecordedAccess {
    template <class W>
    static W read(const std::byte* at) {
        accesses.push_back({at, sizeof(W), false});
        return VolatileAccess::read<W>(at);
    }
    template <class W>
    static void write(std::byte* at, W value) {
        accesses.push_back({at, sizeof(W), true});
        VolatileAccess::write<W>(at, value);
    }
};

constexpr usize size = 64;
struct Page {
    alignas(8) std::array<std::byte, size> bytes{};
    BasicMappedMemory<RecordedAccess> memory{bytes.data(), bytes.size()};
    Page() {
        for (usize i = 0; i < size; ++i) {
            bytes[i] = static_cast<std::byte>(i + 1);
        }
        accesses.clear();
    }
    std::vector<u32> widths() const {
        std::vector<u32> all;
        for (const Access& access : accesses) {
            all.push_back(access.width);
        }
        return all;
    }
    /// Every byte of the range is accessed once, in order, naturally aligned; no aligned field within the range is
    /// split.
    void check(usize offset, usize count, bool write) const {
        usize next = offset;
        for (const Access& access : accesses) {
            const usize at = static_cast<usize>(access.at - bytes.data());
            ASSERT_EQ(at, next);
            ASSERT_EQ(at % access.width, 0u);
            ASSERT_EQ(access.write, write);
            next += access.width;
        }
        ASSERT_EQ(next, offset + count);
        for (const usize width : {usize{2}, usize{4}, usize{8}}) {
            for (usize field = (offset + width - 1) / width * width; field + width <= offset + count; field += width) {
                bool whole = false;
                for (const Access& access : accesses) {
                    const usize at = static_cast<usize>(access.at - bytes.data());
                    whole = whole || (at <= field && field + width <= at + access.width);
                }
                ASSERT_TRUE(whole) << "field of " << width << " at " << field << ", copied " << offset << "+" << count;
            }
        }
    }
};

TEST(RingMemory, CopiesAreAsWideAsAlignmentAndLengthAllow) {
    const auto out = [](usize offset, usize count) {
        Page page;
        std::array<std::byte, size> into{};
        page.memory.copy_out(offset, into.data(), count);
        return page.widths();
    };
    using Widths = std::vector<u32>;
    EXPECT_EQ(out(0, 16), (Widths{8, 8}));
    EXPECT_EQ(out(8, 8), (Widths{8}));
    EXPECT_EQ(out(4, 4), (Widths{4}));
    EXPECT_EQ(out(8, 4), (Widths{4}));
    EXPECT_EQ(out(2, 2), (Widths{2}));
    EXPECT_EQ(out(0, 14), (Widths{8, 4, 2})) << "a packed descriptor without its flags";
    EXPECT_EQ(out(24, 6), (Widths{4, 2})) << "length and id of a used descriptor";
    EXPECT_EQ(out(12, 8), (Widths{4, 4})) << "a used element of a split queue";
    EXPECT_EQ(out(1, 15), (Widths{1, 2, 4, 8}));
    EXPECT_EQ(out(1, 1), (Widths{1}));
    EXPECT_EQ(out(3, 2), (Widths{1, 1}));
    EXPECT_EQ(out(6, 13), (Widths{2, 8, 2, 1}));
    EXPECT_EQ(out(4, 15), (Widths{4, 8, 2, 1}));
    EXPECT_EQ(out(5, 0), (Widths{}));
}

TEST(RingMemory, NoFieldIsTornAndEveryByteIsAccessedOnce) {
    for (usize offset = 0; offset < 16; ++offset) {
        for (usize count = 0; count <= 40; ++count) {
            Page page;
            std::array<std::byte, size> copy{};
            page.memory.copy_out(offset, copy.data(), count);
            page.check(offset, count, false);
            EXPECT_EQ(std::memcmp(copy.data(), page.bytes.data() + offset, count), 0) << offset << "+" << count;
            EXPECT_EQ(copy[count], std::byte{0}) << "nothing after the last byte";

            Page target;
            const std::array<std::byte, size> before = target.bytes;
            std::array<std::byte, size> from{};
            from.fill(std::byte{0xee});
            target.memory.copy_in(offset, from.data(), count);
            target.check(offset, count, true);
            for (usize i = 0; i < size; ++i) {
                const bool in_range = i >= offset && i < offset + count;
                EXPECT_EQ(target.bytes[i], in_range ? std::byte{0xee} : before[i]) << offset << "+" << count;
            }
        }
    }
}

// Records of a byte ring, each word by one store of 8 bytes, also where the record wraps around.
TEST(RingMemory, RecordsAreWrittenWordByWord) {
    constexpr u32 ring = 40; // five words
    alignas(8) std::array<std::byte, 64 + ring> storage{};
    constexpr RingLayout layout{.index = 0, .event = 8, .consumed = 16, .entries = 64, .stride = 1};
    const BasicMappedMemory<RecordedAccess> memory(storage.data(), storage.size());
    auto out = *Producer<BasicMappedMemory<RecordedAccess>, Wrapped<u32>, EmptyToNonEmpty>::create(memory, layout,
                                                                                                   Wrapped<u32>(ring));
    auto in = *Consumer<BasicMappedMemory<RecordedAccess>, Wrapped<u32>, EmptyToNonEmpty>::create(memory, layout,
                                                                                                  Wrapped<u32>(ring));
    u64 next = 0x1122334455667788;
    u64 expected = next;
    for (u32 turn = 0; turn < 40; ++turn) {
        const u32 words = 1 + turn % 4; // one byte always stays free
        const u32 start = out.position();
        ASSERT_GE(out.free(), words * 8);
        accesses.clear();
        out.record(words * 8, [&](auto writer) {
            for (u32 i = 0; i < words; ++i) {
                writer.put(next++);
            }
        });
        ASSERT_EQ(accesses.size(), words);
        for (u32 i = 0; i < words; ++i) {
            const usize place = 64 + (start + i * 8) % ring;
            ASSERT_TRUE(accesses[i].write && accesses[i].width == 8 && accesses[i].at == storage.data() + place) << i;
        }
        ASSERT_EQ(out.position(), (start + words * 8) % ring);
        ASSERT_TRUE(out.publish());
        ASSERT_EQ(*in.available(), words * 8);
        for (u32 i = 0; i < words; ++i) {
            u64 word = 0;
            ASSERT_TRUE(in.remove(std::as_writable_bytes(std::span(&word, 1))));
            ASSERT_EQ(word, expected++);
        }
        in.release();
        ASSERT_TRUE(out.observe());
    }
}

} // namespace
