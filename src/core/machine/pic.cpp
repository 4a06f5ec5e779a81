module core.machine.pic;
import core.std;
import core.machine.cpu;

namespace fl::pic {

namespace {

constexpr u16 command[2] = {0x20, 0xa0};
constexpr u16 data[2] = {0x21, 0xa1};
constexpr u16 edge_level[2] = {0x4d0, 0x4d1};
constexpr u8 non_specific_eoi = 0x20;
constexpr u8 read_in_service = 0x0b;
constexpr u8 cascade = 2;

constinit u8 masks[2] = {0xff, 0xff};

} // namespace

bool start(u8 first_vector) {
    for (u32 i = 0; i < 2; ++i) {
        cpu::out8(command[i], 0x11); // ICW1: edge, cascade, ICW4 follows
        cpu::out8(data[i], static_cast<u8>(first_vector + 8 * i));
        cpu::out8(data[i], i == 0 ? u8{1} << cascade : cascade);
        cpu::out8(data[i], 0x01); // ICW4: 8086 mode
    }
    masks[0] = static_cast<u8>(~(1u << cascade));
    masks[1] = 0xff;
    for (u32 i = 0; i < 2; ++i) {
        cpu::out8(data[i], masks[i]);
    }
    return cpu::in8(data[0]) == masks[0]; // a missing controller reads as all ones
}

void unmask(u8 irq) {
    u8& mask = masks[irq / 8];
    mask = static_cast<u8>(mask & ~(1u << irq % 8));
    cpu::out8(data[irq / 8], mask);
}

void mask(u8 irq) {
    u8& mask = masks[irq / 8];
    mask = static_cast<u8>(mask | 1u << irq % 8);
    cpu::out8(data[irq / 8], mask);
}

void set_level(u8 irq, bool level) {
    const u8 bit = static_cast<u8>(1u << irq % 8);
    const u8 now = cpu::in8(edge_level[irq / 8]);
    const u8 wanted = static_cast<u8>(level ? now | bit : now & ~bit);
    if (wanted != now) {
        cpu::out8(edge_level[irq / 8], wanted);
    }
}

bool is_real(u8 irq) {
    if (irq % 8 != 7) {
        return true;
    }
    cpu::out8(command[irq / 8], read_in_service);
    if ((cpu::in8(command[irq / 8]) & 0x80) != 0) {
        return true;
    }
    if (irq == 15) {
        cpu::out8(command[0], non_specific_eoi); // the first controller has the cascade line in service
    }
    return false;
}

void end_of_interrupt(u8 irq) {
    if (irq >= 8) {
        cpu::out8(command[1], non_specific_eoi);
    }
    cpu::out8(command[0], non_specific_eoi);
}

} // namespace fl::pic
