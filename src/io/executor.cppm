// One executor per processor. A turn resumes the ready coroutines, flushes every touched service (at most one device
// notification each) and drains completions. When no work is left it arms the services' events and halts. Interrupt
// handlers do no work beyond Executor::raise() for the service to visit. Other processors may only call
// Executor::post() and raise() (io::run_on is built on post()).
//
// Services visited by a turn. A service becomes active by add(), touch(), poll(), raise() or a tick, and stays active
// until the processor is about to sleep and its arm() returns false:
//
//   active    drain() in each turn; arm() when the processor is about to sleep
//   passive   no calls until raised, touched or polled; tick() while wants_tick()
//
// The cost of a turn thus depends on the pending work, not on the number of services. No event is lost: arm() finds
// one that arrives before its check and keeps the service active; a later one raises an interrupt whose handler
// raises the service, and the wake flag set by raise() is tested with interrupts off before the halt [io.mailbox,
// test/model]. A lost interrupt is recovered by the next tick, if the service wants ticks: the service is drained
// before its tick().
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

/// A waiter to be resumed. Lives in the frame of the waiting coroutine and unlinks itself on destruction, because a
/// frame may be destroyed between completion and resumption.
struct ReadyNode {
    ReadyNode* next = nullptr; // nullptr: not in a list
    ReadyNode* previous = nullptr;
    std::coroutine_handle<> waiter{};

    ReadyNode() = default;
    inline explicit ReadyNode(std::coroutine_handle<> handle) : waiter(handle) {}
    ReadyNode(const ReadyNode&) = delete;
    ReadyNode& operator=(const ReadyNode&) = delete;
    inline ~ReadyNode() { unlink(); }

    inline bool queued() const { return next != nullptr; }
    inline void unlink() {
        if (next != nullptr) {
            previous->next = next;
            next->previous = previous;
            next = previous = nullptr;
        }
    }
};

/// FIFO list of nodes, circular through `head_`. Does not own them.
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
    /// Appends the node; no effect if it is already in a list.
    inline void push(ReadyNode& node) {
        if (!node.queued()) [[likely]] {
            node.next = &head_;
            node.previous = head_.previous;
            head_.previous->next = &node;
            head_.previous = &node;
        }
    }
    /// Removes and returns the first node; nullptr: the list is empty.
    inline ReadyNode* pop() {
        ReadyNode* node = head_.next;
        if (node == &head_) {
            return nullptr;
        }
        node->unlink();
        return node;
    }
    /// Moves all nodes from `other` to this list, which must be empty.
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

/// What a processor does when it has nothing left to do while its devices hold commands.
enum class Wait : u8 {
    interrupt, // sleeps until an event
    poll,      // looks for answers until there is one, without asking for an event
    adaptive,  // polls for Executor::poll_window after the last answer or submission, then sleeps
};
inline constexpr std::array<std::string_view, 3> wait_names{"interrupt", "poll", "adaptive"};
constexpr std::string_view name(Wait wait) { return wait_names[to_underlying(wait)]; }

/// An event source served by the executor: a hardware queue, an event channel. Owned by its driver, registered with
/// Executor::add. All members are called on the executor's own processor, never from an interrupt handler. Order
/// within a turn, for an active service: flush (only if touched), drain, tick (when due), arm (only before sleeping).
class Service {
  public:
    Service() = default;
    Service(const Service&) = delete;
    Service& operator=(const Service&) = delete;

    /// Publishes everything queued in this turn and notifies the device at most once.
    virtual void flush() {}
    /// Takes available completions; returns true if at least one was taken.
    virtual bool drain() = 0;
    /// Enables an event for the next completion, then checks once more; returns true if one is already available (the
    /// processor then does not sleep, and drain() is called). After returning false it is not called again until the
    /// service is raised, touched, polled or ticked: any other change that would make it return true must call
    /// Executor::poll().
    virtual bool arm() { return false; }
    /// Checks timeouts. Called about every Executor::tick_length of machine time while the executor runs and
    /// wants_tick(), and once more after wants_tick() has become false.
    virtual void tick(Instant now) { static_cast<void>(now); }
    /// Whether anything can time out: a request under way, a reset. Evaluated after arm() has returned false and in
    /// each tick; a change to true at any other time must call Executor::poll(). While no service wants a tick and no
    /// bounded wait is pending the processor sleeps until an interrupt or a timer.
    virtual bool wants_tick() const { return true; }
    /// Whether drain() may find something without an event: a device holds a command that it will soon answer. A
    /// processor that polls stays awake for it [Wait].
    virtual bool awaits_answer() const { return false; }

  protected:
    ~Service() = default;

  private:
    friend class Executor;
    friend class RaisedList<Service>;
    Service* next_ = nullptr; // list of all services of the executor
    Service* next_active_ = nullptr;
    Service* next_ticking_ = nullptr;
    Service* next_touched_ = nullptr;
    bool active_ = false;  // in the list of active services
    bool ticking_ = false; // in the list of services for the next tick
    bool touched_ = false;
    StdAtomics::Cell<bool, MailboxCell::raised> raised{true}; // RaisedList
    Service* next_raised = nullptr;
};

/// What the executor needs from the processor, in elapsed time. `now` reads a clock common to all processors. `idle`
/// sleeps until an interrupt or about `until`, whichever is first; it returns at once if `wake` is set, and must test
/// `wake` and halt atomically with respect to interrupts (sti; hlt). Host tests supply a simulated clock.
struct Platform {
    /// What a kernel gives as turn_budget: no turn has a reason to take so long.
    static constexpr Nanoseconds longest_turn = 1'000'000'000;

    void* context = nullptr;
    Instant (*now)(void* context) = nullptr;
    void (*idle)(void* context, Instant until, const std::atomic<bool>& wake) = nullptr;
    /// Called on another processor to end this platform's idle(); nullptr on a uniprocessor.
    void (*kick)(void* context) = nullptr;
    /// Maximum duration of a turn, in machine time; 0: unlimited. Enforced in builds with checks [core.check].
    Nanoseconds turn_budget = 0;
    /// The timer that an earlier idle() has armed may be lost: the next one arms it. nullptr: idle() always does.
    void (*rearm)(void* context) = nullptr;
};

/// A remote task running on this executor. `evict` destroys it when the executor stops serving; called at most once.
struct RemoteTask {
    RemoteTask* next_remote = nullptr;
    void (*evict)(RemoteTask& self) = nullptr;
};

/// Work submitted to an executor from elsewhere. Owned by its poster, and must live until `run` is called (or until
/// withdraw()); `run` may destroy it. For short work only, such as making a node ready.
struct Post {
    Post* next = nullptr;
    void (*run)(Post& self) = nullptr;
    // also run while that processor waits for another one (run_urgent): may only release resources
    bool urgent = false;
};

class Executor {
  public:
    /// The interval of ticks, in machine time.
    static constexpr Nanoseconds tick_length = 10'000'000;
    /// Wait::adaptive: about twice what a fast device takes for a request, so that polling at most doubles the time
    /// that a wake-up would have cost.
    static constexpr Nanoseconds poll_window = 50'000;

    /// Serves one processor: once that runs, only raise(), wake() and post() may be called from another one.
    explicit Executor(Platform platform, u32 processor = 0) : platform_(platform), processor_(processor) {
        RaisedList<Service>::attach(everything_);
    }
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;

    /// Registers the service as active. A service belongs to one executor at a time.
    void add(Service& service);
    /// May be called from inside a call of this or another service, but not from arm(). A concurrent raise()
    /// elsewhere is allowed until this returns; a later one has no effect, as long as the service exists. Spins for a
    /// few instructions if another processor is inside raise().
    void remove(Service& service);
    /// Schedules flush() of this service for the end of the turn, and drain() after it.
    inline void touch(Service& service) {
        check_processor();
        if (!service.touched_) {
            service.touched_ = true;
            service.next_touched_ = touched_;
            touched_ = &service;
        }
        activate(service);
    }
    /// Makes the service active without scheduling a flush(): for when its arm() or wants_tick() result has changed.
    inline void poll(Service& service) {
        check_processor();
        activate(service);
    }
    /// Resumes the node's waiter in the next turn, once, even if called several times before.
    inline void make_ready(ReadyNode& node) {
        check_processor();
        ready_.push(node);
    }
    /// Reports an event for this service from an interrupt handler or another processor, and prevents sleep. The
    /// service is active from the following turn on, whose drain() sees all earlier writes (orderings: io.mailbox).
    /// Lock-free. The service must exist and have been add()ed here; after remove() this has no effect.
    inline void raise(Service& service) {
        if (raised_.add(service)) {
            wake_up();
        }
    }
    /// raise() for every service of this executor: for when the service is unknown, and for a condition that the loop
    /// tests between turns (serve(), run()), which is tested once more before the processor sleeps.
    void wake() { raise(everything_); }
    /// Callable from any processor: post.run(post) is called on this executor's processor at the beginning of a turn,
    /// in FIFO order. Lock-free; allocates nothing. False: the executor has stopped serving, and `run` will never be
    /// called.
    [[nodiscard]] bool post(Post& post) {
        if (!mailbox_.push(post)) {
            return false;
        }
        wake_up();
        return true;
    }
    /// On the executor's processor: cancels a post that has not run yet. False: it is not queued.
    bool withdraw(Post& post);
    /// On the executor's processor: adds or removes a task that is destroyed when the executor stops serving.
    void add_remote(RemoteTask& task);
    void remove_remote(RemoteTask& task);
    /// On the executor's processor, while it waits for another one inside a turn: runs the urgent posts; the others
    /// wait for the next turn.
    void run_urgent();
    /// Call once, before another processor has access to this executor.
    void set_kick(void (*kick)(void* context)) { platform_.kick = kick; }
    inline u32 processor() const { return processor_; }
    /// Callable on any processor, at any time.
    void set_wait(Wait wait) { wait_.store(wait, std::memory_order_relaxed); } // orders no other data
    inline Wait wait() const { return wait_.load(std::memory_order_relaxed); }
    /// In a turn: the processor polls and has not slept since the last turn, so it needed no event to begin this one.
    inline bool polling() const { return wait() != Wait::interrupt && woken_ != turns_; }
    /// The executor running on the calling processor; nullptr: none.
    static Executor* current();
    /// Machine time [core.time] of this executor's processor. Not comparable between processors: pass durations, not
    /// instants. Bounds, timers, sleeps and ticks use it.
    inline Instant now() { return clock_.read(platform_.now(platform_.context)); }
    /// Machine time at the beginning of this turn, or of the one before if that one left coroutines ready; cheap.
    inline Instant turn_time() const { return turn_time_; }
    /// Elapsed time, including time during which the machine was stopped: for measurements. Callable from any
    /// processor, and comparable between processors.
    inline Instant elapsed() const { return platform_.now(platform_.context); }
    /// Machine time at the end of the last machine stop noticed by this executor; 0: none.
    Instant resumed_at() const { return clock_.resumed_at(); }
    /// When a wait of `length` that began at `begun` expires [Bound].
    Instant end_of_bound(Instant begun, Nanoseconds length) const { return clock_.end_of_bound(begun, length); }

    /// Runs until the task has finished and returns its value. Not reentrant.
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
        clock_.rest_until(never); // time since the last loop is not a machine stop
        while (!value) {
            step();
        }
        enter(before);
        root.handle.destroy();
        return std::move(*value);
    }
    /// Main loop of a processor that gets its work by posts: turns until `stop` is set, then refuses further posts,
    /// runs those already queued, and evicts every task. Call once. The setter of `stop` (release) must call wake()
    /// afterwards.
    void serve(const std::atomic<bool>& stop);
    /// One turn of the loop; for tests and for callers with a loop of their own. It reads the clock in any case, since
    /// time may have passed after the turn before.
    void turn() {
        Executor* const before = enter(this);
        keep_time_ = false;
        step();
        enter(before);
    }

    /// On its own processor, after the machine was suspended: the timer that was armed before may be lost, so the next
    /// sleep arms it anew.
    void rearm() {
        if (platform_.rearm != nullptr) {
            platform_.rearm(platform_.context);
        }
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

    /// Lives with its owner, which must cancel it before destroying it. Made ready when due; timers due at the same
    /// time expire in order of start. Starting and cancelling allocate nothing and take O(log n) comparisons on
    /// average [io.timer_heap].
    struct Timer : ReadyNode, HeapLinks<Timer> {
        Instant due = never;
        Instant begun = 0;      // start of a bound [Bound], which a machine stop extends
        Nanoseconds length = 0; // length of the bound; 0: not a bound, `due` is final
        u64 number = 0;         // start order
        bool pending = false;
    };
    void start(Timer& timer);
    void cancel(Timer& timer);

    u64 turns() const { return turns_; }
    /// Number of times the processor went to sleep.
    u64 idles() const { return idles_; }
    /// Number of turns that ended in polling instead of sleep.
    u64 polls() const { return polls_; }
    /// True: slept() counts from now on, which takes one more reading of the clock for each sleep. Default: false.
    void time_sleep(bool on) { times_sleep_ = on; }
    bool times_sleep() const { return times_sleep_; }
    /// Elapsed time that the processor has slept, in the turns before this one.
    Nanoseconds slept() const { return slept_; }

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
        executor.mailbox_.raise(); // run() returns after this turn, so it must not sleep
    }
    /// Makes it the calling processor's current executor; returns the previous one.
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
        if constexpr (checks_enabled) { // reading the processor's number costs an instruction
            check(this_processor() == processor_,
                  "an executor's services and coroutines are touched on its own processor");
        }
    }
    bool arm_all();
    bool keeps_polling() const;
    inline void wake_up() {
        if (platform_.kick == nullptr || this_processor() == processor_) [[likely]] {
            mailbox_.raise();
        } else if (mailbox_.raise_remote()) {
            platform_.kick(platform_.context);
        }
    }

    struct TimerBefore {
        bool operator()(const Timer& a, const Timer& b) const {
            return a.due != b.due ? a.due < b.due : a.number < b.number;
        }
    };
    /// The service raised by wake(): take_raised() then activates every service.
    struct Everything final : Service {
        bool drain() override { return false; }
    };

    Platform platform_;
    MachineTime clock_;
    u32 processor_;
    ReadyList ready_;
    Service* services_ = nullptr;
    Service* active_ = nullptr;
    Service* ticking_ = nullptr; // services for the next tick
    Service* touched_ = nullptr;
    Service* following_ = nullptr; // next service to visit while iterating over the active list
    PairingHeap<Timer, TimerBefore> timers_;
    u64 timers_started_ = 0;
    u32 bounds_pending_ = 0; // timers that are bounds [Bound]
    Instant turn_time_ = 0;
    Instant next_tick_ = 0;
    Instant renewed_at_ = 0; // resumed_at() when the timers were last updated for it
    u32 logged_stops_ = 0;   // long machine stops already logged
    u64 turns_ = 0;
    u64 idles_ = 0;
    u64 polls_ = 0;
    Nanoseconds slept_ = 0;
    Instant asleep_since_ = 0; // elapsed time; valid with times_sleep_
    u64 woken_ = 0;            // the last turn that followed a sleep
    u64 time_read_ = 0;        // the last turn that read the clock at its beginning
    bool keep_time_ = false;   // the next turn does not
    bool asleep_ = false;      // the previous turn ended in a sleep
    bool times_sleep_ = false;
    std::atomic<Wait> wait_{Wait::interrupt};
    Instant poll_until_ = 0; // Wait::adaptive
    Post* posts_ = nullptr;  // taken from the mailbox but not yet run, oldest first
    Post** posts_end_ = &posts_;
    RemoteTask* remote_tasks_ = nullptr;
    bool closed_ = false;
    BasicMailbox<Post> mailbox_;
    RaisedList<Service> raised_;
    Everything everything_;
};

/// The service to be raised by an event source that outlives it, for example a channel's event flag. One writer at a
/// time; successive writers must be ordered with each other.
class Listener {
  public:
    /// On the executor's processor, or before add() of the service.
    void set(Executor& executor, Service& service) {
        // Both stores release, pairing with the acquire loads in load(). A reader that sees this service also sees
        // the preceding clear(), and so detects that the executor it read belongs to an earlier listener.
        service_.store(&service, std::memory_order_release);
        executor_.store(&executor, std::memory_order_release);
    }
    /// On that processor before the service is destroyed, or on another one that keeps the service alive.
    void clear() { executor_.store(nullptr, std::memory_order_relaxed); }
    /// Relaxed: for the writer only.
    bool is_set() const { return executor_.load(std::memory_order_relaxed) != nullptr; }
    /// For a handler on the processor of `here`. False: no service of that executor listens.
    inline bool raise_on(Executor& here) {
        Service* const service = load(&here);
        if (service == nullptr) {
            return false;
        }
        here.raise(*service);
        return true;
    }
    /// Callable on any processor that keeps the service alive.
    void raise() {
        Executor* const executor = executor_.load(std::memory_order_relaxed);
        if (Service* const service = executor != nullptr ? load(executor) : nullptr; service != nullptr) {
            executor->raise(*service);
        }
    }

  private:
    /// The service if it belongs to this executor, else nullptr.
    inline Service* load(const Executor* executor) const {
        if (executor_.load(std::memory_order_acquire) != executor) {
            return nullptr;
        }
        Service* const service = service_.load(std::memory_order_acquire);
        // Relaxed: ordered by the acquire above. A different value means that set() ran between the two loads.
        return executor_.load(std::memory_order_relaxed) == executor ? service : nullptr;
    }

    std::atomic<Executor*> executor_{nullptr};
    std::atomic<Service*> service_{nullptr};
};

/// A timeout for an answer of a host, a device or another processor, starting now: in machine time of one executor,
/// restarted in full when the machine was stopped meanwhile, because the peer may have been stopped or restarted as
/// well. Stops extend it to at most twice its length.
class Bound {
  public:
    Bound(Executor& executor, Nanoseconds length) : executor_(&executor), begun_(executor.now()), length_(length) {}

    bool passed() const { return executor_->now() >= due(); }
    bool passed(Instant now) const { return now >= due(); }
    /// The current deadline: a machine stop may still move it.
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

/// An event raised by interrupt handlers and awaited by one coroutine, with a bound. A raise without a waiter is
/// latched; further ones are merged with it.
class Signal final : public Service {
  public:
    explicit Signal(Executor& executor) : executor_(executor) { executor_.add(*this); }
    ~Signal() { executor_.remove(*this); }

    /// Callable from anywhere, including interrupt handlers. Release: pairs with the acquire exchange in drain().
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
    /// co_await signal.wait(bound) -> true: raised; false: the bound expired first. One waiter at a time, from its
    /// wait to its resumption; a second one causes a panic.
    Wait wait(const Bound& bound) { return {*this, bound}; }
    /// Without a bound: for events that may never occur.
    Wait wait() { return Wait(*this); }
    bool drain() override;
    bool arm() override {
        return waiting_ != nullptr && !waiting_->by_signal_ && raised_.load(std::memory_order_acquire);
    }
    bool wants_tick() const override { return false; }

  private:
    Executor& executor_;
    Wait* waiting_ = nullptr; // from wait to resumption
    std::atomic<bool> raised_{false};
};

/// Runs tasks concurrently and waits for all of them: group.spawn(…) any number of times, then co_await group.join().
/// The group owns its tasks: on destruction, unfinished ones are destroyed together with everything they wait for.
/// The first error is kept.
class TaskGroup {
  public:
    explicit TaskGroup(Executor& executor) : executor_(executor) {}
    TaskGroup(const TaskGroup&) = delete;
    TaskGroup& operator=(const TaskGroup&) = delete;
    ~TaskGroup();

    /// Queues the task; it runs when the executor next resumes ready coroutines. Error{exhausted}: no frame available.
    Result<void> spawn(Task<Result<void>> task);
    /// co_await group.join(): resumes once all tasks have finished; returns the first error, if any. One waiter at a
    /// time.
    auto join() {
        struct Awaiter {
            TaskGroup& group;
            std::coroutine_handle<> waiting{};
            explicit Awaiter(TaskGroup& g) : group(g) {}
            Awaiter(const Awaiter&) = delete;
            Awaiter& operator=(const Awaiter&) = delete;
            ~Awaiter() {
                if (waiting && group.joiner_.waiter == waiting) { // destroyed while waiting
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
    /// Number of tasks that have not finished.
    usize running() const { return running_; }

  private:
    struct Member {
        struct promise_type : PoolAllocated, ReadyNode {
            promise_type* next_member = nullptr;
            promise_type** link = nullptr; // the pointer to this node; nullptr: not in a group
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
