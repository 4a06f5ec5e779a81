// The life cycle of a block request, common to all drivers. A queue owns the waiting list, splitting requests into
// commands, the table of commands sent to the device, partial status, timeouts, cancellation, retries, interrupt
// storm detection, shutdown and the counters. A transport supplies the protocol: how a command is encoded, published
// and notified, how an answer is taken and checked, how device access to a buffer is stopped, and how to recover.
//
//   submit ──> waiting list ──prepare, send──> table of commands ──next──> finish ──> complete
//                  ^                                   │
//                  └── retry list <── failed, or the device was stopped
//
// Guarantees: every request ends exactly once; none is lost when another one fails; no buffer is reused while the
// device may access it; no allocation; no spinning. A request abandoned by its owner (its frame is destroyed) is
// forgotten at once: a buffer that cannot be fenced is quarantined [core.dma] until the device answers or is closed.
//
// An abandoned write may still reach the medium. Until the device has answered it, requests for the same sectors
// wait, and on other queues of the same device all writes, so that it cannot overwrite data acknowledged later.
export module io.block_queue;
import core.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import io.executor;
import io.latch;
import io.block;
import io.oldest_wait;
export import io.slots;

export namespace fl::io {

/// A transport's answer when it is offered a command.
enum class Fit : u8 {
    ok,      // Command::bytes of it fit into one command
    full,    // no room now: retried after the device answers something, and in each tick
    refused, // never possible; Command::refusal gives the status
};
enum class SendResult : u8 {
    sent,
    full,   // as Fit::full
    broken, // the device corrupted the queue: BlockTransport::fault() describes it, and the queue is closed
};

/// What to do with an answered command instead of ending it with its status.
enum class Retry : u8 {
    none,
    now,   // resend the same command at once; after a few attempts its status counts
    later, // resend it in the next tick; many attempts
    alone, // resend the request in a command of its own; once, then its status counts
};

/// Result of a check for an answer.
enum class Next : u8 {
    none,
    one,
    broken, // as SendResult::broken
};

/// A validated answer. `id`: a command in the table.
struct Completion {
    u64 id = 0;
    Status status = Status::ok;
    Retry retry = Retry::none;
};

/// How far a transport can keep the device from a command that has no waiter any more.
enum class Fence : u8 {
    done,      // accesses neither the buffer nor the medium any more
    effect,    // does not access the buffer; a write may still reach the medium
    reachable, // may access both until it answers
    stopped,   // the whole device was stopped: it holds no commands, and is being reset
};

/// What a transport does about a device that does not answer, or has lost a command.
struct Recovery {
    enum class Kind : u8 {
        none,            // the device has answered after all: next() will return it
        give_up,         // end this command only: its requests end as timed_out
        reset_requested, // the device was asked to end all commands (SCSI bus reset), and has a full timeout to do so
        stopped,         // as Fence::stopped; commands are resent after the reset
        close,           // the device's commands end as timed_out, the rest as device_gone, and the queue is closed
    };
    Kind kind = Kind::close;
    std::optional<Error> why; // for `close`; for `stopped`: the queue is closed as well, because no reset can help
    // for `none`: the device is being stopped; then this command ends as timed_out, and the others are resent
    bool expired = false;
};

/// A transport's decision when requests wait while the device holds none: no room can become free.
struct Stuck {
    enum class Kind : u8 { none, give_up, close };
    Kind kind = Kind::none;
    std::optional<Error> why; // for `close`, and for the log
};

/// A driver's own packet (a handshake, INQUIRY) among the requests, and its answer. Owned by its sender until it is
/// done or abandoned.
struct Exchange {
    explicit Exchange(Executor& executor) : done(executor) {}
    Latch done;
    bool answered = false; // valid when done; false: the queue was closed or the device stopped
    u64 id = 0;
};

class QueuedDevice;

/// What has happened to a command: one word, so that one store resets it.
struct CommandState {
    Status refusal = Status::io_error;
    u8 retries = 0;
    bool gathered = false;   // contains several requests
    bool partial = false;    // some of them were abandoned: it is not resent as it was
    bool delayed = false;    // not with the device: resent in the next tick
    bool reset = false;      // was with the device when that was asked to end all commands
    bool expired = false;    // caused the reset: not resent after it, and ends as timed_out
    bool late_write = false; // part of it has no waiter any more and may still reach the medium
};
static_assert(sizeof(CommandState) == 8);

/// A command sent to the device: part of a request, several whole adjacent requests, or an exchange.
struct QueuedCommand : CommandState {
    QueuedDevice* device = nullptr;
    Request* first = nullptr; // its requests, through Request::link; nullptr and no exchange: no waiter any more
    Exchange* exchange = nullptr;
    u64 lba = 0;    // of its first sector
    u32 offset = 0; // of its data in the first request's buffer, in bytes
    u32 bytes = 0;  // of data: total of all its requests
    u64 number = 0; // in order of issue, from 1, never reused; 0: an exchange
    Op op = Op::read;

    inline DmaSpan data() const { return first->buffer.subspan(offset, bytes); } // not for gathered ones
};

/// The same with the transport's per-command state.
template <class T>
struct Command : QueuedCommand {
    typename T::Wire wire{};

    typename T::Disk& disk() const { return static_cast<typename T::Disk&>(*device); }
};
template <class T>
using CommandTable = SlotTable<Command<T>, T::max_commands>;

/// A transport. Not shared between processors: each lane of a disk has its own, in its queue. All calls come from the
/// queue, on the executor's processor. An Error closes the queue: with protocol_error if its code is Code::protocol,
/// else with device_gone.
template <class T>
concept BlockTransport = requires(T& t, const T& constant, CommandTable<T>& commands, Command<T>& command,
                                  const Command<T>& sent, const Request& neighbour, Completion& completion, u64 id,
                                  Status status, Counters& counters, OldestWait::Finding finding, OldestWait::Seen seen,
                                  std::string_view names, Instant now, bool flag, i32 change, u32 count) {
    typename T::Disk;                                       // a QueueDisk<T>
    typename T::Wire;                                       // the transport's per-command state
    { T::driver } -> std::convertible_to<std::string_view>; // for log lines while there is no disk
    { T::max_commands } -> std::convertible_to<u32>;        // at most this many commands with the device
    { T::reserved_commands } -> std::convertible_to<u32>;   // of these, reserved for exchanges
    { T::gathers } -> std::convertible_to<bool>;            // join() merges adjacent requests into one command
    { T::max_idle_events } -> std::convertible_to<u32>;     // events without an answer within idle_window: a storm,
    { T::idle_window } -> std::convertible_to<Nanoseconds>; // events stay disabled until it is over
    /// Called once: the table of its commands.
    { t.use(commands) } -> std::same_as<void>;
    /// Reduces command.bytes to what fits into one command, and reserves what send() needs.
    { t.prepare(command) } -> std::same_as<Fit>;
    /// Encodes the command under `id`. The device sees it here or in publish(). A transport that gathers has
    /// reserved room in prepare(), so it is never full here. Called again under a new id, without prepare() or
    /// finish() in between, to resend the command [Retry::now, later]; it may be full then.
    { t.send(command, id) } -> std::same_as<SendResult>;
    /// Makes sent commands visible to the device, and notifies it at most once.
    { t.publish(counters) } -> std::same_as<Result<void>>;
    /// The next answer, validated: a known id, once only, of a command that is with the device. Next::none:
    /// nothing has been answered yet. The answer to an exchange has been copied to it.
    { t.next(completion) } -> std::same_as<Next>;
    /// After a batch of answers, before more commands are sent: frees the space of the answers.
    { t.release(counters) } -> std::same_as<Result<void>>;
    /// After the last send of a turn: quiesces an idle device and counts the accesses so far.
    { t.settle(counters) } -> std::same_as<void>;
    /// Enables an event for the next answer, then checks once more. True: an answer is already available.
    { t.arm() } -> std::same_as<Result<bool>>;
    /// An event has arrived, and the processor polls [Executor::polling]: from now on next() finds answers without an
    /// event, and the device should raise none, until arm(). For devices whose events cost an access to switch off or
    /// on. So a processor that sleeps between its answers never pays for it.
    { t.silence() } -> std::same_as<void>;
    /// Number of events so far, modulo 2^32.
    { constant.events() } -> std::same_as<u32>;
    /// The command has ended; called once for each: releases what prepare() and send() took, and copies bounced
    /// data. Also called for a command that send() had no room for, and for an exchange that was sent.
    /// command.first is nullptr if it has no waiter. False: the device may still access the buffer, although it
    /// has answered.
    { t.finish(command, status) } -> std::same_as<bool>;
    /// The command's requests end now; called at most once for a command that is not gathered. For a gathered
    /// command it returns reachable or stopped. After `stopped` it is not called for the other commands: they are
    /// taken back.
    { t.fence(command) } -> std::same_as<Fence>;
    { t.recover(sent, finding, names) } -> std::same_as<Recovery>;
    /// Recovery::reset_requested had no effect for a full timeout. `flag`: an unanswered command is a write. An error
    /// closes the queue.
    { t.reset_ineffective(flag) } -> std::same_as<std::optional<Error>>;
    { t.stuck(names) } -> std::same_as<Stuck>;
    /// The number of this queue's abandoned writes that may still reach the medium has changed by 1 or -1.
    { t.count_late_writes(change) } -> std::same_as<void>;
    /// Whether other queues of the same device have such writes; `count`: those of this queue. Until they are
    /// answered, this queue sends no writes.
    { constant.late_writes_elsewhere(count) } -> std::same_as<bool>;
    /// Adds the outstanding commands and answers of other queues of the same device.
    { t.seen(seen) } -> std::same_as<OldestWait::Seen>;
    /// `flag`: requests wait for room.
    { t.tick(now, flag) } -> std::same_as<Result<void>>;
    /// Whether tick() has work while there are neither commands nor waiting requests. A change to true must raise
    /// the queue.
    { constant.wants_tick() } -> std::same_as<bool>;
    /// Set by the queue to itself: what an interrupt handler raises [io.executor raise].
    { t.queue } -> std::same_as<Service*&>;
    /// The status with which another queue of the same device closed it; checked in each turn.
    { constant.closed_by_peer() } -> std::same_as<std::optional<Status>>;
    /// After SendResult::broken: the violated rule.
    { t.fault() } -> std::same_as<Error>;
    /// Before close() ends everything with `status`. False: another queue of the device has logged the reason.
    { t.closing(status) } -> std::same_as<bool>;
    /// Everything has ended. `flag`: by stop().
    { t.closed(flag) } -> std::same_as<void>;
};

/// Defaults for protocols without a feature. Not virtual: a transport hides the members it implements.
struct TransportDefaults {
    Service* queue = nullptr;
    static constexpr u32 reserved_commands = 0;
    static constexpr bool gathers = false;
    static constexpr u32 max_idle_events = 256;
    static constexpr Nanoseconds idle_window = 1'000'000'000;
    inline Result<void> publish(Counters&) { return {}; }
    Result<void> release(Counters&) { return {}; }
    inline void settle(Counters&) {}
    Result<bool> arm() { return false; }
    void silence() {}
    u32 events() const { return 0; }
    std::optional<Error> reset_ineffective(bool) { return std::nullopt; }
    Stuck stuck(std::string_view) {
        return {Stuck::Kind::close, Error{Code::timed_out, "requests wait, and no room became free within a time-out"}};
    }
    void count_late_writes(i32) {}
    bool late_writes_elsewhere(u32) const { return false; }
    OldestWait::Seen seen(OldestWait::Seen own) { return own; }
    Result<void> tick(Instant, bool) { return {}; }
    bool wants_tick() const { return false; }
    std::optional<Status> closed_by_peer() const { return std::nullopt; }
    Error fault() const { return {Code::protocol, "the device's side of the queue is damaged"}; }
    bool closing(Status) { return true; }
    void closed(bool) {}
};

/// A disk, or a lane of one, whose requests go through a queue; several disks may share a queue.
class QueuedDevice : public BlockDevice {
  public:
    /// log2 of the sector size in bytes.
    inline u32 sector_shift() const { return sector_shift_; }
    bool removed() const override { return false; }

  protected:
    explicit QueuedDevice(Executor& executor) : BlockDevice(executor) {}
    ~QueuedDevice() = default;
    /// Call before the disk is announced.
    void set_geometry(const Geometry& geometry) {
        geometry_ = geometry;
        sector_shift_ = static_cast<u32>(std::countr_zero(geometry.sector_size));
    }

  private:
    friend class QueueCore;
    template <class T>
    friend class BlockQueue;
    inline bool parked() const { return !waiting_.empty() || !retry_.empty(); }

    RequestQueue retry_;   // to be resent, each alone; sent before waiting requests
    RequestQueue waiting_; // not sent, or only in part
    u32 sector_shift_ = 9;
    QueuedDevice* next_ = nullptr; // ring of the queue's disks; nullptr: not in a ring
};

/// The transport-independent part: everything except the fast path. BlockQueue is the only class that derives from it.
class QueueCore : public Service {
  public:
    static constexpr u32 retries_at_once = 3;
    static constexpr u32 retries_later = 200;

    inline Executor& executor() const { return executor_; }
    /// Accepts requests from now on. `timeout`: how long the device may take without an answer.
    void open(Nanoseconds timeout);
    /// Ends everything with `status`, logs `why`, and accepts no more requests.
    void close(Status status, const Error& why) { close(status, status, why); }
    /// As close() with device_gone, but without logging; also removes the queue from the executor. May be reopened.
    void stop();
    inline bool is_open() const { return state_ == State::open; }
    /// The device can no longer access anything: frees the slots and quarantined buffers of a closed queue.
    void reclaim();

    void add(QueuedDevice& disk);
    void remove(QueuedDevice& disk);

    /// Sends an exchange, whose contents are of the transport's own type. Error{exhausted}: no room now.
    Result<void> send(Exchange& exchange);
    /// The driver has stopped the device, which holds no commands any more, while the queue is open: their requests
    /// wait to be sent again from now on. A request whose buffer the device can reach nevertheless ends as device_gone.
    /// Until the device has been set up again, the transport has no room [Fit::full].
    void take_back();
    /// The device has been set up again. Ends the waiting requests that its disks do not take any more, by
    /// BlockDevice::refusal(), and sends the others.
    void send_again();
    /// Drops the waiter; a late answer is consumed silently.
    void abandon(Exchange& exchange);
    bool is_in_flight(const Exchange& exchange) const {
        return slots_->has(exchange.id) && at(exchange.id).exchange == &exchange;
    }
    /// Commands held by the device, including those of abandoned requests.
    inline u32 in_flight() const { return static_cast<u32>(slots_->size()); }
    inline Nanoseconds timeout() const { return timeout_; }

    bool cancel(Request& request);
    void forget(Request& request);
    void tick(Instant now) override;
    bool wants_tick() const override {
        return state_ == State::open &&
               (!slots_->empty() || parked_ != 0 || idle_events_ != 0 || transport_wants_tick());
    }

    bool awaits_answer() const override { return state_ == State::open && !slots_->empty(); }

  protected:
    enum class State : u8 { stopped, open, closed }; // closed: by an error; still registered
    struct Limits {
        std::string_view driver;
        u32 max_idle_events;
        Nanoseconds idle_window;
        usize stride; // bytes between consecutive commands
    };
    QueueCore(Executor& executor, const Limits& limits) : executor_(executor), limits_(limits) {}
    ~QueueCore() = default;
    /// Called once: the table, and its first command.
    void use(SlotIndex& slots, QueuedCommand* commands) {
        slots_ = &slots;
        commands_ = reinterpret_cast<std::byte*>(commands);
    }

    // Implemented by the transport; see BlockTransport.
    virtual SendResult transport_send(QueuedCommand& command, u64 id) = 0;
    virtual void transport_settle() = 0;
    virtual u32 transport_events() const = 0;
    virtual bool transport_finish(QueuedCommand& command, Status status) = 0;
    virtual Fence transport_fence(QueuedCommand& command) = 0;
    virtual Recovery transport_recover(const QueuedCommand& command, OldestWait::Finding finding,
                                       std::string_view names) = 0;
    virtual std::optional<Error> transport_reset_ineffective(bool writes) = 0;
    virtual Stuck transport_stuck(std::string_view names) = 0;
    virtual void transport_count_late_writes(i32 change) = 0;
    virtual bool transport_late_writes_elsewhere() const = 0;
    virtual OldestWait::Seen transport_seen(OldestWait::Seen own) = 0;
    virtual Result<void> transport_tick(Instant now, bool waiting) = 0;
    virtual bool transport_wants_tick() const = 0;
    virtual Error transport_fault() = 0;
    virtual bool transport_closing(Status status) = 0;
    virtual void transport_closed(bool stopped) = 0;
    /// Sends waiting requests, round-robin over the disks. True: something was sent.
    virtual bool submit_waiting() = 0;

    inline QueuedCommand& at(SlotIndex::Id id) const {
        return *reinterpret_cast<QueuedCommand*>(commands_ + SlotIndex::slot_of(id) * limits_.stride);
    }
    template <class F>
    void for_each_command(F&& f) {
        const usize capacity = slots_->capacity();
        for (usize slot = 0; slot < capacity && !slots_->empty(); ++slot) {
            if (slots_->has_slot(slot)) {
                const u64 id = slots_->id_of(static_cast<u16>(slot));
                f(id, at(id));
            }
        }
    }

    inline void park(RequestQueue& list, Request& request) {
        list.push(request);
        ++parked_;
    }
    bool unpark(Request& request);
    void refuse(Request& request, Status status);
    bool blocked(const QueuedDevice& disk, const Request& request);
    bool retry(u64 id, QueuedCommand& command, Retry how);
    void end_late(u64 id, QueuedCommand& command, bool safe);
    /// One of the request's commands has ended. `at_once`: its waiter is made ready here, not by complete_done().
    inline void end_part(Request& request, Status status, bool at_once = false) {
        if (status != Status::ok) [[unlikely]] {
            note_error(request, status);
        }
        if (--request.parts != 0 || request.issued != request.buffer.size) [[unlikely]] {
            return;
        }
        if (request.resend) [[unlikely]] {
            if (request.part_status == Status::ok) {
                return requeue(request);
            }
        }
        if (at_once) {
            complete(request, request.part_status);
        } else {
            done_.push(request);
        }
    }
    void note_error(Request& request, Status status);
    void quarantine_buffer(u64 id, const QueuedDevice& device, Request& request);
    void requeue_all(QueuedCommand& command);
    void requeue(Request& request);
    inline void complete_done() {
        while (Request* request = done_.pop()) {
            complete(*request, request->part_status);
        }
    }
    static inline void complete(Request& request, Status status) {
        static_cast<QueuedDevice&>(request.device()).complete(request, status);
    }
    /// True: some arrived that the processor did not need.
    inline bool count_events(u32 events, bool answered) {
        const u32 fresh = events - std::exchange(events_seen_, events);
        if (answered) {
            idle_events_ = 0;
        } else if (fresh != 0) {
            if (idle_events_ == 0) {
                idle_until_ = after(executor_.turn_time(), limits_.idle_window);
            }
            idle_events_ += fresh;
        }
        charged().interrupts += fresh;
        return fresh != 0 && executor_.polling();
    }
    inline Counters& charged() { return current_ != nullptr ? current_->counters_ : unattributed_; }
    void end_everything(Status status, Status with_device, bool stopped = false);
    void fail(const Error& why) {
        close(why.code == Code::protocol ? Status::protocol_error : Status::device_gone, why);
    }

    Executor& executor_;
    SlotIndex* slots_ = nullptr;
    std::byte* commands_ = nullptr; // QueuedCommand is the first base of each entry
    const Limits limits_;
    State state_ = State::stopped;
    Nanoseconds timeout_ = 0;
    QueuedDevice* disks_ = nullptr; // a ring; its head sends next
    u32 disk_count_ = 0;
    QueuedDevice* current_ = nullptr; // charged with notifications and interrupts: the last active disk
    u32 parked_ = 0;                  // requests in the lists of all disks
    u32 late_writes_ = 0;             // commands with late_write set
    u64 issued_ = 0;                  // commands issued so far, excluding exchanges
    u64 answered_ = 0;                // of those, answered ones, including late answers
    RequestQueue done_;               // ended in this batch; complete_done() makes their waiters ready
    u32 idle_events_ = 0;
    bool bounded_ = false; // a request with a bound may be under way

  private:
    void send_delayed();
    void end_delayed(u64 id, QueuedCommand& command, Status status);
    void close(Status status, Status with_device, const Error& why);
    void fail_waiting(const Error& why);
    void end_unreachable(u64 id, QueuedCommand& command);
    void give_up(Request& request, Status status);
    void give_up_all(QueuedCommand& command);
    void detach(Request& request);
    bool detach(u64 id, QueuedCommand& command, Request& request, bool stopped);
    void orphan(u64 id, QueuedCommand& command, Fence fence);
    void reclaim_all(const QueuedCommand* expired);
    void check_timeouts();
    void count_late(i32 change);
    Request* find_overdue(Instant now);
    void recover(QueuedCommand& command, OldestWait::Finding finding);
    void request_reset(const QueuedCommand& oldest);
    void give_up_after_reset();
    FixedText<96> names() const;
    template <class F>
    void for_each_disk(F&& f) const {
        QueuedDevice* disk = disks_;
        for (u32 left = disk_count_; left != 0; --left) {
            QueuedDevice* const next = disk->next_;
            f(*disk);
            disk = next;
        }
    }

    u32 delayed_ = 0; // commands waiting for the next tick
    u32 events_seen_ = 0;
    Instant idle_until_ = 0;
    bool storm_logged_ = false;
    Counters unattributed_; // charged while there is no disk
    OldestWait oldest_;
    OldestWait stuck_;                 // for requests that wait while the device holds none
    std::optional<Bound> reset_bound_; // set when the device was asked to end all commands
    u64 reset_issued_ = 0;             // issued_ at that time
};

/// A queue of a device, on one processor, with the disks that use it. Registered with its executor from open() to
/// stop(). All members are called on the executor's processor.
template <class T>
class BlockQueue : public QueueCore {
  public:
    using Command = io::Command<T>;

    template <class... Arguments>
    explicit BlockQueue(Executor& executor, Arguments&&... arguments)
        : QueueCore(executor, {T::driver, T::max_idle_events, T::idle_window, sizeof(Command)}),
          transport_(std::forward<Arguments>(arguments)...) {
        static_assert(BlockTransport<T>);
        transport_.queue = this;
        use(table_, table_.entries());
        transport_.use(table_);
    }
    /// Buffers still quarantined stay so permanently: call reclaim() first if the device can no longer access them.
    virtual ~BlockQueue() {
        stop();
        keep_quarantine(this);
    }

    T& transport() { return transport_; }
    const T& transport() const { return transport_; }

    void submit(QueuedDevice& disk, Request& request);
    void flush() override;
    bool drain() override;
    bool arm() override;

  private:
    enum class Issued : u8 { all, some, none };

    Issued issue(QueuedDevice& disk, Request& request, RequestQueue* from, bool alone);
    Issued issue_part(QueuedDevice& disk, Request& request, RequestQueue* from, bool alone);
    /// issue() for a request in no list, which usually needs one command.
    [[gnu::always_inline]] inline Issued issue_new(QueuedDevice& disk, Request& request) {
        const Issued first = issue_part(disk, request, nullptr, false);
        if (first != Issued::some) [[likely]] {
            return first;
        }
        const Issued others = issue(disk, request, nullptr, false);
        return others == Issued::none ? first : others;
    }
    bool drop(u64 id, Command& command, Fit fit);
    void undo(u64 id, Command& command, SendResult sent, RequestQueue* from);
    void gather(Command& command, RequestQueue& from)
        requires(T::gathers);
    bool submit_waiting() override;
    /// Whether the request must wait for an abandoned write.
    inline bool must_wait(const QueuedDevice& disk, const Request& request) {
        return (late_writes_ != 0 && blocked(disk, request)) ||
               (changes_medium(request.op) && transport_.late_writes_elsewhere(late_writes_));
    }
    void take(const Completion& completion);
    void end_exchange(const Completion& completion, Command& command);
    void end_command(u64 id, Command& command, Status status);

    SendResult transport_send(QueuedCommand& command, u64 id) override {
        return transport_.send(static_cast<Command&>(command), id);
    }
    void transport_settle() override { transport_.settle(charged()); }
    u32 transport_events() const override { return transport_.events(); }
    bool transport_finish(QueuedCommand& command, Status status) override {
        return transport_.finish(static_cast<Command&>(command), status);
    }
    Fence transport_fence(QueuedCommand& command) override { return transport_.fence(static_cast<Command&>(command)); }
    Recovery transport_recover(const QueuedCommand& command, OldestWait::Finding finding,
                               std::string_view names) override {
        return transport_.recover(static_cast<const Command&>(command), finding, names);
    }
    std::optional<Error> transport_reset_ineffective(bool writes) override {
        return transport_.reset_ineffective(writes);
    }
    Stuck transport_stuck(std::string_view names) override { return transport_.stuck(names); }
    void transport_count_late_writes(i32 change) override { transport_.count_late_writes(change); }
    bool transport_late_writes_elsewhere() const override { return transport_.late_writes_elsewhere(late_writes_); }
    OldestWait::Seen transport_seen(OldestWait::Seen own) override { return transport_.seen(own); }
    Result<void> transport_tick(Instant now, bool waiting) override { return transport_.tick(now, waiting); }
    bool transport_wants_tick() const override { return transport_.wants_tick(); }
    Error transport_fault() override { return transport_.fault(); }
    bool transport_closing(Status status) override { return transport_.closing(status); }
    void transport_closed(bool stopped) override { transport_.closed(stopped); }

    CommandTable<T> table_;
    T transport_;
};

/// A disk whose queue has transport T.
template <class T>
class QueueDisk : public QueuedDevice {
  public:
    QueueDisk(Executor& executor, BlockQueue<T>& queue) : QueuedDevice(executor), queue_(queue) {}

  protected:
    ~QueueDisk() = default;
    void start(Request& request) override { queue_.submit(*this, request); }
    bool cancel_now(Request& request) override { return queue_.cancel(request); }
    void forget(Request& request) override { queue_.forget(request); }

  private:
    BlockQueue<T>& queue_;
};

// ---- fast path: an I/O that succeeds ----

template <class T>
inline void BlockQueue<T>::submit(QueuedDevice& disk, Request& request) {
    if (state_ != State::open || static_cast<typename T::Disk&>(disk).removed()) [[unlikely]] {
        return complete(request, Status::device_gone);
    }
    if (request.bound != 0) [[unlikely]] {
        request.begun = executor_.now();
        bounded_ = true;
    }
    if (T::gathers) { // sent at the end of the turn, together with adjacent requests
        park(disk.waiting_, request);
    } else if (disk.parked()) [[unlikely]] {
        park(disk.waiting_, request);
    } else if (issue_new(disk, request) != Issued::all) [[unlikely]] {
        if (state_ != State::open) { // found broken just now: the parts already sent have ended
            if (request.pending()) {
                complete(request, Status::protocol_error);
            }
            return;
        }
        park(disk.waiting_, request);
    }
    executor_.touch(*this);
}

/// Sends as much of the request as there is room for. `from`: the list whose head it is; it is removed once fully
/// sent; nullptr: none. `alone`: no adjacent requests are gathered.
template <class T>
[[gnu::noinline]] BlockQueue<T>::Issued BlockQueue<T>::issue(QueuedDevice& disk, Request& request, RequestQueue* from,
                                                             bool alone) {
    for (Issued result = Issued::none;; result = Issued::some) {
        const Issued part = issue_part(disk, request, from, alone);
        if (part != Issued::some) {
            return part == Issued::none ? result : part;
        }
    }
}

/// Sends the request's next command. Some: it needs another one.
template <class T>
[[gnu::always_inline]] inline BlockQueue<T>::Issued BlockQueue<T>::issue_part(QueuedDevice& disk, Request& request,
                                                                              RequestQueue* from, bool alone) {
    if (table_.free_slots() <= T::reserved_commands || must_wait(disk, request)) [[unlikely]] {
        return Issued::none;
    }
    const u64 id = table_.take_free();
    Command& command = table_[id];
    const u32 offset = request.issued;
    static_cast<CommandState&>(command) = {};
    command.device = &disk;
    command.first = &request;
    command.exchange = nullptr;
    command.op = request.op;
    command.offset = offset;
    command.bytes = request.buffer.size - offset;
    command.lba = request.lba + (offset >> disk.sector_shift_);
    if (const Fit fit = transport_.prepare(command); fit != Fit::ok) [[unlikely]] {
        return drop(id, command, fit) ? Issued::all : Issued::none;
    }
    command.number = ++issued_;
    const u32 end = offset + command.bytes;
    request.issued = end;
    ++request.parts;
    const bool whole = end == request.buffer.size;
    if (whole && from != nullptr) {
        static_cast<void>(from->pop());
        --parked_;
        if constexpr (T::gathers) {
            if (!alone && command.offset == 0) {
                gather(command, *from);
            }
        }
    }
    if (const SendResult sent = transport_.send(command, id); sent != SendResult::sent) [[unlikely]] {
        undo(id, command, sent, whole ? from : nullptr);
        return Issued::none;
    }
    current_ = &disk;
    return whole ? Issued::all : Issued::some;
}

/// The command does not fit. True: it never will, and its request has been refused.
template <class T>
[[gnu::noinline, clang::minsize]] bool BlockQueue<T>::drop(u64 id, Command& command, Fit fit) {
    Request& request = *std::exchange(command.first, nullptr);
    table_.free(id);
    if (fit == Fit::refused) {
        refuse(request, command.refusal);
    }
    return fit == Fit::refused;
}

/// The command was not sent: its request is as before. `from`: the list whose head that was.
template <class T>
[[gnu::noinline, clang::minsize]] void BlockQueue<T>::undo(u64 id, Command& command, SendResult sent,
                                                           RequestQueue* from) {
    if (sent == SendResult::broken) {
        return fail(transport_.fault());
    }
    static_cast<void>(transport_.finish(command, Status::cancelled));
    Request& request = *std::exchange(command.first, nullptr);
    table_.free(id);
    request.issued -= command.bytes;
    --request.parts;
    if (from != nullptr) {
        from->push_front(request);
        ++parked_;
    }
}

/// Adds requests at the head of `from` that continue the command's last one, as many as the transport joins.
template <class T>
void BlockQueue<T>::gather(Command& command, RequestQueue& from)
    requires(T::gathers)
{
    Request* last = command.first;
    last->link = nullptr;
    while (Request* next = from.front()) {
        if (next->op != command.op || next->issued != 0 ||
            next->lba != command.lba + (command.bytes >> command.device->sector_shift_) ||
            must_wait(*command.device, *next) || !transport_.join(command, *next)) {
            return;
        }
        static_cast<void>(from.pop());
        --parked_;
        next->issued = next->buffer.size;
        ++next->parts;
        next->link = nullptr;
        last->link = next;
        last = next;
        command.bytes += next->buffer.size;
        command.gathered = true;
    }
}

/// Sends waiting requests, round-robin over the disks. True: something was sent.
template <class T>
bool BlockQueue<T>::submit_waiting() {
    bool sent = false;
    for (u32 idle = 0; parked_ != 0 && idle < disk_count_ && state_ == State::open;) {
        QueuedDevice& disk = *std::exchange(disks_, disks_->next_);
        const bool alone = !disk.retry_.empty();
        RequestQueue& list = alone ? disk.retry_ : disk.waiting_;
        if (!list.empty() && static_cast<typename T::Disk&>(disk).removed()) [[unlikely]] {
            refuse(*list.front(), Status::device_gone); // another disk may be in its place
            idle = 0;
            continue;
        }
        const Issued issued = list.empty() ? Issued::none : issue(disk, *list.front(), &list, alone);
        sent = sent || issued != Issued::none;
        idle = issued == Issued::all ? 0 : idle + 1;
    }
    return sent;
}

template <class T>
void BlockQueue<T>::flush() {
    if (state_ != State::open) {
        return;
    }
    if (T::gathers) {
        static_cast<void>(submit_waiting());
    }
    if (auto published = transport_.publish(charged()); !published) [[unlikely]] {
        return fail(published.error());
    }
    transport_.settle(charged());
}

template <class T>
bool BlockQueue<T>::drain() {
    if (state_ != State::open) [[unlikely]] {
        return false;
    }
    u32 count = 0;
    for (;;) {
        Completion completion;
        const Next next = transport_.next(completion);
        if (next == Next::none) {
            break;
        }
        if (next == Next::broken) [[unlikely]] {
            fail(transport_.fault());
            return true;
        }
        ++count;
        take(completion);
        if (state_ != State::open) [[unlikely]] {
            return true;
        }
    }
    if (const auto status = transport_.closed_by_peer()) [[unlikely]] {
        end_everything(*status, *status);
        return true;
    }
    if (count_events(transport_.events(), count != 0)) [[unlikely]] {
        transport_.silence();
    }
    if (count == 0) {
        return false;
    }
    if (auto released = transport_.release(charged()); !released) [[unlikely]] {
        fail(released.error());
        return true;
    }
    if (parked_ != 0 && submit_waiting()) { // the device first, so that it works while requests are completed
        executor_.touch(*this);
    }
    if (state_ == State::open) {
        transport_.settle(charged());
    }
    complete_done();
    return true;
}

template <class T>
[[gnu::always_inline]] inline void BlockQueue<T>::take(const Completion& completion) {
    Command& command = table_[completion.id];
    if (command.exchange != nullptr) [[unlikely]] {
        return end_exchange(completion, command);
    }
    answered_ += command.number != 0 ? 1 : 0;
    if (completion.retry != Retry::none && command.first != nullptr && retry(completion.id, command, completion.retry))
        [[unlikely]] {
        return;
    }
    end_command(completion.id, command, completion.status);
}

template <class T>
[[gnu::noinline, clang::minsize]] void BlockQueue<T>::end_exchange(const Completion& completion, Command& command) {
    Exchange* const exchange = std::exchange(command.exchange, nullptr);
    static_cast<void>(transport_.finish(command, completion.status));
    table_.free(completion.id);
    exchange->answered = true;
    exchange->done.open();
}

/// Called when the device no longer holds the command.
template <class T>
[[gnu::always_inline]] inline void BlockQueue<T>::end_command(u64 id, Command& command, Status status) {
    const bool safe = transport_.finish(command, status);
    Request* request = std::exchange(command.first, nullptr);
    if (request == nullptr || command.partial) [[unlikely]] {
        end_late(id, command, safe);
        if (request == nullptr) {
            return table_.free(id);
        }
    }
    current_ = command.device;
    if (T::gathers && command.gathered && status != Status::ok) [[unlikely]] { // any one of them may have failed
        command.first = request;
        requeue_all(command);
        table_.free(id);
        return;
    }
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = T::gathers && command.gathered ? request->link : nullptr;
        if (!safe) [[unlikely]] {
            quarantine_buffer(id, *command.device, *request);
        }
        end_part(*request, status, parked_ == 0); // else the device gets the waiting ones first
    }
    table_.free(id);
}

template <class T>
bool BlockQueue<T>::arm() {
    if (state_ != State::open || idle_events_ >= T::max_idle_events) {
        return false;
    }
    const Result<bool> found = transport_.arm();
    if (!found) [[unlikely]] {
        fail(found.error());
        return true;
    }
    return *found;
}

} // namespace fl::io
