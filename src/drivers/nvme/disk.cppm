// A queue pair of a controller: a submission and a completion queue with their doorbells; and a Disk on it for each
// namespace. Independent of PCI and of the controller's set-up. The life cycle of a request is in io.block_queue; this
// is its transport. The admin queue is a queue pair too, whose commands are exchanges.
//
// A completion is copied out once and must carry the id of a command that is with the device, this submission queue's
// id and a head within what was submitted. The first violation closes the whole controller: its queues are
// a group [io.queue_group].
//
// Doorbells are written once per turn. With shadow doorbells [nvme-1.4 §B.5] the new value goes to memory, and the
// register is written only if the controller asks for it by its event index.
export module drivers.nvme.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.mmio;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import io.queue_group;
import io.ring;
export import drivers.nvme.protocol;

export namespace fl::drivers::nvme {

/// An admin command, and its completion.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Submission command{};         // without cid
    CompletionEntry completion{}; // valid when answered
};

/// Where a queue pair is, and its limits.
struct QueueTerms {
    Mmio registers;      // the whole BAR
    DmaSpan submissions; // `entries` commands, zeroed
    DmaSpan completions; // `entries` completions, zeroed
    DmaSpan lists;       // Transport::list_bytes for each command; empty for the admin queue
    DmaSpan shadow;      // shadow doorbells; empty: not in use
    DmaSpan events;      // event indices
    u32 entries = 2;     // of each queue: a power of two
    u16 id = 0;
    u8 stride = 0;     // CAP.DSTRD
    bool line = false; // the interrupt is a level, masked by INTMS
    bool lazy = false; // MSI-X: interrupts do not depend on the head that was last reported
    Nanoseconds timeout = 0;
};

class Disk;

class Transport : public io::GroupedTransport {
  public:
    using Disk = nvme::Disk;
    static constexpr std::string_view driver = "nvme";
    /// One less than the entries of the largest queue. Command ids are slot | generation << 7; slot 127 does not exist,
    /// so that id 0xffff is not used [nvme-1.4 §4.2].
    static constexpr u32 max_commands = 127;
    static constexpr u32 max_entries = 128;
    static constexpr u32 page = 4096;
    /// A command's PRP list: the pages after the first, for 512 KiB at any alignment. Does not cross a page.
    static constexpr u32 list_bytes = 1024;
    static constexpr u32 max_transfer = list_bytes / 8 * page;

    struct Wire {};
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, io::QueueGroup& group) : GroupedTransport(group), executor_(executor) {}

    /// Lays out the empty queues; before the device has them.
    Result<void> lay_out(const QueueTerms& terms);
    /// The admin queue: the doorbell buffers are in use from now on.
    void use_shadow(DmaSpan shadow, DmaSpan events);
    /// `notify`: called on this queue's processor when the queue has closed by itself.
    void start(void (*notify)(void* context), void* context);
    /// The vector's handler; raises the queue and those that share the vector with it.
    static void on_interrupt(void* self);
    /// `other` is served by this queue's vector as well. Before the controller is enabled.
    void share_vector(Transport* other) { sharing_ = other; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Result<void> release(io::Counters& counters);
    void settle(io::Counters& counters) { counters.device_accesses += std::exchange(accesses_, 0); }
    Result<bool> arm();
    inline u32 events() const { return interrupts_.load(std::memory_order_relaxed); }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::reachable; }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    io::Stuck stuck(std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    Error fault() const { return fault_.value_or(Error{Code::protocol, "an NVMe queue is broken"}); }
    void closed(bool stopped);

  private:
    using Submissions = io::Producer<io::MappedMemory, io::Wrapped<u16>, io::Always>;
    using Completions = io::Consumer<io::MappedMemory, io::FreeRunning<u16>, io::Always, io::ByPhase>;
    void describe_data(Submission& entry, DmaSpan data, u64 id) const;
    bool ring(bool completion, u16 old, u16 now);
    io::Completion judge(u64 id, Command& command, u16 status);
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    void raise_from_handler();

    io::Executor& executor_;
    io::CommandTable<Transport>* commands_ = nullptr;
    QueueTerms terms_;
    std::optional<Submissions> submissions_;
    std::optional<Completions> completions_;
    io::MappedMemory shadow_;
    io::MappedMemory events_;
    u16 rung_tail_ = 0; // doorbells' last values
    u16 rung_head_ = 0;
    u32 unreleased_ = 0; // completions taken since the head was last reported
    bool alive_ = false; // a completion was taken since the last tick
    std::optional<Error> fault_;
    u32 accesses_ = 0; // not charged yet
    u32 reports_ = 0;
    Transport* sharing_ = nullptr;
    // Written by the handler, on this queue's processor. Relaxed: ordered by raise() and the next turn.
    std::atomic<u32> interrupts_{0};
    std::atomic<bool> masked_{false};
    void (*notify_)(void*) = nullptr;
    void* context_ = nullptr;
};

} // namespace fl::drivers::nvme

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::nvme::Transport>;
extern template class io::QueueDisk<drivers::nvme::Transport>;
} // namespace fl

export namespace fl::drivers::nvme {

/// A queue pair.
class Queue final : public io::GroupedQueue<Transport> {
  public:
    Queue(io::Executor& executor, io::QueueGroup& group) : GroupedQueue(executor, group, executor, group) {}
    void start(Nanoseconds timeout, void (*notify)(void*), void* context) {
        open(timeout);
        transport().start(notify, context);
    }
    void shut(io::Status status, const Error& why) { close(status, why); }
    /// The number of commands with the controller that may stay there for ever: event requests. Alone they need no
    /// ticks.
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
    static constexpr u32 max_reported_errors = 8;

    /// `max_bytes`: of a command's data.
    Disk(Queue& queue, u32 nsid, u32 max_bytes, const io::Geometry& geometry, const Identity& identity);
    inline u32 nsid() const { return nsid_; }
    inline u32 max_bytes() const { return max_bytes_; }

  private:
    u32 nsid_;
    u32 max_bytes_;
};

} // namespace fl::drivers::nvme
