// Numbers that look random and come again: for the addresses of a workload and for the payload of a stamp. Not for
// secrets.
export module io.random;
import core.std;

export namespace fl::io {

/// The finaliser of splitmix64: a permutation of 64 bits in which every bit of the input moves half of the output's.
constexpr u64 mix64(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/// splitmix64: 2^64 numbers before it repeats, about ten instructions each.
class SplitMix64 {
  public:
    constexpr explicit SplitMix64(u64 seed = 0) : state_(seed) {}
    constexpr u64 next() { return mix64(state_ += 0x9e3779b97f4a7c15); }
    /// From 0 to n - 1, n > 0, by one multiplication; the bias is below n / 2^64.
    constexpr u64 below(u64 n) { return static_cast<u64>((static_cast<unsigned __int128>(next()) * n) >> 64); }

  private:
    u64 state_;
};

} // namespace fl::io
