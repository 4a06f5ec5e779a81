// A connected virtual block device: its ring as an io.block_queue transport, and the disk. Independent of XenStore and
// the handshake.
//
// A response must have a known id, and answer what was requested [drivers.xen_blk.answer]. The first violation closes
// the disk.
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
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.protocol;
export import drivers.xen_blk.queue;
export import drivers.xen_blk.requests;
import drivers.xen_blk.event_channel;
import drivers.xen_blk.pages;

export namespace fl::drivers::xen_blk {

class Disk;

class Transport : public io::TransportDefaults {
  public:
    using Disk = xen_blk::Disk;
    static constexpr std::string_view driver = "xen_blk";
    static constexpr u32 max_commands = Ring::max_slots;
    static constexpr u32 max_idle_events = 64;
    static constexpr Nanoseconds idle_window = io::Executor::tick_length;
    using Wire = xen_blk::Wire;
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : executor_(executor), channel_(executor, events), pages_(grants), requests_(pages_) {}

    Ring& ring() { return ring_; }
    Pages& pages() { return pages_; }
    /// See Disk::open().
    Result<void> open(const Terms& terms, DmaAllocator& pool, void (*notify)(void* context), void* context);
    /// See Disk::hold() and Disk::pause().
    void lose();
    void pause() { link_ = Link::paused; }
    void unpause() { link_ = Link::up; }
    bool is_lost() const { return link_ == Link::lost; }
    inline void on_event() { channel_.on_event(*queue); }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Error fault() const { return fault_.value_or(Error{Code::protocol, "the ring is broken"}); }
    inline Result<void> release(io::Counters&) { return ring_.end_batch(); }
    Result<bool> arm();
    inline u32 events() const { return channel_.count(); }
    bool finish(Command& command, io::Status status);
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    io::Stuck stuck(std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    inline bool wants_tick() const { return pages_.in_quarantine(); }
    bool closing(io::Status);
    void closed(bool stopped);

  private:
    enum class Link : u8 {
        up,
        paused, // no room for commands
        lost,   // nor is anything sent or taken, until open()
    };
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }

    io::Executor& executor_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Ring ring_;
    EventChannel channel_;
    io::EventPacing pacing_;
    std::optional<Error> fault_;
    Link link_ = Link::up;
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;
    Pages pages_;
    Requests requests_;
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
    static constexpr u32 max_segments = Pages::max_segments;
    static constexpr u32 spare_grants = Pages::spare_grants;
    static constexpr u32 max_idle_events = Transport::max_idle_events;

    Disk(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : QueueDisk(executor, queue_), queue_(executor, executor, events, grants) {}

    /// Lays out an empty ring in `ring` (whole pages, zeroed), to be shared afterwards. Before open(), and again before
    /// resume().
    Result<void> prepare(DmaSpan ring) { return queue_.transport().ring().lay_out(ring); }
    /// The handler of the event channel; runs in the upcall.
    static void on_event(void* self) { static_cast<Disk*>(self)->queue_.transport().on_event(); }
    /// Allocates the first persistently granted pages, for a disk that will offer persistent grants. False: not
    /// enough memory or grants: it must not offer them. Call before open().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
        return queue_.transport().pages().start_pool(domain, pool);
    }
    /// Accepts requests from now on. `pool`: allocator for open()'s pages. `notify`: called once, when the disk
    /// closes by itself. Terms with persistent grants require a successful start_pool(). Again after it was closed and
    /// reclaimed: the same device has been added again, perhaps with another geometry.
    Result<void> open(const Terms& terms, const Identity& identity, DmaAllocator& pool, void (*notify)(void* context),
                      void* context);
    /// Ends everything under way with `status` and accepts no more requests. `why`: for the log.
    void close(io::Status status, const Error& why) { queue_.close(status, why); }
    bool is_open() const { return queue_.is_open(); }
    /// As close(), because the host has removed the disk.
    void remove(const Error& why) {
        removed_.store(true, std::memory_order_relaxed);
        close(io::Status::device_gone, why);
    }
    bool removed() const override { return removed_.load(std::memory_order_relaxed); }

    /// Requests wait from now on, and the back end answers what it has, until unpause() or hold().
    void pause() { queue_.transport().pause(); }
    void unpause();
    /// The connection is lost or about to be: requests wait from now on, without a time-out, until resume() or close().
    void hold() { queue_.transport().lose(); }
    bool is_held() const { return queue_.transport().is_lost(); }
    /// The back end can no longer access anything: what it had under way waits to be sent again, and the connection's
    /// pages and grants are freed. Only while held.
    void take_back();
    /// Connected again: sends what waits. As open(). Requests that the new terms exclude end.
    Result<void> resume(const Terms& terms, const FixedText<96>& features, DmaAllocator& pool,
                        void (*notify)(void* context), void* context);
    /// The back end can no longer access anything: frees the grants and pages of a disk that was shut.
    void reclaim();
    /// Commands whose slots are still held by the back end.
    u32 abandoned() const { return queue_.in_flight(); }

  private:
    void set_terms(const Terms& terms);

    std::atomic<bool> removed_{false}; // relaxed: orders no other data
    bool opened_ = false;              // once: other lanes know the geometry
    io::BlockQueue<Transport> queue_;
};

} // namespace fl::drivers::xen_blk
