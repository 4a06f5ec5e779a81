// The guest side of the dynamic memory protocol: bytes written from [hv-dm], pages ballooned and returned, and a
// misbehaving host.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.dma;
import core.log;
import drivers.hv_balloon.balloon;

namespace {
using namespace fl;
using namespace fl::drivers::hv_balloon;

u64 free_now = 100000;

/// Page numbers without memory.
struct Pages final : DmaAllocator {
    u64 next = 0x1000;
    u64 largest = 1u << 15;
    std::map<u64, u64> out; // first, pages: returned in arbitrary pieces
    u64 returned = 0;
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u64 pages = size / 4096;
        if (pages > largest || pages > free_now) {
            return Error{Code::exhausted, "no such run"};
        }
        const u64 first = next;
        next += pages + 1; // never adjacent
        out[first] = pages;
        free_now -= pages;
        return DmaSpan{reinterpret_cast<std::byte*>(first * 4096), first * 4096, size};
    }
    void free(DmaSpan span) override {
        EXPECT_EQ(reinterpret_cast<u64>(span.data), span.bus);
        returned += span.size / 4096;
        free_now += span.size / 4096;
    }
};

struct Recorder final : Link {
    std::vector<std::vector<std::byte>> sent;
    bool full = false;
    Result<void> send(std::span<const std::byte> message, u32) override {
        if (full) {
            return Error{Code::exhausted, "full"};
        }
        sent.push_back({message.begin(), message.end()});
        return {};
    }
};

template <class T>
T get(const std::vector<std::byte>& message, usize at) {
    T value;
    std::memcpy(&value, message.data() + at, sizeof value);
    return value;
}
std::vector<std::byte> message(u16 type, u32 transaction, std::vector<u64> words) {
    std::vector<std::byte> m(8 + words.size() * 8);
    const u16 head[2] = {type, static_cast<u16>(m.size())};
    std::memcpy(m.data(), head, 4);
    std::memcpy(m.data() + 4, &transaction, 4);
    std::memcpy(m.data() + 8, words.data(), words.size() * 8);
    return m;
}

struct Guest {
    Pages pages;
    Recorder link;
    Balloon balloon{link, {pages, [] { return u64{120000}; }, [] { return free_now; }}};
    Guest() { free_now = 100000; }
    u32 last_transaction() { return get<u32>(link.sent.back(), 4); }
    void negotiate(u64 flags = 1) {
        ASSERT_TRUE(balloon.begin());
        ASSERT_TRUE(balloon.take(message(2, last_transaction(), {1})));
        ASSERT_TRUE(balloon.take(message(4, last_transaction(), {flags})));
    }
};

TEST(HvBalloon, AgreesAndReports) {
    Guest g;
    ASSERT_TRUE(g.balloon.begin());
    ASSERT_EQ(g.link.sent.size(), 1u);
    EXPECT_EQ(get<u64>(g.link.sent[0], 0), 0x0000000100100001u) << "VERSION_REQUEST, 16 bytes, transaction 1";
    EXPECT_EQ(get<u64>(g.link.sent[0], 8), 0x0000000000020000u) << "2.0, not the last attempt";
    ASSERT_TRUE(g.balloon.take(message(2, 1, {0})));
    EXPECT_EQ(get<u64>(g.link.sent[1], 8), 0x0000000000010000u);
    ASSERT_TRUE(g.balloon.take(message(2, 2, {0})));
    EXPECT_EQ(get<u64>(g.link.sent[2], 8), 0x0000000100000003u) << "0.3, the last attempt";
    ASSERT_TRUE(g.balloon.take(message(2, 3, {1})));
    EXPECT_EQ(get<u16>(g.link.sent[3], 0), 3);
    EXPECT_EQ(g.link.sent[3].size(), 32u);
    EXPECT_EQ(get<u64>(g.link.sent[3], 8) & 3, 1u) << "balloon, no hot add";
    ASSERT_TRUE(g.balloon.take(message(4, 4, {1})));
    EXPECT_EQ(g.balloon.state(), Balloon::State::running);
    ASSERT_EQ(g.link.sent.size(), 5u);
    EXPECT_EQ(get<u16>(g.link.sent[4], 0), 5);
    EXPECT_EQ(g.link.sent[4].size(), 48u);
    EXPECT_EQ(get<u64>(g.link.sent[4], 8), 100000u);
    EXPECT_EQ(get<u64>(g.link.sent[4], 16), 20000u);
    free_now = 150'000; // memory in use at the start has been freed
    ASSERT_TRUE(g.balloon.report());
    EXPECT_EQ(get<u64>(g.link.sent.back(), 16), 0u) << "never less than nothing";
    Guest quiet;
    quiet.negotiate(5); // no pressure reports
    EXPECT_FALSE(quiet.balloon.reports_wanted());
    EXPECT_EQ(quiet.link.sent.size(), 2u);
}

TEST(HvBalloon, PagesAreBalloonedAndReturned) {
    Guest g;
    g.negotiate(5);
    g.pages.largest = 256;
    ASSERT_TRUE(g.balloon.take(message(6, 77, {1000})));
    const auto response = g.link.sent.back();
    EXPECT_EQ(get<u16>(response, 0), 7);
    EXPECT_EQ(get<u32>(response, 4), 77u);
    EXPECT_EQ(get<u16>(response, 2), response.size());
    const u32 ranges = get<u32>(response, 12) >> 1;
    EXPECT_EQ(get<u32>(response, 12) & 1, 0u) << "the only one";
    u64 total = 0;
    for (u32 i = 0; i < ranges; ++i) {
        const u64 range = get<u64>(response, 16 + i * 8);
        EXPECT_EQ(g.pages.out[range & 0xffffffffff], range >> 40);
        total += range >> 40;
    }
    EXPECT_EQ(total, 1000u);
    EXPECT_EQ(g.balloon.ballooned(), 1000u);
    const u64 first = get<u64>(response, 16) & 0xffffffffff;
    // The middle of a run, in the first of two messages; then the rest of it.
    ASSERT_TRUE(g.balloon.take(message(8, 5, {u64{1} | u64{1} << 32, (first + 10) | u64{20} << 40})));
    EXPECT_EQ(g.pages.returned, 20u);
    EXPECT_EQ(get<u16>(g.link.sent.back(), 0), 7) << "not answered yet";
    ASSERT_TRUE(g.balloon.take(message(8, 6, {u64{2} << 32, first | u64{10} << 40, (first + 30) | u64{226} << 40})));
    EXPECT_EQ(g.pages.returned, 256u);
    EXPECT_EQ(g.balloon.ballooned(), 744u);
    EXPECT_EQ(get<u64>(g.link.sent.back(), 0), 0x0000000600080009u) << "UNBALLOON_RESPONSE";
}

TEST(HvBalloon, KeepsItsReserve) {
    Guest g;
    g.negotiate(5);
    free_now = Balloon::reserve + 5;
    ASSERT_TRUE(g.balloon.take(message(6, 1, {1'000'000})));
    EXPECT_EQ(g.balloon.ballooned(), 5u);
    ASSERT_TRUE(g.balloon.take(message(6, 2, {1})));
    EXPECT_EQ(get<u32>(g.link.sent.back(), 12), 0u) << "none, politely";
    g.link.full = true;
    free_now = 100000;
    EXPECT_FALSE(g.balloon.take(message(6, 3, {100})));
    EXPECT_EQ(g.balloon.ballooned(), 5u) << "what was not reported is not ballooned";
    EXPECT_EQ(free_now, 100000u);
}

TEST(HvBalloon, MemoryIsNotAddedOrTaken) {
    Guest g;
    g.negotiate(5);
    ASSERT_TRUE(g.balloon.take(message(10, 9, {0x1000 | u64{512} << 40})));
    EXPECT_EQ(get<u64>(g.link.sent.back(), 0), 0x000000090010000bu);
    EXPECT_EQ(get<u64>(g.link.sent.back(), 8), u64{1} << 32) << "no page, and never again";
    ASSERT_TRUE(g.balloon.take(message(13, 10, {0, 0})));
    EXPECT_EQ(get<u16>(g.link.sent.back(), 0), 14);
    EXPECT_TRUE(g.balloon.take(message(12, 11, {u64{16} << 32, u64{8} << 32, 1234})));
}

TEST(HvBalloon, AHostThatLies) {
    const auto refuses = [](std::vector<std::byte> m, bool agreed = true) {
        Guest g;
        if (agreed) {
            g.negotiate(5);
            static_cast<void>(g.balloon.take(message(6, 1, {100})));
        }
        const auto taken = g.balloon.take(m);
        return !taken && taken.error().code == Code::protocol;
    };
    EXPECT_TRUE(refuses(message(2, 99, {1}))) << "unsolicited";
    EXPECT_TRUE(refuses(message(4, 99, {1})));
    EXPECT_TRUE(refuses(message(6, 1, {5}), false)) << "before the capabilities";
    EXPECT_TRUE(refuses(message(8, 1, {0}), false));
    EXPECT_TRUE(refuses(message(8, 1, {u64{1} << 32, 5 | u64{1} << 40}))) << "a page that was never given";
    EXPECT_TRUE(refuses(message(8, 1, {u64{1} << 32, 0x1000 | u64{0xffffff} << 40}))) << "more than was given";
    EXPECT_TRUE(refuses(message(8, 1, {u64{2} << 32, 0x1000 | u64{1} << 40, 0x1000 | u64{1} << 40}))) << "twice";
    EXPECT_TRUE(refuses(message(8, 1, {u64{0xffffffff} << 32})));
    EXPECT_TRUE(refuses(message(12, 1, {u64{100} << 32})));
    EXPECT_TRUE(refuses(message(7, 1, {0})));
    EXPECT_TRUE(refuses(message(0x7777, 1, {0})));
    auto cut = message(6, 1, {5});
    cut.resize(9);
    EXPECT_TRUE(refuses(cut)) << "longer than the received data";
    cut.resize(3);
    EXPECT_TRUE(refuses(cut));
    for (u16 type = 0; type < 16; ++type) {
        for (usize n = 0; n < 40; ++n) {
            auto m = message(type, 1, {u64{3} << 32, 0x1000 | u64{5} << 40, 7, 8});
            m.resize(n);
            if (n >= 4) {
                const u16 size = static_cast<u16>(n);
                std::memcpy(m.data() + 2, &size, 2);
            }
            Guest g;
            g.negotiate(5);
            static_cast<void>(g.balloon.take(m));
        }
    }
}

} // namespace
