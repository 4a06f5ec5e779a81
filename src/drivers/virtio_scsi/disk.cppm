// A request queue of a virtio SCSI host, and the logical units on it. A host may have several queues, each for one
// processor [io.queue_group]. Independent of the bus and the negotiation. The life cycle of a request is in
// io.block_queue, what all virtio disks have in common in drivers.virtio.disk_queue; this is the requests' format:
// SCSI commands in virtqueue buffers [virtio-1.2 §5.6.6.1].
//
// The device is not trusted: every request needs a response that the specification defines, with no more sense data and
// residual than there was room. The first violation closes the controller. The used length has only an upper bound:
// QEMU counts data-out bytes in it, and vhost-scsi returns 0.
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
import io.executor;
import io.oldest_wait;
export import drivers.virtio.disk_queue;
export import drivers.scsi.commands;
export import drivers.virtio_scsi.protocol;

export namespace fl::drivers::virtio_scsi {

/// The device's limits, common to all its queues.
struct Terms {
    u32 cdb_bytes = default_cdb_bytes;     // of every request's CDB field
    u32 sense_bytes = default_sense_bytes; // of every response's sense field
    u32 max_transfer = 64 * 1024;          // bytes per command, a multiple of 4096
    u32 max_commands = 128;                // on each queue
};

/// What a queue asks of the controller [virtio::Shared::request].
inline constexpr u32 reset_request = 1 << 0;  // reset all logical units
inline constexpr u32 rescan_request = 1 << 1; // units have changed

/// A command of the controller itself, and its answer.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Address lun{};
    scsi::Cdb cdb;
    DmaSpan data{}; // written by the device; empty: none
    scsi::Response response;
};

class Disk;

class Transport : public virtio::DiskTransport {
  public:
    using Disk = virtio_scsi::Disk;
    static constexpr std::string_view driver = "virtio_scsi";
    static constexpr u32 max_elements = 3; // header, data, response
    static constexpr virtio::QueueNeeds needs{.least = max_elements, .readable_in_length = true};
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

    using DiskTransport::DiskTransport;
    /// Before open().
    void set_terms(const Terms& terms) { terms_ = terms; }

    // io::BlockTransport
    void use(io::CommandTable<Transport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& command);
    io::SendResult send(Command& command, u64 id);
    io::Next next(io::Completion& completion);
    io::Recovery recover(const Command& oldest, io::OldestWait::Finding finding, std::string_view names);
    std::optional<Error> reset_ineffective(bool writes);

  private:
    [[gnu::noinline]] io::Next judge(Command& command, u32 at, io::Completion& completion); // off the fast path

    io::CommandTable<Transport>* commands_ = nullptr;
    Terms terms_;
    u64 reset_answered_ = 0; // answers on all queues when the reset was requested
};

} // namespace fl::drivers::virtio_scsi

// Instantiated once, in disk.cpp, which is optimized for speed.
namespace fl {
extern template class io::BlockQueue<drivers::virtio_scsi::Transport>;
extern template class io::QueueDisk<drivers::virtio_scsi::Transport>;
} // namespace fl

export namespace fl::drivers::virtio_scsi {

using Queue = virtio::DiskQueue<Transport>;

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
