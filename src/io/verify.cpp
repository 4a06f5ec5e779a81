module;
#include <core/try.hpp>
module io.verify;
import core.std;
import core.result;
import core.crc32c;
import core.log;
import core.dma;
import core.processor;
import io.task;
import io.executor;
import io.run_on;
import io.block;
import io.random;

namespace fl::io {

namespace {

template <class T>
void put(std::span<std::byte> block, usize offset, T value) {
    std::memcpy(block.data() + offset, &value, sizeof(T));
}
template <class T>
T get(std::span<const std::byte> block, usize offset) {
    T value;
    std::memcpy(&value, block.data() + offset, sizeof(T));
    return value;
}

constexpr usize crc_offset = 32;

SplitMix64 payload_of(const Stamp& stamp) {
    return SplitMix64(mix64(mix64(mix64(stamp.seed) + stamp.lba) + stamp.generation));
}

u32 crc_of(std::span<const std::byte> block) {
    constexpr std::array<std::byte, 4> zero{};
    return crc32c(block.subspan(crc_offset + 4), crc32c(zero, crc32c(block.first(crc_offset))));
}

} // namespace

void write_stamp(std::span<std::byte> block, const Stamp& stamp) {
    put<u64>(block, 0, Stamp::magic);
    put<u64>(block, 8, stamp.lba);
    put<u64>(block, 16, stamp.generation);
    put<u64>(block, 24, stamp.seed);
    put<u32>(block, 36, static_cast<u32>(block.size()));
    SplitMix64 payload = payload_of(stamp);
    for (usize at = Stamp::header_bytes; at + 8 <= block.size(); at += 8) {
        put<u64>(block, at, payload.next());
    }
    put<u32>(block, crc_offset, crc_of(block));
}

BlockCheck check_stamp(std::span<const std::byte> block, const Stamp& stamp) {
    const auto differs = [&](u64 expected, u64 seen, Mismatch what, BlockCheck& into) {
        into = {what, expected, seen};
        return expected != seen;
    };
    BlockCheck check;
    if (differs(Stamp::magic, get<u64>(block, 0), Mismatch::magic, check) ||
        differs(stamp.lba, get<u64>(block, 8), Mismatch::lba, check) ||
        differs(stamp.generation, get<u64>(block, 16), Mismatch::generation, check) ||
        differs(stamp.seed, get<u64>(block, 24), Mismatch::seed, check) ||
        differs(block.size(), get<u32>(block, 36), Mismatch::size, check) ||
        differs(crc_of(block), get<u32>(block, crc_offset), Mismatch::crc, check)) {
        return check;
    }
    SplitMix64 payload = payload_of(stamp);
    for (usize at = Stamp::header_bytes; at + 8 <= block.size(); at += 8) {
        if (differs(payload.next(), get<u64>(block, at), Mismatch::payload, check)) {
            return check;
        }
    }
    return {};
}

BlockCheck check_zeros(std::span<const std::byte> block) {
    for (usize at = 0; at + 8 <= block.size(); at += 8) {
        if (const u64 seen = get<u64>(block, at); seen != 0) {
            return {Mismatch::zeroes, 0, seen};
        }
    }
    return {};
}

namespace {

struct Run {
    BlockDevice& disk;
    VerifyReport& report;
    u64 next = 0; // next block
    bool stopped = false;

    bool take(u64& block) {
        if (stopped || next == report.blocks) {
            return false;
        }
        block = next++;
        return true;
    }
    u64 lba(u64 block) const { return report.plan.first_lba + block * (report.plan.bs / 512); }
    Stamp stamp(u64 block) const { return {lba(block), report.plan.generation, report.plan.seed}; }
    Op operation(u64 block) const { return operation_on(lba(block) / (report.plan.bs / 512), report.plan.erase); }
    u64 sector(u64 block) const { return lba(block) / (disk.geometry().sector_size / 512); }
    void failed(Status status) {
        if (!report.first_error) {
            report.first_error = to_error(status);
        }
        // continue after a bad sector; any other error would affect all following blocks
        stopped = stopped || status != Status::io_error;
    }
    void check(std::span<const std::byte> data, u64 block) {
        ++report.read;
        const Op op = operation(block);
        const BlockCheck result = op == Op::write          ? check_stamp(data, stamp(block))
                                  : op == Op::write_zeroes ? check_zeros(data)
                                                           : BlockCheck{};
        if (result.what != Mismatch::none) {
            if (report.bad < report.first_bad.size()) {
                report.first_bad[report.bad] = {lba(block), result};
            }
            ++report.bad;
        }
    }
};

// Ensures that a read that transfers nothing does not find the data of an earlier transfer.
void poison(std::span<std::byte> block) {
    for (usize at = 0; at < block.size(); at += 512) {
        put<u64>(block, at, 0xdead'dead'dead'dead);
    }
}

Task<Result<void>> slot(Run& run, Op op, DmaBuffer owned) {
    const DmaSpan buffer = owned.span().subspan(0, run.report.plan.bs);
    u64 block = 0;
    while (run.take(block)) {
        if (op == Op::write) {
            write_stamp(buffer.bytes(), run.stamp(block));
        } else {
            poison(buffer.bytes());
        }
        BlockDevice::Transfer transfer(run.disk, op, run.sector(block), buffer);
        static_cast<void>(co_await transfer); // the result is in its status
        if (transfer.status != Status::ok) {
            run.failed(transfer.status);
        } else if (op == Op::write) {
            ++run.report.written;
        } else {
            run.check(buffer.bytes(), block);
        }
        if (transfer.buffer_lost) {
            owned.abandon();
            break;
        }
    }
    co_return Result<void>{};
}

Task<Result<void>> erase_slot(Run& run) {
    const u32 bytes = run.report.plan.bs;
    u64 block = 0;
    while (run.take(block)) {
        const Op op = run.operation(block);
        if (op == Op::write) {
            continue;
        }
        ++run.report.to_erase;
        BlockDevice::Transfer transfer(run.disk, op, run.sector(block), {nullptr, 0, bytes});
        static_cast<void>(co_await transfer); // the result is in its status
        if (transfer.status != Status::ok) {
            run.failed(transfer.status);
        } else {
            ++(op == Op::discard        ? run.report.discarded
               : op == Op::write_zeroes ? run.report.zeroed
                                        : run.report.secured);
        }
    }
    co_return Result<void>{};
}

// Discards and zeroes the blocks that the plan says.
Task<Result<void>> erase(Run& run) {
    run.next = 0;
    TaskGroup group(run.disk.executor());
    Result<void> spawned;
    for (u32 i = 0; i < run.report.plan.qd && spawned; ++i) {
        spawned = group.spawn(erase_slot(run));
    }
    run.stopped = run.stopped || !spawned;
    static_cast<void>(co_await group.join());
    co_return spawned;
}

// Processes all blocks once, in one direction.
Task<Result<void>> pass(Run& run, Op op, DmaAllocator& dma) {
    run.next = 0;
    TaskGroup group(run.disk.executor());
    Result<void> spawned;
    for (u32 i = 0; i < run.report.plan.qd && spawned; ++i) {
        auto buffer = dma.buffer(run.report.plan.bs);
        spawned = buffer ? group.spawn(slot(run, op, *std::move(buffer))) : Result<void>(buffer.error());
    }
    run.stopped = run.stopped || !spawned;
    static_cast<void>(co_await group.join());
    co_return spawned;
}

} // namespace

Result<u64> blocks_of(const Geometry& g, const VerifyPlan& plan) {
    if (plan.bs == 0 || plan.bs % g.sector_size != 0 || plan.bs > 1_MiB) {
        return Error{Code::bad_argument, "verify: bs must be a multiple of the disk's sector size, at most 1m",
                     g.sector_size, plan.bs};
    }
    if (plan.qd == 0 || plan.qd > 256) {
        return Error{Code::bad_argument, "verify: qd must be 1 to 256", 256, plan.qd};
    }
    const u64 units = plan.bs / 512;
    if (plan.first_lba % units != 0) {
        return Error{Code::bad_argument, "verify: the first LBA must be a multiple of the block", units,
                     plan.first_lba};
    }
    const u64 on_disk = g.sectors / (plan.bs / g.sector_size);
    const u64 skipped = plan.first_lba / units;
    if (on_disk == 0) {
        return Error{Code::bad_argument,
                     "verify: the disk is smaller than one block (bytes); choose a smaller bs=", plan.bs,
                     g.sectors * g.sector_size};
    }
    if (skipped >= on_disk) {
        return Error{Code::bad_argument, "verify: the first LBA lies beyond the disk's last block (units of 512 bytes)",
                     (on_disk - 1) * units, plan.first_lba};
    }
    if (plan.count > on_disk - skipped) {
        return Error{Code::bad_argument, "verify: count, at most as many blocks of bs bytes as the disk has",
                     on_disk - skipped, plan.count};
    }
    if (plan.write && !plan.scratch) {
        return Error{Code::bad_argument, "verify overwrites the disk: name it in scratch="};
    }
    if (plan.write && g.read_only) {
        return Error{Code::bad_argument, "verify would have to write, and the disk is read-only"};
    }
    if (plan.write && plan.erase.discard && !g.discard) {
        return Error{Code::not_supported, "verify: erase=discard, and the disk does not offer discard"};
    }
    if (plan.write && plan.erase.zeroes && !g.write_zeroes) {
        return Error{Code::not_supported, "verify: erase=zeroes, and the disk does not offer write zeroes"};
    }
    if (plan.write && plan.erase.secure_discard && !g.secure_discard) {
        return Error{Code::not_supported, "verify: erase=secure-discard, and the disk does not offer secure discard"};
    }
    return plan.count != 0 ? plan.count : on_disk - skipped;
}

namespace {

// Processes the blocks of one report through one lane.
Task<Result<void>> region(BlockDevice& lane, VerifyReport& report, DmaAllocator& dma) {
    Run run{lane, report};
    if (report.plan.write) {
        CO_CHECK(co_await pass(run, Op::write, dma));
        if (report.plan.erase.any()) {
            CO_CHECK(co_await erase(run));
        }
        if (!run.stopped) {
            BlockDevice::Transfer flush(lane, Op::flush, 0, {});
            static_cast<void>(co_await flush);
            if (flush.status != Status::ok) {
                run.failed(flush.status);
            } else { // from here on a host that ends suddenly must not lose them
                log::info("{}: {} blocks written and flushed", lane.identity().name.view(), report.written);
            }
        }
    }
    co_return co_await pass(run, Op::read, dma);
}

Task<Result<void>> verify_remote_region(BlockDevice& lane, VerifyReport& report, DmaAllocator& dma) {
    co_return co_await run_on(lane.executor(), region(lane, report, dma));
}

void add(VerifyReport& whole, const VerifyReport& part) {
    for (const BadBlock& bad : part.bad_blocks()) {
        if (whole.bad < whole.first_bad.size()) {
            whole.first_bad[whole.bad] = bad;
        }
        ++whole.bad;
    }
    whole.bad += part.bad - part.bad_blocks().size();
    whole.written += part.written;
    whole.discarded += part.discarded;
    whole.zeroed += part.zeroed;
    whole.secured += part.secured;
    whole.to_erase += part.to_erase;
    whole.read += part.read;
    if (!whole.first_error) {
        whole.first_error = part.first_error;
    }
}

} // namespace

Task<Result<VerifyReport>> verify(BlockDevice& disk, VerifyPlan plan, DmaAllocator& dma) {
    VerifyReport report;
    report.plan = plan;
    CO_TRY(report.blocks, blocks_of(disk.geometry(), plan));
    report.lanes = static_cast<u32>(std::min<u64>({disk.lanes(), report.blocks, max_processors}));
    if (report.lanes == 1) {
        CO_CHECK(co_await region(disk, report, dma));
        co_return report;
    }
    // Each processor writes to its own report; they are merged when all have ended.
    struct Parts {
        std::array<VerifyReport, max_processors> list;
    };
    const std::unique_ptr<Parts> parts(new (std::nothrow) Parts);
    if (!parts) {
        co_return Error{Code::exhausted, "no memory for the reports of the lanes: give the machine more"};
    }
    TaskGroup group(disk.executor());
    Result<void> spawned;
    u64 begin = 0;
    for (u32 i = 0; i < report.lanes && spawned; ++i) {
        VerifyReport& part = parts->list[i];
        part.plan = plan;
        part.plan.first_lba = plan.first_lba + begin * (plan.bs / 512);
        part.blocks = report.blocks / report.lanes + (i < report.blocks % report.lanes ? 1 : 0);
        begin += part.blocks;
        spawned = group.spawn(verify_remote_region(disk.lane(i), part, dma));
    }
    const Result<void> done = co_await group.join();
    if (!spawned || !done) {
        co_return spawned ? done.error() : spawned.error();
    }
    for (u32 i = 0; i < report.lanes; ++i) {
        add(report, parts->list[i]);
    }
    co_return report;
}

void print_record(const BlockDevice& disk, const VerifyReport& report) {
    for (const BadBlock& bad : report.bad_blocks()) {
        log::error("{}: block at LBA {} (of 512 bytes): {} expected {:#x}, seen {:#x}", disk.identity().name.view(),
                   bad.lba, bad.check.what, bad.check.expected, bad.check.seen);
    }
    if (report.first_error) {
        log::error("{}: verify: {}", disk.identity().name.view(), *report.first_error);
    }
    log::Record record("verify");
    record.text("disk", disk.identity().name)
        .number("bs", report.plan.bs)
        .number("blocks", report.blocks)
        .number("first_lba", report.plan.first_lba);
    record.number("generation", report.plan.generation)
        .number("seed", report.plan.seed)
        .number("written", report.written)
        .number("discarded", report.discarded)
        .number("zeroed", report.zeroed)
        .number("read", report.read);
    record.number("bad", report.bad).flag("ok", report.ok()).number("lanes", report.lanes);
    if (report.plan.erase.secure_discard) {
        record.number("secure_discarded", report.secured);
    }
}

} // namespace fl::io
