// The interface of network devices [io.net], on a card with a fixed number of places for frames.
#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.time;
import io.executor;
import io.task;
import io.block;
import io.net;

#include "unit/io/support.hpp"

namespace {
using namespace fl;
using io::Checksum;
using io::OutgoingFrame;
using io::SendStatus;
constexpr Nanoseconds ms = 1'000'000;

struct Card final : io::NetDevice {
    explicit Card(io::Executor& executor, u32 mtu = 1500) : NetDevice(executor) {
        identity_.name.write("eth0");
        identity_.mtu = mtu;
        set_open(true);
    }
    bool start(const OutgoingFrame& frame, Checksum checksum) override {
        ++attempts;
        if (places == 0) {
            return false;
        }
        --places;
        std::string text(reinterpret_cast<const char*>(frame.head.data()), frame.head.size());
        text.append(reinterpret_cast<const char*>(frame.body.data()), frame.body.size());
        sent.push_back(text);
        checksums.push_back(checksum);
        return true;
    }
    void free(u32 more) {
        places += more;
        room();
    }
    void close() { set_open(false); }
    void link(bool up) { set_link(up); }
    void give(std::string_view text, Checksum checksum) {
        deliver({reinterpret_cast<const std::byte*>(text.data()), text.size()}, checksum);
    }
    bool waits() const { return waits_for_room(); }
    u32 places = 0;
    u32 attempts = 0;
    std::vector<std::string> sent;
    std::vector<Checksum> checksums;
};

struct Receiver final : io::FrameReceiver {
    void receive(io::NetDevice& lane, std::span<const std::byte> frame, Checksum checksum) override {
        got.emplace_back(reinterpret_cast<const char*>(frame.data()), frame.size());
        checksums.push_back(checksum);
        from = &lane;
    }
    void link_changed(io::NetDevice& lane) override { changes.push_back({lane.link_up(), lane.is_open()}); }
    std::vector<std::string> got;
    std::vector<Checksum> checksums;
    std::vector<std::pair<bool, bool>> changes; // link up, open
    io::NetDevice* from = nullptr;
};

OutgoingFrame frame_of(std::string_view head, std::string_view body = {}) {
    return {{reinterpret_cast<const std::byte*>(head.data()), head.size()},
            {reinterpret_cast<const std::byte*>(body.data()), body.size()}};
}
std::string text(char c, usize size = 60) { return std::string(size, c); }

struct Net : testing::Test {
    test::FakeMachine machine;
    io::Executor executor{machine.platform()};
    Card card{executor};
    io::TaskGroup group{executor};

    static io::Task<Result<void>> send(io::NetDevice& to, std::string bytes, Nanoseconds bound, SendStatus& status,
                                       Checksum checksum = Checksum::unknown) {
        status = co_await to.send(frame_of(bytes), bound, checksum);
        co_return Result<void>{};
    }
    void start(std::string bytes, Nanoseconds bound, SendStatus& status) {
        ASSERT_TRUE(group.spawn(send(card, std::move(bytes), bound, status)));
        executor.turn();
    }
};

TEST_F(Net, AFrameWithRoomIsSentAtOnce) {
    card.places = 2;
    SendStatus status = SendStatus::not_sent;
    start(text('a'), ms, status);
    executor.turn();
    EXPECT_EQ(status, SendStatus::sent);
    EXPECT_EQ(card.send_now(frame_of(text('b', 14), text('c', 1500)), Checksum::partial), SendStatus::sent);
    EXPECT_EQ(card.sent, (std::vector{text('a'), text('b', 14) + text('c', 1500)}));
    EXPECT_EQ(card.checksums, (std::vector{Checksum::unknown, Checksum::partial}));
    EXPECT_EQ(card.counters().sent, 2u);
    EXPECT_EQ(card.counters().sent_octets, 60u + 1514u);
}

TEST_F(Net, FramesOfAnImpossibleLengthNeverReachTheDriver) {
    card.places = 10;
    EXPECT_EQ(card.max_frame(), 1514u);
    EXPECT_EQ(card.send_now(frame_of(text('a', 13), text('b', 100))), SendStatus::too_short) << "not in the head";
    EXPECT_EQ(card.send_now(frame_of(text('a', 14), text('b', 1501))), SendStatus::too_long);
    SendStatus status = SendStatus::not_sent;
    start(text('a', 1515), ms, status);
    executor.turn();
    EXPECT_EQ(status, SendStatus::too_long) << "without waiting";
    EXPECT_EQ(card.attempts, 0u);
    EXPECT_EQ(card.counters().sent, 0u);
    EXPECT_EQ(to_error(SendStatus::too_long).code, Code::bad_argument);
    EXPECT_EQ(to_error(SendStatus::too_short).code, Code::bad_argument);
    EXPECT_EQ(to_error(SendStatus::timed_out).code, Code::timed_out);
    EXPECT_EQ(to_error(SendStatus::device_gone).code, Code::device_gone);
}

TEST_F(Net, WaitersAreServedInOrderAndNobodyOvertakes) {
    std::array<SendStatus, 3> status{};
    status.fill(SendStatus::not_sent);
    start(text('a'), 1000 * ms, status[0]);
    start(text('b'), 1000 * ms, status[1]);
    start(text('c'), 1000 * ms, status[2]);
    EXPECT_TRUE(card.waits());
    card.places = 1; // room that nobody was told of yet
    const u32 attempts = card.attempts;
    EXPECT_EQ(card.send_now(frame_of(text('x'))), SendStatus::timed_out);
    EXPECT_EQ(card.attempts, attempts) << "others wait";
    card.free(1);
    executor.turn();
    EXPECT_EQ(status, (std::array{SendStatus::sent, SendStatus::sent, SendStatus::not_sent}));
    EXPECT_TRUE(card.waits());
    card.free(1);
    executor.turn();
    EXPECT_EQ(status[2], SendStatus::sent);
    EXPECT_FALSE(card.waits());
    EXPECT_EQ(card.sent, (std::vector{text('a'), text('b'), text('c')}));
    EXPECT_EQ(card.counters().sent, 3u);
}

TEST_F(Net, AWaitHasABoundAndItsEndLeavesTheOthersInPlace) {
    std::array<SendStatus, 3> status{};
    status.fill(SendStatus::not_sent);
    start(text('a'), 1000 * ms, status[0]);
    start(text('b'), 10 * ms, status[1]);
    start(text('c'), 1000 * ms, status[2]);
    const Instant begun = machine.time;
    while (status[1] == SendStatus::not_sent && machine.time < begun + 500 * ms) {
        executor.turn();
    }
    EXPECT_EQ(status[1], SendStatus::timed_out);
    EXPECT_GE(machine.time, begun + 10 * ms - ms);
    EXPECT_LE(machine.time, begun + 40 * ms);
    card.free(5);
    executor.turn();
    EXPECT_EQ(card.sent, (std::vector{text('a'), text('c')}));
    EXPECT_EQ(status[2], SendStatus::sent);
    start(text('d'), 0, status[1]);
    executor.turn();
    EXPECT_EQ(status[1], SendStatus::sent) << "a bound of 0 is enough if there is room";
}

// A waiting coroutine that is destroyed withdraws its frame, whether it is the first, in the middle or the last.
TEST_F(Net, ADestroyedWaiterWithdrawsItsFrame) {
    for (const usize gone : {0u, 1u, 2u}) {
        std::array<SendStatus, 4> status{};
        status.fill(SendStatus::not_sent);
        card.sent.clear();
        card.places = 0;
        std::array<std::optional<io::TaskGroup>, 3> groups;
        for (usize i = 0; i < 3; ++i) {
            groups[i].emplace(executor);
            ASSERT_TRUE(groups[i]->spawn(send(card, text(static_cast<char>('a' + i)), 1000 * ms, status[i])));
        }
        executor.turn();
        groups[gone].reset();
        SendStatus late = SendStatus::not_sent;
        start(text('z'), 1000 * ms, late); // the end of the list is still right
        card.free(10);
        executor.turn();
        std::vector<std::string> expected{text('a'), text('b'), text('c'), text('z')};
        expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(gone));
        EXPECT_EQ(card.sent, expected);
        EXPECT_EQ(late, SendStatus::sent);
        EXPECT_FALSE(card.waits());
    }
}

// Sent and timed out in the same turn: what was copied into the ring counts.
TEST_F(Net, AFrameSentInTheTurnOfItsBoundIsSent) {
    SendStatus status = SendStatus::not_sent;
    start(text('a'), 5 * ms, status);
    machine.time += 6 * ms;
    executor.turn(); // makes the waiter ready, which has not run yet
    if (status == SendStatus::not_sent) {
        card.free(1);
    }
    executor.turn();
    EXPECT_EQ(status == SendStatus::sent, card.sent.size() == 1);
    EXPECT_FALSE(card.waits());
}

TEST_F(Net, ClosingEndsEveryWaitAndTellsTheReceiver) {
    Receiver receiver;
    card.set_receiver(&receiver);
    std::array<SendStatus, 2> status{SendStatus::not_sent, SendStatus::not_sent};
    start(text('a'), 1000 * ms, status[0]);
    start(text('b'), 1000 * ms, status[1]);
    card.places = 5;
    card.close();
    card.close();
    executor.turn();
    EXPECT_EQ(status, (std::array{SendStatus::device_gone, SendStatus::device_gone}));
    EXPECT_TRUE(card.sent.empty());
    EXPECT_EQ(receiver.changes, (std::vector<std::pair<bool, bool>>{{true, false}})) << "once";
    EXPECT_EQ(card.send_now(frame_of(text('c'))), SendStatus::device_gone);
    EXPECT_EQ(card.send_now(frame_of(text('c', 3))), SendStatus::device_gone);
    EXPECT_FALSE(card.is_open());
}

TEST_F(Net, ReceivedFramesGoToTheReceiverAndAreCounted) {
    card.give(text('a'), Checksum::unknown); // nobody receives
    Receiver receiver;
    card.set_receiver(&receiver);
    card.give(text('b', 100), Checksum::verified);
    card.give(text('c'), Checksum::partial);
    EXPECT_EQ(receiver.got, (std::vector{text('b', 100), text('c')}));
    EXPECT_EQ(receiver.checksums, (std::vector{Checksum::verified, Checksum::partial}));
    EXPECT_EQ(receiver.from, &card);
    card.set_receiver(nullptr);
    card.give(text('d'), Checksum::unknown);
    EXPECT_EQ(receiver.got.size(), 2u);
    EXPECT_EQ(card.counters().received, 4u);
    EXPECT_EQ(card.counters().received_octets, 60u + 100 + 60 + 60);
    card.set_receiver(&receiver);
    card.link(true); // no change
    card.link(false);
    card.link(false);
    card.link(true);
    EXPECT_EQ(receiver.changes, (std::vector<std::pair<bool, bool>>{{false, true}, {true, true}}));
}

TEST_F(Net, OneLaneUnlessTheDriverHasMore) {
    EXPECT_EQ(card.lanes(), 1u);
    EXPECT_EQ(&card.lane(0), &card);
    const io::NetCounters a{1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    EXPECT_EQ(a + a - a, a);
    EXPECT_EQ((a + a).interrupts, 20u);
    EXPECT_EQ((a + a).send_errors, 10u);
}

TEST(MacAddress, Groups) {
    EXPECT_TRUE(io::broadcast_mac.is_group());
    EXPECT_TRUE((io::MacAddress{{0x33, 0x33, 0, 0, 0, 1}}).is_group());
    EXPECT_FALSE((io::MacAddress{{0, 0x16, 0x3e, 1, 1, 1}}).is_group());
}

} // namespace
