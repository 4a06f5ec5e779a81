// A PVSCSI adapter's queue, and a Disk on it for each logical unit. Independent of PCI and of the set-up. The life
// cycle of a request is in io.block_queue; this is its transport: SCSI commands in request descriptors.
//
// A completion is copied out once and must carry the context of a command that is with the adapter, and no more data
// and sense data than requested. The first violation closes the queue. Closing resets the adapter, which then holds no
// commands and accesses no memory.
export module drivers.pvscsi.disk;
import core.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
export import drivers.pvscsi.protocol;
export import drivers.pvscsi.adapter;
export import drivers.pvscsi.recovery;
export import drivers.pvscsi.requests;
export import drivers.pvscsi.rings;
export import drivers.pvscsi.targets;

export namespace fl::drivers::pvscsi {

class Disk;

class Transport : public io::TransportDefaults {
  public:
    using Disk = pvscsi::Disk;
    static constexpr std::string_view driver = "pvscsi";
    static constexpr u32 max_commands = Memory::entries; // as many completions fit
    static constexpr u32 reserved_commands = 2;          // for a rescan
    static constexpr u32 max_transfer = 512 * 1024;      // bytes per command
    struct Wire {
        scsi::CommandForm form;
        u32 context = 0;
    };
    using Command = io::Command<Transport>;
    struct Options {
        bool line = false; // else the interrupt is a message
        bool messages = false;
        bool threshold = false;
        Nanoseconds timeout = 0;
        void (*notify)(void* context) = nullptr; // targets have changed, or the queue has closed
        void* context = nullptr;
    };

    explicit Transport(io::Executor& executor) : executor_(executor), recovery_(executor, adapter_) {}
    Adapter& adapter() { return adapter_; }
    /// The adapter has the rings, empty.
    Result<void> start(const Memory& memory, const Options& options);
    static void on_interrupt(void* self);
    Recovery& recovery() { return recovery_; }
    const Recovery& recovery() const { return recovery_; }
    ChangedTargets& targets() { return targets_; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Result<void> release(io::Counters&) { return rings_.release(), Result<void>{}; }
    void settle(io::Counters& counters) { counters.device_accesses += adapter_.take_accesses(); }
    Result<bool> arm() { return adapter_.listen(!commands_->empty()), rings_.arm(); }
    void silence() { adapter_.silence(); }
    inline u32 events() const { return interrupts_.load(std::memory_order_relaxed); }
    inline bool finish(Command&, io::Status) { return true; }
    io::Fence fence(Command&) { return recovery_.fence(); }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    std::optional<Error> reset_ineffective(bool writes);
    Result<void> tick(Instant now, bool waiting);
    Error fault() const { return fault_.value_or(Error{Code::protocol, "a PVSCSI ring is broken"}); }
    bool closing(io::Status) { return recovery_.leave(), true; }
    void closed(bool stopped);

  private:
    io::Completion judge(u64 id, Command& command, const CompletionDescriptor& answer, scsi::Response response);
    io::Next broken(const Error& why) { return fault_ = why, io::Next::broken; }

    io::Executor& executor_;
    Adapter adapter_;
    Memory memory_;
    Options options_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Rings rings_;
    Recovery recovery_;
    ChangedTargets targets_;
    bool other_ = false;    // a command that is not a read or write is unpublished
    bool withheld_ = false; // the last kick was not wanted
    u32 looked_ = 0;        // interrupts when the message ring was last read
    std::optional<Error> fault_;
    std::atomic<bool> live_{false};  // release/acquire: the start, or the end, before it
    std::atomic<u32> interrupts_{0}; // relaxed: written by the handler, on this processor; ordered by raise()
};

} // namespace fl::drivers::pvscsi

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::pvscsi::Transport>;
extern template class io::QueueDisk<drivers::pvscsi::Transport>;
} // namespace fl

export namespace fl::drivers::pvscsi {

using Queue = io::BlockQueue<Transport>;

/// A logical unit.
class Disk final : public io::QueueDisk<Transport> {
  public:
    struct Unit : scsi::UnitLimits, Address {};
    Disk(Queue& queue, const Unit& unit, const io::Geometry& geometry, const Identity& identity);
    ~Disk() { owner_.remove(*this); }
    const Unit& unit() const { return unit_; }
    /// Further requests are refused.
    void remove() { gone_.store(true, std::memory_order_relaxed); } // relaxed: orders no other data
    bool removed() const override {
        return gone_.load(std::memory_order_relaxed) || owner_.transport().recovery().removed();
    }

  private:
    friend class Transport;
    Queue& owner_;
    Unit unit_;
    scsi::LogicalUnit commands_;
    std::atomic<bool> gone_{false};
};

} // namespace fl::drivers::pvscsi
