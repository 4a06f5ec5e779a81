// A virtio device of which a test needs only the queues: what a transport calls of drivers.virtio.device. Include after
// the imports, of which core.mmio, core.interrupt, core.text and drivers.virtio.device must be four, and after
// unit/io/ring_virtqueue_fake.hpp.
#pragma once

namespace virtio_test {
using namespace fl;

class QueueDevice final : public drivers::virtio::Device, private MmioModel {
  public:
    /// `size`: of each queue, in descriptors. `accept`: the driver has given the device queue `number`. `notified`: it
    /// has notified the queue.
    QueueDevice(u32 size, bool event_index,
                std::function<void(u16 number, const virtqueue_fake::SplitDevice::Setup&)> accept,
                std::function<void(u16 number)> notified)
        : size_(size), event_index_(event_index), accept_(std::move(accept)), notified_(std::move(notified)) {}

    FixedText<48> name() const override { return FixedText<48>("the test's device"); }
    u32 max_size(u16) override { return size_; }
    Result<drivers::virtio::Notifier> enable(u16 queue, u32 size, const drivers::virtio::QueueAddresses& at,
                                             u16) override {
        accept_(queue, {size, at.descriptors, at.driver, at.device, event_index_});
        return drivers::virtio::Notifier(Mmio(static_cast<MmioModel&>(*this), 4), 0, queue, true);
    }
    Result<u32> attach(std::span<const drivers::virtio::InterruptUse>, bool) override { return 1u; }
    void detach() override {}
    bool by_line() const override { return false; }
    u8 take_interrupt(u32&) override { return 1; }
    Result<void> set_config_vector(u16) override { return {}; }
    void write_config(u64, u8) override {}

  protected:
    u32 generation() override { return 0; }
    u32 config_field(u64, u32) override { return 0; }
    u8 read_status() override { return 0; }
    void write_status(u8) override {}
    u32 read_features(u32) override { return 0; }
    void write_features(u32, u32) override {}

  private:
    u64 read(u64, u32) override { return 0; }
    void write(u64, u32, u64 number) override { notified_(static_cast<u16>(number)); }

    u32 size_;
    bool event_index_;
    std::function<void(u16, const virtqueue_fake::SplitDevice::Setup&)> accept_;
    std::function<void(u16)> notified_;
};

} // namespace virtio_test
