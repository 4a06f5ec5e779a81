// Outcome of a boot (docs/INTERFACES.md).
export module core.verdict;
import core.std;

export namespace fl {

/// The value is written to the debug exit port; QEMU then exits with 2 * value + 1.
enum class Verdict : u32 {
    success = 0x10,
    skip = 0x11,
    error = 0x12,   // could not be run: bad input, no such disk
    failure = 0x13, // run, with a wrong result
    crash = 0x14,   // panic or exception
};

constexpr std::string_view name(Verdict verdict) {
    switch (verdict) {
    case Verdict::success: return "SUCCESS";
    case Verdict::skip: return "SKIP";
    case Verdict::error: return "ERROR";
    case Verdict::failure: return "FAILURE";
    case Verdict::crash: return "CRASH";
    }
    return "CRASH";
}

/// The worse of two: CRASH > FAILURE > ERROR > SKIP > SUCCESS.
constexpr Verdict worst(Verdict a, Verdict b) { return to_underlying(a) > to_underlying(b) ? a : b; }

} // namespace fl
