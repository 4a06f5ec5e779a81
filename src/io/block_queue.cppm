// The life of a block request, written once for all drivers. A queue owns the waiting, the splitting of a request into
// commands, the table of commands that the device has, part status, time-outs, cancelling, retries, event storms, the end
// of everything, and the counters. A transport is what differs: how a command is encoded, published and notified, how an
// answer is taken and checked, how the device is made to let go of a buffer, and what recovery the protocol has.
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
        close,   // everything ends as timed_out, and the queue is closed
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
    bool answered = false; // when done: false means that the queue was closed
    u64 id = 0;
};

/// What the device has been given: part of a request, several whole neighbouring requests, or an exchange.
template <class T>
struct Command {
    typename T::Disk* disk = nullptr;
    Request* first = nullptr; // its requests, through Request::link; nullptr, and no exchange: nobody waits any more
    Exchange* exchange = nullptr;
    Op op = Op::read;
    u64 lba = 0;    // of its first sector
    u32 offset = 0; // of its data in the first request's buffer, in bytes
    u32 bytes = 0;  // of data: that of all its requests together
    u64 number = 0; // in order of issue, from 1, never repeated
    Status refusal = Status::io_error;
    u8 retries = 0;
    bool gathered = false;   // several requests
    bool delayed = false;    // not with the device: sent again in the next tick
    bool reset = false;      // it was with the device when that was asked to answer everything
    bool expired = false;    // because of it: it is not sent again after that
    bool late_write = false; // nobody waits, and it may still reach the medium
    typename T::Wire wire{};

    DmaSpan data() const { return first->buffer.subspan(offset, bytes); } // not for gathered ones
};

template <class T>
using CommandTable = SlotTable<Command<T>, T::max_commands>;

/// A transport. Not shared between processors: each lane of a disk has one, in its queue. All calls come from the queue,
/// on the executor's processor. An Error closes the queue: with protocol_error if its code is Code::protocol, else with
/// device_gone.
template <class T>
concept BlockTransport =
    requires(T& t, const T& constant, CommandTable<T>& commands, Command<T>& command, const Command<T>& sent,
             const Request& neighbour, u64 id, Status status, Counters& counters, OldestWait::Finding finding,
             OldestWait::Seen seen, std::string_view names, Instant now, bool flag) {
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
        /// Encodes the command under `id`. The device sees it here or in publish(). Called again, under a new id, when the
        /// command is sent again. A transport that gathers has reserved its room in prepare(): it is never full here.
        { t.send(command, id) } -> std::same_as<SendResult>;
        /// Makes what was sent visible, and notifies the device once at most.
        { t.publish(counters) } -> std::same_as<Result<void>>;
        /// The next answer, checked: a known id, once, of a command that is with the device. Nothing: no more now. What the
        /// answer to an exchange holds has been copied to it.
        { t.next() } -> std::same_as<Result<std::optional<Completion>>>;
        /// After a batch of answers, before more is sent: their room is free.
        { t.release(counters) } -> std::same_as<Result<void>>;
        /// After the last send of a turn: an idle device comes to rest; accesses so far are counted.
        { t.settle(counters) } -> std::same_as<void>;
        /// Asks for an event when an answer comes and looks once more. True: one is there already.
        { t.arm() } -> std::same_as<Result<bool>>;
        /// Events that have come so far, modulo 2^32.
        { constant.events() } -> std::same_as<u32>;
        /// The command has ended: what send() took comes back, and data that was bounced is copied. False: the device may
        /// still access the buffer, although it has answered.
        { t.finish(command, status) } -> std::same_as<bool>;
        /// The command's requests end now. What it returns for a gathered command is reachable or stopped.
        { t.fence(command) } -> std::same_as<Fence>;
        { t.recover(sent, finding, names) } -> std::same_as<Recovery>;
        /// Recovery::asked has not helped for a whole time-out. `flag`: a write is among what was not answered. An error
        /// closes the queue.
        { t.asked_in_vain(flag) } -> std::same_as<std::optional<Error>>;
        { t.stuck(names) } -> std::same_as<Stuck>;
        /// Adds what other queues of the same device have, and were answered.
        { t.seen(seen) } -> std::same_as<OldestWait::Seen>;
        /// `flag`: requests wait for room.
        { t.tick(now, flag) } -> std::same_as<Result<void>>;
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
    static constexpr u32 kept_commands = 0;
    static constexpr bool gathers = false;
    static constexpr u32 max_idle_events = 256;
    static constexpr Nanoseconds idle_window = 1'000'000'000;
    Result<void> publish(Counters&) { return {}; }
    Result<void> release(Counters&) { return {}; }
    void settle(Counters&) {}
    Result<bool> arm() { return false; }
    u32 events() const { return 0; }
    std::optional<Error> asked_in_vain(bool) { return std::nullopt; }
    Stuck stuck(std::string_view) { return {}; }
    OldestWait::Seen seen(OldestWait::Seen own) { return own; }
    Result<void> tick(Instant, bool) { return {}; }
    std::optional<Status> closed_elsewhere() const { return std::nullopt; }
    Error fault() const { return {Code::protocol, "the device's side of the queue is damaged"}; }
    bool closing(Status) { return true; }
    void closed(bool) {}
};

template <class T>
class BlockQueue;

/// A disk, or a lane of one, whose requests go through a queue. Several may share one queue.
template <class T>
class QueueDisk : public BlockDevice {
  public:
    QueueDisk(Executor& executor, BlockQueue<T>& queue) : BlockDevice(executor), queue_(queue) {}

    bool removed() const override { return false; }

  protected:
    ~QueueDisk() = default;
    /// Before the disk is announced.
    void set_geometry(const Geometry& geometry) {
        geometry_ = geometry;
        sector_shift_ = static_cast<u32>(std::countr_zero(geometry.sector_size));
    }
    u32 sector_shift() const { return sector_shift_; }
    void start(Request& request) override;
    bool cancel_now(Request& request) override;
    void forget(Request& request) override;

  private:
    friend class BlockQueue<T>;
    typename T::Disk& self() { return static_cast<typename T::Disk&>(*this); }
    bool parked() const { return !waiting_.empty() || !retry_.empty(); }

    BlockQueue<T>& queue_;
    RequestQueue retry_;               // to be sent again, alone; before those that wait
    RequestQueue waiting_;             // not, or not wholly, sent
    u32 sector_shift_ = 9;             // log2 of the sector size
    typename T::Disk* next_ = nullptr; // in the queue's ring of disks; nullptr: in none
};

/// One queue of a device, on one processor, with the disks that use it. Registered with its executor from open() to
/// stop(). All members are called on the executor's processor.
template <class T>
class BlockQueue : public Service {
  public:
    using Disk = typename T::Disk;
    using Command = io::Command<T>;
    static constexpr u32 retries_at_once = 3;
    static constexpr u32 retries_later = 200;

    template <class... Arguments>
    explicit BlockQueue(Executor& executor, Arguments&&... arguments)
        : executor_(executor), transport_(std::forward<Arguments>(arguments)...) {
        static_assert(BlockTransport<T>);
        transport_.use(commands_);
    }
    virtual ~BlockQueue() { stop(); }

    T& transport() { return transport_; }
    const T& transport() const { return transport_; }
    Executor& executor() const { return executor_; }

    /// Takes requests from here on. `timeout`: how long the device may be silent.
    void open(Nanoseconds timeout);
    /// Ends everything with `status`, says why, and takes no more.
    void close(Status status, const Error& why);
    /// The same with device_gone and without a word, and out of the executor. May be opened again.
    void stop();
    bool is_open() const { return state_ == State::open; }
    /// The device can no longer access anything: the slots and quarantined buffers of a closed queue come back.
    void reclaim();

    void add(Disk& disk);
    void remove(Disk& disk);

    /// Sends an exchange; what it holds belongs to the transport's own type. Error{exhausted}: no room now.
    Result<void> send(Exchange& exchange);
    /// Nobody waits for it any more; a late answer is taken silently.
    void abandon(Exchange& exchange);
    bool is_under_way(const Exchange& exchange) {
        const Command* command = commands_.find(exchange.id);
        return command != nullptr && command->exchange == &exchange;
    }

    /// Commands that the device has, those of requests that were given up included.
    u32 under_way() const { return static_cast<u32>(commands_.size()); }
    Nanoseconds timeout() const { return timeout_; }

    void submit(Disk& disk, Request& request);
    bool cancel(Disk& disk, Request& request);
    void forget(Disk& disk, Request& request);

    void flush() override;
    bool drain() override;
    bool arm() override;
    void tick(Instant now) override;

  private:
    enum class State : u8 { closed, open, shut };
    enum class Issued : u8 { all, some, none };

    // Sending.
    Issued issue(Disk& disk, Request& request, RequestQueue* from, bool alone);
    void gather(Command& command, RequestQueue& from);
    bool blocked(const Disk& disk, const Request& request);
    bool pump();
    void send_delayed();
    void park(RequestQueue& list, Request& request) {
        list.push(request);
        ++parked_;
    }
    bool unpark(RequestQueue& list, Request& request) {
        const bool found = list.remove(request);
        parked_ -= found ? 1 : 0;
        return found;
    }
    bool unpark(Disk& disk, Request& request) { return unpark(disk.waiting_, request) || unpark(disk.retry_, request); }

    // Answers.
    void take(const Completion& completion);
    bool retry(u64 id, Command& command, Retry how);
    void end_command(u64 id, Command& command, Status status);
    void end_part(Disk& disk, Request& request, Status status);
    void requeue_all(Command& command);
    void requeue(Disk& disk, Request& request);
    void complete_done();
    void count_events(bool answered);
    static void complete(Request& request, Status status) {
        static_cast<QueueDisk<T>&>(request.device()).complete(request, status);
    }
    Counters& charged() { return current_ != nullptr ? current_->counters_ : nobody_; }

    // Giving up.
    void give_up(Request& request, Status status);
    void give_up_all(Command& command);
    void detach(Request& request);
    bool detach(u64 id, Command& command, Request& request);
    void orphan(u64 id, Command& command, Fence fence);
    void take_back_everything(const Command* expired);
    void look_at_time();
    void recover(Command& command, OldestWait::Finding finding);
    void ask(const Command& oldest);
    void give_up_after_asking();
    void end_everything(Status status, bool stopped = false);
    void fail(const Error& why) {
        close(why.code == Code::protocol ? Status::protocol_error : Status::device_gone, why);
    }
    FixedText<96> names() const;
    template <class F>
    void for_each_disk(F&& f) const {
        Disk* disk = disks_;
        for (u32 left = disk_count_; left != 0; --left) {
            Disk* const next = disk->next_;
            f(*disk);
            disk = next;
        }
    }

    Executor& executor_;
    CommandTable<T> commands_;
    T transport_;
    State state_ = State::closed;
    Nanoseconds timeout_ = 0;
    Disk* disks_ = nullptr; // a ring; whose turn it is to send
    u32 disk_count_ = 0;
    Disk* current_ = nullptr; // is charged for notifications and interrupts: the one that was active last
    u32 parked_ = 0;          // requests in the lists of all disks
    u32 delayed_ = 0;         // commands that wait for the next tick
    u32 late_writes_ = 0;     // commands with late_write
    u64 issued_ = 0;          // commands so far, exchanges excluded
    u64 answered_ = 0;        // of them, those that were answered, late ones included
    RequestQueue done_;       // have ended in this batch; complete_done() makes their waiters ready
    u32 events_seen_ = 0;
    u32 idle_events_ = 0;
    Instant idle_until_ = 0;
    bool storm_told_ = false;
    Counters nobody_; // for what happens while no disk is there
    OldestWait oldest_;
    OldestWait stuck_;           // of requests that wait while the device has none
    std::optional<Bound> asked_; // since the device was asked to answer everything
    u64 asked_issued_ = 0;       // issued_ then
};

template <class T>
void QueueDisk<T>::start(Request& request) {
    queue_.submit(self(), request);
}
template <class T>
bool QueueDisk<T>::cancel_now(Request& request) {
    return queue_.cancel(self(), request);
}
template <class T>
void QueueDisk<T>::forget(Request& request) {
    queue_.forget(self(), request);
}

// ---- opening and closing ----

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::open(Nanoseconds timeout) {
    timeout_ = timeout;
    events_seen_ = transport_.events();
    state_ = State::open;
    executor_.add(*this);
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::close(Status status, const Error& why) {
    if (state_ != State::open) {
        return;
    }
    if (transport_.closing(status)) {
        log::error("{}: closed: {}", names(), why);
    }
    end_everything(status);
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::stop() {
    if (state_ == State::closed) {
        return;
    }
    if (state_ == State::open) {
        end_everything(Status::device_gone, true);
    }
    executor_.remove(*this);
    state_ = State::closed;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::end_everything(Status status, bool stopped) {
    state_ = State::shut;
    const auto end = [&](Request& request) {
        request.issued = request.buffer.size; // the rest is not sent
        request.again = false;
        if (request.parts == 0) {
            request.part_status = status;
            done_.push(request);
        }
    };
    for_each_disk([&](Disk& disk) {
        for (RequestQueue* list : {&disk.retry_, &disk.waiting_}) {
            while (Request* request = list->pop()) {
                end(*request);
            }
        }
    });
    parked_ = 0;
    commands_.for_each([&](u64 id, Command& command) {
        if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        }
        Request* request = command.first;
        if (request == nullptr) {
            return;
        }
        orphan(id, command, command.delayed ? Fence::stopped : transport_.fence(command));
        for (Request* following = nullptr; request != nullptr; request = following) {
            following = command.gathered ? request->link : nullptr;
            --request->parts;
            end(*request);
        }
    });
    delayed_ = 0;
    asked_.reset();
    complete_done();
    transport_.closed(stopped);
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::reclaim() {
    if (state_ == State::open) {
        return;
    }
    commands_.for_each([&](u64 id, Command& command) {
        static_cast<void>(transport_.finish(command, Status::device_gone));
        commands_.give(id);
    });
    late_writes_ = 0;
    release_quarantine(this);
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::add(Disk& disk) {
    if (disks_ == nullptr) {
        disks_ = disk.next_ = &disk;
    } else {
        Disk* last = disks_;
        while (last->next_ != disks_) {
            last = last->next_;
        }
        disk.next_ = disks_;
        last->next_ = &disk;
    }
    ++disk_count_;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::remove(Disk& disk) {
    if (disk.next_ == nullptr) {
        return;
    }
    Disk* before = &disk;
    while (before->next_ != &disk) {
        before = before->next_;
    }
    before->next_ = disk.next_;
    disks_ = --disk_count_ == 0 ? nullptr : disks_ == &disk ? disk.next_ : disks_;
    disk.next_ = nullptr;
    current_ = current_ == &disk ? nullptr : current_;
}

template <class T>
[[gnu::cold, clang::minsize]] FixedText<96> BlockQueue<T>::names() const {
    FixedText<96> text;
    for_each_disk(
        [&](const Disk& disk) { print(text, "{}{}", text.empty() ? "" : ", ", disk.identity().name.view()); });
    return text.empty() ? FixedText<96>(std::string_view(T::driver)) : text;
}

// ---- sending ----

template <class T>
inline void BlockQueue<T>::submit(Disk& disk, Request& request) {
    if (state_ != State::open || disk.removed()) [[unlikely]] {
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
inline BlockQueue<T>::Issued BlockQueue<T>::issue(Disk& disk, Request& request, RequestQueue* from, bool alone) {
    Issued result = Issued::none;
    for (;;) {
        if (commands_.size() >= T::max_commands - T::kept_commands || (late_writes_ != 0 && blocked(disk, request)))
            [[unlikely]] {
            return result;
        }
        const u64 id = *commands_.take();
        Command& command = commands_[id];
        command.disk = &disk;
        command.first = &request;
        command.exchange = nullptr;
        command.op = request.op;
        command.offset = request.issued;
        command.bytes = request.buffer.size - request.issued;
        command.lba = request.lba + (request.issued >> disk.sector_shift_);
        command.retries = 0;
        command.gathered = command.delayed = command.reset = command.expired = command.late_write = false;
        if (const Fit fit = transport_.prepare(command); fit != Fit::ok) [[unlikely]] {
            command.first = nullptr;
            commands_.give(id);
            if (fit == Fit::full) {
                return result;
            }
            if (from != nullptr) {
                static_cast<void>(unpark(*from, request));
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
            commands_.give(id);
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
void BlockQueue<T>::gather(Command& command, RequestQueue& from) {
    Request* last = command.first;
    last->link = nullptr;
    while (Request* next = from.front()) {
        if (next->op != command.op || next->issued != 0 ||
            next->lba != command.lba + (command.bytes >> command.disk->sector_shift_) ||
            !transport_.join(command, *next)) {
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

/// Whether a write that was given up, and that the device may still carry out, has a sector in common with the request.
template <class T>
[[gnu::cold, clang::minsize]] bool BlockQueue<T>::blocked(const Disk& disk, const Request& request) {
    bool found = false;
    const u64 end = request.lba + (request.buffer.size >> disk.sector_shift_);
    commands_.for_each([&](u64, const Command& command) {
        found = found || (command.late_write && command.disk == &disk && command.lba < end &&
                          request.lba < command.lba + (command.bytes >> disk.sector_shift_));
    });
    return found;
}

/// Requests that found no room before; the disks take turns. True: something was sent.
template <class T>
bool BlockQueue<T>::pump() {
    bool sent = false;
    for (u32 idle = 0; parked_ != 0 && idle < disk_count_ && state_ == State::open;) {
        Disk& disk = *std::exchange(disks_, disks_->next_);
        const bool alone = !disk.retry_.empty();
        RequestQueue& list = alone ? disk.retry_ : disk.waiting_;
        const Issued issued = list.empty() ? Issued::none : issue(disk, *list.front(), &list, alone);
        sent = sent || issued != Issued::none;
        idle = issued == Issued::all ? 0 : idle + 1;
    }
    return sent;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::send_delayed() {
    commands_.for_each([&](u64 id, Command& command) {
        if (!command.delayed || state_ != State::open) {
            return;
        }
        const SendResult sent = transport_.send(command, id);
        if (sent == SendResult::sent) {
            command.delayed = false;
            --delayed_;
            executor_.touch(*this);
        } else if (sent == SendResult::broken) {
            fail(transport_.fault());
        }
    });
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
[[gnu::cold, clang::minsize]] Result<void> BlockQueue<T>::send(Exchange& exchange) {
    if (state_ != State::open) {
        return Error{Code::device_gone, "the queue is closed"};
    }
    const auto id = commands_.take();
    if (!id) {
        return Error{Code::exhausted, "no slot for a command of the driver's own", T::max_commands, T::max_commands};
    }
    Command& command = commands_[*id];
    command.disk = nullptr;
    command.first = nullptr;
    command.exchange = &exchange;
    command.number = 0;
    command.bytes = 0;
    command.gathered = command.delayed = command.reset = command.expired = command.late_write = false;
    exchange.id = *id;
    exchange.answered = false;
    exchange.done.close();
    const SendResult sent = transport_.send(command, *id);
    if (sent != SendResult::sent) {
        command.exchange = nullptr;
        commands_.give(*id);
        if (sent == SendResult::broken) {
            const Error why = transport_.fault();
            fail(why);
            return why;
        }
        return Error{Code::exhausted, "no room in the queue"};
    }
    executor_.touch(*this);
    return {};
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::abandon(Exchange& exchange) {
    if (Command* command = commands_.find(exchange.id); command != nullptr && command->exchange == &exchange) {
        command->exchange = nullptr;
    }
}

// ---- answers ----

template <class T>
bool BlockQueue<T>::drain() {
    if (state_ != State::open) [[unlikely]] {
        return false;
    }
    u32 count = 0;
    for (;;) {
        const Result<std::optional<Completion>> got = transport_.next();
        if (!got) [[unlikely]] {
            fail(got.error());
            return true;
        }
        if (!*got) {
            break;
        }
        ++count;
        take(**got);
        if (state_ != State::open) [[unlikely]] {
            return true;
        }
    }
    if (const auto status = transport_.closed_elsewhere()) [[unlikely]] {
        end_everything(*status);
        return true;
    }
    count_events(count != 0);
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
inline void BlockQueue<T>::take(const Completion& completion) {
    Command& command = commands_[completion.id];
    if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) [[unlikely]] {
        commands_.give(completion.id);
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

/// False: it has been tried often enough.
template <class T>
[[gnu::cold, clang::minsize]] bool BlockQueue<T>::retry(u64 id, Command& command, Retry how) {
    if (how == Retry::alone) {
        if (!command.gathered && command.first->tries != 0) {
            return false;
        }
        for (Request* request = command.first; request != nullptr;
             request = command.gathered ? request->link : nullptr) {
            ++request->tries;
        }
        static_cast<void>(transport_.finish(command, Status::io_error));
        requeue_all(command);
        commands_.give(id);
        return true;
    }
    if (command.retries >= (how == Retry::now ? retries_at_once : retries_later)) {
        return false;
    }
    ++command.retries;
    const u64 fresh = commands_.renew(id);
    command.number = ++issued_;
    if (how == Retry::now) {
        const SendResult sent = transport_.send(command, fresh);
        if (sent == SendResult::sent) {
            executor_.touch(*this);
            return true;
        }
        if (sent == SendResult::broken) {
            fail(transport_.fault());
            return true;
        }
    }
    command.delayed = true;
    ++delayed_;
    return true;
}

/// The device no longer has the command.
template <class T>
inline void BlockQueue<T>::end_command(u64 id, Command& command, Status status) {
    const bool safe = transport_.finish(command, status);
    Request* request = std::exchange(command.first, nullptr);
    if (request == nullptr) [[unlikely]] { // a late answer
        late_writes_ -= command.late_write ? 1 : 0;
        if (safe) {
            release_quarantine(this, id);
        }
        commands_.give(id);
        return;
    }
    Disk& disk = *command.disk;
    current_ = &disk;
    if (!safe) [[unlikely]] {
        log::warning("{}: the host has answered and still holds the buffer: it is not used again",
                     disk.identity().name.view());
    }
    if (command.gathered && status != Status::ok) [[unlikely]] { // it may be any one of them
        command.first = request;
        requeue_all(command);
        commands_.give(id);
        return;
    }
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        if (!safe) [[unlikely]] {
            request->buffer_lost = true;
            quarantine(request->buffer, this, id);
        }
        end_part(disk, *request, status);
    }
    commands_.give(id);
}

template <class T>
inline void BlockQueue<T>::end_part(Disk& disk, Request& request, Status status) {
    if (status != Status::ok) [[unlikely]] {
        if (request.part_status == Status::ok) {
            request.part_status = status;
        }
        if (request.issued != request.buffer.size) { // the rest need not be sent
            static_cast<void>(unpark(disk, request));
            request.issued = request.buffer.size;
        }
    }
    if (--request.parts != 0 || request.issued != request.buffer.size) {
        return;
    }
    if (request.again && request.part_status == Status::ok) [[unlikely]] {
        requeue(disk, request);
    } else {
        done_.push(request);
    }
}

/// The device does not have the command any more: its requests are sent again, alone.
template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::requeue_all(Command& command) {
    Request* request = std::exchange(command.first, nullptr);
    for (Request* following = nullptr; request != nullptr; request = following) {
        following = command.gathered ? request->link : nullptr;
        if (--request->parts != 0 || request->part_status != Status::ok) { // others of its commands are with the device
            static_cast<void>(unpark(*command.disk, *request));
            request->issued = request->buffer.size;
            request->again = true;
            if (request->parts == 0) {
                done_.push(*request);
            }
        } else {
            static_cast<void>(unpark(*command.disk, *request));
            request->issued = command.gathered ? 0 : command.offset;
            request->again = false;
            park(command.disk->retry_, *request);
        }
    }
}

/// From its beginning: parts of it have ended well, and others not.
template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::requeue(Disk& disk, Request& request) {
    request.again = false;
    request.issued = 0;
    park(disk.retry_, request);
}

template <class T>
inline void BlockQueue<T>::complete_done() {
    while (Request* request = done_.pop()) {
        complete(*request, request->part_status);
    }
}

template <class T>
inline void BlockQueue<T>::count_events(bool answered) {
    const u32 events = transport_.events();
    const u32 fresh = events - std::exchange(events_seen_, events);
    idle_events_ = answered ? 0 : idle_events_ + fresh;
    charged().interrupts += fresh;
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

// ---- giving up ----

template <class T>
[[gnu::cold, clang::minsize]] bool BlockQueue<T>::cancel(Disk& disk, Request& request) {
    if (request.parts != 0 || !unpark(disk, request)) {
        return false; // the device has it: it ends when that answers
    }
    complete(request, Status::cancelled);
    return true;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::forget(Disk& disk, Request& request) {
    static_cast<void>(unpark(disk, request));
    detach(request);
    request.parts = 0;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::give_up(Request& request, Status status) {
    static_cast<void>(unpark(static_cast<Disk&>(request.device()), request));
    detach(request);
    request.parts = 0;
    complete(request, status);
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::give_up_all(Command& command) {
    while (command.first != nullptr) {
        give_up(*command.first, Status::timed_out);
    }
}

/// None of its commands is the request's any more.
template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::detach(Request& request) {
    bool stopped = false;
    if (request.parts != 0) {
        commands_.for_each([&](u64 id, Command& command) { stopped = detach(id, command, request) || stopped; });
    }
    if (stopped) {
        take_back_everything(nullptr);
    }
}

/// True: the device had to be stopped.
template <class T>
[[gnu::cold, clang::minsize]] bool BlockQueue<T>::detach(u64 id, Command& command, Request& request) {
    Request** at = &command.first;
    while (*at != nullptr && *at != &request) {
        at = command.gathered ? &(*at)->link : nullptr;
        if (at == nullptr) {
            return false;
        }
    }
    if (*at == nullptr) {
        return false;
    }
    if (!command.gathered) {
        const Fence fence = command.delayed ? Fence::stopped : transport_.fence(command);
        const bool stopped = !command.delayed && fence == Fence::stopped;
        if (command.delayed) {
            --delayed_;
        }
        orphan(id, command, fence);
        return stopped;
    }
    const Fence fence = transport_.fence(command);
    *at = request.link;
    request.link = nullptr;
    if (fence == Fence::reachable) {
        request.buffer_lost = true;
        quarantine(request.buffer, this, id);
    }
    return fence == Fence::stopped;
}

/// Nobody waits for the command any more. Its requests are still in it: their buffers are quarantined if they must be.
template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::orphan(u64 id, Command& command, Fence fence) {
    for (Request* request = command.first; request != nullptr && fence == Fence::reachable;
         request = command.gathered ? request->link : nullptr) {
        if (request->op <= Op::write) {
            request->buffer_lost = true;
            quarantine(command.gathered ? request->buffer : request->buffer.subspan(command.offset, command.bytes),
                       this, id);
        }
    }
    command.first = nullptr;
    if (fence == Fence::stopped) {
        static_cast<void>(transport_.finish(command, Status::cancelled));
        commands_.give(id);
    } else if (fence != Fence::done && (command.op == Op::write || command.op == Op::discard)) {
        command.late_write = true;
        ++late_writes_;
    }
}

/// The device has been stopped. `expired`: the command that it did not answer; of several requests each is tried alone.
template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::take_back_everything(const Command* expired) {
    commands_.for_each([&](u64 id, Command& command) {
        if (command.delayed) {
            return;
        }
        static_cast<void>(transport_.finish(command, Status::cancelled));
        if (Exchange* exchange = std::exchange(command.exchange, nullptr); exchange != nullptr) {
            exchange->done.open();
        } else if (command.first == nullptr) {
            late_writes_ -= command.late_write ? 1 : 0;
            release_quarantine(this, id);
        } else if (&command == expired && !command.gathered) {
            end_part(*command.disk, *std::exchange(command.first, nullptr), Status::timed_out);
        } else {
            requeue_all(command);
        }
        commands_.give(id);
    });
    asked_.reset();
}

// ---- time ----

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::tick(Instant now) {
    if (state_ != State::open) {
        return;
    }
    count_events(false);
    if (idle_events_ > T::max_idle_events && !std::exchange(storm_told_, true)) {
        log::warning("{}: more than {} interrupts within {} ms and not an answer: the host signals without a reason",
                     T::driver, u32{T::max_idle_events}, T::idle_window / 1'000'000);
    }
    if (now >= idle_until_) {
        idle_events_ = 0;
        idle_until_ = after(now, T::idle_window);
    }
    if (auto ticked = transport_.tick(now, parked_ != 0); !ticked) {
        return fail(ticked.error());
    }
    if (delayed_ != 0) {
        send_delayed();
    }
    if (parked_ != 0 && pump()) {
        executor_.touch(*this);
    }
    if (state_ == State::open) {
        look_at_time();
    }
    if (state_ == State::open) {
        transport_.settle(charged());
    }
    complete_done();
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::look_at_time() {
    using Finding = OldestWait::Finding;
    Command* oldest = nullptr; // with the device, and somebody waits for it, or for its sectors
    commands_.for_each([&](u64, Command& command) {
        if ((command.first != nullptr || command.late_write) && !command.delayed &&
            (oldest == nullptr || command.number < oldest->number)) {
            oldest = &command;
        }
    });
    const OldestWait::Seen seen = transport_.seen(
        {.oldest = oldest != nullptr ? oldest->number : 0, .under_way = commands_.size(), .answered = answered_});
    const Finding found = oldest_.look(executor_, seen, timeout_);
    if (asked_) {
        if (oldest == nullptr || oldest->number > asked_issued_) {
            asked_.reset(); // it has helped
        } else if (asked_->passed()) {
            return give_up_after_asking();
        }
    } else if (found != Finding::none) {
        return recover(*oldest, found);
    }
    const bool waits = oldest == nullptr && (parked_ != 0 || delayed_ != 0);
    const OldestWait::Seen waiting{
        .oldest = waits ? issued_ + 1 : 0, .under_way = seen.under_way, .answered = seen.answered};
    if (stuck_.look(executor_, waiting, timeout_) == Finding::none) {
        return;
    }
    const Stuck stuck = transport_.stuck(names());
    if (stuck.kind == Stuck::Kind::close) {
        return close(Status::device_gone, *stuck.why);
    }
    if (stuck.kind == Stuck::Kind::give_up) {
        bool given_up = false;
        for_each_disk([&](Disk& disk) {
            if (!given_up && !disk.waiting_.empty()) {
                given_up = true;
                log::warning("{}: {}", disk.identity().name.view(), *stuck.why);
                give_up(*disk.waiting_.front(), Status::timed_out);
            }
        });
    }
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::recover(Command& command, OldestWait::Finding finding) {
    const Recovery recovery = transport_.recover(command, finding, names());
    switch (recovery.kind) {
    case Recovery::Kind::none: return;
    case Recovery::Kind::give_up:
        if (command.first == nullptr) {
            return close(Status::device_gone, {Code::timed_out, "a write that was given up was never answered: nothing "
                                                                "may be written after it"});
        }
        log::warning("{}: no answer to a request within {} ms, while others were answered",
                     command.disk->identity().name.view(), timeout_ / 1'000'000);
        return give_up_all(command);
    case Recovery::Kind::asked: return ask(command);
    case Recovery::Kind::stopped:
        take_back_everything(&command);
        complete_done();
        if (recovery.why) {
            close(Status::device_gone, *recovery.why);
        }
        return;
    case Recovery::Kind::close:
        if (recovery.why && recovery.why->code == Code::protocol) {
            return fail(*recovery.why);
        }
        commands_.for_each([&](u64, Command& each) { give_up_all(each); });
        return close(Status::device_gone, recovery.why.value_or(Error{Code::timed_out, "the device is silent"}));
    }
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::ask(const Command& oldest) {
    commands_.for_each([&](u64, Command& command) {
        if (command.first != nullptr && !command.delayed) {
            command.expired = &command == &oldest || command.reset;
            command.reset = true;
        }
    });
    asked_.emplace(executor_, timeout_);
    asked_issued_ = issued_;
}

template <class T>
[[gnu::cold, clang::minsize]] void BlockQueue<T>::give_up_after_asking() {
    bool writes = false;
    commands_.for_each([&](u64, Command& command) {
        if ((command.first == nullptr && !command.late_write) || command.delayed || command.number > asked_issued_) {
            return;
        }
        writes = writes || command.op == Op::write || command.op == Op::discard;
        give_up_all(command);
    });
    asked_.reset();
    if (const auto why = transport_.asked_in_vain(writes)) {
        close(why->code == Code::protocol ? Status::protocol_error : Status::device_gone, *why);
    }
}

} // namespace fl::io
