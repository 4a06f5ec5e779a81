// The processor's I/O ports for drivers: ordered with memory accesses. An earlier store completes before a port
// access, and a later load executes after it. The processor guarantees that order for in and out [SDM §9.2: I/O
// instructions are strongly ordered]; only the compiler needs a barrier.
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
