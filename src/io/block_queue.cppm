// The life of a block request, written once for all drivers. A queue owns the waiting, the splitting of a request into
// commands, the table of commands that the device has, part status, time-outs, cancelling, retries, event storms, the
// end of everything, and the counters. A transport is what differs: how a command is encoded, published and notified,
// how an answer is taken and checked, how the device is made to let go of a buffer, and what recovery the protocol has.
//
//   submit ──> waiting list ──prepare, send──> table of commands ──next──> finish ──> complete
//                  ^                                   │
//                  └── retry list <── failed, or the device was stopped
//
// What the queue promises: every request ends once; none is lost when another one fails; no buffer is used again while
// the device may access it; nothing is allocated; nothing spins. A request that its owner gives up (its frame dies) is
// forgotten at once: what cannot be fenced is quarantined [core.dma] until the device answers or is closed.
//
// A write that was given up may still reach the medium. Until the device has answered it, requests for the same sectors
// wait, so that it cannot undo what is acknowledged later.
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

/// What a transport makes of a command that it is offered.
enum class Fit : u8 {
    ok,      // Command::bytes of it fit into one command
    full,    // no room now: tried again when the device has answered something, and in each tick
    refused, // never; Command::refusal says why
};
enum class SendResult : u8 {
    sent,
    full,   // as Fit::full
    broken, // the device's side of the queue is damaged: BlockTransport::fault() says how, and the queue is closed
};

/// What an answer asks the queue to do instead of ending the command with its status.
enum class Retry : u8 {
    none,
    now,   // the same command again, at once; a few times, then its status counts
    later, // in the next tick; many times
    alone, // the request again, without neighbours; once, then its status counts
};

/// What a look for an answer finds.
enum class Next : u8 {
    none,
    one,
    broken, // as SendResult::broken
};

/// One checked answer. `id`: of a command in the table.
struct Completion {
    u64 id = 0;
    Status status = Status::ok;
    Retry retry = Retry::none;
};

/// How far a transport can keep the device from a command that nobody waits for any more.
enum class Fence : u8 {
    done,      // it neither touches the buffer nor the medium any more
    effect,    // it does not touch the buffer; a write may still reach the medium
    reachable, // it may do anything, until it answers
    stopped,   // the whole device has been stopped: it has no command at all any more, and is being reset
};

/// What a transport does about a device that is silent, or that has lost a command.
struct Recovery {
    enum class Kind : u8 {
        none,    // the device has answered after all: next() will say so
        give_up, // this command alone: its requests end as timed_out
        asked,   // the device was asked to answer everything (SCSI bus reset), and has a whole time-out for that
        stopped, // as Fence::stopped; commands are sent again when the reset is over
        close,   // what the device has ends as timed_out, the rest as device_gone, and the queue is closed
    };
    Kind kind = Kind::close;
    std::optional<Error> why; // for `close`; for `stopped`: the queue is closed as well, since no reset helps
};

/// What a transport says of requests that wait while the device has none: nothing comes free.
struct Stuck {
    enum class Kind : u8 { none, give_up, close };
    Kind kind = Kind::none;
    std::optional<Error> why; // of `close`, and for the log
};

/// A packet of a driver's own among the requests (a handshake, INQUIRY), and its answer. Owned by its sender, until it
/// is done or abandoned.
struct Exchange {
    explicit Exchange(Executor& executor) : done(executor) {}
    Latch done;
    bool answered = false; // when done: false means that the queue was closed, or the device stopped
    u64 id = 0;
};

class QueuedDevice;

/// What the device has been given: part of a request, several whole neighbouring requests, or an exchange.
struct QueuedCommand {
    QueuedDevice* device = nullptr;
    Request* first = nullptr; // its requests, through Request::link; nullptr, and no exchange: nobody waits any more
    Exchange* exchange = nullptr;
    Op op = Op::read;
    Status refusal = Status::io_error;
    u8 retries = 0;
    bool gathered = false;   // several requests
    bool thinned = false;    // some of these were given up: it is not sent again as it was
    bool delayed = false;    // not with the device: sent again in the next tick
    bool reset = false;      // it was with the device when that was asked to answer everything
    bool expired = false;    // because of it: it is not sent again after that
    bool late_write = false; // for some of it nobody waits, and that may still reach the medium
    u64 lba = 0;             // of its first sector
    u32 offset = 0;          // of its data in the first request's buffer, in bytes
    u32 bytes = 0;           // of data: that of all its requests together
    u64 number = 0;          // in order of issue, from 1, never repeated; 0: an exchange

    inline DmaSpan data() const { return first->buffer.subspan(offset, bytes); } // not for gathered ones
};

/// The same with what a transport keeps for it.
template <class T>
struct Command : QueuedCommand {
    typename T::Wire wire{};

    typename T::Disk& disk() const { return static_cast<typename T::Disk&>(*device); }
};
template <class T>
using CommandTable = SlotTable<Command<T>, T::max_commands>;

/// A transport. Not shared between processors: each lane of a disk has one, in its queue. All calls come from the
/// queue, on the executor's processor. An Error closes the queue: with protocol_error if its code is Code::protocol,
/// else with device_gone.
template <class T>
concept BlockTransport =
    requires(T& t, const T& constant, CommandTable<T>& commands, Command<T>& command, const Command<T>& sent,
             const Request& neighbour, Completion& completion, u64 id, Status status, Counters& counters,
             OldestWait::Finding finding, OldestWait::Seen seen, std::string_view names, Instant now, bool flag) {
        typename T::Disk;                                       // a QueueDisk<T>
        typename T::Wire;                                       // what it keeps for each command
        { T::driver } -> std::convertible_to<std::string_view>; // for log lines while there is no disk
        { T::max_commands } -> std::convertible_to<u32>;        // so many are with the device at most
        { T::kept_commands } -> std::convertible_to<u32>;       // of these, for exchanges alone
        { T::gathers } -> std::convertible_to<bool>;            // join() makes one command of neighbours
        { T::max_idle_events } -> std::convertible_to<u32>;     // events without an answer within idle_window: a storm,
        { T::idle_window } -> std::convertible_to<Nanoseconds>; // and no more are asked for until it is over
        /// Once: where its commands are.
        { t.use(commands) } -> std::same_as<void>;
        /// Lowers command.bytes to what fits into one command, and reserves what send() needs.
        { t.prepare(command) } -> std::same_as<Fit>;
        /// Encodes the command under `id`. The device sees it here or in publish(). A transport that gathers has
        /// reserved its room in prepare(): it is never full here. Called again, under a new id, without prepare() and
        /// without finish() in between, when the command is sent again [Retry::now, later]: full is allowed then.
        { t.send(command, id) } -> std::same_as<SendResult>;
        /// Makes what was sent visible, and notifies the device once at most.
        { t.publish(counters) } -> std::same_as<Result<void>>;
        /// The next answer, checked: a known id, once, of a command that is with the device. Nothing: no more now. What
        /// the answer to an exchange holds has been copied to it.
        { t.next(completion) } -> std::same_as<Next>;
        /// After a batch of answers, before more is sent: their room is free.
        { t.release(counters) } -> std::same_as<Result<void>>;
        /// After the last send of a turn: an idle device comes to rest; accesses so far are counted.
        { t.settle(counters) } -> std::same_as<void>;
        /// Asks for an event when an answer comes and looks once more. True: one is there already.
        { t.arm() } -> std::same_as<Result<bool>>;
        /// Events that have come so far, modulo 2^32.
        { constant.events() } -> std::same_as<u32>;
        /// The command has ended, once for each: what prepare() and send() took comes back, and data that was bounced
        /// is copied. Also of one that send() had no room for, and of an exchange that was sent. Nobody waits for it:
        /// command.first is nullptr. False: the device may still access the buffer, although it has answered.
        { t.finish(command, status) } -> std::same_as<bool>;
        /// The command's requests end now; at most once for a command that is not gathered. What it returns for a
        /// gathered command is reachable or stopped. After `stopped` it is not called for the other commands: they are
        /// taken back.
        { t.fence(command) } -> std::same_as<Fence>;
        { t.recover(sent, finding, names) } -> std::same_as<Recovery>;
        /// Recovery::asked has not helped for a whole time-out. `flag`: a write is among what was not answered. An
        /// error closes the queue.
        { t.asked_in_vain(flag) } -> std::same_as<std::optional<Error>>;
        { t.stuck(names) } -> std::same_as<Stuck>;
        /// Adds what other queues of the same device have, and were answered.
        { t.seen(seen) } -> std::same_as<OldestWait::Seen>;
        /// `flag`: requests wait for room.
        { t.tick(now, flag) } -> std::same_as<Result<void>>;
        /// Whether tick() has something to do while there are neither commands nor requests that wait. What makes it
        /// true raises the queue.
        { constant.wants_tick() } -> std::same_as<bool>;
        /// The queue, set by it: what an interrupt handler raises [io.executor raise].
        { t.queue } -> std::same_as<Service*&>;
        /// How another queue of the same device has closed it; looked at in each turn.
        { constant.closed_elsewhere() } -> std::same_as<std::optional<Status>>;
        /// After SendResult::broken: the rule that the device broke.
        { t.fault() } -> std::same_as<Error>;
        /// Before close() ends everything with `status`. False: another queue of the device has said why.
        { t.closing(status) } -> std::same_as<bool>;
        /// Everything has ended. `flag`: by stop().
        { t.closed(flag) } -> std::same_as<void>;
    };

/// What a transport inherits where its protocol has nothing of the kind. Not virtual: a transport hides what it has.
struct TransportDefaults {
    Service* queue = nullptr;
    static constexpr u32 kept_commands = 0;
    static constexpr bool gathers = false;
    static constexpr u32 max_idle_events = 256;
    static constexpr Nanoseconds idle_window = 1'000'000'000;
    inline Result<void> publish(Counters&) { return {}; }
    Result<void> release(Counters&) { return {}; }
    void settle(Counters&) {}
    Result<bool> arm() { return false; }
    u32 events() const { return 0; }
    std::optional<Error> asked_in_vain(bool) { return std::nullopt; }
    Stuck stuck(std::string_view) {
        return {Stuck::Kind::close,
                Error{Code::timed_out, "requests wait, and for a whole time-out no room came free"}};
    }
    OldestWait::Seen seen(OldestWait::Seen own) { return own; }
    Result<void> tick(Instant, bool) { return {}; }
    bool wants_tick() const { return false; }
    std::optional<Status> closed_elsewhere() const { return std::nullopt; }
    Error fault() const { return {Code::protocol, "the device's side of the queue is damaged"}; }
    bool closing(Status) { return true; }
    void closed(bool) {}
};

/// A disk, or a lane of one, whose requests go through a queue; several may share one.
class QueuedDevice : public BlockDevice {
  public:
    /// log2 of the sector size in bytes.
    inline u32 sector_shift() const { return sector_shift_; }
    bool removed() const override { return false; }

  protected:
    explicit QueuedDevice(Executor& executor) : BlockDevice(executor) {}
    ~QueuedDevice() = default;
    /// Before the disk is announced.
    void set_geometry(const Geometry& geometry) {
        geometry_ = geometry;
        sector_shift_ = static_cast<u32>(std::countr_zero(geometry.sector_size));
    }

  private:
    friend class QueueCore;
    template <class T>
    friend class BlockQueue;
    inline bool parked() const { return !waiting_.empty() || !retry_.empty(); }

    RequestQueue retry_;   // to be sent again, alone; before those that wait
    RequestQueue waiting_; // not, or not wholly, sent
    u32 sector_shift_ = 9;
    QueuedDevice* next_ = nullptr; // in the queue's ring of disks; nullptr: in none
};

/// What does not depend on the transport: everything but the path of an I/O that ends well. BlockQueue is the one class
/// that derives from it.
class QueueCore : public Service {
  public:
    static constexpr u32 retries_at_once = 3;
    static constexpr u32 retries_later = 200;

    inline Executor& executor() const { return executor_; }
    /// Takes requests from here on. `timeout`: how long the device may be silent.
    void open(Nanoseconds timeout);
    /// Ends everything with `status`, says why, and takes no more.
    void close(Status status, const Error& why) { close(status, status, why); }
    /// The same with device_gone and without a word, and out of the executor. May be opened again.
    void stop();
    inline bool is_open() const { return state_ == State::open; }
    /// The device can no longer access anything: the slots and quarantined buffers of a closed queue come back.
    void reclaim();

    void add(QueuedDevice& disk);
    void remove(QueuedDevice& disk);

    /// Sends an exchange; what it holds belongs to the transport's own type. Error{exhausted}: no room now.
    Result<void> send(Exchange& exchange);
    /// Nobody waits for it any more; a late answer is taken silently.
    void abandon(Exchange& exchange);
    bool is_under_way(const Exchange& exchange) const {
        return slots_->has(exchange.id) && at(exchange.id).exchange == &exchange;
    }
    /// Commands that the device has, those of requests that were given up included.
    inline u32 under_way() const { return static_cast<u32>(slots_->size()); }
    inline Nanoseconds timeout() const { return timeout_; }

    bool cancel(Request& request);
    void forget(Request& request);
    void tick(Instant now) override;
    bool wants_tick() const override {
        return state_ == State::open &&
               (!slots_->empty() || parked_ != 0 || idle_events_ != 0 || transport_wants_tick());
    }

  protected:
    enum class State : u8 { closed, open, shut };
    struct Limits {
        std::string_view driver;
        u32 max_idle_events;
        Nanoseconds idle_window;
        usize stride; // bytes from one command to the next
    };
    QueueCore(Executor& executor, const Limits& limits) : executor_(executor), limits_(limits) {}
    ~QueueCore() = default;
    /// Once: the table, and its first command.
    void use(SlotIndex& slots, QueuedCommand* commands) {
        slots_ = &slots;
        commands_ = reinterpret_cast<std::byte*>(commands);
    }

    // The transport; see BlockTransport.
    virtual SendResult transport_send(QueuedCommand& command, u64 id) = 0;
    virtual void transport_settle() = 0;
    virtual u32 transport_events() const = 0;
    virtual bool transport_finish(QueuedCommand& command, Status status) = 0;
    virtual Fence transport_fence(QueuedCommand& command) = 0;
    virtual Recovery transport_recover(const QueuedCommand& command, OldestWait::Finding finding,
                                       std::string_view names) = 0;
    virtual std::optional<Error> transport_asked_in_vain(bool writes) = 0;
    virtual Stuck transport_stuck(std::string_view names) = 0;
    virtual OldestWait::Seen transport_seen(OldestWait::Seen own) = 0;
    virtual Result<void> transport_tick(Instant now, bool waiting) = 0;
    virtual bool transport_wants_tick() const = 0;
    virtual Error transport_fault() = 0;
    virtual bool transport_closing(Status status) = 0;
    virtual void transport_closed(bool stopped) = 0;
    /// Requests that found no room before; the disks take turns. True: something was sent.
    virtual bool pump() = 0;

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
    bool blocked(const QueuedDevice& disk, const Request& request);
    bool retry(u64 id, QueuedCommand& command, Retry how);
    void end_late(u64 id, QueuedCommand& command, bool safe);
    inline void end_part(Request& request, Status status) {
        if (status != Status::ok) [[unlikely]] {
            note_error(request, status);
        }
        if (--request.parts != 0 || request.issued != request.buffer.size) {
            return;
        }
        if (request.again && request.part_status == Status::ok) [[unlikely]] {
            requeue(request);
        } else {
            done_.push(request);
        }
    }
    void note_error(Request& request, Status status);
    void note_held(u64 id, const QueuedDevice& device, Request& request);
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
    inline void count_events(u32 events, bool answered) {
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
    }
    inline Counters& charged() { return current_ != nullptr ? current_->counters_ : nobody_; }
    void end_everything(Status status, Status with_device, bool stopped = false);
    void fail(const Error& why) {
        close(why.code == Code::protocol ? Status::protocol_error : Status::device_gone, why);
    }

    Executor& executor_;
    SlotIndex* slots_ = nullptr;
    std::byte* commands_ = nullptr; // QueuedCommand is the first base of each entry
    const Limits limits_;
    State state_ = State::closed;
    Nanoseconds timeout_ = 0;
    QueuedDevice* disks_ = nullptr; // a ring; whose turn it is to send
    u32 disk_count_ = 0;
    QueuedDevice* current_ = nullptr; // is charged for notifications and interrupts: the one that was active last
    u32 parked_ = 0;                  // requests in the lists of all disks
    u32 late_writes_ = 0;             // commands with late_write
    u64 issued_ = 0;                  // commands so far, exchanges excluded
    u64 answered_ = 0;                // of them, those that were answered, late ones included
    RequestQueue done_;               // have ended in this batch; complete_done() makes their waiters ready
    u32 idle_events_ = 0;

  private:
    void send_delayed();
    void close(Status status, Status with_device, const Error& why);
    void give_up_waiting(const Error& why);
    void give_up(Request& request, Status status);
    void give_up_all(QueuedCommand& command);
    void detach(Request& request);
    bool detach(u64 id, QueuedCommand& command, Request& request, bool stopped);
    void orphan(u64 id, QueuedCommand& command, Fence fence);
    void take_back_everything(const QueuedCommand* expired);
    void look_at_time();
    void recover(QueuedCommand& command, OldestWait::Finding finding);
    void ask(const QueuedCommand& oldest);
    void give_up_after_asking();
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

    u32 delayed_ = 0; // commands that wait for the next tick
    u32 events_seen_ = 0;
    Instant idle_until_ = 0;
    bool storm_told_ = false;
    Counters nobody_; // for what happens while no disk is there
    OldestWait oldest_;
    OldestWait stuck_;           // of requests that wait while the device has none
    std::optional<Bound> asked_; // since the device was asked to answer everything
    u64 asked_issued_ = 0;       // issued_ then
};

/// One queue of a device, on one processor, with the disks that use it. Registered with its executor from open() to
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
    /// What is still quarantined stays so for good: reclaim() first where the device has let go.
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
    void gather(Command& command, RequestQueue& from)
        requires(T::gathers);
    bool pump() override;
    void take(const Completion& completion);
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
    std::optional<Error> transport_asked_in_vain(bool writes) override { return transport_.asked_in_vain(writes); }
    Stuck transport_stuck(std::string_view names) override { return transport_.stuck(names); }
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

// ---- the path of an I/O that ends well ----

template <class T>
inline void BlockQueue<T>::submit(QueuedDevice& disk, Request& request) {
    if (state_ != State::open || static_cast<typename T::Disk&>(disk).removed()) [[unlikely]] {
        return complete(request, Status::device_gone);
    }
    if (T::gathers) { // sent at the end of the turn, when its neighbours are here too
        park(disk.waiting_, request);
    } else if (disk.parked()) [[unlikely]] {
        park(disk.waiting_, request);
    } else if (issue(disk, request, nullptr, false) != Issued::all) [[unlikely]] {
        if (state_ != State::open) { // found broken just now: what was sent of it has ended
            if (request.pending()) {
                complete(request, Status::protocol_error);
            }
            return;
        }
        park(disk.waiting_, request);
    }
    executor_.touch(*this);
}

/// Sends as much of the request as there is room for. `from`: the list that it is the head of, and leaves when all of
/// it is sent; nullptr: none. `alone`: no neighbours are gathered.
template <class T>
inline BlockQueue<T>::Issued BlockQueue<T>::issue(QueuedDevice& disk, Request& request, RequestQueue* from,
                                                  bool alone) {
    Issued result = Issued::none;
    for (;;) {
        if (table_.size() >= T::max_commands - T::kept_commands || (late_writes_ != 0 && blocked(disk, request)))
            [[unlikely]] {
            return result;
        }
        const u64 id = *table_.take();
        Command& command = table_[id];
        command.device = &disk;
        command.first = &request;
        command.exchange = nullptr;
        command.op = request.op;
        command.offset = request.issued;
        command.bytes = request.buffer.size - request.issued;
        command.lba = request.lba + (request.issued >> disk.sector_shift_);
        command.retries = 0;
        command.gathered = command.thinned = command.delayed = false;
        command.reset = command.expired = command.late_write = false;
        if (const Fit fit = transport_.prepare(command); fit != Fit::ok) [[unlikely]] {
            command.first = nullptr;
            table_.give(id);
            if (fit == Fit::full) {
                return result;
            }
            if (from != nullptr) {
                static_cast<void>(unpark(request));
            }
            request.issued = request.buffer.size; // the rest cannot be sent either
            request.part_status = command.refusal;
            if (request.parts == 0) {
                complete(request, command.refusal);
            }
            return Issued::all;
        }
        command.number = ++issued_;
        request.issued += command.bytes;
        ++request.parts;
        const bool whole = request.issued == request.buffer.size;
        if (whole && from != nullptr) {
            static_cast<void>(from->pop());
            --parked_;
            if constexpr (T::gathers) {
                if (!alone && command.offset == 0) {
                    gather(command, *from);
                }
            }
        }
        const SendResult sent = transport_.send(command, id);
        if (sent != SendResult::sent) [[unlikely]] {
            if (sent == SendResult::broken) {
                fail(transport_.fault());
                return result;
            }
            request.issued -= command.bytes;
            --request.parts;
            static_cast<void>(transport_.finish(command, Status::cancelled));
            command.first = nullptr;
            table_.give(id);
            if (whole && from != nullptr) {
                from->push_front(request);
                ++parked_;
            }
            return result;
        }
        current_ = &disk;
        result = Issued::some;
        if (whole) {
            return Issued::all;
        }
    }
}

/// The requests at the head of `from` that continue the command's last one, as many as the transport joins.
template <class T>
void BlockQueue<T>::gather(Command& command, RequestQueue& from)
    requires(T::gathers)
{
    Request* last = command.first;
    last->link = nullptr;
    while (Request* next = from.front()) {
        if (next->op != command.op || next->issued != 0 ||
            next->lba != command.lba + (command.bytes >> command.device->sector_shift_) ||
            (late_writes_ != 0 && blocked(*command.device, *next)) || !transport_.join(command, *next)) {
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

/// Requests that found no room before; the disks take turns. True: something was sent.
template <class T>
bool BlockQueue<T>::pump() {
    bool sent = false;
    for (u32 idle = 0; parked_ != 0 && idle < disk_count_ && state_ == State::open;) {
        QueuedDevice& disk = *std::exchange(disks_, disks_->next_);
        const bool alone = !disk.retry_.empty();
        RequestQueue& list = alone ? disk.retry_ : disk.waiting_;
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
        static_cast<void>(pump());
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
    if (const auto status = transport_.closed_elsewhere()) [[unlikely]] {
        end_everything(*status, *status);
        return true;
    }
    count_events(transport_.events(), count != 0);
    if (count == 0) {
        return false;
    }
    if (auto released = transport_.release(charged()); !released) [[unlikely]] {
        fail(released.error());
        return true;
    }
    if (parked_ != 0 && pump()) { // first the device, so that it works while the requests are completed
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
    if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) [[unlikely]] {
        static_cast<void>(transport_.finish(command, completion.status));
        table_.give(completion.id);
        exchange->answered = true;
        exchange->done.open();
        return;
    }
    answered_ += command.number != 0 ? 1 : 0;
    if (completion.retry != Retry::none && command.first != nullptr && retry(completion.id, command, completion.retry))
        [[unlikely]] {
        return;
    }
    end_command(completion.id, command, completion.status);
}

/// The device no longer has the command.
template <class T>
[[gnu::always_inline]] inline void BlockQueue<T>::end_command(u64 id, Command& command, Status status) {
    const bool safe = transport_.finish(command, status);
    Request* request = std::exchange(command.first, nullptr);
    if (request == nullptr || command.thinned) [[unlikely]] {
        end_late(id, command, safe);
        if (request == nullptr) {
            return table_.give(id);
        }
    }
    current_ = command.device;
    if (command.gathered && status != Status::ok) [[unlikely]] { // it may be any one of them
        command.first = request;
        requeue_all(command);
        table_.give(id);
        return;
    }
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        if (!safe) [[unlikely]] {
            note_held(id, *command.device, *request);
        }
        end_part(*request, status);
    }
    table_.give(id);
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
