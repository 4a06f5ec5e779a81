#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;
import core.time;
import core.dma;
import core.processor;
import io.task;
import io.executor;
import io.block;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io;
using namespace fl::test;

struct Block : testing::Test {
    FakeMachine machine;
    Executor executor{machine.platform()};
    std::vector<std::byte> storage = std::vector<std::byte>(64 * 512);
    MemoryDisk disk{executor, storage.data(), storage.size()};
    HeapDma dma;
    DmaBuffer buffer = *dma.buffer(4096);
    usize before = frame_pool().in_use();
    ~Block() override { EXPECT_EQ(frame_pool().in_use(), before); }

    Status run(Op op, u64 lba, DmaSpan span) {
        BlockDevice::Transfer transfer(disk, op, lba, span);
        disk.submit(transfer); // no waiter: the owner checks it
        for (int i = 0; i < 1000 && transfer.pending(); ++i) {
            machine.time += 1_ms;
            executor.turn();
        }
        EXPECT_FALSE(transfer.pending());
        return transfer.status;
    }
};

TEST_F(Block, RefusesWhatCannotBe) {
    EXPECT_EQ(run(Op::read, 0, {}), Status::misaligned) << "empty";
    EXPECT_EQ(run(Op::read, 0, buffer.span().subspan(0, 511)), Status::misaligned);
    EXPECT_EQ(run(Op::read, 0, buffer.span().subspan(1, 512)), Status::misaligned);
    EXPECT_EQ(run(Op::read, 64, buffer.span().subspan(0, 512)), Status::out_of_range);
    EXPECT_EQ(run(Op::read, 57, buffer), Status::out_of_range) << "the last sector is one too far";
    EXPECT_EQ(run(Op::read, ~u64{0}, buffer), Status::out_of_range);
    EXPECT_EQ(run(Op::read, ~u64{0} - 6, buffer), Status::out_of_range) << "the sum would wrap";
    EXPECT_EQ(run(Op::read, 56, buffer), Status::ok);
    EXPECT_EQ(run(Op::discard, 0, buffer), Status::not_supported);
    EXPECT_EQ(run(Op::secure_discard, 0, buffer), Status::not_supported);
    disk.change_geometry().read_only = true;
    EXPECT_EQ(run(Op::write, 0, buffer), Status::read_only);
    EXPECT_EQ(run(Op::read, 0, buffer), Status::ok);
    EXPECT_EQ(disk.counters().submitted, 12u);
    EXPECT_EQ(disk.counters().completed, 12u);
    EXPECT_EQ(disk.counters().errors, 10u);
}

TEST_F(Block, ALaneBelongsToItsProcessor) {
    EXPECT_DEATH(
        {
            panic_prints();
            set_this_processor(1);
            BlockDevice::Transfer transfer(disk, Op::read, 0, buffer);
            disk.submit(transfer);
        },
        "mem0: submitted on processor 1; this lane belongs to processor 0");
}

// A host that never completed a request may still write: the owner frees the buffer, but it is not reused.
TEST_F(Block, MemoryThatAHostMayStillAccessIsNotFreed) {
    disk.behaviour.never_answers = true;
    disk.set_timeout(50_ms);
    const u32 outstanding = dma.outstanding;
    {
        const DmaBuffer lost = *dma.buffer(4096);
        EXPECT_EQ(run(Op::read, 0, lost), Status::timed_out);
    }
    EXPECT_EQ(dma.outstanding, outstanding + 1) << "the owner did not look at buffer_lost";
    {
        const DmaBuffer lost = *dma.buffer(8192);
        Request dying(disk, Op::read, 0, lost.span().subspan(4096, 4096));
        disk.submit(dying);
        executor.turn();
    }
    EXPECT_EQ(dma.outstanding, outstanding + 2)
        << "the request died with its owner, and only a part of the buffer was in use";
    disk.behaviour.never_answers = false;
    {
        const DmaBuffer good = *dma.buffer(4096);
        EXPECT_EQ(run(Op::read, 0, good), Status::ok);
    }
    EXPECT_EQ(dma.outstanding, outstanding + 2);
}

// However many buffers are in use by hosts: quarantined memory is kept, and everything else is freed.
TEST(Dma, QuarantineKeepsWhatItHoldsAndNothingElse) {
    HeapDma dma;
    int holders[2] = {};
    {
        std::vector<DmaBuffer> held;
        for (u64 n = 0; n < 1000; ++n) {
            held.push_back(*dma.buffer(8192));
            quarantine(held.back().span().subspan(4096, 512), &holders[n % 2], n);
        }
        const DmaBuffer other = *dma.buffer(4096);
        EXPECT_TRUE(is_quarantined(held[999]));
        EXPECT_FALSE(is_quarantined(held[999].span().subspan(0, 4096)));
        EXPECT_FALSE(is_quarantined(other));
        EXPECT_EQ(quarantine_state().spans, 1000u);
        EXPECT_EQ(quarantine_state().buffers, 0u) << "their owners have them still";
    }
    EXPECT_EQ(dma.outstanding, 1000u) << "the other one is given back";
    EXPECT_EQ(quarantine_state().buffers, 1000u);
    release_quarantine(&holders[1], 7);
    EXPECT_EQ(dma.outstanding, 999u) << "the device has answered";
    release_quarantine(&holders[0], 7);
    EXPECT_EQ(dma.outstanding, 999u) << "another queue's command of that number";
    release_quarantine(&holders[0]);
    EXPECT_EQ(dma.outstanding, 499u) << "the queue's device has released everything";
    release_quarantine(&holders[1]);
    EXPECT_EQ(dma.outstanding, 0u);
    EXPECT_EQ(quarantine_state().spans, 0u);
    EXPECT_EQ(quarantine_state().buffers, 0u);
    EXPECT_FALSE(quarantine_state().frozen);
}

// Two commands use one buffer: it is released with the second one.
TEST(Dma, QuarantineOfTwoPartsOfOneBuffer) {
    HeapDma dma;
    int holder = 0;
    {
        const DmaBuffer buffer = *dma.buffer(8192);
        quarantine(buffer.span().subspan(0, 4096), &holder, 1);
        quarantine(buffer.span().subspan(4096, 4096), &holder, 2);
        quarantine({}, &holder, 3);
        release_quarantine(&holder, 1);
        EXPECT_TRUE(is_quarantined(buffer));
    }
    EXPECT_EQ(dma.outstanding, 1u);
    release_quarantine(&holder, 2);
    EXPECT_EQ(dma.outstanding, 0u);
}

TEST_F(Block, SectorsOf4096) {
    MemoryDisk big(executor, storage.data(), storage.size(), 4096);
    BlockDevice::Transfer small(big, Op::read, 0, buffer.span().subspan(0, 512));
    big.submit(small);
    EXPECT_EQ(small.status, Status::misaligned);
    BlockDevice::Transfer beyond(big, Op::read, 8, buffer);
    big.submit(beyond);
    EXPECT_EQ(beyond.status, Status::out_of_range);
}

TEST_F(Block, FlushWithoutACacheIsDoneAtOnce) {
    disk.change_geometry().flush = false;
    EXPECT_EQ(run(Op::flush, 0, {}), Status::ok);
    EXPECT_EQ(disk.flushes, 0u);
    disk.change_geometry().flush = true;
    EXPECT_EQ(run(Op::flush, 0, {}), Status::ok);
    EXPECT_EQ(disk.flushes, 1u);
}

Task<Result<void>> copy_block(BlockDevice& disk, DmaSpan buffer) {
    std::memset(buffer.data, 0x5a, buffer.size);
    if (auto written = co_await disk.write(8, buffer); !written) {
        co_return written;
    }
    if (auto flushed = co_await disk.flush(); !flushed) {
        co_return flushed;
    }
    std::memset(buffer.data, 0, buffer.size);
    co_return co_await disk.read(8, buffer);
}

TEST_F(Block, CoroutinesReadWhatTheyWrote) {
    EXPECT_TRUE(executor.run(copy_block(disk, buffer)));
    EXPECT_EQ(buffer.data()[4095], std::byte{0x5a});
    EXPECT_EQ(storage[8 * 512], std::byte{0x5a});
    disk.behaviour.fail_lba = 8;
    const auto failed = executor.run(copy_block(disk, buffer));
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().code, Code::io);
}

TEST_F(Block, TimesOutWithinItsBound) {
    disk.behaviour.never_answers = true;
    disk.set_timeout(100_ms);
    const Instant begun = machine.time;
    const auto result = executor.run(copy_block(disk, buffer));
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::timed_out);
    EXPECT_GE(machine.time - begun, 100_ms);
    EXPECT_LT(machine.time - begun, 100_ms + 2 * Executor::tick_length);
}

TEST_F(Block, CancelEndsIt) {
    disk.behaviour.never_answers = true;
    BlockDevice::Transfer transfer(disk, Op::read, 0, buffer);
    disk.submit(transfer);
    EXPECT_TRUE(disk.cancel(transfer));
    EXPECT_EQ(transfer.status, Status::cancelled);
    EXPECT_FALSE(disk.cancel(transfer));
}

TEST_F(Block, AReadOnlyDiskDiscardsAndZeroesNothing) {
    disk.change_geometry().discard = true;
    EXPECT_EQ(run(Op::secure_discard, 0, {nullptr, 0, 4096}), Status::not_supported) << "it is more than a discard";
    disk.change_geometry().write_zeroes = true;
    disk.change_geometry().secure_discard = true;
    const DmaSpan range{nullptr, 0, 4096};
    EXPECT_EQ(run(Op::discard, 0, range), Status::ok);
    EXPECT_EQ(run(Op::write_zeroes, 0, range), Status::ok);
    EXPECT_EQ(run(Op::secure_discard, 0, range), Status::ok);
    disk.change_geometry().read_only = true;
    EXPECT_EQ(run(Op::discard, 0, range), Status::read_only);
    EXPECT_EQ(run(Op::write_zeroes, 0, range), Status::read_only);
    EXPECT_EQ(run(Op::secure_discard, 0, range), Status::read_only);
}

TEST_F(Block, ARangeWithoutDataIsWholeSectorsOfTheDisk) {
    disk.change_geometry().discard = true;
    disk.change_geometry().write_zeroes = true;
    disk.change_geometry().secure_discard = true;
    for (const Op op : {Op::discard, Op::write_zeroes, Op::secure_discard}) {
        EXPECT_EQ(run(op, 0, {nullptr, 0, 0}), Status::misaligned);
        EXPECT_EQ(run(op, 0, {nullptr, 0, 100}), Status::misaligned);
        EXPECT_EQ(run(op, disk.geometry().sectors, {nullptr, 0, 512}), Status::out_of_range);
    }
    disk.change_geometry().write_zeroes = false;
    EXPECT_EQ(run(Op::write_zeroes, 0, {nullptr, 0, 512}), Status::not_supported);
}

TEST_F(Block, TaskDiesWhileItsRequestIsUnderWay) {
    disk.behaviour.never_answers = true;
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn(copy_block(disk, buffer)));
        executor.turn();
        EXPECT_EQ(disk.counters().submitted, 1u);
    }
    EXPECT_EQ(disk.forgotten, 1u);
    disk.behaviour.never_answers = false;
    executor.turn();
    EXPECT_EQ(disk.counters().completed, 1u) << "ended, in whatever way";
    EXPECT_EQ(disk.counters().errors, 1u) << "it was not done";
    EXPECT_EQ(disk.in_flight(), 0u);
}

TEST_F(Block, TaskDestroyedBetweenCompletionAndResumption) {
    {
        TaskGroup group(executor);
        ASSERT_TRUE(group.spawn(copy_block(disk, buffer)));
        executor.turn(); // submitted, and completed by drain(): the request is in the ready list
        EXPECT_EQ(disk.counters().completed, 1u);
    }
    executor.turn(); // would resume a destroyed frame
    EXPECT_EQ(disk.forgotten, 0u);
}

TEST_F(Block, QueueKeepsItsOrder) {
    RequestQueue queue;
    std::vector<std::optional<BlockDevice::Transfer>> requests(4);
    for (u64 i = 0; i < 4; ++i) {
        requests[i].emplace(disk, Op::read, i, buffer.span());
        queue.push(*requests[i]);
    }
    EXPECT_TRUE(queue.remove(*requests[3]));
    EXPECT_TRUE(queue.remove(*requests[1]));
    EXPECT_FALSE(queue.remove(*requests[1]));
    queue.push(*requests[3]);
    EXPECT_EQ(queue.size(), 3u);
    EXPECT_EQ(queue.pop(), &*requests[0]);
    EXPECT_EQ(queue.pop(), &*requests[2]);
    EXPECT_EQ(queue.pop(), &*requests[3]);
    EXPECT_EQ(queue.pop(), nullptr);
}

TEST(BlockStatus, EveryEndHasItsError) {
    for (const Status s :
         {Status::io_error, Status::not_supported, Status::timed_out, Status::cancelled, Status::device_gone,
          Status::protocol_error, Status::misaligned, Status::out_of_range, Status::read_only, Status::not_written}) {
        EXPECT_FALSE(to_error(s).message.empty());
    }
    EXPECT_EQ(to_error(Status::not_written).code, Code::protocol) << "a status that was not written is not a success";
}

} // namespace
