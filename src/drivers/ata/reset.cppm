// The software reset of a channel [ATA-7 §9.2] as a state machine that a queue advances in its ticks, and the decision
// when resetting has become pointless. A reset may switch on a disk's write cache, so that of a disk which is used
// without flushes is switched off again before any other command.
//
//   none ──begin()──> asserted ──hold──> released ──settle, BSY = 0──> setting (each such disk) ──BSY = 0──> none
//                         ^                 │                             │ refused, or BSY for the whole time-out
//                         │                 │ BSY for the whole time-out  │
//                         └─────────────────│─────────────────────────────┤
//                                           v                             v too many resets in a row
//                                         Error                         Error
export module drivers.ata.reset;
import core.std;
import core.result;
import core.time;
import io.executor;
import drivers.ata.protocol;
import drivers.ata.channel;

export namespace fl::drivers::ata {

template <PortAccess P>
class SoftReset {
  public:
    static constexpr Nanoseconds hold = 5'000;       // SRST is asserted for at least this long
    static constexpr Nanoseconds settle = 2'000'000; // then BSY is not read for at least this long
    static constexpr u32 most_in_a_row = 3;          // without a command that succeeded in between

    /// `timeout`: bound for the device to clear BSY, in nanoseconds of machine time.
    SoftReset(io::Executor& executor, Channel<P>& channel, Nanoseconds timeout)
        : executor_(executor), channel_(channel), timeout_(timeout) {}

    bool in_progress() const { return state_ != State::none; }
    /// Asserts the reset. The bus-master engine is off when this returns. `by_owner`: because the owner abandoned a
    /// command, not because the device failed: not counted as one in a row.
    void begin(bool by_owner = false) {
        ++count_;
        in_a_row_ += by_owner ? 0 : 1;
        channel_.assert_reset();
        asserted_at_ = executor_.now();
        state_ = State::asserted;
        to_set_ = write_through_;
    }
    /// From now on each reset switches off the write cache of `unit`.
    void keep_write_through(u8 unit) { write_through_ |= static_cast<u8>(1u << unit); }
    /// The device has completed a command.
    inline void succeeded() { in_a_row_ = 0; }
    /// Further resets would not help.
    bool exhausted() const { return in_a_row_ > most_in_a_row; }
    /// For a channel that is given up: it stays as it is.
    void abort() { state_ = State::none; }
    /// Number of resets so far.
    u64 count() const { return count_; }

    /// Error{timed_out}: BSY stays set, or no device is there; Error{io}: too many resets in a row, of a device that
    /// fails every command or refuses to switch off its write cache.
    Result<void> tick(Instant now) {
        if (state_ == State::asserted && now - asserted_at_ >= hold) {
            channel_.release_reset(Control::interrupts_off);
            released_at_ = now;
            state_ = State::released;
        } else if (state_ == State::released && now - released_at_ >= settle) {
            return ready(now);
        } else if (state_ == State::setting) {
            return was_set(now);
        }
        return {};
    }

  private:
    enum class State : u8 { none, asserted, released, setting };

    Result<void> ready(Instant now) {
        if (const Status status = channel_.registers().status(); status.busy() || status.floating()) {
            if (now >= executor_.end_of_bound(asserted_at_, timeout_)) {
                return Error{Code::timed_out, "the disk is not ready after a software reset"};
            }
            return {};
        }
        if (exhausted()) {
            state_ = State::none;
            return Error{Code::io, "the disk fails every command, even after resets"};
        }
        set_next(now);
        return {};
    }
    /// Switches off the next write cache, or ends the reset.
    void set_next(Instant now) {
        if (to_set_ != 0) {
            channel_.set_features(static_cast<u8>(std::countr_zero(to_set_)), SetFeature::no_write_cache);
            static_cast<void>(channel_.registers().alternate_status()); // BSY is valid 400 ns later [ATA-7 §9.4]
            set_at_ = now;
            state_ = State::setting;
            return;
        }
        channel_.initialise_engine();
        channel_.registers().control(Control::none);
        state_ = State::none;
    }
    Result<void> was_set(Instant now) {
        const Status status = channel_.registers().status(); // clears the interrupt
        if (status.busy() && now < executor_.end_of_bound(set_at_, timeout_)) {
            return {};
        }
        if (status.busy() || status.error() || status.device_fault()) {
            if (in_a_row_ >= most_in_a_row) {
                return Error{Code::io, "the disk does not switch off its write cache after a reset (SET FEATURES 82h)",
                             0x50, status.raw};
            }
            begin();
            return {};
        }
        to_set_ &= static_cast<u8>(to_set_ - 1);
        set_next(now);
        return {};
    }

    io::Executor& executor_;
    Channel<P>& channel_;
    Nanoseconds timeout_;
    State state_ = State::none;
    Instant asserted_at_ = 0;
    Instant released_at_ = 0;
    Instant set_at_ = 0;
    u8 write_through_ = 0; // units, by bit
    u8 to_set_ = 0;        // of them, those whose cache may be on
    u32 in_a_row_ = 0;
    u64 count_ = 0;
};

} // namespace fl::drivers::ata
