// Wall-clock time, as an offset to the kernel's clock. Portable; rarely written, readable on any processor.
export module core.wall_clock;
import core.std;
import core.time;

export namespace fl {

/// Nanoseconds since 1970-01-01 00:00 UTC, without leap seconds.
using UnixNanoseconds = u64;

/// Sets the wall-clock time at instant `now`. Callable on any processor.
void set_wall_clock(Instant now, UnixNanoseconds time);
/// The wall-clock time at instant `now`; nothing until it has been set.
std::optional<UnixNanoseconds> wall_clock(Instant now);

/// UTC date and time.
struct CivilTime {
    u32 year = 1970;
    u32 month = 1; // 1 to 12
    u32 day = 1;   // 1 to 31
    u32 hour = 0;
    u32 minute = 0;
    u32 second = 0;
};
constexpr CivilTime civil_time(UnixNanoseconds time) {
    const u64 seconds = time / 1'000'000'000;
    const u64 days = seconds / 86400;
    // Years begin in March, in eras of 400, so that the leap day is the last day of its year.
    const u64 shifted = days + 719468; // days since 0000-03-01
    const u64 era = shifted / 146097;
    const u64 of_era = shifted % 146097;
    const u64 year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    const u64 of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const u64 month = (5 * of_year + 2) / 153; // 0: March
    CivilTime civil;
    civil.day = static_cast<u32>(of_year - (153 * month + 2) / 5 + 1);
    civil.month = static_cast<u32>(month < 10 ? month + 3 : month - 9);
    civil.year = static_cast<u32>(era * 400 + year_of_era + (civil.month <= 2 ? 1 : 0));
    civil.hour = static_cast<u32>(seconds % 86400 / 3600);
    civil.minute = static_cast<u32>(seconds % 3600 / 60);
    civil.second = static_cast<u32>(seconds % 60);
    return civil;
}

} // namespace fl
