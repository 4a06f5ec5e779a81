// A connected virtual block device: requests to the ring, responses from it. Independent of XenStore and the
// handshake. The life cycle of a request is in io.block_queue; this is its transport. The pages that the back end may
// access are in drivers.xen_blk.pages.
//
// The ring is not trusted: command state is kept outside of it; a response is copied out once and must have a known
// id, the requested operation and a known status, and there are never more responses than requests. The first
// violation closes the disk.
export module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.event_pacing;
import io.oldest_wait;
import io.ring;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.protocol;
import drivers.xen_blk.pages;

export namespace fl::drivers::xen_blk {

/// Terms negotiated with the back end.
struct Terms : PageTerms {
    hv::xen::Port port = hv::xen::Port::none;
    u16 handle = 0;
    std::optional<Operation> flush; // flush, or write_barrier if only that is offered
    bool discard = false;
    u32 ring_pages = 1;
    io::Geometry geometry;
};

class Disk;

/// The ring [xen-blkif].
class Transport : public io::TransportDefaults {
  public:
    using Disk = xen_blk::Disk;
    static constexpr std::string_view driver = "xen_blk";
    /// The slots of four ring pages. 32 requests of 128 KiB without indirect segments need 96.
    static constexpr u32 max_commands = 128;
    static constexpr u32 max_idle_events = 64;
    static constexpr Nanoseconds idle_window = io::Executor::tick_length;

    struct Wire {
        Operation operation = Operation::read;
        CommandPages pages;
    };
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : executor_(executor), events_(events), pages_(grants) {}

    Pages& pages() { return pages_; }
    /// See Disk::prepare() and open().
    Result<void> lay_out(DmaSpan ring);
    Result<void> open(const Terms& terms, DmaAllocator& pool, void (*notify)(void* context), void* context);
    void on_event();

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Error fault() const { return fault_.value_or(Error{Code::protocol, "the ring is broken"}); }
    Result<void> release(io::Counters& counters);
    Result<bool> arm();
    inline u32 events() const { return interrupts_.load(std::memory_order_relaxed); }
    bool finish(Command& command, io::Status status);
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    io::Stuck stuck(std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return pages_.in_quarantine(); }
    bool closing(io::Status);
    void closed(bool stopped);

  private:
    using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    io::Next check(const Response& response, io::Completion& completion);
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }

    io::Executor& executor_;
    hv::xen::Events& events_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Terms terms_;
    u32 sector_shift_ = 0; // from the disk's sectors to the wire's units
    u32 unit_shift_ = 9;   // from bytes to the wire's units
    std::optional<Requests> requests_;
    std::optional<Responses> responses_;
    bool in_batch_ = false; // responses are being taken
    u32 batch_left_ = 0;    // responses of the batch not taken yet
    u32 batch_ = 0;         // size of the batch
    std::optional<Error> fault_;
    // Written by the handler, read by the executor's turn on the same processor; relaxed: ordered by raise() and the
    // next turn.
    std::atomic<bool> masked_{true};
    std::atomic<u32> interrupts_{0};
    io::EventPacing pacing_;
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;

    Pages pages_;
};

} // namespace fl::drivers::xen_blk

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::xen_blk::Transport>;
extern template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl

export namespace fl::drivers::xen_blk {

class Disk final : public io::QueueDisk<Transport> {
  public:
    static constexpr u32 max_parts = Transport::max_commands;
    static constexpr u32 max_segments = Pages::max_segments;
    static constexpr u32 spare_grants = Pages::spare_grants;
    static constexpr u32 max_idle_events = Transport::max_idle_events;

    Disk(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : QueueDisk(executor, queue_), queue_(executor, executor, events, grants) {}

    /// Lays out an empty ring in `ring` (whole pages, zeroed), to be shared afterwards. Call once.
    Result<void> prepare(DmaSpan ring) { return queue_.transport().lay_out(ring); }
    /// The handler of the event channel; runs in the upcall.
    static void on_event(void* self) { static_cast<Disk*>(self)->queue_.transport().on_event(); }
    /// Allocates the first persistently granted pages, for a disk that will offer persistent grants. False: not
    /// enough memory or grants: it must not offer them. Call before open().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
        return queue_.transport().pages().start_pool(domain, pool);
    }
    /// Accepts requests from now on. `pool`: allocator for open()'s pages. `notify`: called once, when the disk
    /// closes by itself. Terms with persistent grants require a successful start_pool().
    Result<void> open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void* context),
                      void* context);
    /// Ends everything under way with `status` and accepts no more requests. `why`: for the log.
    void close(io::Status status, const Error& why) { queue_.close(status, why); }
    bool is_open() const { return queue_.is_open(); }
    /// The back end can no longer access anything: frees the grants and pages of a disk that was shut.
    void reclaim();
    /// Commands whose slots are still held by the back end.
    u32 abandoned() const { return queue_.in_flight(); }

  private:
    io::BlockQueue<Transport> queue_;
};

} // namespace fl::drivers::xen_blk
