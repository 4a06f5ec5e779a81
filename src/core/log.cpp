module core.log;
import core.std;
import core.text;
import core.spinlock;

namespace fl::log {

namespace {
constinit Sink* first_sink = nullptr;
constinit Level current = Level::info;
constinit u64 (*clock_ns)() = nullptr;
constinit SpinLock lock; // of the sinks and of what they have gathered
constinit u32 depth = 0; // Holds of the processor that has the lock
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

void set_level(Level level) { current = level; }
Level level() { return current; }
void set_clock(u64 (*now_ns)()) { clock_ns = now_ns; }

void Line::write(std::string_view text) {
    if (text.empty()) {
        return;
    }
    for (Sink* sink = first_sink; sink != nullptr; sink = sink->next_) {
        sink->write(text);
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
