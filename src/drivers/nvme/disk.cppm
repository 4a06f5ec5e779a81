// A queue pair of a controller as an io.block_queue transport, and a Disk on it for each namespace. The admin queue is
// a queue pair too, whose commands are exchanges.
//
// A completion must carry the id of a command that is with the controller. The first violation of the protocol closes
// the whole controller: its queues are a group [io.queue_group]. Silence and a fatal error reset it
// [drivers.nvme.recovery].
export module drivers.nvme.disk;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import io.queue_group;
export import drivers.nvme.queue;
export import drivers.nvme.interrupts;
export import drivers.nvme.recovery;
export import drivers.nvme.status;

export namespace fl::drivers::nvme {

class Disk;

class Transport : public io::GroupedTransport {
  public:
    using Disk = nvme::Disk;
    static constexpr std::string_view driver = "nvme";
    /// One less than the entries of the largest queue. Command ids are slot | generation << 7; slot 127 does not exist,
    /// so that id 0xffff is not used [nvme-1.4 §4.2].
    static constexpr u32 max_commands = 127;
    static constexpr u32 max_entries = 128;
    /// Of a completion queue: 16 KiB. Each report of the head is a register access, which is made for as many at once
    /// as possible (see QueuePair::release).
    static constexpr u32 max_completions = 1024;

    using Wire = Resends;
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, io::QueueGroup& group, Recovery& recovery)
        : GroupedTransport(group), interrupts_(executor, *this), recovery_(executor, recovery) {}

    /// Lays out the empty queues; before the controller has them, or while this queue is quiet.
    Result<void> lay_out(const QueueTerms& terms) { return pair_.lay_out(terms); }
    /// `timeout`: of a command, in nanoseconds of machine time.
    void start(Nanoseconds timeout) {
        timeout_ = timeout;
        room_ = pair_.capacity(); // never more commands than completions fit
        join();
    }
    /// Before start(). The controller may delay a resend by these, for `most` nanoseconds in all.
    void allow_delays(const RetryDelays& delays, Nanoseconds most) { failures_.allow_delays(delays, most); }
    QueueInterrupts& interrupts() { return interrupts_; }
    const QueueRecovery& recovery() const { return recovery_; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Result<void> release(io::Counters&);
    inline void settle(io::Counters& counters) { counters.device_accesses += pair_.take_accesses(); }
    Result<bool> arm();
    void silence() { pair_.count_accesses(interrupts_.silence()); }
    inline u32 events() const { return interrupts_.count(); }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::reachable; }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    io::Stuck stuck(std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    Error fault() const { return pair_.fault(); }
    void closed(bool stopped);

  private:
    io::Next after_reset(io::Completion& completion);

    io::CommandTable<Transport>* commands_ = nullptr;
    QueuePair pair_;
    QueueInterrupts interrupts_;
    QueueRecovery recovery_;
    u32 room_ = 0;       // commands that may be with the controller; 0: held
    bool alive_ = false; // a completion was taken since the last tick
    Nanoseconds timeout_ = 0;
    Failures failures_;
};

} // namespace fl::drivers::nvme

// Instantiated once, in disk.cpp.
namespace fl {
extern template class io::BlockQueue<drivers::nvme::Transport>;
extern template class io::QueueDisk<drivers::nvme::Transport>;
} // namespace fl

export namespace fl::drivers::nvme {

/// A queue pair.
class Queue final : public io::GroupedQueue<Transport> {
  public:
    Queue(io::Executor& executor, io::QueueGroup& group, Recovery& recovery)
        : GroupedQueue(executor, group, executor, group, recovery) {}
    void start(Nanoseconds timeout) {
        open(timeout);
        transport().start(timeout);
    }
    void shut(io::Status status, const Error& why) { close(status, why); }
    /// Commands that may stay with the controller for ever: event requests. Alone they need no ticks.
    void set_waiting_events(u32 count) { waiting_events_ = count; }
    bool wants_tick() const override {
        return (waiting_events_ == 0 || in_flight() > waiting_events_) && GroupedQueue::wants_tick();
    }
    bool awaits_answer() const override { return is_open() && in_flight() > waiting_events_; }

  private:
    u32 waiting_events_ = 0;
};

/// A namespace on one queue pair. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    static constexpr u32 max_lanes = 1 + max_further_lanes;

    Disk(Queue& queue, u32 nsid, const Limits& limits, const io::Geometry& geometry, const Identity& identity)
        : GroupedDisk(queue, geometry, identity), nsid_(nsid), limits_(limits) {}
    inline u32 nsid() const { return nsid_; }
    inline const Limits& limits() const { return limits_; }

  private:
    u32 nsid_;
    Limits limits_;
};

} // namespace fl::drivers::nvme
