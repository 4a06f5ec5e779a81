// Interrupt routing: the per-processor vector tables and the allocation of vectors. The controllers' registers are
// accessed through InterruptHardware: core.machine.interrupts in the kernel, a fake in tests.
//
// Every processor has 192 vectors (0x30 to 0xef) of its own. Messages and IOAPIC lines use the lowest free one of their
// processor; vectors that are valid everywhere use the highest number that is free on all processors, so that timers
// and kicks have a higher priority than devices [SDM-3 11.8.3]. The 16 lines of the 8259s use 0x20 to 0x2f.
//
// Handlers are allocated from the heap. dispatch_interrupt() reads the tables without a lock while another processor
// may change them: a link is stored last (release) and loaded once (acquire), and an unlinked handler is freed only
// after every processor has left its handlers (InterruptHardware::wait_for_handlers).
module;
#include "core/thread_annotations.hpp"
export module core.interrupt_router;
import core.std;
import core.acpi;
import core.processor;
import core.result;
import core.spinlock;
import core.vector;
export import core.interrupt;

export namespace fl {

/// Where to send the end-of-interrupt.
enum class InterruptEnd : u8 { none, local_apic, pic };

/// One handler of a vector. Handlers of a shared line form a list and have the same `end` and `irq`.
struct AttachedHandler {
    InterruptHandler call;
    void* context;
    AttachedHandler* next;
    u32 processor; // or InterruptVector::every_processor
    InterruptEnd end;
    u8 irq; // of the 8259s
    bool line;
};

/// A processor's table: the first handler of each vector, or nullptr.
using VectorTable = std::array<AttachedHandler*, 256>;

/// Interrupts counted by dispatch_interrupt(), per processor.
struct InterruptCounters {
    u64 taken = 0;      // delivered to at least one handler
    u64 spurious = 0;   // raised by the controller and withdrawn
    u64 unexpected = 0; // on a vector without a handler
};

/// The controllers' registers.
class InterruptHardware {
  public:
    /// `io_apic`: index, in the order of add_io_apic(). `reg`: number in the register select register [82093AA 3.1].
    virtual void write_io_apic(u32 io_apic, u32 reg, u32 value) = 0;
    /// Masks or unmasks a line of the 8259s.
    virtual void mask_pic(u8 irq, bool masked) = 0;
    /// Sets level or edge triggering of a line of the 8259s.
    virtual void set_pic_level(u8 irq, bool level) = 0;
    /// Returns when every other processor has left the handlers that it was running at the time of the call.
    virtual void wait_for_handlers() = 0;

    // Used by dispatch_interrupt(), on the interrupted processor.
    /// Whether the line that the 8259 raised is in service; if not, completes the spurious interrupt.
    virtual bool is_real_pic(u8 irq) = 0;
    /// Sends the end-of-interrupt for a line of the 8259s.
    virtual void end_pic(u8 irq) = 0;
    virtual bool in_service(u8 vector) = 0; // false without a local APIC
    virtual void end_local_apic() = 0;

  protected:
    ~InterruptHardware() = default;
};

class InterruptRouter final : public InterruptController {
  public:
    static constexpr u8 first_pic_vector = 0x20;
    static constexpr u8 first_vector = 0x30;
    static constexpr u8 last_vector = 0xef;
    static constexpr u32 vectors_per_processor = last_vector - first_vector + 1;
    static constexpr u8 spurious_vector = 0xff; // of the local APICs

    /// The interrupt controllers that were found.
    struct Machine {
        bool local_apic = false;
        bool pic = false;      // the 8259s are present
        bool extended = false; // 15-bit destinations [highest_destination]
    };

    constexpr explicit InterruptRouter(InterruptHardware& hardware) : hardware_(hardware) {}

    /// Called once, on processor 0, before any other function. `apic_id`: of processor 0.
    void start(const Machine& machine, u32 apic_id);
    /// Registers an IOAPIC with `lines` redirection entries and masks them all. Once there is an IOAPIC, lines are
    /// routed through IOAPICs and the 8259s are not used. Returns false if the table is full.
    bool add_io_apic(u32 first_gsi, u32 lines);
    /// Adds an ISA override of the MADT. Call before lines are attached.
    void add_override(const acpi::Override& wire);
    /// Adds another processor. Called on that processor with interrupts off. Error{exhausted}: no memory for its table.
    Result<void> join(u32 processor, u32 apic_id);

    /// The table of a processor that has joined.
    VectorTable& vectors(u32 processor) { return *tables_[processor]; }
    bool has_io_apic() const { return io_apic_count_ != 0; }
    /// Number of handlers not yet freed.
    usize attached() const { return attached_.load(std::memory_order_relaxed); }

    Result<void> attach_line(InterruptLine line, InterruptHandler handler, void* context, u32 processor = 0) override;
    void detach_line(InterruptLine line, InterruptHandler handler, void* context) override;
    Result<InterruptVector> attach_message(u32 processor, InterruptHandler handler, void* context) override;
    Result<InterruptMessage> message_for(InterruptVector vector) const override;
    Result<InterruptVector> attach_vector(InterruptHandler handler, void* context, bool eoi) override;
    void detach_vector(InterruptVector vector) override;

  private:
    struct IoApic {
        u32 first_gsi;
        u32 lines;
    };
    // A line after the MADT's overrides: its GSI and how it is wired.
    struct Wire {
        u32 gsi;
        bool level;
        bool active_low;
    };
    // A line with at least one handler.
    struct Line {
        u32 gsi;
        u32 processor;
        u8 vector;
    };

    Wire wire(InterruptLine line) const REQUIRES(lock_);
    std::optional<u32> io_apic_of(u32 gsi) const REQUIRES(lock_);
    Line* find(u32 gsi) REQUIRES(lock_);
    Result<void> route(const Wire& wire, bool isa, u32 processor, AttachedHandler& handler) REQUIRES(lock_);
    Result<void> check_processor(u32 processor) const;
    Result<u8> free_vector(u32 processor) const;
    AttachedHandler* create(InterruptHandler handler, void* context);
    void destroy(AttachedHandler* handler);
    void enter(u32 processor, u8 vector, AttachedHandler* handler);
    void program(const Wire& wire, u32 apic_id, u8 vector) REQUIRES(lock_);

    InterruptHardware& hardware_;
    // Protects lines_ and the chains of handlers, which dispatch_interrupt() reads without it. Everything else is
    // written by start(), add_io_apic(), add_override() and join(), before it is used.
    mutable SpinLock lock_;
    Machine machine_;
    VectorTable first_table_{}; // of processor 0, used before the heap exists
    std::array<VectorTable*, max_processors> tables_{};
    std::array<u32, max_processors> apic_ids_{};
    Vector<Line> lines_ GUARDED_BY(lock_);
    std::array<IoApic, acpi::Madt::max_io_apics> io_apics_{};
    std::array<acpi::Override, acpi::Madt::max_overrides> overrides_{};
    u32 io_apic_count_ = 0;
    u32 override_count_ = 0;
    std::atomic<usize> attached_{0}; // relaxed: a statistic for tests
};

[[gnu::always_inline]] inline AttachedHandler* load_handler(AttachedHandler*& link) {
    return __atomic_load_n(&link, __ATOMIC_ACQUIRE); // pairs with the release in store_handler()
}
[[gnu::always_inline]] inline void store_handler(AttachedHandler*& link, AttachedHandler* to) {
    __atomic_store_n(&link, to, __ATOMIC_RELEASE);
}

/// A vector without a handler: counts it, and sends an end-of-interrupt if the controller expects one.
template <class Hardware>
[[gnu::noinline, gnu::cold]] void dispatch_unexpected(InterruptCounters& counters, Hardware& hardware, u32 number) {
    const u32 irq = number - InterruptRouter::first_pic_vector;
    if (irq < 16) {
        if (!hardware.is_real_pic(static_cast<u8>(irq))) {
            ++counters.spurious;
            return;
        }
        hardware.end_pic(static_cast<u8>(irq));
    } else if (number == InterruptRouter::spurious_vector) {
        ++counters.spurious; // gets no end-of-interrupt [SDM-3 11.9]
        return;
    } else if (hardware.in_service(static_cast<u8>(number))) {
        hardware.end_local_apic();
    }
    ++counters.unexpected;
}

/// Calls the handlers of a vector (32 to 255) and ends the interrupt. `table` and `counters` belong to the calling
/// processor. `Hardware` is the final class, so that no virtual calls are made.
template <class Hardware>
    requires std::derived_from<Hardware, InterruptHardware>
inline void dispatch_interrupt(VectorTable& table, InterruptCounters& counters, Hardware& hardware, u32 number) {
    AttachedHandler* handler = load_handler(table[number]);
    if (handler == nullptr) [[unlikely]] {
        return dispatch_unexpected(counters, hardware, number);
    }
    if (handler->end == InterruptEnd::pic && !hardware.is_real_pic(handler->irq)) [[unlikely]] {
        ++counters.spurious;
        return;
    }
    ++counters.taken;
    for (;;) {
        handler->call(handler->context);
        AttachedHandler* const next = load_handler(handler->next);
        if (next == nullptr) [[likely]] {
            break;
        }
        handler = next;
    }
    if (handler->end == InterruptEnd::local_apic) {
        hardware.end_local_apic();
    } else if (handler->end == InterruptEnd::pic) {
        hardware.end_pic(handler->irq);
    }
}

} // namespace fl
