// Time since entry, from the time stamp counter, and sleeping until an interrupt or a deadline.
export module core.machine.clock;
import core.std;
import core.acpi;
import core.interrupt;
import core.result;
import core.time;
import core.timer;

export namespace fl {

/// The frequency of the time stamp counter as reported by CPUID or a hypervisor; supplied by the backend.
struct ClockHint {
    u64 tsc_hz = 0; // 0: unknown
    std::string_view name;
};

/// Determines the counter's frequency: from the hint, else by measuring for 70 to 300 us against the ACPI timer or,
/// without one, the PIT [core.calibration]. Instants count from entry_tsc. If no measurement is possible, assumes 1
/// GHz: clock_assumed(). Call once, after start_acpi() (`tables` may be nullptr).
void start_clock(u64 entry_tsc, const acpi::Tables* tables, ClockHint hint);
/// Switches to the more accurate frequency of a backend that was installed later. Instants do not decrease; if they ran
/// too fast before, they stay ahead of the time since entry. No effect if the hint has no frequency. Call after
/// start_timer(), before another processor runs and before use_timer().
void correct_clock(ClockHint hint);
/// For the log: "kvmclock", "CPUID 0x15", "ACPI timer", "PIT", "assumed".
std::string_view clock_name();
/// The frequency is assumed: it was neither reported nor measurable. Output of times must say so.
bool clock_assumed();
/// How far instants are ahead of the time since entry, in ns; 0 unless correct_clock() found that they ran too fast.
Nanoseconds clock_ahead();
/// Frequency of the time stamp counter in Hz.
u64 tsc_hz();
/// Monotonic on this processor. Before start_clock(): cycles, as if at 1 GHz.
Instant now();

/// Starts using the one-shot timer (local APIC, else PIT). Call once, after start_interrupts() and start_clock().
Result<void> start_timer(InterruptController& controller);
/// For the log: "TSC deadline", "local APIC", "PIT", "none", or the name of the hypervisor's timer.
std::string_view timer_name();
/// Whether arming the timer takes one register write and no division: a hypervisor's timer is then no improvement.
bool timer_is_deadline();

/// Replaces the timer of start_timer() with a hypervisor's, which must live as long as the machine. Call once, on the
/// first processor, before another one runs. On an error nothing changes.
Result<void> use_timer(OneShotTimer& timer);

/// The same timer on a further processor; call on it. Requires that start_timer() uses the local APIC's, or that a
/// hypervisor's is in use (which starts with join_hypervisor_timer()).
Result<void> join_timer();
/// On a further processor that has joined its backend: starts its part of the timer of use_timer(); no effect if that
/// was not called.
Result<void> join_hypervisor_timer();

/// Functions of io::Platform; the context identifies the processor. platform_idle() returns at once if `wake` is set,
/// and with interrupts on. It arms its timer only if none is armed for an earlier or equal time, so it may return
/// early; `never`: sleep until an interrupt. Without a timer it does not sleep.
void* platform_context(u32 processor);
Instant platform_now(void* context);
void platform_idle(void* context, Instant until, const std::atomic<bool>& wake);
/// The armed timer may be lost, because the hypervisor has suspended this machine: the next platform_idle() arms it.
/// Call on the processor itself.
void platform_rearm(void* context);
/// Ends platform_idle() of that processor by an interrupt; call from another processor.
void platform_kick(void* context);

} // namespace fl
