// One open VMBus channel: two rings of packets, the way to signal the host, and the event flag by which the host
// signals us. A channel belongs to one processor: everything but what is marked otherwise is called on that processor's
// executor, never from an interrupt handler. The interrupt only counts the event and raises the service that listens,
// so a driver needs no handler of its own:
//
//     listen() when it starts, stop_listening() when it ends
//     flush():  channel.publish()                         one store, at most one signal for the turn
//     drain():  channel.receive(packet) … ; channel.release()
//     arm():    channel.arm()
//
// hv.hyperv.vmbus opens and closes channels.
export module hv.hyperv.channel;
import core.std;
import core.result;
import core.dma;
import core.time;
import io.executor;
import io.latch;
import io.ring;
export import hv.hyperv.packets;
export import hv.hyperv.vmbus.protocol;
import hv.hyperv.hypercall;

export namespace fl::hv::hyperv {

/// What the host offers: a channel that may be opened. A plain value; `relid` is valid until the offer is rescinded.
struct Offer {
    Guid type;
    Guid instance;
    u32 relid = 0;
    u32 connection_id = 0; // for signals
    u16 flags = 0;         // offer_flags
    u16 sub_channel = 0;   // 0: the device's first channel
    bool dedicated_interrupt = false;
    std::optional<u8> monitor; // its signals may be deferred
    std::array<u8, 120> user_defined{};
};

/// Counted by the channel, never reset.
struct ChannelCounters {
    u64 packets_sent = 0;
    u64 packets_received = 0;
    u64 publications = 0; // publish() with something in it
    u64 signals = 0;      // HvSignalEvent: one hypercall each
    u64 deferred = 0;     // signals by the monitor page: no hypercall
    u64 full = 0;         // packets that found no room
    u64 refused = 0;      // signals that the hypervisor did not take
};

class Channel {
  public:
    /// Packets from the host may have so many bytes, without descriptor and trailer; a longer one breaks the channel.
    static constexpr usize receive_max = 4096;

    Channel() = default;
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    inline bool is_open() const { return sender_.has_value(); }
    /// As it was opened.
    const Offer& offer() const { return offer_; }
    /// The processor that it belongs to.
    u32 cpu() const { return cpu_; }

    // Sending. Payloads are padded to 8 bytes. Nothing is seen by the host before publish().
    inline Sent send_inband(std::span<const std::byte> payload, u64 transaction, bool wants_completion = false) {
        return count(sender_->inband(payload, transaction, wants_completion));
    }
    /// The answer to a packet that wanted one, with that packet's transaction id.
    inline Sent send_completion(std::span<const std::byte> payload, u64 transaction) {
        return count(sender_->completion(payload, transaction));
    }
    /// A packet with buffers that the host reads or writes until it has completed it.
    Sent send_gpa_direct(std::span<const std::byte> payload, std::span<const PageRange> ranges, u64 transaction,
                         bool wants_completion = true) {
        return count(sender_->gpa_direct(payload, ranges, transaction, wants_completion));
    }
    /// The same with one contiguous buffer.
    Sent send_gpa_direct(std::span<const std::byte> payload, DmaSpan buffer, u64 transaction,
                         bool wants_completion = true) {
        return count(sender_->gpa_direct(payload, buffer, transaction, wants_completion));
    }
    /// Bytes that a packet may have at most, descriptor (16), ranges and trailer (8) included.
    u32 send_capacity() const { return sender_->capacity(); }
    /// Shows what was queued to the host, and signals it if it sleeps. True: it was signalled. False, and not sound():
    /// nothing was shown.
    bool publish();

    // Receiving.
    /// The next packet, checked, in the channel's own buffer, until the next call; false: there is none.
    /// Error{protocol}: the host broke a rule, and the channel is broken from here on.
    inline Result<bool> receive(Packet& into) {
        auto got = receiver_->receive(into);
        counters_.packets_received += got && *got ? 1 : 0;
        return got;
    }
    /// After a batch of receive(): gives the room back, and signals a host that waits for it.
    inline void release() {
        if (receiver_->release()) [[unlikely]] {
            signal();
        }
    }
    /// Before sleeping: asks for an event and looks once more. True: a packet is there already. Error: broken.
    inline Result<bool> arm() { return receiver_->arm(); }
    /// No more events from the host for packets, until arm(). A store.
    inline void disarm() { receiver_->disarm(); }

    /// Raises `service` for each event of the host's, and when the host takes the device away. On the channel's
    /// processor; the service is that executor's, and one at a time. Until stop_listening(), or the channel is closed.
    void listen(io::Executor& executor, io::Service& service) {
        if (listener_ != nullptr) {
            listener_->set(executor, service);
        }
    }
    void stop_listening() {
        if (listener_ != nullptr) {
            listener_->clear();
        }
    }
    /// Events that the host has raised since the channel was opened. From any processor. Wraps.
    u32 interrupts() const {
        // Acquire: what the host wrote before the event is seen. Partner: the release in Synic::on_interrupt().
        return events_ == nullptr ? 0 : events_->load(std::memory_order_acquire) - first_event_;
    }
    /// The host has taken the device away: no answer will come any more. Close the channel. From any processor.
    bool rescinded() const { return rescinded_.load(std::memory_order_acquire); } // acquire: see mark_rescinded()
    /// Whether the host has kept the rules of both rings so far. Cheap.
    inline bool sound() const { return sender_ && !sender_->error() && !receiver_->error(); }
    /// The same, after one more look at how far the host says that it has read: for an owner who misses an answer.
    bool look() { return sender_ && sender_->observe() && sound(); }
    /// The first rule that the host broke in one of the rings; nothing while they are sound.
    std::optional<Error> broken() const {
        if (sender_ && sender_->error()) {
            return sender_->error();
        }
        return receiver_ ? receiver_->error() : std::nullopt;
    }
    inline const ChannelCounters& counters() const { return counters_; }

    /// Called once, on processor 0's executor (not in an interrupt), when the host rescinds the offer; may open latches
    /// and make coroutines ready, not close the channel itself. Set before the channel is opened, or any time on
    /// processor 0. nullptr: nobody wants to know.
    void on_rescind(void (*handler)(void* context), void* context) {
        rescind_handler_ = handler;
        rescind_context_ = context;
    }

    /// How the host is told that there is something in its ring.
    struct Signalling {
        Hypercalls* hypercalls = nullptr;
        u32 connection = 0;
        u64* interrupt_word = nullptr; // the bit to set in the interrupt page; nullptr: none
        u64 interrupt_bit = 0;
        u32* monitor_word = nullptr; // the group's pending bits; nullptr: not deferred
        u32 monitor_bit = 0;
    };

    // For the bus (hv.hyperv.vmbus) and for tests that play it, on processor 0.
    /// Before OPENCHANNEL. `rings`: the outgoing one first; `send_bytes`: its part of them, header page included;
    /// `events`: counted by the interrupt handler; `listener`: whom it raises. Without one whoever delivers an event
    /// wakes the whole executor.
    Result<void> attach(const Offer& offer, u32 cpu, DmaBuffer rings, u32 send_bytes, const Signalling& signalling,
                        const std::atomic<u32>& events, io::Listener* listener = nullptr);
    /// Rings and memory are let go; the memory is the caller's again.
    DmaBuffer detach();
    void mark_rescinded() {
        // Release: the host's last completions came before. Partner: the acquire in rescinded().
        rescinded_.store(true, std::memory_order_release);
        if (listener_ != nullptr) {
            listener_->raise();
        }
        if (rescind_handler_ != nullptr) {
            rescind_handler_(rescind_context_);
        }
    }
    void move_to(u32 cpu) { cpu_ = cpu; }
    u32 gpadl = 0;           // of the rings
    Channel* next = nullptr; // in the bus's list of open channels

  private:
    void signal();
    inline Sent count(Sent sent) {
        (sent == Sent::queued ? counters_.packets_sent : counters_.full) +=
            sent == Sent::queued || sent == Sent::full ? 1 : 0;
        return sent;
    }

    std::optional<PacketSender<io::MappedMemory>> sender_;
    std::optional<PacketReceiver<io::MappedMemory>> receiver_;
    Signalling signalling_;
    Offer offer_;
    u32 cpu_ = 0;
    const std::atomic<u32>* events_ = nullptr; // counted by the interrupt handler
    u32 first_event_ = 0;
    io::Listener* listener_ = nullptr;
    std::atomic<bool> rescinded_{false};
    void (*rescind_handler_)(void*) = nullptr;
    void* rescind_context_ = nullptr;
    DmaBuffer rings_;
    ChannelCounters counters_;
    alignas(8) std::array<std::byte, receive_max> buffer_;
};

/// For drivers that wait for packets in a coroutine: a Service that publishes, arms and wakes. One waiter at a time.
/// Lives beside its open channel, on the channel's executor, from after open() to before close().
///
///     Inbox inbox(channel, executor);
///     while (co_await inbox.wait(bound)) {
///         Packet packet;
///         for (;;) { auto got = channel.receive(packet); … inbox.touch() after sending … }
///         channel.release();
///     }
class Inbox final : public io::Service {
  public:
    Inbox(Channel& channel, io::Executor& executor);
    ~Inbox();

    /// True: look at the channel (a packet may be there, it may have room again, be broken, or rescinded). False: the
    /// bound passed first.
    auto wait(const io::Bound& bound) {
        executor_.poll(*this); // arm() asks the host for an event while somebody waits
        return latch_.wait(bound);
    }
    auto wait() {
        executor_.poll(*this);
        return latch_.wait();
    }
    /// The same for what is done at intervals [io.latch wait_until].
    auto wait_until(Instant instant) {
        executor_.poll(*this);
        return latch_.wait_until(instant);
    }
    /// What was sent is published at the end of this turn.
    void touch() { executor_.touch(*this); }
    /// Ends a wait: for an owner who has something to tell his own coroutine. On the channel's executor.
    void poke() { latch_.open(); }

    void flush() override { static_cast<void>(channel_.publish()); }
    bool drain() override;
    bool arm() override;
    /// For an answer that is waited for: an interrupt that gets lost costs a tick, and not the bound.
    bool wants_tick() const override { return latch_.awaited_with_bound(); }

  private:
    Channel& channel_;
    io::Executor& executor_;
    io::Latch latch_;
    u32 seen_ = 0;      // Channel::interrupts() when it was last looked at
    bool told_ = false; // that the channel is broken or rescinded
};

} // namespace fl::hv::hyperv
