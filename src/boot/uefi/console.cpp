module boot.uefi.console;
import core.std;
import core.text;
import core.verdict;
import core.machine.cpu;
import boot.uefi.protocol;
import boot.uefi.text;

namespace fl::boot::uefi {

namespace {

constexpr u16 com1 = 0x3f8;
constexpr u16 line_status = com1 + 5;
constexpr u8 transmitter_empty = 0x20;
constexpr u8 all_sent = 0x40;
constexpr u32 spins_per_byte = 100'000; // a byte takes 87 µs at 115200 baud, a port access about 1 µs

// The ConOut variable holds the device paths of the consoles in use [UEFI-2.10 §3.3].
bool firmware_prints_on_com1(const SystemTable& system) {
    static constinit std::array<std::byte, 2048> paths{};
    u64 size = paths.size();
    if (system.runtime == nullptr ||
        failed(system.runtime->get_variable(u"ConOut", &global_variable_guid, nullptr, &size, paths.data()))) {
        return false;
    }
    return leads_to_com1(std::span(paths).first(std::min<u64>(size, paths.size())));
}

} // namespace

void Console::open(const SystemTable& system) {
    output_ = system.output;
    serial_present_ = cpu::in8(line_status) != 0xff; // all bits set: no device responds
    if (!serial_present_ || (output_ != nullptr && firmware_prints_on_com1(system))) {
        return;
    }
    cpu::out8(com1 + 1, 0);    // no interrupts
    cpu::out8(com1 + 3, 0x80); // divisor: 115200 baud
    cpu::out8(com1 + 0, 1);
    cpu::out8(com1 + 1, 0);
    cpu::out8(com1 + 3, 0x03); // 8N1
    cpu::out8(com1 + 2, 0x07); // FIFOs on and empty
    cpu::out8(com1 + 4, 0x03); // DTR, RTS
    serial_ = true;
}

void Console::leave_firmware() {
    output_ = nullptr;
    serial_ = serial_present_;
}

void Console::verdict(Verdict verdict, std::string_view reason) {
    FixedText<1024> text; // large enough, since reasons are short: a truncated record would be invalid JSON
    print(text, "@{{\"record\":\"verdict\",\"verdict\":\"{}\",\"reason\":\"", verdict);
    print_json(text, reason.substr(0, 160));
    text.write("\"}");
    if (!serial_present_ || serial_) { // otherwise the firmware's console is COM1
        put_output(text);
    }
    if (serial_present_) {
        put_serial(text);
        put_serial("\r\n");
        // Wait until all is sent: the machine may end with the next instruction.
        for (u32 spins = 0; spins < spins_per_byte && (cpu::in8(line_status) & all_sent) == 0; ++spins) {
        }
    }
}

void Console::put_output(std::string_view text) {
    if (output_ == nullptr) {
        return;
    }
    OutputPiece piece;
    bool last = false;
    while (!last) {
        last = next_output_piece(text, piece);
        output_->output_string(output_, piece.data());
    }
}

void Console::put(std::string_view text) {
    put_output(text);
    if (serial_) {
        put_serial(text);
        put_serial("\r\n");
    }
}

void Console::put_serial(std::string_view text) {
    for (char c : text) {
        u32 spins = 0;
        while ((cpu::in8(line_status) & transmitter_empty) == 0) {
            if (++spins == spins_per_byte) {
                serial_ = serial_present_ = false;
                return;
            }
        }
        cpu::out8(com1, static_cast<u8>(c));
    }
}

} // namespace fl::boot::uefi
