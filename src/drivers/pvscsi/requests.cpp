module drivers.pvscsi.requests;
import core.std;
import core.dma;
import io.block;
import io.block_queue;

namespace fl::drivers::pvscsi {

void describe_other(RequestDescriptor& request, const scsi::LogicalUnit& unit, const io::QueuedCommand& command,
                    scsi::CommandForm& form, DmaSpan area, u64 zeros) {
    request.cdb_length = unit.build_other(request.cdb, command, form);
    request.data_length = unit.parameter_bytes(command.op);
    request.flags = request.data_length == 0 ? flag_dir_none : flag_dir_to_device;
    if (command.op == io::Op::write_zeroes) {
        request.data_address = zeros;
    } else if (command.op == io::Op::discard) {
        request.data_address = area.bus + Memory::unmap_at;
        auto* const list = reinterpret_cast<u8*>(area.data + Memory::unmap_at);
        unit.build_unmap_list(std::span<u8, scsi::unmap_list_bytes>(list, scsi::unmap_list_bytes), command);
    }
}

void describe(RequestDescriptor& request, const Exchange& exchange, DmaSpan area) {
    request.cdb = exchange.cdb.bytes;
    request.cdb_length = exchange.cdb.length;
    request.flags = exchange.data.empty() ? flag_dir_none : flag_dir_to_host;
    describe_data(request, exchange.data, area);
}

} // namespace fl::drivers::pvscsi
