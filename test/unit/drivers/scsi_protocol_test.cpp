// CDBs, data, status and sense of SCSI disks against bytes written from [SPC-4] and [SBC-3].
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import drivers.scsi.protocol;

namespace {
using namespace fl;
using namespace fl::drivers;

template <class T>
std::string raw(const T& value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string raw(const scsi::Cdb& cdb) {
    return std::string(reinterpret_cast<const char*>(cdb.bytes.data()), cdb.length);
}
template <usize N>
std::string bytes(const char (&text)[N]) {
    return std::string(text, N - 1);
}
std::vector<u8> octets(const std::string& text) { return {text.begin(), text.end()}; }

TEST(ScsiProtocol, CommandsGoldenBytes) {
    EXPECT_EQ(raw(scsi::test_unit_ready()), bytes("\0\0\0\0\0\0"));
    EXPECT_EQ(raw(scsi::inquiry(std::nullopt, 36)), bytes("\x12\0\0\0\x24\0"));
    EXPECT_EQ(raw(scsi::inquiry(u8{0xb0}, 0x1234)), bytes("\x12\x01\xb0\x12\x34\0"));
    EXPECT_EQ(raw(scsi::report_luns(0x01020304)), bytes("\xa0\0\0\0\0\0\x01\x02\x03\x04\0\0"));
    EXPECT_EQ(raw(scsi::read_capacity_10()), bytes("\x25\0\0\0\0\0\0\0\0\0"));
    EXPECT_EQ(raw(scsi::read_capacity_16(32)), bytes("\x9e\x10\0\0\0\0\0\0\0\0\0\0\0\x20\0\0"));
    EXPECT_EQ(raw(scsi::mode_sense_6(8, 192)), bytes("\x1a\x08\x08\0\xc0\0"));
    EXPECT_EQ(raw(scsi::synchronize_cache_10()), bytes("\x35\0\0\0\0\0\0\0\0\0"));
    EXPECT_EQ(raw(scsi::synchronize_cache_16()), bytes("\x91\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"));
    EXPECT_EQ(raw(scsi::unmap(24)), bytes("\x42\0\0\0\0\0\0\0\x18\0"));
    EXPECT_EQ(raw(scsi::read_write_16(true, 0x1122334455667788, 0x99)),
              bytes("\x8a\0\x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\x99\0\0"));
    std::array<u8, 24> list;
    scsi::unmap_list(list, 0x1122334455667788, 0x10203);
    EXPECT_EQ(raw(list), bytes("\0\x16\0\x10\0\0\0\0\x11\x22\x33\x44\x55\x66\x77\x88\0\x01\x02\x03\0\0\0\0"));
}

TEST(ScsiProtocol, Inquiry) {
    std::string text = bytes("\0\0\x05\x02\x1f\0\0\0Msft    Virtual Disk    1.0 ");
    auto inquiry = scsi::parse_inquiry(octets(text));
    ASSERT_TRUE(inquiry);
    EXPECT_TRUE(inquiry->disk());
    EXPECT_EQ(inquiry->vendor.view(), "Msft");
    EXPECT_EQ(inquiry->product.view(), "Virtual Disk");
    EXPECT_EQ(inquiry->revision.view(), "1.0");
    text[0] = 0x7f; // no unit at this LUN
    EXPECT_FALSE(scsi::parse_inquiry(octets(text))->disk());
    text[0] = 0x05; // CD-ROM
    EXPECT_FALSE(scsi::parse_inquiry(octets(text))->disk());
    text[0] = 0;
    text[9] = '\x1b'; // control characters are filtered
    EXPECT_EQ(scsi::parse_inquiry(octets(text))->vendor.view(), "M");
    EXPECT_TRUE(scsi::parse_inquiry(octets(text.substr(0, 5)))->vendor.empty());
    EXPECT_FALSE(scsi::parse_inquiry(octets(text.substr(0, 4))));
}

TEST(ScsiProtocol, Capacity) {
    auto c = scsi::parse_capacity_16(octets(bytes("\0\0\0\0\0\x01\xff\xff\0\0\x02\0\0\x03\x80\0")));
    ASSERT_TRUE(c);
    EXPECT_EQ(c->blocks, 0x20000u);
    EXPECT_EQ(c->block_bytes, 512u);
    EXPECT_EQ(c->physical_shift, 3u);
    EXPECT_TRUE(c->thin);
    EXPECT_FALSE(scsi::parse_capacity_16(octets(bytes("\xff\xff\xff\xff\xff\xff\xff\xff\0\0\x02\0"))));
    EXPECT_FALSE(scsi::parse_capacity_16(octets(bytes("\0\0\0\0\0\x01\xff\xff\0\0\x02\x01"))));
    EXPECT_FALSE(scsi::parse_capacity_16(octets(bytes("\0\0\0\0\0\x01\xff\xff\0\0\0"))));
    c = scsi::parse_capacity_10(octets(bytes("\0\0\x01\xff\0\0\x10\0")));
    ASSERT_TRUE(c);
    EXPECT_EQ(c->blocks, 0x200u);
    EXPECT_EQ(c->block_bytes, 4096u);
    EXPECT_FALSE(c->beyond_32_bits);
    EXPECT_TRUE(scsi::parse_capacity_10(octets(bytes("\xff\xff\xff\xff\0\0\x02\0")))->beyond_32_bits);
    EXPECT_FALSE(scsi::parse_capacity_10(octets(bytes("\0\0\x01\xff\0\0\x10"))));
}

TEST(ScsiProtocol, Luns) {
    std::string luns;
    const auto list = [&](const std::string& text) {
        luns.clear();
        return scsi::parse_luns(octets(text), [&](u32 lun) { luns += std::to_string(lun) + " "; });
    };
    EXPECT_TRUE(list(bytes("\0\0\0\x18\0\0\0\0"
                           "\0\0\0\0\0\0\0\0"
                           "\0\x05\0\0\0\0\0\0"
                           "\x40\x3f\0\0\0\0\0\0")));
    EXPECT_EQ(luns, "0 5 63 ");
    EXPECT_TRUE(list(bytes("\0\0\0\x10\0\0\0\0"
                           "\x41\x2c\0\0\0\0\0\0"     // flat space: 300
                           "\0\x01\0\x02\0\0\0\0"))); // a second level
    EXPECT_EQ(luns, "300 4294967295 ");
    EXPECT_TRUE(list(bytes("\0\0\0\x08\0\0\0\0"
                           "\xc1\x01\0\0\0\0\0\0"))); // a well-known unit
    EXPECT_EQ(luns, "");
    EXPECT_FALSE(list(bytes("\0\0\0\x18\0\0\0\0"
                            "\0\x01\0\0\0\0\0\0"))); // longer than the received data: the received length counts
    EXPECT_EQ(luns, "1 ");
    EXPECT_FALSE(list(bytes("\xff\xff\xff\xf8\0\0\0\0")));
    EXPECT_FALSE(list(bytes("\0\0\0")));
}

TEST(ScsiProtocol, CachingPage) {
    auto mode = scsi::parse_mode_6(octets(bytes("\x17\0\x80\0\x08\x12\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0")));
    ASSERT_TRUE(mode);
    EXPECT_TRUE(mode->write_protected);
    EXPECT_EQ(mode->write_cache, true);
    // a preceding block descriptor, PS set, truncated
    mode = scsi::parse_mode_6(octets(bytes("\x17\0\0\x08\0\0\0\0\0\0\0\0\x88\x12\0\0")));
    EXPECT_EQ(mode->write_cache, false);
    EXPECT_FALSE(mode->write_protected);
    EXPECT_EQ(scsi::parse_mode_6(octets(bytes("\x03\0\0\0")))->write_cache, std::nullopt);
    EXPECT_EQ(scsi::parse_mode_6(octets(bytes("\xff\0\0\xff")))->write_cache, std::nullopt);
    EXPECT_FALSE(scsi::parse_mode_6(octets(bytes("\x03\0\0"))));
}

TEST(ScsiProtocol, VitalProductData) {
    EXPECT_TRUE(scsi::lists_page(octets(bytes("\0\0\0\x03\0\xb0\xb2")), 0xb2));
    EXPECT_FALSE(scsi::lists_page(octets(bytes("\0\0\0\x01\0\xb0\xb2")), 0xb2));
    EXPECT_FALSE(scsi::lists_page(octets(bytes("\0\0\xff\xff\0")), 0xb2));
    auto limits =
        scsi::parse_block_limits(octets(bytes("\0\xb0\0\x3c\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\x01")));
    ASSERT_TRUE(limits);
    EXPECT_EQ(limits->max_transfer_blocks, 0x102u);
    EXPECT_EQ(limits->max_unmap_blocks, 0x1000u);
    EXPECT_EQ(limits->max_unmap_descriptors, 1u);
    EXPECT_EQ(limits->max_write_same_blocks, 0u) << "too short for it";
    std::string whole = bytes("\0\xb0\0\x3c") + std::string(32, '\0') + bytes("\x01\x02\x03\x04\x05\x06\x07\x08");
    EXPECT_EQ(scsi::parse_block_limits(octets(whole))->max_write_same_blocks, 0x0102030405060708u);
    whole.pop_back();
    EXPECT_EQ(scsi::parse_block_limits(octets(whole))->max_write_same_blocks, 0u);
    EXPECT_FALSE(scsi::parse_block_limits(octets(bytes("\0\xb2\0\x3c\0\0\0\0\0\0\x01\x02"))));
    EXPECT_TRUE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x04\0\x80\0\0")))->unmap);
    EXPECT_FALSE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x04\0\x80\0\0")))->write_same);
    EXPECT_FALSE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x04\0\x60\0\0")))->unmap);
    EXPECT_TRUE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x04\0\x40\0\0")))->write_same);
    EXPECT_FALSE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x04\0\xbf\0\0")))->write_same);
    EXPECT_FALSE(scsi::parse_provisioning(octets(bytes("\0\xb2\0\x01\0"))));
}

TEST(ScsiProtocol, Sense) {
    auto sense = scsi::parse_sense(octets(bytes("\xf0\0\x03\0\0\x12\x34\x0a\0\0\0\0\x11\x00\0\0\0\0")));
    ASSERT_TRUE(sense);
    EXPECT_EQ(scsi::describe(*sense, 1).view(), "MEDIUM ERROR, unrecovered read error (3/11/00) at LBA 4660");
    sense = scsi::parse_sense(octets(bytes("\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x2a\x09\0\0\0\0")));
    EXPECT_EQ(scsi::describe(*sense, std::nullopt).view(), "UNIT ATTENTION, capacity data has changed (6/2a/09)");
    EXPECT_EQ(scsi::describe(*sense, 77).view(), "UNIT ATTENTION, capacity data has changed (6/2a/09) at LBA 77");
    sense = scsi::parse_sense(octets(bytes("\x72\x05\x21\0\0\0\0\x0c\0\x0a\x80\0\0\0\0\x01\0\0\0\x02")));
    ASSERT_TRUE(sense);
    EXPECT_EQ(scsi::describe(*sense, std::nullopt).view(),
              "ILLEGAL REQUEST, LBA out of range (5/21/00) at LBA 4294967298");
    sense = scsi::parse_sense(octets(bytes("\x72\x04\x80\x7f\0\0\0\xff\0\xff")));
    EXPECT_EQ(scsi::describe(*sense, std::nullopt).view(), "HARDWARE ERROR (4/80/7f)");
    sense = scsi::parse_sense(octets(bytes("\x70\0\x02"))); // no room for more
    EXPECT_EQ(scsi::describe(*sense, std::nullopt).view(), "NOT READY, no additional information (2/00/00)");
    EXPECT_FALSE(scsi::parse_sense(octets(bytes("\x70\0"))));
    EXPECT_FALSE(scsi::parse_sense(octets(bytes("\0\0\0\0\0\0"))));
}

// All that the parsers make of `data`; "-": refused.
std::string parsed(std::span<const u8> data) {
    std::ostringstream all;
    const auto number = [&](const auto& value) { all << ' ' << u64{value}; };
    const auto refused = [&](bool ok) {
        all << (ok ? " " : " -");
        return !ok;
    };
    if (const auto sense = scsi::parse_sense(data); !refused(sense.has_value())) {
        number(sense->key), number(sense->asc), number(sense->ascq);
        all << (sense->information ? " at " + std::to_string(*sense->information) : "");
    }
    refused(static_cast<bool>(scsi::parse_luns(data, number)));
    if (const auto mode = scsi::parse_mode_6(data); !refused(static_cast<bool>(mode))) {
        number(mode->write_protected), number(mode->write_cache.has_value()), number(mode->write_cache.value_or(false));
    }
    if (const auto limits = scsi::parse_block_limits(data); !refused(static_cast<bool>(limits))) {
        number(limits->max_transfer_blocks), number(limits->max_unmap_blocks), number(limits->max_unmap_descriptors);
        number(limits->max_write_same_blocks);
    }
    if (const auto thin = scsi::parse_provisioning(data); !refused(static_cast<bool>(thin))) {
        number(thin->unmap), number(thin->write_same);
    }
    if (const auto inquiry = scsi::parse_inquiry(data); !refused(static_cast<bool>(inquiry))) {
        number(inquiry->qualifier), number(inquiry->device_type), number(inquiry->removable);
        all << inquiry->vendor.view() << '|' << inquiry->product.view() << '|' << inquiry->revision.view();
    }
    for (const auto& capacity : {scsi::parse_capacity_10(data), scsi::parse_capacity_16(data)}) {
        if (!refused(static_cast<bool>(capacity))) {
            number(capacity->blocks), number(capacity->block_bytes), number(capacity->physical_shift);
            number(capacity->thin), number(capacity->beyond_32_bits);
        }
    }
    number(scsi::lists_page(data, 0xb0));
    return all.str();
}

// Every truncation of a reply: what follows the received bytes in memory has no influence, and what is too short to be
// a reply is refused.
TEST(ScsiProtocol, ShortAnswers) {
    for (const std::string& whole :
         {bytes("\xf0\0\x03\0\0\x12\x34\xff\0\0\0\0\x11\x00\0\0\0\0\0\0"),
          bytes("\x72\x05\x21\0\0\0\0\xff\0\x0a\x80\0\0\0\0\x01\0\0\0\x02"),
          bytes("\0\0\0\x18\0\0\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0\0\0\0"), bytes("\xff\0\x80\0\x88\xff\x04\0\0\0\0\0"),
          bytes("\0\xb0\xff\xff\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\x01"),
          bytes("\0\xb0\xff\xff") + std::string(40, '\x11'), bytes("\0\xb2\xff\xff\0\xe0\0\0"),
          bytes("\0\0\xff\xff\0\xb0\xb2"), bytes("\0\0\x05\x02\xff\0\0\0Msft    Virtual Disk    1.0 "),
          bytes("\0\0\0\0\0\x01\xff\xff\0\0\x02\0\0\x03\x80\0\0\0\0\0")}) {
        for (usize n = 0; n <= whole.size(); ++n) {
            SCOPED_TRACE(testing::PrintToString(octets(whole)) + " cut to " + std::to_string(n));
            const std::vector<u8> cut = octets(whole.substr(0, n)); // its end is watched by the sanitizers
            const std::string expected = parsed(cut);
            for (const u8 filling : {u8{0x00}, u8{0x80}, u8{0xb0}, u8{0xff}}) {
                std::vector<u8> longer = cut;
                longer.resize(n + 300, filling);
                EXPECT_EQ(parsed(std::span<const u8>(longer).first(n)), expected) << "followed by " << u32{filling};
            }
            EXPECT_TRUE(n >= 3 || !scsi::parse_sense(cut));
            EXPECT_TRUE(n >= 8 || !scsi::parse_luns(cut, [](u32) { ADD_FAILURE() << "a LUN"; }));
            EXPECT_TRUE(n >= 4 || !scsi::parse_mode_6(cut));
            EXPECT_TRUE(n >= 12 || !scsi::parse_block_limits(cut));
            EXPECT_TRUE(n >= 6 || !scsi::parse_provisioning(cut));
            EXPECT_TRUE(n >= 5 || !scsi::parse_inquiry(cut));
            EXPECT_TRUE(n >= 8 || !scsi::parse_capacity_10(cut));
            EXPECT_TRUE(n >= 12 || !scsi::parse_capacity_16(cut));
            EXPECT_TRUE(n >= 5 || !scsi::lists_page(cut, 0xb0));
        }
    }
}

} // namespace
