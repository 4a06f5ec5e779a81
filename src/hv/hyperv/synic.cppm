// The synthetic interrupt controller: on each processor a page of message slots and a page of event flags, and SINT2,
// by which the VMBus speaks. The handler copies messages out, clears and ends them, counts events, and raises the
// services that listen for them; no other work is done in it.
//
// What is shared with the hypervisor, and what each pair of accesses orders:
//
//   handler: load-acquire of a slot's type                  the message is seen whole
//   hypervisor: writes the slot, its type last
//   handler: slot's type none, full barrier, pending flag   one of the two sees the other: no message waits for an end
//   hypervisor: pending flag, full barrier, slot's type     of message (EOM) that is never written
//   handler: exchange of a word of event flags with 0       a flag that is set later interrupts
//   hypervisor: sets a flag (locked), then interrupts
//   handler: store-release of a channel's event count       what the host wrote before the event is seen
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

/// A message that was copied out.
struct SynicMessage {
    u32 type = 0;
    u32 size = 0; // bytes of the payload that count
    alignas(8) std::array<std::byte, message_payload> payload{};

    std::span<const std::byte> bytes() const { return {payload.data(), size}; }
};

class Synic {
  public:
    /// Messages that can wait to be taken. Further ones wait in the slot, and behind it with the host.
    static constexpr u32 queue_length = 64;

    Synic() = default;
    Synic(const Synic&) = delete;
    Synic& operator=(const Synic&) = delete;

    /// Before anything else. `cpu`: the registers; every call below reaches those of the processor that makes it.
    /// `vp_index`: the register that tells a processor's index is there; else the index is taken to be the processor's
    /// number here.
    void install(Privileged& cpu, DmaAllocator& memory, bool vp_index) {
        cpu_ = &cpu;
        memory_ = &memory;
        vp_index_ = vp_index;
    }
    /// On the processor itself, once: its pages, its SINT2 with `vector`, whose handler is on_interrupt(). `auto_eoi`:
    /// the vector needs no end-of-interrupt. Events that no service listens for wake `executor` from here on.
    /// Error{exhausted}.
    Result<void> enable(io::Executor& executor, u8 vector, bool auto_eoi);
    /// On the processor itself: no interrupts, no pages. The memory is kept.
    void disable();
    bool enabled(u32 cpu) const { return processors_[cpu].on.load(std::memory_order_acquire); }
    /// What the hypervisor calls this processor; valid once it is enabled.
    u32 vp_index(u32 cpu) const { return processors_[cpu].vp_index; }

    /// The interrupt, on the processor that it came to. `context` is the Synic.
    static void on_interrupt(void* context) { static_cast<Synic*>(context)->interrupt(); }

    /// The next message for processor 0, on processor 0 outside of interrupt handlers. Looks into the slot too, so it
    /// works with interrupts off.
    bool next(SynicMessage& into);
    /// How often event flag `relid` was raised; wraps. The handler writes it.
    const std::atomic<u32>& events(u32 relid) const { return events_[relid]; }
    /// The service that the handler raises for event flag `relid` (< event_flags), on its own processor.
    io::Listener& listener(u32 relid) { return listeners_[relid]; }
    /// The service that the handler raises for messages: processor 0's.
    io::Listener& message_listener() { return message_listener_; }
    /// The handler looks at flags up to this one. Before the host may raise it.
    void watch(u32 relid);
    /// For versions 0.13 and 1.1: channels' flags are in this page, from here on; nullptr: in the event page.
    void use_interrupt_page(InterruptPage* page) { interrupt_page_.store(page, std::memory_order_release); }
    /// Called in the handler for a synthetic timer's message.
    void set_timer_handler(InterruptHandler handler, void* context) {
        timer_context_ = context;
        timer_handler_ = handler;
    }

    /// Taken on all processors.
    u64 interrupts() const;
    /// Messages that nobody expected: not the VMBus's, or on a processor that gets none. Dropped.
    u64 stray() const { return stray_.load(std::memory_order_relaxed); }

  private:
    struct alignas(64) Processor {
        MessagePage* messages = nullptr;
        EventPage* flags = nullptr;
        io::Executor* executor = nullptr;
        u32 vp_index = 0;
        std::atomic<bool> on{false};
        std::atomic<bool> looking{false}; // the processor is in the slot outside of the handler
        std::atomic<bool> again{false};   // the handler came meanwhile
        std::atomic<u64> interrupts{0};
    };

    void interrupt();
    void take_events(Processor& processor);
    void take_messages(Processor& processor, bool queued_here);
    void announce_messages(Processor& processor);
    void look(Processor& processor);
    inline void raised(Processor& processor, u32 flag) {
        if (flag < event_flags) {
            std::atomic<u32>& count = events_[flag];
            // One writer: the processor that the channel belongs to. Release: partner is Channel::interrupts().
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
    std::atomic<u64> stray_{0};
    // Processor 0's messages: written by its handler, read by its executor; both on one processor.
    std::atomic<u32> head_{0};
    std::atomic<u32> tail_{0};
    std::array<SynicMessage, queue_length> queue_{};
    std::array<Processor, max_processors> processors_{};
    std::array<std::atomic<u32>, event_flags> events_{};
    std::array<io::Listener, event_flags> listeners_{};
    io::Listener message_listener_;
};

} // namespace fl::hv::hyperv
