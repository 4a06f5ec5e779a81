// The DHCP client against a server that a test writes: leases, refusals, conflicts, renewal, silence, hostile answers.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.executor;
import io.net;
import io.net.arp;
import io.net.dhcp;
import io.net.dhcp_client;
import io.net.drop;
import io.net.ethernet;
import io.net.interface;
import io.net.ipv4;
import io.net.udp;
import io.net.wire;
import io.random;
import io.task;
#include "unit/io/net/wire_fake.hpp"
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::io::net;
using fl::test::Bytes;
using fl::test::Card;
using fl::test::Wire;

constexpr Ipv4Address ip(u8 a, u8 b, u8 c, u8 d) { return {{a, b, c, d}}; }
constexpr Ipv4Address server_ip = ip(10, 0, 0, 1);

// What a server has received.
struct Asked {
    u8 type = 0;
    u32 xid = 0;
    u16 flags = 0;
    Ipv4Address source;
    Ipv4Address destination;
    Ipv4Address client;
    std::map<u8, Bytes> options;
    Instant at = 0;
};

// A server that answers when it receives, by a function of the test.
class Server final : public FrameReceiver {
  public:
    Server(Executor& executor, Wire& wire) : card(executor, wire, 200), executor_(executor) { card.set_receiver(this); }
    Card card;
    std::vector<Asked> asked;
    Ipv4Address gives = ip(10, 0, 0, 42);
    u32 lease = 3600;
    bool answers_arp = true;
    std::function<void(const Asked&)> on_message = [this](const Asked& a) { serve(a); };

    void serve(const Asked& a) {
        if (a.type == 1) {
            answer(a, 2);
        } else if (a.type == 3) {
            answer(a, 5);
        }
    }
    static Bytes number(u8 code, u32 value) {
        Bytes option{std::byte{code}, std::byte{4}};
        for (int shift : {24, 16, 8, 0}) {
            option.push_back(static_cast<std::byte>(value >> shift));
        }
        return option;
    }
    static Bytes join(std::initializer_list<Bytes> parts) {
        Bytes all;
        for (const Bytes& part : parts) {
            all.insert(all.end(), part.begin(), part.end());
        }
        return all;
    }
    Bytes usual(u8 type) const {
        return join({{std::byte{53}, std::byte{1}, std::byte{type}},
                     number(54, server_ip.number()),
                     number(1, 0xffffff00),
                     number(3, server_ip.number()),
                     number(6, ip(10, 0, 0, 3).number()),
                     number(51, lease),
                     {std::byte{255}}});
    }
    void answer(const Asked& a, u8 type) { answer(a, usual(type), a.xid); }
    void answer(const Asked& a, const Bytes& options, u32 xid, u16 from_port = 67) {
        DhcpHeader header;
        header.operation = 2;
        header.xid = xid;
        header.your = gives;
        header.mac = {{0x52, 0x54, 0, 0, 0, 1}};
        Bytes message(sizeof(DhcpHeader));
        put(std::span(message), header);
        message.insert(message.end(), options.begin(), options.end());
        const Ipv4Address to = a.client.none() ? ip(255, 255, 255, 255) : a.client;
        Bytes frame(14 + 20 + 8);
        put(std::span(frame), EthernetHeader{a.client.none() ? broadcast_mac : header.mac, card.identity().mac,
                                             to_underlying(EtherType::ipv4)});
        put(std::span(frame).subspan(14), make_ipv4(Protocol::udp, server_ip, to, 8 + message.size()));
        put(std::span(frame).subspan(34), make_udp(server_ip, from_port, to, 68, message, Checksum::unknown));
        frame.insert(frame.end(), message.begin(), message.end());
        EXPECT_EQ(card.send_now({frame}), SendStatus::sent);
    }
    void receive(NetDevice&, std::span<const std::byte> frame, Checksum) override {
        const auto ethernet = parse_ethernet(frame);
        if (ethernet->type == 0x0806) {
            const auto arp = parse_arp(frame.subspan(14));
            if (answers_arp && arp && arp->operation == 1 && arp->target == server_ip) {
                Bytes reply(42);
                put(std::span(reply), EthernetHeader{arp->sender_mac, card.identity().mac, u16{0x0806}});
                put(std::span(reply).subspan(14),
                    make_arp(ArpOperation::reply, card.identity().mac, server_ip, arp->sender_mac, arp->sender));
                EXPECT_EQ(card.send_now({reply}), SendStatus::sent);
            }
            return;
        }
        const auto packet = parse_ipv4(frame.subspan(14));
        if (ethernet->type != 0x0800 || !packet) {
            return; // damaged
        }
        const auto datagram = parse_udp(*packet, Checksum::unknown);
        if (!datagram) {
            return;
        }
        EXPECT_EQ(u16{datagram->header.source}, 68);
        EXPECT_EQ(u16{datagram->header.destination}, 67);
        ASSERT_GE(datagram->data.size(), 300u);
        const auto header = take<DhcpHeader>(datagram->data);
        Asked a{0,  header.xid,     header.flags, packet->header.source, packet->header.destination, header.client,
                {}, executor_.now()};
        for (auto rest = datagram->data.subspan(240); rest[0] != std::byte{255};
             rest = rest.subspan(2 + std::to_integer<usize>(rest[1]))) {
            const auto data = rest.subspan(2, std::to_integer<usize>(rest[1]));
            a.options[std::to_integer<u8>(rest[0])] = Bytes(data.begin(), data.end());
        }
        a.type = std::to_integer<u8>(a.options.at(53)[0]);
        asked.push_back(a);
        if (on_message) {
            on_message(asked.back());
        }
    }

  private:
    Executor& executor_;
};

struct NetDhcpClient : testing::Test {
    test::FakeMachine machine;
    Executor executor{machine.platform()};
    Wire wire{executor};
    test::CapturedLog log;
    Card card{executor, wire, 1};
    Server server{executor, wire};
    Interface interface{card, 11};
    std::unique_ptr<DhcpClient> client = std::make_unique<DhcpClient>(interface);
    usize frames_before = frame_pool().in_use();

    NetDhcpClient() { EXPECT_TRUE(executor.run(interface.open())); }
    ~NetDhcpClient() override { EXPECT_EQ(frame_pool().in_use(), frames_before); }
    Result<void> acquire(Nanoseconds bound = 30_s) { return executor.run(client->acquire(bound)); }
    u64 dropped(Drop why) { return interface.drops()[why]; }
    static Task<Result<void>> sleeping(Executor& e, Nanoseconds length) {
        co_await e.sleep(length);
        co_return Result<void>{};
    }
    void pass(Nanoseconds length) { EXPECT_TRUE(executor.run(sleeping(executor, length))); }
    std::vector<u8> types() {
        std::vector<u8> result;
        for (const Asked& a : server.asked) {
            result.push_back(a.type);
        }
        return result;
    }
};

TEST_F(NetDhcpClient, GetsAnAddress) {
    ASSERT_TRUE(acquire());
    ASSERT_TRUE(interface.config());
    EXPECT_EQ(interface.config()->subnet, (Subnet{ip(10, 0, 0, 42), 24}));
    EXPECT_EQ(interface.config()->gateway, server_ip);
    EXPECT_EQ(client->lease().dns, ip(10, 0, 0, 3));
    EXPECT_EQ(client->lease().lease, 3600u);
    EXPECT_EQ(types(), (std::vector<u8>{1, 3}));
    const Asked& request = server.asked[1];
    EXPECT_EQ(request.xid, server.asked[0].xid);
    EXPECT_EQ(request.source, ip(0, 0, 0, 0));
    EXPECT_EQ(request.destination, ip(255, 255, 255, 255));
    EXPECT_EQ(request.flags, 0x8000);
    EXPECT_EQ(request.options.at(50), (Bytes{std::byte{10}, std::byte{0}, std::byte{0}, std::byte{42}}));
    EXPECT_EQ(request.options.at(54), (Bytes{std::byte{10}, std::byte{0}, std::byte{0}, std::byte{1}}));
    EXPECT_TRUE(log.has("eth0: address 10.0.0.42/24 from the DHCP server 10.0.0.1, for 3600 s"));
    ASSERT_TRUE(acquire()) << "again";
    EXPECT_NE(server.asked[2].xid, server.asked[0].xid);
}

TEST_F(NetDhcpClient, SilenceIsBoundedAndBackedOffFrom) {
    server.on_message = nullptr;
    const Instant begun = executor.now();
    const auto result = acquire(100_s);
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::timed_out);
    EXPECT_GE(executor.now() - begun, 100_s);
    EXPECT_LT(executor.now() - begun, 100'100_ms);
    EXPECT_FALSE(interface.config());
    ASSERT_GE(server.asked.size(), 6u); // at 0, 1, 3, 7, 15, 31, 63 s, a quarter more or less
    ASSERT_LE(server.asked.size(), 8u);
    for (usize i = 1; i < server.asked.size(); ++i) {
        const Nanoseconds wait = server.asked[i].at - server.asked[i - 1].at;
        const Nanoseconds middle = DhcpClient::first_delay << (i - 1);
        EXPECT_GE(wait, middle - middle / 4) << i;
        EXPECT_LE(wait, middle + middle / 4 + 20_ms) << i;
        EXPECT_EQ(server.asked[i].xid, server.asked[0].xid);
    }
}

TEST_F(NetDhcpClient, LostMessagesAreSentAgain) {
    u32 count = 0;
    server.on_message = [&](const Asked& a) {
        if (++count % 2 == 0) {
            server.serve(a);
        }
    };
    ASSERT_TRUE(acquire());
    EXPECT_EQ(types(), (std::vector<u8>{1, 1, 3, 3}));
    server.asked.clear();
    server.on_message = [&](const Asked& a) { // it offers, and then forgets it
        if (a.type == 1 || std::ranges::count(types(), 1) > 1) {
            server.serve(a);
        }
    };
    ASSERT_TRUE(acquire(60_s));
    EXPECT_EQ(types(), (std::vector<u8>{1, 3, 3, 3, 3, 1, 3})) << "begins again";
    EXPECT_NE(server.asked[5].xid, server.asked[4].xid);
}

TEST_F(NetDhcpClient, ARefusalBeginsAgain) {
    server.on_message = [&](const Asked& a) {
        if (a.type == 3 && std::ranges::count(types(), 3) == 1) {
            server.answer(a, 6);
        } else {
            server.serve(a);
        }
    };
    ASSERT_TRUE(acquire());
    EXPECT_EQ(types(), (std::vector<u8>{1, 3, 1, 3}));
    EXPECT_EQ(client->counters().naks, 1u);
    server.on_message = [&](const Asked& a) { server.answer(a, a.type == 1 ? 2 : 6); };
    const Instant begun = executor.now();
    EXPECT_EQ(acquire(20_s).error().code, Code::timed_out) << "for ever: bounded";
    EXPECT_LT(executor.now() - begun, 20'100_ms);
    EXPECT_LE(client->counters().naks, 30u) << "and not in a hurry";
}

TEST_F(NetDhcpClient, AnAddressInUseIsDeclined) {
    Card squatter_card(executor, wire, 99);
    {
        Interface squatter(squatter_card, 5);
        ASSERT_TRUE(executor.run(squatter.open()));
        squatter.configure({{ip(10, 0, 0, 42), 24}, {}});
        server.on_message = [&](const Asked& a) {
            if (a.type == 4) {
                server.gives = ip(10, 0, 0, 43);
            }
            server.serve(a);
        };
        const Instant begun = executor.now();
        ASSERT_TRUE(acquire());
        EXPECT_GE(executor.now() - begun, DhcpClient::after_conflict);
        EXPECT_EQ(types(), (std::vector<u8>{1, 3, 4, 1, 3}));
        EXPECT_EQ(server.asked[2].options.at(50), (Bytes{std::byte{10}, std::byte{0}, std::byte{0}, std::byte{42}}));
        EXPECT_EQ(interface.address(), ip(10, 0, 0, 43));
        EXPECT_TRUE(log.has("10.0.0.42 is in use by another station"));
    }
    wire.unplug(squatter_card);
}

TEST_F(NetDhcpClient, HostileAnswersAreCountedAndDoNoHarm) {
    server.on_message = [&](const Asked& a) {
        if (a.type != 1 || !server.asked.empty()) {
            const u8 type = a.type == 1 ? 2 : 5;
            server.answer(a, server.usual(type), a.xid + 1);        // foreign
            server.answer(a, server.usual(type), a.xid, 6767);      // from another port
            server.answer(a, Server::number(51, 1), a.xid);         // no end
            server.answer(a, Bytes(1200), a.xid);                   // only padding
            server.answer(a, {std::byte{53}, std::byte{9}}, a.xid); // beyond the end
            server.answer(a, {std::byte{53}, std::byte{1}, std::byte{2}, std::byte{255}}, a.xid);
            server.answer(a, server.usual(type == 2 ? 5 : 2), a.xid); // the other answer
            const Ipv4Address gives = std::exchange(server.gives, ip(224, 0, 0, 1));
            server.answer(a, server.usual(type), a.xid);
            server.gives = ip(10, 0, 0, 77); // an ACK for another address
            if (type == 5) {
                server.answer(a, server.usual(type), a.xid);
            }
            server.gives = gives;
        }
        server.serve(a);
    };
    ASSERT_TRUE(acquire());
    EXPECT_EQ(interface.address(), ip(10, 0, 0, 42));
    EXPECT_EQ(types(), (std::vector<u8>{1, 3})) << "none made it ask again";
    EXPECT_EQ(dropped(Drop::dhcp_foreign), 4u);
    EXPECT_EQ(dropped(Drop::dhcp_malformed), 6u);
    EXPECT_EQ(dropped(Drop::dhcp_missing), 2u);
    EXPECT_EQ(dropped(Drop::dhcp_unexpected), 3u);
    EXPECT_EQ(dropped(Drop::dhcp_option), 2u);
}

TEST_F(NetDhcpClient, AnotherServersAnswerToARequestIsNotTaken) {
    server.on_message = [&](const Asked& a) {
        if (a.type == 3 && std::ranges::count(types(), 3) == 1) {
            Bytes options = server.usual(5);
            options[8] = std::byte{9}; // 10.0.0.9
            server.answer(a, options, a.xid);
        } else {
            server.serve(a);
        }
    };
    ASSERT_TRUE(acquire());
    EXPECT_EQ(types(), (std::vector<u8>{1, 3, 3}));
    EXPECT_EQ(dropped(Drop::dhcp_unexpected), 1u);
}

TEST_F(NetDhcpClient, ALeaseIsRenewedAtHalfOfItsTime) {
    ASSERT_TRUE(acquire());
    const Instant leased = executor.now();
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(client->keep()));
    server.asked.clear();
    pass(1790_s);
    EXPECT_TRUE(server.asked.empty());
    pass(20_s);
    ASSERT_EQ(types(), (std::vector<u8>{3}));
    const Asked& renewal = server.asked[0];
    EXPECT_GE(renewal.at, leased + 1798_s);
    EXPECT_EQ(renewal.source, ip(10, 0, 0, 42));
    EXPECT_EQ(renewal.destination, server_ip) << "its own server";
    EXPECT_EQ(renewal.client, ip(10, 0, 0, 42));
    EXPECT_EQ(renewal.flags, 0);
    EXPECT_FALSE(renewal.options.contains(50));
    EXPECT_FALSE(renewal.options.contains(54));
    pass(1780_s);
    EXPECT_EQ(server.asked.size(), 1u) << "the lease began anew";
    pass(40_s);
    EXPECT_EQ(server.asked.size(), 2u);
    EXPECT_EQ(interface.address(), ip(10, 0, 0, 42));
    EXPECT_EQ(group.running(), 1u);
}

TEST_F(NetDhcpClient, ASilentServerLosesItsClientToTheOthers) {
    ASSERT_TRUE(acquire());
    const Instant leased = executor.now();
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(client->keep()));
    server.asked.clear();
    server.on_message = nullptr;
    pass(3100_s);
    const usize renewals = server.asked.size(); // 1350 s: at 0, 675, 1012, 1181, 1265 …, no faster than every 60 s
    EXPECT_GE(renewals, 4u);
    EXPECT_LE(renewals, 8u);
    for (const Asked& a : server.asked) {
        EXPECT_EQ(a.destination, server_ip);
    }
    pass(leased + 3140_s - executor.now());
    server.asked.clear();
    pass(150_s);
    ASSERT_FALSE(server.asked.empty());
    EXPECT_EQ(server.asked[0].destination, ip(255, 255, 255, 255));
    EXPECT_EQ(server.asked[0].client, ip(10, 0, 0, 42));
    EXPECT_NEAR(static_cast<double>(server.asked[0].at - leased), 3150e9, 5e9);
    EXPECT_TRUE(interface.config());
    pass(400_s);
    EXPECT_FALSE(interface.config()) << "the lease has ended";
    EXPECT_TRUE(log.has("the lease of 10.0.0.42 has ended"));
    EXPECT_EQ(server.asked.back().type, 1);
    server.gives = ip(10, 0, 0, 44);
    server.on_message = [&](const Asked& a) { server.serve(a); };
    pass(100_s);
    EXPECT_EQ(interface.address(), ip(10, 0, 0, 44));
    EXPECT_EQ(group.running(), 1u);
}

TEST_F(NetDhcpClient, ARefusedRenewalGetsAnotherAddress) {
    ASSERT_TRUE(acquire());
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(client->keep()));
    server.asked.clear();
    server.on_message = [&](const Asked& a) {
        if (a.type == 3 && !a.client.none()) {
            server.answer(a, 6);
            server.gives = ip(10, 0, 0, 45);
        } else {
            server.serve(a);
        }
    };
    pass(1900_s);
    EXPECT_EQ(types(), (std::vector<u8>{3, 1, 3}));
    EXPECT_EQ(interface.address(), ip(10, 0, 0, 45));
    EXPECT_TRUE(log.has("the lease of 10.0.0.42 was refused"));
}

TEST_F(NetDhcpClient, AnEndlessLeaseIsNotRenewed) {
    server.lease = DhcpAnswer::forever;
    ASSERT_TRUE(acquire());
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(client->keep()));
    server.asked.clear();
    pass(100'000_s);
    EXPECT_TRUE(server.asked.empty());
    EXPECT_EQ(group.running(), 1u);
    card.close();
    pass(3'700_s);
    EXPECT_EQ(group.running(), 0u);
}

TEST_F(NetDhcpClient, AClosedDeviceEndsIt) {
    server.on_message = [&](const Asked&) { card.close(); };
    const Instant begun = executor.now();
    EXPECT_EQ(acquire(1000_s).error().code, Code::device_gone);
    EXPECT_LT(executor.now() - begun, 1_s);
    EXPECT_EQ(acquire(1000_s).error().code, Code::device_gone);
}

TEST_F(NetDhcpClient, ABadWireOnlyTakesLonger) {
    wire.behaviour = {.drop = 30, .duplicate = 20, .reorder = 20, .corrupt = 10, .delay = 10_ms};
    u32 got = 0;
    for (int i = 0; i < 20; ++i) {
        got += acquire(300_s) ? 1 : 0;
    }
    EXPECT_EQ(got, 20u);
}

} // namespace
