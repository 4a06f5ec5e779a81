// Admin commands: one at a time for their data, each with a bound. Runs on the boot processor.
export module drivers.nvme.admin;
import core.std;
import core.dma;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;
import drivers.driver;
export import drivers.nvme.disk;

export namespace fl::drivers::nvme {

class Admin {
  public:
    Admin(Environment& environment, u32 index) : environment_(environment), index_(index) {}

    /// The admin queue. It is closed if it does not answer a command.
    Result<void> open(Queue& queue);
    /// From now on the controller is reset instead if a command is not answered.
    void reset_when_silent(Recovery& recovery) { recovery_ = &recovery; }
    bool is_open() const { return queue_ != nullptr && queue_->is_open(); }

    /// Sends a command, and returns its result's dw0. Error{io}: it has failed, which is logged, unless `optional`.
    /// Error{timed_out}: no answer. Error{device_gone}: the queue was closed, or the controller reset.
    io::Task<Result<u32>> command(Submission command, std::string_view what, bool optional = false);
    /// The data is in data() until the next command.
    io::Task<Result<void>> identify(u32 cns, u32 nsid, bool optional = false);
    /// `bytes`: at most identify_bytes.
    io::Task<Result<void>> log_page(u8 which, u32 bytes);
    io::Task<Result<u32>> set_feature(u32 feature, u32 value, std::string_view what, bool optional = false);
    /// Retry delays are understood (ACRE) [nvme-1.4 §5.21.1.22]. Errors: as command().
    io::Task<Result<u32>> accept_delays();
    /// Waits for an event [nvme-1.4 §5.2]. Error{io}: the controller refuses to report events.
    io::Task<Result<Event>> next_event();

    std::span<const u8, identify_bytes> data() const {
        return std::span<const u8, identify_bytes>(reinterpret_cast<const u8*>(scratch_.data()), identify_bytes);
    }

  private:
    Environment environment_;
    u32 index_; // of the controller, for log lines
    Queue* queue_ = nullptr;
    Recovery* recovery_ = nullptr;
    DmaBuffer scratch_;
};

} // namespace fl::drivers::nvme
