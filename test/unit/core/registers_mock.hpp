// A script of register accesses for tests: the expected accesses, their order and their values. An access that is not
// next in the script, has another width or value, or never occurs fails the test. Include after <gtest/gtest.h>,
// <deque>, <string>, <vector>.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.mmio;
import core.registers;

namespace register_test {
using namespace fl;

class AccessScript {
  public:
    ~AccessScript() {
        for (const std::string& failure : take_failures()) {
            ADD_FAILURE() << failure;
        }
    }
    /// Expects a read of `width` bytes, which returns `value`. `space` names the accessor if several share a script.
    AccessScript& expect_read(u64 at, u32 width, u64 value, const char* space = "") {
        expected_.push_back({false, at, width, value, space});
        return *this;
    }
    AccessScript& expect_write(u64 at, u32 width, u64 value, const char* space = "") {
        expected_.push_back({true, at, width, value, space});
        return *this;
    }
    u64 read(u64 at, u32 width, const char* space) {
        const Access seen{false, at, width, 0, space};
        if (expected_.empty() || !expected_.front().same_place(seen)) {
            unexpected(seen);
            return 0;
        }
        const u64 value = expected_.front().value;
        expected_.pop_front();
        return value;
    }
    void write(u64 at, u32 width, u64 value, const char* space) {
        const Access seen{true, at, width, value, space};
        if (expected_.empty() || !expected_.front().same_place(seen) || expected_.front().value != value) {
            unexpected(seen);
            return;
        }
        expected_.pop_front();
    }
    /// Returns and clears the failures, including accesses still missing. For tests of this class.
    std::vector<std::string> take_failures() {
        std::vector<std::string> all = std::move(failures_);
        failures_.clear();
        for (const Access& missing : expected_) {
            all.push_back("missing: " + missing.text());
        }
        expected_.clear();
        return all;
    }

  private:
    struct Access {
        bool is_write;
        u64 at;
        u32 width;
        u64 value;
        std::string space;
        bool same_place(const Access& other) const {
            return is_write == other.is_write && at == other.at && width == other.width && space == other.space;
        }
        std::string text() const {
            std::string s =
                space + (is_write ? " write" : " read") + std::to_string(8 * width) + " at " + std::to_string(at);
            return is_write ? s + " of " + std::to_string(value) : s;
        }
    };
    void unexpected(const Access& seen) {
        failures_.push_back("unexpected: " + seen.text() +
                            ", expected: " + (expected_.empty() ? "nothing" : expected_.front().text()));
    }
    std::deque<Access> expected_;
    std::vector<std::string> failures_;
};

/// RegisterAccess of every width.
class ScriptedAccess {
  public:
    explicit ScriptedAccess(AccessScript& script, const char* space = "") : script_(script), space_(space) {}
    template <class T>
    T read(u64 at) {
        return static_cast<T>(script_.read(at, sizeof(T), space_));
    }
    template <class T>
    void write(u64 at, T value) {
        script_.write(at, sizeof(T), value, space_);
    }

  private:
    AccessScript& script_;
    const char* space_;
};
static_assert(RegisterAccess<ScriptedAccess, u8> && RegisterAccess<ScriptedAccess, u64>);

/// The same for code that uses an Mmio.
class ScriptedMmio final : public MmioModel {
  public:
    explicit ScriptedMmio(AccessScript& script, const char* space = "") : script_(script), space_(space) {}
    u64 read(u64 at, u32 width) override { return script_.read(at, width, space_); }
    void write(u64 at, u32 width, u64 value) override { script_.write(at, width, value, space_); }

  private:
    AccessScript& script_;
    const char* space_;
};

} // namespace register_test
