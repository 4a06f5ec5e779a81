// What is done about a PVSCSI adapter that does not answer, and how it is kept from memory [pvscsi]:
//
//   a lost command      ABORT_CMD → after another time-out RESET_DEVICE
//   a silent adapter    RESET_BUS
//   neither helps       ADAPTER_RESET, and the queue closes
export module drivers.pvscsi.recovery;
import core.std;
import core.result;
import core.text;
import core.time;
import io.block_queue;
import io.executor;
import io.oldest_wait;
import drivers.pvscsi.protocol;
import drivers.pvscsi.adapter;

export namespace fl::drivers::pvscsi {

/// The command that has waited longest.
struct Oldest {
    u64 number = 0; // as QueuedCommand::number
    u32 context = 0;
    u32 target = 0;
};

class Recovery {
  public:
    Recovery(io::Executor& executor, Adapter& adapter) : executor_(executor), adapter_(adapter) {}
    /// `timeout`: bound of an ABORT_CMD, in nanoseconds of machine time.
    void start(Nanoseconds timeout) { timeout_ = timeout; }

    io::Recovery recover(const Oldest& oldest, io::OldestWait::Finding finding, std::string_view names);
    /// The command was aborted: however it ends, it has timed out.
    bool aborted(u32 context) const { return context == aborted_context_; }

    /// A completion was taken: the adapter is there.
    inline void answered() { alive_ = true; }
    /// In each tick. Error{device_gone}: the adapter was removed.
    Result<void> check();

    /// From now on the adapter is reset when a command is abandoned.
    void leave() { leaving_ = true; }
    io::Fence fence();
    /// Once: the adapter forgets its commands.
    void reset();
    /// It was reset, or is gone: it accesses no memory.
    bool stopped() const { return stopped_; }
    /// Callable on any processor.
    bool removed() const { return removed_.load(std::memory_order_relaxed); } // relaxed: orders no other data

  private:
    io::Executor& executor_;
    Adapter& adapter_;
    Nanoseconds timeout_ = 0;
    bool alive_ = false; // a completion was taken since the last check
    bool leaving_ = false;
    bool reset_ = false;
    bool stopped_ = false;
    u64 aborted_ = 0; // number of the command that was aborted last
    u32 aborted_context_ = 0;
    std::optional<io::Bound> abort_bound_;
    std::atomic<bool> removed_{false};
};

} // namespace fl::drivers::pvscsi
