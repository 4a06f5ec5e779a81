// Latencies in constant memory: a log-linear histogram (HdrHistogram's scheme). No allocation, no floating point.
export module io.histogram;
import core.std;

export namespace fl::io {

/// Counts values from 0 to 2^40 - 1 (nanoseconds: 18 minutes); larger ones are clamped to that. Values up to 255 have
/// their own buckets; above that, each power of two has 128, so a percentile is at most 1/128 too high. min, max,
/// mean and stddev are exact (of the clamped values). At most 2^32 - 1 values. 17 KiB.
class Histogram {
  public:
    static constexpr u32 bits = 7; // 2^bits buckets per power of two
    static constexpr u32 value_bits = 40;
    static constexpr u64 max_value = (u64{1} << value_bits) - 1;
    static constexpr usize buckets = (value_bits - bits + 1) << bits;

    /// A percentile, in millionths of a percent: 99.9 % is 99'900'000.
    using Millionths = u64;
    static constexpr u64 whole = 100'000'000;
    /// fio's default percentile list.
    static constexpr std::array<Millionths, 17> usual{
        1'000'000,  5'000'000,  10'000'000, 20'000'000, 30'000'000, 40'000'000, 50'000'000, 60'000'000, 70'000'000,
        80'000'000, 90'000'000, 95'000'000, 99'000'000, 99'500'000, 99'900'000, 99'950'000, 99'990'000};

    void reset() { *this = Histogram{}; }

    inline void record(u64 value) {
        value = std::min(value, max_value);
        ++counts_[index_of(value)];
        ++total_;
        sum_ += value;
        square_sum_ += static_cast<unsigned __int128>(value) * value;
        min_ = std::min(min_, value);
        max_ = std::max(max_, value);
    }

    /// Adds all values recorded in `other`.
    void add(const Histogram& other);

    u64 count() const { return total_; }
    /// 0 if empty.
    u64 min() const { return total_ == 0 ? 0 : min_; }
    u64 max() const { return max_; }
    u64 sum() const { return sum_; }
    /// Rounded down.
    u64 mean() const { return total_ == 0 ? 0 : sum_ / total_; }
    /// Sample standard deviation (divisor n - 1, as in fio), rounded down; 0 for fewer than two values.
    u64 stddev() const;
    /// The smallest recorded value such that at least `p` of all values are not larger, rounded up to the end of its
    /// bucket; 0 if empty.
    u64 percentile(Millionths p) const;

    /// Number of values in a bucket.
    u32 at(usize index) const { return counts_[index]; }
    /// The first nonempty bucket from `index` on; `buckets` if there is none.
    usize next(usize index) const {
        while (index < buckets && counts_[index] == 0) {
            ++index;
        }
        return index;
    }

    static constexpr usize index_of(u64 value) {
        const u32 top = static_cast<u32>(std::bit_width(value | ((u64{1} << bits) - 1))); // at least `bits`
        const u32 shift = top > bits + 1 ? top - (bits + 1) : 0;
        return (usize{shift} << bits) + static_cast<usize>(value >> shift);
    }
    /// The largest value of a bucket.
    static constexpr u64 highest_of(usize index) {
        if (index < (usize{2} << bits)) {
            return index;
        }
        const u32 shift = static_cast<u32>(index >> bits) - 1;
        const u64 mantissa = (index & ((usize{1} << bits) - 1)) + (u64{1} << bits);
        return ((mantissa + 1) << shift) - 1;
    }

  private:
    u64 total_ = 0;
    u64 sum_ = 0;
    unsigned __int128 square_sum_ = 0;
    u64 min_ = ~u64{0};
    u64 max_ = 0;
    std::array<u32, buckets> counts_{};
};
static_assert(Histogram::index_of(Histogram::max_value) == Histogram::buckets - 1);
static_assert(Histogram::highest_of(Histogram::buckets - 1) == Histogram::max_value);

/// Integer square root, rounded down.
constexpr u64 isqrt(unsigned __int128 value) {
    u64 root = 0;
    for (u64 bit = u64{1} << 63; bit != 0; bit >>= 1) {
        const unsigned __int128 next = root | bit;
        if (next * next <= value) {
            root |= bit;
        }
    }
    return root;
}

} // namespace fl::io
