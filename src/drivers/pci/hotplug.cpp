module;
#include "core/try.hpp"
module drivers.pci.hotplug;
import core.std;
import core.interrupt;
import core.log;
import core.mmio;
import core.result;
import core.text;
import core.vector;
import io.executor;
import io.task;
import drivers.pci;
import drivers.pci.msi;

namespace fl::drivers::pci {

namespace {

// QEMU's registers [qemu docs/specs/acpi_pci_hotplug.rst]: bits are device numbers on the selected bus.
constexpr u16 slots_added = 0x00;
constexpr u16 slots_to_remove = 0x04;
constexpr u16 bus_select = 0x10;
constexpr u8 event_hotplug = 1 << 1; // general-purpose event 1

} // namespace

Hotplug::~Hotplug() {
    if (ports_ != nullptr) {
        ports_->out8(acpi_.gpe_enable, 0);
        controller_.detach_line(acpi_.sci, on_sci, this);
    }
    for (Slot* slot : slots_) {
        SlotControl{}.write(slot->port, slot->capability);
        delete slot;
    }
}

Result<bool> Hotplug::add_port(const Device& port) {
    const auto at = port.header_type == 1 ? port.capability(CapabilityId::express) : std::nullopt;
    if (!at || !ExpressCapabilities::read(port, *at).get(ExpressCapabilities::slot_implemented) ||
        !SlotCapabilities::read(port, *at).get(SlotCapabilities::hot_plug_capable)) {
        return false;
    }
    // A line would have to be silenced by the handler, through configuration space, which it must not access.
    if (interrupts_of(port).kind == InterruptKind::line) {
        return Error{Code::not_supported, "the port has no interrupt messages"};
    }
    std::unique_ptr<Slot> slot(new (std::nothrow) Slot(port, *at, controller_, mapper_));
    if (!slot) {
        return Error{Code::exhausted, "no memory for a hot-pluggable slot"};
    }
    const VectorUse use{.processor = 0, .handler = on_port, .context = this};
    if (const auto attached = slot->interrupts.attach({&use, 1}); !attached) {
        return attached.error();
    }
    if (!slots_.push(slot.get())) {
        return Error{Code::exhausted, "no memory for a hot-pluggable slot"};
    }
    static_cast<void>(slot.release());
    port.change_command(Command{}.set(Command::bus_master, true)); // its messages are writes to memory
    SlotStatus{}
        .clear(SlotStatus::presence_detect_changed)
        .clear(SlotStatus::attention_button_pressed)
        .write(port, *at); // of before: they do not interrupt
    SlotControl::read(port, *at)
        .set(SlotControl::presence_detect_changed_enable, true)
        .set(SlotControl::attention_button_pressed_enable, true)
        .set(SlotControl::hot_plug_interrupt_enable, true)
        .write(port, *at);
    return true;
}

Result<void> Hotplug::add_acpi(Ports& ports, const AcpiHotplug& where) {
    acpi_ = where;
    ports_ = &ports;
    if (auto attached = controller_.attach_line(where.sci, on_sci, this); !attached) {
        ports_ = nullptr;
        return attached;
    }
    if (where.pm1a_enable != 0) {
        ports.out16(where.pm1a_enable, 0);
    }
    for (u16 i = 1; i < where.gpe_bytes; ++i) {
        ports.out8(static_cast<u16>(where.gpe_enable + i), 0);
    }
    ports.out8(where.gpe_enable, event_hotplug);
    return {};
}

void Hotplug::on_port(void* self) { static_cast<Hotplug*>(self)->changed_.raise(); }

// The line is level-triggered: it falls when the status bit is cleared.
void Hotplug::on_sci(void* self) {
    auto& hotplug = *static_cast<Hotplug*>(self);
    if ((hotplug.ports_->in8(hotplug.acpi_.gpe_status) & event_hotplug) != 0) {
        hotplug.ports_->out8(hotplug.acpi_.gpe_status, event_hotplug);
        hotplug.changed_.raise();
    }
}

io::Task<Result<void>> Hotplug::watch() {
    for (;;) {
        co_await changed_.wait();
        for (const Slot* slot : slots_) {
            look_at(*slot);
        }
        if (ports_ != nullptr) {
            look_at_acpi();
        }
    }
}

void Hotplug::look_at(const Slot& slot) {
    const auto status = SlotStatus::read(slot.port, slot.capability);
    const bool button = status.get(SlotStatus::attention_button_pressed);
    const bool changed = status.get(SlotStatus::presence_detect_changed);
    if (!button && !changed) {
        return;
    }
    status.write(slot.port, slot.capability); // clears what was seen, and nothing else
    const auto number = SlotCapabilities::read(slot.port, slot.capability).get(SlotCapabilities::slot_number);
    const auto bus = BusNumbers::read(slot.port).get(BusNumbers::secondary);
    FixedText<64> place;
    print(place, "slot {}, bus {:02x}", number, bus);
    const bool occupied = status.get(SlotStatus::presence_detect);
    if (changed && !occupied) {
        log::warning("pci: the host has removed the device in {}: its requests end with an error", place.view());
    } else {
        report(!changed, place.view()); // the button alone, with a device in the slot: it is to be removed
    }
}

void Hotplug::look_at_acpi() {
    for (u32 bus = 0; bus < acpi_buses; ++bus) {
        ports_->out32(static_cast<u16>(acpi_.registers + bus_select), bus);
        const u32 added = ports_->in32(static_cast<u16>(acpi_.registers + slots_added)); // cleared by the read
        const u32 removed = ports_->in32(static_cast<u16>(acpi_.registers + slots_to_remove));
        const u32 new_removals = removed & ~removals_[bus];
        removals_[bus] = removed;
        for (u32 device = 0; device < 32; ++device) {
            FixedText<64> place;
            print(place, "slot {}, hot plug bus {}", device, bus); // QEMU's number of the bus (BSEL)
            if ((added >> device & 1) != 0) {
                report(false, place.view());
            }
            if ((new_removals >> device & 1) != 0) {
                report(true, place.view());
            }
        }
    }
}

void Hotplug::report(bool removal, std::string_view place) {
    if (++reports_ > max_reports) {
        return;
    }
    if (removal) {
        log::warning(
            "pci: the host asks to remove the device in {}: refused, since PCI devices cannot be released while "
            "the kernel runs; the device stays until the machine ends",
            place);
    } else {
        log::warning("pci: the host has added a device in {}: not used, since PCI devices are found at the start; "
                     "restart the machine to use it",
                     place);
    }
    log::Record("hotplug").text("request", removal ? "remove" : "add").text("place", place).flag("refused", true);
}

} // namespace fl::drivers::pci
