// The requests of a Xen disk against bytes written from [xen-blkif], and the responses that they may get.
#include "gtest_macros.hpp"
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
import io.block_queue;
import hv.xen.grants;
import drivers.xen_blk.requests;
import drivers.xen_blk.answer;

#include "unit/io/support.hpp"

using namespace fl;
using namespace fl::drivers::xen_blk;

namespace {

class XenBlkRequests : public testing::Test {
  protected:
    static constexpr u64 id = 0x1122'3344'5566'0007;

    XenBlkRequests() {
        grants->install(table, 1);
        terms.handle = 0xca00;
        terms.geometry.sector_size = 512;
    }
    ~XenBlkRequests() { pages->reclaim(); }
    void open() {
        ASSERT_TRUE(pages->open(terms, terms.geometry.sector_size, 32, memory));
        requests.open(terms);
    }
    // A buffer that begins `offset` bytes into a page.
    DmaSpan buffer(u32 size, u32 offset = 0) {
        blocks.push_back(*memory.buffer((offset + size + 4095) / 4096 * 4096));
        return blocks.back().span().subspan(offset, size);
    }
    io::QueuedCommand command(io::Op op, u64 lba, DmaSpan data) {
        io::QueuedCommand c;
        c.first = &io_requests.emplace_back(disk, op, lba, data);
        c.op = op;
        c.lba = lba;
        c.bytes = data.size;
        return c;
    }
    // The bytes of its slot; empty: it does not fit.
    std::vector<u8> encode(io::QueuedCommand& c, Wire& wire) {
        if (requests.fit(c, wire, false) != io::Fit::ok) {
            return {};
        }
        Slot slot;
        std::memset(&slot, 0xee, sizeof slot);
        const auto bytes = requests.encode(slot, c, wire, id);
        const auto* first = reinterpret_cast<const u8*>(bytes.data());
        return {first, first + bytes.size()};
    }
    static u64 number(const std::vector<u8>& bytes, usize at, usize count) {
        u64 value = 0;
        for (usize i = count; i-- > 0;) {
            value = value << 8 | bytes.at(at + i);
        }
        return value;
    }

    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma memory;
    std::deque<DmaBuffer> blocks;
    test::MemoryDisk disk{executor, nullptr, 0}; // never asked for anything: requests refer to a disk
    std::deque<io::Request> io_requests;
    std::vector<hv::xen::GrantEntry> table{hv::xen::grants_per_frame};
    std::unique_ptr<hv::xen::Grants> grants = std::make_unique<hv::xen::Grants>();
    Terms terms;
    std::unique_ptr<Pages> pages = std::make_unique<Pages>(*grants);
    Requests requests{*pages};
};

TEST_F(XenBlkRequests, AReadOfTwoPages) {
    open();
    auto c = command(io::Op::read, 0x1'0000'0002, buffer(4096, 3072));
    Wire wire;
    const auto bytes = encode(c, wire);
    ASSERT_EQ(bytes.size(), 24u + 2 * 8);
    EXPECT_EQ(bytes[0], 0u); // read
    EXPECT_EQ(bytes[1], 2u); // segments
    EXPECT_EQ(number(bytes, 2, 2), 0xca00u);
    EXPECT_EQ(number(bytes, 4, 4), 0u);
    EXPECT_EQ(number(bytes, 8, 8), id);
    EXPECT_EQ(number(bytes, 16, 8), 0x1'0000'0002u);
    EXPECT_EQ(number(bytes, 24, 4), wire.pages.refs[0]);
    EXPECT_EQ(bytes[28], 6u); // the last two sectors of the first page
    EXPECT_EQ(bytes[29], 7u);
    EXPECT_EQ(number(bytes, 30, 2), 0u);
    EXPECT_EQ(number(bytes, 32, 4), wire.pages.refs[1]);
    EXPECT_EQ(bytes[36], 0u); // the first six of the second
    EXPECT_EQ(bytes[37], 5u);
    EXPECT_TRUE(pages->release(wire.pages));
}

TEST_F(XenBlkRequests, SectorsAreCountedInTheUnitOfTheWire) {
    for (const u32 unit : {512u, 4096u}) {
        terms.geometry.sector_size = 4096;
        terms.wire_unit = unit;
        pages = std::make_unique<Pages>(*grants);
        Requests counted(*pages);
        ASSERT_TRUE(pages->open(terms, 4096, 32, memory));
        counted.open(terms);
        auto c = command(io::Op::write, 10, buffer(4096));
        Wire wire;
        Slot slot;
        ASSERT_EQ(counted.fit(c, wire, false), io::Fit::ok);
        static_cast<void>(counted.encode(slot, c, wire, id));
        EXPECT_EQ(slot.direct.header.operation, Operation::write);
        EXPECT_EQ(slot.direct.header.sector, 10u * 4096 / unit);
        EXPECT_EQ(slot.direct.segments[0].last_sector, 4096 / unit - 1);
        EXPECT_TRUE(pages->release(wire.pages));

        auto d = command(io::Op::discard, 3, {nullptr, 0, 8 * 4096});
        ASSERT_EQ(counted.fit(d, wire, false), io::Fit::ok);
        static_cast<void>(counted.encode(slot, d, wire, id));
        EXPECT_EQ(slot.discard.header.sector, 3u * 4096 / unit);
        EXPECT_EQ(slot.discard.sector_count, 8u * 4096 / unit);
    }
}

TEST_F(XenBlkRequests, LongRequestsAreIndirectOrShortened) {
    terms.indirect_segments = 32;
    open();
    auto c = command(io::Op::write, 5, buffer(128 * 1024));
    Wire wire;
    const auto bytes = encode(c, wire);
    EXPECT_EQ(c.bytes, 128u * 1024);
    ASSERT_EQ(bytes.size(), 64u);
    EXPECT_EQ(bytes[0], 6u); // indirect
    EXPECT_EQ(bytes[1], 1u); // write
    EXPECT_EQ(number(bytes, 2, 2), 32u);
    EXPECT_EQ(number(bytes, 8, 8), id);
    EXPECT_EQ(number(bytes, 16, 8), 5u);
    EXPECT_EQ(number(bytes, 24, 2), 0xca00u);
    EXPECT_EQ(number(bytes, 28, 4), pages->indirect_grant(wire.pages));
    EXPECT_EQ(number(bytes, 32, 4), 0u) << "one page of segments";
    const auto segments = pages->indirect_segments(wire.pages);
    ASSERT_EQ(segments.size(), 32u);
    EXPECT_EQ(segments[31].grant, wire.pages.refs[31]);
    EXPECT_EQ(segments[31].last_sector, 7u);
    EXPECT_TRUE(pages->release(wire.pages));

    terms.indirect_segments = 0;
    pages->reclaim();
    pages = std::make_unique<Pages>(*grants);
    Requests direct(*pages);
    ASSERT_TRUE(pages->open(terms, 512, 32, memory));
    direct.open(terms);
    ASSERT_EQ(direct.fit(c, wire, false), io::Fit::ok);
    EXPECT_EQ(c.bytes, 11u * 4096);
    Slot slot;
    EXPECT_EQ(direct.encode(slot, c, wire, id).size(), 112u);
    EXPECT_TRUE(pages->release(wire.pages));
}

TEST_F(XenBlkRequests, FlushesAsNegotiatedAndDiscards) {
    Wire wire;
    for (const Operation flush : {Operation::flush, Operation::write_barrier}) {
        terms.flush = flush;
        requests.open(terms);
        auto c = command(io::Op::flush, 0, {});
        const auto bytes = encode(c, wire);
        ASSERT_EQ(bytes.size(), 24u);
        EXPECT_EQ(bytes[0], flush == Operation::flush ? 3u : 2u);
        EXPECT_EQ(bytes[1], 0u) << "no segments";
        EXPECT_EQ(number(bytes, 8, 8), id);
        EXPECT_EQ(number(bytes, 16, 8), 0u);
    }
    auto c = command(io::Op::discard, 8, {nullptr, 0, 16 * 512});
    const auto bytes = encode(c, wire);
    ASSERT_EQ(bytes.size(), 32u);
    EXPECT_EQ(bytes[0], 5u);
    EXPECT_EQ(bytes[1], 0u) << "not a secure discard";
    EXPECT_EQ(number(bytes, 8, 8), id);
    EXPECT_EQ(number(bytes, 16, 8), 8u);
    EXPECT_EQ(number(bytes, 24, 8), 16u);
    auto s = command(io::Op::secure_discard, 8, {nullptr, 0, 16 * 512});
    const auto secure = encode(s, wire);
    ASSERT_EQ(secure.size(), 32u);
    EXPECT_EQ(secure[0], 5u);
    EXPECT_EQ(secure[1], 1u) << "BLKIF_DISCARD_SECURE";
    EXPECT_EQ(number(secure, 16, 8), 8u);
    EXPECT_EQ(number(secure, 24, 8), 16u);
}

TEST_F(XenBlkRequests, RefusesWhatNoSegmentCanDescribe) {
    open();
    auto c = command(io::Op::read, 0, buffer(512, 256));
    Wire wire;
    EXPECT_EQ(requests.fit(c, wire, false), io::Fit::refused);
    EXPECT_EQ(c.refusal, io::Status::misaligned);
}

TEST(XenBlkAnswer, AStatusForTheOperationThatWasRequested) {
    struct Case {
        u8 operation;
        i16 status;
        std::optional<io::Status> expected;
    };
    Wire direct;
    direct.operation = Operation::write;
    Wire indirect = direct;
    indirect.pages.indirect = true;
    const auto check = [](const Wire& wire, const Case& c) {
        const Response response{.operation = Operation{c.operation}, .status = c.status};
        io::Status status = io::Status::not_written;
        std::optional<Error> fault;
        EXPECT_EQ(decode(response, wire, status, fault), c.expected.has_value()) << c.operation << " " << c.status;
        EXPECT_EQ(fault.has_value(), !c.expected);
        EXPECT_EQ(status, c.expected.value_or(io::Status::not_written));
        EXPECT_TRUE(!fault || fault->code == Code::protocol);
    };
    for (const Wire& wire : {direct, indirect}) {
        check(wire, {1, 0, io::Status::ok});
        check(wire, {1, -1, io::Status::io_error});
        check(wire, {1, -2, io::Status::not_supported});
        check(wire, {1, -3, std::nullopt});
        check(wire, {1, 1, std::nullopt});
        check(wire, {0, 0, std::nullopt});
        check(wire, {0xff, 0, std::nullopt});
    }
    check(direct, {6, 0, std::nullopt});
    check(indirect, {6, 0, io::Status::ok}); // back ends differ
}

} // namespace
