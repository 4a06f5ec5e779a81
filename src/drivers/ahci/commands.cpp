module drivers.ahci.commands;
import core.std;
import core.dma;
import core.dma_mapper;
import core.log;
import core.result;
import io.block;
import io.block_queue;

namespace fl::drivers::ahci {

io::Fit Commands::fit_other(io::QueuedCommand& command) const {
    if (command.op == io::Op::write_zeroes) { // ATA has no such command, and the geometry says so
        command.refusal = io::Status::not_supported;
        return io::Fit::refused;
    }
    if (command.op == io::Op::discard) {
        command.bytes =
            static_cast<u32>(std::min<u64>(command.bytes, u64{trim_ranges} * trim_max_sectors * sector(command)));
    }
    return io::Fit::ok;
}

io::Fit Commands::map(io::QueuedCommand& command, Wire& wire) {
    command.bytes = std::min(command.bytes, max_bounced);
    DmaLimits limits = limits_;
    limits.granule = sector(command);
    const DmaSpan data = command.data();
    const auto mapped =
        mapper_.map({&data, 1}, command.op == io::Op::write ? DmaDirection::to_device : DmaDirection::from_device,
                    limits, wire.mapping);
    if (mapped) {
        command.bytes = *mapped;
        return io::Fit::ok;
    }
    if (mapped.error().code == Code::busy) {
        return io::Fit::full;
    }
    log::error("{}: no memory below 4 GiB to reach a buffer above it: {}", command.device->identity().name.view(),
               mapped.error());
    command.refusal = io::Status::io_error;
    return io::Fit::refused;
}

void Commands::encode_other(u32 slot, const io::QueuedCommand& command, const Wire& wire) const {
    if (command.op == io::Op::flush) {
        return memory_.encode(slot, slot, plain_fis(flush_ext_ ? Opcode::flush_cache_ext : Opcode::flush_cache), false,
                              {});
    }
    if (command.op == io::Op::discard) {
        const DmaSpan block = memory_.block(1);
        auto* const ranges = reinterpret_cast<u64*>(block.data);
        fill_trim(std::span<u64, trim_ranges>(ranges, trim_ranges), command.lba,
                  command.bytes >> command.device->sector_shift());
        return memory_.encode(slot, slot, trim_fis(), true, {&block, 1});
    }
    std::array<DmaSpan, max_descriptors> pieces;
    const auto segments = wire.mapping.segments();
    for (usize i = 0; i < segments.size(); ++i) {
        pieces[i] = {nullptr, segments[i].bus, segments[i].size};
    }
    memory_.encode(slot, slot, transfer_fis(slot, command, wire), command.op == io::Op::write,
                   {pieces.data(), segments.size()});
}

} // namespace fl::drivers::ahci
