// XenStore client. The store is a tree of short texts that the toolstack, the back ends and guests read, write and
// watch. Requests and replies use one page with two byte rings [xenstore, xenstore-ring]. One request is in flight at a
// time, others queue; every wait is bounded.
export module hv.xen.store;
import core.std;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;
import io.ring;
export import hv.xen.events;
export import hv.xen.latch;

export namespace fl::hv::xen {

using StorePath = FixedText<192>;

/// "directory/key".
StorePath join(std::string_view directory, std::string_view key);

/// Notification that something below `path` may have changed. `changed` runs in the store's drain(): it may open a
/// latch but must not call the store. Several events before the owner reacts count as one. Owned by the caller, which
/// must call unwatch() before destroying it.
struct Watch {
    void (*changed)(void* context) = nullptr;
    void* context = nullptr;
    StorePath path{};
    u32 token = 0;
    Watch* next = nullptr;
    u32 registration = 0; // of the store: see watch_again()
};

/// A key and its value, for write_all().
struct StoreEntry {
    FixedText<40> key;
    FixedText<24> value;
};

class Store final : public io::Service {
  public:
    static constexpr u32 transaction_tries = 16;

    /// `page`: the mapped ring page; `port`: its event channel, bound by the toolstack. Not accessed before start().
    void install(std::byte* page, Port port);
    /// Takes over the rings at their current positions and enables events. Error{protocol}: the page is not a XenStore
    /// ring.
    Result<void> start(io::Executor& executor, Events& events);
    bool started() const { return executor_ != nullptr; }
    void set_timeout(Nanoseconds timeout) { timeout_ = timeout; }
    /// For a wait for something that requests cause. Once started.
    io::Bound bound() const { return {*executor_, timeout_}; }

    /// All functions return Error{not_found} for a missing path, Error{timed_out}, Error{protocol} if the server
    /// violated the protocol (which closes the store permanently), Error{bad_argument} for more than store_payload_max
    /// bytes, Error{exhausted} for a reply longer than `into`. A path that does not begin with '/' is relative to this
    /// domain's directory. transaction: 0, or from begin(). The texts must outlive the task.
    io::Task<Result<std::string_view>> read(std::string_view path, std::span<char> into, u32 transaction = 0);
    /// The names of the children, each terminated by a NUL.
    io::Task<Result<std::string_view>> directory(std::string_view path, std::span<char> into, u32 transaction = 0);
    io::Task<Result<void>> write(std::string_view path, std::string_view value, u32 transaction = 0);
    io::Task<Result<void>> remove(std::string_view path, u32 transaction = 0);
    /// Starts a transaction; returns its id.
    io::Task<Result<u32>> begin();
    /// True: committed. False: another client changed what was read or written; retry from begin().
    io::Task<Result<bool>> commit(u32 transaction);
    /// Adds the watch; its `changed` is called once immediately.
    io::Task<Result<void>> watch(Watch& watch);
    /// Removes the watch; `changed` is not called any more, even on an Error.
    io::Task<Result<void>> unwatch(Watch& watch);

    /// Reads a decimal number; Error{protocol}: not a number.
    io::Task<Result<u64>> number(std::string_view directory, std::string_view key);
    /// Reads an optional number: `otherwise` if it is missing, or not a number (logged as a warning).
    io::Task<Result<u64>> number_or(std::string_view directory, std::string_view key, u64 otherwise);
    /// Writes all entries below `directory`, or none; retries a bounded number of times.
    io::Task<Result<void>> write_all(std::string_view directory, std::span<const StoreEntry> entries);

    /// For a suspension: waits until no request and no transaction is under way, and keeps further requests waiting
    /// until release(). Error{timed_out}: they are not kept waiting.
    io::Task<Result<void>> hold();
    void release() { leave(); }
    /// While held, in another domain, whose store has seen nothing of this guest: the rings at their new positions.
    /// `port`: as in install().
    Result<void> restart(Port port);
    /// Afterwards, not held: adds all watches again; the `changed` of each is called once.
    io::Task<Result<void>> watch_again();

    bool drain() override;
    /// While a reply is awaited: a lost event then costs a tick, not the whole bound.
    bool wants_tick() const override { return expected_.active; }

    u64 events() const { return events_.load(std::memory_order_relaxed); }
    /// Watches that were added and not removed since.
    u32 watches() const {
        u32 count = 0;
        for (const Watch* watch = watches_; watch != nullptr; watch = watch->next) {
            ++count;
        }
        return count;
    }

  private:
    using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::Always>;
    using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::Always>;

    struct Turn;
    struct Sending;

    static void on_event(void* context);
    io::Task<Result<std::string_view>> exchange(StoreType type, u32 transaction, std::string_view path,
                                                std::string_view value, bool terminate, std::span<char> into);
    io::Task<Result<void>> command(StoreType type, u32 transaction, std::string_view path, std::string_view value,
                                   bool terminate);
    Result<void> attach_rings();
    void leave();
    void dispatch();
    void dispatch_watch();
    Error close(const Error& why);

    io::Executor* executor_ = nullptr;
    Events* channel_ = nullptr;
    std::byte* page_ = nullptr;
    Port port_ = Port::none;
    Nanoseconds timeout_ = 5'000'000'000;
    std::optional<Requests> requests_;
    std::optional<Responses> responses_;
    std::optional<Error> closed_;
    std::optional<Latch> progress_; // from start() on
    std::atomic<u64> events_{0};

    // The queue of requests.
    bool busy_ = false;
    io::ReadyList queue_;

    // The request in flight.
    u32 transactions_ = 0; // open
    u32 registration_ = 0; // counts calls of restart()
    u32 next_id_ = 1;
    u32 next_token_ = 1;
    struct Expected {
        bool active = false;
        bool done = false;
        bool wants_room = false; // the request is not completely written yet
        StoreType type = StoreType::error;
        u32 id = 0;
        u32 transaction = 0;
        std::span<char> into;
        usize length = 0;
        std::optional<Error> error;
    } expected_;

    // The message being received.
    StoreHeader header_{};
    bool in_payload_ = false;
    u32 received_ = 0;
    Watch* watches_ = nullptr;
    std::array<char, store_payload_max> payload_{};
};

} // namespace fl::hv::xen
