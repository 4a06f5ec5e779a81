// XenStore's client: a tree of small texts that the toolstack, the back ends and we read, write and watch. Requests and
// answers travel through one page of two byte rings [xenstore, xenstore-ring]. One request at a time is under way, the
// others queue; every wait has a bound.
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

/// Somebody who wants to know that something below a path may have changed. `changed` runs in the store's drain(): it
/// may open a latch, and must not call the store. Events that come before the owner looks are one event. Owned by
/// whoever asks; unwatch before it dies.
struct Watch {
    void (*changed)(void* context) = nullptr;
    void* context = nullptr;
    StorePath path{};
    u32 token = 0;
    Watch* next = nullptr;
};

struct StoreEntry {
    FixedText<40> key;
    FixedText<24> value;
};

class Store final : public io::Service {
  public:
    static constexpr u32 transaction_tries = 16;

    /// `page`: the mapped ring page; `port`: its event channel, bound by the toolstack. Nothing is touched before
    /// start().
    void install(std::byte* page, Port port);
    /// Takes over the rings where a loader has left them and listens. Error{protocol}: the page is not a store's.
    Result<void> start(io::Executor& executor, Events& events);
    bool started() const { return executor_ != nullptr; }
    void set_timeout(Nanoseconds timeout) { timeout_ = timeout; }

    /// Each: Error{not_found} for a path that is not there, Error{timed_out}, Error{protocol} when the server broke a
    /// rule (the store is closed then for good), Error{bad_argument} for more than store_payload_max, Error{exhausted}
    /// for an answer that is longer than `into`. A path that does not begin with '/' is below our own domain's.
    /// transaction: 0, or what begin() gave. The texts must outlive the task.
    io::Task<Result<std::string_view>> read(std::string_view path, std::span<char> into, u32 transaction = 0);
    /// The children's names, each with a NUL behind it.
    io::Task<Result<std::string_view>> directory(std::string_view path, std::span<char> into, u32 transaction = 0);
    io::Task<Result<void>> write(std::string_view path, std::string_view value, u32 transaction = 0);
    io::Task<Result<void>> remove(std::string_view path, u32 transaction = 0);
    io::Task<Result<u32>> begin();
    /// True: done. False: somebody else changed what was read or written; begin again.
    io::Task<Result<bool>> commit(u32 transaction);
    /// Adds the watch; its `changed` is called once at once.
    io::Task<Result<void>> watch(Watch& watch);
    io::Task<Result<void>> unwatch(Watch& watch);

    /// A decimal number; Error{protocol}: it is none.
    io::Task<Result<u64>> number(std::string_view directory, std::string_view key);
    /// A number that need not be there: `otherwise` if it is missing, or is none (with a warning).
    io::Task<Result<u64>> number_or(std::string_view directory, std::string_view key, u64 otherwise);
    /// All entries or none, below `directory`; a bounded number of tries.
    io::Task<Result<void>> write_all(std::string_view directory, std::span<const StoreEntry> entries);

    bool drain() override;
    /// While an answer is awaited: an event that gets lost costs a tick, and not the bound.
    bool wants_tick() const override { return expected_.active; }

    u64 events() const { return events_.load(std::memory_order_relaxed); }

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

    // Whose turn it is.
    bool busy_ = false;
    io::ReadyList queue_;

    // The request under way.
    u32 next_id_ = 1;
    u32 next_token_ = 1;
    struct Expected {
        bool active = false;
        bool done = false;
        bool wants_room = false; // the request is not written whole yet
        StoreType type = StoreType::error;
        u32 id = 0;
        u32 transaction = 0;
        std::span<char> into;
        usize length = 0;
        std::optional<Error> error;
    } expected_;

    // The message that is coming in.
    StoreHeader header_{};
    bool in_payload_ = false;
    u32 received_ = 0;
    Watch* watches_ = nullptr;
    std::array<char, store_payload_max> payload_{};
};

} // namespace fl::hv::xen
