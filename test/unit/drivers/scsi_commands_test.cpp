// The I/O commands of a SCSI disk: their CDBs against bytes written from [SBC-3], and the handling of every way a
// command can end.
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
import drivers.scsi.commands;

#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::drivers::scsi;
using io::Op;
using io::Retry;
using io::Status;

template <usize N>
std::string bytes(const char (&text)[N]) {
    return std::string(text, N - 1);
}
io::Geometry blocks(u64 count, u32 bytes = 512) {
    io::Geometry geometry;
    geometry.sectors = count;
    geometry.sector_size = bytes;
    return geometry;
}
io::QueuedCommand command(Op op, u64 lba = 1000, u32 size = 4096) {
    io::QueuedCommand c;
    c.op = op;
    c.lba = lba;
    c.bytes = op == Op::flush ? 0 : size;
    return c;
}
std::string build(const LogicalUnit& unit, const io::QueuedCommand& c, CommandForm& form) {
    std::array<u8, cdb_bytes> cdb{};
    const u8 length = c.op <= Op::write ? unit.build_io(cdb, c, form) : unit.build_other(cdb, c, form);
    EXPECT_LE(length, cdb_bytes);
    return std::string(cdb.begin(), cdb.begin() + length);
}
std::string build(const LogicalUnit& unit, const io::QueuedCommand& c) {
    CommandForm form;
    return build(unit, c, form);
}
Response sense(u8 key, u8 asc, u8 ascq = 0, u8 status = status_check_condition) {
    Response r{.status = status, .sense = {}, .transport = {}};
    r.sense = Sense{key, asc, ascq, std::nullopt};
    return r;
}

constexpr UnitLimits limits{.max_transfer = 32768, .max_unmap_blocks = 64, .max_zero_blocks = 48};

// ---- building ----

TEST(ScsiCommands, GoldenBytes) {
    const LogicalUnit unit(limits, blocks(u64{1} << 50));
    CommandForm form{true};
    EXPECT_EQ(build(unit, command(Op::read, 0x0102030405060708, 0x123400), form),
              bytes("\x88\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x09\x1a\0\0"));
    EXPECT_FALSE(form.short_cdb);
    EXPECT_EQ(build(unit, command(Op::write, 5, 512)), bytes("\x8a\0\0\0\0\0\0\0\0\x05\0\0\0\x01\0\0"));
    UnitLimits through = limits; // FUA: bit 3 of byte 1, of writes only
    through.write_through = true;
    EXPECT_EQ(build(LogicalUnit(through, blocks(4096)), command(Op::write, 5, 512)),
              bytes("\x8a\x08\0\0\0\0\0\0\0\x05\0\0\0\x01\0\0"));
    EXPECT_EQ(build(LogicalUnit(through, blocks(4096)), command(Op::read, 5, 512)),
              bytes("\x88\0\0\0\0\0\0\0\0\x05\0\0\0\x01\0\0"));
    through.short_commands = true;
    EXPECT_EQ(build(LogicalUnit(through, blocks(4096)), command(Op::write, 5, 512)),
              bytes("\x2a\x08\0\0\0\x05\0\0\x01\0"));
    EXPECT_EQ(build(LogicalUnit(through, blocks(4096)), command(Op::read, 5, 512)),
              bytes("\x28\0\0\0\0\x05\0\0\x01\0"));
    EXPECT_EQ(build(unit, command(Op::flush), form), bytes("\x35\0\0\0\0\0\0\0\0\0"));
    EXPECT_TRUE(form.short_cdb);
    EXPECT_EQ(build(unit, command(Op::discard), form), bytes("\x42\0\0\0\0\0\0\0\x18\0"));
    EXPECT_FALSE(form.short_cdb);
    EXPECT_EQ(build(unit, command(Op::write_zeroes, 0x0102030405060708, 0x123400), form),
              bytes("\x93\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x09\x1a\0\0"));
    EXPECT_FALSE(form.short_cdb);
    std::array<u8, unmap_list_bytes> list;
    list.fill(0xff);
    unit.build_unmap_list(list, command(Op::discard, 0x0102030405060708, 0x2000));
    EXPECT_EQ(std::string(list.begin(), list.end()),
              bytes("\0\x16\0\x10\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x10\0\0\0\0"));
}

TEST(ScsiCommands, TheShortForms) {
    UnitLimits old = limits;
    old.short_commands = true;
    const LogicalUnit unit(old, blocks(u64{1} << 32, 4096));
    CommandForm form;
    EXPECT_EQ(build(unit, command(Op::read, 0xfedcba98, 32768), form), bytes("\x28\0\xfe\xdc\xba\x98\0\0\x08\0"));
    EXPECT_TRUE(form.short_cdb);
    EXPECT_EQ(build(unit, command(Op::write, 0xfedcba98, 32768)), bytes("\x2a\0\xfe\xdc\xba\x98\0\0\x08\0"));
    // A unit that has grown: each command has the form that reaches it.
    EXPECT_EQ(build(unit, command(Op::read, 0xffffffff, 512), form)[0], '\x28');
    EXPECT_EQ(build(unit, command(Op::read, u64{1} << 32, 512), form)[0], '\x88');
    EXPECT_FALSE(form.short_cdb);
    old.max_transfer = 0x10000 * 512;
    EXPECT_EQ(build(LogicalUnit(old, blocks(1000)), command(Op::read))[0], '\x88') << "a count of 17 bits";
    old.max_transfer -= 512;
    EXPECT_EQ(build(LogicalUnit(old, blocks(1000)), command(Op::read))[0], '\x28');
}

TEST(ScsiCommands, Limits) {
    const LogicalUnit unit(limits, blocks(1000, 4096));
    const auto limited = [&](Op op, u32 size) {
        io::QueuedCommand c = command(op, 0, size);
        EXPECT_EQ(unit.limit(c), io::Fit::ok);
        return c.bytes;
    };
    EXPECT_EQ(limited(Op::read, 4096), 4096u);
    EXPECT_EQ(limited(Op::read, 65536), 32768u);
    EXPECT_EQ(limited(Op::write, 65536), 32768u);
    EXPECT_EQ(limited(Op::discard, 65536), 65536u);
    EXPECT_EQ(limited(Op::discard, 1 << 20), 64u * 4096);
    EXPECT_EQ(limited(Op::write_zeroes, 48 * 4096), 48u * 4096);
    EXPECT_EQ(limited(Op::write_zeroes, 1 << 20), 48u * 4096);
    EXPECT_EQ(limited(Op::flush, 0), 0u);
    const LogicalUnit boundless({.max_transfer = 4096, .max_unmap_blocks = 0xffffffff}, blocks(1000, 4096));
    io::QueuedCommand c = command(Op::discard, 0, 0xfffff000);
    EXPECT_EQ(boundless.limit(c), io::Fit::ok);
    EXPECT_EQ(c.bytes, 0xfffff000u);
}

TEST(ScsiCommands, DataPhases) {
    EXPECT_EQ(data_phase(Op::read), DataPhase::in);
    EXPECT_EQ(data_phase(Op::write), DataPhase::out);
    EXPECT_EQ(data_phase(Op::flush), DataPhase::none);
    EXPECT_EQ(data_phase(Op::discard), DataPhase::out);
    EXPECT_EQ(data_phase(Op::write_zeroes), DataPhase::out);
    for (const u32 size : {512u, 4096u}) {
        const LogicalUnit unit(limits, blocks(1000, size));
        EXPECT_EQ(unit.parameter_bytes(Op::flush), 0u);
        EXPECT_EQ(unit.parameter_bytes(Op::discard), 24u);
        EXPECT_EQ(unit.parameter_bytes(Op::write_zeroes), size);
        EXPECT_LE(size, zeros_bytes);
    }
    EXPECT_TRUE(moved_all(command(Op::read), 4096));
    EXPECT_FALSE(moved_all(command(Op::read), 4095));
    EXPECT_FALSE(moved_all(command(Op::write), 0));
    EXPECT_TRUE(moved_all(command(Op::flush), 0));
    EXPECT_TRUE(moved_all(command(Op::discard), 24));
}

// ---- judging: status × sense × retries ----
//
// The verdict on a read of 4096 bytes that transferred nothing, beyond what a short form reaches. One letter per number
// of retries so far (0, 2, 3, 199, 200):
//   N retry at once   L retry later   E io_error   U not_supported   G device_gone; lower case: also rescan

constexpr u8 retries[] = {0, 2, 3, 199, 200};

struct SenseCase {
    const char* name;
    std::optional<std::array<u8, 3>> sense;
    const char* check_condition; // the five letters for CHECK CONDITION
    const char* busy;            // BUSY, TASK SET FULL, TASK ABORTED; and the transport's `busy`
    const char* other;           // RESERVATION CONFLICT, an undefined status
    const char* good;            // GOOD, with the transport's `failed`
    const char* aborted;         // the transport's `aborted`, with CHECK CONDITION
    const char* no_unit;         // the transport's `no_unit`, with GOOD
};
const SenseCase senses[] = {
    {"none", std::nullopt, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "LLLLE", "ggggg"},
    {"no_sense", {{0x0, 0x00, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"recovered", {{0x1, 0x17, 0x01}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"becoming_ready", {{0x2, 0x04, 0x01}}, "LLLLE", "LLLLE", "LLLLE", "LLLLE", "LLLLE", "LLLLg"},
    {"not_ready", {{0x2, 0x04, 0x03}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"no_medium", {{0x2, 0x3a, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"medium", {{0x3, 0x11, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"hardware", {{0x4, 0x44, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"opcode", {{0x5, 0x20, 0x00}}, "UUUUU", "LLLLU", "UUUUU", "UUUUU", "UUUUU", "UUUUU"},
    {"field", {{0x5, 0x24, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"unit_not_supported", {{0x5, 0x25, 0x00}}, "ggggg", "LLLLg", "ggggg", "ggggg", "ggggg", "ggggg"},
    {"reset", {{0x6, 0x29, 0x00}}, "NNEEE", "NNLLE", "NNEEE", "NNEEE", "NNEEE", "NNggg"},
    {"capacity_changed", {{0x6, 0x2a, 0x09}}, "nneee", "nnlle", "nneee", "nneee", "nneee", "nnggg"},
    {"units_changed", {{0x6, 0x3f, 0x0e}}, "nneee", "nnlle", "nneee", "nneee", "nneee", "nnggg"},
    {"protect", {{0x7, 0x27, 0x00}}, "EEEEE", "LLLLE", "EEEEE", "EEEEE", "EEEEE", "ggggg"},
    {"aborted_command", {{0xb, 0x00, 0x00}}, "LLLLE", "LLLLE", "LLLLE", "LLLLE", "LLLLE", "LLLLg"},
};

char letter(const Verdict& verdict) {
    char c = '?';
    switch (verdict.retry) {
    case Retry::now: c = 'N'; break;
    case Retry::later: c = 'L'; break;
    default:
        c = verdict.status == Status::ok              ? 'O'
            : verdict.status == Status::io_error      ? 'E'
            : verdict.status == Status::not_supported ? 'U'
            : verdict.status == Status::device_gone   ? 'G'
            : verdict.status == Status::timed_out     ? 'T'
                                                      : '?';
    }
    return verdict.rescan ? static_cast<char>(c - 'A' + 'a') : c;
}

class ScsiJudge : public testing::TestWithParam<SenseCase> {
  public:
    static std::string verdicts(Response response, bool expired = false) {
        if (GetParam().sense) {
            response.sense = Sense{(*GetParam().sense)[0], (*GetParam().sense)[1], (*GetParam().sense)[2], {}};
        }
        std::string result;
        for (const u8 n : retries) {
            test::CapturedLog log;
            LogicalUnit unit(limits, blocks(u64{1} << 33));
            io::QueuedCommand c = command(Op::read, u64{1} << 32);
            c.retries = n;
            c.expired = expired;
            const char verdict = letter(unit.judge(c, {}, response, "sda"));
            result += verdict;
            // a delayed retry logs nothing; all others log a line
            EXPECT_EQ(log.text.view().empty(),
                      verdict == 'L' || verdict == 'l' || verdict == 'O' || verdict == 'T' || verdict == 't')
                << verdict << ": " << log.text.view();
        }
        return result;
    }
    static Response response(u8 status, ServiceResponse service = ServiceResponse::command_complete) {
        return {.service = service, .status = status, .sense = {}, .transport = {}};
    }
};

TEST_P(ScsiJudge, StatusBySenseByRetries) {
    const SenseCase& c = GetParam();
    EXPECT_EQ(verdicts(response(0x02)), c.check_condition);
    EXPECT_EQ(verdicts(response(0x08)), c.busy);
    EXPECT_EQ(verdicts(response(0x28)), c.busy);
    EXPECT_EQ(verdicts(response(0x40)), c.busy);
    EXPECT_EQ(verdicts(response(0x02, ServiceResponse::busy)), c.busy);
    EXPECT_EQ(verdicts(response(0x18)), c.other);
    EXPECT_EQ(verdicts(response(0x77)), c.other);
    EXPECT_EQ(verdicts(response(0x00, ServiceResponse::failed)), c.good);
    EXPECT_EQ(verdicts(response(0x02, ServiceResponse::aborted)), c.aborted);
    EXPECT_EQ(verdicts(response(0x00, ServiceResponse::no_unit)), c.no_unit);
    EXPECT_EQ(verdicts(response(0x00)), "EEEEE") << "GOOD, and nothing has been moved";
}

// The device was asked to complete everything: commands that would be retried end instead, except after unit
// attentions.
TEST_P(ScsiJudge, ExpiredCommandsAreNotResent) {
    for (const auto& r : {response(0x02), response(0x08), response(0x02, ServiceResponse::aborted)}) {
        std::string expected = verdicts(r);
        const bool attention = GetParam().sense && (*GetParam().sense)[0] == 6;
        const bool transient = expected[0] == 'L';
        for (usize i = 0; i < expected.size(); ++i) {
            if (attention && i < 2) {
                continue;
            }
            const bool rescan = attention && expected[i] >= 'a';
            if (r.service == ServiceResponse::aborted || r.status == 0x08 || transient) {
                expected[i] = rescan ? 't' : 'T';
            }
        }
        EXPECT_EQ(verdicts(r, true), expected);
    }
}
INSTANTIATE_TEST_SUITE_P(All, ScsiJudge, testing::ValuesIn(senses), [](const auto& info) { return info.param.name; });

// ---- judging: other cases ----

struct ScsiVerdict : testing::Test {
    test::CapturedLog log;
    LogicalUnit unit{limits, blocks(1 << 20)};
    Verdict judge(const io::QueuedCommand& c, const Response& response, bool short_cdb = false) {
        return unit.judge(c, {short_cdb}, response, "sda");
    }
};

TEST_F(ScsiVerdict, WhatWasMoved) {
    Response good{.moved = 4096, .sense = {}, .transport = {}};
    EXPECT_EQ(letter(judge(command(Op::read), good)), 'O');
    EXPECT_EQ(letter(judge(command(Op::flush), {.sense = {}, .transport = {}})), 'O');
    EXPECT_EQ(letter(judge(command(Op::discard), {.moved = 24, .sense = {}, .transport = {}})), 'O');
    Response recovered = sense(1, 0x17, 1);
    recovered.moved = 4096;
    EXPECT_EQ(letter(judge(command(Op::write), recovered)), 'O');
    Response noted = sense(0, 0x5d, 0, status_good);
    noted.service = ServiceResponse::failed;
    noted.moved = 4096;
    EXPECT_EQ(letter(judge(command(Op::write), noted)), 'O') << "NO SENSE with GOOD";
    noted.status = status_check_condition;
    EXPECT_EQ(letter(judge(command(Op::write), noted)), 'E') << "NO SENSE without";
    log.text.clear();
    good.moved = 512;
    EXPECT_EQ(letter(judge(command(Op::write), good)), 'E');
    EXPECT_TRUE(log.has("sda: WRITE(16): success with 512 of 4096 bytes transferred, at LBA 1000"));
    recovered.moved = 512;
    EXPECT_EQ(letter(judge(command(Op::read), recovered)), 'E');
}

TEST_F(ScsiVerdict, LinesNameTheCommandTheSenseAndTheTransport) {
    const struct {
        Op op;
        bool short_cdb;
        const char* line;
    } cases[] = {
        {Op::read, false, "sda: READ(16): MEDIUM ERROR, unrecovered read error (3/11/00) at LBA 1000"},
        {Op::read, true, "sda: READ(10): MEDIUM ERROR, unrecovered read error (3/11/00) at LBA 1000"},
        {Op::write, false, "sda: WRITE(16): MEDIUM"},
        {Op::write, true, "sda: WRITE(10): MEDIUM"},
        {Op::discard, false, "sda: UNMAP: MEDIUM"},
    };
    for (const auto& c : cases) {
        log.text.clear();
        judge(command(c.op), sense(3, 0x11), c.short_cdb);
        EXPECT_TRUE(log.has(c.line)) << log.text.view();
    }
    log.text.clear();
    judge(command(Op::flush), sense(3, 0x0c), true);
    EXPECT_TRUE(log.has("sda: SYNCHRONIZE CACHE(10): MEDIUM ERROR, write error (3/0c/00)"));
    EXPECT_FALSE(log.has("LBA")) << "a flush has none";
    Response r{.service = ServiceResponse::failed, .sense = {}, .transport = {"host status", "bus fault", 0x33}};
    judge(command(Op::read), r);
    EXPECT_TRUE(log.has("sda: READ(16): SCSI status GOOD, host status bus fault (0x33), no sense data, at LBA 1000"));
}

TEST_F(ScsiVerdict, TheOtherFormOfAReadIsTried) {
    const Response refused = sense(5, 0x20);
    EXPECT_EQ(letter(judge(command(Op::read), refused)), 'N');
    EXPECT_EQ(build(unit, command(Op::write))[0], '\x2a') << "all that follow";
    EXPECT_EQ(letter(judge(command(Op::write), refused)), 'N') << "one that was sent before";
    EXPECT_EQ(log.text.view(), "");
    EXPECT_EQ(letter(judge(command(Op::write), refused, true)), 'U') << "neither form";
    EXPECT_TRUE(log.has("sda: WRITE(10): ILLEGAL REQUEST, invalid command operation code"));
    LogicalUnit large(limits, blocks((u64{1} << 32) + 1));
    EXPECT_EQ(letter(large.judge(command(Op::read, u64{1} << 32), {}, refused, "sdb")), 'U') << "READ(10) cannot";
    EXPECT_EQ(build(large, command(Op::read))[0], '\x88');
    EXPECT_EQ(letter(large.judge(command(Op::read), {}, refused, "sdb")), 'N');
    EXPECT_EQ(build(large, command(Op::read))[0], '\x28');
}

TEST_F(ScsiVerdict, TheOtherFormOfAFlushIsTried) {
    const Response refused = sense(5, 0x20);
    io::QueuedCommand c = command(Op::flush);
    c.retries = 3;
    EXPECT_EQ(letter(judge(c, refused, true)), 'U') << "it has been tried often enough";
    EXPECT_EQ(build(unit, command(Op::flush)).size(), 10u);
    EXPECT_EQ(letter(judge(command(Op::flush), refused, true)), 'N');
    EXPECT_EQ(build(unit, command(Op::flush)), bytes("\x91\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"));
    EXPECT_EQ(letter(judge(command(Op::flush), refused, false)), 'U');
    EXPECT_EQ(build(unit, command(Op::read))[0], '\x88') << "reads are not concerned";
    EXPECT_EQ(letter(judge(command(Op::discard), refused)), 'U') << "UNMAP has one form";
}

// A unit that refuses an operation is not asked again, and the others are not concerned.
TEST_F(ScsiVerdict, RefusedOperations) {
    for (const u8 asc : {u8{0x20}, u8{0x24}, u8{0x26}}) { // operation code, field in CDB, in parameter list
        for (const auto& [op, other] :
             {std::pair(Op::write_zeroes, Op::discard), std::pair(Op::discard, Op::write_zeroes)}) {
            LogicalUnit one(limits, blocks(1 << 20));
            log.text.clear();
            EXPECT_EQ(letter(one.judge(command(op), {}, sense(5, asc), "sda")), 'U');
            EXPECT_TRUE(
                log.has(op == Op::discard ? "sda: UNMAP: ILLEGAL REQUEST" : "sda: WRITE SAME(16): ILLEGAL REQUEST"));
            const std::string once(log.text.view());
            EXPECT_EQ(letter(one.judge(command(op), {}, sense(5, asc), "sda")), 'U') << "one that was sent before";
            EXPECT_EQ(log.text.view(), once);
            io::QueuedCommand c = command(op);
            EXPECT_EQ(one.limit(c), io::Fit::refused);
            EXPECT_EQ(c.refusal, Status::not_supported);
            for (const Op allowed : {other, Op::read, Op::write, Op::flush}) {
                c = command(allowed);
                EXPECT_EQ(one.limit(c), io::Fit::ok);
            }
        }
    }
    for (const Op op : {Op::write_zeroes, Op::discard}) {
        EXPECT_EQ(letter(judge(command(op), sense(5, 0x21))), 'E') << "beyond the end, after the unit has shrunk";
        EXPECT_EQ(letter(judge(command(op), sense(5, 0x25))), 'g');
        EXPECT_EQ(letter(judge(command(op), sense(3, 0x0c))), 'E');
        EXPECT_EQ(letter(judge(command(op), sense(6, 0x29))), 'N');
        io::QueuedCommand c = command(op);
        EXPECT_EQ(unit.limit(c), io::Fit::ok);
        EXPECT_EQ(letter(judge(command(op), sense(1, 0x17))), 'O') << "its data is not the range's";
    }
    EXPECT_EQ(letter(judge(command(Op::read), sense(5, 0x24))), 'E');
}

TEST_F(ScsiVerdict, ReportsAreBounded) {
    for (u32 i = 0; i < 100; ++i) {
        judge(command(Op::read, i), sense(3, 0x11));
        judge(command(Op::read, i), sense(6, 0x29));
    }
    const std::string text(log.text.view());
    const auto count = [&](std::string_view what) {
        usize n = 0;
        for (usize at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
            ++n;
        }
        return n;
    };
    EXPECT_EQ(count("MEDIUM ERROR"), LogicalUnit::max_reported_errors);
    EXPECT_EQ(count("UNIT ATTENTION"), LogicalUnit::max_reported_errors);
    EXPECT_EQ(count("further errors of this kind are only counted"), 1u);
}

TEST_F(ScsiVerdict, AnAbsentUnitIsReportedOnce) {
    const Response gone{.service = ServiceResponse::no_unit, .sense = {}, .transport = {}};
    EXPECT_EQ(letter(judge(command(Op::read), gone)), 'g');
    const std::string once(log.text.view());
    EXPECT_NE(once, "");
    EXPECT_EQ(letter(judge(command(Op::write), gone)), 'g');
    EXPECT_EQ(letter(judge(command(Op::flush), sense(5, 0x25))), 'g');
    EXPECT_EQ(log.text.view(), once);
    EXPECT_EQ(letter(judge(command(Op::read), sense(3, 0x11))), 'E');
    EXPECT_NE(log.text.view(), once) << "other errors are";
}

} // namespace
