#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.crc32c;
import io.task;
import io.executor;
import io.block;
import io.verify;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::test;

TEST(VerifyStamp, HeaderIsAsDocumented) {
    std::vector<std::byte> block(512);
    write_stamp(block, {.lba = 0x1122334455667788, .generation = 3, .seed = 9});
    const unsigned char golden[32] = {'F',  'L',  'V',  'E',  'R',  'I', 'F', 'Y', 0x88, 0x77, 0x66,
                                      0x55, 0x44, 0x33, 0x22, 0x11, 3,   0,   0,   0,    0,    0,
                                      0,    0,    9,    0,    0,    0,   0,   0,   0,    0};
    EXPECT_EQ(std::memcmp(block.data(), golden, 32), 0);
    const unsigned char size[4] = {0x00, 0x02, 0, 0};
    EXPECT_EQ(std::memcmp(block.data() + 36, size, 4), 0);
    u32 stored = 0;
    std::memcpy(&stored, block.data() + 32, 4);
    std::memset(block.data() + 32, 0, 4);
    EXPECT_EQ(crc32c(block), stored);
}

TEST(VerifyStamp, EveryByteCounts) {
    const Stamp stamp{.lba = 64, .generation = 2, .seed = 5};
    std::vector<std::byte> block(1024);
    write_stamp(block, stamp);
    EXPECT_EQ(check_stamp(block, stamp).what, Mismatch::none);
    for (usize i = 0; i < block.size(); ++i) {
        block[i] ^= std::byte{1};
        const auto check = check_stamp(block, stamp);
        const Mismatch want = i < 8    ? Mismatch::magic
                              : i < 16 ? Mismatch::lba
                              : i < 24 ? Mismatch::generation
                              : i < 32 ? Mismatch::seed
                              : i < 36 ? Mismatch::crc
                              : i < 40 ? Mismatch::size
                                       : Mismatch::crc;
        ASSERT_EQ(check.what, want) << i;
        ASSERT_NE(check.expected, check.seen);
        block[i] ^= std::byte{1};
    }
    // A different payload with a valid checksum is detected, too.
    block[100] ^= std::byte{1};
    std::memset(block.data() + 32, 0, 4);
    const u32 crc = crc32c(block);
    std::memcpy(block.data() + 32, &crc, 4);
    EXPECT_EQ(check_stamp(block, stamp).what, Mismatch::payload);
}

struct Verify : testing::Test {
    FakeMachine machine;
    Executor executor{machine.platform()};
    std::vector<std::byte> storage = std::vector<std::byte>(256 * 4096);
    MemoryDisk disk{executor, storage.data(), storage.size()};
    HeapDma dma;
    u32 lost = 0;
    usize frames = frame_pool().in_use();
    ~Verify() override {
        EXPECT_EQ(frame_pool().in_use(), frames);
        EXPECT_EQ(dma.outstanding, lost);
    }
    Result<VerifyReport> run(VerifyPlan plan) { return executor.run(verify(disk, plan, dma)); }
    const VerifyPlan whole{.bs = 4096, .qd = 8, .seed = 3, .generation = 7, .scratch = true};
};

TEST_F(Verify, WholeDisk) {
    const auto r = run(whole);
    ASSERT_TRUE(r);
    EXPECT_TRUE(r->ok());
    EXPECT_EQ(r->blocks, 256u);
    EXPECT_EQ(r->written, 256u);
    EXPECT_EQ(r->read, 256u);
    EXPECT_EQ(disk.flushes, 1u);
    for (u64 i = 0; i < 256; ++i) { // as the host would inspect the image
        ASSERT_EQ(
            check_stamp(std::span(storage).subspan(i * 4096, 4096), {.lba = i * 8, .generation = 7, .seed = 3}).what,
            Mismatch::none);
    }
    auto again = whole;
    again.write = false;
    again.scratch = false;
    const auto checked = run(again);
    ASSERT_TRUE(checked);
    EXPECT_TRUE(checked->ok());
    EXPECT_EQ(checked->written, 0u);
    again.generation = 8;
    const auto other = run(again);
    ASSERT_TRUE(other);
    EXPECT_EQ(other->bad, 256u);
    EXPECT_EQ(other->bad_blocks().size(), 8u);
    EXPECT_EQ(other->first_bad[0].check.what, Mismatch::generation);
    EXPECT_EQ(other->first_bad[0].check.expected, 8u);
    EXPECT_EQ(other->first_bad[0].check.seen, 7u);
}

TEST_F(Verify, PartOfADiskWithLargeSectors) {
    MemoryDisk big(executor, storage.data(), storage.size(), 4096);
    const auto r = executor.run(verify(big, {.bs = 8192, .qd = 3, .count = 10, .first_lba = 32, .scratch = true}, dma));
    ASSERT_TRUE(r);
    EXPECT_TRUE(r->ok());
    EXPECT_EQ(storage[32 * 512 - 1], std::byte{0});
    EXPECT_EQ(storage[32 * 512], std::byte{'F'});
    EXPECT_EQ(storage[(32 + 160) * 512], std::byte{0});
}

TEST_F(Verify, DiscardsAndZeroesOneOfFourBlocks) {
    disk.change_geometry().discard = true;
    disk.change_geometry().write_zeroes = true;
    auto plan = whole;
    plan.first_lba = 8; // the first block is number 1
    plan.count = 101;
    plan.erase = {.discard = true, .zeroes = true};
    const auto r = run(plan);
    ASSERT_TRUE(r);
    EXPECT_TRUE(r->ok());
    EXPECT_EQ(r->written, 101u);
    EXPECT_EQ(r->discarded, 26u); // 1, 5, ... 101
    EXPECT_EQ(r->zeroed, 25u);    // 2, 6, ... 98
    EXPECT_EQ(disk.discarded, 26u * 4096);
    EXPECT_EQ(disk.zeroed, 25u * 4096);
    for (u64 i = 1; i <= 101; ++i) {
        const auto block = std::span(storage).subspan(i * 4096, 4096);
        if (i % 4 == 2) {
            EXPECT_EQ(check_zeros(block).what, Mismatch::none) << i;
        } else if (i % 4 != 1) {
            EXPECT_EQ(check_stamp(block, {.lba = i * 8, .generation = 7, .seed = 3}).what, Mismatch::none) << i;
        }
    }
    plan.write = false; // the same can be checked again
    EXPECT_TRUE(run(plan)->ok());
    plan.erase = {};
    EXPECT_EQ(run(plan)->bad, 51u);
    storage[6 * 4096 + 9] = std::byte{1};
    plan.erase = {.discard = true, .zeroes = true};
    const auto not_zero = run(plan);
    EXPECT_EQ(not_zero->bad, 1u);
    EXPECT_EQ(not_zero->first_bad[0].lba, 48u);
    EXPECT_EQ(not_zero->first_bad[0].check.what, Mismatch::zeroes);
}

TEST_F(Verify, SecurelyDiscardsOneOfFourBlocks) {
    disk.change_geometry().discard = true;
    disk.change_geometry().secure_discard = true;
    auto plan = whole;
    plan.count = 102; // numbers 0 to 101
    plan.erase = {.discard = true, .secure_discard = true};
    const auto r = run(plan);
    ASSERT_TRUE(r);
    EXPECT_TRUE(r->ok());
    EXPECT_EQ(r->discarded, 26u); // 1, 5, ... 101
    EXPECT_EQ(r->secured, 25u);   // 3, 7, ... 99
    EXPECT_EQ(disk.discarded, 26u * 4096);
    EXPECT_EQ(disk.secured, 25u * 4096);
    for (u64 i = 0; i < 102; i += 2) {
        const auto block = std::span(storage).subspan(i * 4096, 4096);
        EXPECT_EQ(check_stamp(block, {.lba = i * 8, .generation = 7, .seed = 3}).what, Mismatch::none) << i;
    }
    const CapturedLog log;
    print_record(disk, *r);
    EXPECT_TRUE(log.has("\"discarded\":26,\"zeroed\":0,\"read\":102,\"bad\":0,\"ok\":true,\"lanes\":1,"
                        "\"secure_discarded\":25}\n"));
    auto missing = *r;
    --missing.secured;
    EXPECT_FALSE(missing.ok()) << "a block was not erased";
}

TEST_F(Verify, FindsADiskThatDoesNotZero) {
    disk.change_geometry().write_zeroes = true;
    disk.behaviour.drop_write_lba = 6 * 8;
    std::memset(storage.data(), 0xff, storage.size());
    auto plan = whole;
    plan.erase.zeroes = true;
    const auto r = run(plan);
    ASSERT_TRUE(r);
    EXPECT_FALSE(r->ok());
    EXPECT_EQ(r->bad, 1u);
    disk.behaviour = {.fail_lba = 10 * 8, .fail_status = Status::not_supported};
    const auto refused = run(plan);
    ASSERT_TRUE(refused);
    EXPECT_FALSE(refused->ok());
}

TEST_F(Verify, RefusesToEraseWhatTheDiskCannot) {
    auto plan = whole;
    plan.erase.discard = true;
    EXPECT_EQ(run(plan).error().code, Code::not_supported);
    plan.erase = {.zeroes = true};
    EXPECT_EQ(run(plan).error().code, Code::not_supported);
    disk.change_geometry().discard = true;
    plan.erase = {.secure_discard = true};
    EXPECT_EQ(run(plan).error().code, Code::not_supported) << "a discard alone is not secure";
    EXPECT_EQ(disk.counters().submitted, 0u);
}

TEST_F(Verify, OutOfOrderAndLateIsFine) {
    disk.behaviour.newest_first = true;
    disk.behaviour.per_drain = 2;
    disk.behaviour.latency = 5'000;
    const auto r = run(whole);
    ASSERT_TRUE(r);
    EXPECT_TRUE(r->ok());
}

TEST_F(Verify, FindsWhatADiskCanDo) {
    const auto only = [&](Mismatch what, u64 lba) {
        std::memset(storage.data(), 0, storage.size());
        auto older = whole;
        older.generation = 6;
        const auto saved = disk.behaviour;
        disk.behaviour = {};
        ASSERT_TRUE(run(older));
        disk.behaviour = saved;
        const auto r = run(whole);
        ASSERT_TRUE(r);
        EXPECT_FALSE(r->ok());
        ASSERT_GE(r->bad, 1u);
        EXPECT_EQ(r->first_bad[0].lba, lba);
        EXPECT_EQ(r->first_bad[0].check.what, what) << name(r->first_bad[0].check.what);
        disk.behaviour = {};
    };
    disk.behaviour.drop_write_lba = 80;
    only(Mismatch::generation, 80); // the previous contents
    disk.behaviour.corrupt_read_lba = 80;
    only(Mismatch::crc, 80);
    disk.behaviour.no_data_read_lba = 80;
    only(Mismatch::magic, 80); // the poison
    disk.behaviour.misdirect_lba = 80;
    disk.behaviour.per_drain = 1;
    disk.behaviour.newest_first = false;
    only(Mismatch::generation, 80); // its neighbour was written afterwards and is intact
}

TEST_F(Verify, FailedTransfersAreNotOk) {
    disk.behaviour.fail_lba = 80;
    const auto r = run(whole);
    ASSERT_TRUE(r);
    EXPECT_FALSE(r->ok());
    EXPECT_EQ(r->bad, 0u);
    EXPECT_EQ(r->written, 255u);
    EXPECT_EQ(r->read, 255u);
    CapturedLog log;
    print_record(disk, *r);
    EXPECT_TRUE(
        log.has("@{\"record\":\"verify\",\"disk\":\"mem0\",\"bs\":4096,\"blocks\":256,\"first_lba\":0,"
                "\"generation\":7,\"seed\":3,"
                "\"written\":255,\"discarded\":0,\"zeroed\":0,\"read\":255,\"bad\":0,\"ok\":false,\"lanes\":1}\n"));
    EXPECT_TRUE(log.has("error: mem0: verify: the disk reports an error"));
}

TEST_F(Verify, AFlushThatFailsIsNotOk) {
    disk.behaviour.fail_flush = true;
    const auto r = run(whole);
    ASSERT_TRUE(r);
    EXPECT_EQ(disk.flushes, 1u);
    EXPECT_FALSE(r->ok()) << "what was written may not be on the disk";
    ASSERT_TRUE(r->first_error);
    EXPECT_EQ(r->first_error->code, Code::io);
    EXPECT_EQ(r->bad, 0u);
    EXPECT_EQ(r->written, 256u);
    EXPECT_EQ(r->read, 256u) << "the blocks are checked all the same";
}

TEST_F(Verify, NeverAnswering) {
    disk.behaviour.never_answers = true;
    const Instant begun = machine.time;
    const auto r = run(whole);
    ASSERT_TRUE(r);
    EXPECT_FALSE(r->ok());
    EXPECT_LT(machine.time - begun, 6_s);
    lost = 8;
}

TEST_F(Verify, BadBlocksAreNamed) {
    disk.behaviour.corrupt_read_lba = 80;
    const auto r = run(whole);
    ASSERT_TRUE(r);
    CapturedLog log;
    print_record(disk, *r);
    EXPECT_TRUE(log.has("error: mem0: block at LBA 80 (of 512 bytes): CRC-32C expected 0x")) << log.text.view();
    EXPECT_TRUE(log.has("\"bad\":1,\"ok\":false,\"lanes\":1}"));
}

TEST_F(Verify, ADiskSmallerThanOneBlockIsReportedInBytes) {
    Geometry tiny;
    tiny.sectors = 1;
    auto plan = whole;
    plan.bs = 4096;
    const auto blocks = blocks_of(tiny, plan);
    ASSERT_FALSE(blocks);
    EXPECT_NE(blocks.error().message.find("smaller than one block (bytes)"), std::string_view::npos);
    EXPECT_EQ(blocks.error().expected, 4096u);
    EXPECT_EQ(blocks.error().seen, 512u);
    plan.bs = 512;
    EXPECT_EQ(blocks_of(tiny, plan).value_or(0), 1u);
}

TEST_F(Verify, RefusesBeforeAnythingIsSubmitted) {
    const auto refused = [&](VerifyPlan plan, std::string_view why) {
        const auto r = run(plan);
        ASSERT_FALSE(r);
        EXPECT_EQ(r.error().code, Code::bad_argument);
        EXPECT_NE(r.error().message.find(why), std::string_view::npos) << r.error().message;
    };
    auto plan = whole;
    plan.scratch = false;
    refused(plan, "scratch=");
    plan = whole;
    plan.count = 257;
    refused(plan, "at most as many blocks of bs bytes as the disk has");
    EXPECT_EQ(run(plan).error().expected, 256u);
    EXPECT_EQ(run(plan).error().seen, 257u);
    plan = whole;
    plan.first_lba = 2048;
    refused(plan, "beyond the disk's last block");
    EXPECT_EQ(run(plan).error().expected, 2040u);
    plan.first_lba = 1;
    refused(plan, "first LBA");
    plan = whole;
    plan.bs = 1000;
    refused(plan, "bs must be");
    plan.bs = 0;
    refused(plan, "bs must be");
    plan = whole;
    plan.qd = 0;
    refused(plan, "qd must be");
    disk.change_geometry().read_only = true;
    refused(whole, "read-only");
    EXPECT_EQ(disk.counters().submitted, 0u);
    dma.left = 3;
    plan = whole;
    plan.write = false;
    const auto r = run(plan);
    ASSERT_FALSE(r);
    EXPECT_EQ(r.error().code, Code::exhausted);
}

} // namespace
