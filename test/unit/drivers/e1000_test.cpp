#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.log;
import core.mmio;
import io.executor;
import io.task;
import io.block;
import io.net;
import drivers.driver;
import drivers.e1000;
import drivers.pci;

#include "unit/core/interrupt_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/e1000_fake.hpp"

namespace {
using namespace fl;
using io::SendStatus;
namespace e1000 = drivers::e1000;
constexpr Nanoseconds ms = 1'000'000;
constexpr Nanoseconds timeout = 200 * ms;
const std::string own_address("\x00\x16\x3e\x01\x02\x03", 6);

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

struct NoDisks final : drivers::DiskSink {
    bool offered(u32) override { return false; }
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice&, u32) override { return Error{Code::busy, "no disks here"}; }
};
struct Sink final : drivers::NetSink {
    u32 number_of(const io::MacAddress& address) override {
        addresses.push_back(address);
        return number;
    }
    bool offered(u32 n) override {
        asked.push_back(n);
        return offer;
    }
    FixedText<16> free_name() override { return FixedText<16>("eth0"); }
    Result<void> announce(io::NetDevice& c, u32 n) override {
        if (refuse) {
            return Error{Code::busy, "another driver has it"};
        }
        EXPECT_EQ(n, number);
        card = &c;
        return {};
    }
    void unused(const drivers::UnusedUnit& unit) override { left.emplace_back(std::string(unit.address), unit.why); }
    void withdraw(u32 n) override { withdrawn.push_back(n); }
    u32 number = 5;
    bool offer = true, refuse = false;
    std::vector<io::MacAddress> addresses;
    std::vector<u32> asked, withdrawn;
    std::vector<std::pair<std::string, drivers::Unused>> left;
    io::NetDevice* card = nullptr;
};
struct Receiver final : io::FrameReceiver {
    void receive(io::NetDevice& lane, std::span<const std::byte> frame, io::Checksum checksum) override {
        EXPECT_EQ(checksum, io::Checksum::unknown);
        got.emplace_back(reinterpret_cast<const char*>(frame.data()), frame.size());
        if (during) {
            during(lane);
        }
    }
    void link_changed(io::NetDevice& lane) override {
        ++changes;
        up = lane.link_up() && lane.is_open();
    }
    std::vector<std::string> got;
    u32 changes = 0;
    bool up = true;
    std::function<void(io::NetDevice&)> during;
};

struct Machine {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    test::Interrupts interrupts;
    NoDisks disks;
    Sink sink;
    Receiver receiver;
    pci_test::Space space;
    pci_test::Mapper mapper;
    e1000_fake::Nic nic;
    pci_test::Function& function;
    bool pending = false; // the line
    u32 lost_interrupts = 0;

    explicit Machine(u16 id = 0x100e) : function(space.add(0, 3, 0, 0x8086, id, 0x020000)) {
        function.set32(0x10, 0xfe00'0000);
        function.bar_mask[0] = 0xfffe'0000; // 128 KiB
        function.bytes[0x3c] = 11;
        function.bytes[0x3d] = 1;
        mapper.places[0xfe00'0000] = {&nic, 0x20000};
        nic.bus_master = false;
        space.written = [this](u32 at, u32, u32 value) {
            if (at == 4) {
                nic.bus_master = (value & 4) != 0;
            }
        };
        nic.interrupt = [this] { pending = true; };
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->deliver(); };
    }
    ~Machine() { EXPECT_EQ(nic.broken, std::set<std::string>{}); }
    /// The line is a level: it stays up while an unmasked cause is pending.
    void deliver() {
        if (std::exchange(pending, false) && nic.mask() != 0) {
            interrupts.raise(11);
        }
    }
    Result<void> probe() {
        drivers::Environment with{.executor = executor,
                                  .dma = dma,
                                  .interrupts = interrupts,
                                  .disks = disks,
                                  .timeout = timeout,
                                  .mmio = mapper,
                                  .nets = &sink};
        return executor.run(e1000::probe(with, *pci_test::pci::look_up(space, {0, 3, 0}), 0));
    }
    io::NetDevice& card() { return *sink.card; }
    void pass(Nanoseconds time) {
        EXPECT_TRUE(executor.run([](io::Executor& e, Nanoseconds n) -> io::Task<Result<void>> {
            co_await e.sleep(n);
            co_return Result<void>{};
        }(executor, time)));
    }
};
// Never destroyed: an attached card lives as long as its machine.
Machine& kept(u16 id = 0x100e) {
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(std::make_unique<Machine>(id));
    return *all.back();
}
Machine& attached(u16 id = 0x100e) {
    Machine& m = kept(id);
    const auto probed = m.probe();
    EXPECT_TRUE(probed) << probed.error().message;
    m.card().set_receiver(&m.receiver);
    m.pass(ms);
    return m;
}
void check(Machine& m) { EXPECT_EQ(m.nic.broken, std::set<std::string>{}); }

std::span<const std::byte> bytes(std::string_view text) {
    return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}
std::string frame(usize size, u32 seed = 1) {
    std::mt19937 random(seed);
    std::string text = own_address;
    while (text.size() < size) {
        text += static_cast<char>(random());
    }
    return text;
}
io::Task<Result<void>> send(io::NetDevice& card, std::string text, usize head, Nanoseconds bound, SendStatus& status) {
    status = co_await card.send({bytes(text).first(head), bytes(text).subspan(head)}, bound);
    co_return Result<void>{};
}
SendStatus send(Machine& m, const std::string& text, usize head = 14, Nanoseconds bound = 50 * ms) {
    SendStatus status = SendStatus::not_sent;
    EXPECT_TRUE(m.executor.run(send(m.card(), text, head, bound, status)));
    return status;
}

TEST(E1000, SendsAndReceivesWithoutAllocating) {
    for (const u16 id : {u16{0x100e}, u16{0x100f}}) {
        Machine& m = attached(id);
        m.nic.echo = true;
        const auto& identity = m.card().identity();
        EXPECT_EQ(identity.model.view(), id == 0x100e ? "Intel 82540EM" : "Intel 82545EM");
        EXPECT_EQ(identity.features.view(), "line");
        EXPECT_EQ(identity.driver, "e1000");
        EXPECT_EQ(identity.kind, io::Kind::emulated);
        EXPECT_EQ(identity.mac, (io::MacAddress{{0, 0x16, 0x3e, 1, 2, 3}}));
        EXPECT_EQ(identity.mtu, 1500u);
        EXPECT_EQ(m.sink.addresses, std::vector{identity.mac});
        EXPECT_EQ(m.sink.asked, std::vector<u32>{5});
        EXPECT_TRUE(m.card().link_up());
        const u32 memory = m.dma.outstanding;
        const u64 frames = io::frame_pool().allocations();
        std::vector<std::string> all;
        u64 octets = 0;
        for (u32 i = 0; i < 300; ++i) { // more than the rings hold
            all.push_back(frame(14 + i * 79 % 1501, i));
            ASSERT_EQ(m.card().send_now({bytes(all.back())}), SendStatus::sent) << i;
            octets += all.back().size();
            m.executor.turn();
            m.deliver();
            m.executor.turn();
        }
        m.pass(5 * ms);
        EXPECT_EQ(m.nic.sent, all);
        EXPECT_EQ(m.receiver.got, all);
        EXPECT_EQ(m.dma.outstanding, memory);
        EXPECT_LE(io::frame_pool().allocations() - frames, 2u) << "of pass(), none for a frame";
        const io::NetCounters& c = m.card().counters();
        EXPECT_EQ(c.sent, 300u);
        EXPECT_EQ(c.received, 300u);
        EXPECT_EQ(c.sent_octets, octets);
        EXPECT_EQ(c.received_octets, octets);
        EXPECT_EQ(c.send_errors + c.receive_errors, 0u);
        EXPECT_EQ(c.notifications, 300u);
        EXPECT_EQ(m.nic.lost, 0u);
        check(m);
    }
}

TEST(E1000, OneDoorbellForATurn) {
    Machine& m = attached();
    const u32 doorbells = m.nic.doorbells; // of the set-up
    for (u32 i = 0; i < 20; ++i) {
        EXPECT_EQ(m.card().send_now({bytes(frame(60, i))}), SendStatus::sent);
    }
    EXPECT_EQ(m.nic.doorbells, doorbells);
    m.executor.turn();
    EXPECT_EQ(m.nic.doorbells, doorbells + 1);
    EXPECT_EQ(m.nic.sent.size(), 20u);
    const u32 offers = m.nic.offers;
    for (u32 i = 0; i < 20; ++i) {
        EXPECT_TRUE(m.nic.receive(frame(60, i)));
    }
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 20u);
    EXPECT_EQ(m.nic.offers, offers + 1);
    check(m);
}

TEST(E1000, AFullRingMakesSendersWaitWithABound) {
    Machine& m = attached();
    m.nic.hold = true;
    for (u32 i = 0; i < e1000::ring_entries - 1; ++i) {
        ASSERT_EQ(send(m, frame(100, i)), SendStatus::sent) << i;
    }
    EXPECT_EQ(m.nic.in_ring(), e1000::ring_entries - 1);
    EXPECT_EQ(m.nic.unmasks_txdw, 0u) << "nobody waits";
    EXPECT_EQ(send(m, frame(100), 14, 20 * ms), SendStatus::timed_out);
    EXPECT_NE(m.nic.unmasks_txdw, 0u);
    SendStatus status = SendStatus::not_sent;
    io::TaskGroup group(m.executor);
    EXPECT_TRUE(group.spawn(send(m.card(), frame(100, 77), 14, 100 * ms, status)));
    m.pass(5 * ms);
    EXPECT_EQ(status, SendStatus::not_sent);
    m.nic.hold = false;
    m.nic.send();
    m.pass(15 * ms);
    EXPECT_EQ(status, SendStatus::sent);
    EXPECT_EQ(m.nic.sent.size(), e1000::ring_entries);
    EXPECT_EQ(m.nic.sent.back(), frame(100, 77));
    EXPECT_EQ(m.card().counters().send_errors, 0u);
    check(m);
}

TEST(E1000, TheRingWrapsInEveryPlace) {
    Machine& m = attached();
    for (u32 round = 0; round < 40; ++round) {
        for (u32 i = 0; i < 1 + round % 61; ++i) {
            ASSERT_TRUE(m.nic.receive(frame(60 + round + i, round))) << round;
        }
        m.pass(ms);
        ASSERT_EQ(m.receiver.got.size(), 1 + round % 61);
        for (u32 i = 0; i < m.receiver.got.size(); ++i) {
            ASSERT_EQ(m.receiver.got[i], frame(60 + round + i, round));
        }
        m.receiver.got.clear();
    }
    check(m);
}

TEST(E1000, DamageCostsAFrame) {
    Machine& m = attached();
    for (const u64 error : {0x01, 0x02, 0x04, 0x10, 0x80}) { // CE SE SEQ CXE RXE
        EXPECT_TRUE(m.nic.receive(frame(60), error));
    }
    EXPECT_TRUE(m.nic.put(frame(13), 3)); // no whole header
    EXPECT_TRUE(m.nic.put({}, 3));
    // Longer than a buffer: two descriptors, of which only the last one ends the frame.
    EXPECT_TRUE(m.nic.put(std::string(2048, 'a'), 1));
    EXPECT_TRUE(m.nic.put(std::string(100, 'a'), 3));
    EXPECT_TRUE(m.nic.receive(frame(60, 9), 0x60)); // TCPE and IPE mean nothing here
    m.pass(ms);
    EXPECT_EQ(m.receiver.got, std::vector{frame(60, 9)});
    EXPECT_EQ(m.card().counters().receive_errors, 8u);
    EXPECT_TRUE(m.card().is_open());
    m.nic.tx_status = 1 | 2; // excess collisions
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.nic.tx_status = 1 | 4; // late collision
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.nic.tx_status = 1;
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.card().counters().send_errors, 2u);
    check(m);
}

TEST(E1000, FramesOfAWrongLengthAreNotSent) {
    Machine& m = attached();
    EXPECT_EQ(send(m, frame(1515)), SendStatus::too_long);
    EXPECT_EQ(send(m, frame(1514), 1514), SendStatus::sent);
    EXPECT_EQ(send(m, frame(14)), SendStatus::sent);
    EXPECT_EQ(send(m, frame(20), 13), SendStatus::too_short);
    EXPECT_EQ(m.nic.sent.size(), 2u);
    check(m);
}

TEST(E1000, MoreBytesThanABufferHoldsResetTheCard) {
    Capture log;
    Machine& m = attached();
    const u32 resets = m.nic.resets;
    EXPECT_TRUE(m.nic.put(frame(60), 3, u16{2049}));
    m.pass(50 * ms);
    EXPECT_EQ(m.nic.resets, resets + 1);
    EXPECT_EQ(log.count("a receive descriptor has more bytes than its buffer"), 1u);
    EXPECT_TRUE(m.nic.receive(frame(60, 3)));
    EXPECT_EQ(send(m, frame(60, 4)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.receiver.got, std::vector{frame(60, 3)});
    EXPECT_EQ(m.nic.sent, std::vector{frame(60, 4)});
    check(m);
}

TEST(E1000, ASilentCardIsResetAndGoesOn) {
    Capture log;
    Machine& m = attached();
    const u32 resets = m.nic.resets;
    m.nic.hold = true;
    EXPECT_EQ(send(m, frame(60, 1)), SendStatus::sent);
    EXPECT_EQ(send(m, frame(60, 2)), SendStatus::sent);
    m.pass(timeout - 20 * ms);
    EXPECT_EQ(m.nic.resets, resets) << "too early";
    m.pass(60 * ms);
    EXPECT_EQ(m.nic.resets, resets + 1);
    EXPECT_EQ(log.count("the network card has sent no frame for a whole time-out: reset 1 of 3"), 1u);
    EXPECT_EQ(m.card().counters().send_errors, 2u) << "what was in the ring is lost, and counted";
    m.nic.hold = false;
    EXPECT_EQ(send(m, frame(60, 3)), SendStatus::sent);
    m.pass(ms);
    EXPECT_EQ(m.nic.sent, std::vector{frame(60, 3)});
    EXPECT_TRUE(m.nic.receive(frame(70)));
    m.pass(ms);
    EXPECT_EQ(m.receiver.got, std::vector{frame(70)});
    EXPECT_TRUE(m.card().is_open());
    check(m);
}

TEST(E1000, TheFourthResetInARowClosesTheCard) {
    Capture log;
    Machine& m = attached();
    const u32 memory = m.dma.outstanding;
    m.nic.hold = true;
    for (u32 i = 0; i < 4; ++i) {
        EXPECT_TRUE(m.card().is_open()) << i;
        EXPECT_EQ(send(m, frame(60)), SendStatus::sent) << i;
        m.pass(timeout + 80 * ms);
    }
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(log.count("eth0: closed:"), 1u);
    EXPECT_EQ(send(m, frame(60)), SendStatus::device_gone);
    EXPECT_EQ(m.receiver.changes, 1u);
    EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{5});
    EXPECT_FALSE(m.nic.bus_master);
    EXPECT_TRUE(m.interrupts.lines.empty());
    EXPECT_EQ(m.dma.outstanding, memory) << "its rings stay as long as the card";
    check(m);
}

TEST(E1000, ReceivingShowsThatTheCardIsAlive) {
    Machine& m = attached();
    m.nic.hold = true;
    for (u32 i = 0; i < 8; ++i) { // resets, but never four in a row
        EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
        m.pass(timeout + 80 * ms);
        EXPECT_TRUE(m.nic.receive(frame(60, i)));
        m.pass(ms);
    }
    EXPECT_TRUE(m.card().is_open());
    EXPECT_EQ(m.receiver.got.size(), 8u);
    check(m);
}

TEST(E1000, WithoutALinkFramesWaitAndNothingIsReset) {
    Capture log;
    Machine& m = attached();
    const u32 resets = m.nic.resets;
    m.nic.set_link(false);
    m.pass(ms);
    EXPECT_FALSE(m.card().link_up());
    EXPECT_EQ(m.receiver.changes, 1u);
    EXPECT_EQ(send(m, frame(60, 5)), SendStatus::sent);
    m.pass(5 * timeout);
    EXPECT_EQ(m.nic.resets, resets);
    m.nic.set_link(true);
    m.pass(ms);
    EXPECT_TRUE(m.card().link_up());
    EXPECT_EQ(m.receiver.changes, 2u);
    EXPECT_EQ(m.nic.sent, std::vector{frame(60, 5)});
    EXPECT_EQ(log.count("eth0: link down"), 1u);
    EXPECT_EQ(log.count("eth0: link up"), 1u);
    check(m);
}

TEST(E1000, ACardWithoutALinkIsAnnounced) {
    Machine& m = kept();
    m.nic.link = false;
    ASSERT_TRUE(m.probe());
    EXPECT_FALSE(m.card().link_up());
    check(m);
}

TEST(E1000, AnotherDevicesInterruptChangesNothing) {
    Machine& m = attached();
    for (u32 i = 0; i < 5; ++i) {
        m.interrupts.raise(11);
        m.pass(ms);
    }
    EXPECT_TRUE(m.nic.receive(frame(60)));
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 1u);
    check(m);
}

// A frame that arrives at any access of the driver's way to sleep is found.
TEST(E1000, NoWakeUpIsLost) {
    Machine& m = attached();
    m.nic.echo = true;
    for (u32 i = 0; i < 50; ++i) {
        // Each received frame is answered from receive(): what comes back arrives at another point of the turn.
        m.receiver.during = [&, left = i % 7](io::NetDevice& card) mutable {
            if (left != 0) {
                --left;
                EXPECT_EQ(card.send_now({bytes(frame(60, left))}), SendStatus::sent);
            }
        };
        m.receiver.got.clear();
        EXPECT_TRUE(m.nic.receive(frame(60, 100)));
        m.pass(3 * ms);
        ASSERT_EQ(m.receiver.got.size(), 1 + i % 7);
    }
    check(m);
}

TEST(E1000, ASleepingCardTakesNoTicks) {
    Machine& m = attached();
    m.pass(ms);
    const u64 reads = m.card().counters().device_accesses;
    m.pass(1000 * ms);
    EXPECT_LE(m.card().counters().device_accesses - reads, 3u);
    check(m);
}

TEST(E1000, AReceiverMayCloseTheWorld) {
    Machine& m = attached();
    m.receiver.during = [&](io::NetDevice&) { m.nic.gone = true; };
    EXPECT_TRUE(m.nic.receive(frame(60)));
    EXPECT_TRUE(m.nic.receive(frame(61)));
    m.pass(ms);
    m.interrupts.raise(11);
    m.pass(50 * ms);
    EXPECT_FALSE(m.card().is_open());
    EXPECT_EQ(m.sink.withdrawn, std::vector<u32>{5});
}

TEST(E1000, ACardThatVanishesDuringAResetIsClosed) {
    Machine& m = attached();
    m.nic.hold = true;
    EXPECT_EQ(send(m, frame(60)), SendStatus::sent);
    m.nic.resets_for_ever = true;
    m.pass(3 * timeout);
    EXPECT_FALSE(m.card().is_open());
}

struct Failure {
    const char* name;
    std::function<void(Machine&)> prepare;
    Code code;
};
class E1000Failure : public testing::TestWithParam<Failure> {};
TEST_P(E1000Failure, LeavesNothingBehind) {
    Machine& m = kept();
    GetParam().prepare(m);
    const auto probed = m.probe();
    ASSERT_FALSE(probed);
    EXPECT_EQ(probed.error().code, GetParam().code) << probed.error().message;
    EXPECT_EQ(m.sink.card == nullptr || !m.sink.card->is_open(), true);
    EXPECT_EQ(m.dma.outstanding, 0u);
    EXPECT_TRUE(m.interrupts.lines.empty());
    EXPECT_FALSE(m.nic.bus_master);
    if (!m.nic.gone) {
        EXPECT_FALSE(m.nic.enabled(true));
        EXPECT_FALSE(m.nic.enabled(false));
    }
}
const Failure failures[] = {
    {"gone", [](Machine& m) { m.nic.gone = true; }, Code::device_gone},
    {"no_bar",
     [](Machine& m) {
         m.function.bar_mask[0] = 0;
         m.function.set32(0x10, 0);
     },
     Code::not_supported},
    {"small_bar", [](Machine& m) { m.function.bar_mask[0] = 0xffff'f000; }, Code::protocol},
    {"resets_for_ever", [](Machine& m) { m.nic.resets_for_ever = true; }, Code::timed_out},
    {"no_memory", [](Machine& m) { m.dma.left = 2; }, Code::exhausted},
    {"no_interrupt", [](Machine& m) { m.function.bytes[0x3d] = 0; }, Code::not_supported},
    {"refused", [](Machine& m) { m.sink.refuse = true; }, Code::busy},
    {"no_address",
     [](Machine& m) {
         m.nic.valid_address = false;
         m.nic.write(0x5404, 4, 0);
         m.nic.eeprom = {};
     },
     Code::protocol},
    {"group_address",
     [](Machine& m) {
         m.nic.write(0x5404, 4, 0);
         m.nic.eeprom = {0x1601, 2, 3};
     },
     Code::protocol},
    {"eeprom_silent",
     [](Machine& m) {
         m.nic.write(0x5404, 4, 0);
         m.nic.eeprom_silent = true;
     },
     Code::timed_out},
};
INSTANTIATE_TEST_SUITE_P(All, E1000Failure, testing::ValuesIn(failures),
                         [](const auto& info) { return info.param.name; });

TEST(E1000, TheEepromHasTheAddressToo) {
    Machine& m = kept();
    m.nic.valid_address = false;
    m.nic.write(0x5404, 4, 0);
    m.nic.write(0x5400, 4, 0);
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.card().identity().mac, (io::MacAddress{{0, 0x16, 0x3e, 1, 2, 3}}));
    m.card().set_receiver(&m.receiver);
    m.pass(ms);
    EXPECT_TRUE(m.nic.receive(frame(60)));
    m.pass(ms);
    EXPECT_EQ(m.receiver.got.size(), 1u) << "the card knows it";
    check(m);
}

TEST(E1000, ATwinOfAnotherDriverIsNotTouched) {
    Machine& m = kept();
    m.sink.offer = false;
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.sink.asked, std::vector<u32>{5});
    EXPECT_EQ(m.sink.card, nullptr);
    ASSERT_EQ(m.sink.left.size(), 1u);
    EXPECT_EQ(m.sink.left[0].first, "00:03.0");
    EXPECT_EQ(m.sink.left[0].second, drivers::Unused::taken);
    EXPECT_EQ(m.nic.writes, 0u) << "not one register is written";
    EXPECT_EQ(m.dma.outstanding, 0u);
}

TEST(E1000, OnlyKnownCardsMatch) {
    Machine& m = kept();
    m.function.set16(2, 0x1004);
    const auto probed = m.probe();
    ASSERT_FALSE(probed);
    EXPECT_EQ(probed.error().code, Code::not_supported);
    EXPECT_EQ(m.nic.writes, 0u);
}

// A card that writes anything into its rings, at any time, and vanishes or stays silent as it likes: only whole frames
// of a possible length are received, every send ends, and the card closes at most once.
TEST(E1000, AnArbitraryCardDoesNoHarm) {
    for (u32 seed = 0; seed < 60; ++seed) {
        Capture log;
        Machine& m = attached();
        std::mt19937 random(seed);
        const auto below = [&](u32 n) { return static_cast<u32>(random() % n); };
        u32 received = 0;
        m.receiver.during = [&](io::NetDevice&) {
            const usize size = m.receiver.got.back().size();
            EXPECT_TRUE(size >= io::ethernet_header && size <= e1000::buffer_bytes) << size;
            ++received;
        };
        std::vector<std::unique_ptr<SendStatus>> sends;
        io::TaskGroup group(m.executor);
        for (u32 step = 0; step < 400; ++step) {
            switch (below(12)) {
            case 0:
            case 1:
                sends.push_back(std::make_unique<SendStatus>(SendStatus::not_sent));
                EXPECT_TRUE(
                    group.spawn(send(m.card(), frame(14 + below(1501), step), 14, below(300) * ms, *sends.back())));
                break;
            case 2: m.nic.receive(frame(14 + below(1501), step)); break;
            case 3:
                m.nic.put(frame(below(2049)), random() & 0xffff,
                          below(8) == 0 ? std::optional(static_cast<u16>(random())) : std::nullopt);
                break;
            case 4: m.nic.scribble(below(2) == 0, below(e1000::ring_entries), u64{random()} << 32 | random()); break;
            case 5: m.nic.hold = below(3) == 0; break;
            case 6: m.nic.set_link(below(4) != 0); break;
            case 7: m.nic.cause(random() & 0xff); break;
            case 8: m.nic.gone = below(20) == 0; break;
            case 9: m.pass(below(100) * ms); break;
            case 10: m.interrupts.raise(11); break;
            default: m.nic.send(); break;
            }
            m.executor.turn();
            m.deliver();
        }
        m.pass(2000 * ms);
        EXPECT_EQ(group.running(), 0u);
        for (const auto& status : sends) {
            EXPECT_NE(*status, SendStatus::not_sent);
        }
        EXPECT_EQ(m.card().counters().received, received);
        EXPECT_LE(log.count("eth0: closed:"), 1u);
        EXPECT_EQ(m.card().is_open(), log.count("eth0: closed:") == 0);
        m.nic.broken.clear(); // it has read descriptors that it has written itself
    }
}

} // namespace
