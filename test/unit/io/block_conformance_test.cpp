// The cases of the conformance suite for a request's life and its completions.
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
import io.shared_lane;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/io/block_conformance.hpp"
// depends on the include above
#include "unit/io/block_conformance_cases.hpp"
// depends on the includes above
#include "unit/io/block_conformance_bench.hpp"

namespace fl::test::conformance {

TEST_P(BlockConformance, EndsWithItsAnswer) {
    at_every_point(*GetParam(), [](Bench& b, Item&, Point) {
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
        EXPECT_TRUE(b.open());
    });
}

TEST_P(BlockConformance, IsCancelledOnlyWhereTheDeviceDoesNotHaveIt) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point point) {
        const bool early = point == Point::waiting || (point == Point::submitted && b.facts().gathers);
        const bool cancelled = b.cancel(probe);
        if (b.facts().forwarded) { // decided where the queue is, unless the request has not been sent there
            EXPECT_EQ(cancelled, point == Point::waiting && b.facts().capacity == io::SharedLane::max_forwarded);
        } else if (point != Point::retrying) {
            EXPECT_EQ(cancelled, early);
        }
        b.finish();
        if (!b.facts().forwarded) {
            EXPECT_EQ(probe.status, cancelled ? Status::cancelled : Status::ok);
        } else if (point != Point::retrying) {
            EXPECT_EQ(probe.status, early ? Status::cancelled : Status::ok);
        }
    });
}

TEST_P(BlockConformance, CanBeDestroyed) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point) {
        const DmaSpan span = probe.span;
        b.forget(probe);
        EXPECT_TRUE(is_quarantined(span) || !b.rig->reachable(span));
        b.pass(20'000'000);
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_TRUE(item->forgotten || item->status == Status::ok) << "another request suffers";
        }
    });
}

TEST_P(BlockConformance, AllCanBeDestroyedAtOnce) {
    at_every_point(*GetParam(), [](Bench& b, Item&, Point) {
        for (auto& item : b.items) {
            b.forget(*item);
        }
        b.pass(30'000'000);
    });
}

TEST_P(BlockConformance, SilenceHasABound) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point point) {
        const Instant begun = b.rig->now();
        const Nanoseconds bound = b.facts().timeouts * b.facts().timeout + 300'000'000;
        while (!b.idle() && b.rig->now() - begun < bound) {
            b.turn();
        }
        EXPECT_TRUE(b.idle()) << "somebody waits longer than the bound";
        if (b.facts().holds && !b.facts().answers_after_all) {
            EXPECT_EQ(probe.status == Status::ok, point == Point::answered || had_answer(point));
        }
    });
}

// At every point of a request's life the device falls silent, is reset, and works again: nothing is lost, and nothing
// ends with an error.
TEST_P(BlockConformanceResets, EverythingIsSentAgain) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point point) {
        for (u32 i = 0; i < b.facts().lanes; ++i) {
            b.start(Op::write, 5000 + 100 * i, 4096, i);
            b.start(Op::read, 1000 + 100 * i, 4096, i);
        }
        b.turn();
        const usize held = b.rig->held().size();
        ASSERT_NE(held, 0u);
        for (u32 i = 0; i < 1000 && b.rig->resets() == 0; ++i) {
            b.turn();
        }
        EXPECT_EQ(b.rig->resets(), 1u);
        b.pass(3 * b.facts().lanes * io::Executor::tick_length);
        EXPECT_TRUE(b.open());
        EXPECT_GE(b.rig->held().size(), held - (point == Point::answered ? 1 : 0)) << "not all were sent again";
        b.finish();
        EXPECT_EQ(b.rig->resets(), 1u);
        for (const auto& item : b.items) {
            EXPECT_TRUE(item.get() == &probe ? item->status != Status::not_written : item->status == Status::ok);
        }
        EXPECT_EQ(probe.status, Status::ok);
    });
}

// A device that never answers, in spite of resets, ends every request, and is closed after a bounded number of them.
TEST_P(BlockConformanceResets, AreBounded) {
    Bench b(*GetParam());
    for (u32 i = 0; i < 3; ++i) {
        b.start(i == 0 ? Op::write : Op::read, 100 * i, 4096, i % b.facts().lanes);
    }
    for (u32 i = 0; i < 4000 && !b.idle(); ++i) {
        b.turn();
    }
    EXPECT_TRUE(b.idle());
    EXPECT_GE(b.rig->resets(), 2u);
    EXPECT_LE(b.rig->resets(), 8u);
    for (const auto& item : b.items) {
        EXPECT_EQ(item->status, Status::timed_out);
    }
    b.finish();
}

// The caller's own limit is shorter than the device's time-out.
TEST_P(BlockConformance, TheCallersLimitEndsItsRequestAlone) {
    constexpr Nanoseconds bound = 60'000'000;
    at_every_point(
        *GetParam(),
        [&](Bench& b, Item& probe, Point point) {
            const DmaSpan span = probe.span;
            b.pass(bound + 3 * b.facts().lanes * io::Executor::tick_length);
            if (point == Point::waiting && b.facts().forwarded && b.facts().capacity == io::SharedLane::max_forwarded) {
                EXPECT_EQ(probe.ended, 0u); // it has not reached the queue: the limit begins there
                return;
            }
            const bool answered = !b.facts().holds || point == Point::answered || had_answer(point);
            EXPECT_EQ(probe.ended, 1u) << "it waits longer than its limit";
            EXPECT_EQ(probe.status, answered ? Status::ok : Status::timed_out);
            EXPECT_TRUE(probe.lost || !b.rig->reachable(span));
            EXPECT_TRUE(b.open());
            b.finish();
            for (const auto& item : b.items) {
                EXPECT_TRUE(item.get() == &probe || item->status == Status::ok) << "another request suffers";
            }
        },
        bound);
}

// The device is silent for a while, and then completes everything during the recovery.
TEST_P(BlockConformance, LateAnswersEndNothingTwice) {
    for (const u32 percent : {60u, 103u, 115u, 150u, 190u, 205u}) {
        SCOPED_TRACE(percent);
        at_every_point(*GetParam(), [&](Bench& b, Item&, Point) { b.pass(b.facts().timeout * percent / 100); });
    }
}

TEST_P(BlockConformance, AStopOfTheMachineIsNoSilence) {
    for (const Nanoseconds length : {Nanoseconds{7'000'000'000}, Nanoseconds{60'000'000'000}}) {
        at_every_point(*GetParam(), [&](Bench& b, Item&, Point) {
            b.rig->jump(length);
            b.pass(20'000'000);
            EXPECT_TRUE(b.open());
            b.finish();
            for (const auto& item : b.items) {
                EXPECT_EQ(item->status, Status::ok);
            }
        });
    }
}

TEST_P(BlockConformance, CloseEndsEverythingWithItsStatus) {
    for (const Status status : {Status::device_gone, Status::protocol_error}) {
        at_every_point(*GetParam(), [&](Bench& b, Item& probe, Point point) {
            b.close(probe.lane, status);
            b.turns(2);
            EXPECT_TRUE(b.idle());
            EXPECT_TRUE(b.closed());
            // it meets a closed queue
            const bool late = b.facts().forwarded &&
                              (point == Point::submitted ||
                               (point == Point::waiting && b.facts().capacity == io::SharedLane::max_forwarded));
            EXPECT_EQ(probe.status, had_answer(point) ? Status::ok : late ? Status::device_gone : status);
            Item& refused = b.start(Op::read, 0, 4096, probe.lane);
            b.turn();
            b.turn();
            EXPECT_EQ(refused.status, Status::device_gone);
        });
    }
}

TEST_P(BlockConformanceStop, StopEndsEverything) {
    at_every_point(*GetParam(), [](Bench& b, Item& probe, Point point) {
        b.stop_all();
        b.turn();
        EXPECT_TRUE(b.idle());
        EXPECT_EQ(probe.status, had_answer(point) ? Status::ok : Status::device_gone);
    });
}

TEST_P(BlockConformanceEvents, AStormOfEventsIsSurvived) {
    at_every_point(*GetParam(), [](Bench& b, Item&, Point) {
        for (u32 i = 0; i < 300; ++i) { // within a time-out
            b.rig->event(i % b.facts().lanes);
            if (i % 30 == 0) {
                b.turn();
            }
        }
        EXPECT_TRUE(b.open());
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
    });
}

// ---- completions ----

TEST_P(BlockConformanceHeld, EveryStatusArrives) {
    for (const Status status : facts().answers) {
        for (const Op op : operations(facts())) {
            Bench b(*GetParam());
            Item& item = b.start(op, probe_lba, 4096);
            Item& other = b.start(Op::read, 16, 4096);
            for (u32 i = 0; i < 100 && item.ended == 0; ++i) {
                b.turn();
                if (const auto places = b.of(item); !places.empty()) {
                    b.rig->answer(places.front(), status);
                }
            }
            b.finish();
            EXPECT_EQ(item.status, status);
            EXPECT_EQ(other.status, Status::ok) << "an error is the request's own";
        }
    }
}

// All orders of up to four completions, one of them an error.
TEST_P(BlockConformanceHeld, AnswersComeInEveryOrder) {
    for (u32 n = 1; n <= std::min(4u, facts().capacity); ++n) {
        std::vector<u32> order(n);
        std::iota(order.begin(), order.end(), 0u);
        do {
            for (u32 bad = 0; bad <= n; ++bad) { // n: none
                Bench b(*GetParam());
                for (u32 i = 0; i < n; ++i) {
                    b.start(i % 2 == 0 ? Op::write : Op::read, 100 * i, 4096, i);
                }
                b.turn();
                for (const u32 i : order) {
                    const auto turns_until = [&](auto done) {
                        for (u32 turn = 0; facts().withdraws && turn < 20 && !done(); ++turn) {
                            b.turn();
                        }
                    };
                    turns_until([&] { return !b.of(*b.items[i]).empty(); });
                    ASSERT_FALSE(b.of(*b.items[i]).empty());
                    b.rig->answer(b.of(*b.items[i]).front(), i == bad ? Status::io_error : Status::ok);
                    b.turn();
                    b.turn();
                    turns_until([&] { return b.items[i]->ended != 0; });
                    EXPECT_EQ(b.items[i]->ended, 1u);
                }
                b.finish();
                for (u32 i = 0; i < n; ++i) {
                    EXPECT_EQ(b.items[i]->status, i == bad ? Status::io_error : Status::ok);
                }
            }
        } while (std::next_permutation(order.begin(), order.end()) && !HasFailure());
    }
}

// Many requests of many sizes; each completion is a success, an error, or leads to a retry.
TEST_P(BlockConformance, RandomTraffic) {
    for (u32 seed = 0; seed < 6 && !HasFailure(); ++seed) {
        SCOPED_TRACE(seed);
        std::mt19937 random(seed);
        Bench b(*GetParam());
        const u32 part = b.facts().part_bytes != 0 ? b.facts().part_bytes : 4096;
        const u32 step = std::max(64u, 3 * part / 512 + 16);
        const u32 most = std::min(50u, static_cast<u32>(Rig::sectors / step));
        u32 expected_bad = 0;
        for (u32 i = 0; i < most; ++i) {
            b.start(random() % 2 == 0 ? Op::read : Op::write, u64{i} * step,
                    random() % 3 == 0 ? 3 * part : 512 * (1 + static_cast<u32>(random() % 16)),
                    static_cast<u32>(random()));
            if (random() % 3 == 0) {
                b.turn();
            }
            if (const auto held = b.rig->held(); !held.empty() && random() % 2 == 0) {
                const usize at = random() % held.size();
                switch (random() % 8) {
                case 0: b.rig->answer(at, Status::io_error), ++expected_bad; break;
                case 1: b.rig->answer_again(at), ++expected_bad; break; // the second completion counts
                default: b.rig->answer(at, Status::ok);
                }
            }
            if (random() % 7 == 0) {
                Item& victim = *b.items[random() % b.items.size()];
                if (!victim.done()) {
                    b.forget(victim);
                }
            }
        }
        b.finish();
        u32 bad = 0;
        for (const auto& item : b.items) {
            bad += item->ended != 0 && item->status != Status::ok ? 1 : 0;
        }
        EXPECT_LE(bad, expected_bad);
        EXPECT_TRUE(b.open());
    }
}

// A request of three commands; any of them must be resent, and completions arrive in every order.
TEST_P(BlockConformanceParts, PartsAreSentAgain) {
    const Facts& facts = GetParam()->facts;
    for (const Op op : {Op::read, Op::write}) {
        for (u32 again = 1; again < 8; ++again) { // one bit per command
            std::array<u32, 3> order{0, 1, 2};
            do {
                Bench b(*GetParam());
                Item& item = b.start(op, probe_lba, 3 * facts.part_bytes);
                b.turn();
                ASSERT_EQ(b.of(item).size(), 3u);
                std::array<u64, 3> lbas{};
                for (u32 i = 0; i < 3; ++i) {
                    lbas[i] = b.rig->held()[b.of(item)[i]].lba;
                }
                for (const u32 part : order) {
                    const auto held = b.rig->held();
                    for (usize i = 0; i < held.size(); ++i) {
                        if (held[i].lba == lbas[part]) {
                            (again >> part & 1) != 0 ? b.rig->answer_again(i) : b.rig->answer(i, Status::ok);
                            break;
                        }
                    }
                    b.turn();
                }
                b.finish();
                EXPECT_EQ(item.status, Status::ok);
            } while (std::next_permutation(order.begin(), order.end()) && !HasFailure());
        }
    }
}

TEST_P(BlockConformance, MoreThanFitGoInOrder) {
    Bench b(*GetParam());
    const u32 n = 3 * b.facts().capacity + 5;
    for (u32 i = 0; i < n; ++i) {
        b.start(Op::read, i * 16 % 4096, 4096, 0);
    }
    u64 last = 0;
    for (u32 round = 0; round < 2 * n && !b.idle(); ++round) {
        b.turn();
        if (!b.rig->held().empty()) {
            const u64 lba = b.rig->held().front().lba;
            EXPECT_TRUE(lba >= last || lba == 0) << "requests of one disk overtake each other";
            last = lba;
            b.rig->answer(0, Status::ok);
        }
    }
    b.finish();
}

// An abandoned write may take effect when its completion arrives. Later writes to the same sectors must win.
TEST_P(BlockConformanceHeld, NothingOvertakesAWriteThatWasGivenUp) {
    for (const Op given_up : operations(facts())) {
        if (given_up == Op::read || given_up == Op::flush) {
            continue;
        }
        for (const bool neighbours : {false, true}) {
            for (const Op before : {Op::read, Op::write}) { // a write would be gathered with the second one
                Bench b(*GetParam());
                Item& first = b.start(given_up, 100, 4096);
                if (neighbours) { // one command if they are gathered
                    b.start(given_up, 108, 4096);
                }
                b.turn();
                b.forget(first);
                b.start(before, 92, 4096); // adjacent to the next one
                Item& second = b.start(Op::write, 100, 4096);
                b.turns(2);
                b.finish();
                EXPECT_EQ(second.status, Status::ok);
            }
        }
    }
}

// ---- flushes ----

TEST_P(BlockConformanceHeld, AFlushEndsWhenTheDeviceHasAnsweredItAndNotBefore) {
    for (const Op op : operations(facts())) {
        if (op == Op::read || op == Op::flush) {
            continue;
        }
        for (const u32 lane : {0u, facts().lanes - 1}) { // another lane than the write's
            Bench b(*GetParam());
            Item& write = b.start(op, 100, 4096, facts().lanes - 1);
            b.turn();
            ASSERT_FALSE(b.of(write).empty());
            b.rig->answer(b.of(write).front(), Status::ok);
            b.turns(2);
            ASSERT_EQ(write.status, Status::ok);
            Item& flush = b.start(Op::flush, 0, 0, lane);
            b.turns(2);
            EXPECT_EQ(flush.ended, 0u) << "acknowledged, and the device has not stored it";
            ASSERT_EQ(b.of(flush).size(), 1u) << "the device does not know of it";
            if (facts().drains) {
                Item& other = b.start(Op::write, 200, 4096, lane);
                b.turns(2);
                EXPECT_TRUE(b.of(other).empty()) << "sent beside a flush";
            } else if (facts().capacity > 1) {
                Item& other = b.start(Op::write, 200, 4096, lane);
                b.turn();
                ASSERT_FALSE(b.of(other).empty());
                b.rig->answer(b.of(other).front(), Status::ok);
                b.turns(2);
                EXPECT_EQ(other.ended, 1u);
                EXPECT_EQ(flush.ended, 0u) << "ended with the answer to another request";
            }
            b.rig->answer(b.of(flush).front(), Status::ok);
            b.turns(2);
            EXPECT_EQ(flush.status, Status::ok);
            b.finish();
        }
    }
}

// An abandoned write is not acknowledged: a flush need not wait for it, unless the device takes it alone.
TEST_P(BlockConformanceHeld, AFlushDoesNotWaitForAWriteThatWasGivenUp) {
    Bench b(*GetParam());
    Item& write = b.start(Op::write, 0, 4096);
    b.turn();
    b.forget(write);
    Item& flush = b.start(Op::flush, 0, 0);
    if (facts().drains) {
        b.turns(2);
        EXPECT_TRUE(b.of(flush).empty()) << "sent beside a write";
        b.rig->answer(b.of(write).at(0), Status::ok);
    }
    for (u32 i = 0; i < 10 && b.of(flush).empty(); ++i) { // the device may be in reset
        b.turn();
    }
    ASSERT_EQ(b.of(flush).size(), 1u);
    b.rig->answer(b.of(flush).front(), Status::ok);
    b.turns(2);
    EXPECT_EQ(flush.status, Status::ok);
    b.finish();
}

TEST_P(BlockConformanceGather, NeighboursAreEachTheirOwn) {
    for (u32 gone = 0; gone < 4; ++gone) { // 3: none
        for (const Status status : {Status::ok, Status::io_error}) {
            Bench b(*GetParam());
            Item& blocker = b.start(Op::read, 0, 4096);
            b.turn();
            std::array<Item*, 3> near{};
            for (u32 i = 0; i < 3; ++i) {
                near[i] = &b.start(Op::write, 1000 + 8 * i, 4096);
            }
            b.rig->answer(0, Status::ok);
            b.turn();
            b.turn();
            EXPECT_EQ(blocker.ended, 1u);
            ASSERT_EQ(b.rig->held().size(), 1u) << "they are one command";
            EXPECT_EQ(b.rig->held()[0].bytes, 3 * 4096u);
            if (gone < 3) {
                b.forget(*near[gone]);
                b.pass(30'000'000);
            }
            if (const auto held = b.rig->held(); !held.empty()) { // if the device was stopped: only one of them
                b.rig->answer(0, held[0].bytes > 4096 ? status : Status::ok);
            }
            b.finish();
            for (u32 i = 0; i < 3; ++i) {
                if (i != gone) {
                    EXPECT_EQ(near[i]->status, Status::ok) << "each was tried alone";
                }
            }
        }
    }
}

TEST_P(BlockConformanceIds, AWrongAnswerClosesTheQueue) {
    for (u32 kind = 0; kind < 3; ++kind) {
        Bench b(*GetParam());
        b.start(Op::read, 0, 4096);
        b.turn();
        b.rig->answer(0, Status::ok);
        b.turn();
        b.start(Op::read, 16, 4096);
        b.start(Op::write, 32, 4096);
        b.turn();
        b.rig->answer_wrongly(kind);
        b.turn();
        b.turn();
        EXPECT_TRUE(b.closed());
        EXPECT_TRUE(b.idle());
        EXPECT_EQ(b.items.back()->status, Status::protocol_error);
        b.finish();
    }
}

TEST_P(BlockConformance, NothingIsAllocated) {
    Bench b(*GetParam());
    const DmaBuffer buffer = *b.dma.buffer(3 * std::max(4096u, b.facts().part_bytes));
    struct Waiter : io::Request {
        using io::Request::Request;
    };
    u64 allocated = 0;
    for (u32 i = 0; i < 60; ++i) {
        Waiter small(b.rig->disk(0), i % 2 == 0 ? Op::read : Op::write, 8 * i, buffer.span().subspan(0, 4096));
        Waiter large(b.rig->disk(0), Op::read, 2048, buffer);
        b.rig->enter(0);
        const auto counted = [&](auto&& work) {
            const u64 before = allocations();
            work();
            allocated += i < 10 ? 0 : allocations() - before;
        };
        counted([&] {
            b.rig->disk(0).submit(small);
            b.rig->disk(0).submit(large);
        });
        for (u32 rounds = 0; rounds < 50 && (small.pending() || large.pending()); ++rounds) {
            counted([&] { b.rig->turn(); });
            while (!b.rig->held().empty()) {
                b.rig->answer(0, Status::ok);
            }
        }
        ASSERT_FALSE(small.pending() || large.pending());
        ASSERT_EQ(large.status, Status::ok);
    }
    EXPECT_EQ(allocated, 0u);
}

} // namespace fl::test::conformance
