// A logical unit behind a storage channel: its commands as packets [storvsc].
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
    }
    [[gnu::always_inline]] inline void build(Packet& packet, const io::QueuedCommand& command,
                                             scsi::CommandForm& form) const {
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
};

} // namespace fl::drivers::storvsc
