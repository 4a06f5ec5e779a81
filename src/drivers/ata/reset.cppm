// The software reset of a channel [ATA-7 §9.2] as a state machine that a queue advances in its ticks, and the decision
// when resetting has become pointless.
//
//   none ──begin()──> asserted ──hold──> released ──settle, BSY = 0──> none
//                                           │ BSY for the whole time-out, or too many resets in a row
//                                           v
//                                         Error
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
    }
    /// The device has completed a command.
    inline void succeeded() { in_a_row_ = 0; }
    /// Further resets would not help.
    bool exhausted() const { return in_a_row_ > most_in_a_row; }
    /// For a channel that is given up: it stays as it is.
    void abort() { state_ = State::none; }
    /// Number of resets so far.
    u64 count() const { return count_; }

    /// Error{timed_out}: BSY stays set, or no device is there; Error{io}: too many resets in a row.
    Result<void> tick(Instant now) {
        if (state_ == State::asserted && now - asserted_at_ >= hold) {
            channel_.release_reset(Control::none);
            released_at_ = now;
            state_ = State::released;
        } else if (state_ == State::released && now - released_at_ >= settle) {
            return finish(now);
        }
        return {};
    }

  private:
    enum class State : u8 { none, asserted, released };

    Result<void> finish(Instant now) {
        if (const Status status = channel_.registers().status(); status.busy() || status.floating()) {
            if (now >= executor_.end_of_bound(asserted_at_, timeout_)) {
                return Error{Code::timed_out, "the disk is not ready after a software reset"};
            }
            return {};
        }
        channel_.initialise_engine();
        state_ = State::none;
        if (exhausted()) {
            return Error{Code::io, "the disk fails every command, even after resets"};
        }
        return {};
    }

    io::Executor& executor_;
    Channel<P>& channel_;
    Nanoseconds timeout_;
    State state_ = State::none;
    Instant asserted_at_ = 0;
    Instant released_at_ = 0;
    u32 in_a_row_ = 0;
    u64 count_ = 0;
};

} // namespace fl::drivers::ata
