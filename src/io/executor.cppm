// One executor per processor: runs what is ready, then lets every queue that was touched tell its device once, then
// takes what has come back, and only when nothing is left arms the events and halts. Interrupt handlers do no work;
// they call Executor::raise() with the service that is to be visited. Other processors use Executor::post() and raise()
// alone (and io::run_on, which is made of post()).
//
// Which services a turn visits. A service is active from add(), touch(), poll(), a raise, or a tick, until the
// processor is about to sleep and its arm() returns false:
//
//   active    drain() in each turn; arm() when the processor is about to sleep
//   passive   no call at all, until it is raised, touched or polled; tick() while wants_tick()
//
// So a turn costs as much as there is to do, however many services there are. No event is lost: one that comes before
// arm() looks is found by arm(), which keeps the service active; one that comes later is announced by an interrupt
// whose handler raises the service, and the wake flag that raise() sets is tested with interrupts off before the halt
// [io.mailbox, test/model]. A lost interrupt is found by the next tick, if the service wants one: it is drained before it.
export module io.executor;
import core.std;
import core.check;
import core.processor;
import core.result;
import core.panic;
import core.time;
import io.task;
import io.mailbox;
import io.timer_heap;

export namespace fl::io {

/// Something that waits to be resumed. Lives in the frame of the coroutine that waits, and leaves the list that it
/// stands in when it dies: a frame may be destroyed between the completion and the resumption.
struct ReadyNode {
    ReadyNode* next = nullptr; // nullptr: in no list
    ReadyNode* previous = nullptr;
    std::coroutine_handle<> waiter{};

    ReadyNode() = default;
    explicit ReadyNode(std::coroutine_handle<> handle) : waiter(handle) {}
    ReadyNode(const ReadyNode&) = delete;
    ReadyNode& operator=(const ReadyNode&) = delete;
    ~ReadyNode() { unlink(); }

    inline bool queued() const { return next != nullptr; }
    inline void unlink() {
        if (next != nullptr) {
            previous->next = next;
            next->previous = previous;
            next = previous = nullptr;
        }
    }
};

/// Nodes in order of arrival, a ring through `head_`. Owns nothing.
class ReadyList {
  public:
    ReadyList() { head_.next = head_.previous = &head_; }
    ReadyList(const ReadyList&) = delete;
    ReadyList& operator=(const ReadyList&) = delete;
    ~ReadyList() {
        while (pop() != nullptr) {
        }
        head_.next = head_.previous = nullptr;
    }

    inline bool empty() const { return head_.next == &head_; }
    /// At the end; a node that is in a list already stays where it is.
    inline void push(ReadyNode& node) {
        if (!node.queued()) [[likely]] {
            node.next = &head_;
            node.previous = head_.previous;
            head_.previous->next = &node;
            head_.previous = &node;
        }
    }
    inline ReadyNode* pop() {
        ReadyNode* node = head_.next;
        if (node == &head_) {
            return nullptr;
        }
        node->unlink();
        return node;
    }
    /// Takes over everything from `other`; this list is empty before.
    inline void take_all(ReadyList& other) {
        if (!other.empty()) {
            head_.next = other.head_.next;
            head_.previous = other.head_.previous;
            head_.next->previous = head_.previous->next = &head_;
            other.head_.next = other.head_.previous = &other.head_;
        }
    }

  private:
    ReadyNode head_;
};

class Executor;

/// A hardware queue, an event channel: what the executor looks after. Owned by its driver, registered with
/// Executor::add. All members are called on the executor's own processor, never from an interrupt handler. Order of a
/// turn, for an active service: flush (only if touched), drain, tick (when time has passed), arm (only when about to
/// sleep).
class Service {
  public:
    Service() = default;
    Service(const Service&) = delete;
    Service& operator=(const Service&) = delete;

    /// Publish everything that was queued in this turn and notify the other side at most once.
    virtual void flush() {}
    /// Take completions that are there; true when at least one was taken.
    virtual bool drain() = 0;
    /// Ask for an event when the next completion comes and look once more; true when one is there already (then the
    /// processor does not sleep, and drain() is called). After a false it is not called again before the service has
    /// been raised, touched, polled or ticked: what changes an answer of false without any of these calls
    /// Executor::poll().
    virtual bool arm() { return false; }
    /// Look for what takes too long. Called about every Executor::tick_length of machine time while the executor runs
    /// and wants_tick(), and once more after wants_tick() has become false.
    virtual void tick(Instant now) { static_cast<void>(now); }
    /// Whether anything can expire: a request is under way, a reset. Asked after arm() has returned false and in a
    /// tick; what makes it true at any other time calls Executor::poll(). While no service wants a tick and no bounded
    /// wait is pending the processor sleeps until an interrupt or a timer.
    virtual bool wants_tick() const { return true; }

  protected:
    ~Service() = default;

  private:
    friend class Executor;
    friend class RaisedList<Service>;
    Service* next_ = nullptr; // all services of the executor
    Service* next_active_ = nullptr;
    Service* next_ticking_ = nullptr;
    Service* next_touched_ = nullptr;
    bool active_ = false;  // in the list of active ones
    bool ticking_ = false; // in the list of those that the next tick visits
    bool touched_ = false;
    StdAtomics::Cell<bool, MailboxCell::raised> raised{true}; // RaisedList
    Service* next_raised = nullptr;
};

/// What the executor needs from the processor, in elapsed time. `now` is the same clock on every processor. `idle`
/// sleeps until an interrupt, or about `until`, whichever is first, unless `wake` is set; it must test `wake` and sleep
/// without a gap (sti; hlt). Host tests give a clock that jumps.
struct Platform {
    void* context = nullptr;
    Instant (*now)(void* context) = nullptr;
    void (*idle)(void* context, Instant until, const std::atomic<bool>& wake) = nullptr;
    /// Ends the idle() of this platform's processor, called on another one; absent where there is no other.
    void (*kick)(void* context) = nullptr;
    /// The longest turn, machine time; 0: no bound. Looked at in builds with checks [core.check].
    Nanoseconds turn_budget = 0;
};

/// A task of another processor that runs on this executor; `evict` destroys it when the executor stops serving, and is
/// called at most once.
struct RemoteTask {
    RemoteTask* next_remote = nullptr;
    void (*evict)(RemoteTask& self) = nullptr;
};

/// Work for an executor from elsewhere. Owned by whoever posts it, and must live until `run` is called (or withdraw()
/// has been); `run` may end its life. Only light work: a handler, say, that makes a node ready.
struct Post {
    Post* next = nullptr;
    void (*run)(Post& self) = nullptr;
    // also run while that processor waits for an answer of another one (run_urgent): never more than freeing
    bool urgent = false;
};

class Executor {
  public:
    static constexpr Nanoseconds tick_length = 10'000'000;

    /// For one processor: everything but raise(), wake() and post() is called there alone, as soon as it runs.
    explicit Executor(Platform platform, u32 processor = 0) : platform_(platform), processor_(processor) {
        RaisedList<Service>::attach(everything_);
    }
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    /// Active from here on. A service belongs to one executor at a time.
    void add(Service& service);
    /// Also from inside a call of this or of another service (but not of arm()). Until it returns raise() may go on
    /// elsewhere; afterwards it does nothing, as long as the service lives. Waits for a raise() that is under way on
    /// another processor: a few instructions.
    void remove(Service& service);
    /// flush() of this service is due at the end of the turn, and drain() after it.
    inline void touch(Service& service) {
        check_processor();
        if (!service.touched_) {
            service.touched_ = true;
            service.next_touched_ = touched_;
            touched_ = &service;
        }
        activate(service);
    }
    /// Active from this turn on, with nothing to publish: for a service whose arm() or wants_tick() would answer
    /// differently now.
    inline void poll(Service& service) {
        check_processor();
        activate(service);
    }
    /// The node's waiter is resumed in the next turn, once, however often this is called before.
    inline void make_ready(ReadyNode& node) {
        check_processor();
        ready_.push(node);
    }
    /// From an interrupt handler, or another processor: something has happened for this service; do not sleep. It is
    /// active from the turn that follows, whose drain() sees what was written before (io.mailbox has the orderings).
    /// Lock-free. The service lives and has been add()ed here; after remove() this does nothing.
    inline void raise(Service& service) {
        if (raised_.add(service)) {
            wake_up();
        }
    }
    /// The same for every service of this executor, where it is not known which one or how many there are; and for a
    /// condition that the loop tests between turns (serve(), run()): it is tested again before the processor sleeps.
    void wake() { raise(everything_); }
    /// From anywhere: post.run(post) is called on this executor's processor at the beginning of a turn, in order of
    /// arrival. Lock-free; allocates nothing. False: it has stopped serving, and `run` will never be called.
    [[nodiscard]] bool post(Post& post) {
        if (!mailbox_.push(post)) {
            return false;
        }
        wake_up();
        return true;
    }
    /// On the executor's processor: takes back what was posted to it and has not been run. False: it is not there.
    bool withdraw(Post& post);
    /// On the executor's processor: adds or removes a task that is destroyed when the executor stops serving.
    void add_remote(RemoteTask& task);
    void remove_remote(RemoteTask& task);
    /// On the executor's processor, while it waits for another one inside a turn: runs the urgent posts; the others
    /// wait for the next turn.
    void run_urgent();
    /// Once, before another processor knows of this executor.
    void set_kick(void (*kick)(void* context)) { platform_.kick = kick; }
    u32 processor() const { return processor_; }
    /// The executor that runs on the calling processor just now; nullptr: none.
    static Executor* current();
    /// Machine time [core.time], on this executor's processor alone: it means nothing on another one, so what crosses
    /// is a length. Bounds, timers, sleeps and ticks are in it.
    inline Instant now() { return clock_.read(platform_.now(platform_.context)); }
    /// The machine time at the beginning of this turn; cheap.
    inline Instant turn_time() const { return turn_time_; }
    /// What the clock shows, stops of the machine included: for measuring, from any processor and comparable between
    /// them.
    Instant elapsed() const { return platform_.now(platform_.context); }
    /// Machine time at the end of the last stop of the machine that this executor has noticed; 0: none.
    Instant resumed_at() const { return clock_.resumed_at(); }
    /// When a wait of `length` that began at `begun` is over [Bound].
    Instant end_of_bound(Instant begun, Nanoseconds length) const { return clock_.end_of_bound(begun, length); }

    /// Runs until the task has finished and gives its value. Not reentrant.
    template <class T>
    T run(Task<T> task) {
        std::optional<T> value;
        auto root = drive(*this, std::move(task), value);
        if (!root.handle) {
            return Error{Code::exhausted, "no coroutine frame left to start a task"};
        }
        ReadyNode first(root.handle);
        make_ready(first);
        Executor* const before = enter(this);
        clock_.rest_until(never); // whatever was done since the last loop is no stop
        while (!value) {
            step();
        }
        enter(before);
        root.handle.destroy();
        return std::move(*value);
    }
    /// For a processor whose work comes by posts: turns until `stop` is set; then what is posted is refused, what has
    /// been posted is run, and every task is evicted. Once. Whoever sets `stop` (release) calls wake() afterwards.
    void serve(const std::atomic<bool>& stop);
    /// One turn of the loop; for tests and for callers with a loop of their own.
    void turn() {
        Executor* const before = enter(this);
        step();
        enter(before);
    }

    /// co_await executor.sleep(length): resumes at or after now + length.
    auto sleep(Nanoseconds length) {
        struct Awaiter : Timer {
            Executor& executor;
            Awaiter(Executor& e, Instant at) : executor(e) { due = at; }
            Awaiter(const Awaiter&) = delete;
            Awaiter& operator=(const Awaiter&) = delete;
            ~Awaiter() { executor.cancel(*this); }
            bool await_ready() const { return false; }
            void await_suspend(std::coroutine_handle<> h) {
                waiter = h;
                executor.start(*this);
            }
            void await_resume() const {}
        };
        return Awaiter{*this, after(now(), length)};
    }

    /// Lives with its owner, who cancels it before it dies. When due it is made ready; of several that are due at the
    /// same time the one that was started first. Starting and cancelling allocate nothing and take O(log n) comparisons
    /// on average [io.timer_heap].
    struct Timer : ReadyNode, HeapLinks<Timer> {
        Instant due = never;
        Instant begun = 0;      // of a bound on the other side [Bound], which a stop of the machine lengthens:
        Nanoseconds length = 0; // its length; 0: it is none, and is due when it is due
        u64 number = 0;         // in order of start
        bool pending = false;
    };
    void start(Timer& timer);
    void cancel(Timer& timer);

    u64 turns() const { return turns_; }
    /// How often the processor went to sleep.
    u64 idles() const { return idles_; }

  private:
    struct Root {
        struct promise_type : PoolAllocated {
            Root get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
            static Root get_return_object_on_allocation_failure() noexcept { return {}; }
            std::suspend_always initial_suspend() const noexcept { return {}; }
            std::suspend_always final_suspend() const noexcept { return {}; }
            void return_void() const noexcept {}
            void unhandled_exception() const noexcept {}
        };
        std::coroutine_handle<> handle{};
    };
    template <class T>
    static Root drive(Executor& executor, Task<T> task, std::optional<T>& value) {
        value.emplace(co_await std::move(task));
        executor.mailbox_.raise(); // run() returns after this turn: it must not end in a sleep
    }
    /// Makes it the calling processor's current one; gives the one before.
    static Executor* enter(Executor* executor);
    void step();
    void collect(Post* posts);
    void collect();
    void run_posts();
    void renew_bounds();
    inline void activate(Service& service) {
        if (!service.active_) {
            service.active_ = true;
            service.next_active_ = active_;
            active_ = &service;
        }
    }
    void take_raised();
    void lower(Service& service);
    void run_ticks(Instant time);
    inline void check_processor() const {
        check(this_processor() == processor_, "an executor's services and coroutines are touched on its own processor");
    }
    bool arm_all();
    inline void wake_up() {
        if (platform_.kick == nullptr || this_processor() == processor_) [[likely]] {
            mailbox_.raise();
        } else if (mailbox_.raise_from_elsewhere()) {
            platform_.kick(platform_.context);
        }
    }

    struct TimerBefore {
        bool operator()(const Timer& a, const Timer& b) const {
            return a.due != b.due ? a.due < b.due : a.number < b.number;
        }
    };
    /// What wake() raises: take_raised() makes every service active instead.
    struct Everything final : Service {
        bool drain() override { return false; }
    };

    Platform platform_;
    MachineTime clock_;
    u32 processor_;
    ReadyList ready_;
    Service* services_ = nullptr;
    Service* active_ = nullptr;
    Service* ticking_ = nullptr; // those that the next tick visits
    Service* touched_ = nullptr;
    Service* following_ = nullptr; // the next one to be visited, while a loop over active ones is under way
    PairingHeap<Timer, TimerBefore> timers_;
    u64 timers_started_ = 0;
    u32 bounds_pending_ = 0; // timers that are bounds [Bound]
    Instant turn_time_ = 0;
    Instant next_tick_ = 0;
    Instant renewed_at_ = 0; // resumed_at() when the timers were last looked at for it
    u32 told_stops_ = 0;     // long stops that the log has a line of
    u64 turns_ = 0;
    u64 idles_ = 0;
    Post* posts_ = nullptr; // out of the mailbox and not run yet, oldest first
    Post** posts_end_ = &posts_;
    RemoteTask* remote_tasks_ = nullptr;
    bool closed_ = false;
    BasicMailbox<Post> mailbox_;
    RaisedList<Service> raised_;
    Everything everything_;
};

/// Which service an event source raises, where the source lives longer than the service and does not know it: the event
/// flag of a channel, for example. One writer at a time; whoever writes next is ordered after the last one.
class Listener {
  public:
    /// On the executor's processor, or before the service is add()ed.
    void set(Executor& executor, Service& service) {
        // Release, both: partners are the acquires in load(). A reader that sees this service sees also the clear()
        // before it, and so notices that the executor that it has read is an earlier listener's.
        service_.store(&service, std::memory_order_release);
        executor_.store(&executor, std::memory_order_release);
    }
    /// On that processor, before the service dies; or on another one that keeps the service alive.
    void clear() { executor_.store(nullptr, std::memory_order_relaxed); }
    /// Relaxed: for the writer.
    bool is_set() const { return executor_.load(std::memory_order_relaxed) != nullptr; }
    /// In a handler on the processor of `here`. False: no service of that executor listens.
    inline bool raise_on(Executor& here) {
        Service* const service = load(&here);
        if (service == nullptr) {
            return false;
        }
        here.raise(*service);
        return true;
    }
    /// On any processor that keeps the service alive.
    void raise() {
        Executor* const executor = executor_.load(std::memory_order_relaxed);
        if (Service* const service = executor != nullptr ? load(executor) : nullptr; service != nullptr) {
            executor->raise(*service);
        }
    }

  private:
    /// The service, if it is this executor's; otherwise nullptr.
    inline Service* load(const Executor* executor) const {
        if (executor_.load(std::memory_order_acquire) != executor) {
            return nullptr;
        }
        Service* const service = service_.load(std::memory_order_acquire);
        // Relaxed: the acquire above orders it. Different: set() came between the two loads.
        return executor_.load(std::memory_order_relaxed) == executor ? service : nullptr;
    }

    std::atomic<Executor*> executor_{nullptr};
    std::atomic<Service*> service_{nullptr};
};

/// How long the other side (a host, a device, another processor) may take, from now on: in machine time of one
/// executor, and all of it anew when the machine was stopped meanwhile, since the other side may have been stopped as
/// well, or have begun anew. Stops make it at most twice as long.
class Bound {
  public:
    Bound(Executor& executor, Nanoseconds length) : executor_(&executor), begun_(executor.now()), length_(length) {}

    bool passed() const { return executor_->now() >= due(); }
    bool passed(Instant now) const { return now >= due(); }
    /// As things stand: a stop may still move it.
    Instant due() const { return executor_->end_of_bound(begun_, length_); }
    Nanoseconds length() const { return length_; }
    const Executor& executor() const { return *executor_; }
    void apply_to(Executor::Timer& timer) const {
        timer.due = due();
        timer.begun = begun_;
        timer.length = length_;
    }

  private:
    Executor* executor_;
    Instant begun_;
    Nanoseconds length_;
};

/// An event that interrupt handlers raise and one coroutine waits for, with a bound. Raises that nobody waits for are
/// kept (once).
class Signal final : public Service {
  public:
    explicit Signal(Executor& executor) : executor_(executor) { executor_.add(*this); }
    ~Signal() { executor_.remove(*this); }

    /// From anywhere, interrupt handlers included. Release: pairs with the acquire exchange in drain().
    void raise() {
        raised_.store(true, std::memory_order_release);
        executor_.raise(*this);
    }
    class [[nodiscard]] Wait : Executor::Timer {
      public:
        explicit Wait(Signal& signal) : signal_(signal) {}
        Wait(Signal& signal, const Bound& bound) : signal_(signal) { bound.apply_to(*this); }
        Wait(const Wait&) = delete;
        Wait& operator=(const Wait&) = delete;
        ~Wait() {
            signal_.executor_.cancel(*this);
            if (signal_.waiting_ == this) {
                signal_.waiting_ = nullptr;
            }
        }
        bool await_ready() {
            if (signal_.waiting_ != nullptr) {
                panic("io::Signal: a coroutine waits while another one does: a signal has one waiter at a time");
            }
            by_signal_ = signal_.raised_.exchange(false, std::memory_order_acquire);
            return by_signal_;
        }
        void await_suspend(std::coroutine_handle<> h) {
            waiter = h;
            signal_.waiting_ = this;
            signal_.executor_.start(*this);
        }
        bool await_resume() {
            signal_.waiting_ = nullptr;
            return by_signal_;
        }

      private:
        friend class Signal;
        Signal& signal_;
        bool by_signal_ = false;
    };
    /// co_await signal.wait(bound) -> true: raised; false: the bound passed first. One waiter at a time, from its wait
    /// to its resumption; a second one is a panic.
    Wait wait(const Bound& bound) { return {*this, bound}; }
    /// Without a bound: for what need not come.
    Wait wait() { return Wait(*this); }
    bool drain() override;
    bool arm() override {
        return waiting_ != nullptr && !waiting_->by_signal_ && raised_.load(std::memory_order_acquire);
    }
    bool wants_tick() const override { return false; }

  private:
    Executor& executor_;
    Wait* waiting_ = nullptr; // from its wait to its resumption
    std::atomic<bool> raised_{false};
};

/// Starts tasks side by side and waits for all of them: group.spawn(…) up to any number, then co_await group.join().
/// The group owns its tasks: those that have not finished when it dies are destroyed, with all they wait for. The first
/// error is kept.
class TaskGroup {
  public:
    explicit TaskGroup(Executor& executor) : executor_(executor) {}
    TaskGroup(const TaskGroup&) = delete;
    TaskGroup& operator=(const TaskGroup&) = delete;
    ~TaskGroup();

    /// Queues the task; it runs when the executor next takes what is ready. Error{exhausted}: no frame.
    Result<void> spawn(Task<Result<void>> task);
    auto join() {
        struct Awaiter {
            TaskGroup& group;
            std::coroutine_handle<> waiting{};
            explicit Awaiter(TaskGroup& g) : group(g) {}
            Awaiter(const Awaiter&) = delete;
            Awaiter& operator=(const Awaiter&) = delete;
            ~Awaiter() {
                if (waiting && group.joiner_.waiter == waiting) { // destroyed while it waited
                    group.joiner_.unlink();
                    group.joiner_.waiter = {};
                }
            }
            bool await_ready() const { return group.running_ == 0; }
            void await_suspend(std::coroutine_handle<> h) { group.joiner_.waiter = waiting = h; }
            Result<void> await_resume() {
                if (waiting) {
                    group.joiner_.waiter = waiting = {};
                }
                if (group.first_error_) {
                    return *group.first_error_;
                }
                return {};
            }
        };
        return Awaiter(*this);
    }
    usize running() const { return running_; }

  private:
    struct Member {
        struct promise_type : PoolAllocated, ReadyNode {
            promise_type* next_member = nullptr;
            promise_type** link = nullptr; // what points to us; nullptr: in no group
            ~promise_type() { leave(); }
            void leave() {
                if (link != nullptr) {
                    *link = next_member;
                    if (next_member != nullptr) {
                        next_member->link = link;
                    }
                    link = nullptr;
                }
            }
            Member get_return_object() noexcept { return {this}; }
            static Member get_return_object_on_allocation_failure() noexcept { return {}; }
            std::suspend_always initial_suspend() const noexcept { return {}; }
            std::suspend_never final_suspend() const noexcept { return {}; }
            void return_void() const noexcept {}
            void unhandled_exception() const noexcept {}
        };
        promise_type* promise = nullptr;
    };
    static Member run(TaskGroup& group, Task<Result<void>> task);

    Executor& executor_;
    Member::promise_type* members_ = nullptr;
    usize running_ = 0;
    ReadyNode joiner_{};
    std::optional<Error> first_error_;
};

} // namespace fl::io
