// A virtio device on a platform's memory bus [virtio-1.2 §4.2]: version 2, and version 1, the legacy interface, which
// QEMU's microvm shows by default. All registers before the device's configuration are accessed as 32 bits.
export module drivers.virtio.mmio;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;
export import drivers.virtio.device;

export namespace fl::drivers::virtio {

class MmioDevice final : public Device {
  public:
    /// `registers`: mmio::bytes of them, at physical address `base`. `gsi`: edge-triggered, active high; nullopt: it is
    /// not known, and attach() fails.
    MmioDevice(Mmio registers, u64 base, std::optional<u32> gsi, InterruptController& interrupts)
        : registers_(registers), base_(base), gsi_(gsi), interrupts_(interrupts) {}
    ~MmioDevice() { detach(); }
    MmioDevice(const MmioDevice&) = delete;
    MmioDevice& operator=(const MmioDevice&) = delete;

    /// Error{not_supported}: neither version 1 nor 2.
    Result<void> open();

    FixedText<48> name() const override;
    bool legacy() const override { return version_ == 1; }
    u32 max_size(u16 queue) override;
    Result<Notifier> enable(u16 queue, u32 size, const QueueAddresses& at, u16 vector) override;
    Result<u32> attach(std::span<const InterruptUse> uses, bool messages) override;
    void detach() override;
    bool by_line() const override { return true; }
    u8 take_interrupt(u32& accesses) override;
    Result<void> set_config_vector(u16) override { return {}; }
    void write_config(u64 at, u8 value) override;

  protected:
    u32 generation() override { return legacy() ? 0 : registers_.read<u32>(mmio::config_generation); }
    u32 config_field(u64 at, u32 width) override;
    u8 read_status() override { return static_cast<u8>(registers_.read<u32>(mmio::status)); }
    void write_status(u8 status) override;
    u32 read_features(u32 half) override;
    void write_features(u32 half, u32 features) override;

  private:
    Mmio registers_;
    u64 base_;
    std::optional<u32> gsi_;
    InterruptController& interrupts_;
    u32 version_ = 0;
    InterruptUse attached_{};
    InterruptLine line() const { return {.gsi = gsi_.value_or(0), .isa = false}; }
};

} // namespace fl::drivers::virtio
