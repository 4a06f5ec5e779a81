module core.text;
import core.std;
import core.result;

namespace fl::text_detail {

void format_string_is_wrong(const char*) {}

namespace {

void pad(void* sink, Write write, char fill, usize count) {
    for (; count > 0; --count) {
        write(sink, {&fill, 1});
    }
}

void put(void* sink, Write write, const Spec& spec, std::string_view text, char default_align) {
    const usize missing = spec.width > text.size() ? spec.width - text.size() : 0;
    const bool right = (spec.align != 0 ? spec.align : default_align) == '>';
    if (right) {
        pad(sink, write, spec.fill, missing);
    }
    write(sink, text);
    if (!right) {
        pad(sink, write, spec.fill, missing);
    }
}

void put_number(void* sink, Write write, const Spec& spec, u64 number, bool negative) {
    std::array<char, 24> digits{};
    usize at = digits.size();
    do {
        digits[--at] = spec.hex ? "0123456789abcdef"[number & 15] : static_cast<char>('0' + number % 10);
        number = spec.hex ? number >> 4 : number / 10;
    } while (number != 0);
    if (spec.prefix) {
        // The prefix precedes zero padding, so the width counts the digits only.
        write(sink, "0x");
    }
    if (negative) {
        digits[--at] = '-';
    }
    put(sink, write, spec, {digits.data() + at, digits.size() - at}, '>');
}

void put_argument(void* sink, Write write, const Spec& spec, const Argument& a) {
    using enum Argument::Kind;
    switch (a.kind) {
    case unsigned_: put_number(sink, write, spec, a.number, false); break;
    case signed_: {
        const bool negative = static_cast<i64>(a.number) < 0 && !spec.hex;
        put_number(sink, write, spec, negative ? u64{0} - a.number : a.number, negative);
        break;
    }
    case boolean: put(sink, write, spec, a.number != 0 ? "true" : "false", '<'); break;
    case character: {
        const char c = static_cast<char>(a.number);
        put(sink, write, spec, {&c, 1}, '<');
        break;
    }
    case text:
        put(sink, write, spec, a.text, '<');
        if (a.error != nullptr && a.error->has_values) {
            // Requested and available quantities are shown in decimal; everything else comes from registers and packets
            // and is shown in hexadecimal.
            const bool amount = a.error->code == Code::bad_argument || a.error->code == Code::exhausted;
            Spec shown{};
            shown.hex = shown.prefix = !amount;
            write(sink, " (expected ");
            put_number(sink, write, shown, a.error->expected, false);
            write(sink, ", seen ");
            put_number(sink, write, shown, a.error->seen, false);
            write(sink, ")");
        }
        break;
    }
}

} // namespace

void vprint(void* sink, Write write, std::string_view f, std::span<const Argument> arguments) {
    usize next = 0;
    usize plain = 0; // start of the current run of ordinary text
    for (usize i = 0; i < f.size();) {
        if (f[i] != '{' && f[i] != '}') {
            ++i;
            continue;
        }
        write(sink, f.substr(plain, i - plain));
        if (f[i] == '{' && f[i + 1] != '{') {
            Spec spec;
            i = parse(f, i + 1, spec);
            put_argument(sink, write, spec, arguments[next++]);
            plain = i;
        } else {
            plain = i + 1; // the second of a doubled brace is ordinary text
            i += 2;
        }
    }
    write(sink, f.substr(plain));
}

} // namespace fl::text_detail
