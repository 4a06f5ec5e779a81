module;
#include "core/thread_annotations.hpp"
module core.log;
import core.std;
import core.text;
import core.spinlock;

namespace fl::log {

namespace {
constinit Sink* first_sink = nullptr;
constinit Level current = Level::info;
constinit u64 (*clock_ns)() = nullptr;
constinit SpinLock lock; // protects the sinks and their buffered text
constinit u32 depth = 0; // nesting depth of Hold on the processor that has the lock

// The current line. It is passed to sinks as a whole: their devices are slow, and a line consists of many pieces.
constinit std::array<char, 256> gathered{};
constinit usize gathered_size = 0;

// The last lines, in a circular buffer that begins at history_begin.
constinit std::array<char, history_bytes> history{};
constinit bool history_kept = false;
constinit usize history_begin = 0;
constinit usize history_size = 0;
constinit u64 history_lost = 0; // bytes of lines that were overwritten

std::array<std::string_view, 2> history_text() {
    const usize first = std::min(history_size, history.size() - history_begin);
    return {std::string_view(history.data() + history_begin, first),
            std::string_view(history.data(), history_size - first)};
}

// Frees at least `bytes` bytes by removing whole lines, oldest first.
void drop_oldest_lines(usize bytes) {
    usize dropped = 0;
    for (usize seen = 0; dropped < bytes && seen < history_size; ++seen) {
        if (history[(history_begin + seen) % history.size()] == '\n') {
            dropped = seen + 1;
        }
    }
    dropped = dropped < bytes ? history_size : dropped;
    history_begin = (history_begin + dropped) % history.size();
    history_size -= dropped;
    history_lost += dropped;
}

void add_to_history(std::string_view text) {
    if (history_size + text.size() > history.size()) {
        drop_oldest_lines(history_size + text.size() - history.size());
    }
    const usize at = (history_begin + history_size) % history.size();
    const usize first = std::min(text.size(), history.size() - at); // at most one line: shorter than the buffer
    std::copy_n(text.data(), first, history.data() + at);
    std::copy_n(text.data() + first, text.size() - first, history.data());
    history_size += text.size();
}
} // namespace

struct Sinks {
    static void write(std::string_view text) {
        for (Sink* sink = first_sink; sink != nullptr; sink = sink->next_) {
            sink->write(text);
        }
    }
    static void flush() {
        for (Sink* sink = first_sink; sink != nullptr; sink = sink->next_) {
            sink->flush();
        }
    }
};

namespace {
void send_line() {
    const std::string_view text(gathered.data(), std::exchange(gathered_size, 0));
    if (text.empty()) {
        return;
    }
    if (history_kept) {
        add_to_history(text);
    }
    Sinks::write(text);
}
} // namespace

Hold::Hold() {
    if (!lock.held_here()) {
        lock.lock();
    }
    ++depth;
}
Hold::~Hold() {
    if (--depth == 0) {
        lock.unlock();
    }
}

void attach(Sink& sink) {
    const Hold hold;
    Sink** at = &first_sink;
    for (; *at != nullptr; at = &(*at)->next_) {
        if (*at == &sink) {
            return;
        }
    }
    send_line();
    if (history_lost != 0) {
        FixedText<80> note;
        print(note, "[{} bytes of older lines are lost]\n", history_lost);
        sink.write(note);
    }
    for (const std::string_view part : history_text()) {
        if (!part.empty()) {
            sink.write(part);
        }
    }
    sink.next_ = nullptr;
    *at = &sink;
}

void detach(Sink& sink) {
    const Hold hold;
    for (Sink** at = &first_sink; *at != nullptr; at = &(*at)->next_) {
        if (*at == &sink) {
            *at = sink.next_;
            return;
        }
    }
}

void keep_history(bool on) {
    const Hold hold;
    history_kept = on;
    history_begin = history_size = 0;
    history_lost = 0;
}

void flush() {
    const Hold hold;
    send_line();
    Sinks::flush();
}

void set_level(Level level) { current = level; }
Level level() { return current; }
void set_clock(u64 (*now_ns)()) { clock_ns = now_ns; }

void Line::write(std::string_view text) {
    if (text.size() < gathered.size() - gathered_size && !text.ends_with('\n')) [[likely]] { // most pieces
        std::copy_n(text.data(), text.size(), gathered.data() + gathered_size);
        gathered_size += text.size();
        return;
    }
    while (!text.empty()) {
        const usize n = std::min(text.size(), gathered.size() - gathered_size);
        std::copy_n(text.data(), n, gathered.data() + gathered_size);
        gathered_size += n;
        text.remove_prefix(n);
        if (gathered_size == gathered.size() || gathered[gathered_size - 1] == '\n') {
            send_line();
        }
    }
}

void begin(Level level) {
    Line out;
    if (clock_ns != nullptr) {
        const u64 us = clock_ns() / 1000;
        print(out, "[{:>4}.{:06}] ", us / 1'000'000, us % 1'000'000);
    }
    if (level == Level::error || level == Level::warning) {
        print(out, "{}: ", level);
    }
}

Record::Record(std::string_view kind) {
    Line out;
    print(out, "@{{\"record\":\"{}\"", kind);
}

Record::~Record() { Line{}.write("}\n"); }

void Record::key(std::string_view name) {
    Line out;
    if (!first_) {
        out.write(",");
    }
    first_ = false;
    if (!name.empty()) {
        print(out, "\"{}\":", name);
    }
}

Record& Record::text(std::string_view k, std::string_view value) {
    key(k);
    Line out;
    out.write("\"");
    print_json(out, value);
    out.write("\"");
    return *this;
}

Record& Record::number(std::string_view k, u64 value) {
    key(k);
    Line out;
    print(out, "{}", value);
    return *this;
}

Record& Record::flag(std::string_view k, bool value) {
    key(k);
    Line{}.write(value ? "true" : "false");
    return *this;
}

Record& Record::open(std::string_view k, char bracket) {
    key(k);
    Line{}.write({&bracket, 1});
    first_ = true;
    return *this;
}

Record& Record::close(char bracket) {
    Line{}.write({&bracket, 1});
    first_ = false;
    return *this;
}

} // namespace fl::log
