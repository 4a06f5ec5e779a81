module drivers.pci;
import core.std;
import core.result;

namespace fl::drivers::pci {

namespace {

constexpr u8 offset_of(Field field) { return static_cast<u8>(field); }

constexpr u8 header_multi_function = 0x80;
constexpr u8 header_general = 0;
constexpr u8 header_bridge = 1;
constexpr u16 status_capabilities = 1u << 4; // [PCI-3.0 §6.2.3]
constexpr u8 class_bridge = 6;
constexpr u8 subclass_host_bridge = 0;
constexpr u8 subclass_pci_bridge = 4;
constexpr unsigned max_capabilities = 48; // 192 bytes behind the header, at least 4 each

} // namespace

void Device::change_command(u16 set, u16 clear) const {
    const Command now = command();
    const auto wanted = static_cast<u16>((now.raw & ~clear) | set);
    if (wanted != now.raw) {
        config->write16(at, offset_of(Field::command), wanted); // 16 bits: the status half clears on ones
    }
}

Result<Bar> Device::bar(u8 index) const {
    const u8 count = header_type == header_general ? 6 : header_type == header_bridge ? 2 : 0;
    if (index >= count) {
        return Error{Code::bad_argument, "this PCI header has fewer base address registers", count, index};
    }
    const auto offset = static_cast<u8>(offset_of(Field::bar0) + 4 * index);
    const u32 low = config->read32(at, offset);
    const bool is_io = (low & 1) != 0;
    const bool is_wide = !is_io && (low >> 1 & 3) == 2;
    if (!is_io && ((low >> 1 & 3) == 3 || (is_wide && index + 1 >= count))) {
        return Error{Code::protocol, "a PCI base address register of a type that does not exist", 0, low};
    }
    const u32 high = is_wide ? config->read32(at, static_cast<u8>(offset + 4)) : 0;

    // All ones in, the bits that stick are the address bits. Decoding is off meanwhile, or the device would answer at
    // the top of the space.
    const Command before = command();
    const u16 decoding = Command::io_space | Command::memory_space;
    change_command(0, decoding);
    config->write32(at, offset, ~u32{0});
    const u32 low_mask = config->read32(at, offset);
    config->write32(at, offset, low);
    u32 high_mask = is_io || !is_wide ? ~u32{0} : 0;
    if (is_wide) {
        config->write32(at, static_cast<u8>(offset + 4), ~u32{0});
        high_mask = config->read32(at, static_cast<u8>(offset + 4));
        config->write32(at, static_cast<u8>(offset + 4), high);
    }
    change_command(static_cast<u16>(before.raw & decoding));

    if (low_mask == 0 || low_mask == ~u32{0}) {
        return Bar{};
    }
    Bar bar;
    bar.kind = is_io ? Bar::Kind::io : is_wide ? Bar::Kind::memory64 : Bar::Kind::memory32;
    bar.prefetchable = !is_io && (low & 8) != 0;
    const u32 flags = is_io ? 3 : 15;
    bar.base = u64{high} << 32 | (low & ~flags);
    u64 mask = u64{high_mask} << 32 | (low_mask & ~flags);
    if (is_io && low_mask >> 16 == 0) {
        mask |= 0xffff0000; // a port register may implement 16 bits only
    }
    bar.size = ~mask + 1;
    if (!std::has_single_bit(bar.size)) {
        return Error{Code::protocol, "the size of a PCI base address register is no power of two", 0, bar.size};
    }
    return bar;
}

std::optional<u8> Device::capability(CapabilityId id) const {
    if ((read32(Field::command) >> 16 & status_capabilities) == 0) {
        return std::nullopt;
    }
    auto offset = static_cast<u8>(read32(Field::capabilities) & 0xfc);
    for (unsigned i = 0; i < max_capabilities && offset >= 0x40; ++i) {
        const u32 head = config->read32(at, offset);
        if ((head & 0xff) == to_underlying(id)) {
            return offset;
        }
        offset = static_cast<u8>(head >> 8 & 0xfc);
    }
    return std::nullopt;
}

std::optional<Device> look_up(Config& config, Address at) {
    const u32 identity = config.read32(at, offset_of(Field::identity));
    if ((identity & 0xffff) == 0xffff || identity == 0) { // nobody drove the bus
        return std::nullopt;
    }
    const u32 code = config.read32(at, offset_of(Field::class_code));
    const u32 header = config.read32(at, offset_of(Field::header_type));
    return Device{.config = &config,
                  .at = at,
                  .vendor = static_cast<u16>(identity),
                  .device = static_cast<u16>(identity >> 16),
                  .class_code = static_cast<u8>(code >> 24),
                  .subclass = static_cast<u8>(code >> 16),
                  .prog_if = static_cast<u8>(code >> 8),
                  .revision = static_cast<u8>(code),
                  .header_type = static_cast<u8>(header >> 16 & 0x7f)};
}

void Walk::function(const Device& device) {
    ++functions_;
    if (device.header_type == header_bridge && device.class_code == class_bridge &&
        device.subclass == subclass_pci_bridge) {
        // 0, an unconfigured bridge, is walked already
        known_.add(static_cast<u8>(device.read32(Field::bridge_buses) >> 8));
    }
    if (device.class_code == class_bridge && device.subclass == subclass_host_bridge && device.at != Address{}) {
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
            const auto device = look_up(config_, {number, slot, n});
            if (!device) {
                if (n == 0) {
                    break; // function 0 is mandatory [PCI-3.0 §6.1]
                }
                continue;
            }
            if (n == 0 && (device->read32(Field::header_type) >> 16 & header_multi_function) != 0) {
                functions = 8;
            }
            function(*device);
        }
    }
    unreachable_ += config_.failed_reads() - failed_before; // a place that fails is read once
}

void Walk::tree(u8 root) {
    known_.add(root);
    // a bridge may lead to a lower number: until a round finds nothing new, 256 buses at most
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

Enumerated enumerate(Config& config, Walk::Found found, void* context, u8 first, std::optional<Roots> (*ask)(),
                     bool always) {
    Walk walk(config, found, context);
    const auto counts = [&] { return Enumerated{walk.functions(), walk.unreachable()}; };
    walk.tree(first);
    if (!walk.more_host_bridges() && !always) {
        return counts();
    }
    const std::optional<Roots> said = ask != nullptr ? ask() : std::nullopt;
    if (!said && !walk.more_host_bridges()) {
        return counts();
    }
    const Roots roots = said.value_or(Roots{.others = true});
    for (u32 n = roots.first; n <= roots.last; ++n) {
        if (roots.buses.has(static_cast<u8>(n))) {
            walk.tree(static_cast<u8>(n));
        }
    }
    // A host bridge that ignores the bus number would show everything again on every bus.
    const u32 identity = config.read32({first, 0, 0}, offset_of(Field::identity));
    if (roots.others &&
        (first == roots.last || config.read32({roots.last, 0, 0}, offset_of(Field::identity)) != identity)) {
        walk.rest(roots.first, roots.last);
    }
    return counts();
}

} // namespace fl::drivers::pci
