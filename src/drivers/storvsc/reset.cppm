// What the queues of a controller ask for together: a reset of the bus, and a scan of its units.
//
// When the oldest command has timed out [io.oldest_wait], the host is asked to reset the bus, which makes it answer
// all commands, within another full timeout; commands still unanswered then are abandoned. The first queue sends the
// request; any of them may need it.
export module drivers.storvsc.reset;
import core.std;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block_queue;
import io.executor;
import io.queue_group;
import drivers.storvsc.queue;

export namespace fl::drivers::storvsc {

/// State shared between processors by the queues of one controller.
struct Shared : io::QueueGroup {
    // Requests to the controller, polled by the first queue's tick(). Relaxed: order no other data. Call
    // raise_queues() after a change.
    std::atomic<bool> reset_requested{false};
    std::atomic<bool> rescan_requested{false};
    /// Called on the first queue's processor, in drain() or tick(), when the units or closed() must be checked.
    void (*notify)(void* context) = nullptr;
    void* context = nullptr;
    std::atomic<u64> received{0}; // packets of any kind, on all queues: the answer to a bus reset arrives on the first
};

/// A queue's part in it. On the queue's processor only.
class BusReset {
  public:
    /// `first`: of the controller's queues.
    BusReset(io::Executor& executor, Shared& shared, bool first)
        : shared_(shared), first_(first), exchange_(executor) {}

    /// In each tick of the queue, after its own: sends the request for a reset, if this queue has to. The answer only
    /// confirms it; the host ends outstanding commands individually, or they are abandoned.
    void send(io::QueueCore& queue) {
        if (!requested()) {
            return;
        }
        if (!queue.is_in_flight(exchange_)) {
            exchange_.packet = {};
            exchange_.packet.header = {Operation::reset_bus, flag_completion, 0};
            if (!queue.send(exchange_)) {
                return; // no room: with the next tick
            }
        }
        shared_.reset_requested.store(false, std::memory_order_relaxed);
    }
    void request(Nanoseconds timeout) {
        log::warning("storvsc: no answer within {} ms: asking the host to reset the bus", timeout / 1'000'000);
        at_request_ = shared_.received.load(std::memory_order_relaxed);
        shared_.reset_requested.store(true, std::memory_order_relaxed);
        shared_.raise_queues();
    }
    /// A timeout after the request commands are still unanswered, `writes` among them. Error: the controller must not
    /// be used any more.
    std::optional<Error> ineffective(bool writes) const {
        if (shared_.received.load(std::memory_order_relaxed) == at_request_) { // on any queue
            return Error{Code::timed_out, "the host has not answered anything for a whole time-out"};
        }
        if (writes) { // it may be executed at any time, and overwrite later writes
            return Error{Code::timed_out, "a write was not answered, not even by a bus reset: no later write is safe"};
        }
        return std::nullopt;
    }
    /// The host has sent a packet of any kind.
    inline void received(bool one) { received_ += one ? 1 : 0; }
    /// Adds the packets received to those of all queues.
    void count() {
        shared_.received.fetch_add(received_ - std::exchange(counted_, received_), std::memory_order_relaxed);
    }

    void request_rescan() {
        shared_.rescan_requested.store(true, std::memory_order_relaxed);
        shared_.raise_queues();
        notify();
    }
    /// Tells the controller, if this is the first queue, that the units or closed() must be checked.
    void notify() const {
        if (shared_.notify != nullptr && first_) {
            shared_.notify(shared_.context);
        }
    }
    void tick() const {
        if (shared_.rescan_requested.load(std::memory_order_relaxed)) {
            notify();
        }
    }
    bool wants_tick() const {
        return requested() || (first_ && shared_.rescan_requested.load(std::memory_order_relaxed));
    }

  private:
    /// True: a bus reset is requested, and this is the queue that sends it.
    bool requested() const { return first_ && shared_.reset_requested.load(std::memory_order_relaxed); }

    Shared& shared_;
    const bool first_;
    Exchange exchange_;
    u64 received_ = 0;
    u64 counted_ = 0;    // of these, in Shared::received
    u64 at_request_ = 0; // packets received by all queues when the bus reset was requested
};

} // namespace fl::drivers::storvsc
