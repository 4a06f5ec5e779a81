// Finding and describing SCSI units, without a transport: units that reject commands, report wrong data, and change
// between two commands.
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
import drivers.scsi.unit;

#include "unit/io/support.hpp"
// depends on the includes above
#include "unit/drivers/scsi_fake.hpp"

namespace {
using namespace fl;
namespace scsi = drivers::scsi;
using fake::Answer;
using fake::check;
using scsi::Cdb;
using scsi::ServiceResponse;

constexpr scsi::TransportLimits transport{.max_transfer = 128 * 1024};
constexpr u8 test_unit_ready = 0x00, inquiry = 0x12, mode_sense = 0x1a, capacity_10 = 0x25, capacity_16 = 0x9e,
             report_luns = 0xa0;
constexpr u8 unit_attention = 6;

/// Nothing: it did not fail.
template <class T>
std::optional<Code> failure(const Result<T>& result) {
    return result ? std::nullopt : std::optional(result.error().code);
}

struct ScsiUnit : testing::Test {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::CapturedLog log;
    fake::Target target{executor};
    fake::Unit& unit = target.units[3];

    ScsiUnit() { EXPECT_EQ(&unit, &target.units.at(3)); }
    template <class T>
    T run(io::Task<T> task) {
        return executor.run(std::move(task));
    }
    Result<scsi::UnitDescription> describe(scsi::TransportLimits limits = transport) {
        auto found = run(scsi::inquire(target, 3));
        if (!found) {
            return found.error();
        }
        if (!*found) {
            return Error{Code::not_found, "no unit"};
        }
        return run(scsi::describe(target, 3, **found, limits));
    }
    Result<scsi::Change> compare(const scsi::UnitDescription& known, scsi::TransportLimits limits = transport) {
        const auto found = run(scsi::inquire(target, 3));
        const auto now = run(scsi::read_state(target, 3));
        return now ? Result(scsi::compare(**found, *now, known.geometry, known.model, limits)) : now.error();
    }
    /// One command, with the module's retries.
    Result<scsi::Response> execute(const Cdb& cdb) {
        scsi::Response response;
        const auto done = run(scsi::execute_retrying(target, 3, cdb, 0, response));
        return done ? Result(response) : done.error();
    }
    /// The reply to INQUIRY for one vital product data page, or (without one) for the standard data.
    void on_inquiry(std::optional<u8> page, Answer answer) {
        target.answer_override = [=](u16, const Cdb& cdb) -> std::optional<Answer> {
            const bool vital = (cdb.bytes[1] & 1) != 0;
            if (cdb.bytes[0] == inquiry && vital == page.has_value() && (!vital || cdb.bytes[2] == *page)) {
                return answer;
            }
            return std::nullopt;
        };
    }
    void on(u8 opcode, Answer answer) {
        target.answer_override = [=](u16, const Cdb& cdb) -> std::optional<Answer> {
            return cdb.bytes[0] == opcode ? std::optional(answer) : std::nullopt;
        };
    }
};

// ---- conforming units ----

TEST_F(ScsiUnit, AnHonestDisk) {
    unit.physical_exponent = 3;
    unit.max_transfer_blocks = 64;
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->model.view(), "Msft Virtual Disk 1.0");
    EXPECT_EQ(found->geometry.sectors, 2048u);
    EXPECT_EQ(found->geometry.sector_size, 512u);
    EXPECT_EQ(found->geometry.physical_sector_size, 4096u);
    EXPECT_TRUE(found->geometry.flush);
    EXPECT_TRUE(found->geometry.discard);
    EXPECT_FALSE(found->geometry.read_only);
    EXPECT_EQ(found->limits.max_transfer, 32768u);
    EXPECT_EQ(found->limits.max_unmap_blocks, 0x1000u);
    EXPECT_FALSE(found->limits.short_commands);
    EXPECT_EQ(target.asked,
              (std::vector<u8>{inquiry, test_unit_ready, capacity_16, mode_sense, inquiry, inquiry, inquiry}));
    EXPECT_EQ(log.text.view(), "");
}

TEST_F(ScsiUnit, BlocksOf4096BytesAndMoreThanTwoTebibytes) {
    unit.block_bytes = 4096;
    unit.blocks = (u64{1} << 32) + 5;
    unit.max_transfer_blocks = 16;
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->geometry.sectors, (u64{1} << 32) + 5);
    EXPECT_EQ(found->geometry.sector_size, 4096u);
    EXPECT_EQ(found->geometry.physical_sector_size, 4096u);
    EXPECT_EQ(found->limits.max_transfer, 65536u);
    unit.physical_exponent = 15; // 128 MiB: a hint, which is limited
    EXPECT_EQ(describe()->geometry.physical_sector_size, 65536u);
}

TEST_F(ScsiUnit, ReadOnlyIsNeverDiscarded) {
    unit.write_protected = true;
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_TRUE(found->geometry.read_only);
    EXPECT_FALSE(found->geometry.discard);
}

TEST_F(ScsiUnit, WithoutFlushesWritesHaveForceUnitAccess) {
    const scsi::TransportLimits no_flush{.max_transfer = 4096, .flush = false, .write_zeroes = true};
    unit.write_same = true;
    EXPECT_TRUE(describe(no_flush)->unflushed_cache);
    EXPECT_FALSE(describe(no_flush)->limits.write_through) << "the unit does not support it";
    EXPECT_TRUE(describe(no_flush)->geometry.write_zeroes);
    unit.dpofua = true;
    EXPECT_FALSE(describe(no_flush)->unflushed_cache);
    EXPECT_TRUE(describe(no_flush)->limits.write_through);
    EXPECT_FALSE(describe(no_flush)->geometry.write_zeroes) << "WRITE SAME has no FUA";
    EXPECT_FALSE(describe()->limits.write_through) << "flushes are used";
}

TEST_F(ScsiUnit, Caches) {
    unit.write_cache = false;
    EXPECT_FALSE(describe()->geometry.flush);
    unit.write_cache = std::nullopt;
    EXPECT_TRUE(describe()->geometry.flush) << "it does not say: there is one";
    unit.mode_sense = false;
    EXPECT_TRUE(describe()->geometry.flush);
    EXPECT_FALSE(describe()->geometry.read_only);
    EXPECT_FALSE(describe({.max_transfer = 4096, .flush = false})->geometry.flush);
    on(mode_sense, {.data = {0x17, 0, 0x80}}); // a truncated header
    EXPECT_TRUE(describe()->geometry.flush);
    EXPECT_FALSE(describe()->geometry.read_only);
}

TEST_F(ScsiUnit, Unmapping) {
    EXPECT_TRUE(describe()->geometry.discard);
    unit.unmaps = false;
    EXPECT_FALSE(describe()->geometry.discard);
    unit.unmaps = true;
    unit.max_unmap_descriptors = 0;
    EXPECT_FALSE(describe()->geometry.discard);
    unit.max_unmap_descriptors = 1;
    unit.max_unmap_blocks = 0;
    EXPECT_FALSE(describe()->geometry.discard);
    unit.max_unmap_blocks = 8;
    unit.thin = false;
    EXPECT_TRUE(describe()->geometry.discard) << "it has limits for it";
    EXPECT_EQ(describe()->limits.max_unmap_blocks, 8u);
}

TEST_F(ScsiUnit, WriteSame) {
    constexpr scsi::TransportLimits can{.max_transfer = 128 * 1024, .write_zeroes = true};
    EXPECT_FALSE(describe(can)->geometry.write_zeroes) << "neither page says so";
    unit.max_write_same_blocks = 100;
    EXPECT_TRUE(describe(can)->geometry.write_zeroes);
    EXPECT_EQ(describe(can)->limits.max_zero_blocks, 100u);
    EXPECT_FALSE(describe()->geometry.write_zeroes) << "the transport has no zeros";
    unit.max_write_same_blocks = 0;
    unit.write_same = true;
    unit.thin = false;
    unit.max_unmap_blocks = 0; // the page is read for WRITE SAME alone
    auto found = describe(can);
    EXPECT_TRUE(found->geometry.write_zeroes);
    EXPECT_FALSE(found->geometry.discard);
    EXPECT_EQ(found->limits.max_zero_blocks, 131072u) << "64 MiB: it must end within a time-out";
    unit.block_bytes = 4096;
    EXPECT_EQ(describe(can)->limits.max_zero_blocks, 16384u);
    for (const u64 most : {u64{16385}, u64{1} << 32, (u64{1} << 32) + 1, ~u64{0}}) {
        unit.max_write_same_blocks = most;
        EXPECT_EQ(describe(can)->limits.max_zero_blocks, 16384u) << most;
    }
    unit.max_write_same_blocks = 16383;
    EXPECT_EQ(describe(can)->limits.max_zero_blocks, 16383u);
    unit.write_protected = true;
    EXPECT_FALSE(describe(can)->geometry.write_zeroes);
    unit.write_protected = false;
    unit.pages = {0x00, 0xb2};
    EXPECT_TRUE(describe(can)->geometry.write_zeroes) << "no limits, and LBPWS";
    unit.pages.clear();
    EXPECT_FALSE(describe(can)->geometry.write_zeroes);
}

TEST_F(ScsiUnit, Identification) {
    const auto identification = [&] { return *run(scsi::read_identification(target, 3)); };
    EXPECT_EQ(identification(), std::nullopt);
    unit.pages = {0x00, 0x83, 0xb0, 0xb2};
    unit.designator = "Msft    0001";
    const auto first = identification();
    ASSERT_TRUE(first);
    EXPECT_EQ(describe()->identification, first);
    EXPECT_EQ(identification(), first);
    unit.blocks = 4096;
    EXPECT_EQ(identification(), first);
    unit.designator = "Msft    0002";
    EXPECT_NE(identification(), first);
    EXPECT_EQ(describe()->identification, identification());
    on_inquiry(0x83, check(5, 0x24));
    EXPECT_EQ(identification(), std::nullopt);
    on_inquiry(0x83, {.data = {0, 0x83, 0, 0}});
    EXPECT_EQ(identification(), std::nullopt);
    target.dead = true;
    EXPECT_EQ(failure(run(scsi::read_identification(target, 3))), Code::timed_out);
}

// ---- units that are not disks ----

TEST_F(ScsiUnit, Inquiry) {
    auto found = run(scsi::inquire(target, 3));
    ASSERT_TRUE(found && *found);
    EXPECT_TRUE((*found)->disk());
    unit.peripheral = 0x05; // CD drive
    found = run(scsi::inquire(target, 3));
    ASSERT_TRUE(found && *found);
    EXPECT_FALSE((*found)->disk());
    unit.peripheral = 0x20; // a disk type, but not connected
    EXPECT_FALSE((*run(scsi::inquire(target, 3)))->disk());
    found = run(scsi::inquire(target, 4));
    ASSERT_TRUE(found);
    EXPECT_FALSE(*found) << "LOGICAL UNIT NOT SUPPORTED";
    on(inquiry, {.service = ServiceResponse::no_unit});
    found = run(scsi::inquire(target, 3));
    ASSERT_TRUE(found);
    EXPECT_FALSE(*found);
    on(inquiry, check(4, 0x44));
    EXPECT_EQ(failure(run(scsi::inquire(target, 3))), Code::io) << "says nothing about whether it is there";
    on(inquiry, {.data = {0, 0, 5, 2}});
    EXPECT_EQ(failure(run(scsi::inquire(target, 3))), Code::protocol);
    target.dead = true;
    EXPECT_EQ(failure(run(scsi::inquire(target, 3))), Code::timed_out);
}

// Of all 256 peripheral qualifiers and types, exactly one is a disk.
TEST_F(ScsiUnit, EveryPeripheral) {
    for (u32 peripheral = 0; peripheral < 256; ++peripheral) {
        unit.peripheral = static_cast<u8>(peripheral);
        const auto found = run(scsi::inquire(target, 3));
        ASSERT_TRUE(found && *found);
        EXPECT_EQ((*found)->qualifier, peripheral / 32);
        EXPECT_EQ((*found)->device_type, peripheral % 32);
        EXPECT_EQ((*found)->disk(), peripheral == 0);
        EXPECT_EQ((*found)->vendor.view(), "Msft");
    }
}

TEST_F(ScsiUnit, EmptyAndNotReady) {
    EXPECT_TRUE(describe()->medium);
    unit.empty = true;
    EXPECT_FALSE(describe()->medium);
    EXPECT_EQ(target.asked.back(), test_unit_ready) << "no other command is sent to it";
    EXPECT_FALSE(run(scsi::read_state(target, 3))->medium);
    EXPECT_EQ(log.text.view(), "");
    unit.empty = false;
    unit.zero_bytes = true; // is ready all the same
    EXPECT_FALSE(describe()->medium);
    EXPECT_FALSE(run(scsi::read_state(target, 3))->medium);
    EXPECT_EQ(log.text.view(), "");
    unit.zero_bytes = false;
    on(test_unit_ready, check(2, 0x04, 0x03));
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_TRUE(found->medium);
    EXPECT_EQ(found->geometry.sectors, 2048u);
    EXPECT_TRUE(log.has("fake: LUN 3: NOT READY, manual intervention required (2/04/03)")) << log.text.view();
}

// ---- capacities ----

TEST_F(ScsiUnit, TheShortCapacity) {
    unit.capacity_16 = false;
    auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->geometry.sectors, 2048u);
    EXPECT_TRUE(found->limits.short_commands);
    EXPECT_EQ(target.count(capacity_10), 1u);
    unit.blocks = u64{1} << 32; // the first size that READ CAPACITY(10) cannot report
    EXPECT_EQ(failure(describe()), Code::not_supported);
    unit.blocks = (u64{1} << 32) - 1;
    EXPECT_EQ(describe()->geometry.sectors, (u64{1} << 32) - 1);
    unit.blocks = 1;
    EXPECT_EQ(describe()->geometry.sectors, 1u);
}

struct BadCapacity {
    const char* name;
    u64 blocks;
    u32 block_bytes;
    Code code;
};
class ScsiCapacity : public ScsiUnit, public testing::WithParamInterface<BadCapacity> {};
TEST_P(ScsiCapacity, IsChecked) {
    unit.blocks = GetParam().blocks;
    unit.block_bytes = GetParam().block_bytes;
    const auto found = describe();
    ASSERT_FALSE(found);
    EXPECT_EQ(failure(found), GetParam().code);
}
const BadCapacity bad_capacities[] = {
    {"nothing", 2048, 0, Code::not_supported},
    {"odd", 2048, 520, Code::not_supported},
    {"small", 2048, 256, Code::not_supported},
    {"large", 2048, 8192, Code::not_supported},
    {"all_ones", 0, 512, Code::protocol}, // the last block is 2^64 - 1
    {"bytes_overflow_64_bits", (u64{1} << 51) + 1, 4096, Code::protocol},
    {"bytes_overflow_64_bits_512", (u64{1} << 54) + 1, 512, Code::protocol},
};
INSTANTIATE_TEST_SUITE_P(All, ScsiCapacity, testing::ValuesIn(bad_capacities),
                         [](const auto& info) { return info.param.name; });

TEST_F(ScsiUnit, TheLargestDisk) {
    unit.block_bytes = 4096;
    unit.blocks = u64{1} << 51;
    ASSERT_TRUE(describe());
    EXPECT_EQ(describe()->geometry.sectors, u64{1} << 51);
}

TEST_F(ScsiUnit, CutCapacities) {
    on(capacity_16, {.data = std::vector<u8>(11)});
    EXPECT_EQ(failure(describe()), Code::protocol);
    on(capacity_16, {.data = {0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 2, 0}}); // only the first 12 bytes
    ASSERT_TRUE(describe());
    EXPECT_EQ(describe()->geometry.sectors, 100u);
    EXPECT_EQ(describe()->geometry.physical_sector_size, 512u);
}

// ---- rejected, missing, truncated and wrong pages ----

TEST_F(ScsiUnit, NoVitalProductData) {
    unit.pages.clear();
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_FALSE(found->geometry.discard);
    EXPECT_EQ(found->limits.max_transfer, transport.max_transfer);
    EXPECT_EQ(target.count(inquiry), 2u) << "an unlisted page is not requested";
}

TEST_F(ScsiUnit, PagesThatAreListedAndRefused) {
    unit.max_transfer_blocks = 8;
    on_inquiry(0xb0, check(5, 0x24));
    EXPECT_EQ(describe()->limits.max_transfer, transport.max_transfer);
    EXPECT_FALSE(describe()->geometry.discard);
    on_inquiry(0xb2, check(5, 0x24));
    EXPECT_EQ(describe()->limits.max_transfer, 4096u);
    EXPECT_FALSE(describe()->geometry.discard);
}

TEST_F(ScsiUnit, PagesThatLieAboutTheirLength) {
    on_inquiry(0x00, {.data = {0, 0, 0xff, 0xff, 0xb0}}); // longer than the received data
    auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_FALSE(found->geometry.discard) << "0xb2 did not come";
    on_inquiry(0x00, {.data = {0, 0, 0, 1, 0x00, 0xb0, 0xb2}}); // shorter
    target.asked.clear();
    ASSERT_TRUE(describe());
    EXPECT_EQ(target.count(inquiry), 2u) << "neither is in the list";
    on_inquiry(0xb0, {.data = {0, 0xb0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 4}}); // truncated after the maximum transfer length
    found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->limits.max_transfer, 2048u);
    EXPECT_FALSE(found->geometry.discard);
    on_inquiry(0xb0, {.data = {0, 0xb1, 0, 60, 0, 0, 0, 0, 0, 0, 0, 4}}); // another page
    EXPECT_EQ(describe()->limits.max_transfer, transport.max_transfer);
    on_inquiry(0xb2, {.data = {0, 0xb2, 0, 0, 0, 0x80}}); // no page data
    EXPECT_FALSE(describe()->geometry.discard);
}

// Limits no real disk has: they never raise the transport's limit, and nothing overflows.
TEST_F(ScsiUnit, HostileLimits) {
    for (const u32 block_bytes : {512u, 4096u}) {
        unit.block_bytes = block_bytes;
        for (const u32 most : {1u, 7u, 0x7fffffffu, 0x00800000u, 0x00100000u, 0xffffffffu}) {
            unit.max_transfer_blocks = most;
            unit.max_unmap_blocks = most;
            const auto found = describe();
            ASSERT_TRUE(found);
            EXPECT_EQ(found->limits.max_transfer, std::min<u64>(transport.max_transfer, u64{most} * block_bytes));
            EXPECT_TRUE(found->geometry.discard);
            EXPECT_EQ(found->limits.max_unmap_blocks, most);
            const scsi::LogicalUnit lun(found->limits, found->geometry);
            for (const io::Op op : {io::Op::read, io::Op::discard}) {
                io::QueuedCommand command;
                command.op = op;
                command.bytes = 0xfffff000;
                EXPECT_EQ(lun.limit(command), io::Fit::ok);
                EXPECT_EQ(command.bytes, op == io::Op::read ? found->limits.max_transfer
                                                            : std::min<u64>(0xfffff000, u64{most} * block_bytes));
                EXPECT_EQ(command.bytes % block_bytes, 0u);
            }
        }
    }
}

// Every reply truncated at every length: an error or a description, and never a read past the end (checked by the
// sanitizers).
TEST_F(ScsiUnit, EveryAnswerCutEverywhere) {
    for (const u8 opcode : {inquiry, mode_sense, capacity_16}) {
        for (usize n = 0; n <= 64; ++n) {
            target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
                if (cdb.bytes[0] != opcode) {
                    return std::nullopt;
                }
                Answer answer = unit.answer(cdb);
                answer.data.resize(std::min(answer.data.size(), n));
                return answer;
            };
            const auto found = describe();
            if (!found) {
                EXPECT_EQ(failure(found), Code::protocol) << +opcode << " cut at " << n;
                EXPECT_LT(n, 12u) << +opcode;
                continue;
            }
            EXPECT_EQ(found->geometry.sectors, 2048u);
            EXPECT_LE(found->limits.max_transfer, transport.max_transfer);
            EXPECT_TRUE(!found->geometry.discard || found->limits.max_unmap_blocks != 0);
        }
    }
}

// ---- units that change between two commands ----

TEST_F(ScsiUnit, ACapacityThatChangesWhileItIsDescribed) {
    bool changed = false;
    target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
        if (cdb.bytes[0] == mode_sense && !std::exchange(changed, true)) {
            unit.blocks = 4096;
            return check(unit_attention, 0x2a, 0x09);
        }
        return std::nullopt;
    };
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->geometry.sectors, 4096u);
    EXPECT_TRUE(log.has("fake: LUN 3: UNIT ATTENTION, capacity data has changed (6/2a/09): retrying"));
}

TEST_F(ScsiUnit, AnotherUnitInItsPlaceWhileItIsDescribed) {
    bool changed = false;
    target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
        if (cdb.bytes[0] == mode_sense && !std::exchange(changed, true)) {
            unit.product = "Another         ";
            return check(unit_attention, 0x3f, 0x03);
        }
        return std::nullopt;
    };
    EXPECT_EQ(describe()->model.view(), "Msft Another 1.0");
    changed = false;
    target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
        if (cdb.bytes[0] == mode_sense && !std::exchange(changed, true)) {
            unit.peripheral = 5;
            return check(unit_attention, 0x28);
        }
        return std::nullopt;
    };
    EXPECT_EQ(failure(describe()), Code::not_found);
}

// A unit attention unrelated to the unit's data costs one repetition of one command.
TEST_F(ScsiUnit, OtherUnitAttentionsAreOneRepetition) {
    for (const u8 opcode : {test_unit_ready, capacity_16, mode_sense}) {
        bool first = true;
        target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
            return cdb.bytes[0] == opcode && std::exchange(first, false) ? std::optional(check(unit_attention, 0x29))
                                                                         : std::nullopt;
        };
        target.asked.clear();
        ASSERT_TRUE(describe());
        EXPECT_EQ(target.asked.size(), 8u);
    }
}

// The INQUIRY data predates it, so the whole description is repeated.
TEST_F(ScsiUnit, AnotherUnitInItsPlaceBeforeItIsDescribed) {
    for (const u8 opcode : {test_unit_ready, capacity_16}) {
        bool changed = false;
        unit.revision = "1.0 ";
        target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
            if (cdb.bytes[0] == opcode && !std::exchange(changed, true)) {
                unit.revision = "1.1 ";
                return check(unit_attention, 0x3f, 0x03);
            }
            return std::nullopt;
        };
        EXPECT_EQ(describe()->model.view(), "Msft Virtual Disk 1.1") << +opcode;
    }
}

TEST_F(ScsiUnit, AUnitThatAlwaysChangesIsTakenAsItIs) {
    on(mode_sense, check(unit_attention, 0x2a));
    const auto found = describe();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->geometry.sectors, 2048u);
    EXPECT_TRUE(found->geometry.flush);
    EXPECT_EQ(target.count(capacity_16), 9u) << "three descriptions, and the state three times for each";
    EXPECT_EQ(target.count(mode_sense), 45u) << "five attempts each";
}

// The unit attention is reported once: a capacity change between the two commands is still noticed for a disk in use.
TEST_F(ScsiUnit, ACapacityThatChangesWhileItIsCompared) {
    const auto known = *describe();
    bool changed = false;
    target.answer_override = [&](u16, const Cdb& cdb) -> std::optional<Answer> {
        if (cdb.bytes[0] == mode_sense && !std::exchange(changed, true)) {
            unit.blocks = 4096;
            return check(unit_attention, 0x2a, 0x09);
        }
        return std::nullopt;
    };
    EXPECT_EQ(*compare(known), scsi::Change::size);
}

TEST_F(ScsiUnit, Compare) {
    const auto known = *describe();
    EXPECT_EQ(*compare(known), scsi::Change::none);
    unit.blocks = 4096;
    EXPECT_EQ(*compare(known), scsi::Change::size);
    unit.blocks = 256;
    unit.block_bytes = 4096; // the same number of bytes
    EXPECT_EQ(*compare(known), scsi::Change::block_size);
    unit.blocks = 2048;
    unit.block_bytes = 512;
    unit.revision = "1.1 ";
    EXPECT_EQ(*compare(known), scsi::Change::model);
    unit.blocks = 4096; // only a disk that is otherwise the same has been resized
    EXPECT_EQ(*compare(known), scsi::Change::model);
    unit.revision = "1.0 ";
    unit.write_cache = false;
    EXPECT_EQ(*compare(known), scsi::Change::attributes);
    unit.blocks = 2048;
    EXPECT_EQ(*compare(known), scsi::Change::attributes);
    unit.write_cache = true;
    unit.write_protected = true;
    EXPECT_EQ(*compare(known), scsi::Change::attributes);
    unit.write_protected = false;
    EXPECT_EQ(*compare(known), scsi::Change::none);
    EXPECT_EQ(*compare(known, {.max_transfer = 4096, .flush = false}), scsi::Change::attributes);
}

// ---- retries ----

TEST_F(ScsiUnit, TransientErrorsAreRetried) {
    const struct {
        Answer answer;
        bool waits;
    } cases[] = {
        {check(unit_attention, 0x29), false},
        {{.status = 0x08}, true},     // BUSY
        {{.status = 0x28}, true},     // TASK SET FULL
        {{.status = 0x40}, true},     // TASK ABORTED
        {check(2, 0x04, 0x01), true}, // becoming ready
        {check(0xb, 0x00), true},     // ABORTED COMMAND
        {{.service = ServiceResponse::busy}, true},
        {{.service = ServiceResponse::aborted}, true},
    };
    for (const auto& c : cases) {
        for (u32 bad = 0; bad <= 5; ++bad) {
            u32 left = bad;
            target.answer_override = [&](u16, const Cdb&) {
                return left != 0 ? (--left, std::optional(c.answer)) : std::nullopt;
            };
            target.asked.clear();
            const Instant before = clock.time;
            const auto response = execute(scsi::test_unit_ready());
            ASSERT_TRUE(response);
            EXPECT_EQ(response->good(), bad < 5) << "five attempts";
            EXPECT_EQ(target.asked.size(), std::min(bad + 1, 5u));
            EXPECT_EQ((clock.time - before) / 50'000'000, c.waits ? std::min(bad, 4u) : 0u) << "50 ms between them";
        }
    }
}

TEST_F(ScsiUnit, FinalErrorsAreNotRetried) {
    for (const Answer& answer :
         {check(5, 0x20), check(3, 0x11), check(2, 0x3a), check(1, 0x00), Answer{.status = 0x18},
          Answer{.service = ServiceResponse::no_unit}, Answer{.service = ServiceResponse::failed}}) {
        on(test_unit_ready, answer);
        target.asked.clear();
        EXPECT_FALSE(execute(scsi::test_unit_ready())->good());
        EXPECT_EQ(target.asked.size(), 1u);
    }
}

// ---- the list of units ----

TEST_F(ScsiUnit, Luns) {
    target.units[0];
    target.units[7];
    target.units[8];
    target.units[300];
    std::array<bool, 8> present{};
    auto list = run(scsi::report_luns(target, present));
    ASSERT_TRUE(list);
    EXPECT_TRUE(list->complete);
    EXPECT_EQ(list->out_of_range, 2u) << "8 and 300";
    EXPECT_EQ(present, (std::array<bool, 8>{true, false, false, true, false, false, false, true}));
    present = {};
    on(report_luns, check(5, 0x20));
    list = run(scsi::report_luns(target, present));
    ASSERT_TRUE(list);
    EXPECT_FALSE(list->complete);
    EXPECT_EQ(present, (std::array<bool, 8>{}));
    EXPECT_EQ(log.text.view(), "") << "an old target";
    on(report_luns, {.data = {0, 0, 0, 16, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0}}); // one of two
    list = run(scsi::report_luns(target, present));
    ASSERT_TRUE(list);
    EXPECT_FALSE(list->complete);
    EXPECT_TRUE(present[5]) << "what did come counts";
    EXPECT_TRUE(log.has("fake: ")) << log.text.view();
    target.dead = true;
    EXPECT_EQ(failure(run(scsi::report_luns(target, present))), Code::timed_out);
}

// More than a list of 4096 bytes holds: it is truncated, which is reported.
TEST_F(ScsiUnit, MoreUnitsThanTheListHolds) {
    for (u16 n = 0; n < 600; ++n) {
        target.units[n];
    }
    std::array<bool, 256> present{};
    const auto list = run(scsi::report_luns(target, present));
    ASSERT_TRUE(list);
    EXPECT_FALSE(list->complete);
    EXPECT_EQ(std::count(present.begin(), present.end(), true), 256);
    EXPECT_EQ(list->out_of_range, 511u - 256u);
}

TEST_F(ScsiUnit, NoAnswerAtAll) {
    const auto found = *run(scsi::inquire(target, 3));
    target.dead = true;
    EXPECT_EQ(failure(run(scsi::describe(target, 3, *found, transport))), Code::timed_out);
    EXPECT_EQ(failure(run(scsi::read_state(target, 3))), Code::timed_out);
    EXPECT_EQ(failure(execute(scsi::test_unit_ready())), Code::timed_out);
}

} // namespace
