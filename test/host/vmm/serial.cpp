module vmm.serial;
import core.std;
import vmm.ports;

namespace fl::vmm {
namespace {

// Registers, as offsets from the first port [16550 §8.0].
constexpr unsigned data = 0; // divisor low byte while LCR bit 7 is set
constexpr unsigned interrupt_enable = 1;
constexpr unsigned interrupt_identification = 2; // write: FIFO control
constexpr unsigned line_control = 3;
constexpr unsigned modem_control = 4;
constexpr unsigned line_status = 5;
constexpr unsigned modem_status_register = 6;
constexpr u8 divisor_access = 0x80;
constexpr u8 loopback = 0x10;
constexpr u8 enable_received = 0x01;
constexpr u8 enable_empty = 0x02;
constexpr u8 out2 = 0x08; // on a PC this enables the interrupt

} // namespace

u8 Serial::identification() const {
    const u8 fifo = fifo_ ? 0xc0 : 0;
    if ((enable_ & enable_received) != 0 && received_count_ != 0) {
        return fifo | 0x04;
    }
    if ((enable_ & enable_empty) != 0 && empty_pending_) {
        return fifo | 0x02;
    }
    return fifo | 0x01; // none pending
}

u8 Serial::modem_status() const {
    if ((modem_control_ & loopback) == 0) {
        return 0xb0; // carrier, data set ready, clear to send
    }
    // DTR, RTS, OUT1, OUT2 are looped back as DSR, CTS, RI, DCD [16550 §8.7].
    const unsigned m = modem_control_;
    return static_cast<u8>((m & 1) << 5 | (m & 2) << 3 | (m & 4) << 4 | (m & 8) << 4);
}

void Serial::update() {
    const bool wanted = (identification() & 1) == 0 && (modem_control_ & out2) != 0 && (modem_control_ & loopback) == 0;
    if (wanted != raised_) {
        raised_ = wanted;
        line_.set(wanted);
    }
}

bool Serial::receive(char byte) {
    if (received_count_ == received_.size()) {
        return false;
    }
    received_[(received_from_ + received_count_++) % received_.size()] = byte;
    update();
    return true;
}

u8 Serial::read(unsigned at) {
    switch (at) {
    case data:
        if ((line_control_ & divisor_access) != 0) {
            return static_cast<u8>(divisor_);
        }
        if (received_count_ != 0) {
            const char byte = received_[received_from_];
            received_from_ = (received_from_ + 1) % static_cast<unsigned>(received_.size());
            --received_count_;
            update();
            return static_cast<u8>(byte);
        }
        return 0;
    case interrupt_enable: return (line_control_ & divisor_access) != 0 ? static_cast<u8>(divisor_ >> 8) : enable_;
    case interrupt_identification: {
        const u8 found = identification();
        if ((found & 0x0f) == 0x02) { // reading clears it [16550 §8.5]
            empty_pending_ = false;
            update();
        }
        return found;
    }
    case line_control: return line_control_;
    case modem_control: return modem_control_;
    case line_status: return static_cast<u8>(0x60 | (received_count_ != 0 ? 1 : 0)); // the transmitter is always empty
    case modem_status_register: return modem_status();
    default: return scratch_;
    }
}

void Serial::write(unsigned at, u8 value) {
    switch (at) {
    case data:
        if ((line_control_ & divisor_access) != 0) {
            divisor_ = static_cast<u16>((divisor_ & 0xff00) | value);
            break;
        }
        if ((modem_control_ & loopback) != 0) {
            receive(static_cast<char>(value));
        } else {
            sink_.put(static_cast<char>(value));
        }
        empty_pending_ = true;
        break;
    case interrupt_enable:
        if ((line_control_ & divisor_access) != 0) {
            divisor_ = static_cast<u16>((divisor_ & 0x00ff) | value << 8);
            break;
        }
        if ((value & enable_empty) != 0 && (enable_ & enable_empty) == 0) {
            empty_pending_ = true; // enabling it while the transmitter is empty raises the interrupt
        }
        enable_ = value & 0x0f;
        break;
    case interrupt_identification: // FIFO control
        fifo_ = (value & 0x01) != 0;
        if ((value & 0x02) != 0 || !fifo_) {
            received_count_ = 0;
        }
        break;
    case line_control: line_control_ = value; break;
    case modem_control: modem_control_ = value & 0x1f; break;
    case line_status:
    case modem_status_register: break; // read only
    default: scratch_ = value; break;
    }
    update();
}

u32 Serial::in(u16 port, unsigned size) {
    u32 value = 0;
    for (unsigned i = 0; i < size; ++i) {
        const unsigned at = static_cast<unsigned>(port - base_) + i;
        value |= static_cast<u32>(at < port_count ? read(at) : 0xff) << (8 * i);
    }
    return value;
}

void Serial::out(u16 port, unsigned size, u32 value) {
    for (unsigned i = 0; i < size; ++i) {
        const unsigned at = static_cast<unsigned>(port - base_) + i;
        if (at < port_count) {
            write(at, static_cast<u8>(value >> (8 * i)));
        }
    }
}

} // namespace fl::vmm
