// An open storage channel: a Queue for each channel, and a Disk on it for each logical unit. Independent of the bus
// and the handshake. The life cycle of a request is in io.block_queue; this is its transport: SCSI commands in VMBus
// packets.
//
// A completion is copied out once by the channel and must have a known id, and be what its request asked for
// [drivers.storvsc.answer]. The first violation closes the whole controller: its queues are a group [io.queue_group].
// A host that does not answer is asked to reset the bus [drivers.storvsc.reset].
export module drivers.storvsc.disk;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import io.queue_group;
import hv.hyperv.channel;
export import drivers.storvsc.protocol;
export import drivers.storvsc.answer;
export import drivers.storvsc.reset;
export import drivers.storvsc.unit;
export import drivers.scsi.commands;

export namespace fl::drivers::storvsc {

/// A packet of the controller itself, and its answer.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Packet packet{}; // in: the request; out: the answer
    DmaSpan data{};  // read or written by the host; empty: none
};

class Disk;

class Transport : public io::GroupedTransport {
  public:
    using Disk = storvsc::Disk;
    static constexpr std::string_view driver = "storvsc";
    static constexpr u32 max_commands = 128;
    static constexpr u32 reserved_commands = 2; // a command of a rescan, and the bus reset
    using Wire = scsi::CommandForm;
    using Command = io::Command<Transport>;

    Transport(hv::hyperv::Channel& channel, Shared& shared, bool first)
        : GroupedTransport(shared), channel_(channel), reset_(shared, first) {}

    /// `parameters`: one page for UNMAP parameter lists; owned by the caller.
    void start(DmaSpan parameters, Nanoseconds timeout);
    /// The channel's events raise the queue until it is closed.
    void listen(io::Executor& executor) { channel_.listen(executor, *queue); }
    void set_terms(const Terms& terms) { terms_ = terms; }
    const Terms& terms() const { return terms_; }
    BusReset& bus_reset() { return reset_; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    void settle(io::Counters& counters);
    Result<bool> arm();
    inline u32 events() const { return channel_.interrupts(); }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::reachable; }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    std::optional<Error> reset_ineffective(bool writes);
    io::Stuck stuck(std::string_view names);
    io::OldestWait::Seen seen(io::OldestWait::Seen own);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return channel_.rescinded() || reset_.wants_tick(); }
    Error fault() const;
    void closed(bool stopped);

  private:
    io::Next complete(const hv::hyperv::Packet& packet, io::Completion& completion);
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    [[gnu::noinline]] io::Completion judge(u64 id, Command& command, const Packet& packet); // off the fast path

    hv::hyperv::Channel& channel_;
    BusReset reset_;
    io::CommandTable<Transport>* commands_ = nullptr;
    bool armed_ = false;
    bool unreleased_ = false; // packets taken since the ring space was last released
    Terms terms_;
    Nanoseconds timeout_ = 0;
    DmaSpan parameters_;
    std::optional<Error> fault_;
    u64 charged_signals_ = 0;
};

} // namespace fl::drivers::storvsc

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::storvsc::Transport>;
extern template class io::QueueDisk<drivers::storvsc::Transport>;
} // namespace fl

export namespace fl::drivers::storvsc {

/// One channel.
class Queue final : public io::GroupedQueue<Transport> {
  public:
    static constexpr u32 max_parts = Transport::max_commands;

    Queue(io::Executor& executor, hv::hyperv::Channel& channel, Shared& shared, bool first)
        : GroupedQueue(executor, shared, channel, shared, first), reset_(executor) {}
    ~Queue() { stop(); } // ends reset_

    /// Call when the channel is open. `parameters`, `timeout`: see Transport::start.
    void start(DmaSpan parameters, Nanoseconds timeout);
    void set_terms(const Terms& terms) { transport().set_terms(terms); }
    const Terms& terms() const { return transport().terms(); }

  private:
    void tick(Instant now) override;
    void send_reset();

    Exchange reset_;
};

/// One logical unit on one channel. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    static constexpr u32 max_lanes = 1 + max_further_lanes;
    static constexpr u32 max_reported_errors = scsi::LogicalUnit::max_reported_errors;

    using Unit = storvsc::Unit;

    /// now: the caller is on the queue's processor, or that has not been started. later: by link().
    enum class Linked : u8 { now, later };

    Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity,
         Linked linked = Linked::now);

    inline const Unit& unit() const { return unit_; }

  private:
    friend class Transport;

    Unit unit_;
    UnitCommands commands_;
};

} // namespace fl::drivers::storvsc
