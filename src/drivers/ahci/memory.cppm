// The memory that a port's HBA reads and writes: command list, received FIS area, command tables, and a block for the
// driver's own commands.
export module drivers.ahci.memory;
import core.std;
import core.dma;
import core.result;
import drivers.ahci.protocol;

export namespace fl::drivers::ahci {

/// Views of one DMA buffer, owned by the controller.
class PortMemory {
  public:
    static constexpr u32 slots = 32;
    static constexpr u32 own = slots; // index of the table of the driver's own commands
    static constexpr u32 list_at = 0;
    static constexpr u32 fis_at = slots * sizeof(CommandHeader); // 1 KiB
    static constexpr u32 block_at = fis_at + 512;                // two blocks of 512 bytes
    static constexpr u32 tables_at = block_at + 2 * 512;
    static constexpr u32 bytes = tables_at + (slots + 1) * sizeof(CommandTable);
    static_assert(fis_at % 256 == 0 && tables_at % 128 == 0);

    PortMemory() = default;
    explicit PortMemory(DmaSpan span) : span_(span) {}

    u64 list_bus() const { return span_.bus + list_at; }
    u64 fis_bus() const { return span_.bus + fis_at; }
    /// A block of 512 bytes: 0 for data read by the driver's own commands, 1 for the ranges of a TRIM.
    inline DmaSpan block(u32 index) const { return span_.subspan(block_at + 512 * index, 512); }
    inline volatile CommandHeader& header(u32 slot) const {
        return reinterpret_cast<volatile CommandHeader*>(span_.data + list_at)[slot];
    }

    /// Writes the header of `slot` and a table: `segments` in order, each up to 4 MiB, at most max_descriptors.
    inline void encode(u32 slot, u32 table, const CommandFis& fis, bool to_device,
                       std::span<const DmaSpan> segments) const {
        auto* const to = reinterpret_cast<CommandTable*>(span_.data + tables_at) + table;
        to->fis = fis;
        for (usize i = 0; i < segments.size(); ++i) {
            to->descriptors[i] = Prd::of(segments[i].bus, segments[i].size);
        }
        const u64 bus = span_.bus + tables_at + table * sizeof(CommandTable);
        volatile CommandHeader& h = header(slot);
        h.flags = CommandHeader::flags_of(to_device, static_cast<u32>(segments.size()));
        h.transferred = 0;
        h.table = static_cast<u32>(bus);
        h.table_high = static_cast<u32>(bus >> 32);
    }

    /// A dword of the received FIS area, which the HBA writes at any time.
    inline u32 received(u32 at) const { return *word(at); }
    inline void forget(u32 at) const { *word(at) = 0; }
    /// Reads a dword and makes it 0, at once: what the HBA writes afterwards stays.
    inline u32 take(u32 at) const { return __atomic_exchange_n(word(at), 0, __ATOMIC_ACQ_REL); }

  private:
    inline volatile u32* word(u32 at) const { return reinterpret_cast<volatile u32*>(span_.data + fis_at + at); }
    DmaSpan span_;
};

} // namespace fl::drivers::ahci
