module boot.devices;
import core.std;
import core.text;
import core.log;
import core.vector;
import hv.backend;
import drivers.driver;
import drivers.pci;

namespace fl::boot {

using drivers::Unused;

namespace {

struct Known {
    std::string_view name;
    DeviceClass kind;
};

// [virtio-1.2 §5]
Known virtio(u32 type) {
    switch (type) {
    case 1: return {"virtio network device", DeviceClass::network};
    case 2: return {"virtio block device", DeviceClass::disk};
    case 3: return {"virtio console", DeviceClass::other};
    case 4: return {"virtio entropy source", DeviceClass::other};
    case 5:
    case 13: return {"virtio balloon", DeviceClass::other};
    case 8: return {"virtio SCSI host", DeviceClass::disk};
    case 9: return {"virtio 9P transport", DeviceClass::other};
    case 16: return {"virtio GPU", DeviceClass::display};
    case 18: return {"virtio input device", DeviceClass::input};
    case 19: return {"virtio socket", DeviceClass::other};
    case 26: return {"virtio file system", DeviceClass::other};
    case 27: return {"virtio persistent memory", DeviceClass::disk};
    default: return {"virtio device", DeviceClass::other};
    }
}

// The type of a virtio PCI function [virtio-1.2 §4.1.2]; 0: not virtio.
u32 virtio_type(const drivers::pci::Device& device) {
    if (device.vendor != 0x1af4 || device.device < 0x1000 || device.device > 0x107f) {
        return 0;
    }
    if (device.device >= 0x1040) {
        return device.device - 0x1040u;
    }
    constexpr std::array<u8, 10> transitional{1, 2, 5, 3, 8, 4, 0, 0, 0, 9};
    const u32 n = device.device - 0x1000u;
    return n < transitional.size() && transitional[n] != 0 ? transitional[n] : 0xff;
}

// Base class and subclass [PCI-CODE §1].
Known by_class(const drivers::pci::Device& device) {
    switch (device.class_code) {
    case 1:
        switch (device.subclass) {
        case 0: return {"SCSI controller", DeviceClass::disk};
        case 1: return {"IDE controller", DeviceClass::disk};
        case 4: return {"RAID controller", DeviceClass::disk};
        case 5: return {"ATA controller", DeviceClass::disk};
        case 6: return {"SATA controller (AHCI)", DeviceClass::disk};
        case 7: return {"SAS controller", DeviceClass::disk};
        case 8: return {"NVMe controller", DeviceClass::disk};
        default: return {"mass storage controller", DeviceClass::disk};
        }
    case 2: return {"network controller", DeviceClass::network};
    case 3: return {"display controller", DeviceClass::display};
    case 9: return {"input device controller", DeviceClass::input};
    default: return {"device", DeviceClass::other};
    }
}

struct Synthetic {
    std::string_view type;
    Known known;
};
// Directories under `device` [xen-public io] and VMBus channel classes [hv-vmbus]. Types with a driver are included,
// because the driver may fail.
constexpr Synthetic synthetic[] = {
    {"vbd", {"Xen virtual block device", DeviceClass::disk}},
    {"vscsi", {"Xen virtual SCSI host", DeviceClass::disk}},
    {"vif", {"Xen virtual network interface", DeviceClass::network}},
    {"vkbd", {"Xen virtual keyboard and pointer", DeviceClass::input}},
    {"vfb", {"Xen virtual framebuffer", DeviceClass::display}},
    {"vdispl", {"Xen virtual display", DeviceClass::display}},
    {"control", {"Xen control device", DeviceClass::other}},
    {"console", {"Xen console", DeviceClass::input}},
    {"ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", {"Hyper-V SCSI controller", DeviceClass::disk}},
    {"32412632-86cb-44a2-9b5c-50d1417354f5", {"Hyper-V IDE accelerator", DeviceClass::disk}},
    {"2f9bcc4a-0069-4af3-b76b-6fd0be528cda", {"Hyper-V Fibre Channel adapter", DeviceClass::disk}},
    {"44c4f61d-4444-4400-9d52-802e27ede19f", {"Hyper-V PCI pass-through", DeviceClass::disk}}, // usually an NVMe disk
    {"f8615163-df3e-46c5-913f-f2d2f965ed0e", {"Hyper-V network adapter", DeviceClass::network}},
    {"8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501", {"Hyper-V RDMA adapter", DeviceClass::network}},
    {"f912ad6d-2b17-48ea-bd65-f927a61c7684", {"Hyper-V keyboard", DeviceClass::input}},
    {"cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a", {"Hyper-V mouse", DeviceClass::input}},
    {"da0a7802-e377-4aac-8e77-0558eb1073f8", {"Hyper-V video", DeviceClass::display}},
    {"525074dc-8985-46e2-8057-a307dc18a502", {"Hyper-V dynamic memory", DeviceClass::other}},
    {"0e0b6031-5213-4934-818b-38d90ced39db", {"Hyper-V shutdown service", DeviceClass::other}},
    {"9527e630-d0ae-497b-adce-e80ab0175caf", {"Hyper-V time service", DeviceClass::other}},
    {"57164f39-9115-4e78-ab55-382f3bd5422d", {"Hyper-V heartbeat", DeviceClass::other}},
    {"a9a0f4e7-5a45-4d96-b827-8a841e8c03e6", {"Hyper-V key-value exchange", DeviceClass::other}},
    {"35fa2e29-ea23-4236-96ae-3a6ebacba440", {"Hyper-V backup service", DeviceClass::other}},
    {"34d14be3-dee4-41c8-9ae7-6b174977c192", {"Hyper-V file copy service", DeviceClass::other}},
};

} // namespace

bool is_listed(const drivers::pci::Device& device) {
    return virtio_type(device) != 0 || device.class_code == 1 || device.class_code == 2 || device.class_code == 3 ||
           device.class_code == 9;
}

DeviceEntry describe(const drivers::pci::Device& device) {
    DeviceEntry entry;
    entry.bus.write("pci");
    fl::print(entry.address, "{:02x}:{:02x}.{}", device.at.bus, device.at.device, device.at.function);
    fl::print(entry.id, "{:04x}:{:04x}", device.vendor, device.device);
    const u32 type = virtio_type(device);
    const Known known = type != 0 ? virtio(type) : by_class(device);
    entry.what.write(known.name);
    entry.kind = known.kind;
    return entry;
}

DeviceEntry describe(const hv::SyntheticDevice& device, std::string_view bus) {
    DeviceEntry entry;
    entry.bus.write(bus);
    entry.address.write(device.address);
    const auto known =
        std::ranges::find_if(synthetic, [&](const Synthetic& s) { return s.type == device.type.view(); });
    if (known != std::end(synthetic)) {
        entry.what.write(known->known.name);
        entry.kind = known->known.kind;
    } else {
        fl::print(entry.what, "device of type {}", device.type.view());
    }
    return entry;
}

DeviceEntry describe(const drivers::UnusedUnit& unit) {
    DeviceEntry entry;
    entry.bus.write(unit.bus);
    entry.address.write(unit.address);
    entry.what.write(unit.what);
    entry.kind = class_of(unit.kind);
    entry.why = unit.why;
    entry.reason.write(unit.reason);
    return entry;
}

std::optional<DeviceEntry> describe_virtio_mmio(u64 base, u32 magic, u32 version, u32 device_id) {
    DeviceEntry entry;
    entry.bus.write("virtio-mmio");
    fl::print(entry.address, "{:#x}", base);
    if (magic != 0x74726976) { // "virt"
        entry.what.write("virtio-mmio device");
        entry.kind = DeviceClass::disk; // it may be one
        entry.why = Unused::failed;
        fl::print(entry.reason, "no virtio device answers there (MagicValue {:#x}, 0x74726976 was expected)", magic);
        return entry;
    }
    if (device_id == 0) {
        return std::nullopt;
    }
    const Known known = virtio(device_id);
    fl::print(entry.id, "virtio {}", device_id);
    entry.what.write(known.name);
    entry.kind = known.kind;
    entry = without_driver(entry);
    fl::print(entry.reason, " (virtio-mmio version {})", version);
    return entry;
}

DeviceEntry without_driver(DeviceEntry entry) {
    entry.driver = {};
    entry.why = Unused::no_driver;
    entry.reason.clear();
    entry.reason.write("no driver for this ");
    entry.reason.write(entry.what);
    entry.reason.write(" in this build");
    return entry;
}

void Devices::print(const DeviceEntry& entry) {
    const bool bad = entry.why == Unused::failed || entry.why == Unused::no_room;
    FixedText<400> line;
    const auto write = [&](std::string_view before, std::string_view text, std::string_view after) {
        if (!text.empty()) {
            line.write(before);
            line.write(text);
            line.write(after);
        }
    };
    write("device ", entry.bus, " ");
    write("", entry.address, "");
    write(" [", entry.id, "]");
    write(", ", entry.what, ": ");
    write("driven by ", entry.driver, entry.reason.empty() ? "" : ", ");
    write("", entry.reason, "");
    log::line(bad ? log::Level::error : log::Level::info, "{}", line.view());
    log::Record record("device");
    record.text("bus", entry.bus.view()).text("address", entry.address.view()).text("id", entry.id.view());
    record.text("class", name(entry.kind)).text("what", entry.what.view()).text("driver", entry.driver);
    record.text("state", entry.why ? name(*entry.why) : "in use").text("reason", entry.reason.view());
}

void Devices::add(const DeviceEntry& entry) {
    if (entry.why == Unused::failed || entry.why == Unused::no_room) {
        ++failures_;
    }
    if (entry.kind == DeviceClass::disk && entry.why) {
        ++unused_disks_[to_underlying(*entry.why)];
    } else if (entry.kind == DeviceClass::disk && entry.disks == 0) {
        ++without_disks_;
    }
    if (listed_ || !entries_.push(entry)) {
        print(entry);
    }
}

void Devices::list() {
    listed_ = true;
    for (const DeviceEntry& entry : entries_) {
        print(entry);
    }
    entries_.clear();
}

void Devices::left_out(std::string_view what, u64 count, bool disk, std::string_view reason) {
    disk_left_out_ = disk_left_out_ || disk;
    log::line(disk ? log::Level::error : log::Level::warning, "left out: {} ({}): {}", what, count, reason);
    log::Record("left_out").text("what", what).number("count", count).flag("disk", disk).text("reason", reason);
}

FixedText<160> Devices::why_no_disk() const {
    FixedText<160> text;
    u32 all = without_disks_;
    for (const u32 n : unused_disks_) {
        all += n;
    }
    if (all == 0) {
        text.write("no device that could be one was found");
        return text;
    }
    fl::print(text, "of {} {} that could be or have one", all, plural(all, "devices"));
    std::string_view before = ":";
    const auto count = [&](u32 n, std::string_view why) {
        if (n != 0) {
            fl::print(text, "{} {} {}", std::exchange(before, ","), n, why);
        }
    };
    for (u32 i = 0; i < unused_disks_.size(); ++i) {
        count(unused_disks_[i], name(static_cast<Unused>(i)));
    }
    count(without_disks_, "without disks");
    text.write("; see the device lines");
    return text;
}

} // namespace fl::boot
