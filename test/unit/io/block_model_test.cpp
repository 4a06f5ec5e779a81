// The rigs of the conformance suite that need no driver: a model transport that can do everything that the queue
// allows, and the null disk. Then the behaviour in time that the suite's cases do not distinguish.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.processor;
import io.executor;
import io.block;
import io.block_queue;
import io.oldest_wait;
import io.shared_lane;
import drivers.null;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/io/block_conformance.hpp"
// depends on the includes above
#include "unit/io/block_conformance_bench.hpp"
#include "unit/io/block_model.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;

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
        {"reachable_asked_later", {reachable, Kind::reset_requested, io::Retry::later}},
        {"reachable_asked_in_vain_now", {reachable, Kind::reset_requested, io::Retry::now, false}},
        {"reachable_close_alone", {reachable, Kind::close, io::Retry::alone}},
        {"reachable_give_up_now", {reachable, Kind::give_up, io::Retry::now, true, true}},
        {"reachable_table_later", {reachable, Kind::give_up, io::Retry::later, true, false, 100}},
        {"stopped_stopped_alone", {stopped, Kind::stopped, io::Retry::alone}},
        {"stopped_stopped_later", {stopped, Kind::stopped, io::Retry::later}},
        {"stopped_close_now", {stopped, Kind::close, io::Retry::now}},
        {"reachable_stopped_alone", {reachable, Kind::stopped, io::Retry::alone}},
        {"done_none_later", {done, Kind::none, io::Retry::later}},
        {"two_lanes_reachable_give_up_later", {reachable, Kind::give_up, io::Retry::later, true, false, 6, 2}},
        {"two_lanes_done_give_up_alone", {done, Kind::give_up, io::Retry::alone, true, false, 6, 2}},
        {"four_lanes_effect_give_up_now", {effect, Kind::give_up, io::Retry::now, true, false, 6, 4}},
        {"four_lanes_table_later", {reachable, Kind::give_up, io::Retry::later, true, false, 100, 4}},
    };
    std::vector<Make> all;
    for (const Row& row : rows) {
        all.push_back(model(row.name, row.config));
        all.push_back(model((std::string("gather_") + row.name).c_str(), row.config, true));
    }
    return all;
}

// ---- the null disk ----

class NullRig final : public Rig {
  public:
    io::BlockDevice& disk(u32) override { return disk_; }
    void turn() override { executor_.turn(); }
    Instant now() override { return executor_.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override { return {}; }
    void answer(usize, Status) override {}
    bool reachable(DmaSpan) override { return false; }
    void read_medium(u64, u32, std::byte*) override {}
    void close(u32, Status status) override { disk_.queue().close(status, {Code::device_gone, "the test closes it"}); }
    void stop(u32) override { disk_.queue().stop(); }
    void reclaim(u32) override { disk_.queue().reclaim(); }
    bool is_open(u32) override { return disk_.queue().is_open(); }
    u32 in_flight(u32) override { return disk_.queue().in_flight(); }

  private:
    test::FakeMachine clock_;
    io::Executor executor_{clock_.platform()};
    test::HeapDma dma_;
    drivers::null::Disk disk_{executor_, 0, Rig::sectors};
};

const Facts null_facts{
    .capacity = 256, .discards = true, .holds = false, .events = false, .medium = false, .timeout = 5'000'000'000};

// ---- time: what the cases above do not distinguish ----

constexpr ModelConfig effect_give_up{io::Fence::effect, io::Recovery::Kind::give_up, io::Retry::later};

// An abandoned write may still reach the medium: the device gets one more time-out to complete it, then the queue is
// closed.
TEST(BlockQueueTime, AWriteThatWasGivenUpHasATimeOutMore) {
    for (const bool answered : {true, false}) {
        const Make make = model("", effect_give_up);
        Bench b(make);
        const Nanoseconds timeout = b.facts().timeout;
        Item& write = b.start(Op::write, 100, 4096);
        b.pass(timeout * 11 / 10);
        EXPECT_EQ(write.status, Status::timed_out);
        Item& next = b.start(Op::write, 100, 4096); // waits because its sectors are blocked
        b.pass(timeout * 7 / 10);
        EXPECT_TRUE(b.open()) << "closed without the second time-out";
        EXPECT_EQ(next.ended, 0u);
        if (answered) {
            ASSERT_EQ(b.rig->held().size(), 1u);
            b.rig->answer(0, Status::ok);
            b.turn();
            b.finish();
            EXPECT_EQ(next.status, Status::ok);
            EXPECT_TRUE(b.open());
        } else {
            b.pass(timeout * 4 / 10);
            EXPECT_FALSE(b.open()) << "never closed";
            EXPECT_EQ(next.status, Status::device_gone);
            b.finish();
        }
    }
}

// A device that completes abandoned reads is not silent.
TEST(BlockQueueTime, AnswersToReadsThatWereGivenUpAreAnswers) {
    const Make make = model("", effect_give_up);
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
    const ModelConfig asked{io::Fence::reachable, io::Recovery::Kind::reset_requested, io::Retry::later, false};
    for (const bool answered : {true, false}) {
        const Make make = model("", asked);
        Bench b(make);
        const Nanoseconds timeout = b.facts().timeout;
        Item& item = b.start(Op::read, 100, 4096);
        b.pass(timeout * 12 / 10); // requested
        b.rig->jump(7'000'000'000);
        b.pass(timeout * 9 / 10);
        EXPECT_TRUE(b.open() && item.ended == 0);
        if (answered) {
            b.rig->answer(0, Status::ok);
            b.finish();
            EXPECT_EQ(item.status, Status::ok);
            EXPECT_TRUE(b.open());
        } else {
            b.pass(timeout * 2 / 10);
            EXPECT_EQ(item.status, Status::timed_out);
            EXPECT_FALSE(b.open());
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
            const Make make = model("", config, gather);
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

// A command to be resent is not with the device: neither the device's silence nor its answers to others count for it.
TEST(BlockQueueTime, ACommandThatWaitsToBeResentIsNotTimed) {
    for (const io::Recovery::Kind recovery : {io::Recovery::Kind::give_up, io::Recovery::Kind::reset_requested,
                                              io::Recovery::Kind::stopped, io::Recovery::Kind::close}) {
        SCOPED_TRACE(to_underlying(recovery));
        Bench b(model("", {io::Fence::reachable, recovery, io::Retry::later}));
        ModelDevice& device = static_cast<ModelRig<false>&>(*b.rig).device();
        Item& item = b.start(Op::write, 4000, 4096);
        b.turn();
        b.rig->answer_again(0);
        device.takes_resent = false;
        b.turn();
        for (u32 i = 0; i < 20; ++i) { // four time-outs, and more answers than patience allows for
            Item& other = b.start(Op::read, 100 * i, 4096);
            b.pass(b.facts().timeout * 2 / 10);
            ASSERT_EQ(b.rig->held().size(), 1u) << "the other one";
            b.rig->answer(0, Status::ok);
            b.turns(2);
            ASSERT_EQ(other.status, Status::ok);
            ASSERT_EQ(item.ended, 0u) << b.log.text.view();
        }
        EXPECT_TRUE(b.log.text.view().empty()) << b.log.text.view();
        device.takes_resent = true;
        b.finish();
        EXPECT_EQ(item.status, Status::ok);
        EXPECT_TRUE(b.open());
    }
}

// It has a bound nevertheless: nothing else is with the device, and there is no room for it.
TEST(BlockQueueTime, ACommandThatCannotBeResentEndsWithinATimeOut) {
    for (const bool gives_up : {false, true}) {
        ModelConfig config{io::Fence::reachable, io::Recovery::Kind::close, io::Retry::later};
        config.may_give_up = gives_up;
        Bench b(model("", config));
        Item& item = b.start(Op::write, 4000, 4096);
        b.turn();
        b.rig->answer_again(0);
        static_cast<ModelRig<false>&>(*b.rig).device().takes_resent = false;
        b.pass(b.facts().timeout * 9 / 10);
        EXPECT_EQ(item.ended, 0u);
        b.pass(b.facts().timeout * 3 / 10);
        EXPECT_EQ(item.status, gives_up ? Status::timed_out : Status::device_gone);
        EXPECT_FALSE(item.lost) << "the device does not have it";
        EXPECT_EQ(b.open(), gives_up);
        b.finish();
    }
}

// Nor does it belong to what the device was asked to end.
TEST(BlockQueueTime, ACommandThatWaitsToBeResentIsNotEndedByAReset) {
    Bench b(model("", {io::Fence::reachable, io::Recovery::Kind::reset_requested, io::Retry::later, false}));
    const Nanoseconds timeout = b.facts().timeout;
    ModelDevice& device = static_cast<ModelRig<false>&>(*b.rig).device();
    device.takes_resent = false;
    Item& item = b.start(Op::write, 4000, 4096);
    Item& silent = b.start(Op::read, 0, 4096);
    b.turn();
    b.rig->answer_again(0);
    b.pass(timeout * 21 / 10 + 30'000'000); // asked, and in vain
    EXPECT_EQ(silent.status, Status::timed_out);
    EXPECT_EQ(item.status, Status::device_gone) << "ended with the queue, not by the reset";
    EXPECT_FALSE(item.lost);
    b.finish();
}

// No new request is sent: it is the resend that finds the queue damaged.
TEST(BlockQueueFault, AResendFindsTheQueueDamaged) {
    for (const io::Retry retry : {io::Retry::now, io::Retry::later, io::Retry::alone}) {
        for (const bool gather : {false, true}) {
            SCOPED_TRACE(to_underlying(retry));
            ModelConfig config;
            config.retry = retry;
            Bench b(model("", config, gather));
            Item& item = b.start(Op::write, 4000, 4096);
            Item& other = b.start(Op::read, 0, 4096);
            b.turn();
            ASSERT_EQ(b.of(item).size(), 1u);
            const Injected injected = b.rig->inject(0, Fault::send);
            b.rig->answer_again(b.of(item).front());
            b.turns(4);
            EXPECT_TRUE(b.closed());
            EXPECT_EQ(item.status, Status::protocol_error);
            EXPECT_EQ(other.status, Status::protocol_error);
            EXPECT_EQ(b.lines(injected.text), 1u) << b.log.text.view();
            b.finish();
        }
    }
}

// Without room the slot is free again, and the queue goes on.
TEST(BlockQueueExchange, ThereIsNoRoomInTheQueue) {
    ModelRig<false> rig(effect_give_up);
    rig.device().takes_exchanges = false;
    io::Exchange exchange(rig.executor());
    for (u32 i = 0; i < 20; ++i) { // more often than there are slots
        const auto sent = rig.queue(0)->send(exchange);
        ASSERT_FALSE(sent);
        EXPECT_EQ(sent.error().code, Code::exhausted);
        EXPECT_EQ(rig.in_flight(0), 0u);
        EXPECT_FALSE(rig.queue(0)->is_in_flight(exchange));
    }
    rig.device().takes_exchanges = true;
    ASSERT_TRUE(rig.queue(0)->send(exchange));
    rig.turn();
    rig.answer_exchange(0);
    rig.turn();
    EXPECT_TRUE(exchange.answered);
    EXPECT_EQ(rig.in_flight(0), 0u);
}

// Two disks share a queue: a write abandoned on one of them blocks its sectors on that disk only.
TEST(BlockQueueTime, AWriteThatWasGivenUpHoldsUpItsOwnDiskAlone) {
    const ModelConfig reachable{io::Fence::reachable, io::Recovery::Kind::give_up, io::Retry::later};
    ModelRig<false> rig(reachable);
    ModelDisk<false> other(rig.executor(), *rig.queue(0));
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
    rig.queue(0)->remove(other);
    clear_quarantine();
}

// This many events without a completion are a storm: no more are requested until idle_window has passed, and one line
// is logged.
TEST(BlockQueueTime, TheLimitOfAStormIsExact) {
    struct Capture final : log::Sink {
        Capture() { log::attach(*this); }
        ~Capture() { log::detach(*this); }
        void write(std::string_view t) override { text += t; }
        bool told() const { return text.find("signals without a cause") != std::string::npos; }
        std::string text;
    } log;
    using Transport = ModelTransport<false>;
    ModelRig<false> rig(effect_give_up);
    const auto raise = [&](u32 events) {
        rig.device().events += events;
        rig.executor().wake(); // the turn that handles a wake() does not arm, the next one does
        rig.turn();
        rig.turn();
        const u32 before = rig.device().arms;
        rig.executor().wake();
        rig.turn();
        rig.turn();
        return rig.device().arms != before; // more are requested
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
    const Make make = model("", config);
    Bench b(make);
    const Nanoseconds timeout = b.facts().timeout;
    Item& before = b.start(Op::read, 100, 4096);
    b.pass(timeout * 9 / 10);
    EXPECT_EQ(before.ended, 0u);
    b.stop(0);
    b.rig->queue(0)->open(timeout);
    Item& after = b.start(Op::read, 100, 4096);
    b.pass(timeout * 8 / 10);
    EXPECT_EQ(before.status, Status::device_gone);
    EXPECT_TRUE(b.open() && after.ended == 0);
    b.pass(timeout * 4 / 10);
    EXPECT_FALSE(b.open()) << "no room for a whole time-out";
    EXPECT_EQ(after.status, Status::device_gone);
    b.finish();
}
} // namespace

namespace fl::test::conformance {
CONFORM(Model, models());
// Some of them: what differs between the models is below a shared lane.
inline std::vector<Make> some_models() {
    std::vector<Make> some;
    const auto all = models();
    for (usize i = 0; i < all.size() && all[i].facts.lanes == 1; i += 8) {
        some.push_back(all[i]);
    }
    return some;
}
CONFORM(SharedModel, shared(some_models()));
CONFORM(Null, {Make{"disk", null_facts, [] { return std::make_unique<NullRig>(); }}});
} // namespace fl::test::conformance
