module;
#include "core/try.hpp"
module core.machine.clock;
import core.std;
import core.acpi;
import core.calibration;
import core.interrupt;
import core.result;
import core.time;
import core.timer;
import core.machine.cpu;
import core.machine.interrupts;
import core.machine.lapic;
import core.machine.local;

extern "C" void wait_for_interrupt(); // core/machine/traps.S

namespace fl {

namespace {

constinit Timeline timeline;
constinit std::string_view source = "not started";
constexpr std::string_view assumed = "assumed";

constexpr u64 pm_timer_hz = 3'579'545; // [ACPI 6.5 §4.8.2.1]
constexpr u64 pit_hz = 1'193'182;      // [8254]
// More readings than one tick of either timer takes on any machine. A port without a device costs a few milliseconds:
// each reading exits to the hypervisor once (PM timer) or three times (PIT).
constexpr u32 pm_timer_max_unchanged = 400;
constexpr u32 pit_max_unchanged = 200;

constexpr u16 pit_channel0 = 0x40;
constexpr u16 pit_channel2 = 0x42;
constexpr u16 pit_command = 0x43;
constexpr u16 speaker = 0x61; // bit 0: gate of channel 2; bit 1: the speaker

Calibration measure_pm_timer(const acpi::Fadt& fadt) {
    u16 port = fadt.pm_timer;
    return calibrate({.hz = pm_timer_hz,
                      .mask = fadt.pm_timer_32 ? ~0u : 0xffffffu,
                      .max_unchanged = pm_timer_max_unchanged,
                      .context = &port,
                      .read = [](void* context) {
                          TimerReading reading;
                          reading.before = cpu::read_tsc();
                          reading.value = cpu::in32(*static_cast<const u16*>(context));
                          reading.after = cpu::read_tsc();
                          return reading;
                      }});
}

Calibration measure_pit() {
    const u8 before = cpu::in8(speaker);
    cpu::out8(speaker, static_cast<u8>((before & ~2u) | 1u));
    cpu::out8(pit_command, 0xb0); // channel 2, low then high byte, mode 0
    cpu::out8(pit_channel2, 0xff);
    cpu::out8(pit_channel2, 0xff);
    const Calibration found = calibrate(
        {.hz = pit_hz, .mask = 0xffff, .max_unchanged = pit_max_unchanged, .context = nullptr, .read = [](void*) {
             TimerReading reading;
             reading.before = cpu::read_tsc();
             cpu::out8(pit_command, 0x80); // latch channel 2
             const u32 low = cpu::in8(pit_channel2);
             const u32 high = cpu::in8(pit_channel2);
             reading.after = cpu::read_tsc();
             reading.value = ~(low | high << 8) & 0xffffu; // counts down
             return reading;
         }});
    cpu::out8(speaker, before);
    return found;
}

// Values outside this range are slower or faster than any processor: invalid.
constexpr bool plausible(u64 hz) { return hz >= 10'000'000 && hz <= 100'000'000'000; }

// Nanoseconds to units of a timer: (ns * multiplier) >> 32, the inverse of CycleScale.
u64 inverse(u64 hz) {
    u64 whole = hz / 1'000'000'000;
    u64 rest = hz % 1'000'000'000;
    u64 fraction = 0;
    for (int bit = 0; bit < 32; ++bit) {
        rest <<= 1;
        fraction <<= 1;
        if (rest >= 1'000'000'000) {
            rest -= 1'000'000'000;
            fraction |= 1;
        }
    }
    return whole << 32 | fraction;
}
u64 units(u64 multiplier, Nanoseconds ns) {
    return static_cast<u64>((static_cast<unsigned __int128>(ns) * multiplier) >> 32);
}

enum class Timer : u8 { none, deadline, local_apic, pit, hypervisor };
constinit Timer timer = Timer::none;
constinit u64 timer_units = 0; // multiplier of units()
constinit u32 timer_vector = 0;
constinit OneShotTimer* hypervisor_timer = nullptr;

constexpr u32 deadline_msr = 0x6e0;
constexpr u32 lvt_deadline = 2 << 17;

void on_timer(void*) { local().timer_at = never; }

// Measures the local APIC's timer against the counter. It is used for wake-ups only, not as a clock.
u64 measure_local_apic_once() {
    constexpr u64 length = 2'000;
    lapic::write(lapic::Reg::timer_initial, ~0u);
    const u32 first = lapic::read(lapic::Reg::timer_current);
    const Instant begin = now();
    while (now() - begin < length) {
        cpu::relax();
    }
    const u32 last = lapic::read(lapic::Reg::timer_current);
    const Nanoseconds took = now() - begin;
    lapic::write(lapic::Reg::timer_initial, 0);
    return took == 0 ? 0 : u64{first - last} * 1'000'000'000 / took;
}

// The median of three: the host may have interrupted one of them.
u64 measure_local_apic() {
    const u64 a = measure_local_apic_once();
    const u64 b = measure_local_apic_once();
    const u64 c = measure_local_apic_once();
    return std::max(std::min(a, b), std::min(std::max(a, b), c));
}

// False: the timer will not fire.
bool arm(Local& own, Instant until, Instant time) {
    constexpr Nanoseconds shortest = 1'000; // a shorter timer may expire before it is armed
    const Nanoseconds length = std::max(until - time, shortest);
    own.timer_at = until;
    switch (timer) {
    case Timer::deadline: cpu::write_msr(deadline_msr, cpu::read_tsc() + units(timer_units, length)); break;
    case Timer::local_apic: {
        const u64 count = std::clamp<u64>(units(timer_units, length), 1, ~0u);
        lapic::write(lapic::Reg::timer_initial, static_cast<u32>(count));
        break;
    }
    case Timer::pit: {
        const u64 count = std::clamp<u64>(units(timer_units, std::min<Nanoseconds>(length, 50'000'000)), 1, 0xffff);
        cpu::out8(pit_command, 0x30); // channel 0, low then high byte, mode 0: one interrupt
        cpu::out8(pit_channel0, static_cast<u8>(count));
        cpu::out8(pit_channel0, static_cast<u8>(count >> 8));
        break;
    }
    case Timer::hypervisor:
        if (!hypervisor_timer->arm(length)) {
            own.timer_at = never;
            return false;
        }
        break;
    case Timer::none: break;
    }
    return true;
}

} // namespace

void start_clock(u64 entry_tsc, const acpi::Tables* tables, ClockHint hint) {
    u64 hz = 0;
    const auto take = [&](u64 found, std::string_view name) {
        if (hz == 0 && plausible(found)) {
            hz = found;
            source = name;
        }
    };
    take(hint.tsc_hz, hint.name);
    if (hz == 0 && tables != nullptr && tables->fadt && tables->fadt->pm_timer != 0) {
        take(measure_pm_timer(*tables->fadt).hz, "ACPI timer");
    }
    if (hz == 0) {
        take(measure_pit().hz, "PIT");
    }
    if (hz == 0) {
        hz = 1'000'000'000;
        source = assumed;
    }
    timeline = Timeline(entry_tsc, hz);
}

void correct_clock(ClockHint hint) {
    if (!plausible(hint.tsc_hz)) {
        return;
    }
    const bool same = hint.tsc_hz == tsc_hz();
    source = hint.name;
    if (same) {
        return;
    }
    timeline.correct(cpu::read_tsc(), hint.tsc_hz);
    if (timer == Timer::deadline) {
        timer_units = inverse(tsc_hz());
    } else if (timer == Timer::local_apic) {
        timer_units = inverse(measure_local_apic());
    }
    local().timer_at = never; // the armed expiry is wrong at the new frequency: the next sleep must re-arm the timer
}

std::string_view clock_name() { return source; }
bool clock_assumed() { return source == assumed; }
Nanoseconds clock_ahead() { return timeline.ahead(); }
u64 tsc_hz() { return timeline.hz(); }
Instant now() { return timeline.at(cpu::read_tsc()); }

Result<void> start_timer(InterruptController& controller) {
    if (lapic::mode() != lapic::Mode::none) {
        auto vector = controller.attach_vector(on_timer, nullptr, true);
        if (!vector) {
            return vector.error();
        }
        timer_vector = vector->vector;
        if (lapic::has_deadline()) {
            lapic::write(lapic::Reg::lvt_timer, timer_vector | lvt_deadline);
            timer_units = inverse(tsc_hz());
            timer = Timer::deadline;
            return {};
        }
        lapic::write(lapic::Reg::lvt_timer, timer_vector);
        lapic::write(lapic::Reg::timer_divide, 0x3); // by 16
        const u64 hz = measure_local_apic();
        if (hz != 0) {
            timer_units = inverse(hz);
            timer = Timer::local_apic;
            return {};
        }
        controller.detach_vector(*vector);
    }
    if (auto attached = controller.attach_line({.gsi = 0, .isa = true}, on_timer, nullptr); !attached) {
        return attached;
    }
    timer_units = inverse(pit_hz);
    timer = Timer::pit;
    return {};
}

std::string_view timer_name() {
    switch (timer) {
    case Timer::none: return "none";
    case Timer::deadline: return "TSC deadline";
    case Timer::local_apic: return "local APIC";
    case Timer::pit: return "PIT";
    case Timer::hypervisor: return hypervisor_timer->name();
    }
    return "none";
}

bool timer_is_deadline() { return timer == Timer::deadline; }

Result<void> use_timer(OneShotTimer& given) {
    CHECK(given.start(on_timer, nullptr));
    local().timer_at = never; // the expiry armed in the previous timer may never fire
    hypervisor_timer = &given;
    timer = Timer::hypervisor;
    return {};
}

Result<void> join_hypervisor_timer() {
    return timer == Timer::hypervisor ? hypervisor_timer->start(on_timer, nullptr) : Result<void>{};
}

Result<void> join_timer() {
    switch (timer) {
    case Timer::hypervisor: return {};
    case Timer::deadline: lapic::write(lapic::Reg::lvt_timer, timer_vector | lvt_deadline); return {};
    case Timer::local_apic:
        lapic::write(lapic::Reg::lvt_timer, timer_vector);
        lapic::write(lapic::Reg::timer_divide, 0x3);
        return {};
    case Timer::pit:
    case Timer::none: break;
    }
    return Error(Code::not_supported, "processors sleep by the timer of their local APIC, and it cannot be used here");
}

void* platform_context(u32 processor) { return &local_of(processor); }
Instant platform_now(void*) { return now(); }
void platform_kick(void* context) { kick_processor(static_cast<const Local*>(context)->number); }

void platform_idle(void* context, Instant until, const std::atomic<bool>& wake) {
    cpu::interrupts_off();
    // Acquire: pairs with the release in Executor::raise(), so that the writes before it are visible. No interrupt can
    // arrive between this and the halt.
    if (wake.load(std::memory_order_acquire) || timer == Timer::none) {
        cpu::interrupts_on();
        cpu::relax();
        return;
    }
    Local& own = *static_cast<Local*>(context);
    if (own.timer_at > until) {
        const Instant time = now();
        if (until <= time) {
            cpu::interrupts_on();
            return;
        }
        if (!arm(own, until, time)) {
            cpu::interrupts_on();
            cpu::relax();
            return;
        }
    }
    wait_for_interrupt();
}

// One store, like an interrupt's own: the timer's handler writes the same value.
void platform_rearm(void* context) { static_cast<Local*>(context)->timer_at = never; }

} // namespace fl
