// A storage channel as an io.block_queue transport, and a Disk on it for each logical unit: SCSI commands in packets.
// Independent of the bus and the handshake.
//
// A completion must have a known id, and be what its request asked for [drivers.storvsc.answer]. The first violation
// closes the whole controller: its queues are a group [io.queue_group]. A host that does not answer is asked to reset
// the bus [drivers.storvsc.reset].
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
export import drivers.storvsc.queue;
export import drivers.storvsc.answer;
export import drivers.storvsc.reset;
export import drivers.storvsc.unit;
export import drivers.scsi.commands;

export namespace fl::drivers::storvsc {

class Disk;

class Transport : public io::GroupedTransport {
  public:
    using Disk = storvsc::Disk;
    static constexpr std::string_view driver = "storvsc";
    static constexpr u32 max_commands = PacketQueue::max_packets;
    static constexpr u32 reserved_commands = 2; // a command of a rescan, and the bus reset
    using Wire = scsi::CommandForm;
    using Command = io::Command<Transport>;

    Transport(io::Executor& executor, hv::hyperv::Channel& channel, Shared& shared, bool first)
        : GroupedTransport(shared), packets_(channel), reset_(executor, shared, first) {}

    /// See Queue::start().
    void start(io::Executor& executor, DmaSpan lists, Nanoseconds timeout);
    PacketQueue& packets() { return packets_; }
    const PacketQueue& packets() const { return packets_; }
    BusReset& bus_reset() { return reset_; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    inline void settle(io::Counters& counters) { counters.hypercalls += packets_.take_signals(); }
    inline Result<bool> arm() { return packets_.arm(); }
    inline u32 events() const { return packets_.events(); }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::reachable; }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    std::optional<Error> reset_ineffective(bool writes);
    io::Stuck stuck(std::string_view names);
    io::OldestWait::Seen seen(io::OldestWait::Seen own);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return packets_.rescinded() || reset_.wants_tick(); }
    Error fault() const { return fault_.value_or(packets_.fault()); }
    void closed(bool stopped);

  private:
    [[gnu::noinline]] io::SendResult send_other(Command& command, u64 id); // all but reads and writes that succeed
    [[gnu::noinline]] io::Next next_other(io::Completion& completion);
    io::Next complete(const hv::hyperv::Packet& packet, io::Completion& completion);
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }

    PacketQueue packets_;
    BusReset reset_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Nanoseconds timeout_ = 0;
    std::optional<Error> fault_;
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
        : GroupedQueue(executor, shared, executor, channel, shared, first) {}

    /// Call when the channel is open. `lists`: PacketQueue::lists_bytes for UNMAP parameter lists; owned by the caller.
    void start(DmaSpan lists, Nanoseconds timeout);
    void set_terms(const Terms& terms) { transport().packets().set_terms(terms); }
    const Terms& terms() const { return transport().packets().terms(); }

  private:
    void tick(Instant now) override;
};

/// One logical unit on one channel, once it is linked. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    static constexpr u32 max_lanes = 1 + max_further_lanes;
    using Unit = storvsc::Unit;

    Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity)
        : GroupedDisk(queue, geometry, identity), commands_(unit, geometry, queue.terms().version, queue.timeout()) {}

  private:
    friend class Transport;

    UnitCommands commands_;
};

} // namespace fl::drivers::storvsc
