#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;

namespace {
using namespace fl;

template <class... A>
std::string formatted(text_detail::Format<std::type_identity_t<std::remove_cvref_t<A>>...> f, const A&... a) {
    FixedText<256> out;
    print(out, f, a...);
    return std::string(out.view());
}

TEST(Text, FillsFields) {
    EXPECT_EQ(formatted("{} of {}", 3, 7u), "3 of 7");
    EXPECT_EQ(formatted("{:#x} {:08x} {:x}", 0xbeefu, 0xcafeu, u8{10}), "0xbeef 0000cafe a");
    EXPECT_EQ(formatted("[{:>6}] [{:<6}] [{:06}]", 42, "ab", 42), "[    42] [ab    ] [000042]");
    EXPECT_EQ(formatted("{{{}}}", true), "{true}");
    EXPECT_EQ(formatted("{} {}", std::numeric_limits<i64>::min(), std::numeric_limits<u64>::max()),
              "-9223372036854775808 18446744073709551615");
    EXPECT_EQ(formatted("{}", 'x'), "x");
    EXPECT_EQ(formatted("{}", Code::timed_out), "timed out");
    EXPECT_EQ(formatted("{}", Error(Code::protocol, "producer index", 4, 40)),
              "producer index (expected 0x4, seen 0x28)");
    // Amounts are printed as a person types them: decimal.
    EXPECT_EQ(formatted("{}", Error(Code::bad_argument, "count: at most", 512, 2000)),
              "count: at most (expected 512, seen 2000)");
    EXPECT_EQ(formatted("{}", Error(Code::exhausted, "disks", 256, 257)), "disks (expected 256, seen 257)");
}

TEST(Text, ANounAgreesWithItsNumber) {
    EXPECT_EQ(plural(0, "disks"), "disks");
    EXPECT_EQ(plural(1, "disks"), "disk");
    EXPECT_EQ(plural(2, "I/Os"), "I/Os");
    EXPECT_EQ(plural(1, "I/Os"), "I/O");
    EXPECT_EQ(plural((u64{1} << 32) + 1, "lanes"), "lanes");
}

TEST(Text, ASizeThatIsThereIsNeverShownAsZero) {
    const auto shown = [](u64 bytes) {
        const ShownSize size = shown_size(bytes);
        return formatted("{} {}", size.number, size.unit);
    };
    EXPECT_EQ(shown(0), "0 bytes");
    EXPECT_EQ(shown(1), "1 byte");
    EXPECT_EQ(shown(512), "512 bytes");
    EXPECT_EQ(shown(1_KiB), "1 KiB");
    EXPECT_EQ(shown(3 * 512), "1536 bytes");
    EXPECT_EQ(shown(1_MiB - 1_KiB), "1023 KiB");
    EXPECT_EQ(shown(1_MiB), "1 MiB");
    EXPECT_EQ(shown(64_MiB + 512), "64 MiB");
    EXPECT_EQ(shown(2_GiB), "2048 MiB");
}

TEST(Text, FixedTextDropsWhatDoesNotFitAndSaysSo) {
    FixedText<4> t;
    t.write("abcdef");
    EXPECT_EQ(t.view(), "abcd");
    EXPECT_TRUE(t.truncated());
}

TEST(Text, Numbers) {
    EXPECT_EQ(parse_number("0x1F"), 31u);
    EXPECT_EQ(parse_number("18446744073709551615"), ~u64{0});
    EXPECT_EQ(parse_number("18446744073709551616"), std::nullopt);
    EXPECT_EQ(parse_number(""), std::nullopt);
    EXPECT_EQ(parse_number("12a"), std::nullopt);
    EXPECT_EQ(parse_number("0x"), std::nullopt);
}

struct Capture final : log::Sink {
    std::string text;
    void write(std::string_view t) override { text += t; }
};

TEST(Log, RecordIsOneJsonLine) {
    Capture capture;
    log::attach(capture);
    {
        log::Record r("disk");
        r.text("name", "a\"b\n").number("sectors", 8).flag("read_only", false);
        r.open("list", '[').text("", "x").text("", "y").close(']').open("empty", '{').close('}').number("last", 1);
    }
    log::detach(capture);
    EXPECT_EQ(capture.text, "@{\"record\":\"disk\",\"name\":\"a\\\"b\\u000a\",\"sectors\":8,\"read_only\":false,"
                            "\"list\":[\"x\",\"y\"],\"empty\":{},\"last\":1}\n");
}

// ---- lines buffered for consoles attached later ----

struct Keeping {
    Keeping() { log::keep_history(true); }
    ~Keeping() { log::keep_history(false); }
};

TEST(Log, ALateConsoleReceivesEarlierLines) {
    const Keeping keeping;
    log::info("first");
    {
        log::Record("boot").number("a", 1);
    }
    Capture one;
    log::attach(one);
    EXPECT_EQ(one.text, "first\n@{\"record\":\"boot\",\"a\":1}\n");
    log::attach(one);
    log::info("second");
    EXPECT_EQ(one.text, "first\n@{\"record\":\"boot\",\"a\":1}\nsecond\n") << "a sink attached twice gets it once";
    Capture two;
    log::attach(two);
    EXPECT_EQ(two.text, one.text);
    log::keep_history(false);
    Capture three;
    log::attach(three);
    EXPECT_EQ(three.text, "");
    log::detach(one);
    log::detach(two);
    log::detach(three);
}

TEST(Log, WhatIsKeptIsBoundedAndLosesTheOldestLinesWhole) {
    const Keeping keeping;
    std::string all;
    for (u32 i = 0; i < 1000; ++i) {
        FixedText<400> line;
        print(line, "{} ", i);
        for (u32 n = 0; n < i * 7 % 390; ++n) {
            line.write("x");
        }
        log::info("{}", line.view());
        all += std::string(line.view()) + "\n";
    }
    Capture late;
    log::attach(late);
    log::detach(late);
    const usize note_end = late.text.find('\n') + 1;
    const std::string kept = late.text.substr(note_end);
    EXPECT_EQ(late.text.substr(0, note_end),
              "[" + std::to_string(all.size() - kept.size()) + " bytes of older lines are lost]\n");
    EXPECT_LE(kept.size(), log::history_bytes);
    EXPECT_GT(kept.size(), log::history_bytes - 800);
    EXPECT_TRUE(all.ends_with("\n" + kept)) << "whole lines, the last ones";
}

TEST(Log, SinksGetWholeLines) {
    struct Pieces final : log::Sink {
        std::vector<std::string> pieces;
        u32 flushed = 0;
        void write(std::string_view t) override { pieces.emplace_back(t); }
        void flush() override { ++flushed; }
    } sink;
    log::attach(sink);
    log::info("{} and {}", "a", 1);
    log::Line{}.write("half");
    EXPECT_EQ(sink.pieces, std::vector<std::string>{"a and 1\n"});
    log::flush();
    EXPECT_EQ(sink.pieces.back(), "half");
    EXPECT_EQ(sink.flushed, 1u);
    log::detach(sink);
}

TEST(Log, LinesThatAReaderWouldCutAreContinued) {
    const auto folded = [](std::initializer_list<std::string_view> texts, usize longest) {
        std::string out;
        usize column = 0;
        for (const std::string_view text : texts) {
            log::folded(text, column, longest, [&](std::string_view part) { out += part; });
        }
        return out;
    };
    EXPECT_EQ(folded({"12345678\n", "123\n"}, 8), "12345678\n123\n") << "what just fits stays whole";
    EXPECT_EQ(folded({"123456789\n"}, 8), "12345678\n@+9\n");
    EXPECT_EQ(folded({"12345", "67890abcdef", "ghij\n1\n"}, 8), "12345678\n@+90abcd\n@+efghij\n1\n")
        << "in whatever pieces it comes";
    EXPECT_EQ(folded({"1234567890\n"}, 0), "1234567890\n");
    // A reader removes line breaks followed by a mark.
    std::string whole(5000, 'r');
    std::string text = folded({whole, "\n", "next\n"}, 190);
    for (usize at = text.find("\n@+"); at != std::string::npos; at = text.find("\n@+")) {
        text.erase(at, 3);
    }
    EXPECT_EQ(text, whole + "\nnext\n");
}

} // namespace
