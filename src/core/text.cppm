// Text without allocation: a sink takes string_views, print() fills a format string that is checked at compile time.
// Fields: {} {:x} {:#x} {:08x} {:>8} {:<8} {:016x}; {{ and }} produce braces. Integers, bool, char, pointers,
// string_view, enums that have a name() found by argument-dependent lookup, and Error.
export module core.text;
import core.std;
import core.result;

export namespace fl {

/// Consumer of text. write() must not fail; a full sink drops what does not fit and may report that itself.
template <class S>
concept TextSink = requires(S& sink, std::string_view text) { sink.write(text); };

/// Up to N bytes of text with its own storage; what does not fit is dropped and `truncated` is set.
template <usize N>
class FixedText {
  public:
    constexpr FixedText() = default;
    constexpr FixedText(std::string_view text) { write(text); }
    constexpr void write(std::string_view text) {
        const usize n = std::min(text.size(), N - size_);
        std::copy_n(text.data(), n, data_.data() + size_);
        size_ += n;
        truncated_ = truncated_ || n < text.size();
    }
    constexpr void clear() {
        size_ = 0;
        truncated_ = false;
    }
    constexpr std::string_view view() const { return {data_.data(), size_}; }
    constexpr operator std::string_view() const { return view(); }
    constexpr usize size() const { return size_; }
    constexpr bool empty() const { return size_ == 0; }
    constexpr bool truncated() const { return truncated_; }
    static constexpr usize capacity() { return N; }
    friend constexpr bool operator==(const FixedText& a, std::string_view b) { return a.view() == b; }

  private:
    std::array<char, N> data_{};
    usize size_ = 0;
    bool truncated_ = false;
};

/// Text written into storage of the caller; what does not fit is dropped.
class SpanText {
  public:
    constexpr explicit SpanText(std::span<char> storage) : storage_(storage) {}
    constexpr void write(std::string_view text) {
        const usize n = std::min(text.size(), storage_.size() - size_);
        std::copy_n(text.data(), n, storage_.data() + size_);
        size_ += n;
    }
    constexpr std::string_view view() const { return {storage_.data(), size_}; }

  private:
    std::span<char> storage_;
    usize size_ = 0;
};

namespace text_detail {

struct Spec {
    char fill = ' ';
    char align = 0; // '<', '>' or 0 for the type's default
    u8 width = 0;
    bool hex = false;
    bool prefix = false;
};

// A type-erased argument: integers are widened, text is kept as a view.
struct Argument {
    enum class Kind : u8 { unsigned_, signed_, text, character, boolean } kind;
    u64 number = 0;
    std::string_view text{};
    const Error* error = nullptr;
};

template <class T>
constexpr Argument erase(const T& value) {
    using K = Argument::Kind;
    if constexpr (std::is_same_v<T, bool>) {
        return {K::boolean, value, {}, nullptr};
    } else if constexpr (std::is_same_v<T, char>) {
        return {K::character, static_cast<u8>(value), {}, nullptr};
    } else if constexpr (std::is_same_v<T, Error>) {
        return {K::text, 0, value.message, &value};
    } else if constexpr (std::is_integral_v<T>) {
        if constexpr (std::is_unsigned_v<T>) {
            return {K::unsigned_, value, {}, nullptr};
        } else {
            return {K::signed_, static_cast<u64>(static_cast<i64>(value)), {}, nullptr};
        }
    } else if constexpr (std::is_enum_v<T>) {
        if constexpr (requires {
                          { name(value) } -> std::convertible_to<std::string_view>;
                      }) {
            return {K::text, 0, name(value), nullptr};
        } else {
            return erase(to_underlying(value));
        }
    } else if constexpr (std::is_convertible_v<const T&, std::string_view>) {
        return {K::text, 0, std::string_view(value), nullptr};
    } else {
        static_assert(std::is_pointer_v<T>, "this type cannot be printed: give it a name() or pass a number or text");
        return {K::unsigned_, reinterpret_cast<u64>(value), {}, nullptr};
    }
}

// Called in a constant expression only if the format string is invalid, so that the compiler's message names it.
void format_string_is_wrong(const char*);

// Parses one field after its '{'; returns the position after '}'.
constexpr usize parse(std::string_view f, usize i, Spec& spec) {
    if (i < f.size() && f[i] == ':') {
        ++i;
        if (i + 1 < f.size() && (f[i + 1] == '<' || f[i + 1] == '>')) {
            spec.fill = f[i];
            spec.align = f[i + 1];
            i += 2;
        } else if (i < f.size() && (f[i] == '<' || f[i] == '>')) {
            spec.align = f[i++];
        }
        if (i < f.size() && f[i] == '#') {
            spec.prefix = true;
            ++i;
        }
        if (i < f.size() && f[i] == '0') {
            spec.fill = '0';
            ++i;
        }
        for (; i < f.size() && f[i] >= '0' && f[i] <= '9'; ++i) {
            spec.width = static_cast<u8>(spec.width * 10 + (f[i] - '0'));
        }
        if (i < f.size() && f[i] == 'x') {
            spec.hex = true;
            ++i;
        }
    }
    if (i >= f.size() || f[i] != '}') {
        format_string_is_wrong("expected {} or {:[fill<>][#][0][width][x]}");
    }
    return i + 1;
}

template <class... Args>
struct Format {
    std::string_view text;

    template <class S>
        requires std::convertible_to<const S&, std::string_view>
    consteval Format(const S& string) : text(string) {
        usize fields = 0;
        for (usize i = 0; i < text.size();) {
            if (text[i] == '{' && i + 1 < text.size() && text[i + 1] == '{') {
                i += 2;
            } else if (text[i] == '}' && i + 1 < text.size() && text[i + 1] == '}') {
                i += 2;
            } else if (text[i] == '{') {
                Spec spec;
                i = parse(text, i + 1, spec);
                ++fields;
            } else if (text[i] == '}') {
                format_string_is_wrong("a lone '}': write '}}'");
            } else {
                ++i;
            }
        }
        if (fields != sizeof...(Args)) {
            format_string_is_wrong("the number of fields is not the number of arguments");
        }
    }
};

using Write = void (*)(void* sink, std::string_view text);
void vprint(void* sink, Write write, std::string_view format, std::span<const Argument> arguments);

} // namespace text_detail

/// Writes `format` with its fields substituted to the sink.
template <TextSink S, class... Args>
void print(S& sink, text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format,
           const Args&... args) {
    const std::array<text_detail::Argument, sizeof...(Args)> erased{
        text_detail::erase<std::decay_t<const Args&>>(args)...};
    text_detail::vprint(
        &sink, [](void* s, std::string_view text) { static_cast<S*>(s)->write(text); }, format.text, erased);
}

/// The noun for a number. `several` is the plural, which must end in s; the s is dropped for 1.
constexpr std::string_view plural(u64 number, std::string_view several) {
    return several.substr(0, several.size() - (number == 1 ? 1 : 0));
}

/// A size for display: whole MiB (rounded down); below 1 MiB exact, in KiB or bytes. Print it as "{} {}".
struct ShownSize {
    u64 number;
    std::string_view unit;
};
constexpr ShownSize shown_size(u64 bytes) {
    if (bytes >= 1_MiB) {
        return {bytes >> 20, "MiB"};
    }
    return bytes != 0 && bytes % 1_KiB == 0 ? ShownSize{bytes >> 10, "KiB"} : ShownSize{bytes, plural(bytes, "bytes")};
}

/// A sink that counts bytes, for column widths.
struct CountingSink {
    usize size = 0;
    constexpr void write(std::string_view text) { size += text.size(); }
};

/// Writes text as the content of a JSON string: quotes, backslashes and control bytes escaped; bytes above 0x7e as
/// \u00XX.
template <TextSink S>
void print_json(S& sink, std::string_view text) {
    for (char c : text) {
        const u8 b = static_cast<u8>(c);
        if (b == '"' || b == '\\') {
            const char pair[2] = {'\\', c};
            sink.write({pair, 2});
        } else if (b < 0x20 || b > 0x7e) {
            print(sink, "\\u{:04x}", b);
        } else {
            sink.write({&c, 1});
        }
    }
}

/// Parses a decimal or 0x hexadecimal number that makes up the whole text; nothing on a syntax error or overflow.
constexpr std::optional<u64> parse_number(std::string_view text) {
    int base = 10;
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        text.remove_prefix(2);
        base = 16;
    }
    if (text.empty()) {
        return std::nullopt;
    }
    u64 value = 0;
    for (char c : text) {
        u64 digit = 16;
        if (c >= '0' && c <= '9') {
            digit = static_cast<u64>(c - '0');
        } else if (c >= 'a' && c <= 'f') {
            digit = static_cast<u64>(c - 'a' + 10);
        } else if (c >= 'A' && c <= 'F') {
            digit = static_cast<u64>(c - 'A' + 10);
        }
        if (digit >= static_cast<u64>(base) || value > (~u64{0} - digit) / static_cast<u64>(base)) {
            return std::nullopt;
        }
        value = value * static_cast<u64>(base) + digit;
    }
    return value;
}

} // namespace fl
