// PCI by configuration mechanism 1, one bus: a host bridge, and, if there are IDE disks, the southbridge's two
// functions [PCI-3.0 §3.2.2.3.2].
export module vmm.pci;
import core.std;
import vmm.board;
import vmm.ports;

export namespace fl::vmm {

/// One function's configuration space; `writable`: mask of the bits that software may change.
struct PciFunction {
    std::array<u8, 256> bytes{};
    std::array<u8, 256> writable{};

    template <class T>
    void set(usize offset, T value, T mask = 0) {
        std::memcpy(bytes.data() + offset, &value, sizeof(T));
        std::memcpy(writable.data() + offset, &mask, sizeof(T));
    }
};

/// First of the 16 bus-master ports. Assigned at reset, because there is no firmware.
inline constexpr u16 bus_master_base = 0xc000;

/// Ports 0xcf8 to 0xcff. A byte access to 0xcf9 is one to the reset control register.
class PciHost final : public PortDevice {
  public:
    static constexpr u16 first_port = 0xcf8;
    static constexpr u16 port_count = 8;

    explicit PciHost(PortDevice& reset);
    /// Adds the southbridge: an ISA bridge and the IDE function 00:01.1, both channels in compatibility mode.
    void add_ide();
    u32 in(u16 port, unsigned size) override;
    void out(u16 port, unsigned size, u32 value) override;

  private:
    struct Slot {
        u8 device;
        u8 function;
        PciFunction space;
    };
    PciFunction* selected();

    PortDevice& reset_;
    u32 address_ = 0;
    std::array<Slot, 3> slots_{};
    usize count_ = 0;
};

} // namespace fl::vmm
