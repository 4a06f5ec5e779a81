// The host's side of SynIC: message slots and event flags in the guest's pages, interrupts through KVM's routes
// [hv-tlfs §11].
export module vmm.synic;
import host.std;
import core.result;
import vmm.kvm;
import vmm.memory;

export namespace fl::vmm {

/// A message slot of the guest's page [hv-tlfs §11.8.2].
struct MessageHeader {
    u32 type;        // 0: the slot is free
    u8 payload_size; // bytes, at most 240
    u8 flags;        // bit 0: another message is pending
    u16 reserved;
    u64 origin; // port or partition
};
static_assert(sizeof(MessageHeader) == 16);
static_assert(__builtin_offsetof(MessageHeader, type) == 0 && __builtin_offsetof(MessageHeader, payload_size) == 4);
static_assert(__builtin_offsetof(MessageHeader, flags) == 5 && __builtin_offsetof(MessageHeader, origin) == 8);
inline constexpr u64 message_slot_size = 256;
inline constexpr u64 message_payload_size = 240;
inline constexpr u64 event_flags_size = 256; // bytes per SINT: 2048 flags
inline constexpr u32 sint_count = 16;
inline constexpr u64 page_enabled = 1; // SIMP, SIEFP, SCONTROL: bit 0

/// Notified when the guest has freed a message slot.
class EndOfMessage {
  public:
    virtual void end_of_message(u32 processor, u8 sint) = 0;

  protected:
    ~EndOfMessage() = default;
};

class Synic {
  public:
    enum class Posted : u8 { delivered, busy, refused };
    enum class Flagged : u8 { raised, pending, refused };

    /// Both outlive this.
    Synic(Kvm& kvm, const GuestMemory& memory, u32 processors);
    ~Synic();

    /// Handles KVM's SynIC exit: the new values of SCONTROL, SIEFP, SIMP. Any thread.
    void registers(u32 processor, u64 control, u64 event_page, u64 message_page);
    /// Writes a message (at most 240 bytes) to the slot of `sint`. `busy`: its pending bit is set, and service()
    /// reports the end of the message.
    Posted post(u32 processor, u8 sint, u32 type, std::span<const std::byte> payload);
    /// Sets flag 0 to 2047 of `sint`; interrupts if it was clear, or if `always`.
    Flagged set_event(u32 processor, u8 sint, u16 flag, bool always);

    /// A descriptor for the I/O thread's epoll: readable when the guest has acknowledged a message for whose slot a
    /// sender waits.
    int acknowledged() const { return acknowledged_.number(); }
    /// To be called then: reports the freed slots to `listener`.
    void service(EndOfMessage& listener);

    u64 interrupts() const { return interrupts_; }
    u64 messages() const { return messages_; }

  private:
    struct Line {
        SintRoute route; // raises the interrupt
        // a second route of the same SINT, with a higher GSI, for acknowledgements: KVM reports those to the last route
        SintRoute listener;
        Descriptor event;
        Descriptor unused; // the listener's own trigger, never signalled
        bool listening = false;
        bool waiting = false;
    };
    struct Processor {
        // Written by the processor's own thread under mutex_, read under mutex_ by the delivering thread.
        u64 control = 0, event_page = 0, message_page = 0;
        std::array<std::unique_ptr<Line>, sint_count> lines;
    };
    Line* line(u32 processor, u8 sint);
    void raise(Line& line);
    bool listen(Line& line);

    Kvm& kvm_;
    const GuestMemory& memory_;
    Descriptor acknowledged_;
    std::mutex mutex_;
    std::vector<Processor> processors_;
    std::vector<SintRoute> routes_;
    u64 interrupts_ = 0;
    u64 messages_ = 0;
};

} // namespace fl::vmm
