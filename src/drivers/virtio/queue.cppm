// A virtqueue in use, of any device type: its memory, its ring, and the notification of the device. What its buffers
// mean is the driver's business.
export module drivers.virtio.queue;
import core.std;
import core.dma;
import core.result;
import core.vector;
export import io.ring.any;
import drivers.virtio.device;

export namespace fl::drivers::virtio {

/// What a driver needs of a queue.
struct QueueNeeds {
    u32 least = 1;                   // descriptors: of one buffer
    u32 most = 256;                  // descriptors: more are not used
    bool readable_in_length = false; // see io::VirtqueueOptions
};

class Queue {
  public:
    using Ring = io::AnyQueue<io::MappedMemory>;

    /// Makes an empty queue in memory of its own; once only. `features`: the negotiated ones, which determine format
    /// and options. Error{protocol}: the device's queue has an impossible size, or there is none; Error{not_supported}:
    /// it is too small; Error{exhausted}: no memory.
    Result<void> make(Device& device, u16 number, u64 features, const QueueNeeds& needs, DmaAllocator& dma);
    /// Gives it to the device. `vector` and errors: as Device::enable().
    Result<void> enable(Device& device, u16 vector);

    inline Ring& ring() { return *ring_; }
    inline const Ring& ring() const { return *ring_; }
    /// Makes all added buffers visible to the device. True: it was notified, by one register write.
    inline bool publish() {
        if (!ring_->publish()) {
            return false;
        }
        notifier_.notify();
        return true;
    }
    /// The device may still access the memory: it is given up permanently.
    void abandon() { memory_.abandon(); }

  private:
    std::optional<Ring> ring_;
    Notifier notifier_;
    DmaBuffer memory_;
    Vector<io::VirtqueueRow> rows_;
    io::VirtqueueLayout layout_;
    u16 number_ = 0;
};

} // namespace fl::drivers::virtio
