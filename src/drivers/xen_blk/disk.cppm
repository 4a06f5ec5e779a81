// A virtual block device once it is connected: commands into the ring, answers out of it. Knows neither XenStore nor
// the handshake. The life of a request is io.block_queue's; this is its transport.
//
// Buffers are granted in place, page by page, for as long as a command is under way; with persistent grants the data
// goes through pages that stay granted.
//
// Nothing in the ring is trusted: what a command is is kept outside of it, an answer is copied out once and must carry
// a known id, the operation that was asked for and a known status, and there are never more answers than requests. The
// first violation closes the disk.
export module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.dma_mapper;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import io.ring;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.protocol;

export namespace fl::drivers::xen_blk {

/// What was agreed with the back end.
struct Terms {
    hv::xen::Domain domain = 0;
    hv::xen::Port port = hv::xen::Port::none;
    u16 handle = 0;
    std::optional<Operation> flush; // flush, or write_barrier where only that is offered
    bool discard = false;
    bool persistent = false;
    u32 indirect_segments = 0; // of one request; 0: none
    u32 ring_pages = 1;
    u32 wire_unit = wire_sector; // bytes that sector numbers in the ring count: 512, or the disk's sector size
    io::Geometry geometry;
};

class Disk;

/// The ring and the grants [xen-blkif].
class Transport : public io::TransportDefaults {
  public:
    using Disk = xen_blk::Disk;
    using Grant = hv::xen::GrantRef;
    static constexpr std::string_view driver = "xen_blk";
    /// The slots of four ring pages. 32 requests of 128 KiB without indirect segments need 96.
    static constexpr u32 max_commands = 128;
    static constexpr u32 max_idle_events = 64;
    static constexpr Nanoseconds idle_window = io::Executor::tick_length;
    /// 128 KiB in one slot. A request that is larger costs one slot more for each 128 KiB, so more would save little
    /// and cost grants for every slot.
    static constexpr u32 max_segments = 32;
    static constexpr u32 max_indirect_pages = 64;
    static constexpr u32 max_pool_pages = 512;
    static constexpr u32 pool_chunk = max_segments; // pages that the pool begins with and grows by: any command fits
    /// Grants that are left to other disks, for their rings and for buffers without persistent grants.
    static constexpr u32 spare_grants = 64;
    static constexpr u32 spare_bytes = 256 * 1024; // likewise of memory: rings, a job's buffers
    /// After a batch of answers that took longer the next two are not waited for as a whole; after another one the next
    /// four, and so on.
    static constexpr Nanoseconds patience = 2'000'000;
    static constexpr u32 max_eager = 64;

    struct Wire {
        Operation operation = Operation::read;
        bool indirect = false;
        u16 segments = 0;
        u16 indirect_page = 0;
        std::array<Grant, max_segments> grants; // or, with persistent grants, numbers of pool pages
    };
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : executor_(executor), events_(events), grants_(grants) {}
    ~Transport();

    Result<void> lay_out(DmaSpan ring);
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool);
    Result<void> open(const Terms& terms, DmaAllocator& pool, void (*notify)(void* context), void* context);
    void on_event();
    /// The other side has let go for good: grants and pages can be used again.
    void reclaim();

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
    bool wants_tick() const { return grants_.in_quarantine() != 0; }
    bool closing(io::Status);
    void closed(bool stopped);

  private:
    using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    u32 event_after(u32 owed) const;
    void fill_segments(Command& command, std::span<Segment> segments);
    io::Next check(const Response& response, io::Completion& completion);
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    bool keep_spare(DmaAllocator& pool);
    bool add_pool_pages(DmaAllocator& pool);
    void extend_pool(DmaAllocator& pool);
    void close_pool();
    void open_indirect(DmaAllocator& pool);

    io::Executor& executor_;
    hv::xen::Events& events_;
    hv::xen::Grants& grants_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Terms terms_;
    u32 sector_shift_ = 0; // from the disk's sectors to the wire's units
    u32 unit_shift_ = 9;   // from bytes to the wire's units
    std::optional<Requests> requests_;
    std::optional<Responses> responses_;
    bool in_batch_ = false; // answers are being taken
    u32 batch_left_ = 0;    // of them, not taken yet
    u32 batch_ = 0;         // in all
    std::optional<Error> fault_;
    // Written by the handler, read by the executor's turn on the same processor; relaxed: raise() and the next turn
    // order them.
    std::atomic<bool> masked_{true};
    std::atomic<u32> interrupts_{0};
    u32 next_eager_ = 1;
    u32 eager_ = 0; // batches still to come that are not waited for as a whole
    Instant armed_at_ = never;
    u32 burst_ = 1; // commands of the last request
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;

    BouncePool<max_pool_pages, pool_chunk> pool_;
    std::array<Grant, max_pool_pages> pool_grants_{}; // by the pool's numbers of pages

    DmaBuffer spare_memory_; // until the disk is open: what others find is left
    DmaBuffer indirect_memory_;
    std::array<Grant, max_indirect_pages> indirect_grants_{};
    std::array<u16, max_indirect_pages> indirect_free_{};
    u32 indirect_size_ = 0;
    u32 indirect_free_count_ = 0;
};

} // namespace fl::drivers::xen_blk

// Compiled once, in disk.cpp, which is optimised for speed.
namespace fl {
extern template class io::BlockQueue<drivers::xen_blk::Transport>;
extern template class io::QueueDisk<drivers::xen_blk::Transport>;
} // namespace fl

export namespace fl::drivers::xen_blk {

class Disk final : public io::QueueDisk<Transport> {
  public:
    static constexpr u32 max_parts = Transport::max_commands;
    static constexpr u32 max_segments = Transport::max_segments;
    static constexpr u32 spare_grants = Transport::spare_grants;
    static constexpr u32 max_idle_events = Transport::max_idle_events;

    Disk(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : QueueDisk(executor, queue_), queue_(executor, executor, events, grants) {}

    /// Lays out an empty ring in `ring` (whole pages, zeroed); it is shared afterwards. Once.
    Result<void> prepare(DmaSpan ring) { return queue_.transport().lay_out(ring); }
    /// The handler of the event channel; runs in the upcall.
    static void on_event(void* self) { static_cast<Disk*>(self)->queue_.transport().on_event(); }
    /// Takes the first pages that stay granted, for a disk that shall offer persistent grants. False: there is not
    /// enough memory or there are not enough grants: it must not offer them. Before open().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool) { return queue_.transport().start_pool(domain, pool); }
    /// From now on requests are taken. `pool`: what open() may allocate its pages from. `notify`: called, once, when
    /// the disk closes by itself. Terms with persistent grants need a pool that was started.
    Result<void> open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void* context),
                      void* context);
    /// Ends everything under way with `status` and takes no more. `why`: for the log.
    void shut(io::Status status, const Error& why) { queue_.close(status, why); }
    bool is_open() const { return queue_.is_open(); }
    /// The other side has let go for good: the grants and pages of a disk that was shut can be used again.
    void reclaim();
    /// Commands whose slots the back end still holds.
    u32 abandoned() const { return queue_.under_way(); }

  private:
    io::BlockQueue<Transport> queue_;
};

} // namespace fl::drivers::xen_blk
