module hv.xen.clock;
import core.std;

namespace fl::hv::xen {

std::optional<u64> frequency(u32 mul, i8 shift) {
    if (mul == 0 || shift < -31 || shift > 31) {
        return std::nullopt;
    }
    const u64 unshifted = (u64{1'000'000'000} << 32) / mul;
    const u64 hz = shift >= 0 ? unshifted >> shift : unshifted << -shift;
    return hz >= 1'000'000 && hz <= 100'000'000'000 ? std::optional(hz) : std::nullopt;
}

std::optional<u64> scaled(u64 cycles, u32 mul, i8 shift) {
    if (mul == 0 || shift < -31 || shift > 31) {
        return std::nullopt;
    }
    // The shift to the left and that of 32 bits to the right as one, of 96 bits, by two words: the compiler makes a
    // variable shift of a wider type a call of a function that the kernel has not.
    const unsigned __int128 product = static_cast<unsigned __int128>(shift < 0 ? cycles >> -shift : cycles) * mul;
    const u32 right = shift < 0 ? 32 : 32 - static_cast<u32>(shift);
    const u64 low = static_cast<u64>(product);
    const u64 high = static_cast<u64>(product >> 64);
    return high >> right == 0 ? low >> right | high << (64 - right) : ~u64{0};
}

std::optional<u64> pvclock_hz(const VcpuTimeInfo& time) {
    u32 mul = 0;
    i8 shift = 0;
    const bool consistent = read_consistently(time.version, [&] {
        mul = read_once(time.tsc_to_system_mul);
        shift = read_once(time.tsc_shift);
    });
    return consistent ? frequency(mul, shift) : std::nullopt;
}

namespace {
// The counter is read between the two versions: Xen may have moved the virtual CPU, and rewritten the values.
std::optional<u64> at(const VcpuTimeInfo& time, auto&& counter) {
    u32 mul = 0;
    i8 shift = 0;
    u64 timestamp = 0;
    u64 then = 0;
    u64 tsc = 0;
    const bool consistent = read_consistently(time.version, [&] {
        mul = read_once(time.tsc_to_system_mul);
        shift = read_once(time.tsc_shift);
        timestamp = read_once(time.tsc_timestamp);
        then = read_once(time.system_time);
        tsc = counter();
    });
    if (!consistent) {
        return std::nullopt;
    }
    const auto since = scaled(tsc > timestamp ? tsc - timestamp : 0, mul, shift);
    return since ? std::optional(then + std::min(*since, ~then)) : std::nullopt;
}
} // namespace

std::optional<u64> system_time(const VcpuTimeInfo& time) {
    return at(time, [] { return __builtin_ia32_rdtsc(); });
}
std::optional<u64> system_time(const VcpuTimeInfo& time, u64 tsc) {
    return at(time, [&] { return tsc; });
}

} // namespace fl::hv::xen
