module vmm.board;
import core.std;
import vmm.ports;

namespace fl::vmm {

u32 Exits::in(u16, unsigned) { return 0; }

void Exits::out(u16 port, unsigned size, u32 value) {
    if (port == debug_exit_port) {
        control_.debug_exit(value);
    } else if (port == phase_port && (size == 4 || size == 1)) {
        control_.phase(value);
    } else if (port == keyboard_command && (value & 0xff) == 0xfe) {
        control_.reset("keyboard controller");
    } else if (port == reset_control && (value & 0x04) != 0) {
        control_.reset("port 0xcf9");
    }
}

u32 PowerManagement::in(u16 port, unsigned size) {
    if (port == pm_timer && size == 4) {
        // Split, so that the product does not overflow 64 bits within a machine's lifetime.
        const u64 now = clock_.nanoseconds();
        const u64 ticks = now / 1'000'000'000 * pm_timer_hz + now % 1'000'000'000 * pm_timer_hz / 1'000'000'000;
        return static_cast<u32>(ticks);
    }
    switch (port) {
    case pm1_event + 2: return enable_;
    case pm1_control: return 1; // SCI_EN: ACPI is always enabled
    default: return 0;
    }
}

void PowerManagement::out(u16 port, unsigned, u32 value) {
    if (port == pm1_event + 2) {
        enable_ = static_cast<u16>(value);
        // SLP_EN, SLP_TYP
    } else if (port == pm1_control && (value & 1u << 13) != 0 && (value >> 10 & 7) == sleep_type_off) {
        control_.power_off();
    }
}

namespace {

constexpr u8 bcd(u64 value) { return static_cast<u8>(value / 10 % 10 << 4 | value % 10); }

struct Date {
    u64 year, month, day;
};

/// Converts days since 1970-01-01 to a Gregorian date; years are counted from March, so that the leap day is the last
/// day of a year.
constexpr Date date_of(u64 days) {
    const u64 z = days + 719'468;
    const u64 era = z / 146'097;
    const u64 in_era = z % 146'097;
    const u64 year_of_era = (in_era - in_era / 1460 + in_era / 36'524 - in_era / 146'096) / 365;
    const u64 in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const u64 month = (5 * in_year + 2) / 153;
    const u64 day = in_year - (153 * month + 2) / 5 + 1;
    return {year_of_era + era * 400 + (month >= 10 ? 1 : 0), month < 10 ? month + 3 : month - 9, day};
}
static_assert(date_of(0).year == 1970 && date_of(0).month == 1 && date_of(0).day == 1);
static_assert(date_of(19'782).year == 2024 && date_of(19'782).month == 2 && date_of(19'782).day == 29);

} // namespace

u8 RealTimeClock::read() const {
    const u64 now = clock_.unix_seconds();
    const Date date = date_of(now / 86'400);
    switch (index_) {
    case 0x00: return bcd(now % 60);
    case 0x02: return bcd(now / 60 % 60);
    case 0x04: return bcd(now / 3600 % 24);
    case 0x06: return static_cast<u8>((now / 86'400 + 4) % 7 + 1); // 1: Sunday
    case 0x07: return bcd(date.day);
    case 0x08: return bcd(date.month);
    case 0x09: return bcd(date.year % 100);
    case 0x32: return bcd(date.year / 100);
    case 0x0a: return 0x26; // 32768 Hz, 1024 Hz; no update in progress
    case 0x0b: return 0x02; // 24 hours, BCD
    case 0x0c: return 0x00;
    case 0x0d: return 0x80; // battery good
    default: return memory_[index_];
    }
}

u32 RealTimeClock::in(u16 port, unsigned) { return port == 0x71 ? read() : 0xff; }

void RealTimeClock::out(u16 port, unsigned size, u32 value) {
    if (port == 0x70) {
        index_ = value & 0x7f; // bit 7 masks NMI, which is never raised here
        if (size == 2) {
            memory_[index_] = static_cast<u8>(value >> 8);
        }
    } else {
        memory_[index_] = static_cast<u8>(value);
    }
}

} // namespace fl::vmm
