// The queues of one device, each on a processor of its own. What one of them finds holds for all: a violation of the
// protocol or a dead device closes every queue, an abandoned write stops the writes of every queue, and an answer on
// any queue shows that the device is alive.
export module io.queue_group;
import core.std;
import core.result;
import core.time;
import io.block;
import io.block_queue;
import io.executor;
import io.oldest_wait;
import io.task;

export namespace fl::io {

/// State that the queues of one device share. Owned by its driver; outlives the queues. Members may be called on any
/// processor, except where they say otherwise.
class QueueGroup {
  public:
    static constexpr u32 max_queues = 65; // NVMe: the admin queue, and one for each processor

    QueueGroup() = default;
    QueueGroup(const QueueGroup&) = delete;
    QueueGroup& operator=(const QueueGroup&) = delete;

    /// The status of requests still under way, once one of the queues or the driver has closed the device.
    inline std::optional<Status> closed() const {
        if (!closed_.load(std::memory_order_acquire)) [[likely]] { // pairs with the release in close()
            return std::nullopt;
        }
        return static_cast<Status>(close_status_.load(std::memory_order_relaxed)); // ordered by the line above
    }
    /// A queue closes: all others follow in their next turn, which this causes. False: another queue was first, and has
    /// logged the reason.
    bool close_first(Status status) {
        // Relaxed: it only selects the queue that reports; another one may find an error at the same time.
        if (reported_.exchange(true, std::memory_order_relaxed)) {
            return false;
        }
        close(status);
        return true;
    }
    /// The driver closes the device: the queues end their requests in their next turn.
    void close(Status status) {
        close_status_.store(to_underlying(status), std::memory_order_relaxed); // ordered by the next line
        closed_.store(true, std::memory_order_release);                        // pairs with the acquire in closed()
        raise_queues();
    }

    /// The device is there again, or another one in its place: the queues may be opened once more. All are quiescent.
    void reopen() {
        removed_.store(false, std::memory_order_relaxed);
        reported_.store(false, std::memory_order_relaxed);
        closed_.store(false, std::memory_order_release); // pairs with the acquire in closed()
    }

    /// The device is gone: its disks refuse further requests. Does not close the queues. Relaxed: orders no other data.
    void set_removed() { removed_.store(true, std::memory_order_relaxed); }
    inline bool removed() const { return removed_.load(std::memory_order_relaxed); }

    /// Lets every queue look at the group, on its own processor.
    void raise_queues() {
        for (Listener& queue : listeners_) {
            queue.raise();
        }
    }
    /// For GroupedQueue: by what a queue is raised. nullptr: max_queues are in use.
    Listener* free_listener() {
        for (Listener& queue : listeners_) {
            if (!queue.is_set()) {
                return &queue;
            }
        }
        return nullptr;
    }

    /// Abandoned writes that may still reach the medium.
    inline u32 late_writes() const { return late_writes_.load(std::memory_order_acquire); }
    /// Commands that the device holds, and those that it has answered so far, as of each queue's last tick.
    u64 in_flight() const { return in_flight_.load(std::memory_order_relaxed); }
    u64 answered() const { return answered_.load(std::memory_order_relaxed); }

  private:
    friend class GroupedTransport;

    std::atomic<bool> closed_{false};
    std::atomic<u8> close_status_{0};
    std::atomic<bool> reported_{false};
    std::atomic<bool> removed_{false};
    // Sums over all queues, each adds its own in its tick. Relaxed: they only show how busy the device is.
    std::atomic<u64> in_flight_{0};
    std::atomic<u64> answered_{0};
    /// Abandoned writes of all queues that may still reach the medium. Release, when the device has answered one;
    /// acquire, before a queue sends a write.
    std::atomic<u32> late_writes_{0};
    std::array<Listener, max_queues> listeners_;
};

/// The part of a transport [io.block_queue] that belongs to its group. On the queue's processor, except quiescent().
class GroupedTransport : public TransportDefaults {
  public:
    inline QueueGroup& group() const { return group_; }
    /// Callable on any processor: the queue has ended everything, or was never started, and does not touch the device.
    inline bool quiescent() const {
        return !live_.load(std::memory_order_acquire);
    } // pairs with the release in leave()

    // io::BlockTransport
    void count_late_writes(i32 change) {
        group_.late_writes_.fetch_add(static_cast<u32>(change), std::memory_order_release);
    }
    inline bool late_writes_elsewhere(u32 own) const { return group_.late_writes() != own; }
    OldestWait::Seen seen(OldestWait::Seen own) {
        add_counts(own.in_flight, own.answered);
        return {.oldest = own.oldest, .in_flight = group_.in_flight(), .answered = group_.answered()};
    }
    inline std::optional<Status> closed_by_peer() const { return group_.closed(); }
    bool closing(Status status) { return group_.close_first(status); }

  protected:
    explicit GroupedTransport(QueueGroup& group) : group_(group) {}
    ~GroupedTransport() = default;
    /// When the queue starts.
    void join() { live_.store(true, std::memory_order_release); } // orders the start before the flag
    /// Last thing in closed(): everything before it happens before quiescent() returns true.
    void leave() {
        add_counts(0, added_answered_);
        live_.store(false, std::memory_order_release);
    }

  private:
    void add_counts(u64 in_flight, u64 answered) {
        const auto add = [](std::atomic<u64>& sum, u64& added, u64 now) { // modulo 2^64
            sum.fetch_add(now - std::exchange(added, now), std::memory_order_relaxed);
        };
        add(group_.in_flight_, added_in_flight_, in_flight);
        add(group_.answered_, added_answered_, answered);
    }

    QueueGroup& group_;
    u64 added_in_flight_ = 0; // of this queue, in the group's sums
    u64 added_answered_ = 0;
    std::atomic<bool> live_{false};
};

/// A queue of a group. Registered with its executor from open() to stop(), both on its own processor.
template <class T>
class GroupedQueue : public BlockQueue<T> {
  public:
    /// By the driver, for one queue of the group at a time. `arguments`: of the transport.
    template <class... Arguments>
    GroupedQueue(Executor& executor, QueueGroup& group, Arguments&&... arguments)
        : BlockQueue<T>(executor, std::forward<Arguments>(arguments)...), listener_(group.free_listener()) {
        if (listener_ != nullptr) {
            listener_->set(executor, *this);
        }
    }
    ~GroupedQueue() override {
        if (listener_ != nullptr) {
            listener_->clear();
        }
    }
    /// Callable on any processor: see GroupedTransport.
    bool quiescent() const { return this->transport().quiescent(); }

    /// Calls `start(queue, timeout)`, which opens the queue, on the queue's own processor, and waits until it has run.
    /// `here`: the caller's executor. Once only. Error{device_gone}: that processor has stopped; Error{timed_out}: it
    /// has not run it within `timeout`, and may yet: the queue must not be destroyed.
    Task<Result<void>> start_there(Executor& here, Nanoseconds timeout,
                                   void (*start)(GroupedQueue& queue, Nanoseconds timeout)) {
        if (&this->executor() == &here) {
            start(*this, timeout);
            co_return Result<void>{};
        }
        start_.queue = this;
        start_.timeout = timeout;
        start_.call = start;
        start_.run = [](Post& post) {
            auto& there = static_cast<Start&>(post);
            there.call(*there.queue, there.timeout);
        };
        if (!this->executor().post(start_)) {
            co_return Error{Code::device_gone, "a processor has stopped before it took its queue"};
        }
        const Bound bound(here, timeout);
        while (quiescent()) {
            if (bound.passed()) {
                co_return Error{Code::timed_out, "a processor does not take its queue"};
            }
            co_await here.sleep(100'000);
        }
        co_return Result<void>{};
    }
    /// After QueueGroup::close(): waits until the queue has ended everything. Error{timed_out}: its processor does not
    /// release it.
    Task<Result<void>> ended(Executor& here, Bound bound) {
        while (!quiescent()) {
            if (bound.passed()) {
                co_return Error{Code::timed_out, "a processor does not release its queue"};
            }
            co_await here.sleep(1'000'000);
        }
        co_return Result<void>{};
    }

  private:
    struct Start : Post {
        GroupedQueue* queue = nullptr;
        Nanoseconds timeout = 0;
        void (*call)(GroupedQueue&, Nanoseconds) = nullptr;
    };

    Listener* listener_; // of the group
    Start start_;
};

/// A disk on a queue of a group. The first one is the disk; the others are its lanes, on other processors.
template <class T>
class GroupedDisk : public QueueDisk<T> {
  public:
    /// Lanes besides the disk itself.
    static constexpr u32 max_further_lanes = 63;

    /// Called once: its queue serves it from now on. Runs on the queue's own processor, by a post if necessary, because
    /// the queue may iterate over its disks there at any time; `here` is the caller's executor.
    void link(Executor& here) {
        if (&here == &this->executor()) {
            link_now();
        } else {
            static_cast<void>(this->executor().post(link_)); // refused: that processor has stopped, and the lane too
        }
    }
    /// Call before the disk is announced: adds a further lane, in processor order. Not owned.
    void add_lane(GroupedDisk& lane) { lanes_[lane_count_++] = &lane; }
    u32 queues() const override { return lane_count_ + 1; }
    BlockDevice& queue_lane(u32 index) override { return index == 0 ? *this : *lanes_[index - 1]; }

    /// Callable on any processor, affects only this lane: the disk is gone; further requests are refused.
    void remove() { removed_.store(true, std::memory_order_relaxed); } // relaxed: orders no other data
    inline bool removed() const override {
        return removed_.load(std::memory_order_relaxed) || queue_.transport().group().removed();
    }

  protected:
    GroupedDisk(BlockQueue<T>& queue, const Geometry& geometry, const BlockDevice::Identity& identity)
        : QueueDisk<T>(queue.executor(), queue), queue_(queue) {
        this->identity_ = identity;
        this->set_geometry(geometry);
        this->set_timeout(queue.timeout());
        link_.disk = this;
        link_.run = [](Post& post) { static_cast<Link&>(post).disk->link_now(); };
    }
    /// On the queue's processor, or after it was stopped; or if it was never linked.
    ~GroupedDisk() {
        if (linked_) {
            queue_.remove(*this);
        }
    }
    /// The caller is on the queue's processor, or the queue has not been started.
    void link_now() {
        linked_ = true;
        queue_.add(*this);
    }

  private:
    struct Link : Post {
        GroupedDisk* disk = nullptr;
    };

    BlockQueue<T>& queue_;
    Link link_;
    bool linked_ = false;
    std::atomic<bool> removed_{false};
    std::array<GroupedDisk*, max_further_lanes> lanes_{};
    u32 lane_count_ = 0;
};

} // namespace fl::io
