module;
#include "core/try.hpp"
module drivers.ata;
import core.std;
import core.result;
import core.text;
import core.interrupt;
import drivers.driver;
import drivers.pci;

namespace fl::drivers::ata {

namespace {

// Compatibility mode: fixed ports and ISA interrupts.
constexpr std::array<u16, 2> legacy_command{0x1f0, 0x170};
constexpr std::array<u16, 2> legacy_control{0x3f6, 0x376};

bool is_native(const pci::Device& device, u8 channel) { return (device.prog_if >> (2 * channel) & 1) != 0; }

} // namespace

std::array<ChannelPorts, 2> fixed_ports(const pci::Device& device) {
    std::array<ChannelPorts, 2> ports{};
    for (u8 c = 0; c < 2; ++c) {
        if (!is_native(device, c)) {
            ports[c] = {legacy_command[c], legacy_control[c], 0};
        }
    }
    return ports;
}

PortClaims::Answer PortClaims::take(const ChannelPorts& at) {
    const std::array<Range, 3> wanted{{{at.command, 8}, {at.control, 1}, {at.bus_master, 8}}};
    for (u32 i = 0; i < count_; ++i) {
        for (const Range& range : wanted) {
            if (range.first != 0 && range.first < held_[i].first + held_[i].count &&
                held_[i].first < range.first + range.count) {
                return Answer::taken;
            }
        }
    }
    for (const Range& range : wanted) {
        if (range.first != 0) {
            if (count_ == capacity) {
                return Answer::full;
            }
            held_[count_++] = range;
        }
    }
    return Answer::yes;
}

Error PortClaims::claim_error(Answer answer) {
    if (answer == Answer::full) {
        return {Code::exhausted, "the list of IDE channels' I/O ports is full", capacity, capacity + 1};
    }
    return {Code::protocol, "its I/O ports belong to an earlier controller: assign others, or remove one of the two"};
}

Result<ControllerPorts> set_up(const pci::Device& device) {
    // Programming interface [PCI-IDE §2.1]: bit 0 primary channel in native mode, bit 2 secondary, bit 7 bus mastering.
    if ((device.prog_if & 0x80) == 0) {
        return Error{Code::not_supported, "the IDE controller has no bus mastering (programming interface bit 7)", 0x80,
                     device.prog_if};
    }
    // A missing or unusable BAR of a channel in native mode affects only that channel; the bus-master registers are
    // shared.
    TRY(const pci::Bar bus_master, device.bar(4));
    if (bus_master.kind != pci::Bar::Kind::io || bus_master.base == 0 || bus_master.size < 16 ||
        bus_master.base > 0xfff0) {
        return Error{Code::not_supported,
                     "the firmware has given the IDE controller's bus-master registers (BAR 4) no I/O ports", 16,
                     bus_master.base};
    }
    ControllerPorts result;
    for (u8 c = 0; c < 2; ++c) {
        ChannelPorts& at = result.channels[c];
        at.bus_master = static_cast<u16>(bus_master.base + 8u * c);
        if (!is_native(device, c)) {
            at.command = legacy_command[c];
            at.control = legacy_control[c];
            result.lines[c] = {.gsi = 14u + c, .isa = true};
            continue;
        }
        TRY(const pci::Bar command, device.bar(static_cast<u8>(2 * c)));
        TRY(const pci::Bar control, device.bar(static_cast<u8>(2 * c + 1)));
        if (command.kind != pci::Bar::Kind::io || control.kind != pci::Bar::Kind::io || command.base == 0 ||
            control.base == 0 || command.base > 0xfff8 || control.base > 0xfffc) {
            at = {}; // disabled, or without ports assigned: the other channel may work
            continue;
        }
        at.command = static_cast<u16>(command.base);
        at.control = static_cast<u16>(control.base + 2); // the third of four bytes [PCI-IDE §2.4]
        result.lines[c] = {.gsi = device.interrupt_line(), .isa = false, .level = true, .active_low = true};
    }
    device.change_command(pci::Command::of(pci::Command::io_space, pci::Command::bus_master),
                          pci::Command::of(pci::Command::interrupt_disable));
    return result;
}

FixedText<16> disk_name(u32 number) { return drivers::disk_name("hd", number); }

void report_unused(DiskSink& disks, u32 number, std::string_view what, Unused why, std::string_view reason) {
    disks.unused({"ide", disk_name(number), what, why, reason, twin_of(number)});
}

void report_failed(DiskSink& disks, u32 number, std::string_view what, const Error& error) {
    FixedText<160> reason;
    print(reason, "{}", error);
    report_unused(disks, number, what, unused_because(error.code), reason);
}

} // namespace fl::drivers::ata
