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

// The last lines, in a circular buffer that begins at kept_begin.
constinit std::array<char, kept_bytes> kept{};
constinit bool keeping = false;
constinit usize kept_begin = 0;
constinit usize kept_size = 0;
constinit u64 kept_lost = 0; // bytes of lines that were overwritten

std::array<std::string_view, 2> kept_text() {
    const usize first = std::min(kept_size, kept.size() - kept_begin);
    return {std::string_view(kept.data() + kept_begin, first), std::string_view(kept.data(), kept_size - first)};
}

// Frees at least `bytes` bytes by removing whole lines, oldest first.
void forget_lines(usize bytes) {
    usize gone = 0;
    for (usize seen = 0; gone < bytes && seen < kept_size; ++seen) {
        if (kept[(kept_begin + seen) % kept.size()] == '\n') {
            gone = seen + 1;
        }
    }
    gone = gone < bytes ? kept_size : gone;
    kept_begin = (kept_begin + gone) % kept.size();
    kept_size -= gone;
    kept_lost += gone;
}

void keep_text(std::string_view text) {
    if (kept_size + text.size() > kept.size()) {
        forget_lines(kept_size + text.size() - kept.size());
    }
    const usize at = (kept_begin + kept_size) % kept.size();
    const usize first = std::min(text.size(), kept.size() - at); // at most one line: shorter than the buffer
    std::copy_n(text.data(), first, kept.data() + at);
    std::copy_n(text.data() + first, text.size() - first, kept.data());
    kept_size += text.size();
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
    if (keeping) {
        keep_text(text);
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
    if (kept_lost != 0) {
        FixedText<80> note;
        print(note, "[{} bytes of older lines are lost]\n", kept_lost);
        sink.write(note);
    }
    for (const std::string_view part : kept_text()) {
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

void keep(bool on) {
    const Hold hold;
    keeping = on;
    kept_begin = kept_size = 0;
    kept_lost = 0;
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
