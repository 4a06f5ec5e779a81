// The cases of the conformance suite, and the rigs that need no driver: a model transport that can do everything that
// the queue allows, and the null disk.
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
import io.shared_lane;
import drivers.null;

#include "unit/io_support.hpp"
// depends on the includes above
#include "unit/io_block_conformance_shared.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Op;
using io::Status;

// ---- one case ----

/// The rig's memory. Fails the test if the device could still access freed memory.
class CheckedDma final : public DmaAllocator {
  public:
    explicit CheckedDma(Rig& rig) : rig_(rig) {}
    Result<DmaSpan> allocate(u32 size, u64 limit) override {
        ++outstanding;
        return rig_.memory().allocate(size, limit);
    }
    void free(DmaSpan span) override {
        --outstanding;
        EXPECT_FALSE(rig_.reachable(span)) << "memory is freed that the device may access";
        rig_.memory().free(span);
    }
    u32 outstanding = 0;

  private:
    Rig& rig_;
};

/// A coroutine that does one I/O.
struct Job {
    struct promise_type {
        Job get_return_object() { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
        std::suspend_never initial_suspend() noexcept { return {}; }
        std::suspend_always final_suspend() noexcept { return {}; }
        void return_void() {}
        void unhandled_exception() {}
    };
    std::coroutine_handle<promise_type> handle;
};

struct Item {
    Op op = Op::read;
    u64 lba = 0;
    u32 lane = 0;
    DmaBuffer buffer;
    DmaSpan span;
    Nanoseconds bound = 0;          // the caller's limit
    io::Request* request = nullptr; // while it is pending or not yet resumed
    u32 ended = 0;
    Status status = Status::not_written;
    bool lost = false;
    bool forgotten = false;
    std::coroutine_handle<> frame;
    u64 sectors() const { return span.size / 512; }
    bool done() const { return ended != 0 || forgotten; }
    bool overlaps(const Held& held) const {
        return held.op == op && lba < held.lba + held.bytes / 512 && held.lba < lba + sectors();
    }
};

Job run(Item& item, io::BlockDevice& disk) {
    io::BlockDevice::Transfer transfer(disk, item.op, item.lba, item.span, item.bound);
    item.request = &transfer;
    static_cast<void>(co_await transfer);
    item.status = transfer.status;
    item.lost = transfer.buffer_lost;
    item.request = nullptr;
    ++item.ended;
}

constexpr u64 probe_lba = 4096;

class Bench {
  public:
    explicit Bench(const Make& make) : rig(make.make()), dma(*rig) {}
    ~Bench() {
        items.clear();
        clear_quarantine();
    }
    const Facts& facts() const { return rig->facts; }
    Item& start(Op op, u64 lba, u32 bytes, u32 lane = 0) {
        Item& item = *items.emplace_back(std::make_unique<Item>());
        item.op = op;
        item.lba = lba;
        item.lane = lane % rig->lanes();
        item.buffer = *dma.buffer(bytes);
        item.span = item.buffer.span().subspan(0, bytes);
        for (u32 i = 0; i < bytes; i += 8) {
            const u64 stamp = op == Op::write ? (u64{items.size()} << 32 | i) : ~u64{0};
            std::memcpy(item.span.data + i, &stamp, 8);
        }
        item.bound = lba == probe_lba ? probe_bound : 0;
        rig->enter(item.lane);
        item.frame = run(item, rig->disk(item.lane)).handle;
        return item;
    }
    void forget(Item& item) {
        rig->enter(item.lane);
        item.forgotten = item.ended == 0;
        std::exchange(item.frame, nullptr).destroy();
        item.request = nullptr;
        item.buffer.reset();
    }
    bool cancel(Item& item) {
        rig->enter(item.lane);
        return rig->disk(item.lane).cancel(*item.request);
    }
    void turn() {
        rig->turn();
        for (const auto& item : items) {
            if (item->ended != 0 && item->buffer && !item->lost) {
                EXPECT_FALSE(rig->reachable(item->span)) << "the device may access the buffer of a request that ended";
            }
        }
    }
    void pass(Nanoseconds length) {
        for (const Instant end = rig->now() + length; rig->now() < end;) {
            turn();
        }
    }
    bool idle() const {
        return std::ranges::all_of(items, [](const auto& item) { return item->done(); });
    }
    /// The commands of `item`, as indices into held().
    std::vector<usize> of(const Item& item) {
        std::vector<usize> places;
        const auto held = rig->held();
        for (usize i = 0; i < held.size(); ++i) {
            if (item.overlaps(held[i])) {
                places.push_back(i);
            }
        }
        return places;
    }
    /// Completes everything successfully, newest first, until no request waits and the device is idle. Then checks that
    /// nothing is missing.
    void finish() {
        if (std::exchange(finished, true)) {
            return;
        }
        for (u32 round = 0; round < 600 && !(idle() && rig->held().empty()); ++round) {
            for (usize n = rig->held().size(); n-- > 0 && n < rig->held().size();) {
                rig->answer(n, Status::ok);
            }
            turn();
        }
        turn();
        turn();
        for (const auto& item : items) {
            EXPECT_EQ(item->ended, item->forgotten ? 0u : 1u) << "a request is lost, or ends twice";
        }
        if (!rig->is_open()) {
            rig->reclaim();
        }
        EXPECT_EQ(rig->under_way(), 0u) << "a command is left that the device does not have";
        for (u32 lane = 0; lane < rig->lanes(); ++lane) {
            EXPECT_EQ(rig->disk(lane).under_way(), 0u) << "submitted is not completed";
        }
        check_data();
        free_all();
    }
    void check_data() {
        for (const auto& item : items) {
            if (item->ended == 0 || item->status != Status::ok || !facts().medium || item->op > Op::write) {
                continue;
            }
            std::vector<std::byte> medium(item->span.size);
            rig->read_medium(item->lba, static_cast<u32>(item->sectors()), medium.data());
            EXPECT_EQ(std::memcmp(medium.data(), item->span.data, medium.size()), 0)
                << io::name(item->op) << " of " << medium.size() << " bytes at " << item->lba << " is not as it says";
        }
    }
    void free_all() {
        for (auto& item : items) {
            if (item->frame) {
                std::exchange(item->frame, nullptr).destroy();
            }
            item->buffer.reset();
        }
        EXPECT_EQ(quarantine_state().spans, 0u);
        EXPECT_EQ(quarantine_state().buffers, 0u);
        EXPECT_EQ(dma.outstanding, 0u) << "memory that nobody can access any more did not come back";
    }

    std::unique_ptr<Rig> rig;
    CheckedDma dma;
    std::vector<std::unique_ptr<Item>> items;
    Nanoseconds probe_bound = 0;
    bool finished = false;
};

// ---- points of a request's life ----

enum class Point : u8 { submitted, with_device, partly_answered, answered, drained, waiting, retrying };
constexpr const char* point_names[] = {
    "submitted",        "with the device", "partly answered", "answered, not drained", "drained, not resumed",
    "waiting for room", "to be sent again"};

/// Brings a request to the given point, among other requests. Nullptr: this transport has no such point.
Item* reach(Bench& b, Point point, Op op) {
    const Facts& f = b.facts();
    const bool split = point == Point::partly_answered;
    if ((!f.holds && point > Point::submitted && point != Point::drained) || (split && f.part_bytes == 0) ||
        (point == Point::retrying && !f.retries)) {
        return nullptr;
    }
    const u32 last = b.rig->lanes() - 1;
    const u32 others = point == Point::waiting ? f.capacity : f.capacity > 4 ? 2 : 0;
    for (u32 i = 0; i < others; ++i) {
        b.start(i % 2 == 0 ? Op::read : Op::write, i * 16, 4096, point == Point::waiting ? last : i);
        if (f.gathers) {
            b.turn(); // each in a separate command
        }
    }
    Item& probe =
        b.start(op, probe_lba, split || point == Point::with_device ? std::max(4096u, 3 * f.part_bytes) : 4096, last);
    b.start(Op::read, 3000, 4096, 0);
    if (point == Point::submitted) {
        return &probe;
    }
    b.turn();
    if (point == Point::with_device || point == Point::waiting) {
        EXPECT_EQ(b.of(probe).empty(), point == Point::waiting);
        return &probe;
    }
    if (!f.holds) {
        return &probe;
    }
    if (b.of(probe).empty()) {
        ADD_FAILURE() << "the device does not have it";
        return nullptr;
    }
    if (point == Point::retrying) {
        b.rig->answer_again(b.of(probe).front());
        b.turn();
        EXPECT_EQ(probe.ended, 0u);
        return &probe;
    }
    b.rig->answer(b.of(probe).front(), Status::ok);
    if (point == Point::drained) {
        b.rig->drain();
        EXPECT_TRUE((f.forwarded || !probe.request->pending()) && probe.ended == 0);
    } else if (point != Point::answered) {
        b.turn();
    }
    return &probe;
}

/// Calls f(bench, probe, point) for every point, for reads and for writes.
template <class F>
void at_every_point(const Make& make, F&& f, Nanoseconds probe_bound = 0) {
    for (const Op op : {Op::read, Op::write}) {
        for (u8 p = 0; p <= to_underlying(Point::retrying); ++p) {
            SCOPED_TRACE(std::string(io::name(op)) + ", " + point_names[p]);
            Bench b(make);
            b.probe_bound = probe_bound;
            if (Item* probe = reach(b, static_cast<Point>(p), op)) {
                f(b, *probe, static_cast<Point>(p));
                b.finish();
            }
            if (testing::Test::HasFailure()) {
                return;
            }
        }
    }
}
bool had_answer(Point point) { return point == Point::drained; }
} // namespace

namespace fl::test::conformance {

TEST_P(BlockConformance, EndsWithItsAnswer) {
    at_every_point(GetParam(), [](Bench& b, Item&, Point) {
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
        EXPECT_TRUE(b.rig->is_open());
    });
}

TEST_P(BlockConformance, IsCancelledOnlyWhereTheDeviceDoesNotHaveIt) {
    at_every_point(GetParam(), [](Bench& b, Item& probe, Point point) {
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
    at_every_point(GetParam(), [](Bench& b, Item& probe, Point) {
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
    at_every_point(GetParam(), [](Bench& b, Item&, Point) {
        for (auto& item : b.items) {
            b.forget(*item);
        }
        b.pass(30'000'000);
    });
}

TEST_P(BlockConformance, SilenceHasABound) {
    at_every_point(GetParam(), [](Bench& b, Item& probe, Point point) {
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

// The caller's own limit is shorter than the device's time-out.
TEST_P(BlockConformance, TheCallersLimitEndsItsRequestAlone) {
    constexpr Nanoseconds bound = 60'000'000;
    at_every_point(
        GetParam(),
        [&](Bench& b, Item& probe, Point point) {
            const DmaSpan span = probe.span;
            b.pass(bound + 3 * io::Executor::tick_length);
            if (point == Point::waiting && b.facts().forwarded &&
                b.facts().capacity == io::SharedLane::max_forwarded) {
                EXPECT_EQ(probe.ended, 0u); // it has not reached the queue: the limit begins there
                return;
            }
            const bool answered = !b.facts().holds || point == Point::answered || had_answer(point);
            EXPECT_EQ(probe.ended, 1u) << "it waits longer than its limit";
            EXPECT_EQ(probe.status, answered ? Status::ok : Status::timed_out);
            EXPECT_TRUE(probe.lost || !b.rig->reachable(span));
            EXPECT_TRUE(b.rig->is_open());
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
        at_every_point(GetParam(), [&](Bench& b, Item&, Point) { b.pass(b.facts().timeout * percent / 100); });
    }
}

TEST_P(BlockConformance, AStopOfTheMachineIsNoSilence) {
    for (const Nanoseconds length : {Nanoseconds{7'000'000'000}, Nanoseconds{60'000'000'000}}) {
        at_every_point(GetParam(), [&](Bench& b, Item&, Point) {
            b.rig->jump(length);
            b.pass(20'000'000);
            EXPECT_TRUE(b.rig->is_open());
            b.finish();
            for (const auto& item : b.items) {
                EXPECT_EQ(item->status, Status::ok);
            }
        });
    }
}

TEST_P(BlockConformance, CloseEndsEverythingWithItsStatus) {
    for (const Status status : {Status::device_gone, Status::protocol_error}) {
        at_every_point(GetParam(), [&](Bench& b, Item& probe, Point point) {
            b.rig->enter(0);
            b.rig->close(status);
            b.turn();
            b.turn();
            EXPECT_TRUE(b.idle());
            // it meets a closed queue
            const bool late = b.facts().forwarded &&
                              (point == Point::submitted ||
                               (point == Point::waiting && b.facts().capacity == io::SharedLane::max_forwarded));
            EXPECT_EQ(probe.status, had_answer(point) ? Status::ok : late ? Status::device_gone : status);
            Item& refused = b.start(Op::read, 0, 4096, 0);
            b.turn();
            b.turn();
            EXPECT_EQ(refused.status, Status::device_gone);
        });
    }
}

TEST_P(BlockConformance, StopEndsEverything) {
    at_every_point(GetParam(), [](Bench& b, Item& probe, Point point) {
        if (b.facts().stoppable) {
            b.rig->stop();
            b.turn();
            EXPECT_TRUE(b.idle());
            EXPECT_EQ(probe.status, had_answer(point) ? Status::ok : Status::device_gone);
        }
    });
}

TEST_P(BlockConformance, AStormOfEventsIsSurvived) {
    at_every_point(GetParam(), [](Bench& b, Item&, Point) {
        if (!b.facts().events) {
            return;
        }
        for (u32 i = 0; i < 300; ++i) { // within a time-out
            b.rig->event();
            if (i % 30 == 0) {
                b.turn();
            }
        }
        EXPECT_TRUE(b.rig->is_open());
        b.finish();
        for (const auto& item : b.items) {
            EXPECT_EQ(item->status, Status::ok);
        }
    });
}

// ---- completions ----

TEST_P(BlockConformance, EveryStatusArrives) {
    const auto answers = GetParam().make()->facts.answers; // a copy: the rig is destroyed at the end of this line
    for (const Status status : answers) {
        for (const Op op : {Op::read, Op::write}) {
            Bench b(GetParam());
            if (!b.facts().holds) {
                return;
            }
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
TEST_P(BlockConformance, AnswersComeInEveryOrder) {
    for (u32 n = 1; n <= std::min(4u, GetParam().make()->facts.capacity); ++n) {
        std::vector<u32> order(n);
        std::iota(order.begin(), order.end(), 0u);
        do {
            for (u32 bad = 0; bad <= n; ++bad) { // n: none
                Bench b(GetParam());
                if (!b.facts().holds) {
                    return;
                }
                for (u32 i = 0; i < n; ++i) {
                    b.start(i % 2 == 0 ? Op::write : Op::read, 100 * i, 4096, i);
                }
                b.turn();
                for (const u32 i : order) {
                    ASSERT_FALSE(b.of(*b.items[i]).empty());
                    b.rig->answer(b.of(*b.items[i]).front(), i == bad ? Status::io_error : Status::ok);
                    b.turn();
                    b.turn();
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
    for (u32 seed = 0; seed < 12 && !HasFailure(); ++seed) {
        SCOPED_TRACE(seed);
        std::mt19937 random(seed);
        Bench b(GetParam());
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
        EXPECT_TRUE(b.rig->is_open());
    }
}

// A request of three commands; any of them must be resent, and completions arrive in every order.
TEST_P(BlockConformance, PartsAreSentAgain) {
    const Facts facts = GetParam().make()->facts;
    if (!facts.retries || facts.part_bytes == 0 || facts.capacity < 3) {
        return;
    }
    for (const Op op : {Op::read, Op::write}) {
        for (u32 again = 1; again < 8; ++again) { // one bit per command
            std::array<u32, 3> order{0, 1, 2};
            do {
                Bench b(GetParam());
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
    Bench b(GetParam());
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
TEST_P(BlockConformance, NothingOvertakesAWriteThatWasGivenUp) {
    for (const bool neighbours : {false, true}) {
        for (const Op before : {Op::read, Op::write}) { // a write would be gathered with the second one
            Bench b(GetParam());
            if (!b.facts().holds) {
                return;
            }
            Item& first = b.start(Op::write, 100, 4096);
            if (neighbours) { // one command if they are gathered
                b.start(Op::write, 108, 4096);
            }
            b.turn();
            b.forget(first);
            b.start(before, 92, 4096); // adjacent to the next one
            Item& second = b.start(Op::write, 100, 4096);
            b.turn();
            b.turn();
            b.finish();
            EXPECT_EQ(second.status, Status::ok);
        }
    }
}

TEST_P(BlockConformance, NeighboursAreEachTheirOwn) {
    for (u32 gone = 0; gone < 4; ++gone) { // 3: none
        for (const Status status : {Status::ok, Status::io_error}) {
            Bench b(GetParam());
            if (!b.facts().gathers || b.facts().copies) {
                return;
            }
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

TEST_P(BlockConformance, AWrongAnswerClosesTheQueue) {
    for (u32 kind = 0; kind < 3; ++kind) {
        Bench b(GetParam());
        if (!b.facts().ids) {
            return;
        }
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
        EXPECT_FALSE(b.rig->is_open());
        EXPECT_TRUE(b.idle());
        EXPECT_EQ(b.items.back()->status, Status::protocol_error);
        b.finish();
    }
}

TEST_P(BlockConformance, NothingIsAllocated) {
    Bench b(GetParam());
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

// ---- the model ----

namespace {

struct ModelConfig {
    io::Fence fence = io::Fence::done;
    io::Recovery::Kind recovery = io::Recovery::Kind::give_up;
    io::Retry retry = io::Retry::alone;
    bool heeds = true;        // reacts to the request to complete everything
    bool may_give_up = false; // the queue may abandon requests without room instead of closing
    u32 room = 6;             // capacity in commands
};

/// Sectors never written hold their own number in every 8 bytes.
class SparseMedium {
  public:
    void read(u64 lba, u32 bytes, std::byte* into) const {
        for (u32 done = 0; done < bytes; done += 512, ++lba) {
            if (const auto found = written_.find(lba); found != written_.end()) {
                std::memcpy(into + done, found->second.data(), 512);
                continue;
            }
            for (u32 i = 0; i < 512; i += 8) {
                std::memcpy(into + done + i, &lba, 8);
            }
        }
    }
    void write(u64 lba, u32 bytes, const std::byte* from) {
        for (u32 done = 0; done < bytes; done += 512, ++lba) {
            std::memcpy(written_[lba].data(), from + done, 512);
        }
    }

  private:
    std::map<u64, std::array<std::byte, 512>> written_;
};

/// The device: holds commands until the test completes them.
struct ModelDevice {
    struct Entry {
        u64 id = 0;
        Op op = Op::read;
        u64 lba = 0;
        u32 bytes = 0;
        std::vector<DmaSpan> spans;
        bool reaches = true;
        bool acts = true; // a write still reaches the medium
        std::vector<std::byte> copy;
    };
    ModelConfig config;
    SparseMedium medium;
    std::vector<Entry> staged;
    std::vector<Entry> commands;
    std::deque<io::Completion> answers;
    std::vector<u64> past;
    u32 events = 0;
    u32 arms = 0;
    bool asked = false;
    Instant ready_at = 0; // in reset until then
    u32 fences_after_stop = 0;
    bool stopped = false;

    void move(Entry& e) {
        u64 lba = e.lba;
        if (e.op == Op::write && e.acts && !e.reaches) {
            medium.write(lba, static_cast<u32>(e.copy.size()), e.copy.data());
        }
        for (const DmaSpan& span : e.spans) {
            if (e.op == Op::write && e.acts && e.reaches) {
                medium.write(lba, span.size, span.data);
            } else if (e.op == Op::read && e.reaches) {
                medium.read(lba, span.size, span.data);
            }
            lba += span.size / 512;
        }
    }
    void answer(usize i, Status how, io::Retry retry) {
        const InFake scope;
        Entry e = std::move(commands[i]);
        commands.erase(commands.begin() + static_cast<std::ptrdiff_t>(i));
        if (how == Status::ok && retry == io::Retry::none) {
            move(e);
        }
        past.push_back(e.id);
        answers.push_back({e.id, how, retry});
        ++events;
    }
    bool find(u64 id, Entry*& found) {
        for (auto* list : {&staged, &commands}) {
            for (Entry& e : *list) {
                if (e.id == id) {
                    found = &e;
                    return true;
                }
            }
        }
        return false;
    }
    bool reachable(DmaSpan span) const {
        for (const auto* list : {&staged, &commands}) {
            for (const Entry& e : *list) {
                for (const DmaSpan& s : e.spans) {
                    if (e.reaches && s.bus < span.bus + span.size && span.bus < s.bus + s.size) {
                        return true;
                    }
                }
            }
        }
        return false;
    }
    void stop() {
        staged.clear();
        commands.clear();
        answers.clear();
        stopped = true;
    }
};

template <bool gather>
class ModelDisk;

template <bool gather>
class ModelTransport : public io::TransportDefaults {
  public:
    using Disk = ModelDisk<gather>;
    using Command = io::Command<ModelTransport>;
    struct Wire {
        u64 id = 0;
        bool taken = false;
    };
    static constexpr std::string_view driver = "model";
    static constexpr u32 max_commands = 10;
    static constexpr u32 kept_commands = 2;
    static constexpr bool gathers = gather;
    static constexpr u32 max_idle_events = 16;
    static constexpr u32 part_bytes = 16 * 1024;

    ModelTransport(io::Executor& executor, ModelDevice& device) : executor_(executor), device_(device) {}
    void use(io::CommandTable<ModelTransport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& c) {
        if (device_.staged.size() + device_.commands.size() + device_.answers.size() >= device_.config.room ||
            executor_.now() < device_.ready_at) {
            return io::Fit::full;
        }
        c.bytes = std::min(c.bytes, part_bytes);
        c.wire.taken = true;
        return io::Fit::ok;
    }
    bool join(Command& c, const io::Request& next) {
        return c.op <= Op::write && c.bytes + next.buffer.size <= part_bytes;
    }
    io::SendResult send(Command& c, u64 id) {
        const InFake scope;
        if (executor_.now() < device_.ready_at) {
            EXPECT_GT(c.retries, 0) << "sent to a device in reset";
            return io::SendResult::full;
        }
        EXPECT_TRUE(c.wire.taken) << "sent without room";
        c.wire.id = id;
        ModelDevice::Entry e{id, c.op, c.lba, c.bytes, {}, true, true, {}};
        u32 bytes = 0;
        for (io::Request* r = c.first; r != nullptr && c.op <= Op::write; r = c.gathered ? r->link : nullptr) {
            e.spans.push_back(c.gathered ? r->buffer : c.data());
            bytes += e.spans.back().size;
        }
        EXPECT_TRUE(c.op > Op::write || bytes == c.bytes) << "the command is not its requests";
        device_.staged.push_back(std::move(e));
        return io::SendResult::sent;
    }
    Result<void> publish(io::Counters& counters) {
        const InFake scope;
        counters.notifications += device_.staged.empty() ? 0 : 1;
        for (auto& e : device_.staged) {
            device_.commands.push_back(std::move(e));
        }
        device_.staged.clear();
        return {};
    }
    io::Next next(io::Completion& completion) {
        if (device_.answers.empty()) {
            return io::Next::none;
        }
        completion = device_.answers.front();
        device_.answers.pop_front();
        const Command* command = commands_->find(completion.id);
        return command == nullptr || command->delayed ? io::Next::broken : io::Next::one;
    }
    u32 events() const { return device_.events; }
    Result<bool> arm() {
        ++device_.arms;
        return !device_.answers.empty();
    }
    bool finish(Command& c, Status) {
        EXPECT_TRUE(std::exchange(c.wire.taken, false)) << "finished twice, or never begun";
        return true;
    }
    io::Fence fence(Command& c) {
        const InFake scope;
        EXPECT_FALSE(c.delayed) << "the device does not have it";
        if (device_.config.fence == io::Fence::stopped) {
            device_.stop();
            begin_reset();
            return io::Fence::stopped;
        }
        if (c.gathered) {
            return io::Fence::reachable;
        }
        ModelDevice::Entry* e = nullptr;
        if (device_.find(c.wire.id, e) && device_.config.fence != io::Fence::reachable) {
            for (const DmaSpan& span : e->spans) {
                e->copy.insert(e->copy.end(), span.data, span.data + span.size);
            }
            e->reaches = false;
            e->acts = device_.config.fence == io::Fence::effect;
        }
        return device_.config.fence;
    }
    io::Recovery recover(const Command&, io::OldestWait::Finding, std::string_view) {
        using Kind = io::Recovery::Kind;
        switch (device_.config.recovery) {
        case Kind::stopped:
            device_.stop();
            begin_reset();
            return {.kind = Kind::stopped, .why = std::nullopt};
        case Kind::asked: device_.asked = device_.config.heeds; return {.kind = Kind::asked, .why = std::nullopt};
        case Kind::none: // the interrupt was lost
            if (!device_.commands.empty()) {
                device_.answer(0, Status::ok, io::Retry::none);
            }
            return {.kind = Kind::none, .why = std::nullopt};
        default: return {.kind = device_.config.recovery, .why = std::nullopt};
        }
    }
    std::optional<Error> asked_in_vain(bool) { return Error{Code::timed_out, "asked in vain"}; }
    io::Stuck stuck(std::string_view names) {
        if (device_.config.may_give_up) {
            return {io::Stuck::Kind::give_up, Error{Code::timed_out, "no room"}};
        }
        return TransportDefaults::stuck(names);
    }
    Result<void> tick(Instant, bool) {
        while (device_.asked && !device_.commands.empty()) {
            device_.answer(0, Status::timed_out, io::Retry::none);
        }
        device_.asked = false;
        return {};
    }

  private:
    void begin_reset() { device_.ready_at = executor_.now() + 25'000'000; }
    io::Executor& executor_;
    ModelDevice& device_;
    io::CommandTable<ModelTransport>* commands_ = nullptr;
};

template <bool gather>
class ModelDisk final : public io::QueueDisk<ModelTransport<gather>> {
  public:
    ModelDisk(io::Executor& executor, io::BlockQueue<ModelTransport<gather>>& queue)
        : io::QueueDisk<ModelTransport<gather>>(executor, queue) {
        this->identity_.name = FixedText<16>("model0");
        this->set_geometry({.sectors = Rig::sectors, .flush = true});
        queue.add(*this);
    }
};

/// A rig with one lane, whose clock is a FakeMachine.
template <class Queue>
class OneQueueRig : public Rig {
  public:
    void turn() override { executor.turn(); }
    Instant now() override { return executor.now(); }
    void jump(Nanoseconds length) override { clock.time += length; }
    DmaAllocator& memory() override { return dma; }
    virtual Queue& queue() = 0;
    void close(Status status) override { queue().close(status, {Code::device_gone, "the test closes it"}); }
    void stop() override { queue().stop(); }
    bool is_open() override { return queue().is_open(); }
    u32 under_way() override { return queue().under_way(); }

    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
};

template <bool gather>
class ModelRig final : public OneQueueRig<io::BlockQueue<ModelTransport<gather>>> {
  public:
    explicit ModelRig(const ModelConfig& config) {
        device.config = config;
        this->facts = {.capacity = std::min(config.room, 8u),
                       .part_bytes = ModelTransport<gather>::part_bytes,
                       .gathers = gather,
                       .answers_after_all = config.recovery == io::Recovery::Kind::none,
                       .retries = true,
                       .ids = true,
                       .timeout = 200'000'000,
                       .timeouts = 16,
                       .answers = {Status::ok, Status::io_error, Status::not_supported, Status::timed_out}};
        device.answers.resize(64);
        device.answers.clear();
        queue_.open(this->facts.timeout);
    }
    ~ModelRig() { queue_.stop(); }
    io::BlockDevice& disk(u32) override { return disk_; }
    io::BlockQueue<ModelTransport<gather>>& queue() override { return queue_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (const auto& e : device.commands) {
            held.push_back({e.op, e.lba, e.bytes});
        }
        return held;
    }
    void answer(usize index, Status how) override {
        device.answer(index, how, io::Retry::none);
        this->executor.wake();
    }
    void answer_again(usize index) override {
        device.answer(index, Status::io_error, device.config.retry);
        this->executor.wake();
    }
    void answer_wrongly(u32 kind) override {
        if (kind == 2) {
            device.answers.push_back({device.commands[0].id});
            device.answer(0, Status::ok, io::Retry::none);
        } else {
            device.answers.push_back({kind == 0 ? 0x1234567 : device.past.front()});
        }
        this->executor.wake();
    }
    void event() override {
        ++device.events;
        this->executor.wake();
    }
    bool reachable(DmaSpan span) override { return device.reachable(span); }
    void read_medium(u64 lba, u32 count, std::byte* into) override { device.medium.read(lba, count * 512, into); }
    void reclaim() override {
        device.stop();
        queue_.reclaim();
    }
    ModelDevice device;

  private:
    io::BlockQueue<ModelTransport<gather>> queue_{this->executor, this->executor, device};
    ModelDisk<gather> disk_{this->executor, queue_};
};

std::vector<Make> models() {
    using enum io::Fence;
    using Kind = io::Recovery::Kind;
    struct Row {
        const char* name;
        ModelConfig config;
    };
    const Row rows[] = {
        {"done_give_up_alone", {done, Kind::give_up, io::Retry::alone}},
        {"effect_give_up_later", {effect, Kind::give_up, io::Retry::later}},
        {"effect_close_now", {effect, Kind::close, io::Retry::now}},
        {"reachable_asked_later", {reachable, Kind::asked, io::Retry::later}},
        {"reachable_asked_in_vain_now", {reachable, Kind::asked, io::Retry::now, false}},
        {"reachable_close_alone", {reachable, Kind::close, io::Retry::alone}},
        {"reachable_give_up_now", {reachable, Kind::give_up, io::Retry::now, true, true}},
        {"reachable_table_later", {reachable, Kind::give_up, io::Retry::later, true, false, 100}},
        {"stopped_stopped_alone", {stopped, Kind::stopped, io::Retry::alone}},
        {"stopped_stopped_later", {stopped, Kind::stopped, io::Retry::later}},
        {"stopped_close_now", {stopped, Kind::close, io::Retry::now}},
        {"reachable_stopped_alone", {reachable, Kind::stopped, io::Retry::alone}},
        {"done_none_later", {done, Kind::none, io::Retry::later}},
    };
    std::vector<Make> all;
    for (const Row& row : rows) {
        all.push_back({std::string(row.name), [c = row.config] { return std::make_unique<ModelRig<false>>(c); }});
        all.push_back(
            {std::string("gather_") + row.name, [c = row.config] { return std::make_unique<ModelRig<true>>(c); }});
    }
    return all;
}

// ---- the null disk ----

class NullRig final : public Rig {
  public:
    NullRig() {
        facts = {.capacity = 256, .holds = false, .events = false, .medium = false};
        facts.timeout = 5'000'000'000;
    }
    io::BlockDevice& disk(u32) override { return disk_; }
    void turn() override { executor.turn(); }
    Instant now() override { return executor.now(); }
    void jump(Nanoseconds length) override { clock.time += length; }
    DmaAllocator& memory() override { return dma; }
    std::vector<Held> held() override { return {}; }
    void answer(usize, Status) override {}
    bool reachable(DmaSpan) override { return false; }
    void read_medium(u64, u32, std::byte*) override {}
    void close(Status status) override { disk_.queue().close(status, {Code::device_gone, "the test closes it"}); }
    void stop() override { disk_.queue().stop(); }
    void reclaim() override { disk_.queue().reclaim(); }
    bool is_open() override { return disk_.queue().is_open(); }
    u32 under_way() override { return disk_.queue().under_way(); }

  private:
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    drivers::null::Disk disk_{executor, 0, Rig::sectors};
};

// ---- time: what the cases above do not distinguish ----

constexpr ModelConfig effect_give_up{io::Fence::effect, io::Recovery::Kind::give_up, io::Retry::later};

// An abandoned write may still reach the medium: the device gets one more time-out to complete it, then the queue is
// closed.
TEST(BlockQueueTime, AWriteThatWasGivenUpHasATimeOutMore) {
    for (const bool answered : {true, false}) {
        const Make make{"", [] { return std::make_unique<ModelRig<false>>(effect_give_up); }};
        Bench b(make);
        const Nanoseconds timeout = b.facts().timeout;
        Item& write = b.start(Op::write, 100, 4096);
        b.pass(timeout * 11 / 10);
        EXPECT_EQ(write.status, Status::timed_out);
        Item& next = b.start(Op::write, 100, 4096); // waits because its sectors are blocked
        b.pass(timeout * 7 / 10);
        EXPECT_TRUE(b.rig->is_open()) << "closed without the second time-out";
        EXPECT_EQ(next.ended, 0u);
        if (answered) {
            ASSERT_EQ(b.rig->held().size(), 1u);
            b.rig->answer(0, Status::ok);
            b.turn();
            b.finish();
            EXPECT_EQ(next.status, Status::ok);
            EXPECT_TRUE(b.rig->is_open());
        } else {
            b.pass(timeout * 4 / 10);
            EXPECT_FALSE(b.rig->is_open()) << "never closed";
            EXPECT_EQ(next.status, Status::device_gone);
            b.finish();
        }
    }
}

// A device that completes abandoned reads is not silent.
TEST(BlockQueueTime, AnswersToReadsThatWereGivenUpAreAnswers) {
    const Make make{"", [] { return std::make_unique<ModelRig<false>>(effect_give_up); }};
    Bench b(make);
    std::array<Item*, 4> given_up{};
    for (u32 i = 0; i < given_up.size(); ++i) {
        given_up[i] = &b.start(Op::read, 100 * i, 4096);
    }
    Item& item = b.start(Op::read, 1000, 4096);
    b.turn();
    for (Item* each : given_up) {
        b.forget(*each);
    }
    for (u32 i = 0; i < given_up.size(); ++i) {
        b.pass(b.facts().timeout * 6 / 10);
        ASSERT_FALSE(b.rig->held().empty());
        b.rig->answer(0, Status::ok);
        b.turn();
        EXPECT_EQ(item.ended, 0u);
    }
    b.finish();
    EXPECT_EQ(item.status, Status::ok);
}

// The device gets a whole time-out, in machine time, to complete everything on request.
TEST(BlockQueueTime, AStopAfterAskingIsNoSilence) {
    const ModelConfig asked{io::Fence::reachable, io::Recovery::Kind::asked, io::Retry::later, false};
    for (const bool answered : {true, false}) {
        const Make make{"", [&] { return std::make_unique<ModelRig<false>>(asked); }};
        Bench b(make);
        const Nanoseconds timeout = b.facts().timeout;
        Item& item = b.start(Op::read, 100, 4096);
        b.pass(timeout * 12 / 10); // requested
        b.rig->jump(7'000'000'000);
        b.pass(timeout * 9 / 10);
        EXPECT_TRUE(b.rig->is_open() && item.ended == 0);
        if (answered) {
            b.rig->answer(0, Status::ok);
            b.finish();
            EXPECT_EQ(item.status, Status::ok);
            EXPECT_TRUE(b.rig->is_open());
        } else {
            b.pass(timeout * 2 / 10);
            EXPECT_EQ(item.status, Status::timed_out);
            EXPECT_FALSE(b.rig->is_open());
            b.finish();
        }
    }
}

// A device that always requests a retry: the retry limit applies. The time-out does not, because the device responds.
TEST(BlockQueueTime, TriesAreCounted) {
    struct Row {
        io::Retry retry;
        u32 answers;
    };
    for (const Row& row : {Row{io::Retry::now, 1 + io::QueueCore::retries_at_once},
                           Row{io::Retry::later, 1 + io::QueueCore::retries_later}, Row{io::Retry::alone, 2}}) {
        for (const bool gather : {false, true}) {
            SCOPED_TRACE(to_underlying(row.retry));
            ModelConfig config;
            config.retry = row.retry;
            const Make make{"", [&]() -> std::unique_ptr<Rig> {
                                if (gather) {
                                    return std::make_unique<ModelRig<true>>(config);
                                }
                                return std::make_unique<ModelRig<false>>(config);
                            }};
            Bench b(make);
            Item& item = b.start(Op::read, 100, 4096);
            u32 answers = 0;
            for (u32 turns = 0; turns < 2'000 && item.ended == 0; ++turns) {
                b.turn();
                if (!b.rig->held().empty()) {
                    ++answers;
                    b.rig->answer_again(0);
                }
            }
            EXPECT_EQ(answers, row.answers);
            EXPECT_EQ(item.status, Status::io_error);
            b.finish();
        }
    }
}

// Two disks share a queue: a write abandoned on one of them blocks its sectors on that disk only.
TEST(BlockQueueTime, AWriteThatWasGivenUpHoldsUpItsOwnDiskAlone) {
    const ModelConfig reachable{io::Fence::reachable, io::Recovery::Kind::give_up, io::Retry::later};
    ModelRig<false> rig(reachable);
    ModelDisk<false> other(rig.executor, rig.queue());
    test::HeapDma dma;
    const DmaBuffer buffer = *dma.buffer(4 * 4096);
    const auto part = [&](u32 i) { return buffer.span().subspan(i * 4096, 4096); };
    auto lost = std::make_unique<io::Request>(rig.disk(0), Op::write, 100, part(0));
    rig.disk(0).submit(*lost);
    rig.turn();
    lost.reset(); // its owner abandons it
    ASSERT_EQ(rig.held().size(), 1u);
    io::Request same(rig.disk(0), Op::read, 104, part(1));
    io::Request beside(rig.disk(0), Op::read, 108, part(2));
    io::Request elsewhere(other, Op::read, 100, part(3));
    for (io::Request* request : {&same, &beside, &elsewhere}) {
        request->waiter = std::noop_coroutine();
        request->device().submit(*request);
    }
    rig.turn();
    EXPECT_EQ(rig.held().size(), 2u) << "one of the disk itself waits, and what comes after it there";
    if (rig.held().size() == 2) {
        rig.answer(1, Status::ok);
        rig.turn();
        EXPECT_FALSE(elsewhere.pending());
        EXPECT_TRUE(same.pending());
    }
    rig.answer(0, Status::ok); // the write
    rig.turn();
    for (u32 i = 0; i < 4; ++i) {
        while (!rig.held().empty()) {
            rig.answer(0, Status::ok);
        }
        rig.turn();
    }
    EXPECT_FALSE(same.pending() || beside.pending());
    rig.queue().remove(other);
    clear_quarantine();
}

// This many events without a completion are a storm: no more are requested until idle_window has passed, and one line
// is logged.
TEST(BlockQueueTime, TheLimitOfAStormIsExact) {
    struct Capture final : log::Sink {
        Capture() { log::attach(*this); }
        ~Capture() { log::detach(*this); }
        void write(std::string_view t) override { text += t; }
        bool told() const { return text.find("signals without a reason") != std::string::npos; }
        std::string text;
    } log;
    using Transport = ModelTransport<false>;
    ModelRig<false> rig(effect_give_up);
    const auto raise = [&](u32 events) {
        rig.device.events += events;
        rig.executor.wake(); // the turn that handles a wake() does not arm, the next one does
        rig.turn();
        rig.turn();
        const u32 before = rig.device.arms;
        rig.executor.wake();
        rig.turn();
        rig.turn();
        return rig.device.arms != before; // more are requested
    };
    const auto tick = [&] {
        const Instant begun = rig.now();
        while (rig.now() < begun + 2 * io::Executor::tick_length) {
            rig.turn();
        }
    };
    tick();
    EXPECT_TRUE(raise(Transport::max_idle_events - 1));
    EXPECT_FALSE(raise(1));
    tick();
    EXPECT_FALSE(log.told());
    EXPECT_FALSE(raise(1));
    tick();
    EXPECT_TRUE(log.told());
    for (const Instant begun = rig.now(); rig.now() < begun + Transport::idle_window;) {
        rig.turn();
    }
    EXPECT_TRUE(raise(1)) << "it is over";
    for (u32 i = 0; i < 3 * Transport::max_idle_events; ++i) { // events with a completion do not count
        io::Request request(rig.disk(0), Op::flush, 0, {});
        request.waiter = std::noop_coroutine();
        rig.disk(0).submit(request);
        rig.turn();
        rig.answer(0, Status::ok);
        rig.turn();
        EXPECT_FALSE(request.pending());
    }
    EXPECT_TRUE(raise(1));
}

// Waits from before a stop do not count after the next open().
TEST(BlockQueueTime, AQueueThatIsOpenedAgainBeginsAnew) {
    ModelConfig config;
    config.room = 0;
    const Make make{"", [&] { return std::make_unique<ModelRig<false>>(config); }};
    Bench b(make);
    const Nanoseconds timeout = b.facts().timeout;
    Item& before = b.start(Op::read, 100, 4096);
    b.pass(timeout * 9 / 10);
    EXPECT_EQ(before.ended, 0u);
    b.rig->stop();
    static_cast<ModelRig<false>&>(*b.rig).queue().open(timeout);
    Item& after = b.start(Op::read, 100, 4096);
    b.pass(timeout * 8 / 10);
    EXPECT_EQ(before.status, Status::device_gone);
    EXPECT_TRUE(b.rig->is_open() && after.ended == 0);
    b.pass(timeout * 4 / 10);
    EXPECT_FALSE(b.rig->is_open()) << "no room for a whole time-out";
    EXPECT_EQ(after.status, Status::device_gone);
    b.finish();
}
} // namespace

namespace fl::test::conformance {
INSTANTIATE_TEST_SUITE_P(Model, BlockConformance, testing::ValuesIn(models()), name_of);
INSTANTIATE_TEST_SUITE_P(Null, BlockConformance,
                         testing::Values(Make{"null", [] { return std::make_unique<NullRig>(); }}), name_of);
// Some of them: what differs between the models is below a shared lane.
inline std::vector<Make> some_models() {
    std::vector<Make> some;
    const auto all = models();
    for (usize i = 0; i < all.size(); i += 8) {
        some.push_back(all[i]);
    }
    return some;
}
INSTANTIATE_TEST_SUITE_P(SharedModel, BlockConformance, testing::ValuesIn(shared(some_models())), name_of);
} // namespace fl::test::conformance
