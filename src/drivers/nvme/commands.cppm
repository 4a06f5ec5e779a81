// What the driver sends: the commands of the NVM command set with their PRP entries. No queue, no registers.
export module drivers.nvme.commands;
import core.std;
import core.dma;
import core.text;
import io.block;
import io.block_queue;
export import drivers.nvme.protocol;

export namespace fl::drivers::nvme {

/// An admin command, and its completion.
struct Exchange : io::Exchange {
    using io::Exchange::Exchange;
    Submission command{};         // without cid
    CompletionEntry completion{}; // valid when answered
};

inline constexpr u32 page = 4096;
/// A command's PRP list: the pages after the first, for 512 KiB at any alignment. Does not cross a page.
inline constexpr u32 list_bytes = 1024;
/// Of one command, in bytes, if the list is used whole.
inline constexpr u32 max_transfer = list_bytes / 8 * page;

/// PRP1 and PRP2 [nvme-1.4 §4.3] of a buffer, which is contiguous: the pages after the first follow it. `list`:
/// list_bytes of memory that the controller reads while it has the command; written if there are more than two pages.
/// `data.bus`: a multiple of 4.
[[gnu::always_inline]] inline void describe_data(Submission& entry, DmaSpan data, DmaSpan list) {
    entry.prp1 = data.bus;
    u64 next = (data.bus | (page - 1)) + 1;
    const u64 end = data.bus + data.size;
    if (next >= end) {
        return;
    }
    if (end - next <= page) {
        entry.prp2 = next;
        return;
    }
    entry.prp2 = list.bus;
    for (std::byte* at = list.data; next < end; next += page, at += sizeof next) {
        std::memcpy(at, &next, sizeof next);
    }
}

/// Fills in, in a command that is all zero, everything but its id and its namespace. `blocks`: as many as are counted
/// in 16 bits, 0's based.
[[gnu::always_inline]] inline void describe_range(Submission& entry, Opcode opcode, u64 lba, u32 blocks) {
    entry.opcode = to_underlying(opcode);
    entry.cdw10 = static_cast<u32>(lba);
    entry.cdw11 = static_cast<u32>(lba >> 32);
    entry.cdw12 = blocks - 1;
}
/// The same for a command without data of a request: a flush, a discard, write zeroes. `list`: as above; a discard's
/// range lies there.
inline void describe_other(Submission& entry, io::Op op, u64 lba, u32 blocks, DmaSpan list) {
    if (op == io::Op::flush) {
        entry.opcode = to_underlying(Opcode::flush);
    } else if (op == io::Op::discard) {
        const DatasetRange range{0, blocks, lba};
        std::memcpy(list.data, &range, sizeof range);
        entry.opcode = to_underlying(Opcode::dataset_management);
        entry.prp1 = list.bus; // cdw10: one range, 0's based
        entry.cdw11 = deallocate;
    } else {
        describe_range(entry, Opcode::write_zeroes, lba, blocks);
    }
}

/// The ids that commands have on the wire carry the slot of the command table and part of its generation.
inline constexpr u32 slots_of_ids = 128;
constexpr u16 command_id(u64 id) { return static_cast<u16>(io::SlotIndex::slot_of(id) | (id >> 16) << 7); }

/// Of one command, by its operation, in bytes: whole blocks.
struct Limits {
    u32 transfer = max_transfer; // of a read or write
    u32 discard = ~u32{0};
    u32 zeroes = ~u32{0};
};

} // namespace fl::drivers::nvme
