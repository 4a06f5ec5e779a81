// The data of a channel's command: the table of physical regions for the bus-master engine, bounce buffers for memory
// that the engine does not reach, and how many adjacent requests make one command.
export module drivers.ata.data;
import core.std;
import core.dma;
import core.dma_mapper;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import drivers.ata.protocol;
import drivers.ata.channel;

export namespace fl::drivers::ata {

template <PortAccess P>
class CommandData {
  public:
    static constexpr u32 max_transfer = 1024 * 1024; // bytes per command
    static constexpr u32 bounce_bytes = 64 * 1024;   // for memory beyond the engine's 32-bit range
    /// Limits of the bus-master engine [channel's add_region() splits memory within them].
    static constexpr DmaLimits limits{.highest = 0xffff'ffff, .boundary = Prd::boundary, .max_segment = Prd::boundary};

    /// `timeout`: of a command, in nanoseconds.
    CommandData(Channel<P>& channel, DmaAllocator& dma, Nanoseconds timeout)
        : channel_(channel), mapper_(dma, bounce_bytes), timeout_(timeout) {}

    /// Describes the data of a read or write to the engine, and reduces command.bytes to what one command moves.
    /// False: the engine does not reach it all; bounce() does.
    [[gnu::always_inline]] inline bool describe(io::QueuedCommand& command, const DriveInfo& drive) {
        channel_.begin_table();
        if (!limits.admits(command.first->buffer)) [[unlikely]] {
            return false;
        }
        command.bytes = std::min(command.bytes, limit(drive));
        static_cast<void>(channel_.add_region(command.data().bus, command.bytes)); // an empty table holds 1 MiB
        return true;
    }
    /// After describe(): the same through a bounce buffer. refused: no memory for one, which is logged with `name`.
    [[gnu::noinline]] io::Fit bounce(io::QueuedCommand& command, const DriveInfo& drive, std::string_view name) {
        const DmaSpan data = command.data();
        DmaLimits limited = limits;
        limited.granule = drive.sector_size;
        const auto mapped =
            mapper_.map({&data, 1}, command.op == io::Op::write ? DmaDirection::to_device : DmaDirection::from_device,
                        limited, mapping_);
        if (!mapped) {
            log::error("{}: no memory below 4 GiB to reach a buffer above it: {}", name, mapped.error());
            command.refusal = io::Status::io_error;
            return io::Fit::refused;
        }
        command.bytes = *mapped;
        for (const DmaSegment& segment : mapping_.segments()) {
            static_cast<void>(channel_.add_region(segment.bus, segment.size));
        }
        return io::Fit::ok;
    }
    /// Adds the data of an adjacent request. False: not in this command.
    inline bool join(const io::QueuedCommand& command, const DriveInfo& drive, const io::Request& next) {
        return io::has_data(command.op) && !mapping_.active() && next.buffer.size <= limit(drive) - command.bytes &&
               command.bytes + next.buffer.size <= gather_limit_ && limits.admits(next.buffer) &&
               channel_.add_region(next.buffer.bus, next.buffer.size);
    }
    /// A command has moved `bytes` in `took` nanoseconds. Keeps gathered commands from making a slow disk look silent:
    /// at this speed, the next one takes at most a quarter of a timeout, and at most one second.
    [[gnu::always_inline]] inline void moved(u32 bytes, Nanoseconds took) {
        const Nanoseconds enough = std::min<Nanoseconds>(timeout_ / 4, 1'000'000'000);
        took = std::min<Nanoseconds>(took, 1'000'000'000'000); // so that the product fits into 64 bits
        gather_limit_ = took * max_transfer > enough * bytes ? static_cast<u32>(enough * bytes / took) : max_transfer;
    }
    /// The engine is off. `ok`: what was read is copied to the request's buffer, if it still has one.
    [[gnu::always_inline]] inline void finish(const io::QueuedCommand& command, bool ok) {
        if (mapping_.active()) [[unlikely]] {
            const DmaSpan data = ok && command.first != nullptr ? command.data() : DmaSpan{};
            mapper_.unmap(mapping_, data.empty() ? std::span<const DmaSpan>() : std::span(&data, 1));
        }
    }

  private:
    static inline u32 limit(const DriveInfo& drive) { // 28-bit commands only: at most 256 sectors
        return drive.lba48 ? max_transfer : std::min(max_transfer, lba28_max_count * drive.sector_size);
    }

    Channel<P>& channel_;
    BounceMapper mapper_; // its pool is allocated on first use, which most machines never need
    Nanoseconds timeout_;
    u32 gather_limit_ = max_transfer; // bytes of a command made of several requests
    std::array<DmaSegment, max_transfer / Prd::boundary + 1> segments_{};
    DmaMapping mapping_{segments_}; // active: the command's data uses a bounce buffer
};

} // namespace fl::drivers::ata
