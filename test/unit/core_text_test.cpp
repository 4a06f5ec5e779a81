#include <gtest/gtest.h>
#include <string>
import core.std;
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
    EXPECT_EQ(formatted("{} {}", std::numeric_limits<i64>::min(), std::numeric_limits<u64>::max()), "-9223372036854775808 18446744073709551615");
    EXPECT_EQ(formatted("{}", 'x'), "x");
    EXPECT_EQ(formatted("{}", Code::timed_out), "timed out");
    EXPECT_EQ(formatted("{}", Error(Code::protocol, "producer index", 4, 40)), "producer index (expected 0x4, seen 0x28)");
    // Amounts are what a person typed and what there is room for: decimal, as they were typed.
    EXPECT_EQ(formatted("{}", Error(Code::bad_argument, "count: at most", 512, 2000)), "count: at most (expected 512, seen 2000)");
    EXPECT_EQ(formatted("{}", Error(Code::exhausted, "disks", 256, 257)), "disks (expected 256, seen 257)");
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
    EXPECT_EQ(
        capture.text,
        "@{\"record\":\"disk\",\"name\":\"a\\\"b\\u000a\",\"sectors\":8,\"read_only\":false,\"list\":[\"x\",\"y\"],\"empty\":{},\"last\":1}\n");
}
} // namespace
