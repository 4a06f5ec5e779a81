// drivers.pci.access with the processor's I/O ports.
export module drivers.machine.pci;
import core.std;
import core.machine.cpu;
import drivers.pci;
import drivers.pci.access;

export namespace fl::drivers::pci {

/// RegisterAccess by port number.
struct ProcessorPorts {
    template <class T>
    static T read(u64 port) {
        if constexpr (sizeof(T) == 1) {
            return cpu::in8(static_cast<u16>(port));
        } else if constexpr (sizeof(T) == 2) {
            return cpu::in16(static_cast<u16>(port));
        } else {
            return cpu::in32(static_cast<u16>(port));
        }
    }
    template <class T>
    static void write(u64 port, T value) {
        if constexpr (sizeof(T) == 1) {
            cpu::out8(static_cast<u16>(port), value);
        } else if constexpr (sizeof(T) == 2) {
            cpu::out16(static_cast<u16>(port), value);
        } else {
            cpu::out32(static_cast<u16>(port), value);
        }
    }
};

/// Use a single object: the machine has only one pair of ports.
using MechanismOne = PortConfig<ProcessorPorts>;

} // namespace fl::drivers::pci
