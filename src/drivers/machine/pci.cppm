// The two ways to PCI configuration space: the processor's ports, mechanism #1 [PCI-3.0 §3.2.2.3.2], for segment 0; and
// memory, the enhanced mechanism (ECAM) [PCIe-5.0 §7.2.2], whose place the MCFG table gives for each segment.
export module drivers.machine.pci;
import core.std;
import core.machine.cpu;
import core.machine.memory;
import drivers.pci;

export namespace fl::drivers::pci {

/// There is one pair of ports in the machine: one object, used by one processor, not by interrupt handlers.
class MechanismOne final : public Config {
  public:
    /// Whether the ports are there: the address register keeps what is written to it.
    static bool present() {
        const u32 before = cpu::in32(MechanismOneAddress::address_port);
        const u32 probe = MechanismOneAddress({0, 0, 0}, 0).value();
        cpu::out32(MechanismOneAddress::address_port, probe);
        const bool kept = cpu::in32(MechanismOneAddress::address_port) == probe;
        cpu::out32(MechanismOneAddress::address_port, before);
        return kept;
    }
    u32 read32(Address at, u8 offset) override {
        cpu::out32(MechanismOneAddress::address_port, MechanismOneAddress(at, offset).value());
        return cpu::in32(MechanismOneAddress::data_port);
    }
    void write32(Address at, u8 offset, u32 value) override {
        cpu::out32(MechanismOneAddress::address_port, MechanismOneAddress(at, offset).value());
        cpu::out32(MechanismOneAddress::data_port, value);
    }
    void write16(Address at, u8 offset, u16 value) override {
        cpu::out32(MechanismOneAddress::address_port, MechanismOneAddress(at, offset).value());
        cpu::out16(static_cast<u16>(MechanismOneAddress::data_port + (offset & 2)), value);
    }
};
static_assert(ConfigAccess<MechanismOne>);

/// The buses `first` to `last` of one segment; the registers of bus 0 would be at `base`. Pages are mapped as they are
/// asked for.
class Ecam final : public Config {
  public:
    Ecam(u64 base, u8 first, u8 last) : base_(base), first_(first), last_(last) {}

    u32 read32(Address at, u8 offset) override {
        const std::byte* page = map(at);
        if (page == nullptr) {
            ++failed_reads_;
            return ~u32{0};
        }
        return *reinterpret_cast<const volatile u32*>(page + offset);
    }
    void write32(Address at, u8 offset, u32 value) override {
        if (std::byte* page = map(at)) {
            *reinterpret_cast<volatile u32*>(page + offset) = value;
        }
    }
    void write16(Address at, u8 offset, u16 value) override {
        if (std::byte* page = map(at)) {
            *reinterpret_cast<volatile u16*>(page + offset) = value;
        }
    }
    /// There was no memory for page tables, or a bridge leads to a bus that is none of these.
    u32 failed_reads() const override { return failed_reads_; }

  private:
    std::byte* map(Address at) const {
        if (at.bus < first_ || at.bus > last_) {
            return nullptr;
        }
        const auto mapped = map_mmio(base_ + (u64{at.bus} << 20 | u64{at.device} << 15 | u64{at.function} << 12), 4096);
        return mapped ? *mapped : nullptr;
    }

    u64 base_;
    u32 failed_reads_ = 0;
    u8 first_;
    u8 last_;
};
static_assert(ConfigAccess<Ecam>);

} // namespace fl::drivers::pci
