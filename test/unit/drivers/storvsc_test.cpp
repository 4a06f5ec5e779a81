// The storage queue and its disks against a host that writes the rings' bytes itself, conforming or not.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.task;
import io.block;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/storvsc_fake.hpp"

namespace {
using namespace fl;
using drivers::storvsc::Disk;
using drivers::storvsc::Queue;
using drivers::storvsc::Shared;
using drivers::storvsc::Terms;
using drivers::storvsc::Version;
using fake::Command;
using fake::Reply;

io::Task<Result<void>> one(io::BlockDevice& disk, io::Op op, u64 lba, DmaSpan buffer) {
    io::BlockDevice::Transfer transfer(disk, op, lba, buffer);
    co_return co_await transfer;
}

struct Machine {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma dma;
    test::CapturedLog log;
    hv::hyperv::Hypercalls hypercalls;
    u64 signals = 0;
    std::atomic<u32> events{0};
    hv::hyperv::Channel channel;
    Shared shared;
    fake::StorageHost host;
    std::unique_ptr<Queue> queue;
    std::unique_ptr<Disk> disk;
    DmaBuffer parameters;
    u64 notified = 0;
    u64 storms = 0;
    bool always_signal = false;

    explicit Machine(Version version = Version::win10, u32 max_transfer = 32768, Nanoseconds timeout = 1'000'000'000) {
        hv::hyperv::Gate gate;
        gate.context = this;
        gate.call = [](void* self, u64 control, u64, u64) -> u64 {
            EXPECT_EQ(control & 0xffff, 0x5du) << "HvSignalEvent alone";
            ++static_cast<Machine*>(self)->signals;
            return 0;
        };
        EXPECT_TRUE(hypercalls.install(gate, dma));
        auto rings = dma.buffer(2 * fake::StorageHost::ring_size);
        host.attach(rings->data());
        hv::hyperv::Channel::Signalling signalling;
        signalling.hypercalls = &hypercalls;
        signalling.connection = 77;
        EXPECT_TRUE(channel.attach({}, 0, std::move(*rings), fake::StorageHost::ring_size, signalling, events));
        shared.notify = [](void* self) { ++static_cast<Machine*>(self)->notified; };
        shared.context = this;
        queue = std::make_unique<Queue>(executor, channel, shared, true);
        queue->set_terms({version, max_transfer});
        host.packet_length = version >= Version::win8 ? 64 : 48;
        parameters = *dma.buffer(4096);
        queue->start(parameters, timeout);
        io::Geometry geometry;
        geometry.sectors = host.disk.size() / 512;
        geometry.flush = true;
        geometry.discard = true;
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("sda");
        Disk::Unit unit;
        unit.lun = 3;
        unit.max_transfer = max_transfer;
        unit.max_unmap_blocks = 64;
        disk = std::make_unique<Disk>(*queue, unit, geometry, identity);
        disk->link(executor);
        clock.on_idle_context = this;
        clock.on_idle = [](void* self) { static_cast<Machine*>(self)->idle(); };
    }
    ~Machine() {
        queue->stop();
        disk.reset();
        queue.reset();
        channel.detach().reset();
    }
    void idle() {
        const u64 wanted = host.signals_wanted;
        host.step();
        if (host.signals_wanted != wanted || always_signal) {
            interrupt();
        }
    }
    void interrupt() {
        events.fetch_add(1);
        executor.wake();
    }
    template <class T>
    T run(io::Task<T> task) {
        return executor.run(std::move(task));
    }
    DmaSpan buffer(u32 size) {
        buffers.push_back(*dma.buffer(size));
        return buffers.back().span().subspan(0, size);
    }
    Result<void> read(u64 lba, DmaSpan span) { return run(one(*disk, io::Op::read, lba, span)); }
    Result<void> write(u64 lba, DmaSpan span) { return run(one(*disk, io::Op::write, lba, span)); }
    Result<void> flush() { return run(one(*disk, io::Op::flush, 0, {})); }
    /// Runs turns until the request has ended; false: not within the bound.
    bool settle(io::Request& request, Nanoseconds bound = 5'000'000'000) {
        const Instant deadline = clock.time + bound;
        while (request.pending() && clock.time < deadline) {
            executor.turn();
        }
        return !request.pending();
    }
    std::vector<DmaBuffer> buffers;
};

struct Variant {
    const char* name;
    Version version;
    u32 max_transfer;
};
class StorvscVariant : public testing::TestWithParam<Variant> {};

TEST_P(StorvscVariant, VerifiesInPartsAndAnywhereInAPage) {
    Machine m(GetParam().version, GetParam().max_transfer);
    std::mt19937_64 random(7);
    std::vector<std::byte> model(m.host.disk.begin(), m.host.disk.end());
    DmaSpan buffer = m.buffer(512 * 1024);
    for (u32 i = 0; i < 200; ++i) {
        const u64 lba = random() % 4096;
        const u32 count = static_cast<u32>(std::min<u64>(1 + random() % (i % 3 == 0 ? 400 : 20), 4096 - lba));
        DmaSpan span = buffer.subspan(static_cast<u32>(random() % 8 * 512), count * 512);
        for (std::byte& b : span.bytes()) {
            b = static_cast<std::byte>(random());
        }
        if (i % 2 == 0) {
            std::memcpy(model.data() + lba * 512, span.data, span.size);
            ASSERT_TRUE(m.write(lba, span));
        } else {
            ASSERT_TRUE(m.read(lba, span));
            ASSERT_EQ(std::memcmp(model.data() + lba * 512, span.data, span.size), 0) << lba << "+" << count;
        }
    }
    EXPECT_TRUE(std::ranges::equal(model, m.host.disk));
    EXPECT_TRUE(m.flush());
    EXPECT_EQ(m.host.flushes, 1u);
    EXPECT_EQ(m.queue->in_flight(), 0u);
    EXPECT_EQ(m.disk->counters().errors, 0u);
}
INSTANTIATE_TEST_SUITE_P(All, StorvscVariant,
                         testing::Values(Variant{"win6", Version::win6, 32768}, Variant{"win8", Version::win8, 4096},
                                         Variant{"win10", Version::win10, 262144}),
                         [](const auto& info) { return info.param.name; });

TEST(Storvsc, OneSignalAndOneInterruptForABatch) {
    Machine m;
    DmaSpan buffer = m.buffer(32 * 4096);
    const u64 signals = m.signals;
    const auto before = m.disk->counters();
    io::TaskGroup group(m.executor);
    for (u32 i = 0; i < 32; ++i) {
        ASSERT_TRUE(group.spawn(one(*m.disk, io::Op::write, i * 8, buffer.subspan(i * 4096, 4096))));
    }
    struct Join {
        static io::Task<Result<void>> all(io::TaskGroup& g) { co_return co_await g.join(); }
    };
    ASSERT_TRUE(m.run(Join::all(group)));
    const auto c = m.disk->counters() - before;
    EXPECT_EQ(m.signals - signals, 1u);
    EXPECT_EQ(c.notifications, 1u);
    EXPECT_EQ(c.hypercalls, 1u);
    EXPECT_EQ(c.interrupts, 1u);
    EXPECT_EQ(c.completed, 32u);
    EXPECT_EQ(c.device_accesses, 0u);
}

TEST(Storvsc, MoreThanTheRingAndTheSlotsTake) {
    Machine m;
    DmaSpan buffer = m.buffer(300 * 512);
    io::TaskGroup group(m.executor);
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 300; ++i) { // 300 * 112 bytes: more than the ring, and more than the slots
        requests.push_back(std::make_unique<io::Request>(*m.disk, io::Op::write, i, buffer.subspan(i * 512, 512)));
        buffer.data[i * 512] = static_cast<std::byte>(i);
        m.disk->submit(*requests.back());
    }
    for (auto& r : requests) {
        ASSERT_TRUE(m.settle(*r));
        EXPECT_EQ(r->status, io::Status::ok);
    }
    for (u32 i = 0; i < 300; ++i) {
        EXPECT_EQ(m.host.disk[i * 512], static_cast<std::byte>(i));
    }
}

TEST(Storvsc, UnmapInParts) {
    Machine m;
    std::fill(m.host.disk.begin(), m.host.disk.end(), std::byte{7});
    DmaSpan extent = m.buffer(100 * 512);
    ASSERT_TRUE(m.run(one(*m.disk, io::Op::discard, 10, extent)));
    EXPECT_EQ(m.host.unmaps, 2u) << "64 blocks at most in one";
    EXPECT_EQ(m.host.disk[10 * 512 - 1], std::byte{7});
    EXPECT_EQ(m.host.disk[10 * 512], std::byte{0});
    EXPECT_EQ(m.host.disk[110 * 512 - 1], std::byte{0});
    EXPECT_EQ(m.host.disk[110 * 512], std::byte{7});
}

TEST(Storvsc, FlushByTheCommandThatTheUnitSupports) {
    Machine m;
    m.host.reply_override = [](const Command& c) {
        Reply r;
        if (c.cdb(0) == 0x35) {
            r.srb_status = 4;
            r.scsi_status = 2;
            r.sense = std::string("\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0", 18);
        }
        return r;
    };
    EXPECT_TRUE(m.flush());
    EXPECT_TRUE(m.flush());
    EXPECT_EQ(m.host.flushes, 2u);
    EXPECT_EQ(m.host.done, 3u) << "tried once with (10), and then no more";
}

// ---- a host that violates the protocol ----

struct Break {
    const char* name;
    std::function<Reply(Machine&, const Command&)> reply_override;
    const char* line; // in the log
};
class StorvscBreak : public testing::TestWithParam<Break> {};

TEST_P(StorvscBreak, ClosesTheDiskWithOneLine) {
    Machine m;
    DmaSpan buffer = m.buffer(4096);
    buffer.data[0] = std::byte{0x5a};
    ASSERT_TRUE(m.write(40, buffer)); // acknowledged: must survive what follows
    m.host.reply_override = [&](const Command& c) { return GetParam().reply_override(m, c); };
    io::Request first(*m.disk, io::Op::read, 0, m.buffer(4096));
    io::Request second(*m.disk, io::Op::read, 8, m.buffer(4096));
    m.disk->submit(first);
    m.disk->submit(second);
    const Instant start = m.clock.time;
    ASSERT_TRUE(m.settle(first) && m.settle(second));
    EXPECT_LT(m.clock.time - start, 100'000'000u);
    EXPECT_FALSE(m.queue->is_open());
    EXPECT_TRUE(first.status == io::Status::protocol_error || second.status == io::Status::protocol_error);
    EXPECT_TRUE(m.log.has("sda: closed: ")) << m.log.text.view();
    EXPECT_TRUE(m.log.has(GetParam().line)) << m.log.text.view();
    EXPECT_EQ(std::count(m.log.text.view().begin(), m.log.text.view().end(), '\n'), 1) << m.log.text.view();
    EXPECT_EQ(m.host.disk[40 * 512], std::byte{0x5a});
    EXPECT_EQ(m.notified, 1u) << "the controller is notified";
    io::Request late(*m.disk, io::Op::read, 0, buffer);
    m.disk->submit(late);
    EXPECT_EQ(late.status, io::Status::device_gone);
    m.interrupt(); // nothing more is read
    m.executor.turn();
}

Reply with(void (*change)(Reply&)) {
    Reply r;
    change(r);
    return r;
}
const Break breaks[] = {
    {"unknown_id", [](Machine&, const Command&) { return with([](Reply& r) { r.id = 0x7f0099; }); },
     "transaction id that is not in flight"},
    {"huge_id", [](Machine&, const Command&) { return with([](Reply& r) { r.id = ~u64{0}; }); },
     "transaction id that is not in flight"},
    {"repeated", [](Machine&, const Command&) { return with([](Reply& r) { r.twice = true; }); },
     "transaction id that is not in flight"},
    {"retired",
     [](Machine& m, const Command&) {
         Reply r;
         r.id = m.host.past_ids[0];
         return r;
     },
     "transaction id that is not in flight"},
    {"waits_for_its_retry",
     [](Machine& m, const Command&) { // the first command: busy; then its next id, before it is resent with that
         Reply r;
         if (m.host.done == 1) {
             r.scsi_status = 8;
         } else {
             r.id = m.host.past_ids.back() + 0x10000;
         }
         return r;
     },
     "transaction id that is not in flight"},
    {"early",
     [](Machine&, const Command& c) { // for a future request
         Reply r;
         r.id = c.id + 0x10000;
         return r;
     },
     "transaction id that is not in flight"},
    {"too_short", [](Machine&, const Command&) { return with([](Reply& r) { r.length = 48; }); },
     "length is not that of the negotiated version"},
    {"too_long", [](Machine&, const Command&) { return with([](Reply& r) { r.length = 72; }); },
     "length is not that of the negotiated version"},
    {"empty", [](Machine&, const Command&) { return with([](Reply& r) { r.length = 0; }); },
     "length is not that of the negotiated version"},
    {"longer_than_the_channel", [](Machine&, const Command&) { return with([](Reply& r) { r.length = 4096; }); },
     "length"},
    {"no_complete_io", [](Machine&, const Command&) { return with([](Reply& r) { r.operation = 3; }); },
     "not a COMPLETE_IO"},
    {"moved_more", [](Machine&, const Command&) { return with([](Reply& r) { r.moved = 4097; }); },
     "reports more data"},
    {"moved_much_more", [](Machine&, const Command&) { return with([](Reply& r) { r.moved = ~0u; }); },
     "reports more data"},
    {"packet_type", [](Machine&, const Command&) { return with([](Reply& r) { r.type = 9; }); }, "packet of a type"},
    {"unasked",
     [](Machine&, const Command&) { // a COMPLETE_IO in an unsolicited packet
         return with([](Reply& r) { r.type = 6; });
     },
     "COMPLETE_IO without a request"},
    {"write_index_beyond",
     [](Machine& m, const Command&) {
         fake::put32(m.host.in_ring(), fake::StorageHost::ring_data + 8);
         Reply r;
         r.never = true;
         m.interrupt();
         return r;
     },
     "write index"},
    {"descriptor_length",
     [](Machine& m, const Command&) {
         std::vector<std::byte> packet(40);
         const u16 words[4] = {11, 2, 0x400, 0};
         std::memcpy(packet.data(), words, 8);
         m.host.raw(packet);
         m.interrupt();
         Reply r;
         r.never = true;
         return r;
     },
     "longer than the data in the ring"},
};
INSTANTIATE_TEST_SUITE_P(All, StorvscBreak, testing::ValuesIn(breaks),
                         [](const auto& info) { return info.param.name; });

TEST(Storvsc, AReadIndexThatCannotBeIsNoticedWithTheNextRequest) {
    Machine m;
    DmaSpan buffer = m.buffer(4096);
    ASSERT_TRUE(m.write(40, buffer));
    m.host.hold = true;
    fake::put32(m.host.out_ring() + 4, fake::StorageHost::ring_data + 8);
    const u32 shown = fake::get32(m.host.out_ring());
    io::Request request(*m.disk, io::Op::read, 0, buffer);
    m.disk->submit(request);
    const Instant start = m.clock.time;
    ASSERT_TRUE(m.settle(request));
    EXPECT_LT(m.clock.time - start, 20'000'000u) << "no time-out is waited for";
    EXPECT_EQ(request.status, io::Status::protocol_error);
    EXPECT_EQ(fake::get32(m.host.out_ring()), shown) << "nothing more is shown to this host";
    EXPECT_TRUE(m.log.has("sda: closed: ")) << m.log.text.view();
    EXPECT_TRUE(m.log.has("the host's read index is not between")) << m.log.text.view();
    EXPECT_EQ(std::count(m.log.text.view().begin(), m.log.text.view().end(), '\n'), 1) << m.log.text.view();
}

TEST(Storvsc, ATimeOutOfABrokenRingNamesTheRule) {
    Machine m;
    m.host.hold = true;
    io::Request request(*m.disk, io::Op::read, 0, m.buffer(4096));
    m.disk->submit(request);
    m.executor.turn(); // published to the host, which does not respond
    fake::put32(m.host.out_ring() + 4, 12345 * 8);
    ASSERT_TRUE(m.settle(request));
    EXPECT_EQ(request.status, io::Status::protocol_error);
    EXPECT_TRUE(request.buffer_lost) << "the host may still write there";
    EXPECT_TRUE(m.log.has("the host's read index is not between")) << m.log.text.view();
    EXPECT_FALSE(m.log.has("reset the bus")) << m.log.text.view();
}

// ---- errors other than protocol violations ----

struct Failure {
    const char* name;
    io::Op op;
    Reply reply;
    io::Status status;
    const char* line;
};
class StorvscFailure : public testing::TestWithParam<Failure> {};

TEST_P(StorvscFailure, EndsOneRequestAndNotTheDisk) {
    const Failure& f = GetParam();
    Machine m;
    m.host.reply_override = [&](const Command&) { return f.reply; };
    DmaSpan buffer = m.buffer(4096);
    io::Request request(*m.disk, f.op, f.op == io::Op::flush ? 0 : 1000, f.op == io::Op::flush ? DmaSpan{} : buffer);
    m.disk->submit(request);
    ASSERT_TRUE(m.settle(request));
    EXPECT_EQ(request.status, f.status);
    EXPECT_FALSE(request.buffer_lost);
    EXPECT_TRUE(m.log.has(f.line)) << m.log.text.view();
    EXPECT_TRUE(m.queue->is_open());
    m.host.reply_override = nullptr;
    EXPECT_TRUE(m.read(0, buffer));
    EXPECT_EQ(m.queue->in_flight(), 0u);
}

Reply sense(const char (&text)[19], u8 srb = 4) {
    Reply r;
    r.srb_status = srb;
    r.scsi_status = 2;
    r.sense = std::string(text, 18);
    return r;
}
const Failure failures[] = {
    {"medium", io::Op::read, sense("\xf0\0\x03\0\0\x03\xea\x0a\0\0\0\0\x11\0\0\0\0\0"), io::Status::io_error,
     "sda: READ(16): MEDIUM ERROR, unrecovered read error (3/11/00) at LBA 1002"},
    {"hardware", io::Op::write, sense("\x70\0\x04\0\0\0\0\x0a\0\0\0\0\x44\0\0\0\0\0"), io::Status::io_error,
     "sda: WRITE(16): HARDWARE ERROR, internal target failure (4/44/00) at LBA 1000"},
    {"protected", io::Op::write, sense("\x70\0\x07\0\0\0\0\x0a\0\0\0\0\x27\0\0\0\0\0"), io::Status::io_error,
     "DATA PROTECT, write protected (7/27/00)"},
    {"attention_for_ever", io::Op::read, sense("\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x29\0\0\0\0\0"), io::Status::io_error,
     "UNIT ATTENTION"},
    {"flush_medium", io::Op::flush, sense("\x70\0\x03\0\0\0\0\x0a\0\0\0\0\x0c\0\0\0\0\0"), io::Status::io_error,
     "sda: SYNCHRONIZE CACHE(10): MEDIUM ERROR, write error (3/0c/00)"},
    {"short", io::Op::read, with([](Reply& r) { r.moved = 4095; }), io::Status::io_error,
     "success with 4095 of 4096 bytes transferred"},
    {"nothing_written", io::Op::write, with([](Reply& r) { r.moved = 0; }), io::Status::io_error,
     "success with 0 of 4096 bytes"},
    {"overrun_short", io::Op::read, with([](Reply& r) {
         r.srb_status = 0x12;
         r.moved = 512;
     }),
     io::Status::io_error, "success with 512 of 4096 bytes"},
    {"no_sense", io::Op::read, with([](Reply& r) { r.srb_status = 4; }), io::Status::io_error,
     "SRB status error (0x4), no sense data, at LBA 1000"},
    {"invalid_lun", io::Op::read, with([](Reply& r) { r.srb_status = 0x20; }), io::Status::device_gone, "invalid LUN"},
    {"pending", io::Op::read, with([](Reply& r) { r.srb_status = 0; }), io::Status::io_error, "SRB status pending"},
    {"unmap_refused", io::Op::discard, sense("\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0"), io::Status::not_supported,
     "UNMAP: ILLEGAL REQUEST"},
};
INSTANTIATE_TEST_SUITE_P(All, StorvscFailure, testing::ValuesIn(failures),
                         [](const auto& info) { return info.param.name; });

TEST(Storvsc, TransientConditionsAreRetried) {
    Machine m;
    u32 bad = 3;
    Reply reply;
    m.host.reply_override = [&](const Command&) { return bad != 0 ? (--bad, reply) : Reply{}; };
    DmaSpan buffer = m.buffer(4096);
    reply = sense("\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x29\0\0\0\0\0"); // reset
    EXPECT_TRUE(m.write(0, buffer));
    const std::string log_text(m.log.text.view());
    EXPECT_TRUE(m.log.has("sda: UNIT ATTENTION")) << log_text;
    EXPECT_EQ(std::count(log_text.begin(), log_text.end(), '\n'), 3) << log_text;
    bad = 5;
    reply = with([](Reply& r) { r.scsi_status = 8; }); // busy: retried in the next ticks
    EXPECT_TRUE(m.read(0, buffer));
    bad = 1;
    reply = with([](Reply& r) { r.srb_status = 0x0e; }); // a bus reset by another initiator
    EXPECT_TRUE(m.read(0, buffer));
    bad = 2;
    reply = sense("\x70\0\x02\0\0\0\0\x0a\0\0\0\0\x04\x01\0\0\0\0"); // becoming ready
    EXPECT_TRUE(m.write(0, buffer));
    bad = 1;
    reply = sense("\x70\0\x0b\0\0\0\0\x0a\0\0\0\0\0\0\0\0\0\0", 2); // aborted by the device
    EXPECT_TRUE(m.write(0, buffer));
    bad = 1;
    reply = sense("\x70\0\x01\0\0\0\0\x0a\0\0\0\0\x11\0\0\0\0\0"); // recovered: success
    reply.moved = 4096;
    EXPECT_TRUE(m.read(0, buffer));
    EXPECT_EQ(m.log.text.view(), log_text) << "and of nothing else a word";
    bad = 1;
    reply = sense("\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x3f\x0e\0\0\0\0"); // the set of units has changed
    EXPECT_TRUE(m.read(0, buffer));
    EXPECT_GE(m.notified, 1u);
    EXPECT_TRUE(m.shared.rescan_requested);
}

TEST(Storvsc, FlushesOnAHostThatSupportsOnlyTheLongCommand) {
    Machine m;
    m.host.reply_override = [](const Command& c) {
        return c.cdb(0) == 0x35 ? sense("\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0") : Reply{};
    };
    std::vector<std::unique_ptr<io::Request>> flushes;
    for (u32 i = 0; i < 5; ++i) {
        flushes.push_back(std::make_unique<io::Request>(*m.disk, io::Op::flush, 0, DmaSpan{}));
        m.disk->submit(*flushes.back());
    }
    for (auto& flush : flushes) {
        ASSERT_TRUE(m.settle(*flush));
        EXPECT_EQ(flush->status, io::Status::ok);
    }
    EXPECT_EQ(m.host.flushes, 5u);
    EXPECT_EQ(m.log.text.view(), "");
}

TEST(Storvsc, AHostWithoutTheLongCommandsGetsTheShortOnes) {
    Machine m;
    u32 refused = 0;
    m.host.reply_override = [&](const Command& c) {
        return c.cdb(0) >= 0x80 ? (++refused, sense("\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0")) : Reply{};
    };
    DmaSpan buffer = m.buffer(128 * 1024); // split
    std::memset(buffer.data, 0x3c, buffer.size);
    ASSERT_TRUE(m.write(3000, buffer));
    EXPECT_EQ(m.host.disk[3000 * 512], std::byte{0x3c});
    EXPECT_EQ(m.host.disk[3256 * 512 - 1], std::byte{0x3c});
    std::memset(buffer.data, 0, buffer.size);
    const u32 before = refused;
    ASSERT_TRUE(m.read(3000, buffer));
    EXPECT_EQ(buffer.data[128 * 1024 - 1], std::byte{0x3c});
    EXPECT_EQ(refused, before) << "requested once, not for ever";
    EXPECT_EQ(m.log.text.view(), "");
}

// Busy (with its own, larger limit) and then unit attentions: attempts are counted, and retries end.
TEST(Storvsc, MixedRetriesEnd) {
    Machine m;
    u32 busy = 5;
    m.host.reply_override = [&](const Command&) {
        return busy != 0 ? (--busy, with([](Reply& r) { r.scsi_status = 8; }))
                         : sense("\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x29\0\0\0\0\0");
    };
    DmaSpan buffer = m.buffer(4096);
    io::Request request(*m.disk, io::Op::read, 0, buffer);
    m.disk->submit(request);
    ASSERT_TRUE(m.settle(request));
    EXPECT_EQ(request.status, io::Status::io_error);
    EXPECT_LT(m.host.done, 10u);
}

TEST(Storvsc, TheHostReportsChangedUnits) {
    Machine m;
    m.host.event(11);
    m.interrupt();
    m.executor.turn();
    EXPECT_GE(m.notified, 1u);
    EXPECT_TRUE(m.shared.rescan_requested.exchange(false));
    m.host.event(2);
    m.host.event(14); // for another consumer
    m.host.event(99);
    m.interrupt();
    m.executor.turn();
    EXPECT_TRUE(m.shared.rescan_requested);
    EXPECT_TRUE(m.queue->is_open());
    EXPECT_TRUE(m.read(0, m.buffer(4096)));
}

// ---- a silent host ----

struct StorvscTime : testing::Test {
    Machine m;
    Nanoseconds each = 0; // per request
    // when requests have been in flight for this long, the machine is stopped, `stops` times
    Nanoseconds stop_after = 0;
    Nanoseconds stop_length = 0;
    u32 stops = 0;
    Instant next = 0;
    Instant stop_at = never;

    void SetUp() override {
        m.clock.on_idle_context = this;
        m.clock.on_idle = [](void* self) { static_cast<StorvscTime*>(self)->idle(); };
    }
    void idle() {
        const u64 wanted = m.host.signals_wanted;
        if (m.host.take() && stop_at == never && stops != 0) {
            stop_at = m.clock.time + stop_after;
        }
        if (m.clock.time >= stop_at) {
            m.clock.time += stop_length;
            stop_at = --stops != 0 ? m.clock.time + stop_after : never;
        } else if (!m.host.hold && !m.host.commands.empty() && m.clock.time >= next) {
            m.host.answer();
            next = m.clock.time + each;
        }
        if (m.host.signals_wanted != wanted) {
            m.interrupt();
        }
    }
    /// `count` requests at once; returns how many succeeded.
    u32 all_at_once(u32 count, io::Op op) {
        std::vector<std::unique_ptr<io::Request>> requests;
        const DmaSpan buffer = m.buffer(4096);
        for (u32 i = 0; i < count; ++i) {
            requests.push_back(std::make_unique<io::Request>(*m.disk, op, 8 * i, buffer));
            m.disk->submit(*requests.back());
        }
        u32 good = 0;
        for (const auto& request : requests) {
            EXPECT_TRUE(m.settle(*request, 600'000'000'000));
            good += request->status == io::Status::ok ? 1 : 0;
        }
        return good;
    }
};

TEST_F(StorvscTime, NoResetIsRequestedOfASlowHost) {
    each = 250'000'000; // the time-out is 1 s
    EXPECT_EQ(all_at_once(32, io::Op::read), 32u);
    EXPECT_EQ(all_at_once(200, io::Op::write), 200u) << "more than there are slots";
    EXPECT_EQ(m.host.resets, 0u);
    EXPECT_TRUE(m.queue->is_open());
    EXPECT_GE(m.clock.time, 50'000'000'000u);
}

TEST_F(StorvscTime, AStoppedMachineIsNoSilentHost) {
    for (const io::Op op : {io::Op::read, io::Op::write}) {
        for (const u32 depth : {1u, 32u}) {
            for (const Nanoseconds length : {7'000'000'000u, 60'000'000'000u}) {
                for (const Nanoseconds when : {0u, 500'000'000u}) {
                    each = 800'000'000;
                    next = m.clock.time + each;
                    stop_after = when;
                    stop_length = length;
                    stops = 3;
                    EXPECT_EQ(all_at_once(depth, op), depth);
                    EXPECT_EQ(m.host.resets, 0u);
                    EXPECT_TRUE(m.queue->is_open());
                    stops = 0;
                    stop_at = never;
                }
            }
        }
    }
    EXPECT_FALSE(m.log.has("no answer within"));
}

// Stops of less than a second, one per request; the host needs nearly the whole time-out for each and is stopped
// together with the machine.
TEST(StorvscStops, ShortStopsOfASlowHostLoseNothing) {
    struct Slow {
        Machine m;
        Nanoseconds each, when, length;
        u32 stops = 0;
        bool works = false;
        Instant done = 0;
        Instant stop_at = never;

        Slow(Nanoseconds limit, Nanoseconds stop_when, Nanoseconds stop_length)
            : m(Version::win10, 32768, limit), each(limit - 50'000'000), when(stop_when), length(stop_length) {
            m.clock.on_idle_context = this;
            m.clock.on_idle = [](void* self) { static_cast<Slow*>(self)->idle(); };
        }
        void idle() {
            const u64 wanted = m.host.signals_wanted;
            m.host.take();
            const Instant now = m.clock.time;
            if (m.host.commands.empty()) {
                return;
            }
            if (!std::exchange(works, true)) {
                done = now + each;
                stop_at = now + when;
            } else if (now >= stop_at) {
                ++stops;
                m.clock.time += length;
                done += length;
                stop_at = never;
            } else if (now >= done) {
                works = false;
                m.host.answer();
            }
            if (m.host.signals_wanted != wanted) {
                m.interrupt();
            }
        }
    };
    for (const Nanoseconds limit : {Nanoseconds{500'000'000}, Nanoseconds{5'000'000'000}}) {
        for (const u32 depth : {1u, 32u}) {
            for (const Nanoseconds length : {200'000'000u, 600'000'000u, 1'000'000'000u}) {
                for (const Nanoseconds when : {10'000'000u, 250'000'000u, 440'000'000u}) {
                    Slow slow(limit, when, length);
                    Machine& m = slow.m;
                    std::vector<std::unique_ptr<io::Request>> requests;
                    const DmaSpan buffer = m.buffer(4096);
                    for (u32 i = 0; i < depth; ++i) {
                        requests.push_back(std::make_unique<io::Request>(*m.disk, io::Op::write, 8 * i, buffer));
                        m.disk->submit(*requests.back());
                    }
                    for (const auto& request : requests) {
                        ASSERT_TRUE(m.settle(*request, 600'000'000'000));
                        EXPECT_EQ(request->status, io::Status::ok) << limit << ", " << length << " after " << when;
                    }
                    EXPECT_GE(slow.stops, depth);
                    EXPECT_EQ(m.host.resets, 0u) << limit << ", " << length << " after " << when;
                    EXPECT_TRUE(m.queue->is_open());
                }
            }
        }
    }
}

TEST_F(StorvscTime, ADeadHostIsFoundInMachineTimeAlsoWithStops) {
    m.host.hold = true;
    stop_after = 600'000'000;
    stop_length = 7'000'000'000;
    stops = 10;
    stop_at = m.clock.time + stop_after;
    const Instant begin = m.executor.now();
    EXPECT_EQ(all_at_once(32, io::Op::read), 0u);
    EXPECT_FALSE(m.queue->is_open());
    // Twice the time-out, and the same for the reset, each at most doubled by stops.
    EXPECT_LE(m.executor.now() - begin, 4'000'000'000u + 2 * MachineTime::longest_step + 50'000'000);
}

// The host gets a whole time-out for the work caused by a bus reset.
TEST_F(StorvscTime, AnAnswerLongAfterTheReset) {
    std::optional<Command> kept;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        if (c.operation() == 3 && !kept) {
            kept = c;
            r.never = true;
        }
        return r;
    };
    io::Request write(*m.disk, io::Op::write, 8, m.buffer(4096));
    m.disk->submit(write);
    const Instant begin = m.clock.time;
    while (write.pending() && m.clock.time < begin + 1'900'000'000) {
        m.executor.turn();
    }
    ASSERT_TRUE(write.pending()) << "given up before the host had its time";
    EXPECT_EQ(m.host.resets, 1u);
    m.host.reply_override = nullptr;
    m.host.commands.push_back(*kept);
    ASSERT_TRUE(m.settle(write));
    EXPECT_EQ(write.status, io::Status::ok);
    EXPECT_TRUE(m.queue->is_open());
}

TEST(Storvsc, NoAnswerAtAll) {
    Machine m;
    m.host.reply_override = [](const Command&) { return with([](Reply& r) { r.never = true; }); };
    io::Request read(*m.disk, io::Op::read, 0, m.buffer(4096));
    io::Request flush(*m.disk, io::Op::flush, 0, {});
    m.disk->submit(read);
    m.disk->submit(flush);
    const Instant start = m.clock.time;
    ASSERT_TRUE(m.settle(read) && m.settle(flush));
    EXPECT_LT(m.clock.time - start, 2'050'000'000u) << "the time-out, and the same again for the bus reset";
    EXPECT_EQ(read.status, io::Status::timed_out);
    EXPECT_TRUE(read.buffer_lost);
    EXPECT_EQ(flush.status, io::Status::timed_out);
    EXPECT_FALSE(flush.buffer_lost);
    EXPECT_TRUE(m.log.has("asking the host to reset the bus"));
    EXPECT_TRUE(m.log.has("has not answered anything for a whole time-out"));
    EXPECT_FALSE(m.queue->is_open());
}

TEST(Storvsc, OneLateAnswerAmongOthers) {
    Machine m;
    std::optional<Command> kept;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        if (c.operation() == 3 && c.be(2, 8) == 8 && !kept) {
            kept = c;
            r.never = true;
        }
        return r;
    };
    io::Request late(*m.disk, io::Op::read, 8, m.buffer(4096));
    m.disk->submit(late);
    DmaSpan buffer = m.buffer(4096);
    while (late.pending()) {
        ASSERT_TRUE(m.read(100, buffer));
        m.clock.time += 5'000'000;
        ASSERT_LT(m.clock.time, 5'000'000'000u);
    }
    EXPECT_EQ(late.status, io::Status::timed_out);
    EXPECT_TRUE(late.buffer_lost);
    EXPECT_EQ(m.host.resets, 1u);
    EXPECT_TRUE(m.queue->is_open()) << "others are answered";
    EXPECT_EQ(m.queue->in_flight(), 1u) << "the slot is kept for the answer";
    m.host.reply_override = nullptr;
    m.host.commands.push_back(*kept);
    m.host.answer();
    m.interrupt();
    m.executor.turn();
    EXPECT_EQ(m.queue->in_flight(), 0u);
    EXPECT_TRUE(m.queue->is_open()) << "taken silently";
}

// The host may execute the write at any time, over data acknowledged since: nothing is acknowledged any more.
class StorvscUnfenced : public testing::TestWithParam<io::Op> {};
TEST_P(StorvscUnfenced, AWriteThatIsNeverAnsweredClosesTheController) {
    Machine m;
    std::optional<Command> kept;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        if (!kept && c.operation() == 3 && (c.cdb(0) == 0x8a || c.cdb(0) == 0x42)) {
            kept = c;
            r.never = true;
        }
        return r;
    };
    io::Request late(*m.disk, GetParam(), 8, m.buffer(4096));
    m.disk->submit(late);
    DmaSpan buffer = m.buffer(4096);
    while (late.pending()) {
        ASSERT_TRUE(m.read(100, buffer) || !late.pending()) << "others are answered meanwhile";
        m.clock.time += 5'000'000;
        ASSERT_LT(m.clock.time, 5'000'000'000u);
    }
    EXPECT_EQ(late.status, io::Status::timed_out);
    EXPECT_EQ(m.host.resets, 1u);
    EXPECT_FALSE(m.queue->is_open());
    EXPECT_TRUE(m.log.has("no later write is safe"));
    EXPECT_FALSE(m.write(8, buffer));
}
INSTANTIATE_TEST_SUITE_P(All, StorvscUnfenced, testing::Values(io::Op::write, io::Op::discard),
                         [](const auto& info) { return std::string(io::name(info.param)); });

// Abandoned reads keep their slots. When only such slots are left, the disk is closed instead of hanging silently.
TEST(Storvsc, SlotsThatAreNeverFreedCloseTheDisk) {
    Machine m;
    m.host.reply_override = [](const Command& c) {
        Reply r;
        r.never = c.operation() == 3;
        return r;
    };
    DmaSpan buffer = m.buffer(512);
    std::vector<std::unique_ptr<io::Request>> reads;
    for (u32 i = 0; i < Queue::max_parts + 20; ++i) {
        reads.push_back(std::make_unique<io::Request>(*m.disk, io::Op::read, 0, buffer));
        m.disk->submit(*reads.back());
    }
    while (m.queue->is_open() && m.clock.time < 20'000'000'000) {
        drivers::storvsc::Exchange own(m.executor); // completes, so the host is not considered dead
        own.packet.header = {drivers::storvsc::Operation::reset_bus, drivers::storvsc::flag_completion, 0};
        static_cast<void>(m.queue->send(own));
        m.executor.turn();
        m.clock.time += 50'000'000;
        m.executor.turn();
        m.queue->abandon(own);
        // more requests, which get no slot
        if (std::ranges::none_of(reads, [](const auto& read) { return read->pending(); })) {
            reads.push_back(std::make_unique<io::Request>(*m.disk, io::Op::read, 0, buffer));
            m.disk->submit(*reads.back());
        }
    }
    EXPECT_FALSE(m.queue->is_open());
    EXPECT_TRUE(m.log.has("every slot is held by a request that the host never completed")) << m.log.text.view();
    for (auto& read : reads) {
        EXPECT_FALSE(read->pending());
    }
}

TEST(Storvsc, AnAnswerWithinTheGraceAfterTheReset) {
    Machine m;
    std::optional<Command> kept;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        if (c.operation() == 3 && !kept) {
            kept = c;
            r.never = true;
        }
        return r;
    };
    io::Request read(*m.disk, io::Op::read, 8, m.buffer(4096));
    m.disk->submit(read);
    while (m.host.resets == 0) {
        m.executor.turn();
        ASSERT_TRUE(read.pending());
    }
    m.host.reply_override = [](const Command&) {
        return with([](Reply& r) { r.srb_status = 0x0e; });
    }; // ended by the reset
    m.host.commands.push_back(*kept);
    m.host.answer();
    m.interrupt();
    ASSERT_TRUE(m.settle(read, 50'000'000));
    EXPECT_EQ(read.status, io::Status::timed_out);
    EXPECT_FALSE(read.buffer_lost);
    m.host.reply_override = nullptr;
    EXPECT_TRUE(m.read(0, m.buffer(4096)));
}

// A host that answers nothing but bus resets. A request that a reset has ended is sent again once; after a second reset
// it ends, whether or not it is the oldest one then.
TEST(Storvsc, TwoResetsEndEverything) {
    Machine m;
    m.host.hold = true;
    m.clock.on_idle = [](void* self) {
        auto& machine = *static_cast<Machine*>(self);
        fake::StorageHost& host = machine.host;
        host.take();
        const auto reset = std::ranges::find_if(host.commands, [](const Command& c) { return c.operation() == 6; });
        if (reset != host.commands.end()) {
            host.reply_override = nullptr;
            host.answer(static_cast<usize>(reset - host.commands.begin()));
            host.reply_override = [](const Command&) { return with([](Reply& r) { r.srb_status = 0x0e; }); };
            while (!host.commands.empty()) {
                host.answer();
            }
            machine.interrupt();
        }
    };
    std::vector<std::unique_ptr<io::Request>> requests;
    for (u32 i = 0; i < 6; ++i) {
        requests.push_back(
            std::make_unique<io::Request>(*m.disk, i % 2 == 0 ? io::Op::read : io::Op::write, 8 * i, m.buffer(4096)));
        m.disk->submit(*requests.back());
    }
    const Instant start = m.clock.time;
    ASSERT_TRUE(m.settle(*requests[0], 1'200'000'000));
    EXPECT_EQ(m.host.resets, 1u);
    for (u32 i = 1; i < 6; ++i) {
        EXPECT_TRUE(requests[i]->pending()) << "sent again";
    }
    for (auto& request : requests) {
        ASSERT_TRUE(m.settle(*request, 10'000'000'000));
        EXPECT_EQ(request->status, io::Status::timed_out);
        EXPECT_FALSE(request->buffer_lost);
    }
    EXPECT_EQ(m.host.resets, 2u);
    EXPECT_LE(m.clock.time - start, 2'200'000'000u);
    EXPECT_TRUE(m.queue->is_open()) << m.log.text.view();
}

TEST(Storvsc, RescindInMidFlight) {
    Machine m;
    m.host.hold = true;
    io::Request read(*m.disk, io::Op::read, 8, m.buffer(4096));
    m.disk->submit(read);
    m.executor.turn();
    m.channel.mark_rescinded();
    ASSERT_TRUE(m.settle(read, 50'000'000));
    EXPECT_EQ(read.status, io::Status::device_gone);
    EXPECT_TRUE(read.buffer_lost) << "until the channel is closed";
    EXPECT_TRUE(m.log.has("rescinded the storage controller"));
    EXPECT_TRUE(m.queue->quiescent());
}

TEST(Storvsc, ClosedByAnotherProcessorsQueue) {
    Machine m;
    m.host.hold = true;
    io::Request read(*m.disk, io::Op::read, 8, m.buffer(4096));
    m.disk->submit(read);
    m.executor.turn();
    m.shared.close(io::Status::protocol_error);
    m.executor.turn();
    EXPECT_EQ(read.status, io::Status::protocol_error);
    EXPECT_TRUE(m.queue->quiescent());
}

TEST(Storvsc, SignalStorm) {
    Machine m;
    m.always_signal = true;
    m.clock.step = 10'000;
    DmaSpan buffer = m.buffer(4096);
    m.host.hold = true;
    for (u32 i = 0; i < 5000; ++i) {
        m.interrupt();
        m.executor.turn();
    }
    EXPECT_TRUE(m.log.has("signals without a cause")) << m.log.text.view();
    EXPECT_EQ(std::count(m.log.text.view().begin(), m.log.text.view().end(), '\n'), 1) << "reported once";
    m.host.hold = false;
    EXPECT_TRUE(m.queue->is_open());
    m.always_signal = false;
    EXPECT_TRUE(m.read(0, buffer));
}

// What the host changes after publishing has no effect: the copy of the completion is used.
TEST(Storvsc, ContentsThatChangeAfterwards) {
    Machine m;
    DmaSpan buffer = m.buffer(4096);
    for (u32 i = 0; i < 100; ++i) {
        ASSERT_TRUE(m.write(i, buffer));
        std::memset(m.host.in_ring() + 4096, 0xff, fake::StorageHost::ring_data); // all old data is garbage now
    }
    EXPECT_TRUE(m.queue->is_open());
}

TEST(Storvsc, CancelledAndForgotten) {
    Machine m;
    m.host.hold = true;
    DmaSpan buffer = m.buffer(512 * 1024);
    std::vector<std::unique_ptr<io::Request>> sent;
    std::vector<std::unique_ptr<io::Request>> waiting;
    for (u32 i = 0; i < 200; ++i) {
        auto request = std::make_unique<io::Request>(*m.disk, io::Op::write, 0, buffer.subspan(0, 512));
        m.disk->submit(*request);
        (m.queue->in_flight() > i ? sent : waiting).push_back(std::move(request));
    }
    ASSERT_GT(waiting.size(), 2u);
    EXPECT_FALSE(m.disk->cancel(*sent[0])) << "the host has it";
    EXPECT_TRUE(m.disk->cancel(*waiting.back()));
    EXPECT_EQ(waiting.back()->status, io::Status::cancelled);
    waiting.clear(); // the host does not know them
    EXPECT_TRUE(m.queue->is_open());
    EXPECT_EQ(m.disk->in_flight(), sent.size());
    m.executor.turn();
    m.host.take();
    m.host.answer();
    sent.erase(sent.begin()); // completed, not yet processed
    EXPECT_TRUE(m.queue->is_open());
    m.host.hold = false;
    for (auto& request : sent) {
        ASSERT_TRUE(m.settle(*request));
        EXPECT_EQ(request->status, io::Status::ok);
    }
    EXPECT_EQ(m.disk->in_flight(), 0u);
}

TEST(Storvsc, TheControllersOwnPacketsFindASlot) {
    Machine m;
    m.host.hold = true;
    DmaSpan buffer = m.buffer(512);
    std::vector<std::unique_ptr<io::Request>> many;
    for (u32 i = 0; i < 2 * Queue::max_parts; ++i) {
        many.push_back(std::make_unique<io::Request>(*m.disk, io::Op::write, 0, buffer));
        m.disk->submit(*many.back());
    }
    drivers::storvsc::Exchange own(m.executor);
    own.packet.header = {drivers::storvsc::Operation::reset_bus, drivers::storvsc::flag_completion, 0};
    EXPECT_TRUE(m.queue->send(own));
    m.host.hold = false;
    for (auto& request : many) {
        ASSERT_TRUE(m.settle(*request));
        EXPECT_EQ(request->status, io::Status::ok);
    }
    EXPECT_TRUE(own.answered);
    EXPECT_EQ(m.host.resets, 1u);
}

// A transfer abandoned by its owner is forgotten at once, and its buffer is quarantined until the host has completed
// it.
class StorvscForgotten : public testing::TestWithParam<io::Op> {};
TEST_P(StorvscForgotten, TheBufferIsQuarantinedUntilTheAnswer) {
    Machine m;
    m.host.hold = true;
    const u32 outstanding = m.dma.outstanding;
    const Instant start = m.clock.time;
    {
        const DmaBuffer buffer = *m.dma.buffer(4096);
        io::Request request(*m.disk, GetParam(), 0, buffer);
        m.disk->submit(request);
        m.executor.turn();
    }
    EXPECT_LE(m.clock.time - start, 2 * io::Executor::tick_length) << "nothing is waited for";
    EXPECT_TRUE(m.queue->is_open());
    EXPECT_EQ(m.disk->in_flight(), 0u);
    EXPECT_EQ(m.queue->in_flight(), 1u) << "the slot is kept for the answer";
    EXPECT_EQ(m.dma.outstanding, outstanding + 1) << "the host may still reach it";
    m.host.hold = false;
    EXPECT_TRUE(m.read(4000, m.buffer(4096)));
    EXPECT_EQ(m.queue->in_flight(), 0u);
    EXPECT_EQ(m.dma.outstanding, outstanding + 1) << "given back; the other one is the read's";
    EXPECT_TRUE(m.queue->is_open());
}
INSTANTIATE_TEST_SUITE_P(All, StorvscForgotten, testing::Values(io::Op::read, io::Op::write),
                         [](const auto& info) { return std::string(io::name(info.param)); });

// Until the host has completed an abandoned write, no other request is sent for its sectors.
TEST(Storvsc, RequestsForTheSectorsOfAForgottenWriteWait) {
    Machine m;
    DmaSpan buffer = m.buffer(4096);
    std::memset(buffer.data, 0x11, buffer.size);
    DmaSpan fresh = m.buffer(4096);
    std::memset(fresh.data, 0x22, fresh.size);
    std::optional<Command> kept;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        if (!kept && c.operation() == 3) {
            kept = c;
            r.never = true;
        }
        return r;
    };
    {
        io::Request forgotten(*m.disk, io::Op::write, 8, buffer);
        m.disk->submit(forgotten);
        m.executor.turn();
    }
    ASSERT_TRUE(m.read(100, m.buffer(4096)));
    ASSERT_TRUE(kept);
    io::Request write(*m.disk, io::Op::write, 12, fresh); // overlapping sectors
    m.disk->submit(write);
    for (int i = 0; i < 20; ++i) {
        m.executor.turn();
    }
    EXPECT_TRUE(write.pending());
    m.host.reply_override = nullptr;
    m.host.commands.push_back(*kept); // executed late
    m.host.answer();
    m.interrupt();
    ASSERT_TRUE(m.settle(write));
    EXPECT_EQ(write.status, io::Status::ok);
    EXPECT_EQ(m.host.disk[8 * 512], std::byte{0x11});
    EXPECT_EQ(m.host.disk[12 * 512], std::byte{0x22}) << "the later write is the one that counts";
}

// If the host never completes it, the bus is reset, and the controller is closed if that does not help.
TEST(Storvsc, AForgottenWriteThatIsNeverAnsweredClosesTheController) {
    Machine m;
    bool first = true;
    m.host.reply_override = [&](const Command& c) {
        Reply r;
        r.never = c.operation() == 3 && std::exchange(first, false);
        return r;
    };
    {
        io::Request forgotten(*m.disk, io::Op::write, 8, m.buffer(4096));
        m.disk->submit(forgotten);
        m.executor.turn();
    }
    DmaSpan buffer = m.buffer(4096);
    while (m.queue->is_open() && m.clock.time < 10'000'000'000) {
        static_cast<void>(m.read(100, buffer));
        m.clock.time += 5'000'000;
    }
    EXPECT_FALSE(m.queue->is_open());
    EXPECT_EQ(m.host.resets, 1u);
    EXPECT_TRUE(m.log.has("no later write is safe")) << m.log.text.view();
}

TEST(Storvsc, ARemovedUnitTakesNothing) {
    Machine m;
    m.disk->remove();
    EXPECT_EQ(m.read(0, m.buffer(4096)).error().code, Code::device_gone);
}

} // namespace
