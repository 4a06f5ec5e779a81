module drivers.ahci.polling;
import core.std;
import core.result;
import core.time;

namespace fl::drivers::ahci {

void Polling::silence() {
    if (recovery_.in_progress()) {
        return;
    }
    silent_ = true;
    expected_ = slots_.issued(); // their FIS may have been seen already, without its commands
    port_.write(interrupt_enable, PortInterrupts::enabled & ~PortInterrupts::ends);
}

bool Polling::look() {
    if (slots_.issued() == 0) {
        return false;
    }
    expected_ = (expected_ | slots_.announced()) & slots_.issued();
    return (expected_ != 0 || executor_.turn_time() >= next_read_) && read();
}

bool Polling::stop() {
    silent_ = false;
    port_.write(PortInterrupts::offset, PortInterrupts::ends); // of the commands that are ended already
    port_.write(interrupt_enable, PortInterrupts::enabled);
    return read();
}

/// An error is left to the turn of an interrupt, which finds it again.
bool Polling::read() {
    next_read_ = after(executor_.turn_time(), LostInterrupt::after);
    const auto ended = slots_.ended_by_registers();
    if (!ended) {
        events_.force();
        return false;
    }
    expected_ &= ~*ended;
    if (*ended == 0) {
        return false;
    }
    slots_.forget_fis();
    slots_.end(*ended);
    recovery_.succeeded();
    return true;
}

} // namespace fl::drivers::ahci
