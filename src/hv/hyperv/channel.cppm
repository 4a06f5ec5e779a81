// An open VMBus channel: two packet rings, the host's signal connection, and the event flag by which the host signals
// the guest. A channel belongs to one processor: everything except what is marked otherwise is called on that
// processor's executor, never from an interrupt handler. The interrupt only counts the event and raises the listening
// service, so a driver needs no handler of its own:
//
//     listen() on start, stop_listening() at the end
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

/// An offer from the host: a channel that can be opened. A value; `relid` is valid until the offer is rescinded.
struct Offer {
    Guid type;
    Guid instance;
    u32 relid = 0;
    u32 connection_id = 0; // for signals to the host
    u16 flags = 0;         // offer_flags
    u16 sub_channel = 0;   // 0: the device's primary channel
    bool dedicated_interrupt = false;
    std::optional<u8> monitor; // monitor id, if signals may be deferred
    std::array<u8, 120> user_defined{};
};

/// Maintained by the channel, never reset.
struct ChannelCounters {
    u64 packets_sent = 0;
    u64 packets_received = 0;
    u64 publications = 0; // calls of publish() with packets
    u64 signals = 0;      // HvSignalEvent: one hypercall each
    u64 deferred = 0;     // signals through the monitor page: no hypercall
    u64 full = 0;         // packets that did not fit into the ring
    u64 refused = 0;      // signals that the hypervisor rejected
};

class Channel {
  public:
    /// Maximum bytes of a received packet, without descriptor and trailer; a longer one breaks the channel.
    static constexpr usize receive_max = 4096;

    Channel() = default;
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    inline bool is_open() const { return sender_.has_value(); }
    /// The offer that was opened.
    const Offer& offer() const { return offer_; }
    /// The processor that the channel belongs to.
    u32 cpu() const { return cpu_; }

    // Sending. Payloads are padded to 8 bytes. The host sees nothing before publish().
    inline Sent send_inband(std::span<const std::byte> payload, u64 transaction, bool wants_completion = false) {
        return count(sender_->inband(payload, transaction, wants_completion));
    }
    /// Completes a packet that requested it; `transaction` is that packet's.
    inline Sent send_completion(std::span<const std::byte> payload, u64 transaction) {
        return count(sender_->completion(payload, transaction));
    }
    /// A packet with buffers that the host reads or writes until it completes the packet.
    Sent send_gpa_direct(std::span<const std::byte> payload, std::span<const PageRange> ranges, u64 transaction,
                         bool wants_completion = true) {
        return count(sender_->gpa_direct(payload, ranges, transaction, wants_completion));
    }
    /// The same with one contiguous buffer. Fast for a payload that puts words [hv.hyperv.packets].
    template <class Payload>
    [[gnu::always_inline]] inline Sent send_gpa_direct(Payload payload, DmaSpan buffer, u64 transaction,
                                                       bool wants_completion = true) {
        return count(sender_->gpa_direct(payload, buffer, transaction, wants_completion));
    }
    /// Maximum size of a packet in bytes, including descriptor (16), ranges and trailer (8).
    u32 send_capacity() const { return sender_->capacity(); }
    /// Publishes the queued packets to the host and signals it if it is waiting. True: signalled. False with !sound():
    /// nothing was published.
    bool publish();

    // Receiving.
    /// Copies the next packet to the channel's buffer, checked; valid until the next call. False: none.
    /// Error{protocol}: the host violated the protocol; the channel is broken from now on.
    [[gnu::always_inline]] inline Result<bool> receive(Packet& into) {
        auto got = receiver_->receive(into);
        counters_.packets_received += got && *got ? 1 : 0;
        return got;
    }
    /// Takes the next packet if it is seen at once to be a usual completion [PacketReceiver::take_completion].
    template <u32 words, class F>
    [[gnu::always_inline]] inline Look take_completion(const F& accept) {
        const Look look = receiver_->template take_completion<words>(accept);
        counters_.packets_received += look == Look::taken ? 1 : 0;
        return look;
    }
    /// After a batch of receive(): returns the ring space, and signals a host that waits for it.
    inline void release() {
        if (receiver_->release()) [[unlikely]] {
            signal();
        }
    }
    /// Before sleeping: requests an event and checks once more. True: a packet is already there. Error: broken.
    inline Result<bool> arm() { return receiver_->arm(); }
    /// Stops events for packets until arm(). One store.
    inline void disarm() { receiver_->disarm(); }

    /// Raises `service` for each event from the host and when the host rescinds the channel. Call on the channel's
    /// processor; the service belongs to its executor. One service at a time, until stop_listening() or until the
    /// channel is closed.
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
    /// Events that the host has raised since the channel was opened; wraps. Callable on any processor.
    u32 interrupts() const {
        // Acquire: makes the host's writes before the event visible. Pairs with the release in Synic::raised().
        return events_ == nullptr ? 0 : events_->load(std::memory_order_acquire) - first_event_;
    }
    /// The host has rescinded the channel: it will send nothing more. Close the channel. Callable on any processor.
    bool rescinded() const { return rescinded_.load(std::memory_order_acquire); } // acquire: see mark_rescinded()
    /// Whether the host has obeyed the protocol on both rings so far. Cheap.
    inline bool sound() const { return sender_ && !sender_->error() && !receiver_->error(); }
    /// The same, after another check of the host's read index: for an owner who misses a completion.
    bool check() { return sender_ && sender_->observe() && sound(); }
    /// The first protocol violation on one of the rings; nothing while they are sound.
    std::optional<Error> broken() const {
        if (sender_ && sender_->error()) {
            return sender_->error();
        }
        return receiver_ ? receiver_->error() : std::nullopt;
    }
    inline const ChannelCounters& counters() const { return counters_; }

    /// `handler` is called once, on processor 0's executor (not in an interrupt), when the host rescinds the offer. It
    /// may open latches and make coroutines ready, but must not close the channel. Set it before the channel is opened,
    /// or any time on processor 0. nullptr: none.
    void on_rescind(void (*handler)(void* context), void* context) {
        rescind_handler_ = handler;
        rescind_context_ = context;
    }

    /// How to signal the host that its ring has packets.
    struct Signalling {
        Hypercalls* hypercalls = nullptr;
        u32 connection = 0;
        u64* interrupt_word = nullptr; // word with the bit to set in the interrupt page; nullptr: none
        u64 interrupt_bit = 0;
        u32* monitor_word = nullptr; // the group's pending bits; nullptr: not deferred
        u32 monitor_bit = 0;
    };

    // For the bus (hv.hyperv.vmbus) and for tests in its place, on processor 0.
    /// Called before OPENCHANNEL. `rings`: the outgoing ring first; `send_bytes`: its size, header page included;
    /// `events`: incremented by the interrupt handler; `listener`: raised by it. Without a listener, the code that
    /// delivers an event must wake the whole executor.
    Result<void> attach(const Offer& offer, u32 cpu, DmaBuffer rings, u32 send_bytes, const Signalling& signalling,
                        const std::atomic<u32>& events, io::Listener* listener = nullptr);
    /// Releases the rings; returns their memory to the caller.
    DmaBuffer detach();
    void mark_rescinded() {
        // Release: the host's last completions precede it. Pairs with the acquire in rescinded().
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
    [[gnu::always_inline]] inline Sent count(Sent sent) {
        if (sent == Sent::queued) [[likely]] {
            ++counters_.packets_sent;
        } else if (sent == Sent::full) {
            ++counters_.full;
        }
        return sent;
    }

    std::optional<PacketSender<io::MappedMemory>> sender_;
    std::optional<PacketReceiver<io::MappedMemory>> receiver_;
    Signalling signalling_;
    Offer offer_;
    u32 cpu_ = 0;
    const std::atomic<u32>* events_ = nullptr; // incremented by the interrupt handler
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
/// Exists on the channel's executor, from after open() until before close().
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

    /// True: check the channel (it may have a packet or free space, or be broken or rescinded). False: the bound was
    /// reached first.
    auto wait(const io::Bound& bound) {
        executor_.poll(*this); // arm() requests an event only while a coroutine waits
        return latch_.wait(bound);
    }
    auto wait() {
        executor_.poll(*this);
        return latch_.wait();
    }
    /// The same for periodic work [io.latch wait_until].
    auto wait_until(Instant instant) {
        executor_.poll(*this);
        return latch_.wait_until(instant);
    }
    /// Publishes what was sent at the end of this turn of the executor.
    void touch() { executor_.touch(*this); }
    /// Ends a wait, so that the owner can notify its own coroutine. Call on the channel's executor.
    void notify() { latch_.open(); }

    void flush() override { static_cast<void>(channel_.publish()); }
    bool drain() override;
    bool arm() override;
    /// While a bounded wait is pending: a lost interrupt then costs a tick, not the whole bound.
    bool wants_tick() const override { return latch_.awaited_with_bound(); }

  private:
    Channel& channel_;
    io::Executor& executor_;
    io::Latch latch_;
    u32 seen_ = 0;          // Channel::interrupts() when the channel was last checked
    bool reported_ = false; // has reported that the channel is broken or rescinded
};

} // namespace fl::hv::hyperv
