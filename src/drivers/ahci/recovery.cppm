// Brings a port back to work after an error or silence [ahci-1.3.1 §6.2.2], as a state machine that a queue advances in
// its ticks and interrupts, and decides when that has become pointless.
//
//   none ──begin_error()──> stopping ──CR = 0──> started ──> none
//              begin_reset()──┘  │                  └─ NCQ ──> READ LOG EXT (NCQ command error) ──> none
//                                │ a reset, a change of the link, or the device holds BSY or DRQ
//                                v
//                             COMRESET ──hold──> released ──link up──> linked ──BSY = DRQ = 0──> IDENTIFY DEVICE
//                                 ──the same disk──> (SET FEATURES: no write cache) ──> none
//
// No command of the queue reaches the port between a reset and the answer to IDENTIFY DEVICE: the disk may be another
// one. Every wait has a bound; its end, and another disk, is an Error, which closes the queue.
export module drivers.ahci.recovery;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.executor;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.memory;
import drivers.ahci.terms;

export namespace fl::drivers::ahci {

class Recovery {
  public:
    static constexpr Nanoseconds stop_bound = 500'000'000;   // for CR [ahci-1.3.1 §10.1.2]
    static constexpr Nanoseconds hold = 1'000'000;           // COMRESET is sent for at least this long [§10.4.2]
    static constexpr Nanoseconds link_bound = 1'000'000'000; // for the link to come up after COMRESET
    static constexpr u32 most_in_a_row = 3;                  // without a command that succeeded in between

    /// `timeout`: bound for the device after a reset, and for each command of this, in nanoseconds of machine time.
    Recovery(io::Executor& executor, Port& port, const PortMemory& memory, Nanoseconds timeout)
        : executor_(executor), port_(port), memory_(memory), timeout_(timeout) {}

    /// The disk that must be at the port after a reset.
    void open(const Terms& terms) {
        identity_ = terms.identity;
        write_through_ = terms.write_through;
    }
    bool in_progress() const { return state_ != State::none; }
    /// A command has failed. `queued`: find out which, from the device's log. Advance by step().
    void begin_error(bool queued) {
        read_log_ = queued;
        reset_ = false;
        begin();
    }
    /// `link`: because the link has changed. True: the command list has stopped at once, and the device holds no
    /// commands.
    bool begin_reset(bool link = false) {
        read_log_ = false;
        reset_ = true;
        link_ = link;
        in_a_row_ += link && state_ == State::none ? 0 : 1;
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

    /// Advances as far as the device permits. `causes`: of PxIS, that the interrupt handler has cleared. True: over,
    /// the port runs. Error{timed_out}: a bound has passed; Error{device_gone}: the disk is not there any more, or is
    /// another one; Error{io}: it fails every command in spite of resets.
    Result<bool> step(u32 causes);

  private:
    enum class State : u8 { none, stopping, reset, released, linked, reading_log, identifying, setting };
    void enter(State state) {
        state_ = state;
        since_ = executor_.now();
    }
    void end() {
        state_ = State::none;
        over_ = true;
    }
    void begin();
    void stopped();
    void start();
    void send(State state, const CommandFis& fis, bool reads);
    bool sent() const { return state_ >= State::reading_log; }
    Result<void> check_sent(u32 causes);
    Result<void> answered();
    Result<void> check_identity();
    Result<void> again();
    Result<bool> overdue();

    io::Executor& executor_;
    Port& port_;
    const PortMemory& memory_;
    Nanoseconds timeout_;
    ata::DeviceIdentity identity_{ata::IdentifyData{}};
    bool write_through_ = false;
    State state_ = State::none;
    bool read_log_ = false;
    bool reset_ = false;
    bool link_ = false; // the link has changed: it may be another disk
    bool over_ = false; // and step() has not returned it
    Instant since_ = 0;
    u32 in_a_row_ = 0;
    u64 resets_ = 0;
    std::optional<QueueError> failed_;
};

} // namespace fl::drivers::ahci
