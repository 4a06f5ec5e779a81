// The cases of the conformance suite for several queues of one device, each on its own processor.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/io/block_conformance.hpp"
// depends on the include above
#include "unit/io/block_conformance_cases.hpp"
// depends on the includes above
#include "unit/io/block_conformance_bench.hpp"

namespace fl::test::conformance {

namespace {
/// Answers the oldest command of the lane that is not `except`.
void answer_one(Bench& b, u32 lane, const Item* except = nullptr) {
    for (const usize place : b.of_lane(lane)) {
        if (except == nullptr || !except->overlaps(b.rig->held()[place])) {
            b.rig->answer(place, Status::ok);
            return;
        }
    }
    ADD_FAILURE() << "lane " << lane << " has no such command";
}
} // namespace

// The device works on the commands of another lane: for less than the answers after which a command counts as lost
// [io.oldest_wait].
TEST_P(BlockConformanceLanes, ADeviceThatIsBusyWithAnotherLaneIsNotSilent) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        Bench b(*GetParam());
        const u32 busy = (lane + 1) % facts().lanes;
        u32 started = 0;
        for (; started < 3; ++started) {
            b.start(Op::read, 100 * started, 4096, busy);
        }
        b.pass(50'000'000); // a lane counts its commands in its tick
        Item& item = b.start(Op::read, 4000, 4096, lane);
        b.turn();
        for (u32 round = 0; round < 6; ++round) {
            b.pass(facts().timeout * 6 / 10);
            answer_one(b, busy);
            b.start(Op::read, 100 * started++, 4096, busy);
            b.turn();
            ASSERT_EQ(item.ended, 0u) << b.log.text.view();
        }
        EXPECT_TRUE(b.open());
        b.finish();
        for (const auto& each : b.items) {
            EXPECT_EQ(each->status, Status::ok);
        }
        EXPECT_EQ(b.lines("no answer"), 0u) << b.log.text.view();
    }
}

TEST_P(BlockConformanceLanes, ACommandThatIsLostIsFoundByTheAnswersOfAnotherLane) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        Bench b(*GetParam());
        const u32 busy = (lane + 1) % facts().lanes;
        b.start(Op::read, 0, 4096, busy);
        b.pass(50'000'000);
        Item& item = b.start(Op::read, 4000, 4096, lane);
        b.turn();
        const Instant begun = b.rig->now();
        u32 answers = 0;
        while (!item.done() && !b.closed() && answers < 100 && b.rig->resets() == 0) {
            b.pass(facts().timeout * 2 / 10);
            if (!b.of_lane(busy).empty()) {
                answer_one(b, busy);
                ++answers;
            }
            b.start(Op::read, 100 * answers, 4096, busy);
            b.turn();
        }
        EXPECT_EQ(b.rig->resets(), facts().resets ? 1u : 0u);
        EXPECT_EQ(item.status, facts().resets ? Status::not_written : Status::timed_out);
        EXPECT_GE(b.rig->now() - begun, facts().timeout);
        EXPECT_GE(answers, 2 * io::OldestWait::max_passes);
        EXPECT_LE(answers, 2 * io::OldestWait::max_passes + 8) << "two commands were under way";
        b.finish();
        EXPECT_EQ(item.status, facts().resets ? Status::ok : Status::timed_out);
    }
}

TEST_P(BlockConformanceLanes, CloseOnOneEndsAllOnce) {
    for (const Status status : {Status::device_gone, Status::protocol_error}) {
        for (const u32 lane : {0u, facts().lanes - 1}) {
            at_every_point(*GetParam(), [&](Bench& b, Item& probe, Point point) {
                for (u32 i = 0; i < b.facts().lanes; ++i) {
                    b.start(Op::write, 5000 + 100 * i, 4096, i);
                }
                const auto answered = [&](const Item& item) {
                    return &item == &probe && (point == Point::answered || had_answer(point));
                };
                b.close(lane, status);
                b.turns(2);
                EXPECT_TRUE(b.closed());
                EXPECT_TRUE(b.idle());
                for (const auto& item : b.items) {
                    EXPECT_TRUE(item->status == status || (answered(*item) && item->status == Status::ok))
                        << to_underlying(item->status);
                }
                EXPECT_EQ(b.lines("closed: "), 1u) << b.log.text.view();
                for (u32 i = 0; i < b.facts().lanes; ++i) {
                    Item& refused = b.start(Op::read, 0, 4096, i);
                    b.turns(2);
                    EXPECT_EQ(refused.status, Status::device_gone);
                }
            });
        }
    }
}

// Its processor leaves: the others go on.
TEST_P(BlockConformanceLanes, StopOnOneEndsItsOwnRequestsAlone) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        Bench b(*GetParam());
        for (u32 i = 0; i < facts().lanes; ++i) {
            b.start(Op::write, 5000 + 100 * i, 4096, i);
            b.start(Op::read, 1000 + 100 * i, 4096, i);
        }
        b.turn();
        b.stop(lane);
        b.turns(3);
        for (u32 i = 0; i < facts().lanes; ++i) {
            EXPECT_EQ(b.rig->is_open(i), i != lane);
        }
        for (const auto& item : b.items) {
            EXPECT_EQ(item->ended, item->lane == lane ? 1u : 0u);
        }
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, item->lane == lane ? Status::device_gone : Status::ok);
        }
    }
}

// What was under way on a lane that was stopped does not count any more: a lost command of another lane is found as
// early as without it.
TEST_P(BlockConformanceLanes, AStoppedLaneLeavesNothingBehind) {
    Bench b(*GetParam());
    const u32 gone = facts().lanes - 1;
    const u32 many = std::min(facts().capacity, 16u);
    for (u32 i = 0; i < many; ++i) {
        b.start(Op::read, 1000 + 100 * i, 4096, gone);
        if (facts().gathers) {
            b.turn();
        }
    }
    b.pass(50'000'000); // counted
    b.stop(gone);
    b.turns(2);
    Item& item = b.start(Op::read, 4000, 4096, 0);
    b.start(Op::read, 0, 4096, 0);
    b.turns(3);
    u32 answers = 0;
    while (!item.done() && answers < 100 && b.rig->resets() == 0) {
        b.pass(facts().timeout * 2 / 10);
        if (b.of_lane(0).size() > b.of(item).size()) {
            answer_one(b, 0, &item);
            ++answers;
        }
        b.start(Op::read, 8 * answers, 4096, 0);
        b.turn();
    }
    EXPECT_EQ(item.status, facts().resets ? Status::not_written : Status::timed_out);
    EXPECT_GE(answers, 2 * io::OldestWait::max_passes);
    EXPECT_LE(answers, 2 * io::OldestWait::max_passes + 8)
        << "found as late as if the other lane's " << many << " were still under way";
    b.finish();
}

// The device may carry an abandoned write out until it has answered it: later writes to its sectors, on any lane, must
// win. Reads of another lane go on.
TEST_P(BlockConformanceLanes, NothingOvertakesAWriteThatWasGivenUpOnAnotherLane) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        for (const Op op : operations(facts())) {
            if (op == Op::read || op == Op::flush) {
                continue;
            }
            const u32 other = (lane + 1) % facts().lanes;
            for (const u32 writer : {lane, other}) {
                Bench b(*GetParam());
                Item& lost = b.start(op, 100, 4096, lane);
                b.turn();
                b.forget(lost);
                Item& elsewhere = b.start(Op::read, 600, 4096, other);
                b.turn();
                answer_one(b, other);
                b.turns(2);
                EXPECT_EQ(elsewhere.status, Status::ok);
                Item& later = b.start(Op::write, 100, 4096, writer);
                b.turns(2);
                EXPECT_EQ(later.ended, 0u);
                EXPECT_TRUE(b.open());
                b.finish(); // newest first
                EXPECT_EQ(later.status, Status::ok);
            }
        }
    }
}

TEST_P(BlockConformanceLanes, AStormOnOneDoesNotReachTheOthers) {
    for (u32 lane = 0; lane < facts().lanes; ++lane) {
        Bench b(*GetParam());
        const u32 other = (lane + 1) % facts().lanes;
        for (u32 i = 0; i < 300; ++i) { // within a time-out
            b.rig->event(lane);
            if (i % 30 == 0) {
                Item& item = b.start(Op::read, 8 * i, 4096, other);
                b.turn();
                answer_one(b, other);
                b.turns(2);
                EXPECT_EQ(item.status, Status::ok) << "the other lane's events are not heard";
            }
        }
        const auto counted = [&](u32 i) { return b.rig->disk(i).counters().interrupts; };
        EXPECT_LT(counted(other), 100u) << "another lane's events";
        b.start(Op::write, 4000, 4096, lane);
        EXPECT_TRUE(b.open());
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
    }
}

} // namespace fl::test::conformance
