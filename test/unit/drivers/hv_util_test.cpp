// The guest side of each integration service against bytes written from the specification [hv-ic].
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.time;
import core.wall_clock;
import drivers.hv_util.service;

namespace {
using namespace fl;
using namespace fl::drivers::hv_util;
using Action = Service::Action;

// Converts hexadecimal text to bytes.
std::vector<std::byte> hex(std::string_view text) {
    std::vector<std::byte> bytes;
    for (usize i = 0; i + 1 < text.size(); ++i) {
        if (text[i] != ' ') {
            bytes.push_back(static_cast<std::byte>(std::stoi(std::string(text.substr(i, 2)), nullptr, 16)));
            ++i;
        }
    }
    return bytes;
}
std::string text(std::span<const std::byte> bytes) {
    std::string out;
    for (std::byte b : bytes) {
        constexpr char digits[] = "0123456789abcdef";
        out += digits[static_cast<u8>(b) >> 4];
        out += digits[static_cast<u8>(b) & 15];
    }
    return out;
}

// pipe header | framework, type, version, size, status, transaction, flags, reserved | counts, reserved, versions
const std::string_view negotiate = "01000000 30000000 0100 0000 0000 0100 0000 1c00 00000000 07 03 0000"
                                   "0200 0300 00000000 01000000 03000000 01000000 03000000 04000000";

TEST(HvUtil, Negotiates) {
    Service service(Kind::heartbeat);
    auto message = hex(negotiate);
    auto action = service.answer(message);
    ASSERT_TRUE(action);
    EXPECT_EQ(*action, Action::none);
    EXPECT_EQ(text(message), text(hex("01000000 30000000 0100 0000 0000 0100 0000 1000 00000000 07 05 0000"
                                      "0100 0100 00000000 03000000 03000000 01000000 03000000 04000000")));
    EXPECT_EQ(service.message_version(), (Version{3, 0}));
    Service time(Kind::time_sync);
    message = hex(negotiate);
    ASSERT_TRUE(time.answer(message));
    EXPECT_EQ(time.message_version(), (Version{4, 0}));
    Service old(Kind::shutdown);
    message =
        hex("01000000 24000000 0100 0000 0000 0100 0000 1000 00000000 07 03 0000 0100 0100 00000000 09000000 03000000");
    ASSERT_TRUE(old.answer(message));
    EXPECT_FALSE(old.negotiated());
    EXPECT_EQ(text(std::span(message).subspan(28, 4)), "00000000") << "nothing fits: counts of zero";
}

TEST(HvUtil, Beats) {
    Service service(Kind::heartbeat);
    auto message = hex("01000000 3c000000 0300 0000 0100 0300 0000 2800 00000000 09 03 0000 ff00000000000000");
    message.resize(68);
    message[4] = std::byte{0x3c};
    ASSERT_TRUE(service.answer(message));
    EXPECT_EQ(text(std::span(message).subspan(28, 8)), "0001000000000000");
    EXPECT_EQ(static_cast<u8>(message[25]), 5) << "a transaction's response";
    EXPECT_EQ(service.heartbeats(), 1u);
}

TEST(HvUtil, ShutsDownAndRefusesWhatItCannot) {
    Service service(Kind::shutdown);
    auto message =
        hex("01000000 20000000 0300 0000 0300 0300 0000 0c00 ffffffff 01 03 0000 00000080 3c000000 01000000");
    auto action = service.answer(message);
    ASSERT_TRUE(action);
    EXPECT_EQ(*action, Action::shut_down);
    EXPECT_EQ(text(std::span(message).subspan(20, 4)), "00000000");
    Service::refuse(message);
    EXPECT_EQ(text(std::span(message).subspan(20, 4)), "05400080");
    // a restart
    message = hex("01000000 20000000 0300 0000 0300 0300 0000 0c00 00000000 01 03 0000 00000080 3c000000 02000000");
    action = service.answer(message);
    ASSERT_TRUE(action);
    EXPECT_EQ(*action, Action::none);
    EXPECT_EQ(text(std::span(message).subspan(20, 4)), "05400080");
}

TEST(HvUtil, TakesTheTime) {
    Service service(Kind::time_sync);
    // 1 Jan 1970 and one second.
    auto message = hex("01000000 2d000000 0300 0000 0400 0300 0000 1900 00000000 01 03 0000"
                       "8016d6d7b19d0100 0000000000000000 0000000000000000 01");
    const u64 host = unix_epoch + 10'000'000;
    std::memcpy(message.data() + 28, &host, 8);
    auto action = service.answer(message);
    ASSERT_TRUE(action);
    EXPECT_EQ(*action, Action::set_clock);
    EXPECT_EQ(service.host_time().unix_ns, 1'000'000'000u);
    message[28 + 24] = std::byte{0}; // a probe
    EXPECT_EQ(*service.answer(message), Action::none);
    std::memset(message.data() + 28, 0xff, 8); // out of range
    message[28 + 24] = std::byte{1};
    EXPECT_EQ(*service.answer(message), Action::none);
    EXPECT_EQ(text(std::span(message).subspan(20, 4)), "05400080");
}

TEST(HvUtil, TheTimeIsBroughtUpToDate) {
    const Service::HostTime read{1'000'000'000, 5'000};
    EXPECT_EQ(read.at(5'000), 1'000'000'000u);
    EXPECT_EQ(read.at(5'300), 1'000'030'000u) << "300 units of 100 ns in transit";
    EXPECT_EQ(read.at(std::nullopt), 1'000'000'000u);
    EXPECT_EQ(read.at(4'999), 1'000'000'000u) << "read in the future";
    EXPECT_EQ(read.at(5'000 + 600'000'001), 1'000'000'000u) << "a minute ago";
    EXPECT_EQ((Service::HostTime{7, std::nullopt}.at(5'000)), 7u);
}

TEST(HvUtil, OtherTypesAreNotSupported) {
    Service service(Kind::heartbeat);
    auto message = hex("01000000 14000000 0300 0000 0500 0300 0000 0000 00000000 01 03 0000");
    ASSERT_TRUE(service.answer(message));
    EXPECT_EQ(text(std::span(message).subspan(20, 4)), "32000780");
}

// Every truncation of every message: a reply or an error, without an access outside it (checked by the sanitizers).
TEST(HvUtil, ShortAndLyingMessages) {
    for (const Kind kind : {Kind::shutdown, Kind::heartbeat, Kind::time_sync}) {
        for (u16 type = 0; type < 8; ++type) {
            for (usize n = 0; n < 60; ++n) {
                auto whole = hex(negotiate);
                whole.resize(std::max<usize>(n, whole.size()));
                std::memcpy(whole.data() + 12, &type, 2);
                whole.resize(n);
                const u32 length = n < 8 ? 0 : static_cast<u32>(n - 8);
                if (n >= 8) {
                    std::memcpy(whole.data() + 4, &length, 4);
                }
                Service service(kind);
                static_cast<void>(service.answer(whole));
                if (n >= 32) {
                    std::memset(whole.data() + 28, 0xff, 4); // more versions than the message holds
                    static_cast<void>(service.answer(whole));
                }
            }
        }
    }
    Service service(Kind::heartbeat);
    auto message = hex(negotiate);
    message[4] = std::byte{0xff};
    EXPECT_FALSE(service.answer(message)) << "the pipe header promises more";
}

TEST(WallClock, CivilTime) {
    const auto is = [](u64 seconds, u32 y, u32 mo, u32 d, u32 h, u32 mi, u32 s) {
        const CivilTime t = civil_time(seconds * 1'000'000'000);
        EXPECT_TRUE(t.year == y && t.month == mo && t.day == d && t.hour == h && t.minute == mi && t.second == s)
            << seconds;
    };
    is(0, 1970, 1, 1, 0, 0, 0);
    is(951782399, 2000, 2, 28, 23, 59, 59);
    is(951782400, 2000, 2, 29, 0, 0, 0);
    is(1709251199, 2024, 2, 29, 23, 59, 59);
    is(4107542400, 2100, 3, 1, 0, 0, 0);
    is(1764000000, 2025, 11, 24, 16, 0, 0);
    set_wall_clock(1000, 5'000'000'000);
    EXPECT_EQ(wall_clock(3000), 5'000'002'000u);
}

} // namespace
