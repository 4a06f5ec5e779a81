// A queue of a virtio block device, and the disk on it. A device may have several queues, each for one processor
// [io.queue_group]. Independent of the bus and the negotiation. The life cycle of a request is in io.block_queue, what
// all virtio disks have in common in drivers.virtio.disk_queue; this is the requests' format [virtio-1.2 §5.2.6].
//
// The device is not trusted: every request needs a status that the specification defines. The first violation closes
// the disk.
export module drivers.virtio_blk.disk;
import core.std;
import core.dma;
import core.result;
import core.time;
import io.block;
import io.block_queue;
import io.executor;
import io.oldest_wait;
export import drivers.virtio.disk_queue;
export import drivers.virtio_blk.protocol;

export namespace fl::drivers::virtio_blk {

/// Limits of a request.
struct Limits {
    u32 segments = 1;                // data elements
    u32 segment_bytes = ~u32{0};     // of each
    u32 discard_bytes = 0x7fff'fe00; // of one discard request
    u32 zeroes_bytes = 0x7fff'fe00;  // of one write zeroes request
    bool zeroes_unmap = false;       // write zeroes may deallocate
};

/// The driver's own request for the serial number.
struct IdExchange : io::Exchange {
    using io::Exchange::Exchange;
    DmaSpan data{}; // id_bytes
    io::Status status = io::Status::ok;
};

class Disk;

class Transport : public virtio::DiskTransport {
  public:
    using Disk = virtio_blk::Disk;
    static constexpr std::string_view driver = "virtio_blk";
    /// Data elements of one request.
    static constexpr u32 max_segments = 16;
    /// Descriptors of the smallest request with data: header, data, status.
    static constexpr virtio::QueueNeeds needs{.least = 3};
    struct Wire {
        bool indirect = false;
    };
    using Command = io::Command<Transport>;

    /// What the device reads and writes of each command besides its data. A multiple of a cache line, so that the
    /// device's write of one status does not disturb another command.
    struct Area {
        RequestHeader header;
        RangeSegment range;
        u8 status = 0;
        std::array<u8, 31> unused{};
        std::array<std::byte, 4 * io::virtqueue_descriptor_bytes> indirect{};
    };
    static_assert(sizeof(Area) == 128);
    static constexpr u32 command_bytes = max_commands * sizeof(Area);

    using DiskTransport::DiskTransport;
    /// Before open(), after make().
    void set_limits(const Limits& limits);

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    io::Next next(io::Completion& completion);
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);

  private:
    u32 elements_of(const Command& command) const;

    io::CommandTable<Transport>* commands_ = nullptr;
    Limits limits_;
    u32 max_bytes_ = 0; // of a read or write
};

} // namespace fl::drivers::virtio_blk

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::virtio_blk::Transport>;
extern template class io::QueueDisk<drivers::virtio_blk::Transport>;
} // namespace fl

export namespace fl::drivers::virtio_blk {

using Queue = virtio::DiskQueue<Transport>;

/// The medium on one queue. The first one is the disk; the others are its lanes.
class Disk final : public io::GroupedDisk<Transport> {
  public:
    Disk(Queue& queue, const io::Geometry& geometry, const io::BlockDevice::Identity& identity)
        : io::GroupedDisk<Transport>(queue, geometry, identity) {}
};

} // namespace fl::drivers::virtio_blk
