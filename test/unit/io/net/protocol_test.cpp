// The packets of every protocol, byte by byte as the specifications have them, and what their parsers refuse.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.time;
import io.net;
import io.net.arp;
import io.net.datagram_queue;
import io.net.dhcp;
import io.net.drop;
import io.net.ethernet;
import io.net.icmp;
import io.net.ipv4;
import io.net.udp;
import io.net.wire;

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::io::net;
using Bytes = std::vector<std::byte>;

Bytes bytes(std::initializer_list<unsigned> list) {
    Bytes result;
    for (unsigned value : list) {
        result.push_back(static_cast<std::byte>(value));
    }
    return result;
}
template <class W>
Bytes written(const W& value) {
    Bytes result(sizeof(W));
    put(std::span(result), value);
    return result;
}
Bytes operator+(Bytes a, const Bytes& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

constexpr MacAddress mac{{0x52, 0x54, 0, 0x12, 0x34, 0x56}};
constexpr MacAddress other_mac{{0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee}};
constexpr Ipv4Address ip(u8 a, u8 b, u8 c, u8 d) { return {{a, b, c, d}}; }

TEST(NetWire, NumbersAreBigEndian) {
    EXPECT_EQ(written(Big16(0x0102)), bytes({1, 2}));
    EXPECT_EQ(written(Big32(0x01020304)), bytes({1, 2, 3, 4}));
    EXPECT_EQ(written(Big64(0x0102030405060708)), bytes({1, 2, 3, 4, 5, 6, 7, 8}));
    EXPECT_EQ(u16{take<Big16>(bytes({0xff, 0xfe, 9}))}, 0xfffe);
    EXPECT_EQ(u32{take<Big32>(bytes({0xff, 0xfe, 0xfd, 0xfc}))}, 0xfffefdfcu);
}

TEST(NetWire, TheSumIsThatOfRfc1071) {
    InternetSum sum; // §3, the example
    sum.add(bytes({0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}));
    EXPECT_EQ(sum.sum(), 0xddf2);
    EXPECT_EQ(sum.checksum(), 0x220d);
    for (usize cut : {2u, 4u, 6u}) { // the order of pieces does not matter
        const Bytes all = bytes({0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7});
        InternetSum pieces;
        pieces.add(std::span(all).subspan(cut));
        pieces.add(std::span(all).first(cut));
        EXPECT_EQ(pieces.sum(), 0xddf2);
    }
    InternetSum odd; // an odd byte is the higher one of a word
    odd.add(bytes({0x12, 0x34, 0x56}));
    EXPECT_EQ(odd.sum(), 0x6834);
    InternetSum carries;
    for (int i = 0; i < 1000; ++i) {
        carries.add(Bytes(8, std::byte{0xff}));
    }
    EXPECT_EQ(carries.sum(), 0xffff);
    carries.add(u16{1});
    EXPECT_EQ(carries.sum(), 1);
}

TEST(NetEthernet, Header) {
    EXPECT_EQ(written(EthernetHeader{broadcast_mac, mac, to_underlying(EtherType::arp)}),
              bytes({0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x08, 0x06}));
    EXPECT_EQ(parse_ethernet(Bytes(13)).why, Drop::ethernet_short);
    const auto parsed = parse_ethernet(bytes({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 8, 0}));
    ASSERT_TRUE(parsed);
    EXPECT_EQ(parsed->destination, (MacAddress{{1, 2, 3, 4, 5, 6}}));
    EXPECT_EQ(parsed->source, (MacAddress{{7, 8, 9, 10, 11, 12}}));
    EXPECT_EQ(u16{parsed->type}, 0x0800);
    EXPECT_EQ(text(mac).view(), "52:54:00:12:34:56");
}

TEST(NetArp, PacketOfRfc826) {
    const Bytes golden = bytes({0, 1, 8, 0, 6, 4, 0,  1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15, //
                                0, 0, 0, 0, 0, 0, 10, 0, 2,    2});
    EXPECT_EQ(written(make_arp(ArpOperation::request, mac, ip(10, 0, 2, 15), {}, ip(10, 0, 2, 2))), golden);
    const auto parsed = parse_arp(golden + Bytes(18)); // padded to 60 bytes
    ASSERT_TRUE(parsed);
    EXPECT_EQ(parsed->sender_mac, mac);
    EXPECT_EQ(parsed->sender, ip(10, 0, 2, 15));
    EXPECT_EQ(parsed->target, ip(10, 0, 2, 2));
    EXPECT_EQ(parse_arp(std::span(golden).first(27)).why, Drop::arp_malformed);
    for (const auto [at, value] : {std::pair{1, 6},
                                   {3, 1},
                                   {2, 9},
                                   {4, 5},
                                   {5, 16},
                                   {7, 0},
                                   {7, 3},
                                   {6, 1},
                                   {8, 0x53},
                                   {14, 127},
                                   {14, 224},
                                   {14, 0}}) {
        Bytes wrong = golden;
        wrong[static_cast<usize>(at)] = static_cast<std::byte>(value);
        EXPECT_EQ(parse_arp(wrong).why, Drop::arp_malformed) << at << " " << value;
    }
}

TEST(NetArp, TheTableIsBoundedAndAsksThreeTimes) {
    ArpTable table;
    Instant now = 1'000'000'000;
    const auto neighbour = [](u32 i) { return Ipv4Address::of(0x0a000001 + i); };
    EXPECT_FALSE(table.learn(neighbour(0), mac, now)) << "nobody has asked";
    for (u32 i = 0; i < ArpTable::capacity; ++i) {
        const auto answer = table.look_up(neighbour(i), now);
        EXPECT_EQ(answer.state, ArpTable::Answer::State::asked);
        EXPECT_TRUE(answer.ask);
        EXPECT_FALSE(table.look_up(neighbour(i), now).ask) << "once";
    }
    EXPECT_EQ(table.look_up(neighbour(40), now).state, ArpTable::Answer::State::full);
    EXPECT_TRUE(table.learn(neighbour(3), mac, now));
    EXPECT_TRUE(table.learn(neighbour(4), mac, now));
    EXPECT_EQ(table.look_up(neighbour(3), now + 5).mac, mac);
    EXPECT_EQ(table.look_up(neighbour(40), now + 6).state, ArpTable::Answer::State::asked) << "in place of 4";
    EXPECT_EQ(table.look_up(neighbour(3), now + 7).state, ArpTable::Answer::State::known);
    u32 asked = 0;
    std::vector<Ipv4Address> failed;
    const auto tick = [&] {
        table.tick(
            now,
            [&](Ipv4Address, const MacAddress& to) {
                ++asked;
                EXPECT_EQ(to, broadcast_mac);
            },
            [&](Ipv4Address address) { failed.push_back(address); });
    };
    now += ArpTable::interval - 1;
    tick();
    EXPECT_EQ(asked, 0u);
    now += 7;
    tick();
    EXPECT_EQ(asked, ArpTable::capacity - 1);
    tick();
    EXPECT_EQ(asked, ArpTable::capacity - 1) << "at most one a second";
    now += ArpTable::interval;
    tick();
    EXPECT_EQ(asked, 2 * (ArpTable::capacity - 1));
    EXPECT_TRUE(failed.empty());
    now += ArpTable::interval;
    tick();
    EXPECT_EQ(failed.size(), ArpTable::capacity - 1);
    EXPECT_FALSE(table.waits());
    EXPECT_EQ(table.look_up(neighbour(3), now).mac, mac);
}

TEST(NetArp, AnOldEntryIsAskedForAgainWhileItIsUsed) {
    ArpTable table;
    Instant now = 1;
    const Ipv4Address neighbour = ip(10, 0, 0, 1);
    table.look_up(neighbour, now);
    table.learn(neighbour, mac, now);
    EXPECT_FALSE(table.look_up(neighbour, now + ArpTable::lifetime - 1).ask);
    now += ArpTable::lifetime;
    auto answer = table.look_up(neighbour, now);
    EXPECT_EQ(answer.state, ArpTable::Answer::State::known);
    EXPECT_EQ(answer.mac, mac);
    EXPECT_TRUE(answer.ask);
    EXPECT_TRUE(table.waits());
    EXPECT_FALSE(table.look_up(neighbour, now).ask);
    MacAddress whom;
    u32 failures = 0;
    for (int i = 0; i < 3; ++i) {
        now += ArpTable::interval;
        table.tick(now, [&](Ipv4Address, const MacAddress& to) { whom = to; }, [&](Ipv4Address) { ++failures; });
        EXPECT_EQ(whom, mac) << "asks the station itself";
    }
    EXPECT_EQ(failures, 1u);
    EXPECT_EQ(table.look_up(neighbour, now).state, ArpTable::Answer::State::asked) << "forgotten";
    table.learn(neighbour, other_mac, now);
    now += ArpTable::lifetime;
    EXPECT_TRUE(table.look_up(neighbour, now).ask);
    table.learn(neighbour, other_mac, now);
    EXPECT_FALSE(table.look_up(neighbour, now + 1).ask);
}

// The example that is printed everywhere: 95 bytes of UDP from 192.168.0.1 to 192.168.0.199.
const Bytes ipv4_golden = bytes({0x45, 0,   0, 0x73, 0,   0,   0x40, 0,  0x40, 0x11, 0xb8, 0x61, //
                                 192,  168, 0, 1,    192, 168, 0,    199});

TEST(NetIpv4, HeaderOfRfc791) {
    EXPECT_EQ(written(make_ipv4(Protocol::udp, ip(192, 168, 0, 1), ip(192, 168, 0, 199), 95)), ipv4_golden);
    const auto parsed = parse_ipv4(ipv4_golden + Bytes(95) + Bytes(7)); // with padding
    ASSERT_TRUE(parsed);
    EXPECT_EQ(parsed->payload.size(), 95u);
    EXPECT_EQ(parsed->head.size(), 20u);
    EXPECT_EQ(parsed->header.source, ip(192, 168, 0, 1));
    EXPECT_EQ(parsed->header.destination, ip(192, 168, 0, 199));
}

// With a right checksum.
Bytes summed(Bytes packet) {
    packet[10] = packet[11] = std::byte{0};
    InternetSum sum;
    sum.add(std::span(packet).first(std::min<usize>(packet.size(), (std::to_integer<usize>(packet[0]) & 15) * 4) &
                                    ~usize{1}));
    packet[10] = static_cast<std::byte>(sum.checksum() >> 8);
    packet[11] = static_cast<std::byte>(sum.checksum() & 0xff);
    return packet;
}

TEST(NetIpv4, HeadersThatAreRefused) {
    const Bytes whole = ipv4_golden + Bytes(95);
    const auto with = [&](usize at, unsigned value) {
        Bytes packet = whole;
        packet[at] = static_cast<std::byte>(value);
        return summed(packet);
    };
    EXPECT_TRUE(parse_ipv4(with(8, 1)));
    EXPECT_EQ(parse_ipv4(std::span(whole).first(19)).why, Drop::ipv4_malformed);
    EXPECT_EQ(parse_ipv4(std::span(whole).first(114)).why, Drop::ipv4_malformed) << "cut off";
    EXPECT_EQ(parse_ipv4(with(0, 0x65)).why, Drop::ipv4_malformed) << "IPv6";
    EXPECT_EQ(parse_ipv4(with(0, 0x44)).why, Drop::ipv4_malformed) << "header too short";
    EXPECT_EQ(parse_ipv4(with(3, 19)).why, Drop::ipv4_malformed) << "shorter than its header";
    EXPECT_EQ(parse_ipv4(with(2, 0xff)).why, Drop::ipv4_malformed);
    EXPECT_EQ(parse_ipv4(with(6, 0x20)).why, Drop::ipv4_fragment) << "more fragments";
    EXPECT_EQ(parse_ipv4(with(7, 1)).why, Drop::ipv4_fragment) << "offset";
    EXPECT_TRUE(parse_ipv4(with(6, 0x80))) << "the reserved bit means nothing";
    Bytes wrong = whole;
    wrong[11] ^= std::byte{1};
    EXPECT_EQ(parse_ipv4(wrong).why, Drop::ipv4_checksum);
}

TEST(NetIpv4, OptionsAreSkipped) {
    Bytes packet = ipv4_golden;
    packet[0] = std::byte{0x46};
    packet[3] = std::byte{20 + 4 + 3};
    const Bytes whole = summed(packet + bytes({1, 1, 1, 0, 7, 8, 9}));
    const auto parsed = parse_ipv4(whole);
    ASSERT_TRUE(parsed);
    EXPECT_EQ(Bytes(parsed->payload.begin(), parsed->payload.end()), bytes({7, 8, 9}));
    EXPECT_EQ(parsed->head.size(), 24u);
}

TEST(NetIpv4, Addresses) {
    EXPECT_EQ(parse_address("10.0.2.15"), ip(10, 0, 2, 15));
    EXPECT_EQ(parse_address("255.255.255.255"), ip(255, 255, 255, 255));
    for (const char* wrong : {"", "10", "10.0.2", "10.0.2.", "10.0.2.15.", "10.0.2.15.1", "256.0.0.1", "1.2.3.0x4",
                              "01.2.3.4", "1.2.3.4 ", "a.b.c.d", "1..2.3", "1.2.3.-4", "1.2.3.4444"}) {
        EXPECT_FALSE(parse_address(wrong)) << wrong;
    }
    EXPECT_EQ(text(ip(10, 0, 255, 105)).view(), "10.0.255.105");
    EXPECT_EQ(text(ip(0, 9, 99, 100)).view(), "0.9.99.100");
    for (const auto& [address, host] : {std::pair{ip(0, 0, 0, 1), false},
                                        {ip(127, 0, 0, 1), false},
                                        {ip(224, 0, 0, 1), false},
                                        {ip(255, 255, 255, 255), false},
                                        {ip(10, 0, 0, 1), true},
                                        {ip(223, 255, 255, 254), true}}) {
        EXPECT_EQ(address.is_host(), host) << text(address).view();
    }
}

TEST(NetIpv4, Subnets) {
    const Subnet subnet{ip(10, 0, 2, 15), 24};
    EXPECT_TRUE(subnet.contains(ip(10, 0, 2, 254)));
    EXPECT_FALSE(subnet.contains(ip(10, 0, 3, 15)));
    EXPECT_EQ(subnet.broadcast(), ip(10, 0, 2, 255));
    EXPECT_TRUE(subnet.is_valid());
    EXPECT_FALSE((Subnet{ip(10, 0, 2, 0), 24}.is_valid())) << "the subnet itself";
    EXPECT_FALSE((Subnet{ip(10, 0, 2, 255), 24}.is_valid())) << "broadcast";
    EXPECT_FALSE((Subnet{ip(10, 0, 2, 1), 0}.is_valid()));
    EXPECT_FALSE((Subnet{ip(10, 0, 2, 1), 33}.is_valid()));
    EXPECT_TRUE((Subnet{ip(10, 0, 2, 0), 31}.is_valid())) << "RFC 3021";
    EXPECT_TRUE((Subnet{ip(10, 0, 2, 255), 32}.is_valid()));
    EXPECT_EQ((Subnet{ip(10, 0, 2, 0), 31}.broadcast()), ip(255, 255, 255, 255));
    EXPECT_TRUE((Subnet{ip(10, 0, 2, 7), 32}.contains(ip(10, 0, 2, 7))));
    EXPECT_FALSE((Subnet{ip(10, 0, 2, 7), 32}.contains(ip(10, 0, 2, 6))));
    EXPECT_TRUE((Subnet{ip(10, 0, 2, 7), 1}.contains(ip(127, 0, 0, 1))));
}

TEST(NetIcmp, EchoOfRfc792) {
    // type 8, code 0, identifier 0x1234, sequence 1, data "abc": 0800 + 1234 + 0001 + 6162 + 6300 = de97
    const Bytes data = bytes({'a', 'b', 'c'});
    const Bytes golden = bytes({8, 0, 0x21, 0x68, 0x12, 0x34, 0, 1});
    EXPECT_EQ(written(make_icmp(IcmpType::echo_request, 0, 0x1234, 1, data)), golden);
    const auto parsed = parse_icmp(golden + data);
    ASSERT_TRUE(parsed);
    EXPECT_EQ(u16{parsed->header.identifier}, 0x1234);
    EXPECT_EQ(u16{parsed->header.sequence}, 1);
    EXPECT_EQ(parsed->data.size(), 3u);
    EXPECT_EQ(parse_icmp(std::span(golden).first(7)).why, Drop::icmp_malformed);
    Bytes wrong = golden + data;
    wrong[8] ^= std::byte{4};
    EXPECT_EQ(parse_icmp(wrong).why, Drop::icmp_checksum);
}

TEST(NetIcmp, WhatAnErrorIsAbout) {
    const Bytes udp = bytes({0x12, 0x34, 0x56, 0x78, 0, 95, 0, 0});
    const auto lost = parse_lost(ipv4_golden + udp);
    ASSERT_TRUE(lost);
    EXPECT_EQ(lost->protocol, Protocol::udp);
    EXPECT_EQ(lost->source, ip(192, 168, 0, 1));
    EXPECT_EQ(lost->destination, ip(192, 168, 0, 199));
    EXPECT_EQ(lost->source_port, 0x1234);
    EXPECT_EQ(lost->destination_port, 0x5678);
    EXPECT_FALSE(parse_lost(ipv4_golden));
    EXPECT_FALSE(parse_lost(ipv4_golden + Bytes(7)));
    Bytes packet = ipv4_golden + bytes({8, 0, 0, 0, 0x12, 0x34, 0, 9});
    packet[9] = std::byte{1};
    EXPECT_EQ(parse_lost(packet)->protocol, Protocol::icmp);
    EXPECT_EQ(parse_lost(packet)->destination_port, 9);
    packet[20] = std::byte{0};
    EXPECT_FALSE(parse_lost(packet)) << "no error is sent about a reply";
    packet[9] = std::byte{6};
    EXPECT_FALSE(parse_lost(packet)) << "TCP";
    packet = ipv4_golden + udp;
    packet[0] = std::byte{0x4f};
    EXPECT_FALSE(parse_lost(packet)) << "options that are not there";
    packet[0] = std::byte{0x44};
    EXPECT_FALSE(parse_lost(packet));
}

Ipv4Packet packet_of(const Bytes& payload) {
    Ipv4Packet packet;
    packet.header.source = ip(10, 0, 0, 1);
    packet.header.destination = ip(10, 0, 0, 2);
    packet.payload = payload;
    return packet;
}

TEST(NetUdp, DatagramOfRfc768) {
    // pseudo header 0a00 0001 0a00 0002 0011 000a, header 04d2 0035 000a, data 6869: sum 8198
    const Bytes data = bytes({'h', 'i'});
    const Bytes golden = bytes({0x04, 0xd2, 0, 0x35, 0, 10, 0x7e, 0x67});
    EXPECT_EQ(written(make_udp(ip(10, 0, 0, 1), 1234, ip(10, 0, 0, 2), 53, data, Checksum::unknown)), golden);
    // partial: the sum of the pseudo header, not inverted
    EXPECT_EQ(written(make_udp(ip(10, 0, 0, 1), 1234, ip(10, 0, 0, 2), 53, data, Checksum::partial)),
              bytes({0x04, 0xd2, 0, 0x35, 0, 10, 0x14, 0x1e}));
    const Bytes whole = golden + data + bytes({0}); // with padding
    const auto parsed = parse_udp(packet_of(whole), Checksum::unknown);
    ASSERT_TRUE(parsed);
    EXPECT_EQ(u16{parsed->header.source}, 1234);
    EXPECT_EQ(u16{parsed->header.destination}, 53);
    EXPECT_EQ(parsed->data.size(), 2u);
}

TEST(NetUdp, ChecksumsAndLengths) {
    const Bytes golden = bytes({0x04, 0xd2, 0, 0x35, 0, 10, 0x7e, 0x67, 'h', 'i'});
    Bytes wrong = golden;
    wrong[9] = std::byte{'j'};
    EXPECT_EQ(parse_udp(packet_of(wrong), Checksum::unknown).why, Drop::udp_checksum);
    EXPECT_TRUE(parse_udp(packet_of(wrong), Checksum::verified)) << "the host has verified it";
    EXPECT_TRUE(parse_udp(packet_of(wrong), Checksum::partial)) << "it never left the host";
    wrong[6] = wrong[7] = std::byte{0};
    EXPECT_TRUE(parse_udp(packet_of(wrong), Checksum::unknown)) << "the sender has computed none";
    EXPECT_EQ(parse_udp(packet_of(bytes({1, 2, 3, 4, 0, 8, 0})), Checksum::unknown).why, Drop::udp_malformed);
    wrong[5] = std::byte{7};
    EXPECT_EQ(parse_udp(packet_of(wrong), Checksum::unknown).why, Drop::udp_malformed);
    wrong[5] = std::byte{11};
    EXPECT_EQ(parse_udp(packet_of(wrong), Checksum::unknown).why, Drop::udp_malformed);
    // a checksum of 0 is sent as 0xffff: 0 means that there is none
    for (unsigned i = 0; i < 0x10000; ++i) {
        const Bytes data = bytes({i >> 8, i & 0xff});
        const auto header = make_udp(ip(10, 0, 0, 1), 1234, ip(10, 0, 0, 2), 53, data, Checksum::unknown);
        ASSERT_NE(u16{header.checksum}, 0) << i;
        ASSERT_TRUE(parse_udp(packet_of(written(header) + data), Checksum::unknown)) << i;
    }
}

TEST(NetDatagramQueue, KeepsOrderAndSizes) {
    std::array<std::byte, 64> storage{};
    DatagramQueue queue{storage};
    std::deque<std::pair<u16, Bytes>> model;
    u32 refused = 0;
    u32 state = 12345;
    for (int i = 0; i < 20'000; ++i) {
        state = state * 1'664'525 + 1'013'904'223;
        if ((state >> 16) % 3 != 0) {
            Bytes data((state >> 20) % 40, static_cast<std::byte>(i));
            const bool room = queue.push({ip(1, 2, 3, 4), static_cast<u16>(i)}, data);
            usize used = 0;
            for (const auto& [port, each] : model) {
                used += each.size() + DatagramQueue::overhead;
            }
            ASSERT_EQ(room, used + data.size() + DatagramQueue::overhead <= storage.size());
            if (room) {
                model.emplace_back(static_cast<u16>(i), data);
            } else {
                ++refused;
            }
        } else if (!model.empty()) {
            Bytes into((state >> 24) % 50);
            const auto taken = queue.pop(into);
            ASSERT_EQ(taken.from.port, model.front().first);
            ASSERT_EQ(taken.from.address, ip(1, 2, 3, 4));
            ASSERT_EQ(taken.size, model.front().second.size());
            const usize both = std::min(into.size(), model.front().second.size());
            ASSERT_TRUE(std::equal(into.begin(), into.begin() + static_cast<long>(both), model.front().second.begin()));
            model.pop_front();
        }
        ASSERT_EQ(queue.empty(), model.empty());
    }
    EXPECT_GT(refused, 100u);
}

// ---- DHCP ----

constexpr u32 xid = 0x3903f326;

TEST(NetDhcp, DiscoverOfRfc2131) {
    const auto message = make_dhcp({.type = DhcpType::discover, .xid = xid, .seconds = 3, .mac = mac});
    Bytes golden = bytes({1, 1, 6, 0, 0x39, 0x03, 0xf3, 0x26, 0, 3, 0x80, 0}) + Bytes(16) +
                   bytes({0x52, 0x54, 0, 0x12, 0x34, 0x56}) + Bytes(10 + 64 + 128) +
                   bytes({99, 130, 83, 99, 53, 1, 1, 57, 2, 2, 64, 55, 6, 1, 3, 6, 51, 58, 59, 255});
    golden.resize(300);
    EXPECT_EQ(Bytes(message.begin(), message.end()), golden);
}

TEST(NetDhcp, RequestsOfRfc2131) {
    const auto options = [](const DhcpRequest& request) {
        const auto message = make_dhcp(request);
        return Bytes(message.begin() + 240, std::find(message.begin() + 240, message.end(), std::byte{255}));
    };
    const Bytes rest = bytes({57, 2, 2, 64, 55, 6, 1, 3, 6, 51, 58, 59});
    EXPECT_EQ(options({.type = DhcpType::request,
                       .xid = xid,
                       .mac = mac,
                       .requested = ip(10, 0, 2, 15),
                       .server = ip(10, 0, 2, 2)}),
              bytes({53, 1, 3, 50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2}) + rest);
    const DhcpRequest renewal{.type = DhcpType::request, .xid = xid, .mac = mac, .client = ip(10, 0, 2, 15)};
    EXPECT_EQ(options(renewal), bytes({53, 1, 3}) + rest);
    const auto message = make_dhcp(renewal);
    EXPECT_EQ(Bytes(message.begin() + 10, message.begin() + 16), bytes({0, 0, 10, 0, 2, 15})) << "not by broadcast";
    EXPECT_EQ(options({.type = DhcpType::decline,
                       .xid = xid,
                       .mac = mac,
                       .requested = ip(10, 0, 2, 15),
                       .server = ip(10, 0, 2, 2)}),
              bytes({53, 1, 4, 50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2}));
}

Bytes answer_with(const Bytes& options, const Bytes& server_name = Bytes(64), const Bytes& file = Bytes(128)) {
    return bytes({2, 1, 6, 0, 0x39, 0x03, 0xf3, 0x26, 0, 0, 0x80, 0}) + Bytes(4) + bytes({10, 0, 2, 15}) + Bytes(8) +
           bytes({0x52, 0x54, 0, 0x12, 0x34, 0x56}) + Bytes(10) + server_name + file + bytes({99, 130, 83, 99}) +
           options;
}
const Bytes offer = bytes({53, 1, 2});
const Bytes server = bytes({54, 4, 10, 0, 2, 2});
const Bytes mask = bytes({1, 4, 255, 255, 255, 0});
const Bytes lease = bytes({51, 4, 0, 1, 0x51, 0x80});
const Bytes routers = bytes({3, 8, 10, 0, 2, 2, 10, 0, 2, 3});
const Bytes end = bytes({255});

TEST(NetDhcp, AnOffer) {
    const auto parsed =
        parse_dhcp(answer_with(offer + server + mask + lease + routers +
                               bytes({6, 4, 10, 0, 2, 3, 0, 0, 15, 2, 'a', 'b'}) + end + bytes({1, 99})),
                   xid, mac);
    ASSERT_TRUE(parsed) << name(parsed.why);
    EXPECT_EQ(parsed->type, DhcpType::offer);
    EXPECT_EQ(parsed->subnet, (Subnet{ip(10, 0, 2, 15), 24}));
    EXPECT_EQ(parsed->gateway, ip(10, 0, 2, 2));
    EXPECT_EQ(parsed->dns, ip(10, 0, 2, 3));
    EXPECT_EQ(parsed->server, ip(10, 0, 2, 2));
    EXPECT_EQ(parsed->lease, 86400u);
    EXPECT_EQ(parsed->renewal, 43200u) << "a half";
    EXPECT_EQ(parsed->rebinding, 75600u) << "seven eighths";
}

TEST(NetDhcp, TimesInAnImpossibleOrderAreReplaced) {
    const auto with = [&](const Bytes& times) {
        return *parse_dhcp(answer_with(offer + server + mask + times + end), xid, mac);
    };
    const auto sane = with(bytes({51, 4, 0, 0, 0, 100, 58, 4, 0, 0, 0, 10, 59, 4, 0, 0, 0, 20}));
    EXPECT_EQ(sane.renewal, 10u);
    EXPECT_EQ(sane.rebinding, 20u);
    const auto late = with(bytes({51, 4, 0, 0, 0, 100, 58, 4, 0, 0, 0, 101, 59, 4, 0, 0, 0, 200}));
    EXPECT_EQ(late.renewal, 50u);
    EXPECT_EQ(late.rebinding, 88u);
    const auto tiny = with(bytes({51, 4, 0, 0, 0, 1}));
    EXPECT_EQ(tiny.renewal, 1u);
    EXPECT_EQ(tiny.rebinding, 1u);
    const auto endless = with(bytes({51, 4, 255, 255, 255, 255}));
    EXPECT_EQ(endless.lease, DhcpAnswer::forever);
}

TEST(NetDhcp, HostileAnswersAreRefused) {
    const auto why = [](const Bytes& message) { return parse_dhcp(message, xid, mac).why; };
    const Bytes rest = server + mask + lease;
    const Bytes good = answer_with(offer + rest + end);
    EXPECT_EQ(why(good), Drop::none);
    for (usize size : {0u, 1u, 235u, 239u, 240u}) {
        EXPECT_EQ(why(Bytes(good.begin(), good.begin() + static_cast<long>(size))), Drop::dhcp_malformed) << size;
    }
    const auto changed = [&](usize at, unsigned value) {
        Bytes message = good;
        message[at] = static_cast<std::byte>(value);
        return why(message);
    };
    EXPECT_EQ(changed(0, 1), Drop::dhcp_malformed) << "a request";
    EXPECT_EQ(changed(1, 6), Drop::dhcp_malformed);
    EXPECT_EQ(changed(2, 7), Drop::dhcp_malformed);
    EXPECT_EQ(changed(236, 98), Drop::dhcp_malformed) << "magic";
    EXPECT_EQ(changed(7, 0), Drop::dhcp_foreign) << "xid";
    EXPECT_EQ(changed(28, 0), Drop::dhcp_foreign) << "MAC";
    EXPECT_EQ(changed(16, 0), Drop::dhcp_option) << "address 0/8";
    EXPECT_EQ(changed(16, 127), Drop::dhcp_option);
    EXPECT_EQ(changed(16, 224), Drop::dhcp_option);
    EXPECT_EQ(changed(19, 0), Drop::dhcp_option) << "the subnet";
    EXPECT_EQ(changed(19, 255), Drop::dhcp_option) << "broadcast";
    const auto options = [&](const Bytes& list) { return why(answer_with(list)); };
    EXPECT_EQ(options(offer + rest), Drop::dhcp_malformed) << "no end";
    EXPECT_EQ(options(offer + rest + bytes({12})), Drop::dhcp_malformed) << "no length";
    EXPECT_EQ(options(offer + rest + bytes({12, 1})), Drop::dhcp_malformed) << "runs past the end";
    EXPECT_EQ(options(offer + rest + bytes({12, 255, 255})), Drop::dhcp_malformed);
    EXPECT_EQ(options(end), Drop::dhcp_missing);
    EXPECT_EQ(options(rest + end), Drop::dhcp_missing) << "no type";
    EXPECT_EQ(options(offer + mask + lease + end), Drop::dhcp_missing) << "no server";
    EXPECT_EQ(options(offer + server + lease + end), Drop::dhcp_missing) << "no mask";
    EXPECT_EQ(options(offer + server + mask + end), Drop::dhcp_missing) << "no lease";
    EXPECT_EQ(options(offer + server + mask + bytes({51, 4, 0, 0, 0, 0}) + end), Drop::dhcp_missing) << "0 s";
    EXPECT_EQ(options(bytes({53, 1, 5}) + mask + lease + end), Drop::dhcp_missing);
    EXPECT_EQ(options(bytes({53, 1, 6}) + end), Drop::dhcp_missing) << "a NAK names its server";
    EXPECT_EQ(options(bytes({53, 1, 6}) + server + end), Drop::none);
    for (unsigned type : {1u, 3u, 4u, 7u, 8u, 9u, 255u}) {
        EXPECT_EQ(options(bytes({53, 1, type}) + rest + end), Drop::dhcp_unexpected) << type;
    }
    EXPECT_EQ(options(bytes({53, 0}) + rest + end), Drop::dhcp_option);
    EXPECT_EQ(options(bytes({53, 2, 2, 2}) + rest + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + offer + end), Drop::dhcp_option) << "twice";
    EXPECT_EQ(options(offer + rest + bytes({1, 4, 255, 255, 0, 0}) + end), Drop::dhcp_option) << "twice";
    EXPECT_EQ(options(offer + server + lease + bytes({1, 3, 255, 255, 255}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + server + lease + bytes({1, 8, 255, 255, 255, 0, 255, 255, 255, 0}) + end),
              Drop::dhcp_option);
    EXPECT_EQ(options(offer + server + lease + bytes({1, 4, 255, 0, 255, 0}) + end), Drop::dhcp_option) << "a gap";
    EXPECT_EQ(options(offer + mask + lease + bytes({54, 4, 255, 255, 255, 255}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + bytes({3, 0}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + bytes({3, 5, 10, 0, 2, 2, 1}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + bytes({3, 4, 10, 0, 2, 15}) + end), Drop::dhcp_option) << "this station";
    EXPECT_EQ(options(offer + rest + bytes({3, 4, 224, 0, 0, 1}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + bytes({6, 4, 127, 0, 0, 1}) + end), Drop::dhcp_option);
    EXPECT_EQ(options(offer + rest + bytes({52, 1, 4}) + end), Drop::dhcp_option);
}

TEST(NetDhcp, OptionsInTheFieldsForNames) {
    Bytes file = lease + end;
    file.resize(128);
    Bytes names = mask + end;
    names.resize(64);
    const auto parsed = parse_dhcp(answer_with(offer + server + bytes({52, 1, 3}) + end, names, file), xid, mac);
    ASSERT_TRUE(parsed) << name(parsed.why);
    EXPECT_EQ(parsed->lease, 86400u);
    EXPECT_EQ(parsed->subnet.prefix, 24);
    EXPECT_EQ(parse_dhcp(answer_with(offer + server + bytes({52, 1, 1}) + end, names, file), xid, mac).why,
              Drop::dhcp_missing);
    Bytes overlong = bytes({12, 126});
    overlong.resize(128);
    EXPECT_EQ(parse_dhcp(answer_with(offer + server + bytes({52, 1, 1}) + end, names, overlong), xid, mac).why,
              Drop::dhcp_malformed)
        << "no end, and nothing beyond the field is read";
    EXPECT_EQ(parse_dhcp(answer_with(offer + server + mask + bytes({52, 1, 2}) + end, names, file), xid, mac).why,
              Drop::dhcp_option)
        << "twice";
}

TEST(NetDrop, EachReasonHasItsOwnName) {
    std::set<std::string_view> names(drop_names.begin(), drop_names.end());
    EXPECT_EQ(names.size(), drop_reasons);
    EXPECT_EQ(name(Drop::none), "none");
    EXPECT_EQ(name(Drop::ethernet_source), "ethernet_source");
    EXPECT_EQ(name(Drop::ipv4_fragment), "ipv4_fragment");
    EXPECT_EQ(name(Drop::udp_full), "udp_full");
    EXPECT_EQ(name(Drop::dhcp_unexpected), "dhcp_unexpected");
}

} // namespace
