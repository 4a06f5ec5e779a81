module boot.sources;
import core.std;
import core.result;
import core.text;
import core.vector;
import io.task;
import hv.backend;
import drivers.driver;
import drivers.null;
import drivers.pci;
import boot.backend;
import boot.devices;

namespace fl::boot {

namespace {
constexpr std::string_view no_memory = "no memory for them";
constexpr u32 virtio_magic = 0x74726976; // "virt"
} // namespace

bool DeviceSource::first(u32 driver, u32 device) const {
    static_cast<void>(driver);
    static_cast<void>(device);
    return false;
}

FixedText<120> DeviceSource::place(u32 device) const {
    const DeviceEntry entry = describe(device);
    FixedText<120> text;
    print(text, "{} [{}]", entry.address.view(), entry.id.view());
    return text;
}

// ---- PCI ----

void PciSource::found(void* context, const drivers::pci::Device& device) {
    auto& self = *static_cast<PciSource*>(context);
    if (is_listed(device) || self.has_driver(device)) {
        self.keep(device);
    }
    if (device.header_type == 1) {
        static_cast<void>(self.bridges_.push(device)); // without memory, hot plug is not reported
    }
}

void PciSource::count_found(const drivers::pci::Enumerated& found) {
    functions_ += found.functions;
    unreachable_ += found.unreachable;
}

bool PciSource::first(u32 driver, u32 device) const {
    return drivers_[driver].first != nullptr && drivers_[driver].first(devices_[device]);
}

io::Task<Result<void>> PciSource::probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) {
    return drivers_[driver].probe(environment, devices_[device], index);
}

DeviceEntry PciSource::describe(u32 device) const { return boot::describe(devices_[device]); }

void PciSource::report_left_out(Devices& into) const {
    if (dropped_ != 0) {
        into.left_out("PCI functions", dropped_, true, no_memory);
    }
    if (unreachable_ != 0) {
        into.left_out("places on PCI buses", unreachable_, true,
                      "their registers cannot be mapped: no memory for page tables, or a bus beyond those of the "
                      "MCFG table");
    }
}

// ---- synthetic devices ----

std::string_view SyntheticSource::name() const { return backend_.name() == "hyperv" ? "vmbus" : backend_.name(); }

io::Task<Result<void>> SyntheticSource::probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) {
    static_cast<void>(index);
    return backend_.probe(driver, environment, at(device));
}

DeviceEntry SyntheticSource::describe(u32 device) const { return boot::describe(at(device), name()); }

FixedText<120> SyntheticSource::place(u32 device) const {
    FixedText<120> text;
    print(text, "{} {}", at(device).type.view(), at(device).address.view());
    return text;
}

void SyntheticSource::report_left_out(Devices& into) const {
    if (found_.dropped != 0) {
        into.left_out("synthetic devices", found_.dropped, true, "no room for them");
    }
}

bool SyntheticSource::next() {
    late_ = backend_.next_device();
    return late_.has_value();
}

// ---- virtio-mmio ----

bool VirtioMmioDriver::matches(const VirtioMmioDevice& device) const {
    return device.magic == virtio_magic && device.device_id == device_id;
}

void VirtioMmioSource::add(const VirtioMmioDevice& device) {
    // Without memory for this entry, a device that is named twice is listed twice.
    static_cast<void>(bases_.push(device.base));
    if (device.magic != virtio_magic || device.device_id != 0) {
        keep(device);
    }
}

io::Task<Result<void>> VirtioMmioSource::probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) {
    return drivers_[driver].probe(environment, devices_[device], index);
}

DeviceEntry VirtioMmioSource::describe(u32 device) const {
    const VirtioMmioDevice& d = devices_[device];
    return describe_virtio_mmio(d.base, d.magic, d.version, d.device_id).value_or(DeviceEntry{});
}

void VirtioMmioSource::report_left_out(Devices& into) const {
    if (words_dropped_ != 0) {
        into.left_out("virtio_mmio.device words", words_dropped_, true, "there are more than this kernel reads");
    }
    if (acpi_dropped_ != 0) {
        into.left_out("virtio-mmio devices of ACPI", acpi_dropped_, true,
                      "their address is computed, and nothing here interprets AML");
    }
    if (dropped_ != 0) {
        into.left_out("virtio-mmio devices", dropped_, true, no_memory);
    }
}

// ---- null disks ----

io::Task<Result<void>> NullSource::probe(u32 driver, drivers::Environment& environment, u32 device, u32 index) {
    static_cast<void>(driver);
    static_cast<void>(index);
    co_return drivers::null::attach(environment, device);
}

DeviceEntry NullSource::describe(u32 device) const {
    DeviceEntry entry;
    entry.bus.write("null");
    print(entry.address, "null{}", device);
    entry.what.write("null disk");
    entry.kind = DeviceClass::disk;
    return entry;
}

} // namespace fl::boot
