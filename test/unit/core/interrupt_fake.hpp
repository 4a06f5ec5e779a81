// An InterruptController for fake machines: records the attached handlers, which tests call. Messages are not
// supported. Include after the imports, of which core.interrupt must be one.
#pragma once
import test.gtest;
import host.std;

namespace fl::test {

class Interrupts final : public InterruptController {
  public:
    /// `vector`: the number that attach_vector() returns.
    explicit Interrupts(u8 vector = 0x40) : vector_(vector) {}

    Result<void> attach_line(InterruptLine line, InterruptHandler call, void* with, u32) override {
        lines.push_back({line, call, with});
        return {};
    }
    void detach_line(InterruptLine line, InterruptHandler call, void* with) override {
        std::erase_if(lines,
                      [&](const Line& l) { return l.line.gsi == line.gsi && l.handler == call && l.context == with; });
    }
    Result<InterruptVector> attach_vector(InterruptHandler call, void* with, bool end) override {
        if (full) {
            return Error{Code::exhausted, "no vector is free"};
        }
        handler = call;
        context = with;
        eoi = end;
        return InterruptVector{vector_, 0};
    }
    Result<InterruptVector> attach_message(u32, InterruptHandler, void*) override {
        return Error{Code::not_supported, "no messages here"};
    }
    Result<InterruptMessage> message_for(InterruptVector) const override {
        return Error{Code::not_supported, "no messages here"};
    }
    void detach_vector(InterruptVector) override { handler = nullptr; }

    /// Calls the handlers of a line.
    void raise(u32 gsi) {
        for (const Line& l : std::vector<Line>(lines)) { // handlers may detach
            if (l.line.gsi == gsi) {
                l.handler(l.context);
            }
        }
    }

    struct Line {
        InterruptLine line;
        InterruptHandler handler;
        void* context;
    };
    std::vector<Line> lines;
    // of the last attach_vector()
    InterruptHandler handler = nullptr; // nullptr: detached
    void* context = nullptr;
    bool eoi = false;
    bool full = false; // attach_vector() fails

  private:
    u8 vector_;
};

} // namespace fl::test
