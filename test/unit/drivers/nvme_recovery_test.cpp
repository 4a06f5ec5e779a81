// Commands that are not answered, and controllers that fail: abort, reset, what is sent again, and what is closed; on
// one lane by a line, and on several by MSI-X.
#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.mmio;
import core.log;
import core.processor;
import io.executor;
import io.task;
import io.block;
import io.block_queue;
import drivers.driver;
import drivers.pci;
import drivers.nvme;

#include "unit/drivers/nvme_machine.hpp"

namespace {
using namespace nvme_machine;
using Aborts = nvme_fake::Controller::Aborts;
using io::Status;

usize count(const Machine& m, u8 opcode) {
    return static_cast<usize>(
        std::ranges::count_if(m.device.admin, [&](const auto& e) { return (e[0] & 0xff) == opcode; }));
}

TEST(NvmeRecovery, AnAbortedCommandIsSentAgain) {
    Machine& m = attached();
    m.device.aborts = Aborts::yes;
    Pending p(m);
    const u16 cid = m.device.held[0].cid();
    ASSERT_TRUE(turn_until(m, [&] { return count(m, 0x08) == 1; }));
    const auto& abort = m.device.admin.back();
    EXPECT_EQ(abort[0] & 0xffff, 0x0008u);
    EXPECT_EQ(abort[10], u32{cid} << 16 | 1u) << "CID, SQID";
    for (const usize dword : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u, 9u, 11u, 12u, 13u, 14u, 15u}) {
        EXPECT_EQ(abort[dword], 0u) << dword;
    }
    ASSERT_TRUE(turn_until(m, [&] { return !m.device.held.empty(); })) << "sent again";
    EXPECT_NE(m.device.held[0].cid(), cid) << "a late answer would be taken for it";
    EXPECT_FALSE(p.ended());
    p.answer();
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::ok);
    EXPECT_EQ(m.device.resets, 0u);
}

TEST(NvmeRecovery, AnAbortedCommandThatMustNotBeRepeatedHasTimedOut) {
    Machine& m = attached();
    m.device.aborts = Aborts::yes;
    m.device.abort_status = 0x4007; // DNR
    Pending p(m);
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::timed_out);
    EXPECT_EQ(m.device.resets, 0u);
    m.device.hold = false;
    exchange_data(m, 4096);
}

TEST(NvmeRecovery, AnAbortWithoutEffectLeadsToAReset) {
    struct Way {
        Aborts aborts;
        bool refused;
        u32 timeouts; // 500 ms each: the command's, and the Abort's
    };
    for (const Way way : {Way{Aborts::never, false, 1}, Way{Aborts::never, true, 1}, Way{Aborts::unanswered, false, 2},
                          Way{Aborts::claimed, false, 2}}) {
        Options o;
        o.doorbell_buffers = true;
        Machine& m = attached(o);
        m.device.aborts = way.aborts;
        if (way.refused) {
            m.device.refused.insert(0x08);
        }
        Pending p(m, io::Op::write);
        std::memset(p.data.data(), 0x77, 4096);
        const Instant begun = m.executor.now();
        ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1; }));
        const Nanoseconds waited = m.executor.now() - begun;
        EXPECT_GE(waited, way.timeouts * 500'000'000u);
        EXPECT_LE(waited, way.timeouts * 500'000'000u + 150'000'000u);
        ASSERT_TRUE(turn_until(m, [&] { return !m.device.held.empty(); })) << "sent again";
        p.answer();
        EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
        EXPECT_EQ(p.request.status, Status::ok);
        EXPECT_EQ(std::memcmp(m.device.medium.data() + 8 * 512, p.data.data(), 4096), 0);
        EXPECT_EQ(m.device.resets, 1u);
        EXPECT_EQ(count(m, 0x7c), 2u) << "the doorbell buffers are in use again";
        EXPECT_NE(m.device.shadow, 0u);
        EXPECT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; })) << "and events are";
        exchange_data(m, 65536);
    }
}

// The admin queue answers, and each reset succeeds, but the I/O queue is dead.
TEST(NvmeRecovery, ResetsWithoutAnyIoCompletedCloseTheController) {
    Machine& m = attached();
    m.device.aborts = Aborts::never;
    Pending p(m);
    ASSERT_TRUE(turn_until(m, [&] { return p.ended(); }, 40000));
    EXPECT_EQ(p.request.status, Status::timed_out);
    EXPECT_LE(m.device.resets, nvme::Recovery::most_in_a_row + 1) << "the last one disables it";
    DmaBuffer data = *m.dma.buffer(4096);
    io::Request next(*m.sink.disks[0], io::Op::read, 0, data.span());
    m.sink.disks[0]->submit(next);
    EXPECT_FALSE(next.pending());
    EXPECT_EQ(next.status, Status::device_gone);
    EXPECT_TRUE(turn_until(m, [&] { return quarantine_state().spans == 0; })) << "it was disabled";
}

// Status 0x006 (Internal Error) with CRD in bits 12:11 of the field without the phase [nvme-1.4 §4.6.1].
constexpr u16 internal_error(u32 delay) { return static_cast<u16>(0x006 | delay << 11); }

Options with_delays(u16 first, u16 second, u16 third) {
    Options o;
    o.retry_delays = {first, second, third};
    return o;
}

/// How long it takes, in nanoseconds, until the held command has been sent again after its end with `status`.
Nanoseconds resent_after(Machine& m, u16 status) {
    const Instant begun = m.executor.now();
    m.device.answer(0, status);
    EXPECT_TRUE(m.device.held.empty());
    EXPECT_TRUE(turn_until(m, [&] { return !m.device.held.empty(); }));
    return m.executor.now() - begun;
}

constexpr Nanoseconds tick = 150'000'000; // at most, with what the turns take

TEST(NvmeRecovery, ARetryWaitsForTheDelayThatTheControllerNames) {
    for (const u32 named : {1u, 2u, 3u}) {
        Machine& m = attached(with_delays(2, 4, 3));
        EXPECT_EQ(m.device.delays_accepted, 1u);
        const Nanoseconds delay = m.device.options.retry_delays[named - 1] * u64{100'000'000};
        Pending p(m);
        const Nanoseconds waited = resent_after(m, internal_error(named));
        EXPECT_GE(waited, delay) << named;
        EXPECT_LE(waited, delay + tick) << named;
        EXPECT_FALSE(p.ended());
        p.answer();
        EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
        EXPECT_EQ(p.request.status, Status::ok);
        EXPECT_EQ(m.device.resets, 0u);
    }
}

TEST(NvmeRecovery, ARetryWithoutADelayIsForTheNextTick) {
    {
        Machine& m = attached(with_delays(4, 0, 4)); // CRD 0, and CRD 2, which is no delay
        Pending p(m);
        EXPECT_LE(resent_after(m, internal_error(0)), tick);
        EXPECT_LE(resent_after(m, internal_error(2)), tick);
        p.answer();
        EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    }
    { // a controller without delays, which names one all the same
        Machine& m = attached();
        EXPECT_EQ(m.device.delays_accepted, 0u);
        EXPECT_FALSE(m.device.features.contains(0x16));
        Pending p(m);
        EXPECT_LE(resent_after(m, internal_error(3)), tick);
        p.answer();
        EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    }
}

// Its delays together may not reach a time-out (500 ms here).
TEST(NvmeRecovery, ACommandWhoseRetryIsTooFarAwayEnds) {
    {
        Machine& m = attached(with_delays(5, 0xffff, 0));
        for (const u32 named : {1u, 2u}) {
            Pending p(m);
            const Instant begun = m.executor.now();
            m.device.answer(0, internal_error(named));
            EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
            EXPECT_LE(m.executor.now() - begun, tick);
            EXPECT_EQ(p.request.status, Status::io_error);
        }
        m.device.hold = false;
        exchange_data(m, 4096);
    }
    Machine& m = attached(with_delays(3, 0, 0));
    Pending p(m);
    EXPECT_GE(resent_after(m, internal_error(1)), 300'000'000u);
    m.device.answer(0, internal_error(1));
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::io_error);
    m.device.hold = false;
    Pending next(m); // the next command in the slot begins anew
    EXPECT_GE(resent_after(m, internal_error(1)), 300'000'000u);
    next.answer();
    EXPECT_TRUE(turn_until(m, [&] { return next.ended(); }));
    EXPECT_EQ(next.request.status, Status::ok);
}

TEST(NvmeRecovery, DelaysAreAcceptedAgainAfterAReset) {
    Machine& m = attached(with_delays(1, 2, 3));
    m.device.options.fatal = true;
    m.device.on_reset = [&] { m.device.options.fatal = false; };
    Pending p(m);
    ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1 && !m.device.held.empty(); }));
    EXPECT_EQ(m.device.delays_accepted, 2u);
    p.answer();
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
}

// A command that waits to be sent again is not with the controller, which can guess its next id.
TEST(NvmeRecovery, AnAnswerToACommandThatWaitsClosesTheController) {
    Machine& m = attached();
    Pending p(m);
    const u16 cid = m.device.held[0].cid();
    m.device.hostile = true;
    m.device.answer(0, 0x006);                             // sent again in the next tick
    m.device.complete(1, static_cast<u16>(cid + 0x80), 0); // the id that it will have
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::protocol_error);
    EXPECT_TRUE(turn_until(m, [&] { return (m.device.cc & 1) == 0; }));
}

TEST(NvmeRecovery, AFatalStatusIsResetAtOnce) {
    Machine& m = attached();
    Pending p(m);
    m.device.options.fatal = true;
    m.device.on_reset = [&] { m.device.options.fatal = false; };
    const Instant begun = m.executor.now();
    ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1 && !m.device.held.empty(); }));
    EXPECT_LE(m.executor.now() - begun, 100'000'000u) << "not before the time-out";
    EXPECT_EQ(count(m, 0x08), 0u) << "no Abort";
    p.answer();
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::ok);
}

TEST(NvmeRecovery, AnAdminCommandWithoutAnAnswerLeadsToAReset) {
    Machine& m = attached();
    ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
    m.device.mute = true; // the log page is not answered
    m.device.on_reset = [&] { m.device.mute = false; };
    m.device.changed = {1};
    m.device.report_event(0x0004'0002);
    ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1 && m.device.events.size() == 1; }));
    exchange_data(m, 4096);
}

// Each step of the reset that fails closes the controller, within its bound, and ends the request.
TEST(NvmeRecovery, AResetThatFailsClosesTheController) {
    for (int kind = 0; kind < 6; ++kind) {
        SCOPED_TRACE(kind);
        clear_quarantine(); // of an earlier test in this process
        Machine& m = attached();
        Pending p(m);
        test::CapturedLog log;
        m.device.stays_ready = kind == 0;
        m.device.on_reset = [&m, kind] {
            m.device.options.never_ready = kind == 1;
            m.device.options.fatal = kind == 2;
            m.device.options.absent = kind == 3;
            m.device.mute = kind == 4;
            if (kind == 5) {
                m.device.refused.insert(0x05); // Create I/O Completion Queue
            }
        };
        ASSERT_TRUE(turn_until(m, [&] { return p.ended(); }, 40000));
        EXPECT_EQ(p.request.status, kind == 0 || kind == 1 || kind == 4 ? Status::timed_out : Status::device_gone);
        EXPECT_EQ(m.sink.disks[0]->removed(), kind == 3);
        EXPECT_TRUE(log.has("nvme0: closed: ")) << log.text.view();
        EXPECT_TRUE(turn_until(m, [] { return quarantine_state().spans == 0; }, 40000)) << "memory is lost";
        const bool master = (m.space.functions.begin()->second.get16(4) & 4) != 0;
        EXPECT_EQ(master, kind != 0) << "a controller that does not stop may not access memory";
        io::Request refused(*m.sink.disks[0], io::Op::read, 0, p.data.span());
        m.sink.disks[0]->submit(refused);
        m.executor.turn();
        EXPECT_EQ(refused.status, Status::device_gone);
        m.device.on_reset = nullptr;
    }
}

TEST(NvmeRecovery, NamespacesAreLookedAtAgain) {
    Options o;
    o.namespaces = 2;
    Machine& m = attached(o);
    Pending p(m);
    m.device.on_reset = [&] {
        m.device.patch = [](u32 cns, u32 nsid, u64 data) {
            if (cns == 0 && nsid == 1) {
                nvme_fake::store<u64>(data, 4096);
                nvme_fake::store<u64>(data + 8, 4096);
            } else if (cns == 0 && nsid == 2) {
                nvme_fake::store<u32>(data + 128, 12 << 16); // formatted anew
            }
        };
    };
    ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1 && !m.device.held.empty(); }));
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, 4096u);
    EXPECT_FALSE(m.sink.disks[0]->removed());
    EXPECT_TRUE(m.sink.disks[1]->removed());
    p.answer();
    EXPECT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::ok);
}

// Found after a reset, or when the controller reports a change: the disk is closed, and I/O that waits for the reset
// does not reach the other namespace.
TEST(NvmeRecovery, AnotherNamespaceWithTheSameNumber) {
    struct Row {
        const char* what;
        Options before;
        void (*change)(nvme_fake::Controller&);
        std::string_view text; // empty: it is the same one
    };
    constexpr u32 old = 0x10200;
    const Row rows[] = {
        {"nothing", {.eui64 = 1, .nguid = 2}, [](auto&) {}, ""},
        {"size", {.eui64 = 1}, [](auto& d) { d.options.blocks = 4096; }, ""},
        {"uuid",
         {},
         [](auto& d) { d.options.uuid = 0x20; },
         "nvme0n1: another namespace has its number: UUID 40000000000000000000000000000011 was expected, UUID "
         "40000000000000000000000000000021 was seen: it is closed"},
        {"nguid", {.nguid = 2, .uuid = 0}, [](auto& d) { d.options.nguid = 7; }, "another namespace"},
        {"eui64",
         {.eui64 = 3, .uuid = 0},
         [](auto& d) { d.options.eui64 = 7; },
         "EUI64 4000000000000004 was expected, EUI64 4000000000000008 was seen"},
        {"nguid of an old controller", {.version = old, .nguid = 2}, [](auto& d) { d.options.nguid = 7; }, "another"},
        {"uuid of an old controller", {.version = old}, [](auto& d) { d.options.uuid = 7; }, ""},
        {"no descriptors", {.descriptors = false}, [](auto& d) { d.options.uuid = 7; }, ""},
        {"descriptors that are gone", {}, [](auto& d) { d.options.descriptors = false; }, "no identifier was seen"},
        {"another one of the same size, and of another one",
         {.nguid = 2},
         [](auto& d) {
             d.options.nguid = 7;
             d.options.blocks = 4096;
         },
         "another namespace"},
        {"format", {}, [](auto& d) { d.options.lba_shift = 12; }, "blocks of 512 bytes were expected, of 4096 were"},
        {"a broken list",
         {.nguid = 2},
         [](auto& d) {
             d.patch = [](u32 cns, u32, u64 data) {
                 if (cns == 3) {
                     nvme_fake::store<u32>(data, 0x0702); // an NGUID of 7 bytes
                 }
             };
         },
         "another namespace"},
    };
    for (const Row& row : rows) {
        for (const bool by_event : {false, true}) {
            fl::test::CapturedLog log;
            Machine& m = attached(row.before);
            io::BlockDevice& disk = *m.sink.disks[0];
            if (by_event) {
                ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
                row.change(m.device);
                m.device.changed = {1};
                m.device.report_event(0x0004'0002);
                turn_until(m, [] { return false; }, 200);
                EXPECT_EQ(disk.removed(), !row.text.empty()) << row.what;
                EXPECT_EQ(m.sink.disks.size(), row.text.empty() ? 1u : 2u) << row.what << ": the other one";
            } else {
                Pending p(m);
                m.device.hold = false;
                m.device.options.fatal = true;
                m.device.on_reset = [&] {
                    m.device.options.fatal = false;
                    row.change(m.device);
                };
                ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1; })) << row.what;
                DmaBuffer data = *m.dma.buffer(4096);
                io::Request waiting(disk, io::Op::write, 8, data.span()); // until the reset is over
                disk.submit(waiting);
                m.device.records = true;
                ASSERT_TRUE(turn_until(m, [&] { return p.ended() && !waiting.pending(); })) << row.what;
                EXPECT_EQ(waiting.status, p.request.status) << row.what;
                EXPECT_EQ(m.device.commands.empty(), !row.text.empty()) << row.what << ": nothing reaches it";
                EXPECT_EQ(p.request.status, row.text.empty() ? Status::ok : Status::device_gone) << row.what;
                EXPECT_EQ(disk.removed(), !row.text.empty()) << row.what;
            }
            if (row.text.empty()) {
                EXPECT_FALSE(log.has("it is closed")) << log.text.view();
            } else {
                EXPECT_TRUE(log.has(row.text)) << row.what << log.text.view();
            }
        }
    }
}

// A command that is to be sent again is not sent to what may be another disk now.
TEST(NvmeRecovery, ARemovedDiskSendsNothingAgain) {
    Machine& m = attached();
    Pending p(m, io::Op::write);
    m.device.answer(0, 0x006); // Internal Error: later
    m.deliver();
    m.executor.turn();
    EXPECT_FALSE(p.ended());
    static_cast<nvme::Disk&>(*m.sink.disks[0]).remove();
    ASSERT_TRUE(turn_until(m, [&] { return p.ended(); }));
    EXPECT_EQ(p.request.status, Status::device_gone);
    EXPECT_TRUE(m.device.held.empty());
}

TEST(NvmeRecovery, ANamespaceThatCannotBeUsedIsReportedOnce) {
    Options o;
    o.namespaces = 2;
    Machine& m = attached(o);
    m.device.patch = [](u32 cns, u32 nsid, u64 data) {
        if (cns == 0 && nsid == 2) {
            nvme_fake::store<u32>(data + 128, 13 << 16); // blocks of 8192 bytes
        }
    };
    for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
        m.device.changed = {2};
        m.device.report_event(0x0004'0002);
        turn_until(m, [] { return false; }, 200);
    }
    EXPECT_TRUE(m.sink.disks[1]->removed());
    EXPECT_EQ(m.sink.left.size(), 1u);
}

// Abandoned writes end with the reset: nothing waits for them any more, and their memory comes back.
TEST(NvmeRecovery, AnAbandonedWriteEndsWithTheReset) {
    Machine& m = attached();
    {
        Pending p(m, io::Op::write);
    } // destroyed
    EXPECT_NE(quarantine_state().spans, 0u);
    m.device.hold = false;
    ASSERT_TRUE(turn_until(m, [&] { return m.device.resets == 1; }));
    ASSERT_TRUE(turn_until(m, [&] { return quarantine_state().spans == 0; }));
    exchange_data(m, 8192);
    EXPECT_EQ(m.device.resets, 1u);
}

// ---- several lanes ----

struct LaneRequest {
    DmaBuffer data;
    io::Request request;
    LaneRequest(MessageMachine& m, u32 lane, u64 lba)
        : data(*m.dma.buffer(4096)), request(m.sink.disks.at(0)->lane(lane), io::Op::write, lba, data.span()) {
        set_this_processor(lane);
        m.sink.disks[0]->lane(lane).submit(request);
        set_this_processor(0);
    }
    ~LaneRequest() { EXPECT_FALSE(request.pending()); }
};

TEST(NvmeRecovery, AResetHoldsEveryLane) {
    for (const bool shadow : {false, true}) {
        Options o;
        o.doorbell_buffers = shadow;
        MessageMachine& m = attached_by_messages(o, 3);
        ASSERT_EQ(m.sink.disks.at(0)->queues(), 3u);
        m.device.hold = true;
        std::vector<std::unique_ptr<LaneRequest>> requests;
        for (u32 i = 0; i < 12; ++i) {
            requests.push_back(std::make_unique<LaneRequest>(m, i % 3, 16 * i));
        }
        m.turn();
        m.device.look();
        ASSERT_EQ(m.device.held.size(), 12u);
        // Lanes 0 and 2 go on, the command of lane 1 that is the oldest there is lost.
        ASSERT_TRUE(m.turn_until([&] { return m.device.resets == 1; }));
        ASSERT_TRUE(m.turn_until([&] { return m.device.held.size() == 12; })) << "each is sent again, once";
        m.device.hold = false;
        while (!m.device.held.empty()) {
            m.device.answer(0);
        }
        ASSERT_TRUE(m.turn_until(
            [&] { return std::ranges::none_of(requests, [](const auto& r) { return r->request.pending(); }); }));
        for (const auto& r : requests) {
            EXPECT_EQ(r->request.status, Status::ok);
        }
        EXPECT_EQ(m.device.resets, 1u);
    }
}

// A processor that is busy keeps the controller from being disabled until its queue is quiet.
TEST(NvmeRecovery, AResetWaitsForEveryLane) {
    MessageMachine& m = attached_by_messages({}, 2);
    m.device.hold = true;
    LaneRequest first(m, 0, 0), second(m, 1, 64);
    const auto aborted = [&] {
        return std::ranges::any_of(m.device.admin, [](const auto& e) { return (e[0] & 0xff) == 0x08; });
    };
    ASSERT_TRUE(m.turn_until(aborted));
    for (int i = 0; i < 30; ++i) { // the first processor's turns alone
        m.deliver();
        m.executors[0]->turn();
    }
    EXPECT_EQ(m.device.resets, 0u);
    ASSERT_TRUE(m.turn_until([&] { return m.device.resets == 1 && m.device.held.size() == 2; }));
    m.device.hold = false;
    m.device.answer(0);
    m.device.answer(0);
    ASSERT_TRUE(m.turn_until([&] { return !first.request.pending() && !second.request.pending(); }));
    EXPECT_EQ(first.request.status, Status::ok);
    EXPECT_EQ(second.request.status, Status::ok);
}

TEST(NvmeRecovery, FewerQueuesAfterAResetCloseTheController) {
    MessageMachine& m = attached_by_messages({}, 3);
    m.device.hold = true;
    LaneRequest first(m, 0, 0), second(m, 2, 64);
    m.turn();
    m.device.on_reset = [&] { m.device.options.queues = 2; };
    ASSERT_TRUE(m.turn_until([&] { return !first.request.pending() && !second.request.pending(); }));
    EXPECT_EQ(first.request.status, Status::device_gone);
    EXPECT_EQ(second.request.status, Status::device_gone);
    EXPECT_TRUE(m.turn_until([&] { return (m.device.cc & 1) == 0; })) << "disabled";
    m.device.on_reset = nullptr;
}

TEST(NvmeRecovery, FewerQueuesThanProcessors) {
    Options o;
    o.queues = 2;
    EXPECT_EQ(attached_by_messages(o, 4).sink.disks.at(0)->queues(), 2u);
    EXPECT_EQ(attached_by_messages({}, 4, 3).sink.disks.at(0)->queues(), 2u) << "three vectors";
    EXPECT_EQ(attached_by_messages({}, 4, 1).sink.disks.at(0)->queues(), 1u) << "one vector, shared";
}

// A table that lies outside of its BAR, a BAR that is not there, and no lines either: an error, nothing enabled.
TEST(NvmeRecovery, MessagesThatCannotBeUsed) {
    for (const bool bar : {true, false}) {
        auto m = std::make_unique<MessageMachine>(Options{}, 2, MessageMachine::entries, bar ? 0x8000 : 0x2000);
        if (!bar) {
            auto& f = m->space.functions.begin()->second;
            f.bar_mask[4] = f.bar_mask[5] = 0;
            f.set32(0x20, 0);
            f.set32(0x24, 0);
        }
        EXPECT_FALSE(m->probe());
        EXPECT_TRUE(m->interrupts.held.empty());
        EXPECT_EQ(m->device.cc & 1, 0u);
        EXPECT_TRUE(m->sink.disks.empty());
    }
}

// A vector that is masked in the table loses nothing: the completions are there when it is unmasked, and found by the
// ticks before.
TEST(NvmeRecovery, AMaskedVector) {
    MessageMachine& m = attached_by_messages({}, 2);
    m.table.memory[0x2000 + 16 + 12] |= 1; // of the first I/O queue
    LaneRequest r(m, 0, 0);
    EXPECT_TRUE(m.turn_until([&] { return !r.request.pending(); }, 100));
    EXPECT_EQ(r.request.status, Status::ok);
    m.table.memory[0x2000 + 16 + 12] &= 0xfe;
    LaneRequest again(m, 0, 64);
    EXPECT_TRUE(m.turn_until([&] { return !again.request.pending(); }, 100));
    EXPECT_EQ(m.device.resets, 0u);
}

// With MSI-X the head of a completion queue is reported when half of its entries are taken. It has 1024 of them, or
// as many as the controller permits.
TEST(NvmeRecovery, TheHeadIsReportedWhileAllCommandsHaveRoom) {
    for (const auto& [permitted, reads_per_report] : {std::pair{2048u, 1024u - 128}, {64u, 32u}}) {
        Options o;
        o.cap = (o.cap & ~u64{0xffff}) | (permitted - 1);
        MessageMachine& m = attached_by_messages(o, 1);
        const u32 before = m.device.pairs.at(1).reports;
        for (u32 i = 1; i <= 3 * reads_per_report; ++i) {
            LaneRequest r(m, 0, 8 * (i % 64));
            ASSERT_TRUE(m.turn_until([&] { return !r.request.pending(); }, 100)) << i;
            ASSERT_EQ(r.request.status, Status::ok);
            EXPECT_EQ(m.device.pairs.at(1).reports - before, i / reads_per_report) << i << " reads";
        }
    }
}

TEST(NvmeRecovery, AllLanesWork) {
    for (const u32 vectors : {1u, 2u, 9u}) {
        MessageMachine& m = attached_by_messages({}, 2, vectors);
        std::vector<std::unique_ptr<LaneRequest>> requests;
        for (u32 i = 0; i < 40; ++i) {
            requests.push_back(std::make_unique<LaneRequest>(m, i % m.sink.disks.at(0)->queues(), 16 * i));
        }
        ASSERT_TRUE(m.turn_until(
            [&] { return std::ranges::none_of(requests, [](const auto& r) { return r->request.pending(); }); }));
        for (u32 v = 0; v < m.device.pairs.size() && v < vectors; ++v) {
            EXPECT_EQ(m.table.word(v, 12) & 1, m.table.word(v, 8) == 0 ? 1u : 0u) << "vector " << v;
        }
    }
}

} // namespace
