// An AHCI port as an io.block_queue transport: one disk, up to 32 commands with NCQ, else one at a time.
//
// A slot of the command table is the command slot and the NCQ tag. A command that is not queued (a flush, a discard, a
// read of a disk without NCQ) is issued only when the port has no other, and then is the only one [ahci-1.3.1 §5.6.1]:
// the queue's lists keep their order, so that later requests wait for it.
//
// What happens after an error is in drivers.ahci.errors; the disk with its queue is in drivers.ahci.sata_disk.
export module drivers.ahci.queue;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import drivers.ahci.protocol;
export import drivers.ahci.port;
export import drivers.ahci.memory;
export import drivers.ahci.interrupts;
export import drivers.ahci.polling;
export import drivers.ahci.recovery;
export import drivers.ahci.commands;
export import drivers.ahci.errors;
export import drivers.ahci.slots;
export import drivers.ahci.terms;

export namespace fl::drivers::ahci {

class PortDisk;

class Transport : public io::TransportDefaults {
  public:
    using Disk = PortDisk;
    static constexpr std::string_view driver = "ahci";
    static constexpr u32 max_commands = PortMemory::slots;
    static constexpr u32 max_idle_events = 100'000; // a shared line is masked by its interrupt controller, not here
    using Wire = ahci::Wire;
    using Command = io::Command<Transport>;

    /// `wide`: the HBA reaches memory above 4 GiB. `memory`: as long as the transport.
    Transport(io::Executor& executor, DmaAllocator& dma, HbaEvents& hba, Port port, PortMemory memory, bool wide,
              Nanoseconds timeout)
        : executor_(executor), hba_(hba), events_(executor), port_(port), memory_(memory), encoder_(dma, memory_, wide),
          slots_(port_, memory_), recovery_(executor, port_, memory_, timeout), errors_(port_, hba, slots_, recovery_),
          polling_(executor, port_, slots_, recovery_, events_) {}

    Port& port() { return port_; }
    PortEvents& port_events() { return events_; }
    /// The port runs and its interrupts are enabled from now on.
    void open(PortDisk& disk, const Terms& terms);
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
    Result<bool> arm() { return polling_.listen() || slots_.any_done() || slots_.any_returned() || events_.pending(); }
    void silence() { polling_.silence(); }
    inline u32 events() const { return events_.count(); }
    bool finish(Command& command, io::Status status) {
        encoder_.unmap(command, command.wire, status == io::Status::ok && command.first != nullptr);
        return true;
    }
    io::Fence fence(Command& command);
    io::Recovery recover(const Command& command, io::OldestWait::Finding finding, std::string_view names);
    Result<void> tick(Instant now, bool waiting);
    bool wants_tick() const { return recovery_.in_progress(); }
    Error fault() const { return fault_.value_or(Error{Code::protocol, "the port is broken"}); }
    bool closing(io::Status) { return leave(), true; }
    void closed(bool stopped) { hba_.changed(stopped ? 0 : port_.bit()); }

  private:
    inline bool has_room(const Command& command) const {
        return !recovery_.in_progress() && slots_.has_room(encoder_.queued(command, command.wire));
    }
    bool collect();
    bool attend(const Result<bool>& recovered);
    bool broken(const Error& why) {
        fault_ = why;
        return false;
    }

    io::Executor& executor_;
    HbaEvents& hba_;
    PortEvents events_;
    Port port_;
    PortMemory memory_;
    Commands encoder_;
    Slots slots_;
    Recovery recovery_;
    io::CommandTable<Transport>* commands_ = nullptr;
    PortDisk* disk_ = nullptr;
    Errors errors_;
    Polling polling_;
    LostInterrupt lost_;
    bool leaving_ = false;
    std::optional<Error> fault_;
    u64 charged_accesses_ = 0;
};

/// The disk of a port, as its queue sees it.
class PortDisk : public io::QueueDisk<Transport> {
  public:
    using QueueDisk::QueueDisk;
    /// The disk was unplugged or replaced, or the HBA removed. Callable on any processor.
    bool removed() const final { return removed_.load(std::memory_order_relaxed); }
    void remove() { removed_.store(true, std::memory_order_relaxed); } // relaxed: orders no other data

  protected:
    ~PortDisk() = default;

  private:
    std::atomic<bool> removed_{false};
};

} // namespace fl::drivers::ahci

// Instantiated once, in queue.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::ahci::Transport>;
extern template class io::QueueDisk<drivers::ahci::Transport>;
} // namespace fl
