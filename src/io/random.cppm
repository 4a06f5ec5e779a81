// Reproducible pseudo-random numbers, for workload addresses and stamp payloads. Not cryptographically secure.
export module io.random;
import core.std;

export namespace fl::io {

/// The finalizer of splitmix64: a bijection on 64 bits in which each input bit flips half of the output bits on
/// average.
constexpr u64 mix64(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/// splitmix64: period 2^64, about ten instructions per number.
class SplitMix64 {
  public:
    constexpr explicit SplitMix64(u64 seed = 0) : state_(seed) {}
    constexpr u64 next() { return mix64(state_ += 0x9e3779b97f4a7c15); }
    /// Uniform in 0 to n - 1, n > 0, by one multiplication; the bias is below n / 2^64.
    constexpr u64 below(u64 n) { return static_cast<u64>((static_cast<unsigned __int128>(next()) * n) >> 64); }

  private:
    u64 state_;
};

} // namespace fl::io
