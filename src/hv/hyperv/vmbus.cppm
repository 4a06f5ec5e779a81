// The VMBus: one connection to the host, the channels that it offers, the memory that is shared with it. Everything
// here runs on processor 0's executor; a channel that belongs to another processor is opened here and then used there.
// Every wait has a bound; every answer is matched to its request by its ids; what matches nothing is counted and told
// once.
//
// Order: install → connect → request_offers → (open → the channel's use → close)… → unload. An offer may be rescinded
// at any moment: whoever waits for an answer about it gets Error{device_gone}, an open channel is marked and its owner
// told.
export module hv.hyperv.vmbus;
import core.std;
import core.result;
import core.dma;
import core.time;
import core.vector;
import io.executor;
import io.latch;
import io.task;
import hv.hyperv.hypercall;
import hv.hyperv.synic;
export import hv.hyperv.channel;
export import hv.hyperv.vmbus.protocol;

export namespace fl::hv::hyperv {

/// What the bus needs. Everything outlives it.
struct VmbusEnvironment {
    Hypercalls& hypercalls;
    Synic& synic;
    DmaAllocator& memory;
    io::Executor& executor; // processor 0's
    Nanoseconds timeout;    // bound of a wait for one answer
};

/// Guest memory that the host may reach until it is torn down.
struct Gpadl {
    u32 relid = 0;
    u32 handle = 0; // never 0
};

/// Somebody who wants to hear of offers that come after request_offers() has ended (hot add). Lives with its owner, who
/// removes it.
struct OfferListener {
    Guid type; // null: any
    /// On processor 0's executor, in drain(): spawn a task or open a latch. First channels only, no sub-channels.
    void (*offered)(void* context, const Offer& offer) = nullptr;
    /// Likewise, of one for which there was no room, whatever its type; nullptr: not told.
    void (*dropped)(void* context) = nullptr;
    void* context = nullptr;
    OfferListener* next = nullptr;
};

struct VmbusCounters {
    u64 messages = 0;   // received
    u64 posted = 0;     // sent
    u64 retries = 0;    // posts for which the hypervisor had no buffer
    u64 unexpected = 0; // messages that match no request, or are malformed
    u64 offers = 0;
    u64 offers_dropped = 0; // there was no room for them
    u64 rescinds = 0;
};

class Vmbus final : public io::Service {
  public:
    /// Offers that are kept at once, sub-channels included; further ones are given back and counted.
    static constexpr usize max_offers = 1024;
    /// The bound of a wait for an answer to the first contact, if timeout is not shorter: a host without a VMBus must
    /// not hold up the boot.
    static constexpr Nanoseconds contact_timeout = 1'000'000'000;
    /// How long a message is posted again, at least, while the hypervisor has no room for it: a host throttles its
    /// guests for seconds.
    static constexpr Nanoseconds posting_timeout = 10'000'000'000;

    struct OpenParameters {
        // of packets, each direction: a multiple of the page size; the header page comes on top
        u32 send_bytes = 64 * 1024;
        u32 receive_bytes = 64 * 1024;
        u32 cpu = 0;                               // gets the events; has joined
        std::span<const std::byte> user_data = {}; // at most 120 bytes, for the device
        bool may_defer = true;                     // signals by the monitor page where it is offered
    };

    Vmbus() = default;

    /// Once. Allocates the pages that older versions and monitors need. Error{exhausted}.
    Result<void> install(const VmbusEnvironment& environment);

    /// Negotiates the version, newest first. Error{not_found}: nobody answers, or refuses every connection;
    /// Error{not_supported}: every version is refused. Nothing is left behind then.
    io::Task<Result<void>> connect();
    bool connected() const { return version_ != Version::none; }
    Version version() const { return version_; }
    /// After connect(): until the host has told all that is there now.
    io::Task<Result<void>> request_offers();

    /// Offers that are there, by ascending relid: f(const Offer&). f must not wait.
    template <class F>
    void for_each_offer(F&& f) const {
        for (const KnownOffer& known_offer : offers_) {
            f(known_offer.offer);
        }
    }
    /// The offer with this id (SyntheticDevice::number), if it is still there.
    std::optional<Offer> find(u32 relid) const;
    /// A device that is there and that this has not given yet: each offer once, first channels only. One that is
    /// rescinded before is not given; one that is offered again counts as new.
    std::optional<Offer> take_new();

    /// Opens an offered channel: allocates the rings, shares them, asks the host. `channel` is closed, lives until
    /// close() has ended, does not move. Error{device_gone}: rescinded meanwhile; Error{io}: the host refuses (status);
    /// Error{timed_out}: the rings' memory is given up.
    io::Task<Result<void>> open(Channel& channel, Offer offer, OpenParameters parameters);
    /// Closes it; after a rescind, gives the id back too. The channel's processor uses it no more. Its memory is freed
    /// when the host has let go of it, else given up (Error{timed_out}).
    io::Task<Result<void>> close(Channel& channel);
    /// The channel's events go to another processor from here on: from version 4.1 on. Error{not_supported} before. The
    /// channel's user there takes over after this has ended.
    io::Task<Result<void>> modify(Channel& channel, u32 cpu);
    /// Waits until the host offers sub-channel `index` (>= 1) of that device. Error{timed_out}.
    io::Task<Result<Offer>> sub_channel(Guid instance, u16 index, io::Bound bound);

    /// Lets the host reach whole pages, `frames.size()` of them (1 to max_gpadl_pages), in the name of an offered
    /// channel. Ends when the host has confirmed. Error{timed_out}: it may reach them all the same: give the memory up.
    io::Task<Result<Gpadl>> create_gpadl(u32 relid, std::span<const u64> frames);
    /// The same for contiguous memory: `first_frame` and those after it.
    io::Task<Result<Gpadl>> create_gpadl(u32 relid, u64 first_frame, u32 count);
    /// Takes it back. Ok: the host has let go (or is gone). Error{timed_out}: give the memory up.
    io::Task<Result<void>> teardown_gpadl(Gpadl gpadl);

    void add(OfferListener& listener);
    void remove(OfferListener& listener);

    /// Ends the connection. Channels that are open are the host's business no more. Waits for the confirmation without
    /// the executor, by looking at the message slot: for the end of the machine, in a panic too, on any processor.
    /// Bounded by `timeout`.
    void unload(Nanoseconds timeout);

    const VmbusCounters& counters() const { return counters_; }

    // io::Service
    bool drain() override;
    void tick(Instant now) override;
    /// While an answer is awaited (a message whose interrupt gets lost costs a tick, and not the bound), or ids are to
    /// be given back.
    bool wants_tick() const override { return pending_ != nullptr || to_release_count_ != 0; }

  private:
    struct KnownOffer {
        Offer offer;
        bool open = false;      // a channel is open or being opened on it
        bool rescinded = false; // and still open: its id is given back when it is closed
        bool given = false;     // by take_new()
    };
    // A request whose answer is awaited; lives in the awaiting frame.
    struct Pending {
        MessageType answer = MessageType::invalid;
        u32 relid = 0;  // of whose rescind it dies; 0: none
        u32 handle = 0; // GPADL or open id
        HostStatus status = HostStatus::success;
        bool done = false;
        bool gone = false; // rescinded
        VersionResponse version{};
        Guid instance; // of a sub-channel that is waited for
        Offer offer;   // that came
        io::Latch latch;
        Pending* next = nullptr;
        Vmbus* bus = nullptr;

        Pending(Vmbus& owner, MessageType type, u32 channel, u32 id);
        ~Pending();
        Pending(const Pending&) = delete;
        Pending& operator=(const Pending&) = delete;
    };
    struct Frames {
        std::span<const u64> list;
        u64 first = 0;
        u32 count = 0;
        u64 at(u32 i) const { return list.empty() ? first + i : list[i]; }
    };

    /// `gone`: when it becomes true while a throttling host is waited for, the message is not sent any more.
    io::Task<Result<void>> post(std::span<const std::byte> message, io::Bound bound, const bool* gone = nullptr);
    template <class M>
    io::Task<Result<void>> send(const M& message, const io::Bound& bound) {
        return post(std::as_bytes(std::span<const M, 1>(&message, 1)), bound);
    }
    Status post_now(std::span<const std::byte> message);
    io::Task<Result<bool>> contact(Version version);
    io::Task<Result<Gpadl>> share(u32 relid, Frames frames);
    io::Task<Result<void>> open_shared(Channel& channel, Offer offer, OpenParameters parameters, DmaBuffer rings,
                                       Gpadl gpadl);
    io::Task<Result<void>> answer(Pending& pending, io::Bound bound, std::string_view what);
    Channel::Signalling signalling(const Offer& offer, bool may_defer);

    void take(const SynicMessage& message);
    void on_offer(const OfferChannel& message);
    void on_rescind(u32 relid);
    void settle(MessageType type, u32 relid, u32 handle, HostStatus status);
    void unexpected(MessageType type, std::string_view what, u64 value);
    void release_relid(u32 relid);
    KnownOffer* known(u32 relid);
    void forget(u32 relid);
    void no_longer_open(u32 relid);
    bool is_rescinded(u32 relid);
    void unlink(Channel& channel);
    u32 fresh_gpadl();
    io::Bound answering_bound() const { return {environment_->executor, environment_->timeout}; }
    io::Bound posting_bound() const {
        return {environment_->executor, std::max(environment_->timeout, posting_timeout)};
    }

    std::optional<VmbusEnvironment> environment_;
    DmaBuffer interrupt_page_; // versions 0.13 and 1.1
    DmaBuffer monitor_pages_;  // two: from the host, to the host
    Version version_ = Version::none;
    u32 connection_ = message_connection;
    bool active_ = false; // in the executor's list, messages are looked at
    bool offers_delivered_ = false;
    bool unexpected_told_ = false;
    u32 next_gpadl_ = 1;
    u32 next_open_ = 1;
    Vector<KnownOffer> offers_; // by relid
    Channel* channels_ = nullptr;
    Pending* pending_ = nullptr;
    OfferListener* listeners_ = nullptr;
    std::array<u32, 64> to_release_{}; // relids given back outside of a coroutine, posted in drain()
    u32 to_release_count_ = 0;
    u32 release_attempts_ = 0; // of the last of them
    VmbusCounters counters_;
};

} // namespace fl::hv::hyperv
