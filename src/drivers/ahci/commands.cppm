// Encodes a port's commands: the limits of one command, its command FIS and PRD table, and the buffers that the HBA
// cannot reach. No slots and no policy.
export module drivers.ahci.commands;
import core.std;
import core.dma;
import core.dma_mapper;
import io.block;
import io.block_queue;
import drivers.ahci.protocol;
import drivers.ahci.memory;
import drivers.ahci.terms;

export namespace fl::drivers::ahci {

/// A command's state besides io::QueuedCommand.
struct Wire {
    bool alone = false; // not queued, although the disk has NCQ
    std::array<DmaSegment, max_descriptors> segments{};
    DmaMapping mapping{std::span<DmaSegment>(segments)}; // active: the data is bounced
};

class Commands {
  public:
    static constexpr u32 max_transfer = 512 * 1024;                                   // bytes per command
    static constexpr u32 max_bounced = max_descriptors * static_cast<u32>(page_size); // likewise, of a bounced one
    static constexpr u32 bounce_bytes = 256 * 1024;

    /// `wide`: the HBA reaches memory above 4 GiB.
    Commands(DmaAllocator& dma, const PortMemory& memory, bool wide)
        : memory_(memory), mapper_(dma, bounce_bytes),
          limits_{.highest = wide ? ~u64{0} : 0xffff'ffff, .max_segment = Prd::max_bytes, .alignment = 2} {}
    void open(const Terms& terms) {
        depth_ = terms.depth;
        lba48_ = terms.info.lba48;
        flush_ext_ = terms.info.flush_ext;
    }
    /// Commands that the device takes at once.
    inline u32 depth() const { return std::max(depth_, 1u); }
    /// Whether the command is sent with NCQ.
    inline bool queued(const io::QueuedCommand& command, const Wire& wire) const {
        return depth_ != 0 && command.op <= io::Op::write && !wire.alone;
    }

    /// Reduces command.bytes to what fits into one command, and maps data that the HBA cannot reach.
    inline io::Fit fit(io::QueuedCommand& command, Wire& wire) {
        if (command.op > io::Op::write) [[unlikely]] {
            return fit_other(command);
        }
        command.bytes = std::min(command.bytes, lba48_ ? max_transfer : std::min(max_transfer, 256 * sector(command)));
        return limits_.admits(command.first->buffer) ? io::Fit::ok : map(command, wire);
    }
    /// Writes the command to `slot`.
    inline void encode(u32 slot, const io::QueuedCommand& command, const Wire& wire) const {
        const bool write = command.op == io::Op::write;
        if (command.op > io::Op::write || wire.mapping.active()) [[unlikely]] {
            return encode_other(slot, command, wire);
        }
        const DmaSpan data = command.data();
        memory_.encode(slot, slot, transfer_fis(slot, command, wire), write, {&data, 1});
    }
    /// The command has ended. `ok`: the data that it has read is wanted.
    inline void unmap(const io::QueuedCommand& command, Wire& wire, bool ok) {
        if (bounced(command, wire)) [[unlikely]] {
            const DmaSpan data = ok ? command.data() : DmaSpan{};
            mapper_.unmap(wire.mapping, data.empty() ? std::span<const DmaSpan>() : std::span(&data, 1));
        }
    }
    inline bool bounced(const io::QueuedCommand& command, const Wire& wire) const {
        return command.op <= io::Op::write && wire.mapping.active();
    }

  private:
    static inline u32 sector(const io::QueuedCommand& command) { return u32{1} << command.device->sector_shift(); }
    inline CommandFis transfer_fis(u32 slot, const io::QueuedCommand& command, const Wire& wire) const {
        const bool write = command.op == io::Op::write;
        const u32 sectors = command.bytes >> command.device->sector_shift();
        return queued(command, wire) ? queued_fis(write, command.lba, sectors, slot)
                                     : dma_fis(write, lba48_, command.lba, sectors);
    }
    io::Fit fit_other(io::QueuedCommand& command) const;
    io::Fit map(io::QueuedCommand& command, Wire& wire);
    void encode_other(u32 slot, const io::QueuedCommand& command, const Wire& wire) const;

    const PortMemory& memory_;
    BounceMapper mapper_; // its pool is allocated on first use
    const DmaLimits limits_;
    u32 depth_ = 0; // with NCQ; 0: without
    bool lba48_ = false;
    bool flush_ext_ = false;
};

} // namespace fl::drivers::ahci
