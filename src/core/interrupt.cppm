// Interrupts as drivers see them; the kernel's controller (core.machine.interrupts) and the tests' fakes are models.
export module core.interrupt;
import core.std;
import core.result;

export namespace fl {

/// Runs with interrupts off, on the interrupted stack: it may read a device's status, count, and call Executor::raise()
/// or Signal::raise(). It must not allocate, log or resume a coroutine.
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
    u8 vector = 0;
    u32 apic_id = 0;
};

class InterruptController {
  public:
    /// Routes the line to this processor and unmasks it. Several handlers may share a line; all are called.
    virtual Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context) = 0;
    virtual void detach_line(InterruptLine line, InterruptHandler handler, void* context) = 0;
    /// A vector, valid on every processor (they share one table of handlers); apic_id is the calling processor's. A
    /// handler that needs to know asks this_processor(). `eoi`: it arrives through the local APIC, which gets its
    /// end-of-interrupt after the handler.
    virtual Result<InterruptVector> attach_vector(InterruptHandler handler, void* context, bool eoi) = 0;
    virtual void detach_vector(InterruptVector vector) = 0;

  protected:
    ~InterruptController() = default;
};

} // namespace fl
