// What a command's error means: the status of its request, and whether the command is sent again.
export module drivers.nvme.status;
import core.std;
import core.log;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import drivers.nvme.protocol;
import drivers.nvme.recovery;

export namespace fl::drivers::nvme {

/// What becomes of a command that has ended with an error.
struct Verdict {
    io::Status status = io::Status::io_error;
    bool again = false;   // the command may be sent again
    bool aborted = false; // it was aborted: sending it again counts as after a reset
};

/// `status`: the completion's field, not 0 [nvme-1.4 §4.6.1].
constexpr Verdict judge(u16 status, io::Op op) {
    const u16 code = status_code(status);
    const bool may_retry = !do_not_retry(status);
    switch (code) {
    case invalid_opcode: return {io::Status::not_supported};
    case invalid_field:
        return {op == io::Op::discard || op == io::Op::write_zeroes ? io::Status::not_supported : io::Status::io_error};
    case abort_requested:
    case abort_queue_deleted: return {io::Status::timed_out, may_retry, true};
    case invalid_namespace: return {io::Status::device_gone};
    case write_protected:
    case read_only_range: return {io::Status::read_only};
    case lba_out_of_range: return {io::Status::out_of_range};
    default: return {io::Status::io_error, may_retry && (code & 0x700) != media_errors};
    }
}

/// How often a command was sent again, and when it is next.
struct Resends {
    u8 attempts = 0;       // that an abort or a reset has ended: see Recovery::again()
    Nanoseconds delay = 0; // of all that the controller has asked for
    Instant not_before = 0;
};

/// Of one queue: bounds the lines that are logged.
class Failures {
  public:
    static constexpr u32 max_reports = 8;

    /// The controller may ask for a delay before a command is sent again; before the queue opens. `most`: of all delays
    /// of a command; a command of which the controller asks for more is not sent again.
    void allow_delays(const RetryDelays& delays, Nanoseconds most) {
        delays_ = delays;
        most_delay_ = most;
    }

    /// A command has ended with `status`, not 0.
    io::Completion judge(u64 id, const io::QueuedCommand& command, Resends& resends, u16 status, Instant now) {
        if (command.first == nullptr) { // a late answer: the request has already ended
            return {id, io::Status::io_error};
        }
        const Verdict verdict = nvme::judge(status, command.op);
        io::Completion completion{id, verdict.status, verdict.again ? io::Retry::later : io::Retry::none};
        if (verdict.aborted && verdict.again) {
            completion.retry = Recovery::again(resends.attempts);
        }
        const u32 named = retry_delay(status);
        const Nanoseconds delay = named != 0 ? delays_[named - 1] * retry_delay_unit : 0;
        if (completion.retry != io::Retry::none && delay != 0) {
            resends.delay += delay;
            resends.not_before = now + delay;
            if (resends.delay >= most_delay_) {
                completion.retry = io::Retry::none;
            }
        }
        if (completion.retry == io::Retry::none && reports_ < max_reports) {
            const u16 code = status_code(status);
            FixedText<80> late;
            if (verdict.again && delay != 0 && resends.delay >= most_delay_) {
                print(late, ", to be sent again after {} ms (at most {} ms are waited)", resends.delay / 1'000'000,
                      most_delay_ / 1'000'000);
            }
            log::warning("{}: {} of {} bytes at LBA {} failed: status code type {:#x}, status code {:#x}{}{}",
                         command.device->identity().name, command.op, command.bytes, command.lba, code >> 8,
                         code & 0xff, late, ++reports_ == max_reports ? " (further ones are not shown)" : "");
        }
        return completion;
    }

  private:
    u32 reports_ = 0;
    RetryDelays delays_{};
    Nanoseconds most_delay_ = 0;
};

} // namespace fl::drivers::nvme
