// What happens when a command is not answered, or the controller has failed [nvme-1.4 §5.1, §7.3.2, §9.5]. The queues,
// each on its processor, ask; the controller's task does it:
//
//   the oldest command has timed out ──> Abort ──answered: it ends as aborted, and is sent again
//                                          └── not aborted, refused, no answer ──> reset
//   CSTS.CFS, an admin command without an answer ─────────────────────────────────> reset
//
//   reset: hold() ──every queue is quiet──> the controller is disabled and set up anew ──> release()
//
// A quiet queue touches neither its rings nor a doorbell, and keeps its commands. After release() it returns each of
// them from BlockTransport::next() to be sent again. A command that was with the controller in `most_attempts` resets
// ends as timed_out; `most_in_a_row` resets without any completion between them close the controller.
//
//   atomic      ordering         written by             read by     orders
//   request_    acq_rel          queues, the task       both        nothing but itself; the signal wakes the task
//   progress_   relaxed          queues                 the task    nothing
// and those of drivers.nvme.hold.
export module drivers.nvme.recovery;
import core.std;
import core.result;
import core.time;
import io.executor;
import io.block_queue;
import io.task;
import drivers.nvme.queue;
import drivers.nvme.hold;

export namespace fl::drivers::nvme {

/// Of one controller; outlives its queues.
class Recovery {
  public:
    static constexpr u32 most_attempts = 3; // of one command
    static constexpr u32 most_in_a_row = 3;

    enum class Kind : u8 { none, abort, reset };
    enum class Cause : u8 { silent, fatal, admin };
    struct Request {
        Kind kind = Kind::none;
        Cause cause = Cause::silent; // of a reset
        u16 queue = 0;               // of the command to be aborted, and its id
        u16 cid = 0;
    };

    /// `executor`: of the controller's task.
    explicit Recovery(io::Executor& executor) : signal_(executor) {}

    /// An abort or a reset has ended a command. `attempts`: how often that has happened to it before.
    static inline io::Retry again(u8& attempts) {
        return ++attempts <= most_attempts ? io::Retry::later : io::Retry::none;
    }

    // ---- by the queues, on any processor ----

    /// Something has been asked for and is not done.
    inline bool pending() const { return request_.load(std::memory_order_acquire) != 0; }
    /// Ignored while another request is pending.
    void request_abort(u16 queue, u16 cid) {
        u64 none = 0;
        if (request_.compare_exchange_strong(none, pack({Kind::abort, Cause::silent, queue, cid}),
                                             std::memory_order_acq_rel)) {
            signal_.raise();
        }
    }
    /// Replaces an abort that is pending.
    void request_reset(Cause cause) {
        u64 seen = request_.load(std::memory_order_acquire);
        while (unpack(seen).kind != Kind::reset) {
            if (request_.compare_exchange_weak(seen, pack({Kind::reset, cause, 0, 0}), std::memory_order_acq_rel)) {
                return signal_.raise();
            }
        }
    }
    inline const Hold& hold_state() const { return hold_; }
    /// Completions were taken.
    inline void note_progress() { progress_.store(true, std::memory_order_relaxed); }
    /// Wakes the controller's task, to look at what has changed.
    void wake() { signal_.raise(); }

    // ---- by the controller's task ----

    io::Signal& signal() { return signal_; }
    Request request() const { return unpack(request_.load(std::memory_order_acquire)); }
    /// `of` is done. One that has replaced it stays.
    void done(const Request& of) {
        u64 old = pack(of);
        static_cast<void>(request_.compare_exchange_strong(old, 0, std::memory_order_acq_rel));
    }
    /// A reset begins. False: too many without a completion between them.
    bool count_reset() {
        in_a_row_ = progress_.exchange(false, std::memory_order_relaxed) ? 1 : in_a_row_ + 1;
        ++resets_;
        return in_a_row_ <= most_in_a_row;
    }
    u64 resets() const { return resets_; }
    /// From now on each queue becomes quiet in its next turns: QueueRecovery::quiet().
    void hold() { hold_.hold(); }
    /// After hold(): the queues may use their new rings.
    void release() { hold_.release(); }

  private:
    static constexpr u64 pack(const Request& r) {
        return u64{to_underlying(r.kind)} << 40 | u64{to_underlying(r.cause)} << 32 | u64{r.queue} << 16 | r.cid;
    }
    static constexpr Request unpack(u64 word) {
        return {static_cast<Kind>(word >> 40), static_cast<Cause>(word >> 32 & 0xff), static_cast<u16>(word >> 16),
                static_cast<u16>(word)};
    }

    io::Signal signal_;
    std::atomic<u64> request_{0};
    Hold hold_;
    std::atomic<bool> progress_{false};
    u32 in_a_row_ = 0; // of the task, as the next one
    u64 resets_ = 0;
};

/// A queue's part in it. On the queue's processor, except quiet().
class QueueRecovery {
  public:
    QueueRecovery(io::Executor& executor, Recovery& controller) : executor_(executor), controller_(controller) {}

    /// The queue works as usual.
    inline bool running() const { return queue_.running(); }
    /// The controller holds no commands, and the queue may not access its rings.
    inline bool held() const { return queue_.held(); }
    /// Callable by the controller's task, after Recovery::hold().
    bool quiet() const { return queue_.quiet(controller_.hold_state()); }
    Recovery& controller() { return controller_; }
    inline Instant turn_time() const { return executor_.turn_time(); }

    /// No completion is there. True: the queue is held from now on.
    inline bool look() { return queue_.look(controller_.hold_state()); }
    /// Instead of looking for completions, while not running: a command that is to be sent again, after a reset.
    /// Commands that wait for a resend are not with the controller, and are left alone.
    template <class Table>
    std::optional<u64> next(Table& commands) {
        if (held()) {
            if (!queue_.resume(controller_.hold_state())) {
                return std::nullopt;
            }
            next_slot_ = 0;
        }
        while (next_slot_ < commands.capacity()) {
            const u16 slot = next_slot_++;
            if (commands.has_slot(slot) && !commands.find_slot(slot)->delayed) {
                return commands.id_of(slot);
            }
        }
        queue_.run();
        return std::nullopt;
    }

    /// Once per tick. `alive`: a completion was taken since the last one. Else the registers are looked at, in one
    /// access [nvme-1.4 §3.1.6]; meanwhile a reset does that itself. Error{device_gone}: they read as all ones.
    Result<void> tick(bool alive, QueuePair& pair) {
        if (alive) {
            if (pair.terms().id != 0) { // a reset itself completes commands of the admin queue
                controller_.note_progress();
            }
        } else if (!held() && !controller_.pending()) {
            pair.count_accesses(1);
            const auto status = ControllerStatus::read(pair.terms().registers);
            if (status.absent()) {
                return Error{Code::device_gone, "the controller was removed: its registers read as all ones"};
            }
            if (status.get(ControllerStatus::cfs)) {
                controller_.request_reset(Recovery::Cause::fatal);
            }
        }
        return {};
    }
    /// The oldest command, `number`, has timed out: asks for an abort, and if that has had no effect within a
    /// time-out, for a reset.
    void timed_out(u64 number, u16 queue, u16 cid, Nanoseconds timeout) {
        if (controller_.pending()) {
            return;
        }
        if (aborted_ != number) {
            aborted_ = number;
            bound_.emplace(executor_, timeout);
            controller_.request_abort(queue, cid);
        } else if (bound_->passed()) {
            controller_.request_reset(Recovery::Cause::silent);
        }
    }

  private:
    io::Executor& executor_;
    Recovery& controller_;
    HeldQueue queue_;
    u16 next_slot_ = 0; // while returning: slots before it are done
    u64 aborted_ = 0;   // the number of the command whose abort was requested
    std::optional<io::Bound> bound_;
};

} // namespace fl::drivers::nvme
