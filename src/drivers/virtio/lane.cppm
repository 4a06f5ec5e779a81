// A queue of a virtio device on a processor of its own, as drivers.virtio.controller sees it: when it starts, stops and
// is interrupted. drivers.virtio.disk_queue has the one of disks.
export module drivers.virtio.lane;
import core.std;
import core.result;
import core.time;
import io.block;
import io.executor;
import io.queue_group;
import io.task;

export namespace fl::drivers::virtio {

/// State that the queues of one device share with each other and with its controller. Members may be called on any
/// processor.
class Shared : public io::QueueGroup {
  public:
    /// Before the first queue starts. `notify`: called on any processor when requests or closed() must be looked at.
    void set_listener(void (*notify)(void* context), void* context) {
        notify_ = notify;
        context_ = context;
    }
    /// Asks the controller for something; `what`: a bit, of the driver's meaning.
    void request(u32 what) {
        requests_.fetch_or(what, std::memory_order_relaxed); // orders no other data; notify() does
        changed();
    }
    /// By the controller. True: it was requested since the last call.
    bool take(u32 what) { return (requests_.fetch_and(~what, std::memory_order_relaxed) & what) != 0; }
    /// Whether take() would return true.
    bool requested(u32 what) const { return (requests_.load(std::memory_order_relaxed) & what) != 0; }
    /// A queue has closed.
    void changed() const {
        if (notify_ != nullptr) {
            notify_(context_);
        }
    }

  private:
    std::atomic<u32> requests_{0};
    void (*notify_)(void* context) = nullptr;
    void* context_ = nullptr;
};

class Lane {
  public:
    virtual ~Lane() = default;
    virtual io::Executor& executor() const = 0;
    /// From the handler of its interrupt. `accesses`: of the device, by the handler.
    virtual void on_interrupt(u32 accesses) = 0;
    /// Opens the queue on its own processor. `here`: the caller's executor. Once only; errors as
    /// io::GroupedQueue::start_there().
    virtual io::Task<Result<void>> start(io::Executor& here, Nanoseconds timeout) = 0;
    /// After QueueGroup::close(): waits until the queue has ended everything. Error{timed_out}: it does not.
    virtual io::Task<Result<void>> ended(io::Executor& here, io::Bound bound) = 0;
    /// On its own processor, likewise the next two.
    virtual bool is_open() const = 0;
    virtual void close(io::Status status, const Error& why) = 0;
    virtual void stop() = 0;
    /// It has ended, and the device accesses no memory any more.
    virtual void reclaim() = 0;
    /// It has ended, but the device may still access its memory, which is given up permanently.
    virtual void abandon() = 0;
};

} // namespace fl::drivers::virtio
