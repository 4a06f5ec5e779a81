module vmm.pci;
import core.std;
import vmm.board;
import vmm.ports;

namespace fl::vmm {
namespace {

constexpr u16 intel = 0x8086;

PciFunction function(u16 device, u32 class_code, u16 command, u16 command_mask, u8 header_type) {
    PciFunction f;
    f.set<u16>(0x00, intel);
    f.set<u16>(0x02, device);
    f.set<u16>(0x04, command, command_mask);
    f.set<u16>(0x06, 0x0280); // fast back to back, medium timing
    f.set<u32>(0x08, class_code << 8);
    f.set<u8>(0x0e, header_type);
    f.set<u8>(0x3c, 0, 0xff);
    return f;
}

} // namespace

PciHost::PciHost(PortDevice& reset) : reset_(reset) {
    slots_[count_++] = {0, 0, function(0x1237, 0x06'0000, 0x0006, 0, 0)}; // 440FX
}

void PciHost::add_ide() {
    slots_[count_++] = {1, 0, function(0x7000, 0x06'0100, 0x0007, 0, 0x80)}; // PIIX3, multifunction
    // bus master, both channels at the ISA ports
    PciFunction ide = function(0x7010, 0x01'0180, 0x0005, 0x0005, 0);
    ide.set<u32>(0x20, bus_master_base | 1, 0xfff0);
    ide.set<u32>(0x40, 0x8000'8000, 0xffff'ffff); // timing: both channels decoded
    ide.set<u8>(0x44, 0, 0xff);
    slots_[count_++] = {1, 1, ide};
}

PciFunction* PciHost::selected() {
    if ((address_ & 0x80ff'0000) != 0x8000'0000) { // disabled, or another bus
        return nullptr;
    }
    for (Slot& slot : std::span{slots_}.first(count_)) {
        if (slot.device == (address_ >> 11 & 31) && slot.function == (address_ >> 8 & 7)) {
            return &slot.space;
        }
    }
    return nullptr;
}

u32 PciHost::in(u16 port, unsigned size) {
    if (port < first_port + 4) {
        return size == 4 && port == first_port ? address_ : ~u32{0} >> (32 - 8 * size);
    }
    u32 value = 0;
    const PciFunction* const f = selected();
    for (unsigned i = 0; i < size; ++i) {
        const unsigned offset = (address_ & 0xfc) + (port & 3u) + i;
        value |= static_cast<u32>(f != nullptr && offset < 256 ? f->bytes[offset] : 0xff) << (8 * i);
    }
    return value;
}

void PciHost::out(u16 port, unsigned size, u32 value) {
    if (port == reset_control && size == 1) {
        reset_.out(port, size, value);
        return;
    }
    if (port < first_port + 4) {
        address_ = size == 4 && port == first_port ? value : address_;
        return;
    }
    PciFunction* const f = selected();
    for (unsigned i = 0; f != nullptr && i < size; ++i) {
        const unsigned offset = (address_ & 0xfc) + (port & 3u) + i;
        if (offset < 256) {
            const u8 mask = f->writable[offset];
            f->bytes[offset] = static_cast<u8>((f->bytes[offset] & ~mask) | ((value >> (8 * i)) & mask));
        }
    }
}

} // namespace fl::vmm
