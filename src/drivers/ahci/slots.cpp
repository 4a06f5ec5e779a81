module drivers.ahci.slots;
import core.std;
import core.log;
import core.time;

namespace fl::drivers::ahci {

bool LostInterrupt::check(Port& port, Instant now) {
    if (now <= since_ || now - since_ < after) {
        return false;
    }
    const u32 causes = port.read<PortInterrupts>().raw;
    if ((causes & ~PortInterrupts::dps.mask & (PortInterrupts::ends | PortInterrupts::enabled)) == 0) {
        suspect_ = false;
        return false;
    }
    if (!std::exchange(suspect_, true)) { // it must last for a whole tick
        return false;
    }
    if (!std::exchange(reported_, true)) {
        log::warning("ahci: port {}: a command ended without an interrupt", port.number());
    }
    suspect_ = false;
    found_ = true;
    return true;
}

} // namespace fl::drivers::ahci
