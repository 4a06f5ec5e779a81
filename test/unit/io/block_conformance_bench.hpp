// What the cases of the conformance suite share: a rig with requests on it, and the points of a request's life. Include
// after unit/io/support.hpp and unit/io/block_conformance.hpp.
#pragma once
#include "gtest_macros.hpp"
#include "zeroed.hpp"
import test.gtest;
import host.std;

namespace fl::test::conformance {
using io::Op;
using io::Status;

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

using Job = StartedTask;

struct Item {
    Op op = Op::read;
    u64 lba = 0;
    u32 lane = 0;
    DmaBuffer buffer;
    DmaSpan span;                   // empty for a flush
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
        return held.op == op && held.lane == lane &&
               (op == Op::flush || (lba < held.lba + held.bytes / 512 && held.lba < lba + sectors()));
    }
};

inline Job run(Item& item, io::BlockDevice& disk) {
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
    explicit Bench(const Make& make) : facts_(make.facts), rig(make.make()), dma(*rig) {
        clear_quarantine(); // of an earlier test in this process
    }
    ~Bench() {
        items.clear();
        clear_quarantine();
    }
    const Facts& facts() const { return facts_; }
    Item& start(Op op, u64 lba, u32 bytes, u32 lane = 0) {
        Item& item = *items.emplace_back(std::make_unique<Item>());
        item.op = op;
        item.lba = op == Op::flush ? 0 : lba;
        item.lane = lane % facts().lanes;
        if (io::has_data(op)) {
            item.buffer = *dma.buffer(bytes);
            item.span = item.buffer.span().subspan(0, bytes);
        } else if (op != Op::flush) {
            item.span.size = bytes;
        }
        for (u32 i = 0; i < item.buffer.span().size; i += 8) {
            const u64 stamp = op == Op::write ? (u64{items.size()} << 32 | i) : ~u64{0};
            std::memcpy(item.span.data + i, &stamp, 8);
        }
        item.bound = lba == probe_lba ? probe_bound : 0;
        rig->enter(item.lane);
        item.frame = run(item, rig->disk(item.lane)).handle;
        rig->enter(0);
        return item;
    }
    void forget(Item& item) {
        rig->enter(item.lane);
        item.forgotten = item.ended == 0;
        std::exchange(item.frame, nullptr).destroy();
        item.request = nullptr;
        item.buffer.reset();
        rig->enter(0);
    }
    bool cancel(Item& item) {
        rig->enter(item.lane);
        const bool cancelled = rig->disk(item.lane).cancel(*item.request);
        rig->enter(0);
        return cancelled;
    }
    void turn() {
        rig->turn();
        for (const auto& item : items) {
            if (item->ended != 0 && item->buffer && !item->lost) {
                EXPECT_FALSE(rig->reachable(item->span)) << "the device may access the buffer of a request that ended";
            }
        }
    }
    void turns(u32 count) {
        for (u32 i = 0; i < count; ++i) {
            turn();
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
    /// The lane's commands, as indices into held().
    std::vector<usize> of_lane(u32 lane) {
        std::vector<usize> places;
        const auto held = rig->held();
        for (usize i = 0; i < held.size(); ++i) {
            if (held[i].lane == lane) {
                places.push_back(i);
            }
        }
        return places;
    }
    void close(u32 lane, Status status) {
        on(lane, [&] { rig->close(lane, status); });
    }
    void stop(u32 lane) {
        on(lane, [&] { rig->stop(lane); });
    }
    void stop_all() {
        for (u32 lane = 0; lane < facts().lanes; ++lane) {
            stop(lane);
        }
    }
    bool open() const {
        u32 open = 0;
        for (u32 lane = 0; lane < facts().lanes; ++lane) {
            open += rig->is_open(lane) ? 1 : 0;
        }
        return open == facts().lanes;
    }
    bool closed() const {
        for (u32 lane = 0; lane < facts().lanes; ++lane) {
            if (rig->is_open(lane)) {
                return false;
            }
        }
        return true;
    }
    /// Lines of the log that contain `what`.
    u32 lines(std::string_view what) const {
        u32 count = 0;
        const std::string text(log.text.view());
        for (usize at = text.find(what); at != std::string::npos; at = text.find(what, at)) {
            ++count;
            at = std::min(text.find('\n', at), text.size());
        }
        return count;
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
        turns(2);
        for (const auto& item : items) {
            EXPECT_EQ(item->ended, item->forgotten ? 0u : 1u) << "a request is lost, or ends twice";
        }
        for (u32 lane = 0; lane < facts().lanes; ++lane) {
            on(lane, [&] {
                if (!rig->is_open(lane)) {
                    rig->reclaim(lane);
                }
                EXPECT_EQ(rig->in_flight(lane), 0u) << "a command is left that the device does not have";
                EXPECT_EQ(rig->disk(lane).in_flight(), 0u) << "submitted is not completed";
            });
        }
        check_data();
        free_all();
    }
    void check_data() {
        for (const auto& item : items) {
            if (item->ended == 0 || item->status != Status::ok || !facts().medium || item->op == Op::flush) {
                continue;
            }
            const Zeroed medium(item->span.size); // a vector of bytes takes most of a test's time without optimization
            rig->read_medium(item->lba, static_cast<u32>(item->sectors()), medium.data());
            if (!io::has_data(item->op)) { // the fakes write zeros also when they discard
                EXPECT_TRUE(std::ranges::all_of(medium, [](std::byte b) { return b == std::byte{}; }))
                    << medium.size() << " bytes at " << item->lba << " are not zeros";
                continue;
            }
            EXPECT_EQ(std::memcmp(medium.data(), item->span.data, medium.size()), 0)
                << io::name(item->op) << " of " << medium.size() << " bytes at " << item->lba << " is not as it says";
        }
    }
    void free_all() {
        for (auto& item : items) {
            if (item->frame) {
                on(item->lane, [&] { std::exchange(item->frame, nullptr).destroy(); });
            }
            item->buffer.reset();
        }
        EXPECT_EQ(quarantine_state().spans, 0u);
        EXPECT_EQ(quarantine_state().buffers, 0u);
        EXPECT_EQ(dma.outstanding, 0u) << "memory that nobody can access any more did not come back";
    }
    template <class F>
    void on(u32 lane, F&& work) {
        rig->enter(lane);
        work();
        rig->enter(0);
    }

  private:
    const Facts facts_;

  public:
    test::CapturedLog log;
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

/// The operations of the transport.
inline std::vector<Op> operations(const Facts& f) {
    std::vector<Op> all{Op::read, Op::write, Op::flush};
    if (f.discards) {
        all.push_back(Op::discard);
    }
    if (f.zeroes) {
        all.push_back(Op::write_zeroes);
    }
    if (f.secure_discards) {
        all.push_back(Op::secure_discard);
    }
    return all;
}

/// The points that a request of this kind has.
inline std::vector<Point> points(const Facts& f, Op op) {
    if (!f.holds) {
        return {Point::submitted, Point::drained};
    }
    std::vector<Point> all{Point::submitted, Point::with_device, Point::answered, Point::drained, Point::waiting};
    const u32 part = op <= Op::write          ? f.part_bytes
                     : op == Op::discard      ? f.discard_bytes
                     : op == Op::write_zeroes ? f.zeroes_bytes
                                              : 0;
    if (part != 0) {
        all.push_back(Point::partly_answered);
    }
    if (f.retries && (op != Op::flush || f.retries_flush)) {
        all.push_back(Point::retrying);
    }
    return all;
}

/// Brings a request to the given point, among other requests. Nullptr: a failed test.
inline Item* reach(Bench& b, Point point, Op op) {
    const Facts& f = b.facts();
    const u32 last = f.lanes - 1;
    const bool alone = f.drains && op > Op::write;
    const u32 others = point == Point::waiting ? f.capacity : f.capacity > 4 && !alone ? 2 : 0;
    for (u32 i = 0; i < others; ++i) {
        b.start(i % 2 == 0 ? Op::read : Op::write, i * 16, 4096, point == Point::waiting ? last : i);
        if (f.gathers) {
            b.turn(); // each in a separate command
        }
    }
    const bool large = point == Point::partly_answered || point == Point::with_device;
    Item& probe = b.start(op, probe_lba, large ? std::max(4096u, 3 * f.part_bytes) : 4096, last);
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

/// Calls f(bench, probe, point) for every operation and every point of its requests.
template <class F>
void at_every_point(const Make& make, F&& f, Nanoseconds probe_bound = 0) {
    for (const Op op : operations(make.facts)) {
        for (const Point point : points(make.facts, op)) {
            SCOPED_TRACE(std::string(io::name(op)) + ", " + point_names[to_underlying(point)]);
            Bench b(make);
            b.probe_bound = probe_bound;
            if (Item* probe = reach(b, point, op)) {
                f(b, *probe, point);
                b.finish();
            }
            if (testing::Test::HasFailure()) {
                return;
            }
        }
    }
}
inline bool had_answer(Point point) { return point == Point::drained; }

} // namespace fl::test::conformance
