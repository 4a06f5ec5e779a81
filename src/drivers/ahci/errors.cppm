// What is done about the errors of a port, and what becomes of its commands [ahci-1.3.1 §6.2]: the port is restarted
// [drivers.ahci.recovery]; the command that failed ends with its status, the others are resent. If the disk does not
// say which one failed, each is resent alone, not queued.
export module drivers.ahci.errors;
import core.std;
import core.result;
import io.block;
import io.block_queue;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.memory;
import drivers.ahci.commands;
import drivers.ahci.interrupts;
import drivers.ahci.recovery;
import drivers.ahci.slots;

export namespace fl::drivers::ahci {

class Errors {
  public:
    static constexpr u32 max_reports = 16; // log lines about failed commands

    Errors(Port& port, HbaEvents& hba, Slots& slots, Recovery& recovery)
        : port_(port), hba_(hba), slots_(slots), recovery_(recovery) {}

    /// An interrupt that ended no command, or a cause that is an error. `causes`: those that the handler has seen.
    /// True: the port runs again, and the slots have what is to be judged. Error{device_gone}: the disk or the HBA was
    /// removed; others: the port does not run again.
    Result<bool> examine(u32 causes);
    /// Advances the recovery; as examine().
    Result<bool> step(u32 causes);
    /// A command has timed out: resets the port. The command ends as timed_out, the others are resent.
    io::Recovery reset();

    /// The verdict on a command of a slot that the restart has returned.
    io::Completion judge(u64 id, u32 slot, const io::QueuedCommand& command, Wire& wire);
    /// A command without NCQ has ended: the HBA counts its bytes [ahci-1.3.1 §4.2.2].
    void check_length(const PortMemory& memory, u32 slot, const io::QueuedCommand& command,
                      io::Completion& completion) const;

  private:
    io::Completion judge(u64 id, const io::QueuedCommand& command);
    void report(const io::QueuedCommand& command, ata::Status status, ata::ErrorRegister error);

    Port& port_;
    HbaEvents& hba_;
    Slots& slots_;
    Recovery& recovery_;
    TaskFile failed_{};      // the port's registers after the last error
    bool transport_ = false; // the last error was not the device's own, so that the port was reset
    u32 reports_ = 0;
};

} // namespace fl::drivers::ahci
