#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import core.log;
import core.cpuid;
import io.executor;
import io.task;
import io.block;
import io.net;
import hv.xen;
import drivers.driver;
import drivers.xen_net;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_net_fake.hpp"

namespace {
using namespace fl;
using drivers::Feature;
using fake::Netback;
using fake::NetMachine;
using fake::NetOffer;
using io::Checksum;
using io::SendStatus;
constexpr u32 without(Feature f) { return to_underlying(f); }
constexpr Nanoseconds ms = 1'000'000;

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    usize count(std::string_view what) const {
        usize n = 0;
        for (usize at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
            ++n;
        }
        return n;
    }
    std::string text;
};

std::string frame(usize bytes, u32 seed = 1) {
    std::mt19937 random(seed);
    std::string text(bytes, 0);
    for (char& c : text) {
        c = static_cast<char>(random());
    }
    return text;
}
std::span<const std::byte> bytes(std::string_view text) {
    return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}
io::Task<Result<void>> send(io::NetDevice& card, std::string_view head, std::string_view body, Nanoseconds bound,
                            SendStatus& status, Checksum checksum = Checksum::unknown) {
    status = co_await card.send({bytes(head), bytes(body)}, bound, checksum);
    co_return Result<void>{};
}
SendStatus send(NetMachine& m, const std::string& text, usize head = 14, Checksum checksum = Checksum::unknown) {
    SendStatus status = SendStatus::not_sent;
    const std::string_view all = text;
    EXPECT_TRUE(m.run(send(m.card(), all.substr(0, head), all.substr(head), 100 * ms, status, checksum)));
    return status;
}

// ---- the wire ----

TEST(XenNetProtocol, GoldenBytes) {
    using namespace drivers::xen_net;
    auto text = [](const auto& v) { return std::string(reinterpret_cast<const char*>(&v), sizeof v); };
    EXPECT_EQ(text(TxRequest{0x01020304, 0x506, tx_checksum_blank | tx_data_validated | tx_more_data, 0x708, 0x90a}),
              std::string("\x04\x03\x02\x01\x06\x05\x07\x00\x08\x07\x0a\x09", 12));
    EXPECT_EQ(tx_extra_info, 8);
    EXPECT_EQ(text(RxRequest{0x102, 0, 0x03040506}), std::string("\x02\x01\0\0\x06\x05\x04\x03", 8));
    TxResponse answer;
    std::memcpy(&answer, "\x02\x01\xfe\xff", 4);
    EXPECT_EQ(answer.id, 0x102);
    EXPECT_EQ(answer.status, status_dropped);
    RxResponse received;
    std::memcpy(&received, "\x02\x01\x04\x03\x0f\x00\xea\x05", 8);
    EXPECT_EQ(received.id, 0x102);
    EXPECT_EQ(received.offset, 0x304);
    EXPECT_EQ(received.flags, rx_data_validated | rx_checksum_blank | rx_more_data | rx_extra_info);
    EXPECT_EQ(received.status, 1514);
    ExtraInfo extra;
    std::memcpy(&extra, "\x01\x01\xaa\x05\x01\0\0\0", 8);
    EXPECT_EQ(extra.type, extra_gso);
    EXPECT_EQ(extra.flags, extra_more);
    EXPECT_EQ(extra.data[0], 0xaa);
}

TEST(XenNetProtocol, HardwareAddresses) {
    using drivers::xen_net::parse_mac;
    EXPECT_EQ(parse_mac("00:16:3e:aB:C0:ff"), (io::MacAddress{{0, 0x16, 0x3e, 0xab, 0xc0, 0xff}}));
    for (const char* wrong : {"", "00:16:3e:01:02", "00:16:3e:01:02:3", "00:16:3e:01:02:03:04", "00-16-3e-01-02-03",
                              "00:16:3e:01:02:0g", "01:16:3e:01:02:03", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00",
                              "0:016:3e:01:02:03", "00:16:3e:01:02:03 ", "00:16:3e:01:02: 3"}) {
        EXPECT_FALSE(parse_mac(wrong)) << wrong;
    }
}

// ---- connecting ----

struct Variant {
    const char* name;
    NetOffer offer;
    u32 withheld = 0;
    std::string_view features;
    u32 mtu = 1500;
    u32 processors = 1;
    u32 domain = 0; // of the back end
};
class XenNetVariant : public testing::TestWithParam<Variant> {};

TEST_P(XenNetVariant, SendsAndReceivesAndLeavesNothingGranted) {
    const Variant& v = GetParam();
    NetMachine m(v.offer, v.withheld, v.processors, 2, v.domain);
    m.back.echo = true;
    m.open();
    EXPECT_EQ(m.card().identity().features.view(), v.features);
    EXPECT_EQ(m.card().identity().mac, (io::MacAddress{{0, 0x16, 0x3e, 1, 2, 3}}));
    EXPECT_EQ(m.card().identity().mtu, v.mtu);
    EXPECT_EQ(m.card().identity().name.view(), "eth0");
    EXPECT_EQ(m.sink.number, 2u);
    EXPECT_EQ(m.back.state(), 4u);
    EXPECT_EQ(m.back.front_state(), 4u);
    EXPECT_TRUE(m.back.rx_notify);
    const u32 grants = m.xen.live_grants();
    const u64 memory = m.xen.memory.outstanding;
    std::vector<std::string> sent;
    for (u32 i = 0; i < 300; ++i) { // more than the rings hold
        sent.push_back(frame(14 + i * 7919 % (m.card().max_frame() - 13), i));
        ASSERT_EQ(send(m, sent.back(), 14 + i % (sent.back().size() - 13)), SendStatus::sent) << i;
    }
    m.pass(5 * ms);
    ASSERT_EQ(m.back.sent.size(), sent.size());
    ASSERT_EQ(m.receiver.got.size(), sent.size());
    u64 octets = 0;
    for (u32 i = 0; i < sent.size(); ++i) {
        ASSERT_EQ(m.back.sent[i].bytes, sent[i]) << i;
        ASSERT_EQ(m.back.sent[i].flags & 3, 0);
        ASSERT_EQ(m.receiver.got[i].bytes, sent[i]) << i;
        octets += sent[i].size();
    }
    const io::NetCounters& counters = m.card().counters();
    EXPECT_EQ(counters.sent, 300u);
    EXPECT_EQ(counters.received, 300u);
    EXPECT_EQ(counters.sent_octets, octets);
    EXPECT_EQ(counters.received_octets, octets);
    EXPECT_EQ(counters.send_errors + counters.receive_errors + counters.device_accesses, 0u);
    EXPECT_EQ(counters.notifications, counters.hypercalls);
    EXPECT_EQ(m.xen.live_grants(), grants) << "no grant operation per frame";
    EXPECT_EQ(m.xen.memory.outstanding, memory) << "no memory per frame";
    m.back.put("online", 0);
    m.back.go(5);
    m.pass(50 * ms);
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(m.back.front_state(), 6u);
    EXPECT_EQ(m.xen.live_grants(), 0u);
    EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{2});
}

constexpr u32 all_features = without(Feature::scatter) | without(Feature::checksum) | without(Feature::multi_queue);
const Variant variants[] = {
    {"plain", {.scatter = false, .no_checksums = true}, 0, ""},
    {"scatter", {.no_checksums = true}, 0, "scatter-gather"},
    {"checksum", {.scatter = false}, 0, "checksum"},
    {"everything", {.mtu = 9000}, 0, "scatter-gather checksum", 9000},
    {"longest", {.mtu = 65521}, 0, "scatter-gather checksum", 65521},
    {"too_long", {.mtu = 70000}, 0, "scatter-gather checksum", 65521},
    {"too_long_for_a_page", {.mtu = 9000, .scatter = false}, 0, "checksum", 1500},
    {"short_mtu", {.mtu = 67}, 0, "scatter-gather checksum", 1500},
    {"small_mtu", {.mtu = 68}, 0, "scatter-gather checksum", 68},
    {"all_withheld", {.mtu = 9000, .queues = 4}, all_features, "", 1500, 2},
    {"garbage", {.extra = {{"feature-sg", "yes"}, {"multi-queue-max-queues", "-1"}}}, 0, "checksum"},
    {"missing", {.extra = {{"feature-sg", "-"}, {"feature-no-csum-offload", "-"}}}, 0, "checksum"},
    {"driver_domain", {}, 0, "scatter-gather checksum", 1500, 1, 3},
    {"one_processor", {.queues = 4}, 0, "scatter-gather checksum"},
};
INSTANTIATE_TEST_SUITE_P(All, XenNetVariant, testing::ValuesIn(variants),
                         [](const auto& info) { return info.param.name; });

TEST(XenNet, PublishesWhatTheBackEndReads) {
    NetMachine m({.queues = 4});
    ASSERT_TRUE(m.probe());
    const std::vector<std::pair<std::string, std::string>> keys{
        {"request-rx-copy", "1"},         {"feature-rx-notify", "1"},         {"feature-sg", "1"},
        {"feature-no-csum-offload", "0"}, {"feature-ipv6-csum-offload", "1"}, {"multi-queue-num-queues", "1"}};
    for (const auto& [key, value] : keys) {
        EXPECT_EQ(m.back.key(key), value) << key;
    }
    EXPECT_FALSE(m.back.has("feature-gso-tcpv4"));
    EXPECT_FALSE(m.back.has("queue-0/tx-ring-ref"));
    NetMachine least({}, all_features);
    ASSERT_TRUE(least.probe());
    EXPECT_EQ(least.back.key("feature-sg"), "0");
    EXPECT_EQ(least.back.key("feature-no-csum-offload"), "1");
    EXPECT_EQ(least.back.key("feature-ipv6-csum-offload"), "0");
    EXPECT_FALSE(least.back.has("multi-queue-num-queues"));
}

TEST(XenNet, OneQueueForEachProcessor) {
    NetMachine m({.queues = 2}, 0, 3);
    m.open();
    EXPECT_EQ(m.card().identity().features.view(), "scatter-gather checksum multi-queue");
    ASSERT_EQ(m.card().lanes(), 2u);
    ASSERT_EQ(m.back.queues.size(), 2u);
    EXPECT_EQ(m.back.key("multi-queue-num-queues"), "2");
    EXPECT_FALSE(m.back.has("tx-ring-ref"));
    io::NetDevice& second = m.card().lane(1);
    EXPECT_EQ(&m.card().lane(0), &m.card());
    EXPECT_EQ(second.lanes(), 1u);
    EXPECT_EQ(&second.executor(), m.executors[1]);
    EXPECT_EQ(second.identity().mac, m.card().identity().mac);
    fake::Receiver other;
    second.set_receiver(&other);
    const std::string text = frame(100);
    m.back.deliver(text, 0, 1);
    EXPECT_EQ(second.send_now({bytes(text)}), SendStatus::sent);
    m.pass(ms);
    ASSERT_EQ(other.got.size(), 1u);
    EXPECT_EQ(other.got[0].bytes, text);
    EXPECT_TRUE(m.receiver.got.empty());
    ASSERT_EQ(m.back.sent.size(), 1u);
    EXPECT_EQ(m.back.sent[0].queue, 1u);
    EXPECT_EQ(second.counters().sent, 1u);
    EXPECT_EQ(m.card().counters().sent, 0u);
    // What one lane finds closes all, with one line.
    Capture log;
    m.back.deliver({{.data = text, .id = 0x7777}}, 1);
    m.pass(50 * ms);
    EXPECT_FALSE(second.is_open());
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(m.receiver.changes + other.changes, 2u);
    EXPECT_EQ(log.count("closed:"), 1u) << log.text;
    EXPECT_EQ(m.back.front_state(), 6u);
    EXPECT_EQ(m.xen.live_grants(), 0u);
}

TEST(XenNet, ImpossibleCardsAreRefused) {
    for (const NetOffer& offer : std::vector<NetOffer>{{.mac = "nonsense"},
                                                       {.mac = "01:00:5e:00:00:01"},
                                                       {.copies = false},
                                                       {.never_connects = true},
                                                       {.closes_instead = true}}) {
        SCOPED_TRACE(offer.mac + (offer.copies ? "" : " flips") + (offer.closes_instead ? " closes" : ""));
        NetMachine m(offer);
        const auto probed = m.probe();
        ASSERT_FALSE(probed);
        EXPECT_EQ(probed.error().code, !offer.copies          ? Code::not_supported
                                       : offer.never_connects ? Code::timed_out
                                       : offer.closes_instead ? Code::device_gone
                                                              : Code::protocol);
        EXPECT_EQ(m.sink.card, nullptr);
        EXPECT_EQ(m.xen.live_grants(), 0u);
        EXPECT_EQ(m.xen.memory.outstanding, fake::backend_pages * 4096)
            << "only the shared page and the grant table are left";
        EXPECT_EQ(m.xen.open_ports.size(), 0u);
    }
}

TEST(XenNet, ACardOfAnotherDriverIsLeftAlone) {
    NetMachine taken({});
    taken.sink.offer = false;
    EXPECT_TRUE(taken.probe());
    EXPECT_EQ(taken.back.front_state(), 1u) << "untouched";
    EXPECT_EQ(taken.sink.left, (std::vector<std::pair<std::string, drivers::Unused>>{{"0", drivers::Unused::taken}}));
    NetMachine busy({});
    busy.sink.refuse = true;
    EXPECT_EQ(busy.probe().error().code, Code::busy);
    EXPECT_EQ(busy.back.front_state(), 6u);
    EXPECT_EQ(busy.xen.live_grants(), 0u);
    EXPECT_EQ(busy.xen.memory.outstanding, fake::backend_pages * 4096);
    NetMachine without_sink({});
    without_sink.environment.nets = nullptr;
    EXPECT_EQ(without_sink.probe().error().code, Code::not_supported);
    NetMachine disk({});
    disk.device.type = FixedText<40>("vbd");
    EXPECT_EQ(disk.probe().error().code, Code::not_supported);
}

TEST(XenNet, APredecessorIsDisconnectedFirst) {
    NetMachine m({});
    m.xen.tree[m.back.front + "/state"] = "4";
    m.back.echo = true;
    m.open();
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 1u);
}

TEST(XenNet, ShortMemoryAndFewGrantsGiveFewerBuffers) {
    NetMachine grants({.mtu = 9000});
    grants.xen.grant_frames_limit = 1; // 504 entries
    std::vector<hv::xen::GrantRef> held;
    ASSERT_TRUE(grants.install());
    while (grants.guest.grants().obtainable() > 110) {
        held.push_back(*grants.guest.grants().take());
    }
    ASSERT_TRUE(grants.start());
    ASSERT_TRUE(grants.run(drivers::xen_net::probe(grants.environment, grants.guest, grants.device)));
    grants.sink.card->set_receiver(&grants.receiver);
    grants.back.echo = true;
    for (u32 i = 0; i < 100; ++i) {
        ASSERT_EQ(send(grants, frame(9014, i)), SendStatus::sent);
    }
    grants.pass(5 * ms);
    EXPECT_EQ(grants.receiver.got.size(), 100u);
    NetMachine none({});
    none.xen.grant_frames_limit = 1;
    ASSERT_TRUE(none.install());
    while (none.guest.grants().obtainable() > 60) {
        held.push_back(*none.guest.grants().take());
    }
    ASSERT_TRUE(none.start());
    const u32 before = none.xen.live_grants();
    EXPECT_EQ(none.run(drivers::xen_net::probe(none.environment, none.guest, none.device)).error().code,
              Code::exhausted);
    EXPECT_EQ(none.xen.live_grants(), before);
    EXPECT_EQ(none.guest.grants().obtainable(), 60u);
}

TEST(XenNet, WithoutGrantsForAnotherQueueThereIsOne) {
    NetMachine m({.queues = 2}, 0, 2);
    m.xen.grant_frames_limit = 1;
    ASSERT_TRUE(m.install());
    while (m.guest.grants().obtainable() > 250) { // 194 for the first queue, at least 66 for the second
        static_cast<void>(m.guest.grants().take());
    }
    ASSERT_TRUE(m.start());
    ASSERT_TRUE(m.run(drivers::xen_net::probe(m.environment, m.guest, m.device)));
    EXPECT_EQ(m.card().lanes(), 1u);
    EXPECT_EQ(m.card().identity().features.view(), "scatter-gather checksum");
    EXPECT_EQ(m.back.key("multi-queue-num-queues"), "1");
    EXPECT_EQ(m.guest.grants().obtainable(), 250u - 194) << "what the second one took is given back";
    m.card().set_receiver(&m.receiver);
    m.back.echo = true;
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 1u);
}

// What is short, and how much of it there is when it is as much as a card with this many queues takes.
struct Shortage {
    const char* name;
    void (*limit)(NetMachine& machine, const NetMachine& sufficient);
    std::string_view why;
};
class XenNetShortage : public testing::TestWithParam<Shortage> {};

TEST_P(XenNetShortage, GoesOnWithTheQueuesThatThereAre) {
    for (const u32 enough : {1u, 2u}) {
        NetMachine sufficient({.queues = enough}, 0, 3);
        sufficient.open();
        NetMachine m({.queues = 3}, 0, 3);
        m.back.echo = true;
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
        GetParam().limit(m, sufficient);
        const u32 grants = m.guest.in_use().grants;
        Capture log;
        const auto probed = m.run(drivers::xen_net::probe(m.environment, m.guest, m.device));
        ASSERT_TRUE(probed) << probed.error().message;
        ASSERT_EQ(m.card().lanes(), enough);
        EXPECT_EQ(m.back.queues.size(), enough);
        EXPECT_EQ(m.back.key("multi-queue-num-queues"), std::to_string(enough));
        const std::string line = "xen_net: device/vif/0: " + std::to_string(enough) + " of 3 queues: ";
        EXPECT_EQ(log.count(line + std::string(GetParam().why)), 1u) << log.text;
        EXPECT_EQ(m.guest.in_use().grants - grants, sufficient.guest.in_use().grants)
            << "what the last one took is free";
        EXPECT_EQ(m.guest.in_use().event_channels, sufficient.guest.in_use().event_channels);
        EXPECT_EQ(m.xen.memory.outstanding, sufficient.xen.memory.outstanding);
        std::array<fake::Receiver, 2> receivers;
        for (u32 lane = 0; lane < enough; ++lane) {
            m.card().lane(lane).set_receiver(&receivers[lane]);
            EXPECT_EQ(m.card().lane(lane).send_now({bytes(frame(60))}), SendStatus::sent);
        }
        m.pass(ms);
        for (u32 lane = 0; lane < enough; ++lane) {
            EXPECT_EQ(receivers[lane].got.size(), 1u) << lane;
            m.card().lane(lane).set_receiver(nullptr);
        }
        m.back.detach();
        m.pass(100 * ms);
        EXPECT_EQ(m.xen.live_grants(), 0u);
    }
}

const Shortage shortages[] = {
    {"grants",
     [](NetMachine& m, const NetMachine& sufficient) {
         while (m.guest.grants().obtainable() > sufficient.guest.in_use().grants + 60) {
             static_cast<void>(m.guest.grants().take());
         }
     },
     "a network card needs more memory or grant entries than there are"},
    {"memory",
     [](NetMachine& m, const NetMachine& sufficient) { m.xen.memory.most = sufficient.xen.memory.outstanding; }, ""},
    {"event_channels",
     [](NetMachine& m, const NetMachine& sufficient) { m.xen.most_ports = sufficient.xen.open_ports.size(); },
     "Xen gives no event channel"},
};
INSTANTIATE_TEST_SUITE_P(All, XenNetShortage, testing::ValuesIn(shortages),
                         [](const auto& i) { return std::string(i.param.name); });

// ---- sending ----

TEST(XenNet, ChecksumsAreLeftToTheBackEndIfItWants) {
    NetMachine m({});
    m.open();
    ASSERT_TRUE(m.card().offloads_checksums());
    EXPECT_EQ(send(m, frame(60), 60, Checksum::partial), SendStatus::sent);
    EXPECT_EQ(send(m, frame(60), 60), SendStatus::sent);
    m.pass(ms);
    ASSERT_EQ(m.back.sent.size(), 2u);
    EXPECT_EQ(m.back.sent[0].flags, 3);
    EXPECT_EQ(m.back.sent[1].flags, 0);
    NetMachine none({.no_checksums = true});
    none.open();
    EXPECT_FALSE(none.card().offloads_checksums());
}

TEST(XenNet, LongFramesHaveSeveralSlots) {
    NetMachine m({.mtu = 65521});
    m.open();
    for (const usize size : {4096u, 4097u, 8192u, 65535u}) {
        EXPECT_EQ(send(m, frame(size), 5000 % size + 14), SendStatus::sent);
    }
    EXPECT_EQ(send(m, frame(65536)), SendStatus::too_long);
    EXPECT_EQ(send(m, frame(13), 13), SendStatus::too_short);
    m.pass(ms);
    ASSERT_EQ(m.back.sent.size(), 4u);
    EXPECT_EQ(m.back.sent[0].slots, 1u);
    EXPECT_EQ(m.back.sent[1].slots, 2u);
    EXPECT_EQ(m.back.sent[2].slots, 2u);
    EXPECT_EQ(m.back.sent[3].slots, 16u);
}

TEST(XenNet, OneNotificationForATurn) {
    NetMachine m({});
    m.open();
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent); // a new ring raises an event for its first response
    m.pass(ms);
    const io::NetCounters before = m.card().counters();
    for (u32 i = 0; i < 30; ++i) {
        EXPECT_EQ(m.card().send_now({bytes(frame(60, i))}), SendStatus::sent);
    }
    m.pass(ms);
    EXPECT_EQ(m.back.sent.size(), 31u);
    const io::NetCounters used = m.card().counters() - before;
    EXPECT_EQ(used.notifications, 1u);
    EXPECT_EQ(used.interrupts, 0u) << "nobody waits for the answers";
}

// A host may limit a card's rate: it then holds its slots for long, which is no fault. Senders have their own bounds.
TEST(XenNet, SendersWaitForRoomInOrderAndTheCardStaysOpen) {
    NetMachine m({});
    m.open();
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent); // a new ring raises an event for its first response
    m.pass(ms);
    m.back.sent.clear();
    m.back.hold = true;
    const std::string text = frame(60);
    for (u32 i = 0; i < 64; ++i) {
        ASSERT_EQ(m.card().send_now({bytes(text)}), SendStatus::sent);
    }
    EXPECT_EQ(m.card().send_now({bytes(text)}), SendStatus::timed_out);
    SendStatus late = SendStatus::not_sent;
    EXPECT_TRUE(m.run(send(m.card(), text, "", 50 * ms, late)));
    EXPECT_EQ(late, SendStatus::timed_out);
    m.pass(60'000 * ms);
    EXPECT_TRUE(m.card().is_open());
    std::array<SendStatus, 3> waiting{SendStatus::not_sent, SendStatus::not_sent, SendStatus::not_sent};
    std::array<std::string, 3> texts{frame(100, 2), frame(200, 3), frame(300, 4)};
    io::TaskGroup group(m.executor);
    for (u32 i = 0; i < 3; ++i) {
        ASSERT_TRUE(group.spawn(send(m.card(), texts[i], "", 1000 * ms, waiting[i])));
    }
    m.pass(20 * ms);
    const u64 interrupts = m.card().counters().interrupts;
    m.back.answer(0, 16); // a quarter
    m.pass(ms);
    EXPECT_EQ(m.card().counters().interrupts, interrupts + 1);
    EXPECT_EQ(waiting, (std::array{SendStatus::sent, SendStatus::sent, SendStatus::sent}));
    ASSERT_EQ(m.back.sent.size(), 67u);
    for (u32 i = 0; i < 3; ++i) {
        EXPECT_EQ(m.back.sent[64 + i].bytes, texts[i]);
    }
}

TEST(XenNet, FramesThatTheBackEndDropsAreCountedOnce) {
    NetMachine m({.mtu = 9000});
    m.open();
    m.back.tx_status = -1;
    EXPECT_EQ(send(m, frame(9000)), SendStatus::sent); // three slots
    m.back.tx_status = -2;
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.pass(ms);
    m.back.tx_status = 0;
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.card().counters().send_errors, 2u);
    EXPECT_TRUE(m.card().is_open());
}

// ---- receiving ----

TEST(XenNet, ReceivesInPiecesAtAnyPlaceInThePage) {
    NetMachine m({.mtu = 9000});
    m.open();
    m.back.deliver(frame(1514), 0, 0, 4096, 2582); // ends with the page
    m.back.deliver(frame(9014, 2), 0, 0, 600, 17); // 16 slots
    m.back.deliver(frame(9018, 3), 0, 0, 501);     // 18 slots, with a VLAN tag
    m.back.deliver(frame(14, 4));
    m.back.deliver({{.data = frame(60, 5), .flags = 4}, {.data = "", .flags = 0}}); // an empty slot at its end
    m.pass(ms);
    ASSERT_EQ(m.receiver.got.size(), 5u);
    EXPECT_EQ(m.receiver.got[0].bytes, frame(1514));
    EXPECT_EQ(m.receiver.got[1].bytes, frame(9014, 2));
    EXPECT_EQ(m.receiver.got[2].bytes, frame(9018, 3));
    EXPECT_EQ(m.receiver.got[3].bytes, frame(14, 4));
    EXPECT_EQ(m.receiver.got[4].bytes, frame(60, 5));
    EXPECT_EQ(m.card().counters().receive_errors, 0u);
}

TEST(XenNet, ChecksumStateOfReceivedFrames) {
    NetMachine m({});
    m.open();
    for (const u16 flags : {0, 1, 2, 3}) {
        m.back.deliver(frame(60), flags);
    }
    m.pass(ms);
    ASSERT_EQ(m.receiver.got.size(), 4u);
    EXPECT_EQ(m.receiver.got[0].checksum, Checksum::unknown);
    EXPECT_EQ(m.receiver.got[1].checksum, Checksum::verified);
    EXPECT_EQ(m.receiver.got[2].checksum, Checksum::partial);
    EXPECT_EQ(m.receiver.got[3].checksum, Checksum::partial) << "the field holds only the pseudo header's sum";
}

TEST(XenNet, ABurstCostsOneInterrupt) {
    NetMachine m({});
    m.open();
    m.pass(ms);
    const io::NetCounters before = m.card().counters();
    for (u32 i = 0; i < 1000; ++i) { // more than there are buffers: the rest waits until they are given back
        m.back.deliver(frame(60, i));
    }
    m.pass(5 * ms);
    ASSERT_EQ(m.receiver.got.size(), 1000u);
    for (u32 i = 0; i < 1000; ++i) {
        ASSERT_EQ(m.receiver.got[i].bytes, frame(60, i));
    }
    const io::NetCounters used = m.card().counters() - before;
    EXPECT_LE(used.interrupts, 1000u / 128 + 2);
    EXPECT_LE(used.notifications, 1000u / 128 + 2) << "only when the back end waits for buffers";
    EXPECT_NE(used.notifications, 0u);
    EXPECT_NE(m.back.short_of_buffers, 0u);
}

TEST(XenNet, AnEventStormWithoutFramesCostsOneInterruptBeforeEachSleep) {
    NetMachine m({});
    m.open();
    m.pass(ms);
    const u64 before = m.card().counters().interrupts;
    u32 raised = 0;
    m.world.device = [&] {
        if (raised < 10'000) {
            ++raised;
            m.xen.raise(m.back.queues[0].port);
        }
        return m.back.step();
    };
    m.pass(10 * ms);
    EXPECT_LE(m.card().counters().interrupts - before, 10'000u);
    EXPECT_TRUE(m.card().is_open());
    m.back.deliver(frame(60));
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 1u);
}

// A back end that sends on while frames are being taken causes no interrupts: the port is masked until the next sleep.
TEST(XenNet, NoInterruptsWhileTheLaneIsBusy) {
    NetMachine m({});
    m.open();
    m.pass(ms);
    const u64 before = m.card().counters().interrupts;
    m.receiver.during = [&](io::NetDevice&, std::span<const std::byte>) {
        m.xen.raise(m.back.queues[0].port);
        m.xen.deliver();
    };
    for (u32 i = 0; i < 60; ++i) {
        m.back.deliver(frame(60, i));
    }
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 60u);
    EXPECT_EQ(m.card().counters().interrupts, before + 1);
}

TEST(XenNet, AReceivedFrameIsPrivate) {
    NetMachine m({});
    m.open();
    m.back.scribble = true;
    bool same = false;
    m.receiver.during = [&](io::NetDevice&, std::span<const std::byte> given) {
        const std::string first(reinterpret_cast<const char*>(given.data()), given.size());
        std::memset(m.back.last_page, 0xee, 4096); // the back end may write to its page at any time
        same = first == std::string(reinterpret_cast<const char*>(given.data()), given.size());
    };
    m.back.deliver(frame(60));
    m.pass(ms);
    EXPECT_TRUE(same);
    ASSERT_EQ(m.receiver.got.size(), 1u);
}

TEST(XenNet, AReceiverMaySend) {
    NetMachine m({});
    m.open();
    u32 sent = 0;
    m.receiver.during = [&](io::NetDevice& lane, std::span<const std::byte> given) {
        sent += lane.send_now({given}) == SendStatus::sent ? 1 : 0;
    };
    for (u32 i = 0; i < 40; ++i) {
        m.back.deliver(frame(100, i));
    }
    m.pass(2 * ms);
    EXPECT_EQ(sent, 40u);
    ASSERT_EQ(m.back.sent.size(), 40u);
    EXPECT_EQ(m.back.sent[39].bytes, frame(100, 39));
}

// ---- damage, which costs a frame ----

using Slots = std::vector<Netback::Slot>;
struct Damage {
    const char* name;
    Slots slots;
    bool good = false;
};
class XenNetDamage : public testing::TestWithParam<Damage> {};

TEST_P(XenNetDamage, OnlyThisFrameIsLost) {
    NetMachine m({});
    m.open();
    m.back.deliver(GetParam().slots);
    m.back.deliver(frame(77));
    m.pass(ms);
    EXPECT_TRUE(m.card().is_open());
    ASSERT_EQ(m.receiver.got.size(), GetParam().good ? 2u : 1u);
    EXPECT_EQ(m.receiver.got.back().bytes, frame(77));
    EXPECT_EQ(m.card().counters().receive_errors, GetParam().good ? 0u : 1u);
}

std::array<u8, 8> extra(u8 type, u8 flags) { return {type, flags, 0xaa, 5, 1, 0, 0, 0}; }
const Damage damages[] = {
    {"error", {{.status = -1}}},
    {"dropped", {{.status = -2}}},
    {"unknown_status", {{.status = -32768}}},
    {"error_in_the_middle", {{.data = frame(60), .flags = 4}, {.flags = 4, .status = -1}, {.data = frame(60)}}},
    {"empty", {{.data = ""}}},
    {"no_whole_header", {{.data = frame(13)}}},
    {"longer_than_the_mtu", {{.data = frame(1519)}}},
    {"longer_in_pieces", {{.data = frame(1000), .flags = 4}, {.data = frame(1000), .flags = 4}, {.data = frame(9)}}},
    {"gso", {{.data = frame(60), .flags = 8}, {.extra = extra(1, 0)}}},
    {"gso_prefix", {{.data = "", .flags = 16 | 4}, {.data = frame(60)}}},
    {"extra_of_no_type", {{.data = frame(60), .flags = 8}, {.extra = extra(0, 0)}}},
    {"extra_of_unknown_type", {{.data = frame(60), .flags = 8}, {.extra = extra(200, 0)}}, true},
    {"extras_and_data",
     {{.data = frame(60), .flags = 8 | 4}, {.extra = extra(2, 1)}, {.extra = extra(4, 0)}, {.data = frame(60)}},
     true},
    {"extra_in_a_later_slot", {{.data = frame(60), .flags = 4}, {.data = frame(60), .flags = 8}}, true},
};
INSTANTIATE_TEST_SUITE_P(All, XenNetDamage, testing::ValuesIn(damages),
                         [](const auto& info) { return info.param.name; });

// ---- violations, which close the card ----

struct Violation {
    const char* name;
    std::string_view rule;
    std::function<void(NetMachine&)> commit; // three requests are held
};
class XenNetHostile : public testing::TestWithParam<Violation> {};

TEST_P(XenNetHostile, ClosesTheCardWithOneLine) {
    NetMachine m({});
    m.open();
    m.back.hold = true;
    for (u32 i = 0; i < 3; ++i) {
        ASSERT_EQ(send(m, frame(60, i)), SendStatus::sent);
    }
    m.pass(ms);
    m.back.deliver(frame(77));
    m.pass(ms);
    ASSERT_EQ(m.receiver.got.size(), 1u);
    std::array<std::byte, 64> canary{};
    Capture log;
    GetParam().commit(m);
    m.back.always_notify = true;
    m.xen.raise(m.back.queues[0].port);
    m.pass(300 * ms);
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(log.count("closed:"), 1u) << log.text;
    EXPECT_EQ(log.count(GetParam().rule), 1u) << log.text;
    EXPECT_FALSE(m.receiver.open) << "the receiver knows";
    EXPECT_EQ(m.receiver.got.size(), 1u);
    EXPECT_EQ(send(m, frame(60)), SendStatus::device_gone);
    EXPECT_EQ(m.back.front_state(), 6u);
    EXPECT_EQ(m.xen.live_grants(), 0u) << "nothing can be reached any more";
    EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{0});
    EXPECT_EQ(canary, (std::array<std::byte, 64>{}));
}

Netback::Queue& queue(NetMachine& m) { return m.back.queues[0]; }
u16 held_id(NetMachine& m, usize i) { return fake::Xen::field<u16>(reinterpret_cast<u64>(queue(m).held[i].data()), 8); }
void respond(NetMachine& m, u16 id, i16 status = 0) {
    m.back.put_tx(queue(m), id, status);
    m.back.push_tx(queue(m));
}
Slots many(u32 slots) {
    Slots list;
    for (u32 i = 0; i < slots; ++i) {
        list.push_back({.data = std::string(20, 'x'), .flags = static_cast<u16>(i + 1 < slots ? 4 : 0)});
    }
    return list;
}
const Violation violations[] = {
    {"tx_unknown_id", "an id that is not in flight", [](NetMachine& m) { respond(m, 0x7fff); }},
    {"tx_free_slot", "an id that is not in flight", [](NetMachine& m) { respond(m, held_id(m, 0) ^ 0x20); }},
    {"tx_old_generation", "an id that is not in flight",
     [](NetMachine& m) { respond(m, static_cast<u16>(held_id(m, 0) + 64)); }},
    {"tx_repeated_id", "an id that is not in flight",
     [](NetMachine& m) {
         respond(m, held_id(m, 1));
         respond(m, held_id(m, 1));
     }},
    {"tx_status", "a status that the network interface does not define",
     [](NetMachine& m) { respond(m, held_id(m, 0), -3); }},
    {"tx_status_null", "a status that the network interface does not define", // only for extra infos
     [](NetMachine& m) { respond(m, held_id(m, 0), 1); }},
    {"tx_more_than_asked", "the producer's position",
     [](NetMachine& m) {
         for (u32 i = 0; i < 4; ++i) {
             m.back.put_tx(queue(m), held_id(m, i % 3), 0);
         }
         m.back.push_tx(queue(m));
     }},
    {"tx_far_ahead", "the producer's position", [](NetMachine& m) { Netback::word(queue(m).tx, 8) += 0x10000; }},
    {"tx_behind", "the producer's position", [](NetMachine& m) { Netback::word(queue(m).tx, 8) -= 1; }},
    {"rx_far_ahead", "the producer's position", [](NetMachine& m) { Netback::word(queue(m).rx, 8) += 129; }},
    {"rx_behind", "the producer's position", [](NetMachine& m) { Netback::word(queue(m).rx, 8) -= 1; }},
    {"rx_other_id", "another id than the request in its slot",
     [](NetMachine& m) { m.back.deliver(Slots{{.data = frame(60), .id = 0x1234}}); }},
    {"rx_id_of_the_last_lap", "another id than the request in its slot",
     [](NetMachine& m) { m.back.deliver(Slots{{.data = frame(60), .id = 1 + 128}}); }},
    {"rx_offset", "data beyond its page", [](NetMachine& m) { m.back.deliver(Slots{{.offset = 4097, .status = 60}}); }},
    {"rx_end", "data beyond its page", [](NetMachine& m) { m.back.deliver(Slots{{.offset = 4000, .status = 97}}); }},
    {"rx_length", "data beyond its page", [](NetMachine& m) { m.back.deliver(Slots{{.status = 0x7fff}}); }},
    {"rx_length_of_a_later_slot", "data beyond its page",
     [](NetMachine& m) { m.back.deliver(Slots{{.data = frame(60), .flags = 4}, {.status = 4097}}); }},
    {"rx_many_slots", "more slots than the network interface permits", [](NetMachine& m) { m.back.deliver(many(19)); }},
    {"rx_endless_frame", "more slots than the network interface permits",
     [](NetMachine& m) {
         for (u32 i = 0; i < 4; ++i) {
             Slots list = many(10);
             list.back().flags = 4;
             m.back.deliver(list);
         }
     }},
    {"rx_endless_extras", "more extra infos than the network interface permits",
     [](NetMachine& m) {
         Slots list{{.data = frame(60), .flags = 8}};
         for (u32 i = 0; i < 5; ++i) {
             list.push_back({.extra = extra(2, 1)});
         }
         m.back.deliver(list);
     }},
};
INSTANTIATE_TEST_SUITE_P(All, XenNetHostile, testing::ValuesIn(violations),
                         [](const auto& info) { return info.param.name; });

// ---- the end ----

TEST(XenNet, AClosingBackEndClosesTheCardAndEndsWhatWaits) {
    for (const u32 state : {5u, 6u}) {
        NetMachine m({});
        m.open();
        m.back.hold = true;
        const std::string text = frame(60);
        for (u32 i = 0; i < 64; ++i) {
            ASSERT_EQ(m.card().send_now({bytes(text)}), SendStatus::sent);
        }
        SendStatus waiting = SendStatus::not_sent;
        io::TaskGroup group(m.executor);
        ASSERT_TRUE(group.spawn(send(m.card(), text, "", 100'000 * ms, waiting)));
        m.pass(ms);
        Capture log;
        m.back.put("online", 0);
        m.back.go(state);
        m.pass(50 * ms);
        EXPECT_EQ(waiting, SendStatus::device_gone);
        EXPECT_FALSE(m.card().is_open());
        EXPECT_EQ(log.count("the back end has closed the device"), 1u);
        EXPECT_EQ(m.back.front_state(), 6u);
        EXPECT_EQ(m.xen.live_grants(), 0u);
        EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{0});
        EXPECT_EQ(m.xen.open_ports.size(), 0u);
    }
}

TEST(XenNet, PagesThatTheBackEndKeepsAreNotReused) {
    NetMachine m({.never_closes = true});
    m.open();
    std::set<u64> freed;
    const u64 before = m.xen.memory.outstanding;
    m.back.deliver(Slots{{.data = frame(60), .id = 0x1234}});
    m.pass(1000 * ms);
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(m.xen.memory.outstanding, before) << "they may still be written";
    EXPECT_NE(m.xen.live_grants(), 0u);
}

TEST(XenNet, ASilentBackEndDoesNotCloseTheCard) {
    NetMachine m({});
    m.open();
    m.back.dead = true;
    SendStatus status = SendStatus::not_sent;
    for (u32 i = 0; i < 64; ++i) {
        ASSERT_EQ(m.card().send_now({bytes(frame(60))}), SendStatus::sent);
    }
    EXPECT_TRUE(m.run(send(m.card(), frame(60), "", 500 * ms, status)));
    EXPECT_EQ(status, SendStatus::timed_out);
    m.pass(10'000 * ms);
    EXPECT_TRUE(m.card().is_open());
    m.back.dead = false;
    m.xen.sends[m.back.queues[0].port] = 1;
    m.pass(ms);
    EXPECT_EQ(m.back.sent.size(), 64u);
    EXPECT_EQ(m.card().send_now({bytes(frame(60))}), SendStatus::sent);
}

} // namespace
