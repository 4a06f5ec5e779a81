// PCI configuration space through the processor's ports: mechanism #1 [PCI-3.0 §3.2.2.3.2].
export module drivers.machine.pci;
import core.std;
import core.machine.cpu;
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

} // namespace fl::drivers::pci
