// The log: lines for people and records for programs, sent to every attached sink. Allocates nothing. Lines and records
// of different processors are never interleaved: each holds the log from start to end. Not for interrupt handlers.
export module core.log;
import core.std;
import core.text;

export namespace fl::log {

enum class Level : u8 { error, warning, info, debug };

constexpr std::string_view name(Level level) {
    constexpr std::array<std::string_view, 4> names{"error", "warning", "info", "debug"};
    return names[to_underlying(level)];
}

struct Sinks;
/// A destination for log text (serial port, debug console, a test's buffer). Owned by the caller of attach(); must be
/// detached before it is destroyed. write() receives whole lines that end with "\n", except that very long lines arrive
/// in pieces.
class Sink {
  public:
    virtual void write(std::string_view text) = 0;
    /// Returns when the text has left the machine, or after a bounded time.
    virtual void flush() {}

  protected:
    ~Sink() = default;

  private:
    friend void attach(Sink&);
    friend void detach(Sink&);
    friend struct Sinks;
    Sink* next_ = nullptr;
};

/// Appends a sink; attaching one twice has no effect. The history, if kept, is written to it first.
void attach(Sink& sink);
/// Removes the sink; no effect if it is not attached.
void detach(Sink& sink);
/// True: keep the last history_bytes of the log, in whole lines, for sinks attached later. False: stop, and discard
/// them. Default: false.
void keep_history(bool on);
inline constexpr usize history_bytes = 16 * 1024;
/// Sends buffered text, even an incomplete line, and flushes every sink.
void flush();
/// Lines above this level are dropped. Default: info.
void set_level(Level level);
Level level();
/// Sets the source of the timestamp, in nanoseconds, at the start of each line; nullptr for none.
void set_clock(u64 (*now_ns)());

/// For a sink whose reader truncates lines longer than `longest` bytes (0: unlimited): passes `text` to send(text) in
/// parts, with a line break and the continuation mark wherever a line would become longer. A reader removes break and
/// mark to restore the line; records therefore survive (docs/INTERFACES.md). `column`: the sink's current column, kept
/// between calls.
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

/// Holds the log, so that this processor's output is not interleaved. May be nested. Do not suspend a coroutine
/// meanwhile.
class Hold {
  public:
    Hold();
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
};

/// The TextSink used by the functions below: writes to all sinks.
struct Line {
    void write(std::string_view text);
};

/// Writes the prefix of a line: "[   0.001234] " if there is a clock, then "error: " or "warning: ".
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
/// log for its lifetime.
class Record {
  public:
    explicit Record(std::string_view kind);
    ~Record();
    Record(const Record&) = delete;
    Record& operator=(const Record&) = delete;

    Record& text(std::string_view key, std::string_view value);
    Record& number(std::string_view key, u64 value);
    Record& flag(std::string_view key, bool value);
    /// Opens or closes a nested object or list; inside a list, keys are empty.
    Record& open(std::string_view key, char bracket); // bracket: '{' or '['
    Record& close(char bracket);                      // bracket: '}' or ']'

  private:
    void key(std::string_view name);
    Hold hold_;
    bool first_ = false; // the next field is the first of its object and needs no comma
};

} // namespace fl::log
