// An AHCI port as an io.block_queue transport: one disk, up to 32 commands with NCQ, else one at a time.
//
// A slot of the command table is the command slot and the NCQ tag. A command that is not queued (a flush, a discard, a
// read of a disk without NCQ) is issued only when the port has no other, and then is the only one [ahci-1.3.1 §5.6.1]:
// the queue's lists keep their order, so that later requests wait for it.
//
// After an error the port is restarted [drivers.ahci.recovery]: the command that failed ends with its status, the
// others are resent. If the disk does not say which one failed, each is resent alone, not queued.
export module drivers.ahci.queue;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.dma_mapper;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import drivers.ahci.protocol;
export import drivers.ahci.port;
export import drivers.ahci.memory;
export import drivers.ahci.interrupts;
export import drivers.ahci.recovery;
export import drivers.ahci.disk;

export namespace fl::drivers::ahci {

class Disk;

class Transport : public io::TransportDefaults {
  public:
    using Disk = ahci::Disk;
    static constexpr std::string_view driver = "ahci";
    static constexpr u32 max_commands = PortMemory::slots;
    static constexpr u32 max_idle_events = 100'000; // a shared line is masked by its interrupt controller, not here
    static constexpr u32 max_transfer = 512 * 1024; // bytes per command
    static constexpr u32 max_bounced = max_descriptors * static_cast<u32>(page_size); // likewise, of a bounced one
    static constexpr u32 bounce_bytes = 256 * 1024;
    // without an interrupt for this long the port is polled in each tick
    static constexpr Nanoseconds lost_after = 20'000'000;
    static constexpr u32 max_reports = 16; // log lines about failed commands

    struct Wire {
        bool alone = false; // not queued, although the disk has NCQ
        std::array<DmaSegment, max_descriptors> segments{};
        DmaMapping mapping{std::span<DmaSegment>(segments)}; // active: the data is bounced
    };
    using Command = io::Command<Transport>;

    /// `wide`: the HBA reaches memory above 4 GiB. `memory`: as long as the transport.
    Transport(io::Executor& executor, DmaAllocator& dma, HbaEvents& hba, Port port, PortMemory memory, bool wide,
              Nanoseconds timeout)
        : executor_(executor), hba_(hba), events_(executor), port_(port), memory_(memory), mapper_(dma, bounce_bytes),
          limits_{.highest = wide ? ~u64{0} : 0xffff'ffff, .max_segment = Prd::max_bytes, .alignment = 2},
          recovery_(executor, port_, memory_, timeout) {}

    Port& port() { return port_; }
    PortEvents& port_events() { return events_; }
    /// The port runs and its interrupts are enabled from now on.
    void open(Disk& disk, const Terms& terms);
    /// From now on abandoning a command stops the port.
    void leave() { leaving_ = true; }
    u64 resets() const { return recovery_.resets(); }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    void settle(io::Counters& counters);
    Result<bool> arm() { return done_ != 0 || returned_ != 0 || events_.pending(); }
    inline u32 events() const { return events_.count(); }
    bool finish(Command& command, io::Status status);
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& command, io::OldestWait::Finding finding, std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return recovery_.in_progress(); }
    Error fault() const { return fault_.value_or(Error{Code::protocol, "the port is broken"}); }
    bool closing(io::Status) {
        leave();
        return true;
    }

  private:
    bool queued(const Command& command) const {
        return depth_ != 0 && command.op <= io::Op::write && !command.wire.alone;
    }
    bool has_room(const Command& command) const;
    io::Fit map(Command& command);
    CommandFis build(const Command& command, u32 slot) const;
    bool collect();
    void check_length(u32 slot, io::Completion& completion);
    u32 ended_by_fis();
    bool examine(u32 causes);
    bool step();
    io::Completion give_back();
    io::Completion judge(u64 id, const Command& command);
    void report(const Command& command, ata::Status status, ata::ErrorRegister error);
    bool broken(const Error& why) {
        fault_ = why;
        return false;
    }
    void forget_commands() { issued_ = unissued_ = done_ = lost_ = returned_ = 0; }

    io::Executor& executor_;
    HbaEvents& hba_;
    PortEvents events_;
    Port port_;
    PortMemory memory_;
    BounceMapper mapper_; // its pool is allocated on first use
    const DmaLimits limits_;
    Recovery recovery_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Disk* disk_ = nullptr;
    u32 depth_ = 0;
    bool lba48_ = false;
    bool flush_ext_ = false;
    bool leaving_ = false;

    // Slots, one bit each.
    u32 unissued_ = 0;   // sent, and not issued before publish()
    u32 issued_ = 0;     // the device has them
    u32 done_ = 0;       // ended without an error
    u32 lost_ = 0;       // were issued when the port had to be restarted
    u32 returned_ = 0;   // of these, after the restart, those that next() has not returned
    bool queued_ = true; // those in unissued_ and issued_ are queued

    bool suspect_ = false; // the last tick saw the cause of an interrupt that has not occurred
    bool forced_ = false;
    bool transport_error_ = false; // the last error was not the device's
    TaskFile failed_{};            // its registers after the last error
    Instant issued_at_ = 0;
    std::optional<Error> fault_;
    u32 reports_ = 0;
    u64 charged_accesses_ = 0;
    u64 lost_interrupts_ = 0;
};

} // namespace fl::drivers::ahci

// Instantiated once, in queue.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::ahci::Transport>;
extern template class io::QueueDisk<drivers::ahci::Transport>;
} // namespace fl

export namespace fl::drivers::ahci {

/// A disk with its port's queue.
class Disk final : public io::QueueDisk<Transport> {
  public:
    Disk(io::Executor& executor, DmaAllocator& dma, HbaEvents& hba, Port port, PortMemory memory, bool wide,
         Nanoseconds timeout)
        : QueueDisk(executor, queue_), queue_(executor, executor, dma, hba, port, memory, wide, timeout) {}
    ~Disk() { close(); }

    /// Accepts requests from now on. Call before the disk is announced, when the HBA's interrupt is attached.
    void open(const Terms& terms, const Identity& identity, Nanoseconds timeout);
    /// Stops the port, and ends all requests with device_gone.
    void close();
    io::BlockQueue<Transport>& queue() { return queue_; }
    PortEvents& events() { return queue_.transport().port_events(); }
    /// The disk was unplugged, or the HBA removed. Callable on any processor.
    bool removed() const override { return removed_.load(std::memory_order_relaxed); }
    void remove() { removed_.store(true, std::memory_order_relaxed); } // relaxed: orders no other data

  private:
    io::BlockQueue<Transport> queue_;
    std::atomic<bool> removed_{false};
};

} // namespace fl::drivers::ahci
