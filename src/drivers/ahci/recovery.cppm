// Brings a port back to work after an error or silence [ahci-1.3.1 §6.2.2], as a state machine that a queue advances in
// its ticks and interrupts, and decides when that has become pointless.
//
//   none ──begin_error()──> stopping ──CR = 0──> started ──> none
//              begin_reset()──┘  │                  └─ NCQ ──> reading the NCQ command error log ──> none
//                                │ a reset, or the device holds BSY or DRQ
//                                v
//                             COMRESET ──hold──> released ──link up, BSY = DRQ = 0──> none
//
// Every wait has a bound; its end is an Error, which closes the queue.
export module drivers.ahci.recovery;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.executor;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.memory;

export namespace fl::drivers::ahci {

class Recovery {
  public:
    static constexpr Nanoseconds stop_bound = 500'000'000; // for CR [ahci-1.3.1 §10.1.2]
    static constexpr Nanoseconds hold = 1'000'000;         // COMRESET is sent for at least this long [§10.4.2]
    static constexpr u32 most_in_a_row = 3;                // without a command that succeeded in between

    /// `timeout`: bound for the device after a reset, and for the log, in nanoseconds of machine time.
    Recovery(io::Executor& executor, Port& port, const PortMemory& memory, Nanoseconds timeout)
        : executor_(executor), port_(port), memory_(memory), timeout_(timeout) {}

    bool in_progress() const { return state_ != State::none; }
    /// A command has failed. `queued`: find out which, from the device's log. Advance by step().
    void begin_error(bool queued) {
        read_log_ = queued;
        reset_ = false;
        begin();
    }
    /// True: the command list has stopped at once, and the device holds no commands.
    bool begin_reset() {
        read_log_ = false;
        reset_ = true;
        count_reset();
        begin();
        return state_ != State::stopping;
    }
    /// The device has completed a command.
    inline void succeeded() { in_a_row_ = 0; }
    bool exhausted() const { return in_a_row_ > most_in_a_row; }
    /// For a port that is given up: it stays as it is.
    void abort() { state_ = State::none; }
    u64 resets() const { return resets_; }
    /// After an error with NCQ: the command that failed; nullopt: the device does not say.
    const std::optional<QueueError>& failed() const { return failed_; }

    /// Advances as far as the device permits. True: over, the port runs. Error{timed_out}: a bound has passed.
    Result<bool> step() {
        if (state_ == State::stopping && port_.stopped()) {
            stopped();
        }
        if (state_ == State::reset && executor_.now() - since_ >= hold) {
            port_.comreset(false);
            enter(State::released);
        }
        if (state_ == State::released && port_.established()) {
            port_.command(false); // lets the HBA store the first FIS of the device
            if (const ata::Status status = port_.read<TaskFile>().status(); !status.in_progress()) {
                start();
            }
        }
        if (state_ == State::reading) {
            log_read();
        }
        if (state_ == State::none) {
            return std::exchange(over_, false);
        }
        if (executor_.now() >= executor_.end_of_bound(since_, state_ == State::stopping ? stop_bound : timeout_)) {
            return overdue();
        }
        return false;
    }

  private:
    enum class State : u8 { none, stopping, reset, released, reading };
    void enter(State state) {
        state_ = state;
        since_ = executor_.now();
    }
    void end() {
        state_ = State::none;
        over_ = true;
    }
    void count_reset() {
        ++resets_;
        ++in_a_row_;
    }
    void begin() {
        failed_.reset();
        over_ = false;
        enter(State::stopping);
        if (port_.stop()) {
            stopped();
        }
    }
    void stopped() {
        if (reset_ || port_.read<TaskFile>().status().in_progress()) {
            read_log_ = false;
            if (!reset_) {
                count_reset();
            }
            port_.comreset(true);
            return enter(State::reset);
        }
        start();
    }
    void start() {
        port_.clear_errors();
        port_.clear_pending(port_.bit());
        memory_.forget(ReceivedFis::bits_at);
        memory_.forget(ReceivedFis::register_at);
        port_.command(true);
        end();
        if (read_log_) {
            const DmaSpan page = memory_.block(0);
            memory_.encode(0, PortMemory::own, error_log_fis(), false, {&page, 1});
            port_.write(command_issue, 1);
            over_ = false;
            enter(State::reading);
        }
    }
    void log_read() {
        const bool failed = (port_.read<PortInterrupts>().raw & PortInterrupts::fatal) != 0;
        if (!failed && (port_.read(command_issue) & 1) != 0) {
            return;
        }
        if (failed) { // without the log only a reset makes the device accept other commands [sata]
            static_cast<void>(begin_reset());
            return;
        }
        read_log_ = false;
        // Before the log the device ends all tags by a Set Device Bits FIS [sata]: no answer to those that are sent
        // from now on.
        memory_.forget(ReceivedFis::bits_at);
        std::array<u8, 512> page;
        std::memcpy(page.data(), memory_.block(0).data, page.size());
        failed_ = decode_error_log(page);
        end();
    }
    Result<bool> overdue() {
        switch (state_) {
        case State::stopping: return Error{Code::timed_out, "the HBA does not stop the port's command list (PxCMD.CR)"};
        case State::reading: // the log is a help, not a necessity
            static_cast<void>(begin_reset());
            return false;
        default: return Error{Code::timed_out, "the disk is not ready after a reset of the port (COMRESET)"};
        }
    }

    io::Executor& executor_;
    Port& port_;
    const PortMemory& memory_;
    Nanoseconds timeout_;
    State state_ = State::none;
    bool read_log_ = false;
    bool reset_ = false;
    bool over_ = false; // and step() has not returned it
    Instant since_ = 0;
    u32 in_a_row_ = 0;
    u64 resets_ = 0;
    std::optional<QueueError> failed_;
};

} // namespace fl::drivers::ahci
