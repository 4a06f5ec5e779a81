// The event channel of a disk's ring: events to the back end, and the handler of those from it. After an event the port
// is masked until the disk's queue is about to sleep, so that there is at most one between two sleeps, however many the
// back end sends.
//
//   atomic     ordering  written by         read by    orders
//   masked_    relaxed   handler, the turn  the turn   nothing: raise() and the next turn order what the event is about
//   count_     relaxed   handler            the turn   likewise; the handler runs on the turn's processor
export module drivers.xen_blk.event_channel;
import core.std;
import core.result;
import io.executor;
import hv.xen.events;

export namespace fl::drivers::xen_blk {

/// On the processor of the disk's queue only.
class EventChannel {
  public:
    EventChannel(io::Executor& executor, hv::xen::Events& events) : executor_(executor), events_(events) {}

    /// `port`: bound to on_event() by the caller, and masked.
    void open(hv::xen::Port port) {
        port_ = port;
        masked_.store(true, std::memory_order_relaxed);
    }
    /// The handler; runs in the upcall. Raises `queue`.
    inline void on_event(io::Service& queue) {
        count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        events_.mask(port_);
        masked_.store(true, std::memory_order_relaxed);
        executor_.raise(queue);
    }
    /// Events so far, modulo 2^32.
    inline u32 count() const { return count_.load(std::memory_order_relaxed); }
    /// Sends an event to the back end: one hypercall.
    inline Result<void> send() { return events_.send(port_); }
    /// Before a sleep: lets the back end raise events. True: one was pending, and is consumed.
    [[gnu::always_inline]] inline bool unmask() {
        if (masked_.load(std::memory_order_relaxed)) {
            masked_.store(false, std::memory_order_relaxed); // before unmasking: the handler may run in between
            if (events_.unmask(port_)) {
                masked_.store(true, std::memory_order_relaxed); // as the handler would do
                events_.mask(port_);
                return true;
            }
        }
        return false;
    }
    /// No more events, until open() with another port.
    void close() {
        if (port_ != hv::xen::Port::none) {
            events_.mask(std::exchange(port_, hv::xen::Port::none));
        }
    }

  private:
    io::Executor& executor_;
    hv::xen::Events& events_;
    hv::xen::Port port_ = hv::xen::Port::none;
    std::atomic<bool> masked_{true};
    std::atomic<u32> count_{0};
};

} // namespace fl::drivers::xen_blk
