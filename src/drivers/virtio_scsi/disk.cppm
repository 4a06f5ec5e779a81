// A request queue of a virtio SCSI host, and the logical units on it. A host may have several queues, each for one
// processor [io.queue_group]. Independent of the bus and the negotiation. The life cycle of a request is in
// io.block_queue; this is its transport: SCSI commands in virtqueue buffers.
//
// The queue is not trusted: io.ring.split and io.ring.packed check what the device returns, and every request needs a
// response that the specification defines, with no more sense data and residual than there was room. The first
// violation closes the controller. The used length has only an upper bound: QEMU counts data-out bytes in it, and
// vhost-scsi returns 0.
//
// When the oldest command has timed out, the controller resets the logical units by the control queue, which makes the
// device answer all commands, within another full timeout; a device that answers nothing then is closed and reset.
export module drivers.virtio_scsi.disk;
import core.std;
import core.dma;
import core.result;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import io.event_pacing;
import io.executor;
import io.oldest_wait;
export import io.queue_group;
import io.ring.any;
import drivers.virtio.device;
export import drivers.scsi.commands;
export import drivers.virtio_scsi.protocol;

export namespace fl::drivers::virtio_scsi {

/// The device's limits, common to all its queues.
struct Terms {
    u32 cdb_bytes = default_cdb_bytes;     // of every request's CDB field
    u32 sense_bytes = default_sense_bytes; // of every response's sense field
    u32 max_transfer = 64 * 1024;          // bytes per command, a multiple of 4096
    u32 max_commands = 128;                // on each queue
    bool indirect = false;                 // VIRTIO_F_INDIRECT_DESC was negotiated
};

/// State shared between processors by the queues of one controller.
struct Shared : io::QueueGroup {
    // Requests to the controller. Relaxed: order no other data; notify() does.
    std::atomic<bool> reset_requested{false};
    std::atomic<bool> rescan_requested{false};
    /// Called on any processor when one of these or closed() must be checked.
    void (*notify)(void* context) = nullptr;
    void* context = nullptr;

    void request(std::atomic<bool>& what) {
        what.store(true, std::memory_order_relaxed);
        changed();
    }
    void changed() const {
        if (notify != nullptr) {
            notify(context);
        }
    }
};

/// A command of the controller itself, and its answer.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Address lun{};
    scsi::Cdb cdb;
    DmaSpan data{}; // written by the device; empty: none
    scsi::Response response;
};

class Disk;
using Ring = io::AnyQueue<io::MappedMemory>;

class Transport : public io::GroupedTransport {
  public:
    using Disk = virtio_scsi::Disk;
    static constexpr std::string_view driver = "virtio_scsi";
    static constexpr u32 max_commands = 128;
    static constexpr u32 reserved_commands = 1; // a command of a scan
    static constexpr u32 max_elements = 3;      // header, data, response
    struct Wire : scsi::CommandForm {
        bool indirect = false;
    };
    using Command = io::Command<Transport>;

    /// What the device reads and writes of each command besides its data. The response has cache lines of its own.
    struct Area {
        RequestHeader header;
        std::array<u8, scsi::unmap_list_bytes> unmap{};
        alignas(16) std::array<std::byte, max_elements * io::virtqueue_descriptor_bytes> indirect{};
        alignas(64) RequestResponse response;
        std::array<u8, 20> unused{};
    };
    static_assert(sizeof(Area) == 256);
    static constexpr u32 zeros_at = max_commands * sizeof(Area); // read by WRITE SAME
    static constexpr u32 command_bytes = zeros_at + scsi::zeros_bytes;

    Transport(io::Executor& executor, Shared& shared)
        : GroupedTransport(shared), executor_(executor), shared_(shared) {}

    /// Before open(). `commands`: command_bytes of DMA memory, zeroed, owned by the caller like the ring's memory.
    void set_up(const Ring& ring, DmaSpan commands, const Terms& terms) {
        ring_.emplace(ring);
        areas_ = commands;
        terms_ = terms;
    }
    using GroupedTransport::join; // when the queue opens
    /// After the device has accepted the queue.
    void set_notifier(const virtio::Notifier& notifier) { notifier_ = notifier; }
    /// From the interrupt handler. `accesses`: of the device, by the handler.
    inline void on_interrupt(u32 accesses) {
        // Relaxed: only counted; ordered by raise() and the next turn, on the same processor.
        interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        accesses_.store(accesses_.load(std::memory_order_relaxed) + accesses, std::memory_order_relaxed);
        executor_.raise(*queue);
    }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    Result<void> publish(io::Counters& counters);
    io::Next next(io::Completion& completion);
    Result<void> release(io::Counters& counters);
    Result<bool> arm();
    inline u32 events() const { return interrupts_.load(std::memory_order_relaxed); }
    inline bool finish(Command&, io::Status) { return true; }
    inline io::Fence fence(Command&) { return io::Fence::reachable; }
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    std::optional<Error> reset_ineffective(bool writes);
    Error fault() const { return fault_.value_or(io::TransportDefaults::fault()); }
    void closed(bool stopped);

  private:
    io::Next broken(const Error& why) {
        fault_ = why;
        return io::Next::broken;
    }
    [[gnu::noinline]] io::Next judge(Command& command, u32 at, io::Completion& completion); // off the fast path

    io::Executor& executor_;
    Shared& shared_;
    std::optional<Ring> ring_;
    virtio::Notifier notifier_;
    DmaSpan areas_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Terms terms_;
    bool batch_ = false; // answers have been taken since the last release()
    io::EventPacing pacing_;
    std::optional<Error> fault_;
    u64 reset_answered_ = 0; // answers on all queues when the reset was requested
    std::atomic<u32> interrupts_{0};
    std::atomic<u32> accesses_{0}; // by interrupt handlers
    u32 charged_accesses_ = 0;
};

} // namespace fl::drivers::virtio_scsi

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::virtio_scsi::Transport>;
extern template class io::QueueDisk<drivers::virtio_scsi::Transport>;
} // namespace fl

export namespace fl::drivers::virtio_scsi {

/// A request queue of the device.
class Queue final : public io::GroupedQueue<Transport> {
  public:
    Queue(io::Executor& executor, Shared& shared) : io::GroupedQueue<Transport>(executor, shared, executor, shared) {}
    /// On the queue's processor, after Transport::set_up().
    void start(Nanoseconds timeout) {
        this->open(timeout);
        this->transport().join();
    }
};

/// One logical unit on one queue. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    Disk(Queue& queue, UnitNumber unit, const scsi::UnitLimits& limits, const io::Geometry& geometry,
         const io::BlockDevice::Identity& identity)
        : io::GroupedDisk<Transport>(queue, geometry, identity), address_(address_of(unit.target, unit.lun)),
          commands_(limits, geometry) {}

  private:
    friend class Transport;

    Address address_;
    scsi::LogicalUnit commands_;
};

} // namespace fl::drivers::virtio_scsi
