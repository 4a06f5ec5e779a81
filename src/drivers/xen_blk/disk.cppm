// A virtual block device once it is connected: requests into the ring, answers out of it. Knows neither XenStore nor
// the handshake.
//
// Buffers are granted where they stand, page by page, for as long as a request is under way; with persistent grants the
// data goes through pages that stay granted. A request may need several slots of the ring (parts); it ends when all of
// them have been answered.
//
// Nothing in the ring is believed: what a part is stands in parts_, an answer is copied out once and must carry a known
// id, the operation that was asked for and a known status, and there are never more answers than questions. The first
// violation closes the disk.
//
// Only what the back end has is timed [io.oldest_wait]. A request that is lost ends as timed_out; a back end that is
// silent closes the disk.
export module drivers.xen_blk.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.inflight;
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

class Disk final : public io::BlockDevice, private io::Service {
  public:
    /// Parts under way at once: the slots of four ring pages. 32 requests of 128 KiB without indirect segments need 96.
    static constexpr u32 max_parts = 128;
    /// 128 KiB in one slot. A request that is larger costs one slot more for each 128 KiB, so more would save little
    ///   and cost grants for every slot.
    static constexpr u32 max_segments = 32;
    static constexpr u32 max_indirect_pages = 64;
    static constexpr u32 max_pool_pages = 512;
    static constexpr u32 pool_chunk = max_segments; // pages that the pool begins with and grows by: any part fits
    /// Grants that are left to other disks, for their rings and for buffers without persistent grants.
    static constexpr u32 spare_grants = 64;
    static constexpr u32 spare_bytes = 256 * 1024; // likewise of memory: rings, a job's buffers
    /// Events in a row that bring no answer; then the channel stays masked until the next tick.
    static constexpr u32 max_idle_events = 64;
    /// After a batch of answers that took longer the next two are not waited for as a whole; after another one the next
    /// four, and so on.
    static constexpr Nanoseconds patience = 2'000'000;
    static constexpr u32 max_hurry = 64;

    Disk(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants);
    ~Disk();

    /// Lays out an empty ring in `ring` (whole pages, zeroed); it is shared afterwards. Once.
    Result<void> prepare(DmaSpan ring);
    /// The handler of the event channel; runs in the upcall.
    static void rang(void* self);
    /// Takes the first pages that stay granted, for a disk that shall offer persistent grants. False: there is not
    /// enough memory or there are not enough grants: it must not offer them. Before open().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool);
    /// From now on requests are taken. `pool`: what open() may allocate its pages from. `notify`: called, once, when
    /// the disk closes by itself. Terms with persistent grants need a pool that was started.
    Result<void> open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void* context),
                      void* context);
    /// Ends everything under way with `status` and takes no more. `rule`: what for, for the log.
    void shut(io::Status status, const Error& why);
    bool is_open() const { return state_ == State::open; }
    /// The other side has let go for good: the grants and pages of a disk that was shut can be used again.
    void reclaim();
    /// Grants that are held by parts nobody waits for any more.
    u32 abandoned() const { return static_cast<u32>(inflight_.size()); }

  private:
    using Requests = io::Producer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    using Responses = io::Consumer<io::MappedMemory, io::FreeRunning<u32>, io::ReachedEvent>;
    using Request = io::Request;
    using Grant = hv::xen::GrantRef;
    enum class State : u8 { closed, open, shut };

    /// One slot's worth of a request.
    struct Part {
        Request* request = nullptr; // nullptr: nobody waits any more, but the answer may still come
        Operation operation = Operation::read;
        bool indirect = false;
        u16 segments = 0;
        u16 indirect_page = 0;
        u32 offset = 0; // of its data in the request's buffer
        u32 bytes = 0;
        u64 number = 0;                         // in order of issue
        std::array<Grant, max_segments> grants; // or, with persistent grants, numbers of pool pages
    };
    struct PoolPage {
        std::byte* data = nullptr;
        Grant grant = 0;
    };

    void start(Request& request) override;
    bool cancel_now(Request& request) override;
    void forget(Request& request) override;
    void flush() override;
    bool drain() override;
    bool arm() override;
    void tick(Instant now) override;

    u32 event_after(u32 owed) const;
    void look_at_time();
    void give_up(Request& request);
    bool issue(Request& request);
    bool issue_data(Request& request);
    bool issue_command(Request& request);
    void fill_segments(Part& part, Request& request, std::span<Segment> segments, bool pooled);
    void pump();
    bool accept(const Response& response);
    void finish(Part& part, io::Status status);
    bool release(Part& part);
    bool withdraw(Part& part);
    void abandon(Request& request);
    bool keep_spare(DmaAllocator& pool);
    bool add_pool_pages(DmaAllocator& pool);
    void extend_pool(DmaAllocator& pool);
    void close_pool();
    void open_indirect(DmaAllocator& pool);
    void broken(const Error& why) { shut(io::Status::protocol_error, why); }

    hv::xen::Events& events_;
    hv::xen::Grants& grants_;
    Terms terms_;
    State state_ = State::closed;
    u32 sector_shift_ = 0; // from the disk's sectors to the wire's units
    u32 unit_shift_ = 9;   // from bytes to the wire's units
    std::optional<Requests> requests_;
    std::optional<Responses> responses_;
    io::RequestQueue waiting_;
    io::Inflight<Part, max_parts> inflight_;
    std::array<Part, max_parts> parts_{}; // by slot of inflight_
    // Written by the handler, read by the executor's turn on the same processor; relaxed: wake() and the next turn
    // order them.
    std::atomic<bool> rang_{false};
    std::atomic<bool> masked_{true};
    u32 idle_events_ = 0;
    u32 next_hurry_ = 1;
    u32 hurry_ = 0; // batches still to come that are not waited for as a whole
    Instant armed_at_ = never;
    u32 burst_ = 1;    // parts of the last request that was issued
    u64 issued_ = 0;   // parts so far
    u64 answered_ = 0; // parts so far
    io::OldestWait oldest_;
    io::OldestWait stuck_; // of requests that wait while nothing of ours is under way
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;

    std::array<DmaBuffer, max_pool_pages / pool_chunk> pool_memory_{};
    std::array<PoolPage, max_pool_pages> pool_{};
    std::array<u16, max_pool_pages> pool_free_{};
    u32 pool_size_ = 0;
    u32 pool_free_count_ = 0;

    DmaBuffer spare_memory_; // until the disk is open: what others find is left
    DmaBuffer indirect_memory_;
    std::array<Grant, max_indirect_pages> indirect_grants_{};
    std::array<u16, max_indirect_pages> indirect_free_{};
    u32 indirect_size_ = 0;
    u32 indirect_free_count_ = 0;
};

} // namespace fl::drivers::xen_blk
