// What time it is in the world, as far as somebody has told: an offset to the kernel's own clock. Portable; written
// rarely, read by anybody.
export module core.wall_clock;
import core.std;
import core.time;

export namespace fl {

/// Nanoseconds since 1970-01-01 00:00 UTC, without leap seconds.
using UnixNanoseconds = u64;

/// At the kernel's instant `now` it is `time` outside. From any processor.
void set_wall_clock(Instant now, UnixNanoseconds time);
/// The time outside at `now`; nothing as long as nobody has told.
std::optional<UnixNanoseconds> wall_clock(Instant now);

/// A day and a time of day, UTC.
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
    // Years that begin in March, in eras of 400: the leap day is a year's last one, and nothing else varies.
    const u64 shifted = days + 719468; // days from 0000-03-01
    const u64 era = shifted / 146097;
    const u64 of_era = shifted % 146097;
    const u64 year_of_era = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    const u64 of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const u64 month = (5 * of_year + 2) / 153; // from March
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
