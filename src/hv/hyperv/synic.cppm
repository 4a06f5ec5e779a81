// The synthetic interrupt controller: per processor, a page of message slots, a page of event flags, and SINT2, which
// the VMBus uses. The handler copies messages out and acknowledges them, counts events, and raises the services that
// listen for them; it does no other work.
//
// Ordering of accesses that are shared with the hypervisor:
//
//   handler: load-acquire of a slot's type                  the complete message is visible
//   hypervisor: writes the slot, its type last
//   handler: slot's type none, full barrier, pending flag   one of the two sees the other: no message waits forever
//   hypervisor: pending flag, full barrier, slot's type     for an end of message (EOM)
//   handler: exchange of a word of event flags with 0       a flag set later raises another interrupt
//   hypervisor: sets a flag (locked), then interrupts
//   handler: store-release of a channel's event count       the host's writes before the event are visible
//   ours: load-acquire in Channel::interrupts
export module hv.hyperv.synic;
import core.std;
import core.result;
import core.dma;
import core.interrupt;
import core.processor;
import io.executor;
import hv.backend;
export import hv.hyperv.protocol;
import hv.hyperv.vmbus.protocol;

export namespace fl::hv::hyperv {

/// A message that was copied out of its slot.
struct SynicMessage {
    u32 type = 0;
    u32 size = 0; // bytes of the payload that are valid
    alignas(8) std::array<std::byte, message_payload> payload{};

    std::span<const std::byte> bytes() const { return {payload.data(), size}; }
};

/// The synthetic interrupt controllers of all processors.
class Synic {
  public:
    /// Capacity of the message queue. Further messages wait in the slot, and after that in the host.
    static constexpr u32 queue_length = 64;
    /// At most so many are taken per interrupt: each one delivered after an end of message raises another interrupt.
    static constexpr u32 messages_per_interrupt = 4;

    Synic() = default;
    Synic(const Synic&) = delete;
    Synic& operator=(const Synic&) = delete;

    /// Call first. `cpu`: access to MSRs; each function below accesses those of the calling processor. `vp_index`: the
    /// VP index register exists; otherwise the index is assumed to be the processor's number.
    void install(Privileged& cpu, DmaAllocator& memory, bool vp_index) {
        cpu_ = &cpu;
        memory_ = &memory;
        vp_index_ = vp_index;
    }
    /// Called on the processor itself, once: sets up its pages and its SINT2 with `vector`, whose handler is
    /// on_interrupt(). `auto_eoi`: the vector needs no end-of-interrupt. From then on, events without a listening
    /// service wake `executor`. Error{exhausted}: no memory for the pages.
    Result<void> enable(io::Executor& executor, u8 vector, bool auto_eoi);
    /// Called on the processor itself: disables its SINT and pages. The memory is kept.
    void disable();
    bool enabled(u32 cpu) const { return processors_[cpu].on.load(std::memory_order_acquire); }
    /// The hypervisor's VP index of this processor; valid once enabled.
    u32 vp_index(u32 cpu) const { return processors_[cpu].vp_index; }

    /// The interrupt handler. `context` is the Synic.
    static void on_interrupt(void* context) { static_cast<Synic*>(context)->interrupt(); }

    /// Takes the next message of processor 0, on processor 0 outside interrupt handlers. Also checks the slot, so that
    /// it works with interrupts off.
    bool next(SynicMessage& into);
    /// Counter of event flag `relid`, incremented by the handler; wraps.
    const std::atomic<u32>& events(u32 relid) const { return events_[relid]; }
    /// The service that the handler raises for event flag `relid` (< event_flags), on the service's own processor.
    io::Listener& listener(u32 relid) { return listeners_[relid]; }
    /// The service that the handler raises for messages, on processor 0.
    io::Listener& message_listener() { return message_listener_; }
    /// Makes the handler check flags up to `relid`. Call before the host may raise it.
    void watch(u32 relid);
    /// For versions 0.13 and 1.1: from now on, channel flags are in this page; nullptr: in the event page.
    void use_interrupt_page(InterruptPage* page) { interrupt_page_.store(page, std::memory_order_release); }
    /// `handler` is called by the interrupt handler for a synthetic timer's message.
    void set_timer_handler(InterruptHandler handler, void* context) {
        timer_context_ = context;
        timer_handler_ = handler;
    }

    /// Interrupts taken, on all processors.
    u64 interrupts() const;
    /// Unexpected messages, which were dropped: not from the VMBus, or on a processor that expects none.
    u64 unexpected_messages() const { return unexpected_messages_.load(std::memory_order_relaxed); }

  private:
    struct alignas(64) Processor {
        MessagePage* messages = nullptr;
        EventPage* flags = nullptr;
        io::Executor* executor = nullptr;
        u32 vp_index = 0;
        std::atomic<bool> on{false};
        std::atomic<bool> checking{false};    // the processor is reading the slot outside the handler
        std::atomic<bool> interrupted{false}; // the handler ran meanwhile
        std::atomic<u64> interrupts{0};
    };

    void interrupt();
    void take_events(Processor& processor);
    void take_messages(Processor& processor, bool queued_here);
    void announce_messages(Processor& processor);
    void check_slot(Processor& processor);
    inline void raised(Processor& processor, u32 flag) {
        if (flag < event_flags) {
            std::atomic<u32>& count = events_[flag];
            // Single writer: the channel's processor. Release: pairs with Channel::interrupts().
            count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_release);
            if (!listeners_[flag].raise_on(*processor.executor)) {
                processor.executor->wake();
            }
        }
    }

    Privileged* cpu_ = nullptr;
    DmaAllocator* memory_ = nullptr;
    bool vp_index_ = false;
    InterruptHandler timer_handler_ = nullptr;
    void* timer_context_ = nullptr;
    std::atomic<InterruptPage*> interrupt_page_{nullptr};
    std::atomic<u32> watched_words_{1};
    std::atomic<u64> unexpected_messages_{0};
    // Processor 0's message queue: written by its handler, read by its executor, both on processor 0.
    std::atomic<u32> head_{0};
    std::atomic<u32> tail_{0};
    std::array<SynicMessage, queue_length> queue_{};
    std::array<Processor, max_processors> processors_{};
    std::array<std::atomic<u32>, event_flags> events_{};
    std::array<io::Listener, event_flags> listeners_{};
    io::Listener message_listener_;
};

} // namespace fl::hv::hyperv
