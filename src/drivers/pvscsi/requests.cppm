// The request descriptors of a PVSCSI adapter's commands [pvscsi]: addresses, data and CDBs. No ring and no policy.
export module drivers.pvscsi.requests;
import core.std;
import core.dma;
import io.block;
import io.block_queue;
import io.executor;
import drivers.pvscsi.protocol;
import drivers.pvscsi.adapter;
export import drivers.scsi.commands;

export namespace fl::drivers::pvscsi {

struct Address {
    u8 target = 0;
    u8 lun = 0;
};

/// A command of the driver itself, and its response.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Address unit;
    scsi::Cdb cdb;
    DmaSpan data{};          // read by the command; empty: none
    scsi::Response response; // valid when answered; without data
};

/// The context of the command with this id in the table: its slot, and a number that is new for each use of the slot.
constexpr u32 context_of(u64 id) { return (io::SlotIndex::slot_of(id) + 1u) | static_cast<u32>(id >> 16 << 16); }
/// ~0: none of ours. The caller compares the whole context with the command's.
constexpr u64 slot_of(u64 context) { return (context & 0xffff) - 1; }

/// A request without a command yet. `area`: the command's.
[[gnu::always_inline]] inline RequestDescriptor request_to(Address unit, u32 context, DmaSpan area, u32 processor) {
    RequestDescriptor request{.context = context,
                              .sense_address = area.bus,
                              .sense_length = Memory::sense_bytes,
                              .tag = simple_queue_tag,
                              .target = unit.target,
                              .vcpu_hint = static_cast<u8>(processor)};
    request.lun[1] = unit.lun;
    area.data[0] = std::byte{}; // no sense data yet
    return request;
}

/// Describes data, which is contiguous. What crosses a multiple of the longest element's size is described by a list in
/// the command's area.
[[gnu::always_inline]] inline void describe_data(RequestDescriptor& request, DmaSpan data, DmaSpan area) {
    request.data_length = data.size;
    request.data_address = data.bus;
    u64 next = (data.bus | (sg_element_bytes - 1)) + 1;
    const u64 end = data.bus + data.size;
    if (next >= end) {
        return;
    }
    request.data_address = area.bus + Memory::list_at;
    request.flags |= flag_sg_list;
    std::byte* to = area.data + Memory::list_at;
    for (u64 at = data.bus; at < end; at = next, next = std::min(next + sg_element_bytes, end)) {
        const SgElement element{.address = at, .length = static_cast<u32>(std::min(next, end) - at)};
        std::memcpy(to, &element, sizeof element);
        to += sizeof element;
    }
}

/// A read or write.
[[gnu::always_inline]] inline void describe_io(RequestDescriptor& request, const scsi::LogicalUnit& unit,
                                               const io::QueuedCommand& command, scsi::CommandForm& form,
                                               DmaSpan area) {
    request.cdb_length = unit.build_io(request.cdb, command, form);
    request.flags = command.op == io::Op::write ? flag_dir_to_device : flag_dir_to_host;
    describe_data(request, command.data(), area);
}

/// A flush, discard or write zeroes. `zeros`: the address of scsi::zeros_bytes of zeros.
void describe_other(RequestDescriptor& request, const scsi::LogicalUnit& unit, const io::QueuedCommand& command,
                    scsi::CommandForm& form, DmaSpan area, u64 zeros);
void describe(RequestDescriptor& request, const Exchange& exchange, DmaSpan area);

} // namespace fl::drivers::pvscsi
