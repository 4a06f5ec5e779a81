// The log: lines for people and records for programs, to every sink that is attached. No allocation. A line or a record
// is never mixed with another processor's: each holds the log from its begin to its end. Not for interrupt handlers.
export module core.log;
import core.std;
import core.text;

export namespace fl::log {

enum class Level : u8 { error, warning, info, debug };

constexpr std::string_view name(Level level) {
    constexpr std::array<std::string_view, 4> names{"error", "warning", "info", "debug"};
    return names[to_underlying(level)];
}

/// A place that log text goes to (serial port, debug console, a test's buffer). Owned by whoever attaches it; must
/// outlive the log or be detached. write() gets whole lines, which end with "\n", but for very long ones, which come in
/// pieces.
struct Sinks;
class Sink {
  public:
    virtual void write(std::string_view text) = 0;
    /// Returns when the text has left the machine, or when a bound has passed.
    virtual void flush() {}

  protected:
    ~Sink() = default;

  private:
    friend void attach(Sink&);
    friend void detach(Sink&);
    friend struct Sinks;
    Sink* next_ = nullptr;
};

/// Adds the sink, at the end; a sink attached twice stays once. What has been kept comes first.
void attach(Sink& sink);
void detach(Sink& sink);
/// True: from now on the last kept_bytes of the log are kept, in whole lines, for sinks that are attached later. False:
/// no more, and what was kept is forgotten. Default: false.
void keep(bool on);
inline constexpr usize kept_bytes = 16 * 1024;
/// Sends what has been gathered of a line, whole or not, and flushes every sink.
void flush();
/// Lines above this level are dropped. Default: info.
void set_level(Level level);
Level level();
/// Gives the nanoseconds that stand before every line, nullptr for none.
void set_clock(u64 (*now_ns)());

/// For a sink whose reader cuts lines that are longer than `longest` (0: it does not): gives `text` to send(text) in
/// parts, with a line break and the mark of a continuation wherever a line would become longer. A reader puts the line
/// together again by leaving out break and mark; so a record survives (docs/INTERFACES.md). `column`: where the sink's
/// line stands, kept from call to call.
inline constexpr std::string_view continuation = "@+";
template <class Send>
constexpr void folded(std::string_view text, usize& column, usize longest, Send&& send) {
    while (!text.empty()) {
        const usize end = text.find('\n');
        const bool ends = end != std::string_view::npos;
        const usize size = ends ? end : text.size();
        if (longest == 0 || column + size <= longest) {
            send(text.substr(0, size + (ends ? 1 : 0)));
            text.remove_prefix(size + (ends ? 1 : 0));
            column = ends ? 0 : column + size;
            continue;
        }
        send(text.substr(0, longest - column));
        text.remove_prefix(longest - column);
        send("\n");
        send(continuation);
        column = continuation.size();
    }
}

/// Holds the log: what this processor writes meanwhile stays together. May be nested. Not across a suspension.
class Hold {
  public:
    Hold();
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
};

/// The TextSink behind the functions below: everything written goes to all sinks.
struct Line {
    void write(std::string_view text);
};

/// "[   0.001234] " before a line, when there is a clock; "error: " and "warning: " after it.
void begin(Level level);

template <class... Args>
void line(Level at, text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format,
          const Args&... args) {
    if (at > level()) {
        return;
    }
    const Hold hold;
    begin(at);
    Line out;
    print(out, format, args...);
    out.write("\n");
}

template <class... Args>
void error(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format, const Args&... args) {
    line(Level::error, format, args...);
}
template <class... Args>
void warning(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format, const Args&... args) {
    line(Level::warning, format, args...);
}
template <class... Args>
void info(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format, const Args&... args) {
    line(Level::info, format, args...);
}
template <class... Args>
void debug(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format, const Args&... args) {
    line(Level::debug, format, args...);
}

/// One record: a line "@{…}" (docs/INTERFACES.md). Fields are written in order; the destructor ends the line. Holds the
/// log meanwhile.
class Record {
  public:
    explicit Record(std::string_view kind);
    ~Record();
    Record(const Record&) = delete;
    Record& operator=(const Record&) = delete;

    Record& text(std::string_view key, std::string_view value);
    Record& number(std::string_view key, u64 value);
    Record& flag(std::string_view key, bool value);
    /// begin/end of a nested object or list; inside a list the keys are empty.
    Record& open(std::string_view key, char bracket); // '{' or '['
    Record& close(char bracket);                      // '}' or ']'

  private:
    void key(std::string_view name);
    Hold hold_;
    bool first_ = false; // the next field is the first of its object: no comma before it
};

} // namespace fl::log
