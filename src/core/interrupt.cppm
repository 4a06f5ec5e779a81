// Interrupts as drivers see them. core.interrupt_router implements the controller; tests use fakes.
export module core.interrupt;
import core.std;
import core.result;

export namespace fl {

/// Runs with interrupts off, on the interrupted stack. It may read device status, count, and call Executor::raise() or
/// Signal::raise(). It must not allocate, log or resume a coroutine. It may be called spuriously: lines can be shared,
/// and a message from a vector's previous owner may arrive after the vector is reused.
using InterruptHandler = void (*)(void* context);

/// A global system interrupt, or an ISA IRQ (0–15), to which the controller applies the MADT's overrides.
struct InterruptLine {
    u32 gsi = 0;
    bool isa = true;    // gsi is an ISA number: edge, active high unless overridden
    bool level = false; // only for lines that are not ISA
    bool active_low = false;
};

/// A target for interrupt messages (MSI, Xen's callback vector).
struct InterruptVector {
    static constexpr u32 every_processor = ~u32{0};
    u8 vector = 0;                   // index in the interrupt descriptor table
    u32 apic_id = 0;                 // of `processor`; for every_processor: of the processor that attached it
    u32 processor = every_processor; // the only processor on which it is valid
};

/// The address and data that a device writes to interrupt (MSI and MSI-X Message Address and Data) [SDM-3 11.11].
struct InterruptMessage {
    u64 address = 0;
    u32 data = 0;
};

/// Connects handlers to interrupt lines, messages and vectors.
class InterruptController {
  public:
    /// Routes the line to `processor` and unmasks it. Handlers may share a line: all are called, in unspecified order,
    /// on the processor that the first one chose. Error{bad_argument}: the processor is not running. Error{not_found}:
    /// no controller has this line. Error{not_supported}: the controller cannot target this processor.
    /// Error{exhausted}: no free vector on that processor, or no memory.
    virtual Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context,
                                     u32 processor = 0) = 0;
    /// On return, the handler is not running on any processor. Must not be called from handlers. The same holds for
    /// detach_vector().
    virtual void detach_line(InterruptLine line, InterruptHandler handler, void* context) = 0;

    /// Allocates a vector on one processor for a device's messages (MSI, MSI-X), edge-triggered; the same number may
    /// have another use on another processor. The handler runs on `processor`. Error{bad_argument}: the processor is
    /// not running. Error{not_supported}: no local APIC, or messages cannot address this processor [message_for].
    /// Error{exhausted}: no free vector on that processor, or no memory.
    virtual Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) = 0;
    /// The message that raises `vector`. Error{not_supported}: the processor's APIC id does not fit into a message.
    virtual Result<InterruptMessage> message_for(InterruptVector vector) const = 0;
    /// Allocates a vector that is valid on every processor, including those that join later, for interrupts that each
    /// processor raises on itself or the hypervisor raises on it (timers, kicks, Xen's upcall, Hyper-V's SINT). A
    /// handler can call this_processor() to learn where it runs. `eoi`: the interrupt is delivered through the local
    /// APIC and needs an end-of-interrupt after the handler.
    virtual Result<InterruptVector> attach_vector(InterruptHandler handler, void* context, bool eoi) = 0;
    /// `vector`: from attach_message() or attach_vector().
    virtual void detach_vector(InterruptVector vector) = 0;

  protected:
    ~InterruptController() = default;
};

/// The highest APIC id that a message or an IOAPIC redirection entry can address without interrupt remapping: their
/// destination has 8 bits, and 255 is broadcast [SDM-3 11.11.1], [82093AA 3.2.4]. Hypervisors may offer 15 bits
/// [kvm-cpuid KVM_FEATURE_MSI_EXT_DEST_ID], [xen-cpuid XEN_HVM_CPUID_EXT_DEST_ID].
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

/// Fixed delivery, edge-triggered, physical destination, no redirection hint: the address holds the low 8 bits of the
/// APIC id in bits 12 to 19 and, if `extended`, the next 7 in bits 5 to 11; the data is the vector [SDM-3 11.11].
constexpr Result<InterruptMessage> message_to(u32 apic_id, u8 vector, bool extended) {
    if (auto fits = check_destination(apic_id, extended); !fits) {
        return fits.error();
    }
    return InterruptMessage{0xfee0'0000 | u64{apic_id & 0xff} << 12 | u64{apic_id >> 8} << 5, vector};
}

} // namespace fl
