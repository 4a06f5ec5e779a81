// The processor's I/O ports as drivers want them: ordered with memory. A store before a port access is done before it,
// a load behind one comes after it. The processor keeps that order by itself for in and out [SDM §9.2: I/O instructions
// are strongly ordered]; only the compiler must be told.
export module drivers.machine.ports;
import core.std;
import core.machine.cpu;

export namespace fl::drivers {

struct Ports {
    static void order() { asm volatile("" ::: "memory"); }

    u8 in8(u16 port) {
        order();
        const u8 value = cpu::in8(port);
        order();
        return value;
    }
    void out8(u16 port, u8 value) {
        order();
        cpu::out8(port, value);
        order();
    }
    void out16(u16 port, u16 value) {
        order();
        cpu::out16(port, value);
        order();
    }
    void out32(u16 port, u32 value) {
        order();
        cpu::out32(port, value);
        order();
    }
    void in16_string(u16 port, u16* into, u64 count) { cpu::in16_string(port, into, count); }
};

} // namespace fl::drivers
