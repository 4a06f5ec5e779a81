// The two ways to access PCI configuration space: I/O ports, mechanism #1 [PCI-3.0 §3.2.2.3.2], for the first 256
// bytes in segment 0; and memory, the enhanced mechanism (ECAM) [PCIe-5.0 §7.2.2], whose location the MCFG table
// gives for bus ranges of each segment [PCI-FW 3.3 §4.1.2]. A machine with both uses the ports, which need no page
// tables, and ECAM beyond 256 bytes.
export module drivers.pci.access;
import core.std;
import core.mmio;
import core.registers;
import drivers.pci;

export namespace fl::drivers::pci {

/// The buses `first` to `last` of one segment; `base` is the physical address that bus 0 would have. A function's
/// page is mapped at its first access.
class Ecam final : public Config {
  public:
    Ecam(MmioMapper& mapper, u64 base, u8 first, u8 last, u16 segment = 0)
        : mapper_(mapper), base_(base), segment_(segment), first_(first), last_(last) {}

    u32 read(Address at, u16 offset, u32 width) override {
        const Mmio* page = map(at);
        if (page == nullptr) {
            ++failed_reads_;
            return ~u32{0};
        }
        switch (width) {
        case 1: return page->read<u8>(offset);
        case 2: return page->read<u16>(offset);
        default: return page->read<u32>(offset);
        }
    }
    void write(Address at, u16 offset, u32 width, u32 value) override {
        const Mmio* page = map(at);
        if (page == nullptr) {
            return;
        }
        switch (width) {
        case 1: page->write(offset, static_cast<u8>(value)); break;
        case 2: page->write(offset, static_cast<u16>(value)); break;
        default: page->write(offset, value); break;
        }
    }
    bool reaches_extended(Address at) const override { return covers(at); }
    u16 segment() const override { return segment_; }
    /// Reads that failed for lack of memory for page tables, or because a bridge leads to a bus outside of this range.
    u32 failed_reads() const override { return failed_reads_; }

    bool covers(Address at) const { return at.segment == segment_ && at.bus >= first_ && at.bus <= last_; }

    Ecam* next = nullptr; // for PortConfig::use_beyond()

  private:
    const Mmio* map(Address at) {
        if (mapped_ && mapped_at_ == at) { // common case: a function's registers are read consecutively
            return &page_;
        }
        if (!covers(at)) {
            return nullptr;
        }
        const auto page =
            mapper_.map(base_ + (u64{at.bus} << 20 | u64{at.device} << 15 | u64{at.function} << 12), extended_size);
        if (!page) {
            return nullptr;
        }
        page_ = *page;
        mapped_at_ = at;
        mapped_ = true;
        return &page_;
    }

    MmioMapper& mapper_;
    u64 base_;
    Mmio page_{};
    Address mapped_at_{};
    u32 failed_reads_ = 0;
    u16 segment_;
    u8 first_;
    u8 last_;
    bool mapped_ = false;
};

/// The address register at port 0xcf8.
struct PortAddress : Register<PortAddress, u32> {
    static constexpr u64 offset = 0xcf8;
    static constexpr u16 data_port = 0xcfc;
    static constexpr Bit<31> enable{};
    static constexpr Field<23, 16, Attribute::read_write, u8> bus{};
    static constexpr Field<15, 11> device{};
    static constexpr Field<10, 8> function{};
    static constexpr Field<7, 2> dword{};
    static constexpr auto layout = fields(enable, bus, device, function, dword);

    static constexpr PortAddress to(Address at, u16 register_offset) {
        return from(u32{1} << 31 | u32{at.bus} << 16 | (at.device & u32{31}) << 11 | (at.function & u32{7}) << 8 |
                    (register_offset & u32{0xfc}));
    }
};

/// Access by ports. `Ports` is a RegisterAccess for 8, 16 and 32 bits by port number. The machine has only one pair
/// of ports: use a single object, on one processor, not in interrupt handlers.
template <class Ports>
    requires(RegisterAccess<Ports, u8> && RegisterAccess<Ports, u16> && RegisterAccess<Ports, u32>)
class PortConfig final : public Config {
  public:
    constexpr explicit PortConfig(Ports ports = {}) : ports_(ports) {}

    /// Whether the ports exist: the address register retains written values.
    bool present() {
        const auto before = PortAddress::read(ports_);
        const auto probe = PortAddress::to({}, 0);
        probe.write(ports_);
        const bool kept = PortAddress::read(ports_) == probe;
        before.write(ports_);
        return kept;
    }
    /// Uses `ecam` for offsets from conventional_size on, for the functions it covers. It must outlive this.
    void use_beyond(Ecam& ecam) {
        ecam.next = beyond_;
        beyond_ = &ecam;
    }

    u32 read(Address at, u16 offset, u32 width) override {
        if (offset >= conventional_size || at.segment != 0) {
            Ecam* const ecam = beyond(at);
            return ecam != nullptr ? ecam->read(at, offset, width) : ~u32{0};
        }
        PortAddress::to(at, offset).write(ports_);
        const u64 port = PortAddress::data_port + (offset & 3u);
        if (width == 4) {
            return ports_.template read<u32>(port);
        }
        return width == 2 ? ports_.template read<u16>(port) : ports_.template read<u8>(port);
    }
    void write(Address at, u16 offset, u32 width, u32 value) override {
        if (offset >= conventional_size || at.segment != 0) {
            if (Ecam* const ecam = beyond(at)) {
                ecam->write(at, offset, width, value);
            }
            return;
        }
        PortAddress::to(at, offset).write(ports_);
        const u64 port = PortAddress::data_port + (offset & 3u);
        switch (width) {
        case 1: ports_.write(port, static_cast<u8>(value)); break;
        case 2: ports_.write(port, static_cast<u16>(value)); break;
        default: ports_.write(port, value); break;
        }
    }
    bool reaches_extended(Address at) const override { return beyond(at) != nullptr; }

  private:
    Ecam* beyond(Address at) const {
        Ecam* ecam = beyond_;
        while (ecam != nullptr && !ecam->covers(at)) {
            ecam = ecam->next;
        }
        return ecam;
    }

    [[no_unique_address]] Ports ports_;
    Ecam* beyond_ = nullptr;
};

} // namespace fl::drivers::pci
