// A lane for a processor that has no queue of its own, when a device has fewer queues than the machine has processors.
// Requests go to the processor of a lane that has a queue, are submitted there, and come back, both ways by posts
// [io.executor]:
//
//   home processor      submit ──> forward ─┐                        ┌─> on_done ──> complete
//                          │ all in use     │ submit          done   │
//                       waiting list        │                        │
//   target's processor                      └─> target.submit ──> collect
//
// Sending takes no lock (only abandoning a request does, for the quarantine): the lanes that have a queue do the same
// work as without shared lanes, and requests that arrive together are published together, with one notification. The
// price is one wake-up of the target's processor per batch of requests and one of the home processor per batch of
// completions.
//
// The request of the caller and the one forwarded to the target are separate objects, each of them accessed on its own
// processor only.
export module io.shared_lane;
import core.std;
import core.result;
import core.time;
import core.dma;
import core.vector;
import io.task;
import io.executor;
import io.block;

export namespace fl::io {

class SharedLane final : public BlockDevice {
  public:
    /// Requests that the target has at once; further ones wait here, in order.
    static constexpr u32 max_forwarded = 64;

    /// A lane for the processor of `executor`. `target`: a lane that has a queue [BlockDevice::queue_lane]; it must be
    /// complete (identity, geometry) and outlive this.
    SharedLane(Executor& executor, BlockDevice& target);
    /// Requires that no request is under way and that the target has answered for every abandoned one.
    ~SharedLane();
    /// Error{exhausted}: the constructor found no coroutine frame; the lane must not be used.
    Result<void> usable() const;

    bool removed() const override { return target_.removed(); }
    BlockDevice& target() const { return target_; }

  protected:
    void start(Request& request) override;
    bool cancel_now(Request& request) override;
    void forget(Request& request) override;

  private:
    struct Proxy;
    struct Step : Post {
        Proxy* proxy = nullptr;
    };
    /// A request on its way. The submit step is answered by `done`, exactly once; each other step by its own answer.
    /// Posts run in FIFO order, so an abandoned request is forgotten before later requests are submitted.
    struct Proxy {
        SharedLane* lane = nullptr;
        // Written at home before `submit` is posted.
        Op op = Op::read;
        u64 lba = 0;
        DmaSpan buffer{};
        Nanoseconds bound = 0;
        // Accessed on the target's processor.
        std::optional<Request> forwarded;
        Proxy* next_active = nullptr;
        // Written there before `done` is posted.
        Status status = Status::not_written;
        bool buffer_lost = false;
        // Accessed at home.
        Request* origin = nullptr; // nullptr: free, or abandoned
        Proxy* next_free = nullptr;
        u32 unanswered = 0; // steps at the target
        bool cancelling = false;
        bool quarantined = false;

        Step submit, cancel, forget;     // to the target
        Step done, cancelled, forgotten; // back
    };
    /// The waiter of all forwarded requests: resumed when at least one has ended.
    struct Collector {
        struct promise_type : PoolAllocated {
            Collector get_return_object() noexcept {
                return {std::coroutine_handle<promise_type>::from_promise(*this)};
            }
            static Collector get_return_object_on_allocation_failure() noexcept { return {}; }
            std::suspend_never initial_suspend() const noexcept { return {}; }
            std::suspend_always final_suspend() const noexcept { return {}; }
            void return_void() const noexcept {}
            void unhandled_exception() const noexcept {}
        };
        std::coroutine_handle<> handle{};
    };
    /// Ends what the target still has when its executor stops serving.
    struct Eviction : RemoteTask {
        SharedLane* lane = nullptr;
    };

    static Collector collect_for(SharedLane& lane);

    // At home.
    void forward(Request& request);
    bool send(Proxy& proxy, Step& step);
    void answered(Proxy& proxy);
    Proxy* find(const Request& request);
    static void on_done(Post& post);
    static void on_answer(Post& post);
    // On the target's processor.
    static void on_submit(Post& post);
    static void on_cancel(Post& post);
    static void on_forget(Post& post);
    void collect();
    void evict();
    void end(Proxy& proxy, Status status, bool buffer_lost);
    void answer(Step& step);

    BlockDevice& target_;
    Collector collector_;
    Eviction eviction_;
    Proxy* active_ = nullptr; // on the target's processor: have a forwarded request
    RequestQueue waiting_;
    Proxy* free_ = nullptr;
    std::array<Proxy, max_forwarded> proxies_{};
};

/// Owns the shared lanes of a disk.
class SharedLanes {
  public:
    /// Each lane keeps a coroutine frame for as long as the disk is used. No more than a quarter of the pool goes to
    /// such frames, so that requests and jobs find the rest.
    static constexpr usize max_frames = FramePool::arena_bytes / FramePool::classes[0] / 4;

    SharedLanes() = default;
    SharedLanes(const SharedLanes&) = delete;
    SharedLanes& operator=(const SharedLanes&) = delete;
    ~SharedLanes();
    /// Adds a lane to `disk` for each of `executors` that none of its queues runs on; the queues take turns as targets.
    /// Called once, before the disk is announced; this must live as long as the disk is used. Error{exhausted}: no
    /// memory or frames for all of them; those added work.
    Result<void> add_to(BlockDevice& disk, std::span<Executor* const> executors);

  private:
    Vector<BlockDevice*> lanes_; // each a SharedLane
};

} // namespace fl::io
