#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.text;
import core.cmdline;
import core.suggest;

namespace {
using namespace fl;

std::vector<std::string> words(std::string_view text) {
    std::vector<std::string> result;
    CmdlineWords w(text);
    while (const auto word = w.next()) {
        result.push_back(std::string(word->key) + (word->has_value ? "=" + std::string(word->value) : ""));
        EXPECT_EQ(result.back(), word->text);
    }
    return result;
}

TEST(Cmdline, Words) {
    using V = std::vector<std::string>;
    EXPECT_EQ(words(""), V{});
    EXPECT_EQ(words(" \t\r\n "), V{});
    EXPECT_EQ(words("a=1  b\tc=\nd=x=y"), (V{"a=1", "b", "c=", "d=x=y"}));
    EXPECT_EQ(words(std::string_view("a=1\0b=2", 7)), (V{"a=1", "b=2"}));
    CmdlineWords w("=x");
    EXPECT_EQ(w.next()->key, "");
}

TEST(Cmdline, Parts) {
    std::vector<std::string> parts;
    TextParts p("a,,b,");
    while (const auto part = p.next()) {
        parts.emplace_back(*part);
    }
    EXPECT_EQ(parts, (std::vector<std::string>{"a", "", "b", ""}));
    EXPECT_FALSE(TextParts("").next());
}

TEST(Cmdline, Sizes) {
    EXPECT_EQ(parse_size("4k"), 4096u);
    EXPECT_EQ(parse_size("1M"), 1048576u);
    EXPECT_EQ(parse_size("2g"), 2147483648u);
    EXPECT_EQ(parse_size("512"), 512u);
    EXPECT_EQ(parse_size("0x10k"), 16384u);
    EXPECT_EQ(parse_size("17179869183g"), 17179869183u << 30);
    EXPECT_EQ(parse_size("17179869184g"), std::nullopt) << "2^64";
    for (std::string_view bad : {"", "k", "4kk", "4 k", "-1", "4t", "1.5k"}) {
        EXPECT_EQ(parse_size(bad), std::nullopt) << bad;
    }
}

TEST(Cmdline, WhatIsShownIsPrintableAndShort) {
    EXPECT_EQ(shown("a\x1b[31m\xff"), "a?[31m?");
    EXPECT_EQ(shown(std::string(100, 'x')), std::string(32, 'x') + "...");
}

TEST(Suggest, Distance) {
    EXPECT_EQ(edit_distance("", "", 3), 0u);
    EXPECT_EQ(edit_distance("workload", "wrokload", 3), 1u) << "two neighbours exchanged";
    EXPECT_EQ(edit_distance("disk", "disks", 3), 1u);
    EXPECT_EQ(edit_distance("disk", "dick", 3), 1u);
    EXPECT_EQ(edit_distance("kitten", "sitting", 3), 3u);
    EXPECT_EQ(edit_distance("kitten", "sitting", 2), 3u) << "limit + 1";
    EXPECT_EQ(edit_distance("a", "abcdefgh", 3), 4u);
    EXPECT_EQ(edit_distance("ca", "abc", 3), 3u) << "each place is edited once";
    EXPECT_EQ(edit_distance(std::string(100, 'x'), std::string(100, 'x'), 3), 4u) << "too long to be meant";
}

TEST(Suggest, OnlyWhatIsNear) {
    constexpr std::array<std::string_view, 4> valid{"job", "workload", "qd", "bs"};
    EXPECT_EQ(suggest("wrokload", valid), "workload");
    EXPECT_EQ(suggest("jbo", valid), "job");
    EXPECT_EQ(suggest("dq", valid), "qd");
    EXPECT_EQ(suggest("xy", valid), "");
    EXPECT_EQ(suggest("emulated", valid), "");
    EXPECT_EQ(suggest("", valid), "");
    EXPECT_EQ(suggest("x", {}), "");
}
} // namespace
