// Two interfaces on a fake wire: ARP, pings, sockets, errors, faults of the wire, and the bound of every wait.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.log;
import core.processor;
import core.result;
import core.text;
import core.time;
import io.block;
import io.executor;
import io.net;
import io.net.arp;
import io.net.drop;
import io.net.ethernet;
import io.net.icmp;
import io.net.interface;
import io.net.ipv4;
import io.net.lanes;
import io.net.udp;
import io.net.wire;
import io.random;
import io.run_on;
import io.task;
#include "unit/io/net/wire_fake.hpp"
#include "unit/io/processors.hpp"
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::io::net;
using fl::test::Bytes;
using fl::test::Card;
using fl::test::Wire;

constexpr Ipv4Address ip(u8 a, u8 b, u8 c, u8 d) { return {{a, b, c, d}}; }
constexpr Ipv4Address left_ip = ip(10, 0, 0, 1);
constexpr Ipv4Address right_ip = ip(10, 0, 0, 2);
constexpr Ipv4Address router_ip = ip(10, 0, 0, 254);

struct Node {
    Card card;
    Interface interface;
    std::array<std::byte, 4096> queue{};
    UdpSocket socket{interface, queue};
    Node(Executor& executor, Wire& wire, u8 number) : card(executor, wire, number), interface(card, number) {}
};

struct NetInterface : testing::Test {
    test::FakeMachine machine;
    Executor executor{machine.platform()};
    Wire wire{executor};
    test::CapturedLog log;
    Node left{executor, wire, 1};
    Node right{executor, wire, 2};
    usize frames_before = frame_pool().in_use();

    NetInterface() {
        for (Node* node : {&left, &right}) {
            EXPECT_TRUE(executor.run(node->interface.open()));
        }
        left.interface.configure({{left_ip, 24}, router_ip});
        right.interface.configure({{right_ip, 24}, router_ip});
        EXPECT_TRUE(left.socket.bind(1000));
        EXPECT_TRUE(right.socket.bind(2000));
        pass(20_ms);
        wire.sent.clear();
    }
    ~NetInterface() override { EXPECT_EQ(frame_pool().in_use(), frames_before); }

    static Task<Result<void>> sleeping(Executor& e, Nanoseconds length) {
        co_await e.sleep(length);
        co_return Result<void>{};
    }
    void pass(Nanoseconds length) { EXPECT_TRUE(executor.run(sleeping(executor, length))); }
    static Task<Result<void>> sending(UdpSocket& socket, Endpoint to, std::span<const std::byte> data,
                                      Nanoseconds bound) {
        co_return co_await socket.send_to(to, data, bound);
    }
    Result<void> send(Node& from, Endpoint to, const Bytes& data, Nanoseconds bound = 5_s) {
        return executor.run(sending(from.socket, to, data, bound));
    }
    struct Received {
        Endpoint from;
        u32 size = 0;
        Bytes data;
    };
    static Task<Result<UdpSocket::Datagram>> receiving(UdpSocket& socket, std::span<std::byte> buffer,
                                                       Nanoseconds bound) {
        co_return co_await socket.receive(buffer, bound);
    }
    Result<Received> receive(Node& at, usize buffer = 2000, Nanoseconds bound = 1_s) {
        Bytes data(buffer);
        const auto datagram = executor.run(receiving(at.socket, data, bound));
        if (!datagram) {
            return datagram.error();
        }
        data.resize(std::min<usize>(data.size(), datagram->size));
        return Received{datagram->from, datagram->size, data};
    }
    u64 dropped(const Node& node, Drop why) { return node.interface.drops()[why]; }
    // Of the frames sent since the last call.
    u32 arp_requests() {
        u32 count = 0;
        for (const Bytes& frame : std::exchange(wire.sent, {})) {
            count += frame.size() == 42 && frame[13] == std::byte{6} && frame[21] == std::byte{1} ? 1 : 0;
        }
        return count;
    }
    Bytes frame_of(const MacAddress& to, const MacAddress& from, EtherType type, const Bytes& payload) {
        Bytes frame(14);
        put(std::span(frame), EthernetHeader{to, from, to_underlying(type)});
        frame.insert(frame.end(), payload.begin(), payload.end());
        return frame;
    }
    static Bytes ipv4(Protocol protocol, Ipv4Address from, Ipv4Address to, const Bytes& payload) {
        Bytes packet(20);
        put(std::span(packet), make_ipv4(protocol, from, to, payload.size()));
        packet.insert(packet.end(), payload.begin(), payload.end());
        return packet;
    }
    static Bytes udp(Endpoint from, Endpoint to, const Bytes& data) {
        Bytes payload(8);
        put(std::span(payload), make_udp(from.address, from.port, to.address, to.port, data, Checksum::unknown));
        payload.insert(payload.end(), data.begin(), data.end());
        return ipv4(Protocol::udp, from.address, to.address, payload);
    }
};

constexpr MacAddress left_mac{{0x52, 0x54, 0, 0, 0, 1}};
constexpr MacAddress right_mac{{0x52, 0x54, 0, 0, 0, 2}};
constexpr MacAddress third_mac{{0x52, 0x54, 0, 0, 0, 3}};
const Endpoint to_right{right_ip, 2000};

TEST_F(NetInterface, DatagramsArriveWithTheirSource) {
    ASSERT_TRUE(send(left, to_right, Bytes(5, std::byte{7})));
    auto got = receive(right);
    ASSERT_TRUE(got) << got.error().message;
    EXPECT_EQ(got->from, (Endpoint{left_ip, 1000}));
    EXPECT_EQ(got->data, Bytes(5, std::byte{7}));
    ASSERT_TRUE(send(right, got->from, Bytes(1472, std::byte{9}))) << "the longest one";
    got = receive(left);
    ASSERT_TRUE(got);
    EXPECT_EQ(got->size, 1472u);
    ASSERT_TRUE(send(left, to_right, {}));
    EXPECT_EQ(receive(right)->size, 0u);
    EXPECT_EQ(left.interface.counters().sent, 2u);
    EXPECT_EQ(right.interface.counters().received, 2u);
    EXPECT_EQ(left.socket.counters().sent, 2u);
    EXPECT_EQ(right.socket.counters().received, 2u);
    const auto longer = send(left, to_right, Bytes(1473));
    ASSERT_FALSE(longer);
    EXPECT_EQ(longer.error().code, Code::bad_argument);
    EXPECT_EQ(longer.error().seen, 1501u);
}

TEST_F(NetInterface, TheFramesAreThoseOfTheSpecifications) {
    ASSERT_TRUE(send(left, to_right, Bytes(2, std::byte{0x41})));
    pass(20_ms);
    ASSERT_EQ(wire.sent.size(), 3u) << "request, reply, datagram";
    const auto golden = [](std::initializer_list<unsigned> list) {
        Bytes bytes;
        for (unsigned b : list) {
            bytes.push_back(static_cast<std::byte>(b));
        }
        return bytes;
    };
    EXPECT_EQ(wire.sent[0],
              golden({255, 255,  255,  255, 255, 255, 0x52, 0x54, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0,  6, 4, 0,
                      1,   0x52, 0x54, 0,   0,   0,   1,    10,   0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2}));
    EXPECT_EQ(wire.sent[1], golden({0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0,    2,    8, 6, 0, 1, 8,  0, 6, 4, 0, 2,
                                    0x52, 0x54, 0, 0, 0, 2, 10,   0,    0, 2, 0x52, 0x54, 0, 0, 0, 1, 10, 0, 0, 1}));
    // header 4500 001e 0000 4000 4011 0a00 0001 0a00 0002: sum d932; datagram 03e8 07d0 000a 4141, pseudo header 141e
    EXPECT_EQ(wire.sent[2], golden({0x52, 0x54, 0,    0, 0, 2,    0x52, 0x54, 0,    0,    0,    1,    8,    0,   0x45,
                                    0,    0,    0x1e, 0, 0, 0x40, 0,    0x40, 0x11, 0x26, 0xcd, 10,   0,    0,   1,
                                    10,   0,    0,    2, 3, 0xe8, 7,    0xd0, 0,    10,   0x9e, 0xde, 0x41, 0x41}));
}

TEST_F(NetInterface, PartialChecksumsForDevicesThatCompleteThem) {
    left.card.offload(true);
    ASSERT_TRUE(send(left, to_right, Bytes(2, std::byte{0x41})));
    ASSERT_TRUE(receive(right)) << "it never left the host";
    const Bytes& frame = wire.sent.back();
    EXPECT_EQ(frame[40], std::byte{0x14});
    EXPECT_EQ(frame[41], std::byte{0x1e}) << "the sum of the pseudo header";
}

TEST_F(NetInterface, ANeighbourIsAskedForOnce) {
    for (int i = 0; i < 5; ++i) {
        ASSERT_TRUE(send(left, to_right, Bytes(1)));
    }
    EXPECT_EQ(arp_requests(), 1u);
    pass(ArpTable::lifetime);
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    pass(5_s);
    EXPECT_EQ(arp_requests(), 1u) << "again after its lifetime";
    EXPECT_EQ(left.interface.counters().arp_requests, 3u) << "with the announcement";
    EXPECT_EQ(right.interface.counters().arp_replies, 2u);
}

TEST_F(NetInterface, ManyWaitForOneAnswer) {
    struct Many {
        static Task<Result<void>> run(NetInterface& t, const Bytes& data) {
            TaskGroup group(t.executor);
            for (int i = 0; i < 8; ++i) {
                CO_CHECK_(group.spawn(sending(t.left.socket, to_right, data, 5_s)));
            }
            co_return co_await group.join();
        }
        static void CO_CHECK_(const Result<void>& result) { EXPECT_TRUE(result); }
    };
    const Bytes data(3);
    ASSERT_TRUE(executor.run(Many::run(*this, data)));
    pass(20_ms);
    EXPECT_EQ(arp_requests(), 1u);
    for (int i = 0; i < 8; ++i) {
        EXPECT_TRUE(receive(right));
    }
}

TEST_F(NetInterface, NobodyAnswers) {
    Instant begun = executor.now();
    auto sent = send(left, {ip(10, 0, 0, 77), 1}, Bytes(1), 60_s);
    ASSERT_FALSE(sent);
    EXPECT_EQ(sent.error().code, Code::timed_out);
    EXPECT_GE(executor.now() - begun, 3_s);
    EXPECT_LT(executor.now() - begun, 3'100_ms);
    EXPECT_EQ(arp_requests(), 3u);
    begun = executor.now();
    sent = send(left, {ip(10, 0, 0, 78), 1}, Bytes(1), 500_ms);
    ASSERT_FALSE(sent);
    EXPECT_EQ(sent.error().code, Code::timed_out);
    EXPECT_GE(executor.now() - begun, 500_ms);
    EXPECT_LT(executor.now() - begun, 520_ms) << "the bound of the caller";
    pass(5_s);
    sent = send(left, {ip(10, 0, 0, 78), 1}, Bytes(1), 0);
    EXPECT_FALSE(sent);
    EXPECT_EQ(left.interface.counters().sent, 0u);
}

TEST_F(NetInterface, ASendThatIsDestroyedIsWithdrawn) {
    {
        TaskGroup group(executor);
        const Bytes data(1);
        ASSERT_TRUE(group.spawn(sending(left.socket, to_right, data, 5_s)));
        wire.behaviour.holds = true;
        for (int i = 0; i < 3; ++i) {
            executor.turn();
        }
        EXPECT_EQ(group.running(), 1u);
    }
    wire.behaviour.holds = false;
    pass(20_ms);
    EXPECT_EQ(left.interface.counters().sent, 0u);
    EXPECT_EQ(right.interface.counters().received, 0u);
}

TEST_F(NetInterface, RoomInTheRingIsWaitedForWithinTheBound) {
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    pass(20_ms);
    left.card.slots = 1;
    wire.behaviour.holds = true;
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    const Instant begun = executor.now();
    const auto sent = send(left, to_right, Bytes(1), 100_ms);
    ASSERT_FALSE(sent);
    EXPECT_EQ(sent.error().code, Code::timed_out);
    EXPECT_GE(executor.now() - begun, 100_ms);
    EXPECT_LT(executor.now() - begun, 120_ms);
    wire.behaviour.holds = false;
    wire.behaviour.delay = 30_ms;
    executor.poll(wire);
    ASSERT_TRUE(send(left, to_right, Bytes(1), 200_ms)) << "waits until the frame before has left";
    ASSERT_TRUE(send(left, to_right, Bytes(1), 200_ms));
}

TEST_F(NetInterface, NothingIsSentFromAnAddressThatIsGone) {
    struct Waits {
        static Task<Result<void>> note(Task<Result<void>> task, std::vector<Code>& codes) {
            const auto result = co_await std::move(task);
            codes.push_back(result ? Code::busy : result.error().code);
            co_return Result<void>{};
        }
    };
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    pass(20_ms);
    wire.sent.clear();
    wire.behaviour.holds = true;
    left.card.slots = 2;
    std::vector<Code> codes;
    const Bytes data(1);
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(Waits::note(sending(left.socket, {ip(10, 0, 0, 77), 1}, data, 100_s), codes)));
    ASSERT_TRUE(group.spawn(Waits::note(sending(left.socket, to_right, data, 100_s), codes)));
    ASSERT_TRUE(group.spawn(Waits::note(sending(left.socket, to_right, data, 100_s), codes)));
    executor.turn();
    executor.turn();
    EXPECT_EQ(codes, (std::vector<Code>{Code::busy})) << "one waits for a neighbour, one for room";
    left.interface.deconfigure();
    wire.behaviour.holds = false;
    executor.poll(wire);
    pass(100_ms);
    EXPECT_EQ(codes, (std::vector<Code>{Code::busy, Code::not_found, Code::not_found}));
    EXPECT_EQ(wire.sent.size(), 2u) << "the request for the neighbour, and the first datagram";
}

// The neighbour answers when the ring is full.
TEST_F(NetInterface, RoomInTheRingAfterAnAnswer) {
    left.card.slots = 1; // the request for the neighbour takes it; freed before the answer arrives
    ASSERT_TRUE(send(left, to_right, Bytes(1), 200_ms));
    left.interface.configure({{left_ip, 25}, router_ip}); // forgets the neighbours
    pass(20_ms);
    struct Two {
        static Task<Result<void>> run(NetInterface& t, const Bytes& data) {
            TaskGroup group(t.executor);
            EXPECT_TRUE(group.spawn(sending(t.left.socket, to_right, data, 5_s)));
            EXPECT_TRUE(group.spawn(sending(t.left.socket, to_right, data, 5_s)));
            co_return co_await group.join();
        }
    };
    const Bytes data(1);
    ASSERT_TRUE(executor.run(Two::run(*this, data)));
    pass(20_ms);
    EXPECT_EQ(right.interface.counters().received, 3u);
}

TEST_F(NetInterface, Routes) {
    const auto first_target = [&] { // of the ARP request
        pass(20_ms);
        for (const Bytes& frame : std::exchange(wire.sent, {})) {
            if (frame[13] == std::byte{6}) {
                return take<ArpPacket>(std::span(frame).subspan(14)).target;
            }
        }
        return Ipv4Address{};
    };
    EXPECT_FALSE(send(left, {ip(192, 168, 7, 7), 1}, Bytes(1), 10_ms));
    EXPECT_EQ(first_target(), router_ip);
    EXPECT_FALSE(send(left, {ip(10, 0, 0, 99), 1}, Bytes(1), 10_ms));
    EXPECT_EQ(first_target(), ip(10, 0, 0, 99));
    for (const Ipv4Address wrong : {left_ip, ip(224, 0, 0, 1), ip(127, 0, 0, 1), ip(0, 0, 0, 0), ip(240, 1, 1, 1)}) {
        const auto sent = send(left, {wrong, 1}, Bytes(1), 1_s);
        ASSERT_FALSE(sent) << text(wrong).view();
        EXPECT_EQ(sent.error().code, Code::not_supported);
    }
    left.interface.configure({{left_ip, 24}, {}});
    EXPECT_EQ(send(left, {ip(192, 168, 7, 7), 1}, Bytes(1), 1_s).error().code, Code::not_found);
    left.interface.deconfigure();
    EXPECT_EQ(send(left, to_right, Bytes(1), 1_s).error().code, Code::not_found);
    right.socket.accept_all();
    EXPECT_TRUE(send(left, {ip(255, 255, 255, 255), 2000}, Bytes(1), 1_s));
    EXPECT_FALSE(receive(right, 10, 20_ms)) << "0.0.0.0 is no source for sockets: only for servers of DHCP";
    EXPECT_EQ(dropped(right, Drop::ipv4_source), 1u);
    left.interface.configure({{left_ip, 24}, router_ip});
    EXPECT_TRUE(send(left, {ip(10, 0, 0, 255), 2000}, Bytes(1), 1_s));
    EXPECT_TRUE(receive(right, 10, 20_ms)) << "the broadcast address of the subnet";
    pass(20_ms);
    EXPECT_EQ(wire.sent.back()[0], std::byte{255});
}

TEST_F(NetInterface, Pings) {
    const auto time = executor.run(left.interface.ping(right_ip, 1, 1_s));
    ASSERT_TRUE(time) << time.error().message;
    EXPECT_GT(*time, 0u);
    EXPECT_LT(*time, 1_ms);
    EXPECT_EQ(right.interface.counters().echo_replies, 1u);
    wire.behaviour.delay = 50_ms;
    const auto later = executor.run(left.interface.ping(right_ip, 2, 1_s));
    ASSERT_TRUE(later);
    EXPECT_GE(*later, 100_ms);
    const Instant begun = executor.now();
    const auto late = executor.run(left.interface.ping(right_ip, 3, 70_ms));
    ASSERT_FALSE(late);
    EXPECT_EQ(late.error().code, Code::timed_out);
    EXPECT_LT(executor.now() - begun, 90_ms);
    pass(100_ms);
    EXPECT_EQ(dropped(left, Drop::icmp_unasked), 1u) << "the answer that came too late";
}

TEST_F(NetInterface, AnswersToPingsHaveALimit) {
    const Bytes data(4);
    Bytes echo(8);
    put(std::span(echo), make_icmp(IcmpType::echo_request, 0, 1, 1, data));
    echo.insert(echo.end(), data.begin(), data.end());
    const Bytes frame = frame_of(right_mac, left_mac, EtherType::ipv4, ipv4(Protocol::icmp, left_ip, right_ip, echo));
    right.card.slots = 1000;
    pass(100_ms); // the machine reads its clock, and time passes
    wire.behaviour.holds = true;
    for (int i = 0; i < 200; ++i) {
        right.card.arrive(frame);
    }
    EXPECT_EQ(right.interface.counters().echo_replies, Interface::answer_burst);
    EXPECT_EQ(dropped(right, Drop::icmp_rate), 200 - Interface::answer_burst);
    pass(10_ms);
    for (int i = 0; i < 200; ++i) {
        right.card.arrive(frame);
    }
    EXPECT_GE(right.interface.counters().echo_replies, Interface::answer_burst + 9u);
    EXPECT_LE(right.interface.counters().echo_replies, Interface::answer_burst + 22u);
}

// ---- answers when the ring is full ----

struct NetHeld : NetInterface {
    Bytes echo(u16 sequence, usize size = 4) {
        const Bytes data(size, static_cast<std::byte>(sequence));
        Bytes request(8);
        put(std::span(request), make_icmp(IcmpType::echo_request, 0, 7, sequence, data));
        request.insert(request.end(), data.begin(), data.end());
        return frame_of(right_mac, left_mac, EtherType::ipv4, ipv4(Protocol::icmp, left_ip, right_ip, request));
    }
    Bytes question() {
        Bytes request(28);
        put(std::span(request), make_arp(ArpOperation::request, left_mac, left_ip, {}, right_ip));
        return frame_of(broadcast_mac, left_mac, EtherType::arp, request);
    }
    void room(u32 slots) {
        right.card.slots = slots;
        right.card.has_room();
    }
    // What the interface has sent since the last call: the echo replies' numbers, 1000 for an ARP reply, 2000 for a
    // datagram.
    std::vector<u32> answers() {
        pass(20_ms);
        std::vector<u32> seen;
        for (const Bytes& frame : std::exchange(wire.sent, {})) {
            if (frame[11] != std::byte{2}) {
                continue; // of the other station
            }
            if (frame[13] == std::byte{6}) {
                if (frame[21] == std::byte{2}) { // else a question of its own
                    seen.push_back(1000);
                }
            } else if (frame[23] == std::byte{17}) {
                seen.push_back(2000);
            } else {
                EXPECT_EQ(frame[34], std::byte{0}) << "an echo reply";
                seen.push_back(static_cast<u32>(frame[41]));
                EXPECT_TRUE(parse_icmp(std::span(frame).subspan(34))) << "its checksum";
                EXPECT_EQ(frame.back(), frame[41]) << "its data";
            }
        }
        return seen;
    }
    u64 lost() const { return right.interface.counters().answers_lost; }
};

TEST_F(NetHeld, TheyAreSentInOrderWhenThereIsRoom) {
    right.card.slots = 0;
    right.card.arrive(echo(1));
    right.card.arrive(question());
    right.card.arrive(echo(2, 1472)); // the longest one
    EXPECT_EQ(answers(), std::vector<u32>{});
    right.card.arrive(echo(3));
    room(1);
    right.card.arrive(echo(4)); // although there may be room
    EXPECT_EQ(answers(), (std::vector<u32>{1, 1000, 2, 3, 4}));
    right.card.arrive(echo(5));
    EXPECT_EQ(answers(), std::vector<u32>{5}) << "at once again";
    EXPECT_EQ(lost(), 0u);
    EXPECT_EQ(right.interface.counters().echo_replies, 5u);
}

TEST_F(NetHeld, TheyTakeTurnsWithPackets) {
    ASSERT_TRUE(send(right, {left_ip, 1000}, Bytes(1))); // the neighbour is known from here on
    static_cast<void>(answers());
    right.card.slots = 0;
    const Bytes data(1);
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(sending(right.socket, {left_ip, 1000}, data, 5_s)));
    pass(1_ms);
    right.card.arrive(echo(1)); // behind the one that waits
    pass(1_ms);
    ASSERT_TRUE(group.spawn(sending(right.socket, {left_ip, 1000}, data, 5_s)));
    pass(1_ms);
    room(1);
    EXPECT_EQ(answers(), (std::vector<u32>{2000, 1, 2000}));
    EXPECT_EQ(lost(), 0u);
}

TEST_F(NetHeld, BeyondTheBoundTheyAreLostAndCounted) {
    for (u32 round = 1; round <= 3; ++round) { // the places are used again
        right.card.slots = 0;
        for (u16 i = 0; i < Interface::max_held + 3; ++i) {
            right.card.arrive(echo(i));
        }
        EXPECT_EQ(lost(), 3u * round);
        room(64);
        EXPECT_EQ(answers(), (std::vector<u32>{0, 1, 2, 3, 4, 5, 6, 7}));
    }
    Card jumbo(executor, wire, 2, 9000); // the same station on another card
    Interface interface(jumbo);
    ASSERT_TRUE(executor.run(interface.open()));
    interface.configure({{right_ip, 24}, {}});
    jumbo.slots = jumbo.used;
    jumbo.arrive(echo(1, Interface::held_bytes - 41));
    EXPECT_EQ(interface.counters().answers_lost, 1u) << "longer than a place";
    jumbo.arrive(echo(2, Interface::held_bytes - 42));
    EXPECT_EQ(interface.counters().answers_lost, 1u);
    ASSERT_TRUE(executor.run(interface.close()));
    EXPECT_EQ(interface.counters().answers_lost, 2u) << "it is not sent any more";
}

TEST_F(NetHeld, NoneWaitsForEver) {
    right.card.slots = 0;
    right.card.arrive(echo(1));
    right.card.arrive(echo(2));
    pass(Interface::held_bound - 100_ms);
    EXPECT_EQ(lost(), 0u);
    pass(200_ms);
    EXPECT_EQ(lost(), 2u);
    room(64);
    EXPECT_EQ(answers(), std::vector<u32>{});
    right.card.arrive(echo(3));
    EXPECT_EQ(answers(), std::vector<u32>{3});
}

TEST_F(NetHeld, NoneLeavesWithAnAddressThatIsGone) {
    right.card.slots = 0;
    right.card.arrive(echo(1));
    right.card.arrive(echo(2));
    pass(1_ms);
    right.interface.deconfigure();
    EXPECT_EQ(lost(), 2u);
    room(64);
    EXPECT_EQ(answers(), std::vector<u32>{});
    right.interface.configure({{right_ip, 24}, router_ip});
    pass(1_ms); // the announcement
    room(0);
    right.card.arrive(echo(3));
    pass(1_ms);
    right.card.close();
    pass(1_ms);
    EXPECT_EQ(lost(), 3u) << "a card that is closed ends them at once";
}

TEST_F(NetHeld, TheInterfaceMayEndMeanwhile) {
    for (const bool at_once : {false, true}) {
        Card card(executor, wire, 2);
        auto interface = std::make_unique<Interface>(card);
        ASSERT_TRUE(executor.run(interface->open()));
        interface->configure({{right_ip, 24}, {}});
        pass(1_ms);
        card.slots = 0;
        card.arrive(echo(1));
        if (!at_once) {
            pass(1_ms);
        }
        interface.reset();
        wire.sent.clear();
        card.slots = 64;
        card.has_room();
        EXPECT_EQ(answers(), std::vector<u32>{});
    }
}

TEST_F(NetInterface, AnUnreachablePortIsAnErrorOfTheSocket) {
    ASSERT_TRUE(send(left, {right_ip, 99}, Bytes(20)));
    auto got = receive(left);
    ASSERT_FALSE(got);
    EXPECT_EQ(got.error().code, Code::not_found) << got.error().message;
    EXPECT_EQ(right.interface.counters().unreachables, 1u);
    EXPECT_EQ(dropped(right, Drop::udp_port), 1u);
    EXPECT_EQ(left.interface.counters().errors, 1u);
    EXPECT_EQ(left.socket.counters().errors, 1u);
    EXPECT_EQ(receive(left, 10, 20_ms).error().code, Code::timed_out) << "once";

    ASSERT_TRUE(send(left, {right_ip, 99}, Bytes(20)));
    pass(20_ms);
    const auto sent = send(left, to_right, Bytes(1));
    ASSERT_FALSE(sent) << "also of the next send";
    EXPECT_EQ(sent.error().code, Code::not_found);
    EXPECT_TRUE(send(left, to_right, Bytes(1)));
    EXPECT_TRUE(receive(right));

    right.interface.configure({{ip(10, 0, 0, 3), 24}, {}}); // the station has another address now
    pass(20_ms);
    EXPECT_TRUE(send(left, to_right, Bytes(1))) << "the neighbour is still known";
    EXPECT_EQ(receive(left, 10, 20_ms).error().code, Code::timed_out);
    EXPECT_EQ(dropped(right, Drop::ipv4_destination), 1u);
}

TEST_F(NetInterface, ErrorsAboutPacketsThatWereNotSent) {
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    const auto error = [&](Endpoint from, Endpoint to, u8 code = 3) {
        const Bytes about = udp(from, to, {});
        Bytes icmp(8);
        put(std::span(icmp), make_icmp(IcmpType::unreachable, code, 0, 0, about));
        icmp.insert(icmp.end(), about.begin(), about.end());
        left.card.arrive(frame_of(left_mac, right_mac, EtherType::ipv4, ipv4(Protocol::icmp, right_ip, left_ip, icmp)));
    };
    error({left_ip, 1000}, {right_ip, 2001});
    error({left_ip, 1000}, {ip(10, 0, 0, 9), 2000});
    error({left_ip, 1001}, to_right);
    error({ip(10, 0, 0, 9), 1000}, to_right);
    EXPECT_EQ(dropped(left, Drop::icmp_type), 4u);
    EXPECT_EQ(left.socket.counters().errors, 0u);
    error({left_ip, 1000}, to_right, 4);
    EXPECT_EQ(receive(left).error().code, Code::bad_argument) << "too long for its way";
    error({left_ip, 1000}, to_right, 13);
    EXPECT_EQ(receive(left).error().code, Code::not_found);
}

TEST_F(NetInterface, AQueueOverflowsAndIsCounted) {
    u32 sent = 0;
    for (; sent < 20; ++sent) {
        ASSERT_TRUE(send(left, to_right, Bytes(1000, static_cast<std::byte>(sent))));
    }
    pass(20_ms);
    EXPECT_EQ(right.socket.counters().overflowed, 16u) << "4 of 1008 bytes fit into 4096";
    EXPECT_EQ(dropped(right, Drop::udp_full), 16u);
    for (u32 i = 0; i < 4; ++i) {
        EXPECT_EQ(receive(right)->data, Bytes(1000, static_cast<std::byte>(i))) << "the oldest ones, in order";
    }
    EXPECT_FALSE(receive(right, 10, 10_ms));
    ASSERT_TRUE(send(left, to_right, Bytes(100, std::byte{1})));
    const auto got = receive(right, 10);
    ASSERT_TRUE(got);
    EXPECT_EQ(got->size, 100u);
    EXPECT_EQ(got->data, Bytes(10, std::byte{1}));
    EXPECT_EQ(right.socket.counters().truncated, 1u);
}

TEST_F(NetInterface, AReceiverThatWaits) {
    struct Both {
        static Task<Result<void>> get(UdpSocket& socket, std::span<std::byte> buffer,
                                      Result<UdpSocket::Datagram>& result) {
            result = co_await socket.receive(buffer, 1_s);
            co_return Result<void>{};
        }
    };
    Bytes buffer(4);
    Result<UdpSocket::Datagram> result = Error{Code::io, ""};
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn(Both::get(right.socket, buffer, result)));
        executor.turn();
        EXPECT_EQ(receive(right, 4).error().code, Code::busy) << "one at a time";
        ASSERT_TRUE(send(left, to_right, Bytes(9, std::byte{5})));
        pass(20_ms);
        EXPECT_EQ(group.running(), 0u);
    }
    ASSERT_TRUE(result);
    EXPECT_EQ(result->size, 9u);
    EXPECT_EQ(buffer, Bytes(4, std::byte{5})) << "copied at once, without the queue";
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn(Both::get(right.socket, buffer, result)));
        executor.turn();
    } // destroyed while it waits
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    EXPECT_TRUE(receive(right));
    const Instant begun = executor.now();
    EXPECT_EQ(receive(right, 4, 300_ms).error().code, Code::timed_out);
    EXPECT_GE(executor.now() - begun, 300_ms);
    EXPECT_LT(executor.now() - begun, 320_ms);
}

TEST_F(NetInterface, Ports) {
    UdpSocket other(left.interface, {});
    const auto unbound = executor.run(sending(other, to_right, {}, 1_s));
    ASSERT_FALSE(unbound);
    EXPECT_EQ(unbound.error().code, Code::bad_argument);
    EXPECT_EQ(other.bind(1000).error().code, Code::busy);
    ASSERT_TRUE(other.bind());
    EXPECT_GE(other.port(), 49152);
    ASSERT_TRUE(other.bind(1001));
    EXPECT_EQ(other.port(), 1001);
    EXPECT_EQ(other.bind(1000).error().code, Code::busy);
    std::vector<std::unique_ptr<UdpSocket>> all;
    for (int i = 0; i < 16384; ++i) {
        all.push_back(std::make_unique<UdpSocket>(left.interface, std::span<std::byte>{}));
        if (i > 16350 || i < 10) { // the search is long
            ASSERT_TRUE(all.back()->bind(i < 10 ? u16{0} : static_cast<u16>(3000 + i % 100)));
        }
    }
}

TEST_F(NetInterface, EveryFrameIsCountedByReason) {
    struct Case {
        Drop why;
        Bytes frame;
    };
    const Bytes good_udp = udp({right_ip, 2000}, {left_ip, 1000}, Bytes(3));
    const auto ip4 = [&](const Bytes& packet, MacAddress to = left_mac) {
        return frame_of(to, right_mac, EtherType::ipv4, packet);
    };
    const auto changed = [](Bytes bytes, usize at, unsigned flip) {
        bytes[at] ^= static_cast<std::byte>(flip);
        return bytes;
    };
    Bytes echo(8);
    put(std::span(echo), make_icmp(IcmpType::echo_reply, 0, 1, 1, {}));
    Bytes redirect(8);
    put(std::span(redirect), make_icmp(static_cast<IcmpType>(5), 0, 1, 1, {}));
    Bytes request(28);
    put(std::span(request), make_arp(ArpOperation::request, right_mac, right_ip, {}, ip(10, 0, 0, 9)));
    const Bytes about_others = frame_of(broadcast_mac, right_mac, EtherType::arp, request);
    const Case cases[] = {
        {Drop::ethernet_short, Bytes(13)},
        {Drop::ethernet_source, frame_of(left_mac, left_mac, EtherType::ipv4, good_udp)},
        {Drop::ethernet_source, frame_of(left_mac, broadcast_mac, EtherType::ipv4, good_udp)},
        {Drop::ethernet_type, frame_of(left_mac, right_mac, static_cast<EtherType>(0x86dd), good_udp)},
        {Drop::ethernet_type, frame_of(left_mac, right_mac, static_cast<EtherType>(46), good_udp)},
        {Drop::other_station, ip4(good_udp, third_mac)},
        {Drop::other_station, ip4(good_udp, {{1, 0, 0x5e, 0, 0, 1}})},
        {Drop::arp_malformed, frame_of(left_mac, right_mac, EtherType::arp, Bytes(27))},
        {Drop::arp_unknown, about_others},
        {Drop::ipv4_malformed, ip4(Bytes(19))},
        {Drop::ipv4_checksum, ip4(changed(good_udp, 8, 1))},
        {Drop::ipv4_source, ip4(udp({left_ip, 2000}, {left_ip, 1000}, Bytes(3)))},
        {Drop::ipv4_source, ip4(udp({ip(127, 0, 0, 1), 2000}, {left_ip, 1000}, Bytes(3)))},
        {Drop::ipv4_source, ip4(udp({ip(10, 0, 0, 255), 2000}, {left_ip, 1000}, Bytes(3)))},
        {Drop::ipv4_destination, ip4(udp({right_ip, 2000}, {ip(10, 0, 0, 9), 1000}, Bytes(3)))},
        {Drop::ipv4_destination, ip4(good_udp, broadcast_mac)},
        {Drop::ipv4_destination, ip4(ipv4(Protocol::icmp, right_ip, ip(10, 0, 0, 255), echo), broadcast_mac)},
        {Drop::ipv4_protocol, ip4(ipv4(static_cast<Protocol>(6), right_ip, left_ip, Bytes(20)))},
        {Drop::icmp_malformed, ip4(ipv4(Protocol::icmp, right_ip, left_ip, Bytes(7)))},
        {Drop::icmp_checksum, ip4(ipv4(Protocol::icmp, right_ip, left_ip, changed(echo, 7, 1)))},
        {Drop::icmp_type, ip4(ipv4(Protocol::icmp, right_ip, left_ip, redirect))},
        {Drop::icmp_unasked, ip4(ipv4(Protocol::icmp, right_ip, left_ip, echo))},
        {Drop::udp_malformed, ip4(ipv4(Protocol::udp, right_ip, left_ip, Bytes(7)))},
        {Drop::udp_checksum, ip4(changed(good_udp, 30, 1))},
        {Drop::udp_port, ip4(udp({right_ip, 2000}, {left_ip, 1001}, Bytes(3)))},
        {Drop::udp_port, ip4(udp({right_ip, 2000}, {ip(10, 0, 0, 255), 1000}, Bytes(3)), broadcast_mac)},
    };
    for (const Case& c : cases) {
        const u64 before = dropped(left, c.why);
        const u64 received = left.interface.counters().received;
        left.card.arrive(c.frame);
        EXPECT_EQ(dropped(left, c.why), before + 1) << name(c.why);
        EXPECT_EQ(left.interface.counters().received, received) << name(c.why);
    }
    u64 all = 0;
    for (usize i = 0; i < drop_reasons; ++i) {
        all += dropped(left, static_cast<Drop>(i));
    }
    EXPECT_EQ(all, std::size(cases) + 1) << "one reason each, and the other's announcement";
    left.card.arrive(ip4(good_udp));
    EXPECT_EQ(left.interface.counters().received, 1u) << "and the good one arrives";
    EXPECT_EQ(left.interface.counters().answers_lost, 0u);
}

TEST_F(NetInterface, NothingThatArrivesAddsANeighbour) {
    Bytes reply(28);
    put(std::span(reply), make_arp(ArpOperation::reply, third_mac, ip(10, 0, 0, 9), left_mac, left_ip));
    left.card.arrive(frame_of(left_mac, third_mac, EtherType::arp, reply)); // nobody has asked
    EXPECT_EQ(dropped(left, Drop::arp_unknown), 2u) << "and the announcement of the other station";
    EXPECT_FALSE(send(left, {ip(10, 0, 0, 9), 1}, Bytes(1), 10_ms));
    EXPECT_EQ(arp_requests(), 1u);
    left.card.arrive(frame_of(left_mac, third_mac, EtherType::arp, reply)); // now one has
    EXPECT_TRUE(send(left, {ip(10, 0, 0, 9), 1}, Bytes(1), 10_ms));
    pass(20_ms);
    EXPECT_EQ(wire.sent.back()[5], std::byte{3});
    // A station that has moved says so, and is believed.
    put(std::span(reply), make_arp(ArpOperation::request, right_mac, ip(10, 0, 0, 9), {}, ip(10, 0, 0, 9)));
    left.card.arrive(frame_of(broadcast_mac, right_mac, EtherType::arp, reply));
    EXPECT_TRUE(send(left, {ip(10, 0, 0, 9), 1}, Bytes(1), 10_ms));
    pass(20_ms);
    EXPECT_EQ(wire.sent.back()[5], std::byte{2});
}

TEST_F(NetInterface, AnAddressThatIsInUse) {
    EXPECT_EQ(executor.run(left.interface.probe(right_ip)).error().code, Code::busy);
    EXPECT_TRUE(log.has("10.0.0.2 is in use by another station"));
    wire.sent.clear();
    const Instant begun = executor.now();
    EXPECT_TRUE(executor.run(left.interface.probe(ip(10, 0, 0, 50))));
    EXPECT_GE(executor.now() - begun, Interface::probes * Interface::probe_interval);
    EXPECT_EQ(arp_requests(), Interface::probes);
    // Two that probe for the same address both give way [rfc5227 §2.1.1].
    struct Two {
        static Task<Result<void>> probe(Interface& interface, u32& conflicts) {
            conflicts += co_await interface.probe(ip(10, 0, 0, 60)) ? 0 : 1;
            co_return Result<void>{};
        }
        static Task<Result<void>> run(NetInterface& t, u32& conflicts) {
            TaskGroup group(t.executor);
            EXPECT_TRUE(group.spawn(probe(t.left.interface, conflicts)));
            EXPECT_TRUE(group.spawn(probe(t.right.interface, conflicts)));
            co_return co_await group.join();
        }
    };
    u32 conflicts = 0;
    ASSERT_TRUE(executor.run(Two::run(*this, conflicts)));
    EXPECT_EQ(conflicts, 2u);
}

TEST_F(NetInterface, AConflictIsLoggedAndDefendedAtMostEveryTenSeconds) {
    pass(11_s);
    Bytes claim(28);
    put(std::span(claim), make_arp(ArpOperation::request, third_mac, left_ip, {}, left_ip));
    const Bytes frame = frame_of(broadcast_mac, third_mac, EtherType::arp, claim);
    for (int i = 0; i < 100; ++i) {
        left.card.arrive(frame);
    }
    pass(20_ms);
    EXPECT_EQ(arp_requests(), 1u);
    EXPECT_EQ(left.interface.counters().conflicts, 100u);
    EXPECT_TRUE(log.has("52:54:00:00:00:03 also uses the address 10.0.0.1"));
    pass(11_s);
    left.card.arrive(frame);
    pass(20_ms);
    EXPECT_EQ(arp_requests(), 1u);
    EXPECT_TRUE(send(left, to_right, Bytes(1))) << "the address is kept";
}

TEST_F(NetInterface, AClosedDeviceEndsEveryWait) {
    struct Waits {
        static Task<Result<void>> note(Task<Result<void>> task, std::vector<Code>& codes) {
            const auto result = co_await std::move(task);
            codes.push_back(result ? Code::busy : result.error().code);
            co_return Result<void>{};
        }
        static Task<Result<void>> get(UdpSocket& socket, std::span<std::byte> buffer) {
            const auto result = co_await socket.receive(buffer, 100_s);
            co_return result ? Result<void>{} : Result<void>(result.error());
        }
        static Task<Result<void>> echo(Interface& interface) {
            const auto result = co_await interface.ping(right_ip, 1, 100_s);
            co_return result ? Result<void>{} : Result<void>(result.error());
        }
    };
    ASSERT_TRUE(send(left, to_right, Bytes(1)));
    pass(20_ms);
    std::vector<Code> codes;
    Bytes buffer(4);
    const Bytes data(1);
    wire.behaviour.holds = true;
    TaskGroup group(executor);
    ASSERT_TRUE(group.spawn(Waits::note(sending(left.socket, {ip(10, 0, 0, 77), 1}, data, 100_s), codes)));
    ASSERT_TRUE(group.spawn(Waits::note(Waits::get(left.socket, buffer), codes)));
    ASSERT_TRUE(group.spawn(Waits::note(Waits::echo(left.interface), codes)));
    executor.turn();
    left.card.slots = left.card.used;
    ASSERT_TRUE(group.spawn(Waits::note(sending(left.socket, to_right, data, 100_s), codes)));
    executor.turn();
    EXPECT_TRUE(codes.empty());
    left.card.close();
    for (int i = 0; i < 3; ++i) {
        executor.turn();
    }
    EXPECT_EQ(codes, std::vector<Code>(4, Code::device_gone));
    EXPECT_EQ(receive(left, 4, 1_s).error().code, Code::device_gone);
    EXPECT_EQ(send(left, to_right, Bytes(1)).error().code, Code::device_gone);
}

TEST_F(NetInterface, ALinkThatComesUpIsToldWhereTheStationIs) {
    left.card.link(false);
    EXPECT_TRUE(log.has("eth0: link down"));
    pass(20_ms);
    EXPECT_EQ(arp_requests(), 0u);
    left.card.link(true);
    pass(20_ms);
    EXPECT_EQ(arp_requests(), 1u);
}

TEST_F(NetInterface, ABadWire) {
    wire.behaviour = {.drop = 10, .duplicate = 10, .reorder = 20, .corrupt = 10, .delay = 0};
    u32 sent = 0;
    std::map<u32, u32> got;
    for (u32 i = 0; i < 2000; ++i) {
        Bytes data(64);
        std::memcpy(data.data(), &i, 4);
        for (usize k = 4; k < data.size(); ++k) {
            data[k] = static_cast<std::byte>(i + k);
        }
        sent += send(left, to_right, data, 10_s) ? 1 : 0;
        while (auto datagram = receive(right, 100, 0)) {
            ASSERT_EQ(datagram->size, 64u);
            u32 number = 0;
            std::memcpy(&number, datagram->data.data(), 4);
            for (usize k = 4; k < 64; ++k) { // the checksum finds every single bit
                ASSERT_EQ(datagram->data[k], static_cast<std::byte>(number + k));
            }
            ++got[number];
        }
    }
    EXPECT_GE(sent, 1990u);
    EXPECT_GT(got.size(), 1400u);
    EXPECT_LT(got.size(), 1700u);
    EXPECT_GT(wire.reordered, 100u);
    EXPECT_GT(wire.corrupted, 100u);
    EXPECT_GT(wire.duplicated, 100u);
    EXPECT_GT(std::ranges::count_if(got, [](const auto& each) { return each.second > 1; }), 50);
    EXPECT_GT(dropped(right, Drop::udp_checksum) + dropped(right, Drop::ipv4_checksum), 100u);
}

// ---- lanes ----

// A card with a second lane on another executor.
class TwoLanes final : public NetDevice {
  public:
    TwoLanes(Executor& home, Executor& there) : NetDevice(home), second(there) {
        identity_.name = FixedText<16>("eth0");
        identity_.mac = left_mac;
        set_open(true);
    }
    ~TwoLanes() { set_open(false); }
    u32 lanes() const override { return 2; }
    NetDevice& lane(u32 index) override { return index == 0 ? static_cast<NetDevice&>(*this) : second; }
    bool start(const OutgoingFrame&, Checksum) override { return true; }
    struct Second final : NetDevice {
        explicit Second(Executor& executor) : NetDevice(executor) { set_open(true); }
        ~Second() { set_open(false); }
        bool start(const OutgoingFrame&, Checksum) override { return true; }
        void arrive(std::span<const std::byte> frame) { deliver(frame, Checksum::unknown); }
    };
    Second second;
};

Task<Result<void>> burst(TwoLanes::Second& lane, const Bytes& frame, u32 count) {
    for (u32 i = 0; i < count; ++i) {
        lane.arrive(frame);
    }
    co_return Result<void>{};
}

Task<Result<void>> burst_there(Executor& there, TwoLanes::Second& lane, const Bytes& frame, u32 count) {
    co_return co_await run_on(there, burst(lane, frame, count));
}

struct NetLanes : testing::Test {
    test::ThreadPlatform platform;
    Executor home{platform.platform(), 0};
    test::ThreadProcessor there{1};
    TwoLanes card{home, there.executor};
    Bytes frame = [] {
        const Bytes data(100, std::byte{3});
        Bytes payload = NetInterface::udp({right_ip, 2000}, {left_ip, 1000}, data);
        Bytes all(14);
        put(std::span(all), EthernetHeader{left_mac, right_mac, to_underlying(EtherType::ipv4)});
        all.insert(all.end(), payload.begin(), payload.end());
        return all;
    }();
};

TEST_F(NetLanes, FramesOfOtherLanesAreBroughtHome) {
    Interface interface(card);
    std::vector<std::byte> queue(1 << 20);
    UdpSocket socket(interface, queue);
    ASSERT_TRUE(home.run(interface.open()));
    interface.configure({{left_ip, 24}, {}});
    ASSERT_TRUE(socket.bind(1000));
    Bytes buffer(200);
    u32 got = 0;
    for (u32 round = 0; round < 200; ++round) {
        ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 7)));
        for (; got < (round + 1) * 7; ++got) {
            const auto datagram = home.run(NetInterface::receiving(socket, buffer, 5_s));
            ASSERT_TRUE(datagram) << got;
            ASSERT_EQ(datagram->size, 100u);
        }
    }
    // More than the slots, while this processor takes nothing: the rest is counted.
    ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 1000)));
    while (home.run(NetInterface::receiving(socket, buffer, 100_ms))) {
        ++got;
    }
    EXPECT_EQ(got - 1400 + interface.drops()[Drop::lane_full], 1000u);
    EXPECT_GE(got - 1400, 64u);
    ASSERT_TRUE(home.run(interface.close()));
    const u64 lost = interface.drops()[Drop::lane_full];
    ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 10)));
    EXPECT_FALSE(home.run(NetInterface::receiving(socket, buffer, 20_ms)));
    EXPECT_EQ(interface.drops()[Drop::lane_full], lost) << "nothing is received after close()";
    ASSERT_TRUE(home.run(interface.open())) << "and again";
    ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 10)));
    EXPECT_TRUE(home.run(NetInterface::receiving(socket, buffer, 5_s)));
    ASSERT_TRUE(home.run(interface.close()));
}

TEST_F(NetLanes, AnInterfaceThatIsDestroyedWhileFramesArrive) {
    for (int i = 0; i < 20; ++i) {
        auto interface = std::make_unique<Interface>(card);
        ASSERT_TRUE(home.run(interface->open()));
        interface->configure({{left_ip, 24}, {}});
        ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 5)));
        interface.reset();
        ASSERT_TRUE(home.run(burst_there(there.executor, card.second, frame, 5)));
        ASSERT_TRUE(home.run(NetInterface::sleeping(home, 1_ms)));
    }
}

} // namespace
