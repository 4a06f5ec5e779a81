// A one-shot timer that a hypervisor gives every processor. The kernel's clock uses it in place of the local APIC's
// (core.machine.clock); hv.backend ProcessorTimer is what a backend has.
export module core.timer;
import core.std;
import core.interrupt;
import core.result;
import core.time;

export namespace fl {

/// Both functions act on the calling processor.
class OneShotTimer {
  public:
    /// On each processor that shall use it, once, after its part of the hypervisor's interface has come up.
    virtual Result<void> start(InterruptHandler handler, void* context) = 0;
    /// `length` nanoseconds from now; a new one replaces the old one. With interrupts on or off.
    virtual void arm(Nanoseconds length) = 0;
    /// For the log; static storage.
    virtual std::string_view name() const = 0;

  protected:
    ~OneShotTimer() = default;
};

} // namespace fl
