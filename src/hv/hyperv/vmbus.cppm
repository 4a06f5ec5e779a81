// The VMBus: the connection to the host, the channels that it offers, and the memory shared with it. Everything here
// runs on processor 0's executor; a channel that belongs to another processor is opened here and then used there. Every
// wait is bounded, and every response is matched to its request by ids; unmatched responses are counted and logged
// once.
//
// Call order: install → connect → request_offers → (open → use of the channel → close)… → unload. An offer may be
// rescinded at any time: a pending request for it then returns Error{device_gone}, and an open channel is marked and
// its owner notified.
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

/// What the bus needs. All objects outlive it.
struct VmbusEnvironment {
    Hypercalls& hypercalls;
    Synic& synic;
    DmaAllocator& memory;
    io::Executor& executor; // processor 0's
    Nanoseconds timeout;    // bound of the wait for one response, in ns
};

/// Guest memory that the host may access until teardown_gpadl().
struct Gpadl {
    u32 relid = 0;
    u32 handle = 0; // never 0
};

/// Receives offers that arrive after request_offers() has ended (hot add). Owned by the caller, which must remove it.
struct OfferListener {
    Guid type; // null: any
    /// Called on processor 0's executor, in drain(): spawn a task or open a latch. Primary channels only.
    void (*offered)(void* context, const Offer& offer) = nullptr;
    /// The same for an offer, of any type, for which there was no room; nullptr: none.
    void (*dropped)(void* context) = nullptr;
    void* context = nullptr;
    OfferListener* next = nullptr;
};

/// Maintained by the bus, never reset.
struct VmbusCounters {
    u64 messages = 0;   // received
    u64 posted = 0;     // sent
    u64 retries = 0;    // posts rejected because the hypervisor had no buffer
    u64 unexpected = 0; // malformed, or without a matching request
    u64 offers = 0;
    u64 offers_dropped = 0; // no room for them
    u64 rescinds = 0;
};

class Vmbus final : public io::Service {
  public:
    /// Maximum number of offers held, sub-channels included; further ones are released and counted.
    static constexpr usize max_offers = 1024;
    /// Bound of the wait for a response to the first contact, in ns, unless timeout is shorter: a host without a VMBus
    /// must not delay the boot.
    static constexpr Nanoseconds contact_timeout = 1'000'000'000;
    /// Minimum time, in ns, for which posting a message is retried while the hypervisor has no room: hosts throttle
    /// guests for seconds.
    static constexpr Nanoseconds posting_timeout = 10'000'000'000;

    struct OpenParameters {
        // packet bytes per direction: a multiple of the page size, excluding the header page
        u32 send_bytes = 64 * 1024;
        u32 receive_bytes = 64 * 1024;
        u32 cpu = 0;                               // the processor that receives the events; must have joined
        std::span<const std::byte> user_data = {}; // at most 120 bytes, passed to the device
        bool may_defer = true;                     // signal through the monitor page if offered
    };

    Vmbus() = default;

    /// Call once. Allocates the pages that old versions and monitors need. Error{exhausted}: no memory.
    Result<void> install(const VmbusEnvironment& environment);

    /// Negotiates the version, newest first. Error{not_found}: no host answers, or every connection is refused;
    /// Error{not_supported}: every version is refused. On an error nothing stays set up.
    io::Task<Result<void>> connect();
    bool connected() const { return version_ != Version::none; }
    Version version() const { return version_; }
    /// After connect(): requests the offers and ends when the host has delivered all present ones.
    io::Task<Result<void>> request_offers();

    /// Calls f(const Offer&) for each present offer, by ascending relid. f must not suspend.
    template <class F>
    void for_each_offer(F&& f) const {
        for (const KnownOffer& known_offer : offers_) {
            f(known_offer.offer);
        }
    }
    /// The offer with this id (SyntheticDevice::number), if it is still present.
    std::optional<Offer> find(u32 relid) const;
    /// Returns each offer once, primary channels only. One that is rescinded before is not returned; one that is
    /// offered again counts as new.
    std::optional<Offer> take_new();

    /// Opens an offered channel: allocates the rings, shares them and asks the host. `channel` must be closed, must not
    /// move, and must live until close() has ended. Error{device_gone}: rescinded meanwhile; Error{io}: the host
    /// refuses (status); Error{timed_out}: the memory of the rings is given up.
    io::Task<Result<void>> open(Channel& channel, Offer offer, OpenParameters parameters);
    /// Closes a channel; after a rescind, also releases its id. The channel's processor must no longer use it. Its
    /// memory is freed when the host has released it, otherwise given up (Error{timed_out}).
    io::Task<Result<void>> close(Channel& channel);
    /// Moves the channel's events to another processor; requires version 4.1 or later, otherwise Error{not_supported}.
    /// The channel may be used there once this has ended.
    io::Task<Result<void>> modify(Channel& channel, u32 cpu);
    /// Waits until the host offers sub-channel `index` (>= 1) of the device. Error{timed_out}.
    io::Task<Result<Offer>> sub_channel(Guid instance, u16 index, io::Bound bound);

    /// Shares `frames.size()` whole pages (1 to max_gpadl_pages) with the host, on behalf of an offered channel. Ends
    /// when the host has confirmed. Error{timed_out}: the host may access them nevertheless: give the memory up.
    io::Task<Result<Gpadl>> create_gpadl(u32 relid, std::span<const u64> frames);
    /// The same for contiguous memory, starting at page number `first_frame`.
    io::Task<Result<Gpadl>> create_gpadl(u32 relid, u64 first_frame, u32 count);
    /// Stops sharing. Success: the host no longer accesses the memory (or the channel is gone). Error{timed_out}: give
    /// the memory up.
    io::Task<Result<void>> teardown_gpadl(Gpadl gpadl);

    /// Adds or removes a listener. On processor 0.
    void add(OfferListener& listener);
    void remove(OfferListener& listener);

    /// Ends the connection, including open channels. Waits for the confirmation without the executor, by polling the
    /// message slot: for the end of the machine, even in a panic, on any processor. Bounded by `timeout` (ns).
    void unload(Nanoseconds timeout);

    const VmbusCounters& counters() const { return counters_; }

    // io::Service
    bool drain() override;
    void tick(Instant now) override;
    /// While a response is awaited (a lost interrupt then costs a tick, not the whole bound), or ids have to be
    /// released.
    bool wants_tick() const override { return pending_ != nullptr || to_release_count_ != 0; }

  private:
    struct KnownOffer {
        Offer offer;
        bool open = false;      // a channel is open or being opened on it
        bool rescinded = false; // its id is released when the channel is closed
        bool given = false;     // returned by take_new()
    };
    // A request that waits for its response; lives in the awaiting frame.
    struct Pending {
        MessageType answer = MessageType::invalid;
        u32 relid = 0;  // the request fails when this relid is rescinded; 0: none
        u32 handle = 0; // GPADL or open id
        HostStatus status = HostStatus::success;
        bool done = false;
        bool gone = false; // rescinded
        VersionResponse version{};
        Guid instance; // device whose sub-channel is awaited
        Offer offer;   // the sub-channel that was offered
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

    /// `gone`: if it becomes true while a throttling host is waited for, the message is dropped.
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
    void channel_closed(u32 relid);
    bool is_rescinded(u32 relid);
    void unlink(Channel& channel);
    u32 new_gpadl();
    io::Bound answering_bound() const { return {environment_->executor, environment_->timeout}; }
    io::Bound posting_bound() const {
        return {environment_->executor, std::max(environment_->timeout, posting_timeout)};
    }

    std::optional<VmbusEnvironment> environment_;
    DmaBuffer interrupt_page_; // versions 0.13 and 1.1
    DmaBuffer monitor_pages_;  // two pages: from the host, to the host
    Version version_ = Version::none;
    u32 connection_ = message_connection;
    bool active_ = false; // in the executor's list; messages are processed
    bool offers_delivered_ = false;
    bool unexpected_logged_ = false;
    u32 next_gpadl_ = 1;
    u32 next_open_ = 1;
    Vector<KnownOffer> offers_; // sorted by relid
    Channel* channels_ = nullptr;
    Pending* pending_ = nullptr;
    OfferListener* listeners_ = nullptr;
    std::array<u32, 64> to_release_{}; // ids to release, recorded outside coroutines, posted in drain()
    u32 to_release_count_ = 0;
    u32 release_attempts_ = 0; // posts attempted for the last of them
    VmbusCounters counters_;
};

} // namespace fl::hv::hyperv
