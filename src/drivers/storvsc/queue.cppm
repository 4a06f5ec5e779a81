// The packets of one storage channel: the guest's are sent with their data, the host's are taken [storvsc]. Knows no
// requests. The rings are in hv.hyperv.channel, which copies each packet out once.
//
// The channel raises no events while packets are taken: they are stopped with the first packet, and requested again by
// arm().
export module drivers.storvsc.queue;
import core.std;
import core.result;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import hv.hyperv.channel;
import drivers.scsi.protocol;
export import drivers.storvsc.protocol;

export namespace fl::drivers::storvsc {

/// A packet of the controller itself, and its answer.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Packet packet{}; // in: the request; out: the answer
    DmaSpan data{};  // read or written by the host; empty: none
};

/// On the channel's processor only.
class PacketQueue {
  public:
    /// Packets under way at once: each has room for an UNMAP parameter list.
    static constexpr u32 max_packets = 128;
    static constexpr u32 lists_bytes = 4096;

    explicit PacketQueue(hv::hyperv::Channel& channel) : channel_(channel) {}
    /// `lists`: lists_bytes for UNMAP parameter lists; owned by the caller. The channel's events raise `service` from
    /// now on.
    void start(DmaSpan lists, io::Executor& executor, io::Service& service) {
        lists_ = lists;
        channel_.listen(executor, service);
    }
    void stop() { channel_.stop_listening(); }
    void set_terms(const Terms& terms) { terms_ = terms; }
    inline const Terms& terms() const { return terms_; }
    /// The UNMAP parameter list of the command in this slot of the command table.
    inline DmaSpan unmap_list(u32 slot) const { return lists_.subspan(slot * list_stride, scsi::unmap_list_bytes); }

    /// Sends a packet whose data the host reads or writes until it completes the packet. The host sees it after
    /// publish(). Full: no room now; broken: see fault().
    [[gnu::noinline, clang::minsize]] io::SendResult send(const Packet& packet, DmaSpan data, u64 id) {
        return result(channel_.send_gpa_direct(on_wire(packet), data, id));
    }
    /// The same for a packet of whole length that puts its words. Only if has_whole_packets().
    template <hv::hyperv::PayloadWords Words>
    [[gnu::always_inline]] inline io::SendResult send_words(const Words& packet, DmaSpan data, u64 id) {
        return result(channel_.send_gpa_direct(packet, data, id));
    }
    inline bool has_whole_packets() const { return packet_bytes(terms_.version) == sizeof(Packet); }
    /// The same without data.
    inline io::SendResult send(const Packet& packet, u64 id) {
        return result(channel_.send_inband(on_wire(packet), id, true));
    }
    /// Publishes what was sent, and signals the host at most once. False: a ring is broken: see fault().
    inline bool publish(io::Counters& counters) {
        counters.notifications += channel_.publish() ? 1 : 0;
        return channel_.sound();
    }
    /// The next packet of the host, valid until the next call. None: the space of the others has been returned. Broken:
    /// see fault().
    [[gnu::always_inline]] inline io::Next take(hv::hyperv::Packet& packet) {
        const auto got = channel_.receive(packet);
        if (!got) [[unlikely]] {
            return io::Next::broken;
        }
        if (!*got) {
            note_end();
            return io::Next::none;
        }
        note_taken();
        return io::Next::one;
    }
    /// Takes the next packet if it is a completion of whole length that `accept` takes
    /// [hv.hyperv.packets take_completion]. Other: nothing was done: take() it.
    template <class F>
    [[gnu::always_inline]] inline hv::hyperv::Look take_completion(const F& accept) {
        using enum hv::hyperv::Look;
        const auto look = has_whole_packets() ? channel_.take_completion<sizeof(Packet) / 8>(accept) : other;
        if (look == taken) [[likely]] {
            note_taken();
        } else if (look == none) {
            note_end();
        }
        return look;
    }
    /// Requests an event for the next packet. True: one is there already.
    [[gnu::always_inline]] inline Result<bool> arm() {
        if (armed_) {
            return false; // anything received since has raised an event, which prevents sleep
        }
        auto found = channel_.arm();
        armed_ = found && !*found;
        return found;
    }

    /// Events of the host so far, modulo 2^32.
    inline u32 events() const { return channel_.interrupts(); }
    /// Hypercalls since the last call.
    inline u64 take_signals() {
        const u64 signals = channel_.counters().signals;
        return signals - std::exchange(charged_signals_, signals);
    }
    bool rescinded() const { return channel_.rescinded(); }
    /// An answer is missing. False: the rings are broken: fault() tells how.
    bool check() { return channel_.check(); }
    /// The host's violation of the protocol that broke a ring, or why a packet could not be sent. The rings are
    /// unusable afterwards.
    Error fault() const {
        const auto why = channel_.broken() ? channel_.broken() : too_long_;
        return why.value_or(Error{Code::protocol, "a ring of the storage channel is broken"});
    }

  private:
    static constexpr u32 list_stride = 32; // naturally aligned
    static_assert(list_stride >= scsi::unmap_list_bytes && max_packets * list_stride <= lists_bytes);

    inline std::span<const std::byte> on_wire(const Packet& packet) const {
        return std::as_bytes(std::span<const Packet, 1>(&packet, 1)).first(packet_bytes(terms_.version));
    }
    inline void note_end() {
        if (std::exchange(unreleased_, false)) {
            channel_.release();
        }
    }
    [[gnu::always_inline]] inline void note_taken() {
        unreleased_ = true;
        if (armed_) {
            channel_.disarm(); // polled while there is work
            armed_ = false;
        }
    }
    [[gnu::always_inline]] inline io::SendResult result(hv::hyperv::Sent sent) {
        return sent == hv::hyperv::Sent::queued ? io::SendResult::sent : not_sent(sent);
    }
    [[gnu::noinline]] io::SendResult not_sent(hv::hyperv::Sent sent) {
        if (sent == hv::hyperv::Sent::full) {
            return io::SendResult::full;
        }
        if (sent == hv::hyperv::Sent::too_long) {
            too_long_ = Error{Code::exhausted, "a storage packet is longer than the ring", channel_.send_capacity(),
                              packet_bytes(terms_.version)};
        }
        return io::SendResult::broken;
    }

    hv::hyperv::Channel& channel_;
    bool armed_ = false;
    bool unreleased_ = false; // packets were taken since the ring space was last released
    Terms terms_;
    DmaSpan lists_;
    std::optional<Error> too_long_;
    u64 charged_signals_ = 0;
};

} // namespace fl::drivers::storvsc
