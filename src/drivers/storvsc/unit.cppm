// A logical unit behind a storage channel: its commands as packets [storvsc].
module;
#include <cstddef>
export module drivers.storvsc.unit;
import core.std;
import core.dma;
import core.time;
import io.block;
import io.block_queue;
import drivers.scsi.commands;
import drivers.storvsc.protocol;

export namespace fl::drivers::storvsc {

/// Address and limits of a unit.
struct Unit : scsi::UnitLimits {
    u8 path = 0;
    u8 target = 0;
    u8 lun = 0;
};

/// Builds the unit's packets from a template, and judges their answers. On the queue's processor only.
class UnitCommands : public scsi::LogicalUnit {
  public:
    /// `timeout`: of a request, in nanoseconds, for the host.
    UnitCommands(const Unit& unit, const io::Geometry& geometry, Version version, Nanoseconds timeout)
        : LogicalUnit(unit, geometry) {
        template_.header = {Operation::execute_srb, flag_completion, 0};
        ScsiRequest& srb = template_.srb;
        srb.length = static_cast<u16>(srb_bytes(version));
        srb.path_id = unit.path;
        srb.target_id = unit.target;
        srb.lun = unit.lun;
        srb.sense_info_length = sense_bytes(version);
        srb.queue_tag = queue_untagged;
        srb.queue_action = queue_simple_request;
        srb.time_out_value = static_cast<u32>(std::clamp<u64>(timeout / 1'000'000'000, 1, 3600));
        for (const io::Op op : {io::Op::read, io::Op::write}) {
            io::QueuedCommand none;
            none.op = op;
            none.lba = u64{1} << 32; // out of reach of the short form; transfer() sets its bytes that are not 0
            Packet packet;
            scsi::CommandForm form;
            build(packet, none, form);
            transfers_[to_underlying(op)] = std::bit_cast<PacketWords>(packet);
        }
    }
    /// Whether transfer() builds the command: a read or write with a CDB of 16 bytes.
    [[gnu::always_inline]] inline bool is_usual(const io::QueuedCommand& command) const {
        return io::has_data(command.op) && !is_short(command);
    }
    /// The packet of such a command: of one that transfers nothing, and the words that differ.
    struct Transfer {
        const PacketWords& nothing;
        std::array<u64, 3> words; // from the third on

        static constexpr usize size_bytes() { return sizeof(Packet); }
        template <class Out>
        [[gnu::always_inline]] inline void put(Out& out) const {
            for (u32 i = 0; i < nothing.size(); ++i) {
                out.put(i >= 3 && i < 6 ? words[i - 3] : nothing[i]);
            }
        }
    };
    [[gnu::always_inline]] inline Transfer transfer(const io::QueuedCommand& command) const {
        // READ(16) and WRITE(16): the LBA in bytes 2 to 9 of the CDB, the count in 10 to 13, both big-endian.
        static_assert(offsetof(Packet, srb.data_transfer_length) == 24 && offsetof(Packet, srb.payload) == 28);
        const PacketWords& nothing = transfers_[to_underlying(command.op)];
        const u64 lba = __builtin_bswap64(command.lba);
        const u64 blocks = __builtin_bswap32(blocks_of(command));
        return {nothing, {nothing[3] | command.bytes | lba << 48, lba >> 16 | blocks << 48, nothing[5] | blocks >> 16}};
    }
    void build(Packet& packet, const io::QueuedCommand& command, scsi::CommandForm& form) const {
        packet = template_;
        ScsiRequest& srb = packet.srb;
        const auto cdb = std::span(srb.payload).first<scsi::cdb_bytes>();
        if (io::has_data(command.op)) [[likely]] {
            const bool write = command.op == io::Op::write;
            srb.cdb_length = build_io(cdb, command, form);
            srb.data_in = write ? Direction::out : Direction::in;
            srb.data_transfer_length = command.bytes;
            srb.srb_flags = srb_common_flags | (write ? srb_data_out : srb_data_in);
            return;
        }
        const bool out = scsi::data_phase(command.op) == scsi::DataPhase::out;
        srb.cdb_length = build_other(cdb, command, form);
        srb.data_in = out ? Direction::out : Direction::none;
        srb.data_transfer_length = out ? scsi::unmap_list_bytes : 0;
        srb.srb_flags = srb_common_flags | (out ? srb_data_out : 0);
    }

    /// The data of a discard: scsi::unmap_list_bytes at `list`.
    void write_unmap_list(DmaSpan list, const io::QueuedCommand& command) const {
        build_unmap_list(
            std::span<u8, scsi::unmap_list_bytes>(reinterpret_cast<u8*>(list.data), scsi::unmap_list_bytes), command);
    }

  private:
    Packet template_{};
    std::array<PacketWords, 2> transfers_{}; // a READ(16) and a WRITE(16) of nothing
};

} // namespace fl::drivers::storvsc
