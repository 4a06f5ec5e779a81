// The disk of an AHCI port, with its queue.
export module drivers.ahci.sata_disk;
import core.std;
import core.dma;
import core.time;
import io.executor;
import io.block;
import io.block_queue;
export import drivers.ahci.queue;

export namespace fl::drivers::ahci {

/// A disk with its port's queue.
class Disk final : public PortDisk {
  public:
    Disk(io::Executor& executor, DmaAllocator& dma, HbaEvents& hba, Port port, PortMemory memory, bool wide,
         Nanoseconds timeout)
        : PortDisk(executor, queue_), queue_(executor, executor, dma, hba, port, memory, wide, timeout) {}
    ~Disk() { close(); }

    /// Accepts requests from now on. Call before the disk is announced, when the HBA's interrupt is attached.
    void open(const Terms& terms, const Identity& identity, Nanoseconds timeout);
    /// Stops the port, and ends all requests with device_gone.
    void close();
    io::BlockQueue<Transport>& queue() { return queue_; }
    PortEvents& events() { return queue_.transport().port_events(); }

  private:
    io::BlockQueue<Transport> queue_;
};

} // namespace fl::drivers::ahci
