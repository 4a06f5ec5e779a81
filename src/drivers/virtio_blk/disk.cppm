// A virtqueue of a virtio block device, and the disk on it. A device may have several, each for one processor
// [io.queue_group]. Independent of the bus and the negotiation. The life cycle
// of a request is in io.block_queue; this is its transport.
//
// The queue is not trusted: io.ring.split and io.ring.packed check what the device returns, and every request needs a
// status that the specification defines. The first violation closes the disk.
export module drivers.virtio_blk.disk;
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
export import drivers.virtio_blk.protocol;

export namespace fl::drivers::virtio_blk {

/// Limits of a request.
struct Limits {
    u32 segments = 1;                // data elements
    u32 segment_bytes = ~u32{0};     // of each
    u32 discard_bytes = 0x7fff'fe00; // of one discard request
};

/// The driver's own request for the serial number.
struct IdExchange : io::Exchange {
    using io::Exchange::Exchange;
    DmaSpan data{}; // id_bytes
    io::Status status = io::Status::ok;
};

class Disk;
using Ring = io::AnyQueue<io::MappedMemory>;

class Transport : public io::GroupedTransport {
  public:
    using Disk = virtio_blk::Disk;
    static constexpr std::string_view driver = "virtio_blk";
    static constexpr u32 max_commands = 128;
    static constexpr u32 reserved_commands = 1; // for the serial number
    /// Data elements of one request.
    static constexpr u32 max_segments = 16;
    struct Wire {
        bool indirect = false;
    };
    using Command = io::Command<Transport>;

    /// What the device reads and writes of each command besides its data, in the memory for commands. A multiple of a
    /// cache line, so that the device's write of one status does not disturb another command.
    struct Area {
        RequestHeader header;
        DiscardSegment discard;
        u8 status = 0;
        std::array<u8, 31> unused{};
        std::array<std::byte, 4 * io::virtqueue_descriptor_bytes> indirect{};
    };
    static_assert(sizeof(Area) == 128);
    static constexpr u32 command_bytes = max_commands * sizeof(Area);

    Transport(io::Executor& executor, io::QueueGroup& group) : GroupedTransport(group), executor_(executor) {}

    /// Before open(). `commands`: command_bytes of DMA memory, owned by the caller like the ring's memory. `indirect`:
    /// VIRTIO_F_INDIRECT_DESC was negotiated. `changed`: called once, on the queue's processor, when the queue closes
    /// by itself; may be nullptr.
    void set_up(const Ring& ring, DmaSpan commands, bool indirect, const Limits& limits, void (*changed)(void*),
                void* context);
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
    Error fault() const { return fault_.value_or(io::TransportDefaults::fault()); }
    void closed(bool stopped);

  private:
    u32 elements_of(const Command& command) const;
    io::SendResult broken(const Error& why) {
        fault_ = why;
        return io::SendResult::broken;
    }

    io::Executor& executor_;
    std::optional<Ring> ring_;
    virtio::Notifier notifier_;
    DmaSpan areas_;
    io::CommandTable<Transport>* commands_ = nullptr;
    Limits limits_;
    u32 max_bytes_ = 0; // of a read or write
    bool indirect_ = false;
    bool batch_ = false; // answers have been taken since the last release()
    io::EventPacing pacing_;
    std::optional<Error> fault_;
    std::atomic<u32> interrupts_{0};
    std::atomic<u32> accesses_{0}; // by interrupt handlers
    u32 charged_accesses_ = 0;
    void (*changed_)(void*) = nullptr;
    void* context_ = nullptr;
};

} // namespace fl::drivers::virtio_blk

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::virtio_blk::Transport>;
extern template class io::QueueDisk<drivers::virtio_blk::Transport>;
} // namespace fl

export namespace fl::drivers::virtio_blk {

/// A queue of the device.
class Queue final : public io::GroupedQueue<Transport> {
  public:
    Queue(io::Executor& executor, io::QueueGroup& group)
        : io::GroupedQueue<Transport>(executor, group, executor, group) {}
    /// On the queue's processor, after Transport::set_up().
    void start(Nanoseconds timeout) {
        this->open(timeout);
        this->transport().join();
    }
};

/// The medium on one queue. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    Disk(Queue& queue, const io::Geometry& geometry, const io::BlockDevice::Identity& identity)
        : io::GroupedDisk<Transport>(queue, geometry, identity) {}
};

} // namespace fl::drivers::virtio_blk
