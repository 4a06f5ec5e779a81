// Sets up a port: gives it its memory, starts and stops it, and executes the commands that are needed before there is a
// queue. Polls; each wait has a bound.
export module drivers.ahci.setup;
import core.std;
import core.result;
import core.dma;
import core.mmio;
import core.time;
import io.executor;
import io.task;
import drivers.ahci.protocol;
import drivers.ahci.port;
import drivers.ahci.memory;

export namespace fl::drivers::ahci {

class Setup {
  public:
    /// `timeout`: for the device, in nanoseconds of machine time.
    Setup(io::Executor& executor, DmaAllocator& dma, Nanoseconds timeout)
        : executor_(executor), dma_(dma), timeout_(timeout) {}
    void open(Mmio abar, bool wide) {
        abar_ = abar;
        wide_ = wide;
    }

    /// Polls a register until one of the bits is set, or none of them. Error{timed_out}: the bound has passed.
    io::Task<Result<void>> wait(Nanoseconds bound, u64 at, u32 bits, bool set);
    /// Resets the link, as if the disk had just been plugged in. The port is stopped.
    io::Task<Result<void>> reset_link(Port& port);
    /// Gives the port its memory, which it must not have any more, and starts it [ahci-1.3.1 §10.1.2].
    io::Task<Result<void>> start(Port& port, DmaBuffer& buffer);
    /// Stops the command list, then the storing of FISes [ahci-1.3.1 §10.3.2]. Error{timed_out}: the HBA may still
    /// write to the buffer, which is abandoned.
    io::Task<Result<void>> stop(Port& port, DmaBuffer& buffer);
    io::Task<Result<void>> identify(Port& port, const PortMemory& memory, ata::IdentifyData& data);
    /// Executes a command in slot 0. `reads`: 512 bytes, to block 0.
    io::Task<Result<void>> execute(Port& port, const PortMemory& memory, const CommandFis& fis, bool reads);

  private:
    io::Executor& executor_;
    DmaAllocator& dma_;
    Nanoseconds timeout_;
    Mmio abar_;
    bool wide_ = false;
};

} // namespace fl::drivers::ahci
