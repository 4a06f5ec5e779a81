// Interrupts as drivers see them. core.interrupt_router is the kernel's controller; tests have fakes.
export module core.interrupt;
import core.std;
import core.result;

export namespace fl {

/// Runs with interrupts off, on the interrupted stack: it may read a device's status, count, and call Executor::raise()
/// or Signal::raise(). It must not allocate, log or resume a coroutine. It may be called without a cause: a line can be
/// shared, and a message of the vector's previous owner may still be under way when the vector is given out again.
using InterruptHandler = void (*)(void* context);

/// A global system interrupt (ISA lines are 0–15 before the MADT's overrides are applied: the controller applies them).
struct InterruptLine {
    u32 gsi = 0;
    bool isa = true;    // gsi is an ISA number: edge, active high unless overridden
    bool level = false; // for lines that are not ISA
    bool active_low = false;
};

/// A place that messages can be sent to (MSI, Xen's callback vector).
struct InterruptVector {
    static constexpr u32 every_processor = ~u32{0};
    u8 vector = 0;                   // index in the interrupt descriptor table
    u32 apic_id = 0;                 // of `processor`; with every_processor: of the one that attached it
    u32 processor = every_processor; // the only one on which it is valid
};

/// What a device writes where to interrupt (MSI's and MSI-X's Message Address and Message Data) [SDM-3 11.11].
struct InterruptMessage {
    u64 address = 0;
    u32 data = 0;
};

class InterruptController {
  public:
    /// Routes the line to `processor` and unmasks it. Several handlers may share a line; all are called, in no promised
    /// order, on the processor that the first of them chose. Error{bad_argument}: the processor does not run.
    /// Error{not_found}: no controller has this line. Error{not_supported}: the controller cannot interrupt this
    /// processor. Error{exhausted}: no vector is left there, or no memory.
    virtual Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context,
                                     u32 processor = 0) = 0;
    /// When it returns, the handler runs on no processor. Not from handlers. The same holds for detach_vector().
    virtual void detach_line(InterruptLine line, InterruptHandler handler, void* context) = 0;

    /// A vector of one processor alone, for a device's messages (MSI, MSI-X), edge-triggered; the same number may mean
    /// something else on another processor. The handler runs on `processor`. Error{bad_argument}: the processor does
    /// not run. Error{not_supported}: there is no local APIC, or no message can name this one [message_for].
    /// Error{exhausted}: no vector is left there, or no memory.
    virtual Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) = 0;
    /// What the device writes to raise `vector`. Error{not_supported}: the processor's APIC id does not fit into a
    /// message.
    virtual Result<InterruptMessage> message_for(InterruptVector vector) const = 0;
    /// A vector valid on every processor, those included that join later: for what each processor raises itself, or the
    /// hypervisor raises on it (timers, kicks, Xen's upcall, Hyper-V's SINT). A handler that needs to know where it
    /// runs asks this_processor(). `eoi`: it arrives through the local APIC, which gets its end-of-interrupt after the
    /// handler.
    virtual Result<InterruptVector> attach_vector(InterruptHandler handler, void* context, bool eoi) = 0;
    /// From attach_message() or attach_vector().
    virtual void detach_vector(InterruptVector vector) = 0;

  protected:
    ~InterruptController() = default;
};

/// The highest APIC id that a message or an IOAPIC's redirection entry can name without interrupt remapping: their
/// destination has 8 bits, of which 255 is every processor [SDM-3 11.11.1], [82093AA 3.2.4]. Hypervisors may offer 15
/// bits [kvm-cpuid KVM_FEATURE_MSI_EXT_DEST_ID], [xen-cpuid XEN_HVM_CPUID_EXT_DEST_ID].
constexpr u32 highest_destination(bool extended) { return extended ? 0x7fff : 0xfe; }

constexpr Result<void> check_destination(u32 apic_id, bool extended) {
    if (apic_id > highest_destination(extended) || apic_id == 0xff) {
        return Error(Code::not_supported,
                     "interrupts: devices cannot name a processor with this APIC id (they need interrupt remapping, or "
                     "a hypervisor's 15-bit destination ids): use a processor with a lower one",
                     highest_destination(extended), apic_id);
    }
    return {};
}

/// Fixed delivery, edge-triggered, physical destination without redirection hint: the address holds the lower 8 bits of
/// the APIC id in bits 12 to 19 and, with `extended`, the next 7 in bits 5 to 11; the data is the vector
/// [SDM-3 11.11].
constexpr Result<InterruptMessage> message_to(u32 apic_id, u8 vector, bool extended) {
    if (auto fits = check_destination(apic_id, extended); !fits) {
        return fits.error();
    }
    return InterruptMessage{0xfee0'0000 | u64{apic_id & 0xff} << 12 | u64{apic_id >> 8} << 5, vector};
}

} // namespace fl
