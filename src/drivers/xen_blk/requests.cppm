// A disk's commands as requests [xen-blkif]: what fits into one, the pages of its data, and the bytes of its slot. No
// ring and no policy.
module;
#include <cstddef>
export module drivers.xen_blk.requests;
import core.std;
import core.result;
import core.dma;
import io.block;
import io.block_queue;
import hv.xen.grants;
import hv.xen.events;
export import drivers.xen_blk.pages;
export import drivers.xen_blk.protocol;

export namespace fl::drivers::xen_blk {

/// Terms negotiated with the back end.
struct Terms : PageTerms {
    hv::xen::Port port = hv::xen::Port::none;
    u16 handle = 0;
    std::optional<Operation> flush; // flush, or write_barrier if only that is offered
    bool discard = false;
    bool secure_discard = false;
    u32 ring_pages = 1;
    io::Geometry geometry;
};

/// A command's state besides io::QueuedCommand.
struct Wire {
    Operation operation = Operation::read;
    CommandPages pages;
};

/// Room for any request. Only the part in use is initialized.
union Slot {
    RequestHeader header;
    DirectRequest direct;
    DiscardRequest discard;
    IndirectRequest indirect;
};
static_assert(sizeof(Slot) == slot_bytes);

/// Only for the processor of the disk's queue.
class Requests {
  public:
    explicit Requests(Pages& pages) : pages_(pages) {}
    /// Before the functions below.
    void open(const Terms& terms) {
        handle_ = terms.handle;
        flush_ = terms.flush.value_or(Operation::flush);
        sector_shift_ = static_cast<u32>(std::countr_zero(terms.geometry.sector_size / terms.wire_unit));
        unit_shift_ = static_cast<u32>(std::countr_zero(terms.wire_unit));
    }

    /// Reduces command.bytes to what fits into one request, and takes its pages, which must be given back when it has
    /// ended. `others`: see Pages::take(). encode() follows at once.
    [[gnu::always_inline]] inline io::Fit fit(io::QueuedCommand& command, Wire& wire, bool others) {
        if (command.op > io::Op::write) [[unlikely]] {
            wire.operation = command.op == io::Op::flush ? flush_ : Operation::discard;
            return io::Fit::ok;
        }
        const DmaSpan data = command.data();
        if (!pages_.admits(data)) [[unlikely]] {
            command.refusal = io::Status::misaligned;
            return io::Fit::refused;
        }
        wire.operation = command.op == io::Op::read ? Operation::read : Operation::write;
        const u32 bytes = pages_.take(wire.pages, data, others);
        if (bytes == 0) [[unlikely]] {
            return io::Fit::full;
        }
        command.bytes = bytes;
        return io::Fit::ok;
    }
    /// Whether encode_one() can be used for the command: a read or write of one page.
    inline bool is_one_page(const io::QueuedCommand& command, const Wire& wire) const {
        return io::has_data(command.op) && wire.pages.segments == 1 && !wire.pages.indirect && !pages_.persistent();
    }
    /// encode() for such a command: the words of the request.
    [[gnu::always_inline]] inline std::array<u64, 4> encode_one(const io::QueuedCommand& command, Wire& wire, u64 id) {
        const Segment segment = pages_.fill_one(wire.pages, command.data(), wire.operation == Operation::write);
        const u64 header = to_underlying(wire.operation) | 1u << 8 | u32{handle_} << 16;
        static_assert(offsetof(RequestHeader, segment_count) == 1 && offsetof(RequestHeader, handle) == 2 &&
                      offsetof(DirectRequest, segments) == 24);
        return {header, id, command.lba << sector_shift_, std::bit_cast<u64>(segment)};
    }
    /// Grants the pages, and writes the request to `slot`. Returns the part of it that is in use.
    [[gnu::always_inline]] inline std::span<const std::byte> encode(Slot& slot, const io::QueuedCommand& command,
                                                                    Wire& wire, u64 id) {
        const u64 sector = command.lba << sector_shift_;
        if (command.op > io::Op::write) [[unlikely]] {
            return encode_other(slot, command, wire.operation, id, sector);
        }
        CommandPages& pages = wire.pages;
        const bool write = wire.operation == Operation::write;
        if (!pages.indirect) [[likely]] {
            pages_.fill(pages, command.data(), write, std::span(slot.direct.segments).first(pages.segments));
            slot.direct.header = {wire.operation, pages.segments, handle_, 0, id, sector};
            return used(slot, sizeof slot.direct.header + pages.segments * sizeof(Segment));
        }
        pages_.fill(pages, command.data(), write, pages_.indirect_segments(pages));
        slot.indirect = {Operation::indirect, wire.operation, pages.segments, 0, id, sector, handle_, 0, {}, 0};
        slot.indirect.pages[0] = pages_.indirect_grant(pages);
        return used(slot, sizeof slot.indirect);
    }

  private:
    static inline std::span<const std::byte> used(const Slot& slot, usize bytes) {
        return {reinterpret_cast<const std::byte*>(&slot), bytes};
    }
    std::span<const std::byte> encode_other(Slot& slot, const io::QueuedCommand& command, Operation operation, u64 id,
                                            u64 sector) const {
        if (operation == Operation::discard) {
            const u8 flags = command.op == io::Op::secure_discard ? discard_secure : 0;
            slot.discard = {{operation, flags, handle_, 0, id, sector}, command.bytes >> unit_shift_};
            return used(slot, sizeof slot.discard);
        }
        slot.header = {operation, 0, handle_, 0, id, 0};
        return used(slot, sizeof slot.header);
    }

    Pages& pages_;
    u32 sector_shift_ = 0; // from the disk's sectors to the wire's units
    u32 unit_shift_ = 9;   // from bytes to the wire's units
    u16 handle_ = 0;
    Operation flush_ = Operation::flush;
};

} // namespace fl::drivers::xen_blk
