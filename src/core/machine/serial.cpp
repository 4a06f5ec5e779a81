module core.machine.serial;
import core.std;
import core.log;
import core.machine.cpu;

namespace fl {

namespace {

// Registers of a 16550, as offsets from its base [16550].
enum : u16 {
    data = 0,
    interrupt_enable = 1,
    fifo_control = 2,
    line_control = 3,
    modem_control = 4,
    line_status = 5,
    scratch = 7
};
constexpr u8 line_status_empty = 0x20; // transmitter holding register (the whole FIFO) is empty
constexpr u16 fifo_size = 16;
// A byte at 115200 baud takes 87 us. 200 ms are far more than a FIFO ever needs; a status read takes at least 10 ns.
constexpr u32 max_polls = 20'000;

constinit SerialPort port{0x3f8};
constinit DebugConsole debug;

} // namespace

bool SerialPort::open() {
    // Test the scratch register: an absent port reads as 0xff.
    for (const u8 pattern : {u8{0x5a}, u8{0xa5}}) {
        cpu::out8(base_ + scratch, pattern);
        if (cpu::in8(base_ + scratch) != pattern) {
            return present_ = false;
        }
    }
    cpu::out8(base_ + interrupt_enable, 0);
    cpu::out8(base_ + line_control, 0x80); // divisor latch
    cpu::out8(base_ + data, 1);            // 115200 baud
    cpu::out8(base_ + interrupt_enable, 0);
    cpu::out8(base_ + line_control, 0x03); // 8N1
    cpu::out8(base_ + fifo_control, 0x07); // enable, clear both FIFOs
    cpu::out8(base_ + modem_control, 0x03);
    burst_ = (cpu::in8(base_ + fifo_control) & 0xc0) == 0xc0 ? fifo_size : 1;
    return present_ = true;
}

void SerialPort::write(std::string_view text) {
    if (!present_) {
        return;
    }
    for (usize at = 0; at < text.size();) {
        u32 polls = 0;
        while ((cpu::in8(base_ + line_status) & line_status_empty) == 0) {
            if (++polls == max_polls) {
                return;
            }
            cpu::relax();
        }
        const usize n = std::min<usize>(burst_, text.size() - at);
        cpu::out8_string(base_ + data, text.data() + at, n);
        at += n;
    }
}

bool DebugConsole::open() { return present_ = cpu::in8(0xe9) == 0xe9; }

void DebugConsole::open(usize longest) {
    present_ = true;
    longest_ = longest;
}

void DebugConsole::write(std::string_view text) {
    if (present_) {
        log::folded(text, column_, longest_,
                    [](std::string_view part) { cpu::out8_string(0xe9, part.data(), part.size()); });
    }
}

SerialPort& com1() { return port; }
DebugConsole& debug_console() { return debug; }

void open_consoles() {
    if (port.open()) {
        log::attach(port);
    }
    if (debug.open()) {
        log::attach(debug);
    }
}

void use_debug_port(usize longest) {
    debug.open(longest);
    log::attach(debug);
}

} // namespace fl
