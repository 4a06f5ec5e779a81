// Command lines: key=value words and common value formats. boot.options defines the keys.
export module core.cmdline;
import core.std;
import core.text;

export namespace fl {

constexpr bool is_blank(char c) {
    return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\v' || c == '\f' || c == '\0';
}

/// One word. Refers to the command line.
struct CmdlineWord {
    std::string_view text;  // the whole word
    std::string_view key;   // the part before the first '='; the whole word if there is none
    std::string_view value; // the part after the first '='
    bool has_value = false;
};

/// Iterates over the words from front to back. The text must outlive the words.
class CmdlineWords {
  public:
    constexpr explicit CmdlineWords(std::string_view text) : rest_(text) {}
    /// The next word, or nothing after the last one.
    constexpr std::optional<CmdlineWord> next() {
        while (!rest_.empty() && is_blank(rest_.front())) {
            rest_.remove_prefix(1);
        }
        if (rest_.empty()) {
            return std::nullopt;
        }
        usize size = 0;
        while (size < rest_.size() && !is_blank(rest_[size])) {
            ++size;
        }
        CmdlineWord word;
        word.text = rest_.substr(0, size);
        rest_.remove_prefix(size);
        const usize equals = word.text.find('=');
        word.has_value = equals != std::string_view::npos;
        word.key = word.text.substr(0, equals);
        word.value = word.has_value ? word.text.substr(equals + 1) : std::string_view{};
        return word;
    }

  private:
    std::string_view rest_;
};

/// Iterates over the parts of a value between separators. An empty text has no parts; "a,,b" has an empty one in the
/// middle.
class TextParts {
  public:
    constexpr explicit TextParts(std::string_view text, char separator = ',')
        : rest_(text), separator_(separator), more_(!text.empty()) {}
    constexpr std::optional<std::string_view> next() {
        if (!more_) {
            return std::nullopt;
        }
        const usize at = rest_.find(separator_);
        const std::string_view part = rest_.substr(0, at);
        more_ = at != std::string_view::npos;
        rest_ = more_ ? rest_.substr(at + 1) : std::string_view{};
        return part;
    }

  private:
    std::string_view rest_;
    char separator_;
    bool more_;
};

/// Parses a number, decimal or 0x hexadecimal, with an optional suffix k, m or g (powers of 1024, either case). Nothing
/// on a syntax error or overflow.
constexpr std::optional<u64> parse_size(std::string_view text) {
    int shift = 0;
    if (!text.empty()) {
        switch (text.back()) {
        case 'k':
        case 'K': shift = 10; break;
        case 'm':
        case 'M': shift = 20; break;
        case 'g':
        case 'G': shift = 30; break;
        default: break;
        }
    }
    if (shift != 0) {
        text.remove_suffix(1);
    }
    const auto number = parse_number(text);
    if (!number || *number > ~u64{0} >> shift) {
        return std::nullopt;
    }
    return *number << shift;
}

/// Sanitises untrusted text for a message: at most 32 bytes, non-printable ones replaced by '?'; truncated text ends
/// with "...".
constexpr FixedText<35> shown(std::string_view text) {
    FixedText<35> result;
    for (char c : text.substr(0, 32)) {
        const char safe = c >= 0x20 && c <= 0x7e ? c : '?';
        result.write({&safe, 1});
    }
    if (text.size() > 32) {
        result.write("...");
    }
    return result;
}

} // namespace fl
