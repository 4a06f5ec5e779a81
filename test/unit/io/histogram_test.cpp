#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import io.histogram;

namespace {
using namespace fl;
using namespace fl::io;

void compare(const std::vector<u64>& data) {
    auto h = std::make_unique<Histogram>();
    for (const u64 v : data) {
        h->record(v);
    }
    std::vector<u64> sorted = data;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(h->count(), sorted.size());
    EXPECT_EQ(h->min(), sorted.front());
    EXPECT_EQ(h->max(), sorted.back());
    long double sum = 0;
    for (const u64 v : sorted) {
        sum += static_cast<long double>(v);
    }
    const long double mean = sum / sorted.size();
    EXPECT_EQ(h->mean(), static_cast<u64>(mean));
    long double squares = 0;
    for (const u64 v : sorted) {
        squares += (v - mean) * (v - mean);
    }
    if (sorted.size() > 1) {
        const long double stddev = std::sqrt(squares / (sorted.size() - 1));
        EXPECT_NEAR(static_cast<double>(h->stddev()), static_cast<double>(stddev),
                    1.0 + static_cast<double>(stddev) * 1e-9);
    }
    for (const u64 p : Histogram::usual) {
        const usize rank = static_cast<usize>(
            (static_cast<unsigned __int128>(sorted.size()) * p + Histogram::whole - 1) / Histogram::whole);
        const u64 exact = sorted[std::max<usize>(rank, 1) - 1];
        EXPECT_GE(h->percentile(p), exact) << p;
        EXPECT_LE(h->percentile(p), exact + exact / 128) << p;
    }
    EXPECT_EQ(h->percentile(Histogram::whole), sorted.back());
}

TEST(Histogram, AgreesWithSortedData) {
    std::mt19937_64 random(1);
    std::vector<u64> flat;
    std::vector<u64> skewed;
    std::vector<u64> latencies;
    for (int i = 0; i < 20'000; ++i) {
        flat.push_back(random() % 200);
        skewed.push_back(random() >> (24 + random() % 40));
        latencies.push_back(90'000 + random() % 5000 + (i % 100 == 0 ? 1'000'000 : 0));
    }
    compare(flat);
    compare(skewed);
    compare(latencies);
    compare({7});
    compare({5, 5, 5, 5});
    compare({0, Histogram::max_value});
}

TEST(Histogram, NothingAndTooMuch) {
    auto h = std::make_unique<Histogram>();
    EXPECT_EQ(h->min(), 0u);
    EXPECT_EQ(h->mean(), 0u);
    EXPECT_EQ(h->stddev(), 0u);
    EXPECT_EQ(h->percentile(Histogram::whole / 2), 0u);
    h->record(~u64{0});
    EXPECT_EQ(h->max(), Histogram::max_value);
    h->reset();
    EXPECT_EQ(h->count(), 0u);
}

TEST(Histogram, BucketsAreContiguous) {
    usize last = 0;
    for (u64 v = 0; v < 1 << 16; ++v) {
        const usize i = Histogram::index_of(v);
        ASSERT_TRUE(i == last || i == last + 1) << v;
        ASSERT_GE(Histogram::highest_of(i), v);
        if (i != last) {
            ASSERT_EQ(Histogram::highest_of(last), v - 1);
        }
        last = i;
    }
}

TEST(Histogram, IntegerRoots) {
    for (const u64 v : {u64{0}, u64{1}, u64{3}, u64{4}, u64{99}, u64{100}, ~u64{0}, u64{0xffff'ffff} * 0xffff'ffff,
                        u64{0xffff'ffff} * 0xffff'ffff - 1}) {
        const u64 r = isqrt(v);
        EXPECT_LE(r * r, v);
        EXPECT_TRUE(r == 0xffff'ffff || (r + 1) * (r + 1) > v) << v;
    }
}

TEST(Histogram, TheSumOfTwoIsAsIfOneHadRecordedAll) {
    const auto one = std::make_unique<Histogram>();
    const auto other = std::make_unique<Histogram>();
    const auto whole = std::make_unique<Histogram>();
    for (u64 i = 0; i < 1000; ++i) {
        (i < 300 ? *one : *other).record(i * i);
        whole->record(i * i);
    }
    one->add(*other);
    EXPECT_EQ(one->count(), 1000u);
    EXPECT_EQ(one->min(), 0u);
    EXPECT_EQ(one->max(), 998'001u);
    EXPECT_EQ(one->mean(), 332'833u);
    EXPECT_EQ(one->stddev(), 298'011u); // of the 1000 values i * i, rounded down
    EXPECT_EQ(one->stddev(), whole->stddev());
    for (const auto p : Histogram::usual) {
        EXPECT_EQ(one->percentile(p), whole->percentile(p)) << p;
    }
    for (usize i = 0; i < Histogram::buckets; ++i) {
        ASSERT_EQ(one->at(i), whole->at(i)) << i;
    }
}

} // namespace
