// What a queue of a disk goes through from one connection to the next: opened, paused, held while the back end is away,
// taken back, connected again, closed and reclaimed. Nothing here is on the way of a request. Independent of XenStore
// and the handshake.
//
//                          ┌─ pause ⇄ unpause
//   prepare ─> set_up ─> start ─> hold ─> take_back ─> reclaim ─> prepare ─> set_up ─> start …
//                          └────> closed ─> stop ───────^
export module drivers.xen_blk.lane;
import core.std;
import core.result;
import core.text;
import core.dma;
import io.executor;
import io.block;
import io.task;
import hv.xen.events;
import hv.xen.grants;
export import drivers.xen_blk.connection;
export import drivers.xen_blk.disk;
import drivers.xen_blk.pages;

export namespace fl::drivers::xen_blk {

/// Tasks are for the queue's processor [io.run_on], everything else is for processor 0: it finds the queue closed or
/// held where that is said, so the two never use the same thing at once. Only the first lane is on processor 0 itself.
class Lane {
  public:
    static constexpr u32 max_segments = Pages::max_segments;
    static constexpr u32 max_idle_events = Transport::max_idle_events;

    /// `executor`: of the queue's processor. `group`: what the queues of the disk share; outlives this. `first`: of
    /// these queues, on processor 0.
    Lane(io::Executor& executor, io::QueueGroup& group, hv::xen::Events& events, hv::xen::Grants& grants,
         bool first = true)
        : events_(events), connection_(events, grants), queue_(executor, group, executor, group, events, grants, first),
          disk_(queue_) {}

    Disk& disk() { return disk_; }
    const Disk& disk() const { return disk_; }
    Connection& connection() { return connection_; }
    const Connection& connection() const { return connection_; }
    io::Executor& executor() const { return queue_.executor(); }

    /// Allocates what the queue shares with the back end, a ring of 2^order pages or fewer. `persistent`: also the
    /// first persistently granted pages, for a disk that will offer persistent grants, unless there are not enough
    /// memory or grants; see has_pool(). While it is closed or held.
    Result<void> prepare(u32 order, bool persistent, hv::xen::Domain domain, DmaAllocator& dma);
    bool has_pool() const { return has_pool_; }
    /// The terms of the connection, before start(). `dma`: allocator for the pages. `notify`: called once, on the
    /// queue's processor, when the queue closes by itself or with another one. Terms with persistent grants require
    /// has_pool(). While it is closed or held.
    Result<void> set_up(const Terms& terms, DmaAllocator& dma, void (*notify)(void* context), void* context);
    /// Events come to the queue's processor, once start() has let them. Between prepare() and start(), which unmasks.
    Result<void> listen();
    /// Accepts requests from now on, or sends what has waited since hold(), less what the terms exclude.
    /// Error{device_gone}: another queue has closed the disk meanwhile.
    io::Task<Result<void>> start();

    /// On processor 0 for the first lane only.
    bool is_open() const { return queue_.is_open(); }
    /// Callable on any processor: the queue has ended everything, or was never started.
    bool has_ended() const { return queue_.quiescent(); }
    /// Commands whose slots are held by the back end; commands() on the queue's processor.
    u32 commands() const { return queue_.in_flight(); }
    io::Task<Result<u32>> in_flight();

    /// Requests wait from now on, and the back end answers what it has, until unpause() or hold().
    io::Task<Result<void>> pause();
    io::Task<Result<void>> unpause();
    /// The connection is lost or about to be: requests wait from now on, without a time-out, until start() or the end.
    io::Task<Result<void>> hold();
    /// The same while the queue's processor does nothing, on any one.
    void lose() { queue_.transport().lose(); }
    bool is_held() const { return queue_.transport().is_lost(); }
    /// The back end can no longer access anything: what it had under way waits to be sent again. Only while held;
    /// reclaim() follows.
    io::Task<Result<void>> take_back();

    /// The first lane: ends everything under way with `status` and accepts no more requests; the other queues of the
    /// disk follow. `why`: for the log.
    void close(io::Status status, const Error& why) { queue_.close(status, why); }
    /// After it has ended: its processor does not visit it any more.
    io::Task<Result<void>> stop();
    /// The back end can no longer access anything: frees what it had access to. Of a queue that has ended, or was taken
    /// back.
    void reclaim();

    /// The handler of the event channel; runs in the upcall.
    static void on_event(void* self) { static_cast<Lane*>(self)->queue_.transport().on_event(); }

  private:
    hv::xen::Events& events_;
    bool has_pool_ = false;
    bool linked_ = false; // the queue knows the disk
    Connection connection_;
    Terms terms_;
    void (*notify_)(void*) = nullptr;
    void* notify_context_ = nullptr;
    Queue queue_;
    Disk disk_;
};

} // namespace fl::drivers::xen_blk
