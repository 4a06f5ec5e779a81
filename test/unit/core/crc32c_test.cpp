#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.crc32c;

namespace {
using namespace fl;

std::span<const std::byte> bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

// The check value of the CRC catalogue and the vectors of RFC 3720, appendix B.4.
TEST(Crc32c, KnownValues) {
    EXPECT_EQ(crc32c({}), 0u);
    EXPECT_EQ(crc32c(bytes("123456789")), 0xe3069283u);
    EXPECT_EQ(crc32c(std::vector<std::byte>(32, std::byte{0})), 0x8a9136aau);
    EXPECT_EQ(crc32c(std::vector<std::byte>(32, std::byte{0xff})), 0x62a8ab43u);
    std::vector<std::byte> up(32);
    for (usize i = 0; i < 32; ++i) {
        up[i] = static_cast<std::byte>(i);
    }
    EXPECT_EQ(crc32c(up), 0x46dd794eu);
}

TEST(Crc32c, TableAndInstructionAgreeAtEveryLengthAndSplit) {
    std::vector<std::byte> data(300);
    u32 x = 1;
    for (auto& b : data) {
        x = x * 1664525 + 1013904223;
        b = static_cast<std::byte>(x >> 24);
    }
    const std::span<const std::byte> all(data);
    for (usize n = 0; n <= data.size(); ++n) {
        const u32 table = crc32c_by_table(all.first(n));
        if (crc32c_detail::has_instruction()) {
            ASSERT_EQ(crc32c_detail::by_instruction(all.first(n), 0), table);
        }
        ASSERT_EQ(crc32c(all.first(n)), table);
        ASSERT_EQ(crc32c(all.subspan(n), table), crc32c(all));
    }
}
} // namespace
