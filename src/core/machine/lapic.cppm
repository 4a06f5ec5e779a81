// The local APIC of the calling processor [SDM-3 11], by MSR (x2APIC) where it is offered, else by its page of
// registers.
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

/// Offset of a register in the page; an x2APIC's MSR is 0x800 + offset / 16.
enum class Reg : u32 {
    id = 0x20,
    version = 0x30,
    task_priority = 0x80,
    end_of_interrupt = 0xb0,
    spurious = 0xf0,
    in_service = 0x100, // eight words, 0x10 apart
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

/// Switches it on with this spurious vector; everything masked but NMI. `external`: the 8259's interrupts come in
/// through it (LINT0). `x2apic`: may be used where it is offered. Mode none: the processor has no APIC, or it cannot be
/// reached.
Mode start(u8 spurious_vector, bool external, bool x2apic);
/// On a further processor: the same mode as start() found for the first one. False: this processor has no such APIC.
bool join(u8 spurious_vector);
Mode mode();
u32 read(Reg reg);
void write(Reg reg, u32 value);
u32 id();
void end_of_interrupt();
bool in_service(u8 vector);

/// What an inter-processor interrupt does [SDM-3 11.6.1].
using apic::Delivery;
/// To one processor; what was stored before is seen by it. From anywhere, handlers included. False: the mode cannot
/// address this id, or the APIC did not send it within a bounded time.
bool send(u32 apic_id, Delivery delivery, u8 vector);
/// LVT timer in TSC-deadline mode is offered.
bool has_deadline();

} // namespace fl::lapic
