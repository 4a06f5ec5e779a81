// A per-processor one-shot timer provided by a hypervisor. core.machine.clock uses it in place of the local APIC timer;
// a backend offers it through hv.backend ProcessorTimer.
export module core.timer;
import core.std;
import core.interrupt;
import core.result;
import core.time;

export namespace fl {

/// Both functions act on the calling processor.
class OneShotTimer {
  public:
    /// Called once on each processor that uses the timer, after its part of the hypervisor interface is set up.
    virtual Result<void> start(InterruptHandler handler, void* context) = 0;
    /// Fires `length` nanoseconds from now, and replaces a previously armed expiry. Callable with interrupts on or off.
    /// False: it will not fire, and the processor must not sleep.
    virtual bool arm(Nanoseconds length) = 0;
    /// For the log; static storage.
    virtual std::string_view name() const = 0;

  protected:
    ~OneShotTimer() = default;
};

} // namespace fl
