// Time since the entry, from the time stamp counter, and the processor's sleep until an interrupt or a deadline.
export module core.machine.clock;
import core.std;
import core.acpi;
import core.interrupt;
import core.result;
import core.time;
import core.timer;

export namespace fl {

/// What is known about the time stamp counter from CPUID or from a hypervisor: the backend's part.
struct ClockHint {
    u64 tsc_hz = 0; // 0: nothing
    std::string_view name;
};

/// Finds the counter's frequency: from the hint, else by measuring for about 300 us against the ACPI timer or, without
/// one, the PIT [core.calibration]. Instants count from entry_tsc. When nothing can be measured it assumes 1 GHz:
/// clock_assumed(). Once, after start_acpi (`tables` may be nullptr).
void start_clock(u64 entry_tsc, const acpi::Tables* tables, ClockHint hint);
/// A backend that came later knows better: its frequency counts from now on. Instants do not go back; where they had
/// run too fast they are ahead of the time since the entry from here on. Nothing happens without a frequency in the
/// hint. After start_timer(), before another processor runs and before use_timer().
void correct_clock(ClockHint hint);
/// For the log: "kvmclock", "CPUID 0x15", "ACPI timer", "PIT", "assumed".
std::string_view clock_name();
/// The frequency is a guess: nobody told it and no timer was there to measure it against. No time is worth printing
/// without saying so.
bool clock_assumed();
/// How far instants are ahead of the time since the entry; 0 unless correct_clock() found that they had run too fast.
Nanoseconds clock_ahead();
u64 tsc_hz();
/// Monotonic on this processor. Before start_clock: cycles as if at 1 GHz.
Instant now();

/// Takes the one-shot timer (local APIC, else PIT) into use. Once, after start_interrupts and start_clock.
Result<void> start_timer(InterruptController& controller);
/// For the log: "TSC deadline", "local APIC", "PIT", "none", or what the hypervisor's is called.
std::string_view timer_name();
/// Whether a timer costs one register write and no division: then a hypervisor's is no better.
bool timer_is_deadline();

/// Takes a hypervisor's timer in place of the one that start_timer() found. It lives as long as the machine. Once, on
/// the first processor, before another one runs. An error changes nothing.
Result<void> use_timer(OneShotTimer& timer);

/// The same timer on a further processor, called there. Only where start_timer() has found one of the local APIC, or a
/// hypervisor's is in use (which then begins with join_hypervisor_timer()).
Result<void> join_timer();
/// On a further processor that has joined its backend: its part of the timer that use_timer() took; nothing where that
/// was not called.
Result<void> join_hypervisor_timer();

/// The functions of io::Platform; the context says which processor's. platform_idle() returns at once when `wake` is
/// set; interrupts are on when it returns. Its timer is set only when none is set for an earlier or equal time, so it
/// may return early; `never`: until an interrupt. Without a timer it does not sleep.
void* platform_context(u32 processor);
Instant platform_now(void* context);
void platform_idle(void* context, Instant until, const std::atomic<bool>& wake);
/// Ends platform_idle() of that processor, by an interrupt; from another one.
void platform_kick(void* context);

} // namespace fl
