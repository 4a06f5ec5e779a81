module;
#include "core/try.hpp"
module drivers.pci;
import core.std;
import core.mmio;
import core.registers;
import core.result;

namespace fl::drivers::pci {

namespace {

constexpr u8 header_general = 0;
constexpr u8 header_bridge = 1;
constexpr u8 class_bridge = 6;
constexpr u8 subclass_host_bridge = 0;
constexpr u8 subclass_pci_bridge = 4;
constexpr u16 header_end = 0x40;

constexpr u8 bars_of(u8 header_type) {
    return header_type == header_general ? 6 : header_type == header_bridge ? 2 : 0;
}

} // namespace

void Device::change_command(Command set, Command clear) const {
    const Command now = command();
    const auto wanted = Command::from(static_cast<u16>((now.raw & ~clear.raw) | set.raw));
    if (wanted != now) {
        wanted.write(*this); // 16 bits: writing ones would clear bits of the status register
    }
}

Result<Bar> Device::bar(u8 index) const {
    using Type = MemoryBaseAddress::Type;
    const u8 count = bars_of(header_type);
    if (index >= count) {
        return Error{Code::bad_argument, "this PCI header has fewer base address registers", count, index};
    }
    const u64 low_at = MemoryBaseAddress::offset + 4u * index;
    const u64 high_at = low_at + 4;
    const auto low = MemoryBaseAddress::from(read<u32>(low_at));
    const bool is_io = low.get(MemoryBaseAddress::io_space);
    const Type type = low.get(MemoryBaseAddress::type);
    const bool is_wide = !is_io && type == Type::bits_64;
    if (!is_io && (to_underlying(type) == 3 || (is_wide && index + 1 >= count))) {
        return Error{Code::protocol, "a PCI base address register of a type that does not exist", 0, low.raw};
    }
    const u32 high = is_wide ? read<u32>(high_at) : 0;

    // Write all ones: the bits that read back as one are the address bits. Decoding is disabled meanwhile, or the
    // device would respond at the top of the address space.
    const Command before = command();
    const Command decoding = Command::of(Command::io_space, Command::memory_space);
    change_command({}, decoding);
    write(low_at, ~u32{0});
    const u32 low_mask = read<u32>(low_at);
    write(low_at, low.raw);
    u32 high_mask = is_io || !is_wide ? ~u32{0} : 0;
    if (is_wide) {
        write(high_at, ~u32{0});
        high_mask = read<u32>(high_at);
        write(high_at, high);
    }
    change_command(Command::from(before.raw & decoding.raw));

    if (low_mask == 0 || low_mask == ~u32{0}) {
        return Bar{};
    }
    Bar bar;
    bar.kind = is_io ? Bar::Kind::io : is_wide ? Bar::Kind::memory64 : Bar::Kind::memory32;
    bar.prefetchable = !is_io && low.get(MemoryBaseAddress::prefetchable);
    const u32 bits = is_io ? decltype(IoBaseAddress::address)::mask : decltype(MemoryBaseAddress::address)::mask;
    bar.base = u64{high} << 32 | (low.raw & bits);
    u64 mask = u64{high_mask} << 32 | (low_mask & bits);
    if (is_io && low_mask >> 16 == 0) {
        mask |= 0xffff0000; // an I/O register may implement only 16 bits
    }
    bar.size = ~mask + 1;
    if (!std::has_single_bit(bar.size)) {
        return Error{Code::protocol, "the size of a PCI base address register is no power of two", 0, bar.size};
    }
    return bar;
}

Result<Bar> Device::memory_bar(u8 index) const {
    for (u8 i = 0; i < index && i < bars_of(header_type); ++i) {
        const auto low = MemoryBaseAddress::read(*this, 4u * i);
        if (!low.get(MemoryBaseAddress::io_space) &&
            low.get(MemoryBaseAddress::type) == MemoryBaseAddress::Type::bits_64 && ++i == index) {
            return Error{Code::protocol,
                         "a PCI device names the upper half of a 64-bit base address register as one of its own",
                         i - 1u, index};
        }
    }
    TRY(const Bar found, bar(index));
    switch (found.kind) {
    case Bar::Kind::none:
        return Error{Code::not_supported,
                     "the driver needs registers in memory, and the device does not implement this BAR", 1, index};
    case Bar::Kind::io:
        return Error{Code::not_supported, "the driver needs registers in memory, and this BAR is for I/O ports", 1,
                     index};
    case Bar::Kind::memory32:
    case Bar::Kind::memory64: break;
    }
    if (found.base == 0) {
        return Error{Code::not_supported,
                     "the firmware has given this BAR no address: let it configure the device (not \"pci=off\"), or "
                     "attach the device to a bus with a larger window",
                     1, index};
    }
    return found;
}

Result<Mmio> Device::map_bar(MmioMapper& mapper, u8 index, u64 at_byte, u64 size) const {
    TRY(const Bar found, memory_bar(index));
    if (at_byte > found.size || size > found.size - at_byte) {
        return Error{Code::protocol, "a PCI device places registers outside of the BAR that holds them", found.size,
                     at_byte + size};
    }
    TRY(const Mmio region, mapper.map(found.base + at_byte, size));
    change_command(Command::of(Command::memory_space));
    return region;
}

Result<Mmio> Device::map_bar(MmioMapper& mapper, u8 index) const {
    TRY(const Bar found, memory_bar(index));
    TRY(const Mmio region, mapper.map(found.base, found.size));
    change_command(Command::of(Command::memory_space));
    return region;
}

Capabilities::Capabilities(const Device& device, bool extended) : device_(&device), extended_(extended) {
    if (!extended) {
        if (Status::read(device).get(Status::capabilities_list)) {
            at_ = static_cast<u16>(4u * CapabilitiesPointer::read(device).get(CapabilitiesPointer::dword));
        }
    } else if (device.config->reaches_extended(device.at) && device.capability(CapabilityId::express)) {
        at_ = conventional_size; // a conventional function may alias its first 256 bytes there
    }
}

std::optional<Capability> Capabilities::next() {
    const u16 at = at_;
    u64& seen = seen_[at / 4 / 64];
    if (at < (extended_ ? conventional_size : header_end) || (seen >> at / 4 % 64 & 1) != 0) {
        return std::nullopt;
    }
    seen |= u64{1} << at / 4 % 64;
    if (extended_) {
        const auto header = ExtendedCapabilityHeader::read(*device_, at);
        if (header.raw == 0 || header.raw == ~u32{0}) { // end of the list, or the function is gone
            at_ = 0;
            return std::nullopt;
        }
        at_ = static_cast<u16>(4u * header.get(ExtendedCapabilityHeader::next_dword));
        return Capability{header.get(ExtendedCapabilityHeader::id), at, header.get(ExtendedCapabilityHeader::version)};
    }
    const auto header = CapabilityHeader::read(*device_, at);
    if (header.raw == 0xffff) {
        at_ = 0;
        return std::nullopt;
    }
    at_ = static_cast<u16>(4u * header.get(CapabilityHeader::next_dword));
    return Capability{header.get(CapabilityHeader::id), at, 0};
}

std::optional<Capability> Capabilities::next_with(u16 id) {
    for (;;) {
        const auto found = next();
        if (!found || found->id == id) {
            return found;
        }
    }
}

std::optional<u16> Device::capability(CapabilityId id) const {
    const auto found = capabilities().next(id);
    return found ? std::optional(found->offset) : std::nullopt;
}

u64 Device::power_on() const {
    using State = PowerControl::State;
    const auto at_byte = capability(CapabilityId::power);
    const auto control = at_byte ? PowerControl::read(*this, *at_byte) : PowerControl{};
    const State state = control.get(PowerControl::state);
    if (state == State::d0) {
        return 0;
    }
    PowerControl::change(*this, *at_byte, [](PowerControl& power) { power.set(PowerControl::state, State::d0); });
    return state == State::d3_hot ? 10_ms : 200_us; // [PCI-PM-1.2 §5.6.1]
}

std::optional<Device> look_up(Config& config, Address at) {
    const auto identity = Identity::from(config.read(at, Identity::offset, 4));
    if (identity.get(Identity::vendor) == 0xffff || identity.raw == 0) { // no function present
        return std::nullopt;
    }
    Device found{.config = &config, .at = at};
    const auto code = ClassCode::read(found);
    const auto header = HeaderType::read(found);
    found.vendor = static_cast<u16>(identity.get(Identity::vendor));
    found.device = static_cast<u16>(identity.get(Identity::device));
    found.class_code = static_cast<u8>(code.get(ClassCode::base_class));
    found.subclass = static_cast<u8>(code.get(ClassCode::subclass));
    found.prog_if = static_cast<u8>(code.get(ClassCode::interface));
    found.revision = static_cast<u8>(code.get(ClassCode::revision));
    found.header_type = header.get(HeaderType::type);
    found.multi_function = header.get(HeaderType::multi_function);
    return found;
}

void Walk::function(const Device& device) {
    ++functions_;
    if (device.header_type == header_bridge && device.class_code == class_bridge &&
        device.subclass == subclass_pci_bridge) {
        // 0, an unconfigured bridge, was scanned already
        known_.add(BusNumbers::read(device).get(BusNumbers::secondary));
    }
    if (device.class_code == class_bridge && device.subclass == subclass_host_bridge &&
        device.at != Address{.segment = device.at.segment}) {
        more_host_bridges_ = true;
    }
    found_(context_, device);
}

void Walk::bus(u8 number) {
    walked_.add(number);
    const u32 failed_before = config_.failed_reads();
    for (u8 slot = 0; slot < 32; ++slot) {
        u8 functions = 1;
        for (u8 n = 0; n < functions; ++n) {
            const auto device = look_up(config_, {number, slot, n, config_.segment()});
            if (!device) {
                if (n == 0) {
                    break; // function 0 is mandatory [PCI-3.0 §6.1]
                }
                continue;
            }
            if (n == 0 && device->multi_function) {
                functions = 8;
            }
            function(*device);
        }
    }
    unreachable_ += config_.failed_reads() - failed_before; // an inaccessible device number is read once
}

void Walk::tree(u8 root) {
    known_.add(root);
    // a bridge may lead to a lower number: repeat until nothing new is found, at most 256 buses
    for (bool more = true; more;) {
        more = false;
        for (u32 n = 0; n < 256; ++n) {
            const auto number = static_cast<u8>(n);
            if (known_.has(number) && !walked_.has(number)) {
                bus(number);
                more = true;
            }
        }
    }
}

void Walk::rest(u8 first, u8 last) {
    for (u32 n = first; n <= last; ++n) {
        tree(static_cast<u8>(n));
    }
}

Enumerated enumerate(Config& config, Walk::Found found, void* context, u8 first, std::optional<Roots> (*find_roots)(),
                     bool always) {
    Walk walk(config, found, context);
    const auto counts = [&] { return Enumerated{walk.functions(), walk.unreachable()}; };
    walk.tree(first);
    if (!walk.more_host_bridges() && !always) {
        return counts();
    }
    const std::optional<Roots> known = find_roots != nullptr ? find_roots() : std::nullopt;
    if (!known && !walk.more_host_bridges()) {
        return counts();
    }
    const Roots roots = known.value_or(Roots{.others = true});
    for (u32 n = roots.first; n <= roots.last; ++n) {
        if (roots.buses.has(static_cast<u8>(n))) {
            walk.tree(static_cast<u8>(n));
        }
    }
    // A host bridge that ignores the bus number would show all its functions again on every bus.
    const auto identity_of = [&](u8 bus) { return config.read({bus, 0, 0, config.segment()}, Identity::offset, 4); };
    const u32 identity = identity_of(first);
    if (roots.others && (first == roots.last || identity_of(roots.last) != identity)) {
        walk.rest(roots.first, roots.last);
    }
    return counts();
}

} // namespace fl::drivers::pci
