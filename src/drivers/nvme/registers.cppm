// The controller's registers outside of the queues' doorbells [nvme-1.4 §3.1]: what it can do, enabling and disabling
// it. Each wait ends within the controller's own bound, CAP.TO.
export module drivers.nvme.registers;
import core.std;
import core.mmio;
import core.result;
import core.time;
import io.executor;
import io.task;
export import drivers.nvme.protocol;

export namespace fl::drivers::nvme {

class Registers {
  public:
    explicit Registers(io::Executor& executor) : executor_(executor) {}

    /// Reads and checks what the controller says about itself.
    Result<void> open(Mmio bar);
    Mmio bar() const { return bar_; }
    u32 largest_queue() const { return largest_queue_; } // entries, at least 2
    u8 stride() const { return stride_; }                // CAP.DSTRD
    bool command_sets() const { return command_sets_; }  // it may have other I/O command sets than NVM
    u32 version() const { return version_; }             // as in VS: 0x10400 is 1.4
    /// Whether the doorbells of queue pair `id` lie in the BAR.
    bool has_doorbells(u32 id) const {
        return doorbells + doorbell_offset(static_cast<u16>(id), true, stride_) + 4 <= bar_.size();
    }
    /// The registers have read as all ones: the controller is not there any more.
    bool gone() const { return gone_; }
    /// The controller may access memory.
    bool enabled() const { return enabled_; }

    /// Error{timed_out}: it does not stop, and may still access memory. Error{device_gone}: gone().
    io::Task<Result<void>> disable();
    /// With the admin queue pair at these bus addresses, of `entries` each.
    io::Task<Result<void>> enable(u64 submissions, u64 completions, u32 entries);

  private:
    io::Task<Result<void>> wait_ready(bool ready);

    io::Executor& executor_;
    Mmio bar_{};
    u32 largest_queue_ = 2;
    u8 stride_ = 0;
    u32 version_ = 0;
    bool command_sets_ = false;
    Nanoseconds ready_bound_ = 0;
    bool gone_ = false;
    bool enabled_ = false;
};

} // namespace fl::drivers::nvme
