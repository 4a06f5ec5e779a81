// Every command that the NVMe driver builds, as 64 bytes typed from [nvme-1.4 §4.2, §5, §6]; and identify data that
// makes no sense.
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
using Bytes = std::array<u8, 64>;

struct Field {
    usize at; // of a little-endian dword
    u32 value;
};
// `opcode` is byte 0; byte 1 is 0: PRPs, not fused. The command id, bytes 2 and 3, is masked.
Bytes command(u8 opcode, std::initializer_list<Field> fields) {
    Bytes bytes{};
    bytes[0] = opcode;
    for (const Field& f : fields) {
        for (usize i = 0; i < 4; ++i) {
            bytes.at(f.at + i) = static_cast<u8>(f.value >> 8 * i);
        }
    }
    return bytes;
}
template <class Command>
Bytes bytes_of(const Command& sent) {
    static_assert(sizeof sent == 64);
    Bytes bytes;
    std::memcpy(bytes.data(), &sent, 64);
    bytes[2] = bytes[3] = 0;
    return bytes;
}
u32 low(u64 address) { return static_cast<u32>(address); }
u32 high(u64 address) { return static_cast<u32>(address >> 32); }

TEST(NvmeBytes, AdminCommands) {
    constexpr u64 at = 0x1'2345'6000;
    // Identify: CNS in dword 10 (byte 40), NSID in dword 1 (byte 4), PRP1 at byte 24.
    EXPECT_EQ(bytes_of(nvme::identify_command(0, 7, at)), command(0x06, {{4, 7}, {24, 0x2345'6000}, {28, 1}, {40, 0}}));
    EXPECT_EQ(bytes_of(nvme::identify_command(6, 0, at)), command(0x06, {{24, 0x2345'6000}, {28, 1}, {40, 6}}));
    // Create I/O Completion Queue: QSIZE, 0's based, and QID; IV 3, IEN, PC.
    EXPECT_EQ(bytes_of(nvme::create_completion_queue_command(2, 128, at, 3)),
              command(0x05, {{24, 0x2345'6000}, {28, 1}, {40, 0x007f'0002}, {44, 0x0003'0003}}));
    // Create I/O Submission Queue: CQID 2, QPRIO 0, PC.
    EXPECT_EQ(bytes_of(nvme::create_submission_queue_command(2, 128, at)),
              command(0x01, {{24, 0x2345'6000}, {28, 1}, {40, 0x007f'0002}, {44, 0x0002'0001}}));
    // Set Features: FID in dword 10, the value in dword 11.
    EXPECT_EQ(bytes_of(nvme::set_feature_command(0x07, 0x0003'0003)), command(0x09, {{40, 7}, {44, 0x0003'0003}}));
    // Doorbell Buffer Config: PRP1 shadow doorbells, PRP2 (byte 32) event indices.
    EXPECT_EQ(bytes_of(nvme::doorbell_buffer_command(at, 0x9000)),
              command(0x7c, {{24, 0x2345'6000}, {28, 1}, {32, 0x9000}}));
    // Abort: CID in 31:16, SQID in 15:0 of dword 10.
    EXPECT_EQ(bytes_of(nvme::abort_command(2, 0x0181)), command(0x08, {{40, 0x0181'0002}}));
    EXPECT_EQ(bytes_of(nvme::event_request_command()), command(0x0c, {}));
    // Get Log Page: NUMDL, 0's based, in 31:16, RAE 0 (bit 15), LID in 7:0; all namespaces.
    EXPECT_EQ(bytes_of(nvme::log_page_command(4, 4096, at)),
              command(0x02, {{4, 0xffff'ffff}, {24, 0x2345'6000}, {28, 1}, {40, 0x03ff'0004}}));
}

TEST(NvmeBytes, TheSetUp) {
    Options o;
    o.doorbell_buffers = true;
    Machine& m = attached(o);
    ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
    std::vector<u32> opcodes;
    for (const auto& e : m.device.admin) {
        opcodes.push_back(e[0] & 0xff);
    }
    EXPECT_EQ(opcodes, (std::vector<u32>{0x06, 0x06, 0x7c, 0x09, 0x05, 0x01, 0x06, 0x06, 0x06, 0x09, 0x0c}));
    EXPECT_EQ(m.device.features[0x07], 0u) << "one queue of each kind, 0's based";
    EXPECT_EQ(m.device.features[0x0b], 0x11fu) << "critical warnings, namespace attribute notices";
    EXPECT_FALSE(m.device.features.contains(0x06)) << "the volatile write cache stays as it is";
}

TEST(NvmeBytes, WithoutFlushTheVolatileCacheIsSwitchedOff) {
    Machine& m = attached({}, to_underlying(Feature::flush));
    ASSERT_TRUE(m.device.features.contains(0x06));
    EXPECT_EQ(m.device.features[0x06], 0u) << "WCE";
    EXPECT_FALSE(m.sink.disks[0]->geometry().flush);
    Options none;
    none.write_cache = false;
    EXPECT_FALSE(attached(none, to_underlying(Feature::flush)).device.features.contains(0x06));
}

// What the controller gets for a request of `bytes` bytes, `offset` bytes into a page.
nvme_fake::Entry sent_for(Machine& m, io::Op op, u64 lba, DmaSpan span) {
    m.device.hold = true;
    io::Request request(*m.sink.disks.at(0), op, lba, span);
    m.sink.disks[0]->submit(request);
    m.executor.turn();
    EXPECT_EQ(m.device.held.size(), 1u);
    const nvme_fake::Entry entry = m.device.held.at(0).entry;
    m.device.answer(0);
    EXPECT_TRUE(turn_until(m, [&] { return !request.pending(); }));
    EXPECT_EQ(request.status, io::Status::ok);
    return entry;
}

TEST(NvmeBytes, ReadsAndWrites) {
    Machine& m = attached();
    auto data = *m.dma.buffer(64 << 10);
    const u64 base = data.bus();
    ASSERT_EQ(base % 4096, 0u);
    // One page: PRP1 alone. NSID 1; SLBA in dwords 10 and 11, NLB 0's based in 15:0 of dword 12.
    EXPECT_EQ(bytes_of(sent_for(m, io::Op::read, 0x123, data.span().subspan(0, 4096))),
              command(0x02, {{4, 1}, {24, low(base)}, {28, high(base)}, {40, 0x123}, {48, 7}}));
    // Inside of a page.
    EXPECT_EQ(bytes_of(sent_for(m, io::Op::write, 2, data.span().subspan(512, 1024))),
              command(0x01, {{4, 1}, {24, low(base + 512)}, {28, high(base)}, {40, 2}, {48, 1}}));
    // Two pages: PRP2 is the second one.
    EXPECT_EQ(bytes_of(sent_for(m, io::Op::write, 0, data.span().subspan(512, 4096))),
              command(0x01, {{4, 1},
                             {24, low(base + 512)},
                             {28, high(base)},
                             {32, low(base + 4096)},
                             {36, high(base + 4096)},
                             {48, 7}}));
    // Three pages: PRP2 is a list of the second and the third, which are page-aligned.
    const auto entry = sent_for(m, io::Op::read, 0, data.span().subspan(512, 8192));
    EXPECT_EQ(nvme_fake::wide(entry, 6), base + 512);
    const u64 list = nvme_fake::wide(entry, 8);
    EXPECT_NE(list, base + 4096);
    EXPECT_EQ(nvme_fake::load<u64>(list), base + 4096);
    EXPECT_EQ(nvme_fake::load<u64>(list + 8), base + 8192);
    EXPECT_EQ(entry[12], 15u);
}

TEST(NvmeBytes, FlushDeallocateAndWriteZeroes) {
    Machine& m = attached();
    EXPECT_EQ(bytes_of(sent_for(m, io::Op::flush, 0, {})), command(0x00, {{4, 1}}));
    const auto discard = sent_for(m, io::Op::discard, 0x100, {nullptr, 0, 8192});
    const u64 range = nvme_fake::wide(discard, 6);
    // Dataset Management: NR 0 (one range) in dword 10, AD (bit 2) in dword 11.
    EXPECT_EQ(bytes_of(discard), command(0x09, {{4, 1}, {24, low(range)}, {28, high(range)}, {44, 4}}));
    EXPECT_EQ(nvme_fake::load<u32>(range), 0u) << "context attributes";
    EXPECT_EQ(nvme_fake::load<u32>(range + 4), 16u);
    EXPECT_EQ(nvme_fake::load<u64>(range + 8), 0x100u);
    EXPECT_EQ(bytes_of(sent_for(m, io::Op::write_zeroes, 0x100, {nullptr, 0, 8192})),
              command(0x08, {{4, 1}, {40, 0x100}, {48, 15}}));
}

TEST(NvmeBytes, LimitsOfTheCommandSet) {
    Options o;
    o.blocks = 1 << 18; // 128 MiB
    Machine& m = attached(o);
    const auto run = [](Machine& with, io::Op op, u32 bytes) {
        with.device.commands.clear();
        with.device.records = true;
        io::Request request(*with.sink.disks.at(0), op, 0, {nullptr, 0, bytes});
        with.sink.disks[0]->submit(request);
        EXPECT_TRUE(turn_until(with, [&] { return !request.pending(); }));
        EXPECT_EQ(request.status, io::Status::ok);
        return with.device.commands;
    };
    // NLB has 16 bits: 65536 blocks.
    auto sent = run(m, io::Op::write_zeroes, 64 << 20);
    ASSERT_EQ(sent.size(), 2u);
    EXPECT_EQ(sent[0][12], 0xffffu);
    EXPECT_EQ(sent[1][10], 0x10000u);
    EXPECT_EQ(run(m, io::Op::discard, 64 << 20).size(), 1u);
    o.wzsl = 3; // 32 KiB
    o.dmrsl = 100;
    Machine& small = attached(o);
    EXPECT_EQ(run(small, io::Op::write_zeroes, 128 << 10).size(), 4u);
    EXPECT_EQ(run(small, io::Op::discard, 128 << 10).size(), 3u);
    // Neither is offered without its bit in ONCS, nor when it is withheld.
    o.zeroes = false;
    EXPECT_FALSE(attached(o).sink.disks[0]->geometry().write_zeroes);
    EXPECT_FALSE(attached({}, to_underlying(Feature::write_zeroes)).sink.disks[0]->geometry().write_zeroes);
}

// ---- identify data ----

std::string reason(std::function<void(u64 data)> change) {
    static std::vector<std::unique_ptr<Machine>> all;
    all.push_back(machine());
    Machine& m = *all.back();
    m.device.patch = [change](u32 cns, u32, u64 data) {
        if (cns == 0) {
            change(data);
        }
    };
    EXPECT_TRUE(m.probe());
    m.device.patch = nullptr;
    EXPECT_EQ(m.sink.disks.size() + m.sink.left.size(), 1u);
    return m.sink.left.empty() ? std::string() : m.sink.left[0].second;
}

TEST(NvmeBytes, NamespacesThatMakeNoSense) {
    using nvme_fake::store;
    for (const u32 shift : {0u, 8u, 10u, 13u, 40u, 255u}) {
        EXPECT_NE(reason([&](u64 d) { store<u32>(d + 128, shift << 16); }).find("neither 512 nor 4096"),
                  std::string::npos)
            << shift;
    }
    EXPECT_NE(reason([](u64 d) { store<u64>(d + 8, 8193); }).find("NCAP"), std::string::npos);
    EXPECT_EQ(reason([](u64 d) { store<u64>(d + 8, 8191); }), "") << "thin";
    EXPECT_NE(reason([](u64 d) { store<u64>(d + 8, 0); }).find("no blocks"), std::string::npos);
    EXPECT_NE(reason([](u64 d) { store<u8>(d + 26, 1); }).find("FLBAS"), std::string::npos);
    EXPECT_NE(reason([](u64 d) { store<u8>(d + 25, 64); }).find("NLBAF"), std::string::npos);
    EXPECT_EQ(reason([](u64 d) {
                  store<u8>(d + 25, 17); // format 17: bits 6:5 and 3:0
                  store<u8>(d + 26, 0x21);
                  store<u32>(d + 128 + 4 * 17, 12 << 16);
                  store<u32>(d + 128 + 4, 40 << 16);
              }),
              "");
    EXPECT_NE(reason([](u64 d) {
                  store<u64>(d, u64{1} << 56);
                  store<u64>(d + 8, 1);
              }).find("2^64"),
              std::string::npos);
    EXPECT_EQ(reason([](u64 d) {
                  store<u64>(d, (u64{1} << 55) - 1);
                  store<u64>(d + 8, 1);
              }),
              "");
    EXPECT_NE(reason([](u64 d) { store<u32>(d + 128, 9 << 16 | 64); }).find("metadata"), std::string::npos);
    EXPECT_NE(reason([](u64 d) { store<u8>(d + 29, 3); }).find("protection information"), std::string::npos);
}

TEST(NvmeBytes, ControllersWithExtremeLimits) {
    for (const u64 mqes : {u64{1}, u64{2}, u64{62}, u64{126}, u64{127}, u64{128}, u64{0xffff}}) {
        Options o;
        o.cap = (o.cap & ~u64{0xffff}) | mqes;
        Machine& m = attached(o);
        EXPECT_EQ(m.device.pairs[1].size, std::bit_floor(std::min<u64>(mqes + 1, 128))) << mqes;
        exchange_data(m, 65536);
    }
    for (const u8 mdts : {u8{0}, u8{1}, u8{6}, u8{7}, u8{8}, u8{31}, u8{255}}) {
        Options o;
        o.mdts = mdts;
        Machine& m = attached(o);
        EXPECT_NE(features(m).find("mdts=" + std::to_string(mdts == 0 || mdts > 7 ? 524288 : 4096u << mdts)),
                  std::string::npos)
            << u32{mdts} << ": " << features(m);
    }
    Options o; // the doorbells lie 4 << 15 bytes apart, beyond the BAR
    o.cap |= u64{15} << 32;
    EXPECT_NE(failure(o).find("room"), std::string::npos);
    o = {};
    o.cap |= u64{9} << 32; // 2 KiB: the doorbell buffers have no room for them, the BAR of 16 KiB has
    o.doorbell_buffers = true;
    Machine& wide = attached(o);
    EXPECT_EQ(wide.device.shadow, 0u);
    exchange_data(wide, 8192);
    for (const u64 to : {u64{0}, u64{0xff}}) { // CAP.TO: each has a bound
        Options slow;
        slow.cap = (slow.cap & ~(u64{0xff} << 24)) | to << 24;
        slow.never_ready = true;
        EXPECT_NE(failure(slow).find("does not become ready"), std::string::npos);
    }
}

TEST(NvmeBytes, OptionalCommandsMayBeRefused) {
    for (const u8 opcode : {u8{0x7c}, u8{0x0c}, u8{0x02}}) {
        auto m = machine({.doorbell_buffers = true});
        Machine& kept = *m;
        kept.device.refused.insert(opcode);
        static std::vector<std::unique_ptr<Machine>> all;
        all.push_back(std::move(m));
        EXPECT_TRUE(kept.probe());
        ASSERT_EQ(kept.sink.disks.size(), 1u);
        exchange_data(kept, 65536);
    }
    for (const u8 opcode : {u8{0x06}, u8{0x09}, u8{0x05}, u8{0x01}}) {
        auto m = machine();
        m->device.refused.insert(opcode);
        EXPECT_FALSE(m->probe()) << u32{opcode};
        EXPECT_EQ(m->device.cc & 1, 0u) << "disabled";
    }
}

TEST(NvmeBytes, NamespacesThatChange) {
    Options o;
    o.namespaces = 2;
    Machine& m = attached(o);
    const auto change = [&](std::vector<u32> list) {
        ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
        m.device.changed = std::move(list);
        m.device.report_event(0x0004'0002);
        ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
    };
    const auto grow = [&](u64 blocks) {
        m.device.patch = [blocks](u32 cns, u32 nsid, u64 data) {
            if (cns == 0 && nsid == 2) {
                nvme_fake::store<u64>(data, blocks);
                nvme_fake::store<u64>(data + 8, blocks);
            }
        };
    };
    grow(9000);
    change({1});
    EXPECT_EQ(m.sink.disks[1]->geometry().sectors, 8192u) << "not in the list";
    change({2});
    EXPECT_EQ(m.sink.disks[1]->geometry().sectors, 9000u);
    grow(100);
    change({0xffff'ffff}); // more than the list has room for
    EXPECT_EQ(m.sink.disks[1]->geometry().sectors, 100u);
    EXPECT_EQ(m.sink.disks[0]->geometry().sectors, 8192u);
    m.device.options.namespaces = 3; // a new one
    change({3});
    ASSERT_EQ(m.sink.disks.size(), 3u);
    EXPECT_EQ(m.sink.disks[2]->identity().name.view(), "nvme0n3");
    m.device.patch = [](u32 cns, u32 nsid, u64 data) {
        if (cns == 0 && nsid == 2) {
            std::memset(reinterpret_cast<void*>(data), 0, 4096);
        }
    };
    change({2}); // detached
    EXPECT_TRUE(m.sink.disks[1]->removed());
    EXPECT_FALSE(m.sink.disks[0]->removed());
    m.device.patch = nullptr;
}

TEST(NvmeBytes, OtherEventsAreLoggedOnceAndAskedForAgain) {
    Machine& m = attached();
    test::CapturedLog log;
    for (int i = 0; i < 3; ++i) {
        for (const u32 event : {0x0001'0000u, 0x0002'0101u, 0x0080'0006u}) { // error, health, I/O command set specific
            ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
            m.device.report_event(event);
        }
    }
    ASSERT_TRUE(turn_until(m, [&] { return m.device.events.size() == 1; }));
    const std::string text(log.text.view());
    usize lines = 0;
    for (usize at = text.find("event of type"); at != std::string::npos; at = text.find("event of type", at + 1)) {
        ++lines;
    }
    EXPECT_EQ(lines, 3u) << text;
    const auto pages = std::ranges::count_if(m.device.admin, [](const auto& e) { return (e[0] & 0xff) == 2; });
    EXPECT_EQ(pages, 6) << "the pages of the first two are read, each time";
}

} // namespace
