module;
#include <cmath>
module host.latency;
import host.std;

namespace fl::host {
namespace {

constexpr u64 longest = 10'000'000'000;
constexpr u64 tail = 20; // of an exponential distribution, in means: beyond it is one draw in 5e8

/// "100us" in nanoseconds; 0: not a time.
u64 time_of(std::string_view text) {
    u64 number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc{} || number == 0 || number > longest) {
        return 0;
    }
    constexpr std::array<std::pair<std::string_view, u64>, 4> units{
        {{"ns", 1}, {"us", 1'000}, {"ms", 1'000'000}, {"s", 1'000'000'000}}};
    const std::string_view unit(end, static_cast<usize>(text.data() + text.size() - end));
    for (const auto& [name, factor] : units) {
        if (name == unit) {
            return number <= longest / factor ? number * factor : 0;
        }
    }
    return 0;
}

} // namespace

std::optional<Latency> Latency::parse(std::string_view text, u64 seed, std::string& wrong) {
    const auto refuse = [&] {
        wrong = "a time as in 100us, exp:100us (the mean) or uniform:50us..150us, in ns, us, ms or s, from 1 ns to 10 "
                "s, was expected, not '" +
                std::string(text) + "'";
        return std::nullopt;
    };
    constexpr std::string_view exponential = "exp:";
    constexpr std::string_view uniform = "uniform:";
    if (text.starts_with(exponential)) {
        const u64 mean = time_of(text.substr(exponential.size()));
        return mean != 0 ? std::optional(Latency(Shape::exponential, mean, mean, seed)) : refuse();
    }
    if (text.starts_with(uniform)) {
        const std::string_view range = text.substr(uniform.size());
        const usize dots = range.find("..");
        const u64 least = dots == range.npos ? 0 : time_of(range.substr(0, dots));
        const u64 most = dots == range.npos ? 0 : time_of(range.substr(dots + 2));
        return least != 0 && most >= least ? std::optional(Latency(Shape::uniform, least, most, seed)) : refuse();
    }
    const u64 fixed = time_of(text);
    return fixed != 0 ? std::optional(Latency(Shape::fixed, fixed, fixed, seed)) : refuse();
}

/// SplitMix64: every seed is a good one.
u64 Latency::random() {
    u64 z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

u64 Latency::draw() {
    switch (shape_) {
    case Shape::fixed: return first_;
    case Shape::uniform: return first_ + random() % (last_ - first_ + 1);
    case Shape::exponential: break;
    }
    const double part = static_cast<double>((random() >> 11) + 1) * 0x1p-53; // in (0, 1]
    return static_cast<u64>(std::min(-std::log(part), static_cast<double>(tail)) * static_cast<double>(first_));
}

} // namespace fl::host
