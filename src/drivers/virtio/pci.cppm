// A virtio device on the PCI bus [virtio-1.2 §4.1]: modern devices, and transitional ones by their modern interface.
export module drivers.virtio.pci;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;
import drivers.pci;
import drivers.pci.msi;
export import drivers.virtio.device;

export namespace fl::drivers::virtio {

class PciDevice final : public Device {
  public:
    PciDevice(const pci::Device& function, InterruptController& interrupts, MmioMapper& mapper)
        : function_(function), mapper_(mapper), interrupts_(function, interrupts, mapper) {}

    /// Maps the device's structures. Error{not_supported}: it has only the legacy interface; Error{protocol}: its
    /// capabilities describe no usable device.
    Result<void> open();

    FixedText<48> name() const override;
    u32 max_size(u16 queue) override;
    Result<Notifier> enable(u16 queue, u32 size, const QueueAddresses& at, u16 vector) override;
    Result<u32> attach(std::span<const InterruptUse> uses, bool messages) override;
    void detach() override { interrupts_.detach(); }
    bool by_line() const override { return interrupts_.kind() == pci::InterruptKind::line; }
    u8 take_interrupt(u32& accesses) override;
    Result<void> set_config_vector(u16 vector) override;
    void write_config(u64 at, u8 value) override;

  protected:
    u32 generation() override;
    u32 config_field(u64 at, u32 width) override;
    u8 read_status() override;
    void write_status(u8 status) override;
    u32 read_features(u32 half) override;
    void write_features(u32 half, u32 features) override;

  private:
    struct Structure {
        u8 bar = 0;
        u32 offset = 0;
        u32 length = 0;
        u16 capability = 0; // 0: none
        bool ports = false; // in a BAR for I/O ports, which this driver does not use
    };
    Result<Mmio> map(const Structure& structure, u32 at_least, std::string_view missing);

    pci::Device function_;
    MmioMapper& mapper_;
    pci::Interrupts interrupts_;
    Mmio common_;
    Mmio notify_;
    Mmio isr_;
    Mmio config_; // empty: the device type has no configuration
    u32 notify_multiplier_ = 0;
};

} // namespace fl::drivers::virtio
