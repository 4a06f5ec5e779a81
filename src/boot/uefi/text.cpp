module boot.uefi.text;
import core.std;
import core.result;

namespace fl::boot::uefi {

namespace {

std::string_view trimmed(std::string_view text) {
    while (!text.empty() && text.front() == ' ') {
        text.remove_prefix(1);
    }
    while (!text.empty() && text.back() == ' ') {
        text.remove_suffix(1);
    }
    return text;
}

constexpr u32 byte_at(std::span<const std::byte> bytes, usize at) { return std::to_integer<u32>(bytes[at]); }
constexpr u32 word_at(std::span<const std::byte> bytes, usize at) {
    return byte_at(bytes, at) | byte_at(bytes, at + 1) << 8;
}
constexpr u32 dword_at(std::span<const std::byte> bytes, usize at) {
    return word_at(bytes, at) | word_at(bytes, at + 2) << 16;
}

} // namespace

bool next_output_piece(std::string_view& rest, OutputPiece& piece) {
    constexpr usize line_end = 2;
    const bool last = rest.size() + line_end <= longest_output;
    usize n = 0;
    for (const char c : rest.substr(0, longest_output)) {
        piece[n++] = static_cast<u8>(c) < 0x80 && c != '\0' ? static_cast<char16_t>(c) : u'?';
    }
    rest.remove_prefix(n);
    if (last) {
        piece[n++] = u'\r';
        piece[n++] = u'\n';
    }
    piece[n] = u'\0';
    return last;
}

Result<std::string_view> text_of_load_options(std::span<const std::byte> options, std::span<char> storage) {
    if (options.size() % 2 != 0) {
        return Error(Code::bad_argument, "load options: expected UCS-2 text, of an even size", options.size() + 1,
                     options.size());
    }
    usize size = 0;
    for (usize at = 0; at < options.size(); at += 2) {
        u32 c = word_at(options, at);
        if (c == 0) {
            break;
        }
        if (c == '\t' || c == '\r' || c == '\n') {
            c = ' ';
        }
        if (c < 0x20 || c > 0x7e) {
            return Error(Code::bad_argument, "load options: expected printable ASCII in UCS-2 (0x20 to 0x7e)", 0x20, c);
        }
        if (size < storage.size()) {
            storage[size++] = static_cast<char>(c);
        }
    }
    return trimmed({storage.data(), size});
}

std::string_view without_image_name(std::string_view options) {
    if (options.starts_with('"')) {
        const usize close = options.find('"', 1);
        return close == std::string_view::npos ? std::string_view{} : trimmed(options.substr(close + 1));
    }
    const usize end = std::min(options.find(' '), options.size());
    return options.substr(0, end).find('=') != std::string_view::npos ? options : trimmed(options.substr(end));
}

Result<std::string_view> text_of_command_line_file(std::span<char> file) {
    std::string_view text(file.data(), file.size());
    // UTF-16 with a byte order mark, or without one: two consecutive characters with a zero byte each.
    const bool zeroes = text.size() >= 4 && ((text[0] == 0 && text[2] == 0) || (text[1] == 0 && text[3] == 0));
    if (text.starts_with("\xff\xfe") || text.starts_with("\xfe\xff") || zeroes) {
        return Error(Code::bad_argument, "expected ASCII or UTF-8 text, seen UTF-16; save it as UTF-8");
    }
    if (text.starts_with("\xef\xbb\xbf")) {
        file = file.subspan(3);
    }
    for (char& c : file) {
        if (static_cast<u8>(c) < 0x20 || c == 0x7f) {
            c = ' ';
        }
    }
    return trimmed({file.data(), file.size()});
}

bool leads_to_com1(std::span<const std::byte> path) {
    // Node types [UEFI-2.10 §10.3.1]: ACPI device 2/1 (HID and UID), UART 3/14, end 0x7f/0xff (of the entire path) and
    // 0x7f/0x01 (of one instance).
    constexpr u32 pnp0501 = 0x050141d0; // EISA-compressed PNP0501, a 16550A-compatible port
    bool port = false;                  // the previous node was COM1's ACPI device
    while (path.size() >= 4) {
        const u32 type = byte_at(path, 0);
        const u32 subtype = byte_at(path, 1);
        const usize size = word_at(path, 2);
        if (size < 4 || size > path.size() || (type == 0x7f && subtype == 0xff)) {
            return false;
        }
        if (type == 3 && subtype == 14 && port) {
            return true;
        }
        port = type == 2 && subtype == 1 && size >= 12 && dword_at(path, 4) == pnp0501 && dword_at(path, 8) == 0;
        path = path.subspan(size);
    }
    return false;
}

} // namespace fl::boot::uefi
