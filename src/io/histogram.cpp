module io.histogram;
import core.std;

namespace fl::io {

namespace {
using u128 = unsigned __int128;

// A freestanding build has no 128-bit division; called rarely, for reports only.
u128 divide(u128 dividend, u64 divisor) {
    u128 quotient = 0;
    u128 rest = 0;
    for (int bit = 127; bit >= 0; --bit) {
        rest = (rest << 1) | ((dividend >> bit) & 1);
        if (rest >= divisor) {
            rest -= divisor;
            quotient |= u128{1} << bit;
        }
    }
    return quotient;
}
} // namespace

void Histogram::add(const Histogram& other) {
    total_ += other.total_;
    sum_ += other.sum_;
    square_sum_ += other.square_sum_;
    min_ = std::min(min_, other.min_);
    max_ = std::max(max_, other.max_);
    for (usize i = 0; i < buckets; ++i) {
        counts_[i] += other.counts_[i];
    }
}

u64 Histogram::stddev() const {
    if (total_ < 2) {
        return 0;
    }
    // Sum of (v - m)^2 with the integer part m of the mean, minus n * (mean - m)^2 for its fraction r/n: exact except
    // for the last division. Values have 40 bits and there are fewer than 2^32 of them, so 112 bits suffice.
    const u64 m = sum_ / total_;
    const u64 r = sum_ % total_;
    const u128 about_m = square_sum_ - u128{2} * m * sum_ + u128{m} * m * total_;
    return isqrt(divide(about_m - divide(u128{r} * r, total_), total_ - 1));
}

u64 Histogram::percentile(Millionths p) const {
    if (total_ == 0) {
        return 0;
    }
    const u64 needed = std::max<u64>(1, (total_ * std::min(p, whole) + whole - 1) / whole);
    u64 seen = 0;
    for (usize i = 0; i < buckets; ++i) {
        seen += counts_[i];
        if (seen >= needed) {
            return std::clamp(highest_of(i), min_, max_);
        }
    }
    return max_;
}

} // namespace fl::io
