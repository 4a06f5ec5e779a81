module drivers.virtio.mmio;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;

namespace fl::drivers::virtio {

Result<void> MmioDevice::open() {
    version_ = registers_.read<u32>(mmio::version);
    if (version_ != 1 && version_ != 2) {
        return Error{Code::not_supported, "a virtio-mmio device of a version that this driver does not know (1 or 2)",
                     2, version_};
    }
    return {};
}

FixedText<48> MmioDevice::name() const {
    FixedText<48> text;
    print(text, "virtio-mmio {:#x}", base_);
    return text;
}

u32 MmioDevice::max_size(u16 queue) {
    registers_.write<u32>(mmio::queue_select, queue);
    const u32 size = registers_.read<u32>(mmio::queue_size_max);
    return size <= 32768 ? size : 0;
}

Result<Notifier> MmioDevice::enable(u16 queue, u32 size, const QueueAddresses& at, u16) {
    registers_.write<u32>(mmio::queue_select, queue);
    registers_.write<u32>(mmio::queue_size, size);
    if (legacy()) {
        const u64 page = at.descriptors / legacy_align;
        if (at.descriptors % legacy_align != 0 || page > ~u32{0}) {
            return Error{Code::not_supported, "a legacy virtio device reaches queues in pages below 16 TiB only",
                         ~u32{0}, page};
        }
        registers_.write<u32>(mmio::guest_page_size, legacy_align); // the unit of queue_page
        registers_.write<u32>(mmio::queue_align, legacy_align);
        registers_.write<u32>(mmio::queue_page, static_cast<u32>(page));
    } else {
        const auto write = [&](u64 offset, u64 address) {
            registers_.write<u32>(offset, static_cast<u32>(address));
            registers_.write<u32>(offset + 4, static_cast<u32>(address >> 32));
        };
        write(mmio::queue_descriptors, at.descriptors);
        write(mmio::queue_driver, at.driver);
        write(mmio::queue_device, at.device);
        registers_.write<u32>(mmio::queue_ready, 1);
    }
    return Notifier(registers_, mmio::queue_notify, queue, true);
}

Result<u32> MmioDevice::attach(std::span<const InterruptUse> uses, bool) {
    if (!gsi_) {
        return Error{Code::not_supported, "the virtio-mmio device's interrupt is not known"};
    }
    if (uses.empty()) {
        return Error{Code::bad_argument, "a driver attaches no interrupt handler", 1, 0};
    }
    if (auto attached = interrupts_.attach_line(line(), uses[0].handler, uses[0].context, uses[0].processor);
        !attached) {
        return attached.error();
    }
    attached_ = uses[0];
    return 1u;
}

void MmioDevice::detach() {
    if (attached_.handler != nullptr) {
        interrupts_.detach_line(line(), attached_.handler, attached_.context);
        attached_ = {};
    }
}

u8 MmioDevice::take_interrupt(u32& accesses) {
    ++accesses;
    const u32 reasons = registers_.read<u32>(mmio::interrupt_status) & (isr_queue | isr_config);
    if (reasons != 0) {
        ++accesses;
        registers_.write<u32>(mmio::interrupt_acknowledge, reasons);
    }
    return static_cast<u8>(reasons);
}

u32 MmioDevice::config_field(u64 at, u32 width) {
    if (at + width > mmio::bytes - mmio::config) {
        return width == 4 ? ~u32{0} : (u32{1} << 8 * width) - 1;
    }
    at += mmio::config;
    return width == 1 ? registers_.read<u8>(at) : width == 2 ? registers_.read<u16>(at) : registers_.read<u32>(at);
}

void MmioDevice::write_config(u64 at, u8 value) {
    if (at < mmio::bytes - mmio::config) {
        registers_.write<u8>(mmio::config + at, value);
    }
}

void MmioDevice::write_status(u8 status) { registers_.write<u32>(mmio::status, status); }

u32 MmioDevice::read_features(u32 half) {
    registers_.write<u32>(mmio::device_features_select, half);
    return registers_.read<u32>(mmio::device_features);
}

void MmioDevice::write_features(u32 half, u32 features) {
    registers_.write<u32>(mmio::driver_features_select, half);
    registers_.write<u32>(mmio::driver_features, features);
}

} // namespace fl::drivers::virtio
