// What a disk and its queue go through from one connection to the next: opened, paused, held while the back end is
// away, taken back, resumed, closed and reclaimed. Nothing here is on the way of a request. Independent of XenStore and
// the handshake.
//
//               ┌──────────────── pause ⇄ unpause
//   prepare ─> open ──> hold ──> take_back ──> prepare ──> resume ─┐
//               │  ^──────────────────────────────────────────────┘
//               └────> close ──> reclaim ──> prepare ──> open
export module drivers.xen_blk.lane;
import core.std;
import core.result;
import core.text;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.disk;
import drivers.xen_blk.pages;

export namespace fl::drivers::xen_blk {

/// On the processor of its queue.
class Lane {
  public:
    static constexpr u32 max_segments = Pages::max_segments;
    static constexpr u32 spare_grants = Pages::spare_grants;
    static constexpr u32 max_idle_events = Transport::max_idle_events;

    Lane(io::Executor& executor, hv::xen::Events& events, hv::xen::Grants& grants)
        : queue_(executor, executor, events, grants), disk_(executor, queue_) {}

    Disk& disk() { return disk_; }
    const Disk& disk() const { return disk_; }

    /// Lays out an empty ring in `ring` (whole pages, zeroed), to be shared afterwards. Before open(), and again before
    /// resume().
    Result<void> prepare(DmaSpan ring) { return queue_.transport().ring().lay_out(ring); }
    /// Allocates the first persistently granted pages, for a disk that will offer persistent grants. False: not
    /// enough memory or grants: it must not offer them. Call before open() and resume().
    bool start_pool(hv::xen::Domain domain, DmaAllocator& pool) {
        return queue_.transport().pages().start_pool(domain, pool);
    }
    /// Accepts requests from now on. `pool`: allocator for open()'s pages. `notify`: called once, when the queue
    /// closes by itself. Terms with persistent grants require a successful start_pool(). Again after it was closed and
    /// reclaimed: the same device has been added again, perhaps with another geometry.
    Result<void> open(const Terms& terms, const io::BlockDevice::Identity& identity, DmaAllocator& pool,
                      void (*notify)(void* context), void* context);
    bool is_open() const { return queue_.is_open(); }
    /// The handler of the event channel; runs in the upcall.
    static void on_event(void* self) { static_cast<Lane*>(self)->queue_.transport().on_event(); }
    /// Commands whose slots are held by the back end.
    u32 in_flight() const { return queue_.in_flight(); }

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

    /// Ends everything under way with `status` and accepts no more requests. `why`: for the log.
    void close(io::Status status, const Error& why) { queue_.close(status, why); }
    /// As close(), because the host has removed the disk.
    void remove(const Error& why) {
        disk_.set_removed(true);
        close(io::Status::device_gone, why);
    }
    /// The back end can no longer access anything: frees the grants and pages of a queue that was closed.
    void reclaim();

  private:
    io::BlockQueue<Transport> queue_;
    Disk disk_;
    bool known_ = false; // the queue knows the disk
};

} // namespace fl::drivers::xen_blk
