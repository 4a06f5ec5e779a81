// All that is logged during one input: messages are formatted, and can be counted. Include after the imports, of which
// core.log must be one.
#pragma once

namespace fuzz {
using namespace fl;

struct Log final : log::Sink {
    Log() { log::attach(*this); }
    ~Log() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    usize count(std::string_view what) const {
        usize n = 0;
        for (usize at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
            ++n;
        }
        return n;
    }
    std::string text;
};

} // namespace fuzz
