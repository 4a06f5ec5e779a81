module;
#include "core/try.hpp"
module drivers.virtio.pci;
import core.std;
import core.interrupt;
import core.mmio;
import core.result;
import core.text;
import core.vector;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::virtio {

FixedText<48> PciDevice::name() const {
    FixedText<48> text;
    const pci::Address at = function_.at;
    print(text, "virtio {:02x}:{:02x}.{}", at.bus, at.device, at.function);
    return text;
}

Result<Mmio> PciDevice::map(const Structure& structure, u32 at_least, std::string_view missing) {
    if (structure.capability == 0) {
        return Error{Code::protocol, missing};
    }
    if (structure.length < at_least) {
        return Error{Code::protocol, "a structure of the virtio device is too small (length, in bytes)", at_least,
                     structure.length};
    }
    return function_.map_bar(mapper_, structure.bar, structure.offset, structure.length);
}

// The first structure of each type that the driver supports is the one to use [virtio-1.2 §4.1.4]: one in memory rather
// than an earlier one in I/O ports (QEMU: modern-pio-notify=on).
Result<void> PciDevice::open() {
    static_cast<void>(function_.power_on());
    std::array<Structure, 6> found{};
    for (auto list = function_.capabilities(); const auto c = list.next(pci::CapabilityId::vendor);) {
        const u8 type = function_.read<u8>(c->offset + pci_capability::type);
        const u8 bar = function_.read<u8>(c->offset + pci_capability::bar);
        if (type == 0 || type >= found.size() || bar > 5) {
            continue;
        }
        const bool ports = pci::MemoryBaseAddress::read(function_, 4u * bar).get(pci::MemoryBaseAddress::io_space);
        if (found[type].capability != 0 && (ports || !found[type].ports)) {
            continue;
        }
        found[type] = {bar, function_.read<u32>(c->offset + pci_capability::offset),
                       function_.read<u32>(c->offset + pci_capability::length), c->offset, ports};
    }
    const auto of = [&](CapabilityType type) -> const Structure& { return found[to_underlying(type)]; };
    if (of(CapabilityType::common).capability == 0 && of(CapabilityType::notify).capability == 0) {
        return Error{Code::not_supported,
                     "the virtio device has only the legacy interface, which this driver does not use on PCI: enable "
                     "the modern one (QEMU: disable-modern=off)"};
    }
    TRY(common_, map(of(CapabilityType::common), pci_common::bytes, "the virtio device has no common configuration"));
    TRY(isr_, map(of(CapabilityType::isr), 1, "the virtio device has no ISR status"));
    TRY(notify_, map(of(CapabilityType::notify), 2, "the virtio device has no notification structure"));
    notify_multiplier_ = function_.read<u32>(of(CapabilityType::notify).capability + pci_capability::notify_multiplier);
    if (of(CapabilityType::device).capability != 0) {
        TRY(config_, map(of(CapabilityType::device), 1, ""));
    }
    function_.change_command(pci::Command::of(pci::Command::bus_master));
    return {};
}

u32 PciDevice::max_size(u16 queue) {
    if (queue >= common_.read<u16>(pci_common::queue_count)) {
        return 0;
    }
    common_.write<u16>(pci_common::queue_select, queue);
    return common_.read<u16>(pci_common::queue_size);
}

Result<Notifier> PciDevice::enable(u16 queue, u32 size, const QueueAddresses& at, u16 vector) {
    common_.write<u16>(pci_common::queue_select, queue);
    const u64 notify_at = u64{common_.read<u16>(pci_common::queue_notify_offset)} * notify_multiplier_;
    if (notify_at % 2 != 0 || notify_at + 2 > notify_.size()) {
        return Error{Code::protocol, "a queue is to be notified outside of the notification structure", notify_.size(),
                     notify_at};
    }
    common_.write<u16>(pci_common::queue_size, static_cast<u16>(size));
    common_.write<u16>(pci_common::queue_vector, vector);
    if (const u16 seen = common_.read<u16>(pci_common::queue_vector); seen != vector) {
        return Error{Code::not_supported, "the virtio device does not accept a queue's interrupt vector", vector, seen};
    }
    const auto write = [&](u64 offset, u64 address) {
        common_.write<u32>(offset, static_cast<u32>(address));
        common_.write<u32>(offset + 4, static_cast<u32>(address >> 32));
    };
    write(pci_common::queue_descriptors, at.descriptors);
    write(pci_common::queue_driver, at.driver);
    write(pci_common::queue_device, at.device);
    common_.write<u16>(pci_common::queue_enable, 1);
    return Notifier(notify_, notify_at, queue, false);
}

Result<u32> PciDevice::attach(std::span<const InterruptUse> uses, bool messages) {
    Vector<pci::VectorUse> wanted;
    for (const InterruptUse& use : uses) {
        if (!wanted.push({use.processor, use.handler, use.context})) {
            return Error{Code::exhausted, "no memory for a device's interrupts"};
        }
    }
    const std::span<const pci::VectorUse> all{wanted.begin(), wanted.size()};
    if (messages && pci::interrupts_of(function_).kind == pci::InterruptKind::msix) {
        // With a single vector nothing would tell what it is for; the line's status register does.
        const u32 least = std::min<u32>(2, static_cast<u32>(all.size()));
        const auto attached = interrupts_.attach(all, least, pci::InterruptKind::msix);
        if (attached || attached.error().code != Code::exhausted) {
            return attached;
        }
    }
    return interrupts_.attach(all, 1, pci::InterruptKind::line);
}

u8 PciDevice::take_interrupt(u32& accesses) {
    ++accesses;
    return isr_.read<u8>(0); // reading acknowledges
}

Result<void> PciDevice::set_config_vector(u16 vector) {
    common_.write<u16>(pci_common::config_vector, vector);
    if (const u16 seen = common_.read<u16>(pci_common::config_vector); seen != vector) {
        return Error{Code::not_supported, "the virtio device does not accept the vector of its configuration changes",
                     vector, seen};
    }
    return {};
}

u32 PciDevice::generation() { return common_.read<u8>(pci_common::config_generation); }

u32 PciDevice::config_field(u64 at, u32 width) {
    if (at + width > config_.size()) {
        return width == 4 ? ~u32{0} : (u32{1} << 8 * width) - 1;
    }
    return width == 1 ? config_.read<u8>(at) : width == 2 ? config_.read<u16>(at) : config_.read<u32>(at);
}

void PciDevice::write_config(u64 at, u8 value) {
    if (at < config_.size()) {
        config_.write<u8>(at, value);
    }
}

u8 PciDevice::read_status() { return common_.read<u8>(pci_common::device_status); }
void PciDevice::write_status(u8 status) { common_.write<u8>(pci_common::device_status, status); }

u32 PciDevice::read_features(u32 half) {
    common_.write<u32>(pci_common::device_feature_select, half);
    return common_.read<u32>(pci_common::device_feature);
}

void PciDevice::write_features(u32 half, u32 features) {
    common_.write<u32>(pci_common::driver_feature_select, half);
    common_.write<u32>(pci_common::driver_feature, features);
}

} // namespace fl::drivers::virtio
