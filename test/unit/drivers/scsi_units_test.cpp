// The units of a host adapter, without a transport: targets, probing, changes, removal, reports, silence.
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
import drivers.driver;
import drivers.scsi.units;

#include "unit/io/support.hpp"
// depends on the includes above
#include "unit/drivers/scsi_fake.hpp"

namespace {
using namespace fl;
namespace scsi = drivers::scsi;
using drivers::Unused;
using fake::Answer;
using fake::check;
using scsi::Cdb;
using scsi::UnitNumber;
constexpr u8 test_unit_ready = 0x00, inquiry = 0x12, report_luns = 0xa0;
using Strings = std::vector<std::string>;

/// A lane of a disk. Its I/O is of no interest here.
class Lane final : public io::BlockDevice {
  public:
    Lane(io::Executor& executor, const io::Geometry& geometry, const Identity& identity, u32& alive)
        : BlockDevice(executor), alive_(alive) {
        geometry_ = geometry;
        identity_ = identity;
        ++alive_;
    }
    ~Lane() { --alive_; }
    void add_lane(Lane& lane) { further.push_back(&lane); }
    void link(io::Executor&) {
        EXPECT_TRUE(announced) << "linked before the announcement";
        linked = true;
    }
    void remove() { gone = true; }
    bool removed() const override { return gone; }
    u32 queues() const override { return 1 + static_cast<u32>(further.size()); }
    io::BlockDevice& queue_lane(u32 index) override { return index == 0 ? *this : *further[index - 1]; }

    std::vector<Lane*> further;
    bool announced = false, linked = false, gone = false;

  protected:
    void start(io::Request& request) override { complete(request, io::Status::ok); }
    bool cancel_now(io::Request&) override { return false; }
    void forget(io::Request&) override {}

  private:
    u32& alive_;
};

struct Sink final : drivers::DiskSink {
    std::vector<Lane*> disks;
    Strings left; // "address: what (why)"
    std::optional<Error> refuses;
    u32 number = 0; // of the last one announced
    bool offered(u32) override { return true; }
    FixedText<16> free_name(std::string_view prefix) override {
        return drivers::disk_name(prefix, static_cast<u32>(disks.size()));
    }
    Result<void> announce(io::BlockDevice& disk, u32 disk_number) override {
        if (refuses) {
            return *refuses;
        }
        number = disk_number;
        disks.push_back(static_cast<Lane*>(&disk));
        for (u32 i = 0; i < disk.queues(); ++i) {
            EXPECT_FALSE(static_cast<Lane&>(disk.queue_lane(i)).linked);
            static_cast<Lane&>(disk.queue_lane(i)).announced = true;
        }
        return {};
    }
    void unused(const drivers::UnusedUnit& unit) override {
        EXPECT_EQ(unit.bus, "scsi");
        EXPECT_FALSE(unit.reason.empty());
        left.push_back(std::string(unit.address) + ": " + std::string(unit.what) + " (" +
                       std::string(drivers::name(unit.why)) + ")");
    }
};

/// A host adapter with a fake::Target for each target.
struct Adapter final : scsi::Host {
    explicit Adapter(io::Executor& executor) : Host(executor, "fake") {}
    ~Adapter() { EXPECT_EQ(alive, 0u) << "disks are lost"; }

    std::map<u8, fake::Target> targets;
    bool open = true;
    u32 lanes = 1;
    u32 made = 0;
    std::optional<u32> no_memory; // for the lane with this index
    u32 alive = 0;                // lanes
    /// Called first; what it returns is used.
    std::function<std::optional<Result<void>>(u8 target, u16 lun, const Cdb& cdb)> override_execute;

    fake::Target& at(u8 target) { return targets.try_emplace(target, executor()).first->second; }
    fake::Unit& add(u8 target, u16 lun) { return at(target).units[lun]; }
    usize count(u8 opcode) {
        usize sum = 0;
        for (auto& [number, target] : targets) {
            sum += target.count(opcode);
        }
        return sum;
    }

    io::Task<Result<void>> execute(u16 lun, Cdb cdb, u32 bytes, scsi::Response& response) override {
        EXPECT_TRUE(open) << "a command after the end";
        if (override_execute) {
            if (const auto result = override_execute(target(), lun, cdb)) {
                co_return *result;
            }
        }
        const auto found = targets.find(target());
        if (found == targets.end()) {
            response = {.service = scsi::ServiceResponse::no_unit};
            co_return Result<void>{};
        }
        co_return co_await found->second.execute(lun, cdb, bytes, response);
    }
    bool is_open() const override { return open; }
    scsi::Unit* make(UnitNumber at, const scsi::UnitDescription& found, io::BlockDevice::Identity& identity) override {
        ++made;
        print(identity.features, "unit={}.{}", at.target, at.lun);
        return scsi::make_lanes<Lane>(lanes, [&](u32 i) {
            return i == no_memory ? nullptr : new Lane(executor(), found.geometry, identity, alive);
        });
    }
};

struct ScsiUnits : testing::Test {
    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::CapturedLog log;
    Sink sink;
    Adapter adapter{executor};
    scsi::Units units{adapter, sink};

    ScsiUnits() { rules(); }
    void rules(const std::function<void(scsi::Units::Rules&)>& change = {}) {
        scsi::Units::Rules r{.name = FixedText<48>("fake0"), .transport = {.max_transfer = 128 * 1024}};
        if (change) {
            change(r);
        }
        units.set_rules(r);
    }
    Result<void> scan(u32 count = 1) { return executor.run(units.scan(count)); }
    std::string name(usize disk) { return std::string(sink.disks.at(disk)->identity().name.view()); }
};

TEST_F(ScsiUnits, UnitsOfSeveralTargets) {
    adapter.lanes = 3;
    adapter.add(0, 0);
    adapter.add(2, 5).write_cache = false;
    adapter.add(2, 255).block_bytes = 4096;
    ASSERT_TRUE(scan(3));
    ASSERT_EQ(sink.disks.size(), 3u) << log.text.view();
    EXPECT_EQ(units.attached(), 3u);
    EXPECT_EQ(name(2), "sdc");
    EXPECT_EQ(sink.disks[0]->identity().driver, "fake");
    EXPECT_EQ(sink.disks[0]->identity().kind, io::Kind::synthetic);
    EXPECT_EQ(sink.disks[0]->identity().model.view(), "Msft Virtual Disk 1.0");
    EXPECT_EQ(sink.disks[0]->identity().features.view(), "flush discard unit=0.0");
    EXPECT_EQ(sink.disks[1]->identity().features.view(), "discard unit=2.5");
    EXPECT_EQ(sink.disks[2]->geometry().sector_size, 4096u);
    EXPECT_EQ(sink.number, drivers::DiskSink::no_twin);
    for (Lane* disk : sink.disks) {
        EXPECT_TRUE(disk->linked);
        ASSERT_EQ(disk->further.size(), 2u);
        EXPECT_TRUE(disk->further[0]->linked && disk->further[1]->linked);
    }
    EXPECT_EQ(log.text.view(), "") << "an absent target is nothing special";
    ASSERT_TRUE(scan(3)); // nothing has changed
    EXPECT_EQ(sink.disks.size(), 3u);
    EXPECT_EQ(adapter.made, 3u);
    u32 index = 0;
    EXPECT_EQ(units.next(index), (UnitNumber{0, 0}));
    EXPECT_EQ(units.next(index), (UnitNumber{2, 5}));
    EXPECT_EQ(units.next(index), (UnitNumber{2, 255}));
    EXPECT_EQ(units.next(index), std::nullopt);
}

TEST_F(ScsiUnits, AnAbsentTargetIsNotProbed) {
    rules([](auto& r) { r.probed_luns = 8; });
    u32 commands = 0;
    adapter.override_execute = [&](u8, u16, const Cdb&) -> std::optional<Result<void>> {
        return ++commands, std::nullopt;
    };
    ASSERT_TRUE(scan(5));
    EXPECT_EQ(commands, 5u);
}

TEST_F(ScsiUnits, WithoutAListUnitsAreProbed) {
    rules([](auto& r) { r.probed_luns = 4; });
    adapter.add(0, 0);
    adapter.add(0, 3);
    adapter.add(0, 4);
    adapter.at(0).answer_override = [](u16, const Cdb& cdb) -> std::optional<Answer> {
        return cdb.bytes[0] == report_luns ? std::optional(check(5, 0x20)) : std::nullopt;
    };
    ASSERT_TRUE(scan());
    ASSERT_EQ(sink.disks.size(), 2u);
    EXPECT_EQ(sink.disks[1]->identity().features.view(), "flush discard unit=0.3");
    EXPECT_EQ(adapter.count(inquiry), 4u + 2 * 3) << "the standard data of four units, three pages of each disk";
    // An error of a unit that may not be there is not reported.
    sink.left.clear();
    adapter.at(0).units.erase(3);
    adapter.at(0).answer_override = [](u16 lun, const Cdb& cdb) -> std::optional<Answer> {
        return cdb.bytes[0] == report_luns ? std::optional(check(5, 0x20))
               : lun == 2                  ? std::optional(check(4, 0x44))
                                           : std::nullopt;
    };
    ASSERT_TRUE(scan());
    EXPECT_TRUE(sink.left.empty());
    EXPECT_TRUE(sink.disks[1]->gone);
    EXPECT_FALSE(sink.disks[0]->gone);
}

// A list that cannot be read does not remove a disk whose unit still answers.
TEST_F(ScsiUnits, ADiskInUseOutlivesAMissingList) {
    adapter.add(0, 0);
    adapter.add(0, 77);
    ASSERT_TRUE(scan());
    ASSERT_EQ(sink.disks.size(), 2u);
    adapter.at(0).answer_override = [](u16, const Cdb& cdb) -> std::optional<Answer> {
        // for 9 units, with one
        return cdb.bytes[0] == report_luns
                   ? std::optional(Answer{.data = {0, 0, 0, 72, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}})
                   : std::nullopt;
    };
    ASSERT_TRUE(scan());
    EXPECT_FALSE(sink.disks[0]->gone || sink.disks[1]->gone);
    adapter.at(0).units.erase(77);
    ASSERT_TRUE(scan());
    EXPECT_TRUE(sink.disks[1]->gone);
}

TEST_F(ScsiUnits, AUnitOfZeroBytesIsEmptyUntilItHasSome) {
    adapter.add(0, 0).zero_bytes = true;
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.left, Strings{"fake0 target 0 LUN 0: SCSI disk (empty)"});
    adapter.at(0).units[0].zero_bytes = false;
    ASSERT_TRUE(scan());
    ASSERT_EQ(sink.disks.size(), 1u);
    sink.left.clear();
    adapter.at(0).units[0].zero_bytes = true; // in use: what the disk had is not forgotten
    static_cast<void>(scan());
    EXPECT_FALSE(sink.disks[0]->gone);
    EXPECT_EQ(sink.left, Strings{"fake0 target 0 LUN 0: SCSI disk (failed)"});
}

TEST_F(ScsiUnits, ATargetWithOneUnitIsNotAskedForAList) {
    rules([](auto& r) {
        r.lists_units = false;
        r.several_targets = false;
        r.disk_number = 2;
    });
    adapter.add(0, 0).blocks = 0; // its last block would be 2^64 - 1
    adapter.add(0, 1);
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.left, Strings{"fake0 LUN 0: SCSI disk (failed)"});
    adapter.at(0).units[0].blocks = 64;
    ASSERT_TRUE(scan());
    ASSERT_EQ(sink.disks.size(), 1u);
    EXPECT_EQ(sink.number, 2u);
    EXPECT_EQ(adapter.count(report_luns), 0u);
}

TEST_F(ScsiUnits, LunsThatCannotBeAddressed) {
    rules([](auto& r) { r.last_lun = 5; });
    adapter.add(0, 5);
    adapter.add(0, 6);
    adapter.add(0, 256);
    adapter.add(0, 300);
    ASSERT_TRUE(scan());
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.disks.size(), 1u);
    EXPECT_EQ(sink.left, Strings{"fake0 target 0 LUN 255: SCSI units above (no room)"}) << "once";
}

TEST_F(ScsiUnits, OthersAreReportedOnceUntilTheyAreGone) {
    adapter.add(1, 0).peripheral = 5;
    adapter.add(1, 1).empty = true;
    adapter.add(1, 2).block_bytes = 520;
    adapter.add(1, 3).peripheral = 0x20; // not connected: nothing to report
    adapter.add(1, 4);
    const Strings all{"fake0 target 1 LUN 0: SCSI device of type 0x5 (Msft Virtual Disk) (not a disk)",
                      "fake0 target 1 LUN 1: SCSI disk (empty)", "fake0 target 1 LUN 2: SCSI disk (no driver)"};
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.left, all);
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.left, all);
    EXPECT_EQ(sink.disks.size(), 1u);
    adapter.at(1).units.erase(1);
    ASSERT_TRUE(scan(2));
    adapter.add(1, 1).empty = true;
    ASSERT_TRUE(scan(2));
    ASSERT_EQ(sink.left.size(), 4u) << "it is another one";
    EXPECT_EQ(sink.left[3], all[1]);
    adapter.at(1).units[1].empty = false; // a medium
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 2u);
    adapter.at(1).units[1].empty = true;
    ASSERT_TRUE(scan(2)) << log.text.view();
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.left.size(), 5u) << "READ CAPACITY fails";
}

struct ChangeRow {
    const char* name;
    void (*change)(fake::Unit&);
    std::string_view text; // empty: no change
    u64 sectors = 0;       // it is resized to this; 0: it gets a new name
};
class ScsiUnitsChange : public ScsiUnits, public testing::WithParamInterface<ChangeRow> {};
TEST_P(ScsiUnitsChange, IsNoticed) {
    adapter.lanes = 2;
    adapter.add(0, 0);
    fake::Unit& unit = adapter.add(0, 3);
    unit.pages = {0x00, 0x83, 0xb0, 0xb2};
    unit.designator = "one";
    ASSERT_TRUE(scan());
    ASSERT_EQ(sink.disks.size(), 2u);
    GetParam().change(unit);
    ASSERT_TRUE(scan());
    EXPECT_FALSE(sink.disks[0]->gone);
    if (GetParam().text.empty()) {
        EXPECT_EQ(sink.disks.size(), 2u);
        EXPECT_EQ(log.text.view(), "");
        return;
    }
    EXPECT_TRUE(log.has(GetParam().text)) << log.text.view();
    if (GetParam().sectors != 0) {
        EXPECT_EQ(sink.disks.size(), 2u);
        EXPECT_FALSE(sink.disks[1]->gone);
        executor.turn(); // the other lane learns it by a post
        for (u32 lane = 0; lane < 2; ++lane) {
            EXPECT_EQ(sink.disks[1]->lane(lane).geometry().sectors, GetParam().sectors) << lane;
        }
        EXPECT_EQ(sink.disks[0]->geometry().sectors, 2048u);
        log.text.clear();
        ASSERT_TRUE(scan());
        EXPECT_EQ(log.text.view(), "") << "this is its size now";
        return;
    }
    ASSERT_EQ(sink.disks.size(), 3u);
    EXPECT_TRUE(sink.disks[1]->gone && sink.disks[1]->further[0]->gone);
    EXPECT_FALSE(sink.disks[2]->gone);
    EXPECT_EQ(name(2), "sdc");
    EXPECT_EQ(units.attached(), 3u) << "its users still have it";
}
const ChangeRow change_rows[] = {
    {"nothing", [](fake::Unit&) {}, ""},
    {"growth", [](fake::Unit& u) { u.blocks = (u64{1} << 33) + 5; }, "sdb: resized from 2048 to 8589934597 sectors",
     (u64{1} << 33) + 5},
    {"shrinkage", [](fake::Unit& u) { u.blocks = 1; }, "sdb: resized from 2048 to 1 sectors", 1},
    {"block_size", [](fake::Unit& u) { u.block_bytes = 4096; },
     "sdb: the host has changed the disk's block size: it gets a new name"},
    {"identification", [](fake::Unit& u) { u.designator = "two"; },
     "sdb: the host has put another disk in its place: it gets a new name"},
    {"another_of_other_size",
     [](fake::Unit& u) {
         u.designator = "two";
         u.blocks = 4096;
     },
     "sdb: the host has put another disk in its place: it gets a new name"},
    {"no_identification", [](fake::Unit& u) { u.pages = {0x00}; },
     "sdb: the host has put another disk in its place: it gets a new name"},
    {"model", [](fake::Unit& u) { u.revision = "2.0 "; },
     "sdb: the host has put another disk in its place: it gets a new name"},
    {"cache", [](fake::Unit& u) { u.write_cache = false; },
     "sdb: the host has changed the disk's cache or write protection: it gets a new name"},
    {"protection", [](fake::Unit& u) { u.write_protected = true; },
     "sdb: the host has changed the disk's cache or write protection: it gets a new name"},
};
INSTANTIATE_TEST_SUITE_P(All, ScsiUnitsChange, testing::ValuesIn(change_rows),
                         [](const auto& info) { return info.param.name; });

// An event that a driver handles while a scan waits for a command: the unit has answered before it was removed.
TEST_F(ScsiUnits, ARemovalDuringAScanIsNotUndone) {
    adapter.add(0, 0);
    for (u32 at = 2; at < 12; ++at) { // during each command to the unit; REPORT LUNS is the first one
        u32 commands = 0;
        adapter.override_execute = [&](u8, u16, const Cdb&) -> std::optional<Result<void>> {
            if (++commands == at) {
                units.remove({0, 0});
            }
            return std::nullopt;
        };
        const usize before = sink.disks.size();
        static_cast<void>(scan());
        if (commands < at) {
            EXPECT_GT(at, 5u);
            break;
        }
        EXPECT_LE(sink.disks.size(), before) << at;
        for (const Lane* disk : sink.disks) {
            EXPECT_TRUE(disk->gone) << at;
        }
        if (at % 2 == 0) { // then for a disk in use
            adapter.override_execute = nullptr;
            ASSERT_TRUE(scan());
            ASSERT_EQ(sink.disks.size(), before + 1);
        }
    }
}

TEST_F(ScsiUnits, Removal) {
    adapter.lanes = 2;
    for (u16 lun = 0; lun < 4; ++lun) {
        adapter.add(0, lun);
    }
    ASSERT_TRUE(scan());
    adapter.at(0).units.erase(0);             // no longer in the list
    adapter.at(0).units[1].peripheral = 0x20; // listed, but not connected
    ASSERT_TRUE(scan());
    EXPECT_TRUE(sink.disks[0]->gone && sink.disks[0]->further[0]->gone);
    EXPECT_TRUE(sink.disks[1]->gone);
    units.remove({1, 2});
    EXPECT_FALSE(sink.disks[2]->gone || sink.disks[3]->gone);
    units.remove({0, 2}); // an event
    units.remove({0, 2});
    EXPECT_TRUE(sink.disks[2]->gone);
    EXPECT_FALSE(sink.disks[3]->gone);
    EXPECT_EQ(log.text.view(), "warning: sda: the host has removed the disk\n"
                               "warning: sdb: the host has removed the disk\n"
                               "warning: sdc: the host has removed the disk\n");
    u32 index = 0;
    EXPECT_EQ(units.next(index), (UnitNumber{0, 3}));
    EXPECT_EQ(units.next(index), std::nullopt);
    adapter.add(0, 0);
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.disks.size(), 6u) << "0, and 2, which is still there";
    EXPECT_EQ(adapter.alive, 12u) << "the disks of removed units remain valid";
    adapter.targets.clear(); // the whole target
    ASSERT_TRUE(scan());
    EXPECT_TRUE(std::ranges::all_of(sink.disks, [](Lane* disk) { return disk->gone; }));
}

TEST_F(ScsiUnits, RefusedDisksAreDestroyed) {
    adapter.lanes = 2;
    adapter.add(0, 0);
    sink.refuses = Error{Code::busy, "another driver has it"};
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.left, Strings{"fake0 target 0 LUN 0: SCSI disk (taken)"});
    EXPECT_EQ(units.attached(), 0u);
    EXPECT_EQ(adapter.alive, 0u);
    sink.refuses.reset();
    adapter.at(0).units.clear();
    ASSERT_TRUE(scan());
    adapter.add(0, 1);
    adapter.no_memory = 1;
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.left.back(), "fake0 target 0 LUN 1: SCSI disk (no room)");
    EXPECT_EQ(adapter.alive, 0u);
    adapter.no_memory.reset();
    ASSERT_TRUE(scan());
    EXPECT_EQ(sink.disks.size(), 1u);
}

TEST_F(ScsiUnits, UnitsInUseAreLimited) {
    for (u16 lun = 0; lun < 129; ++lun) {
        adapter.add(0, lun);
        adapter.add(1, lun);
    }
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 256u);
    EXPECT_EQ(sink.left,
              (Strings{"fake0 target 1 LUN 127: SCSI disk (no room)", "fake0 target 1 LUN 128: SCSI disk (no room)"}));
    adapter.at(0).units.erase(7);
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 257u) << "a removed unit makes room";
}

// One silent unit does not hide the others; a target that answers nothing ends the scan soon.
TEST_F(ScsiUnits, Silence) {
    for (u16 lun = 0; lun < 6; ++lun) {
        adapter.add(0, lun);
        adapter.add(1, lun);
    }
    const Error silence{Code::timed_out, "no answer"};
    std::set<u16> silent{0};
    adapter.override_execute = [&](u8 target, u16 lun, const Cdb& cdb) -> std::optional<Result<void>> {
        return target == 0 && silent.contains(lun) && cdb.bytes[0] != report_luns ? std::optional(Result<void>(silence))
                                                                                  : std::nullopt;
    };
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 11u);
    EXPECT_EQ(sink.left, Strings{"fake0 target 0 LUN 0: SCSI disk (failed)"});
    silent = {2, 3}; // in use, and one has answered before them
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 12u) << "LUN 0 has come back";
    EXPECT_TRUE(log.has("fake0: 2 units do not answer: the units after LUN 3 are not scanned")) << log.text.view();
    EXPECT_TRUE(std::ranges::none_of(sink.disks, [](Lane* disk) { return disk->gone; }));
    silent = {0, 1, 2, 3, 4, 5};
    adapter.at(1).units.erase(5);
    ASSERT_TRUE(scan(2));
    EXPECT_TRUE(sink.disks.at(10)->gone) << "a silent target does not hide the other one";
    bool every = false;
    adapter.override_execute = [&](u8 target, u16, const Cdb&) -> std::optional<Result<void>> {
        EXPECT_LT(target, 2) << "the scan ends after two silent targets";
        return every ? std::optional(Result<void>(silence)) : std::nullopt;
    };
    every = true;
    EXPECT_TRUE(scan(4)) << "the disks in use stay";
    EXPECT_TRUE(log.has("fake0: 2 targets do not answer: the targets after 1 are not scanned"));
}

TEST_F(ScsiUnits, NothingButSilence) {
    adapter.override_execute = [&](u8, u16, const Cdb&) -> std::optional<Result<void>> {
        return Result<void>(Error{Code::timed_out, "no answer"});
    };
    const auto done = scan(4);
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, Code::timed_out);
}

TEST_F(ScsiUnits, AHostThatCloses) {
    adapter.add(0, 0);
    adapter.add(0, 1);
    adapter.add(1, 0);
    adapter.override_execute = [&](u8, u16 lun, const Cdb& cdb) -> std::optional<Result<void>> {
        if (lun == 1 && cdb.bytes[0] == test_unit_ready) {
            adapter.open = false;
            return Result<void>(Error{Code::device_gone, "closed"});
        }
        return std::nullopt;
    };
    const auto done = scan(2); // the adapter checks that nothing is sent any more
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, Code::device_gone);
    EXPECT_EQ(sink.disks.size(), 1u);
    EXPECT_TRUE(sink.left.empty()) << "the end is reported, not each unit";
}

TEST_F(ScsiUnits, ATargetThatCannotBeListedDoesNotHideTheOthers) {
    adapter.add(0, 0);
    adapter.add(1, 0);
    adapter.override_execute = [&](u8 target, u16, const Cdb&) -> std::optional<Result<void>> {
        return target == 0 ? std::optional(Result<void>(Error{Code::exhausted, "no memory for it"})) : std::nullopt;
    };
    EXPECT_FALSE(executor.run(units.scan_target(0)));
    ASSERT_TRUE(scan(2));
    EXPECT_EQ(sink.disks.size(), 1u);
    EXPECT_TRUE(log.has("warning: fake0: target 0: no memory for it")) << log.text.view();
}

} // namespace
