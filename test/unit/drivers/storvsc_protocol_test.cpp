// The storage channel's packets against bytes written from [storvsc].
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import drivers.storvsc.protocol;
import drivers.scsi.protocol;

namespace {
using namespace fl;
using namespace fl::drivers;
using storvsc::Operation;
using storvsc::Version;

template <class T>
std::string raw(const T& value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
template <usize N>
std::string bytes(const char (&text)[N]) {
    return std::string(text, N - 1);
}

TEST(StorvscProtocol, SrbPacketGoldenBytes) {
    storvsc::Packet packet{};
    packet.header = {Operation::execute_srb, 1, 0};
    packet.srb.length = 0x34;
    packet.srb.port_number = 9;
    packet.srb.path_id = 1;
    packet.srb.target_id = 2;
    packet.srb.lun = 3;
    packet.srb.cdb_length = 16;
    packet.srb.sense_info_length = 0x14;
    packet.srb.data_in = storvsc::Direction::in;
    packet.srb.data_transfer_length = 0x11223344;
    const scsi::Cdb cdb = scsi::read_write_16(false, 0x0102030405060708, 0x0a0b0c0d);
    std::copy(cdb.bytes.begin(), cdb.bytes.end(), packet.srb.payload.begin());
    packet.srb.queue_tag = 0x21;
    packet.srb.queue_action = 0x20;
    packet.srb.srb_flags = 0x4a;
    packet.srb.time_out_value = 60;
    packet.srb.queue_sort_key = 0x01020304;
    EXPECT_EQ(raw(packet), bytes("\x03\0\0\0\x01\0\0\0\0\0\0\0"
                                 "\x34\0\0\0\x09\x01\x02\x03\x10\x14\x01\0\x44\x33\x22\x11"
                                 "\x88\0\x01\x02\x03\x04\x05\x06\x07\x08\x0a\x0b\x0c\x0d\0\0\0\0\0\0"
                                 "\0\0\x21\x20\x4a\0\0\0\x3c\0\0\0\x04\x03\x02\x01"));
}

TEST(StorvscProtocol, OtherPayloads) {
    EXPECT_EQ(raw(storvsc::ProtocolVersion{Version::win10, 0}), bytes("\x02\x06\0\0"));
    EXPECT_EQ(raw(storvsc::ProtocolVersion{Version::win7, 0}), bytes("\x02\x04\0\0"));
    storvsc::ChannelProperties properties;
    std::memcpy(&properties, "\0\0\0\0\x03\0\0\0\x01\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0", 24);
    EXPECT_EQ(properties.max_sub_channels, 3);
    EXPECT_EQ(properties.flags, storvsc::properties_multi_channel);
    EXPECT_EQ(properties.max_transfer_bytes, 0x40000u);
}

TEST(StorvscProtocol, SizesByVersion) {
    EXPECT_EQ(storvsc::packet_bytes(Version::win6), 48u);
    EXPECT_EQ(storvsc::packet_bytes(Version::win7), 48u);
    EXPECT_EQ(storvsc::packet_bytes(Version::win8), 64u);
    EXPECT_EQ(storvsc::packet_bytes(Version::win10), 64u);
    EXPECT_EQ(storvsc::sense_bytes(Version::win7), 0x12);
    EXPECT_EQ(storvsc::sense_bytes(Version::win8), 0x14);
}

TEST(StorvscProtocol, IdePathOfAnInstance) {
    const auto at = [](const char* text) { return storvsc::ide_path(text); };
    ASSERT_TRUE(at("00000000-0000-8899-0000-000000000000"));
    EXPECT_EQ(at("00000000-0000-8899-0000-000000000000")->disk_number(), 0u);
    EXPECT_EQ(at("00000000-0001-8899-0000-000000000000")->disk_number(), 1u);
    EXPECT_EQ(at("00000001-0000-8899-0000-000000000000")->disk_number(), 2u);
    EXPECT_EQ(at("00000001-0001-8899-0000-000000000000")->disk_number(), 3u);
    EXPECT_FALSE(at("00000002-0000-8899-0000-000000000000"));
    EXPECT_FALSE(at("00000000-0002-8899-0000-000000000000"));
    EXPECT_FALSE(at("00000000"));
    EXPECT_FALSE(at("0000000000000-8899-0000-000000000000"));
    EXPECT_FALSE(at(""));
}

} // namespace
