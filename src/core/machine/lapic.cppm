// The local APIC of the calling processor [SDM-3 11], by MSR in x2APIC mode, else through its register page.
export module core.machine.lapic;
import core.std;
import core.apic;
import core.result;

export namespace fl::lapic {

enum class Mode : u8 { none, memory, x2apic };
constexpr std::string_view name(Mode mode) {
    switch (mode) {
    case Mode::none: return "none";
    case Mode::memory: return "xAPIC";
    case Mode::x2apic: return "x2APIC";
    }
    return "unknown";
}

/// Offset of a register in the page; in x2APIC mode the MSR is 0x800 + offset / 16.
enum class Reg : u32 {
    id = 0x20,
    version = 0x30,
    task_priority = 0x80,
    end_of_interrupt = 0xb0,
    spurious = 0xf0,
    in_service = 0x100, // eight words, 0x10 bytes apart
    command_low = 0x300,
    command_high = 0x310,
    lvt_timer = 0x320,
    lvt_lint0 = 0x350,
    lvt_lint1 = 0x360,
    lvt_error = 0x370,
    timer_initial = 0x380,
    timer_current = 0x390,
    timer_divide = 0x3e0,
};

/// Enables the APIC with this spurious vector; masks everything but NMI. `external`: the 8259's interrupts arrive
/// through LINT0. `x2apic`: may be used if supported. Mode none: the processor has no APIC, or it is inaccessible.
Mode start(u8 spurious_vector, bool external, bool x2apic);
/// On a further processor: uses the mode of the first one. False: this processor's APIC does not support it.
bool join(u8 spurious_vector);
Mode mode();
/// Accesses a register of the calling processor's APIC; the mode must not be `none`.
u32 read(Reg reg);
void write(Reg reg, u32 value);
/// APIC id of the calling processor; 0 without an APIC.
u32 id();
/// Ends the interrupt in service with the highest priority [SDM-3 11.8.5].
void end_of_interrupt();
/// Whether the vector's in-service bit is set.
bool in_service(u8 vector);

/// Delivery mode of an inter-processor interrupt [SDM-3 11.6.1].
using apic::Delivery;
/// Sends an interrupt to one processor, which sees all earlier stores. Callable from anywhere, including handlers.
/// False: the mode cannot address this id, or the APIC did not send it within a bounded time.
bool send(u32 apic_id, Delivery delivery, u8 vector);
/// The LVT timer supports TSC-deadline mode.
bool has_deadline();

} // namespace fl::lapic
