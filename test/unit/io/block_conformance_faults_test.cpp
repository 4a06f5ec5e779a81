// The cases of the conformance suite for exchanges, for a queue that the device has damaged, and for a device that
// another queue closes.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.latch;
import io.block;
import io.block_queue;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/io/block_conformance.hpp"
// depends on the include above
#include "unit/io/block_conformance_cases.hpp"
// depends on the includes above
#include "unit/io/block_conformance_bench.hpp"

namespace fl::test::conformance {

namespace {
/// Sends an exchange on the lane; it must be accepted.
std::unique_ptr<io::Exchange> send(Bench& b, u32 lane) {
    auto exchange = b.rig->exchange(lane);
    b.on(lane, [&] { EXPECT_TRUE(b.rig->queue(lane)->send(*exchange)); });
    return exchange;
}
bool is_in_flight(Bench& b, u32 lane, const io::Exchange& exchange) {
    return b.rig->queue(lane)->is_in_flight(exchange);
}
} // namespace

// ---- exchanges ----

TEST_P(BlockConformanceExchanges, RequestsLeaveRoomForThem) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        Bench b(*GetParam());
        for (u32 i = 0; i < facts().capacity + 5; ++i) {
            b.start(Op::read, i * 16, 4096, lane);
            if (facts().gathers) {
                b.turn(); // each in a separate command
            }
        }
        b.turn();
        EXPECT_EQ(b.rig->held().size(), facts().capacity);
        std::vector<std::unique_ptr<io::Exchange>> sent;
        Result<void> done;
        b.on(lane, [&] {
            do {
                sent.push_back(b.rig->exchange(lane));
                done = b.rig->queue(lane)->send(*sent.back());
            } while (done && sent.size() < 100);
        });
        ASSERT_FALSE(done) << "more commands than the table holds";
        EXPECT_EQ(done.error().code, Code::exhausted);
        EXPECT_FALSE(is_in_flight(b, lane, *sent.back()));
        sent.pop_back();
        EXPECT_GE(sent.size(), facts().exchanges);
        EXPECT_EQ(b.rig->in_flight(lane), facts().capacity + sent.size());
        b.turn();
        EXPECT_EQ(b.rig->held_exchanges(lane), sent.size());
        for (const auto& exchange : sent) {
            EXPECT_TRUE(is_in_flight(b, lane, *exchange));
            EXPECT_FALSE(exchange->done.is_open());
            b.rig->answer_exchange(lane);
            b.turn();
            EXPECT_TRUE(exchange->done.is_open() && exchange->answered);
            EXPECT_FALSE(is_in_flight(b, lane, *exchange));
        }
        EXPECT_EQ(b.rig->held().size(), facts().capacity) << "a request was sent in a command reserved for exchanges";
        EXPECT_TRUE(std::ranges::none_of(b.items, [](const auto& item) { return item->done(); }));
        const auto again = send(b, lane);
        b.turn();
        b.rig->answer_exchange(lane);
        b.turn();
        EXPECT_TRUE(again->answered);
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
    }
}

TEST_P(BlockConformanceExchanges, AreAnsweredAmongRequests) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point) {
        const auto exchange = send(b, probe.lane);
        b.turn();
        ASSERT_EQ(b.rig->held_exchanges(probe.lane), 1u);
        EXPECT_FALSE(exchange->done.is_open());
        b.rig->answer_exchange(probe.lane);
        b.turn();
        EXPECT_TRUE(exchange->done.is_open() && exchange->answered);
        EXPECT_FALSE(is_in_flight(b, probe.lane, *exchange));
        b.finish();
        EXPECT_EQ(probe.status, Status::ok);
        EXPECT_TRUE(b.open());
    });
}

// The device answers an abandoned exchange later: the answer is taken, and the exchange is not accessed any more.
TEST_P(BlockConformanceExchanges, CanBeAbandoned) {
    for (const Point point : {Point::submitted, Point::with_device, Point::answered, Point::drained}) {
        for (const bool destroyed : {false, true}) {
            SCOPED_TRACE(point_names[to_underlying(point)]);
            Bench b(*GetParam());
            const u32 lane = facts().lanes - 1;
            Item& item = b.start(Op::read, 0, 4096, lane);
            auto exchange = send(b, lane);
            if (point != Point::submitted) {
                b.turn();
            }
            if (point == Point::answered || point == Point::drained) {
                b.rig->answer_exchange(lane);
            }
            if (point == Point::drained) {
                b.turn();
                EXPECT_TRUE(exchange->answered);
            }
            b.on(lane, [&] { b.rig->queue(lane)->abandon(*exchange); });
            EXPECT_FALSE(is_in_flight(b, lane, *exchange));
            if (destroyed) {
                exchange.reset();
            }
            b.turns(2);
            if (b.rig->held_exchanges(lane) != 0) {
                b.rig->answer_exchange(lane);
                b.turns(2);
            }
            if (exchange && point != Point::drained) {
                EXPECT_FALSE(exchange->answered || exchange->done.is_open());
            }
            EXPECT_EQ(b.rig->held_exchanges(lane), 0u);
            EXPECT_TRUE(b.open());
            b.finish();
            EXPECT_EQ(item.status, Status::ok);
        }
    }
}

// A new exchange in the slot of an abandoned one is another one.
TEST_P(BlockConformanceExchanges, TheAnswerToAnAbandonedOneEndsNoOther) {
    Bench b(*GetParam());
    const auto first = send(b, 0);
    b.turn();
    b.on(0, [&] { b.rig->queue(0)->abandon(*first); });
    const auto second = send(b, 0);
    b.turn();
    ASSERT_EQ(b.rig->held_exchanges(0), 2u);
    b.rig->answer_exchange(0); // the first
    b.turns(2);
    EXPECT_FALSE(first->answered || second->answered || second->done.is_open());
    b.on(0, [&] { b.rig->queue(0)->abandon(*first); }); // once more: nothing is left of it
    EXPECT_TRUE(is_in_flight(b, 0, *second));
    b.rig->answer_exchange(0);
    b.turns(2);
    EXPECT_TRUE(second->answered);
    EXPECT_TRUE(b.open());
    b.finish();
}

TEST_P(BlockConformanceExchanges, EndUnansweredWithTheQueue) {
    std::vector<std::function<void(Bench&, u32)>> ends{
        [](Bench& b, u32 lane) { b.close(lane, Status::device_gone); },
        [](Bench& b, u32 lane) { b.stop(lane); },
    };
    for (const Fault fault : facts().faults) {
        ends.push_back([fault](Bench& b, u32 lane) {
            b.start(Op::read, 16, 4096, lane);
            b.turn();
            b.rig->inject(lane, fault);
            b.rig->answer(b.of_lane(lane).front(), Status::ok);
            b.start(Op::read, 32, 4096, lane);
        });
    }
    for (usize n = 0; n < ends.size(); ++n) {
        for (const Point point : {Point::submitted, Point::with_device, Point::answered}) {
            SCOPED_TRACE(std::to_string(n) + ", " + point_names[to_underlying(point)]);
            Bench b(*GetParam());
            const u32 lane = facts().lanes - 1;
            const auto exchange = send(b, lane);
            if (point != Point::submitted) {
                b.turn();
            }
            if (point == Point::answered && n < 2) {
                b.rig->answer_exchange(lane);
            }
            ends[n](b, lane);
            b.turns(5);
            EXPECT_FALSE(b.rig->is_open(lane));
            EXPECT_TRUE(exchange->done.is_open()) << "its sender waits in vain";
            EXPECT_FALSE(exchange->answered);
            b.on(lane, [&] {
                const auto late = b.rig->exchange(lane);
                const auto refused = b.rig->queue(lane)->send(*late);
                ASSERT_FALSE(refused);
                EXPECT_EQ(refused.error().code, Code::device_gone);
            });
            b.finish();
        }
    }
}

// Abandoning a request may stop the device, and its exchanges with it.
TEST_P(BlockConformanceExchanges, EndUnansweredWithADeviceThatIsStopped) {
    Bench b(*GetParam());
    Item& item = b.start(Op::write, 0, 4096);
    const auto exchange = send(b, 0);
    b.turn();
    ASSERT_EQ(b.rig->held_exchanges(0), 1u);
    b.forget(item);
    if (b.rig->held_exchanges(0) == 0) {
        EXPECT_TRUE(exchange->done.is_open());
        EXPECT_FALSE(exchange->answered);
        EXPECT_FALSE(is_in_flight(b, 0, *exchange));
    } else {
        EXPECT_TRUE(is_in_flight(b, 0, *exchange));
        b.rig->answer_exchange(0);
        b.turns(2);
        EXPECT_TRUE(exchange->done.is_open() && exchange->answered);
    }
    EXPECT_TRUE(b.open());
    b.finish();
}

// Its sender has a bound. The queue does not recover a device because of it.
TEST_P(BlockConformanceExchanges, SilenceIsTheirSendersToNotice) {
    Bench b(*GetParam());
    const auto exchange = send(b, 0);
    b.pass(3 * facts().timeout);
    EXPECT_TRUE(b.open()) << b.log.text.view();
    EXPECT_FALSE(exchange->done.is_open());
    ASSERT_EQ(b.rig->held_exchanges(0), 1u);
    Item& item = b.start(Op::read, 0, 4096);
    b.turn();
    b.rig->answer(0, Status::ok);
    b.turns(2);
    EXPECT_EQ(item.status, Status::ok);
    b.rig->answer_exchange(0);
    b.turns(2);
    EXPECT_TRUE(exchange->answered);
    b.finish();
}

// ---- a queue that the device has damaged ----

TEST_P(BlockConformanceFaults, EveryRequestEndsOnceAndTheFaultIsNamed) {
    for (const Fault fault : facts().faults) {
        SCOPED_TRACE(fault_names[to_underlying(fault)]);
        at_every_point(*GetParam(), [&](Bench& b, Item& probe, Point point) {
            const Injected injected = b.rig->inject(probe.lane, fault);
            b.rig->event(probe.lane);
            Item& next = b.start(Op::write, 6000, 4096, probe.lane);
            bool answered = false;
            for (u32 i = 0; i < 10 && !b.closed(); ++i) {
                if (!answered && !b.of_lane(probe.lane).empty()) {
                    b.rig->answer(b.of_lane(probe.lane).front(), Status::ok);
                    answered = true;
                }
                b.turn();
            }
            b.turns(2);
            EXPECT_TRUE(b.closed()) << "the fault is not noticed";
            EXPECT_TRUE(b.idle());
            for (const auto& item : b.items) {
                EXPECT_TRUE(item->status == Status::ok || item->status == injected.status)
                    << to_underlying(item->status);
            }
            if (fault <= Fault::next) { // the others are found after an answer has been taken: its own, perhaps
                EXPECT_EQ(next.status, injected.status);
            }
            if (had_answer(point)) {
                EXPECT_EQ(probe.status, Status::ok);
            }
            EXPECT_EQ(b.lines("closed: "), 1u) << b.log.text.view();
            EXPECT_EQ(b.lines(injected.text), 1u) << injected.text << ": " << b.log.text.view();
            Item& refused = b.start(Op::read, 0, 4096, probe.lane);
            b.turns(2);
            EXPECT_EQ(refused.status, Status::device_gone);
        });
    }
}

// ---- a device that another queue closes ----

TEST_P(BlockConformanceElsewhere, EverythingEndsWithThatStatus) {
    for (const Status status : {Status::device_gone, Status::protocol_error}) {
        at_every_point(*GetParam(), [&](Bench& b, Item& probe, Point point) {
            b.rig->close_elsewhere(status);
            b.turns(2);
            EXPECT_TRUE(b.closed());
            EXPECT_TRUE(b.idle());
            if (had_answer(point)) {
                EXPECT_EQ(probe.status, Status::ok);
            } else if (point != Point::answered) {
                EXPECT_EQ(probe.status, status);
            }
            EXPECT_EQ(b.lines("closed"), 0u) << "the other queue has logged the reason: " << b.log.text.view();
        });
    }
}

} // namespace fl::test::conformance
