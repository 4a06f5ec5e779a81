#include "gtest_macros.hpp"
#include <cstdlib>
import test.gtest;
import host.std;
import core.result;
import core.log;
import core.text;
import core.time;
import core.dma;
import core.verdict;
import io.task;
import io.executor;
import io.block;
import hv.vm_guest;
import drivers.table;
import drivers.driver;
import boot.options;
import boot.devices;
import boot.disks;
import boot.sinks;
import boot.jobs;

namespace {
using namespace fl;

struct Capture final : log::Sink {
    std::string text;
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(const char* part) const { return text.find(part) != std::string::npos; }
};

struct HeapDma final : DmaAllocator {
    Result<DmaSpan> allocate(u32 size, u64) override {
        const u32 rounded = (size + 4095) & ~4095u;
        void* p = std::aligned_alloc(4096, rounded);
        std::memset(p, 0, rounded);
        return DmaSpan{static_cast<std::byte*>(p), reinterpret_cast<u64>(p), size};
    }
    void free(DmaSpan span) override { std::free(span.data); }
};

// An in-memory disk that completes at once; `fail_reads` reports an error, `corrupt` changes a byte of every read.
struct MemoryDisk final : io::BlockDevice {
    std::vector<std::byte> bytes;
    bool fail_reads = false;
    bool corrupt = false;
    MemoryDisk(io::Executor& executor, const char* name, u64 sectors) : BlockDevice(executor), bytes(sectors * 512) {
        identity_.name = FixedText<16>(name);
        identity_.driver = "memory";
        identity_.features = FixedText<96>("one two");
        geometry_.sectors = sectors;
        geometry_.flush = true;
    }
    void start(io::Request& r) override {
        if (r.op == io::Op::read && fail_reads) {
            return complete(r, io::Status::io_error);
        }
        std::byte* at = bytes.data() + r.lba * 512;
        if (r.op == io::Op::read) {
            std::memcpy(r.buffer.data, at, r.buffer.size);
            if (corrupt) {
                r.buffer.data[100] ^= std::byte{1};
            }
        } else if (r.op == io::Op::write) {
            std::memcpy(at, r.buffer.data, r.buffer.size);
        }
        complete(r, io::Status::ok);
    }
    bool cancel_now(io::Request&) override { return false; }
    void forget(io::Request&) override {}
};

struct Jobs : testing::Test {
    Instant clock = 0;
    io::Executor executor{
        io::Platform{&clock, [](void* c) { return *static_cast<Instant*>(c) += 100; },
                     [](void* c, Instant until, const std::atomic<bool>&) { *static_cast<Instant*>(c) = until; }}};
    HeapDma dma;
    drivers::Table table;
    drivers::Plan plan = table.plan(hv::VmGuest::xen, std::nullopt);
    boot::Attached attached{plan};
    boot::Disks& disks = attached.disks;
    boot::DriverSinks xen_blk{attached, "xen_blk"};
    boot::DriverSinks ata{attached, "ata"};
    boot::DriverDiskSink& synthetic = xen_blk.disks;
    boot::DriverDiskSink& native = ata.disks;
    MemoryDisk xvda{executor, "xvda", 2048};
    MemoryDisk hdb{executor, "hdb", 2048};
    Capture capture;

    bool clock_assumed = false;
    Nanoseconds clock_ahead = 0;

    boot::Outcome run(const char* cmdline) {
        boot::Options options;
        boot::OptionErrors errors;
        EXPECT_TRUE(boot::parse_options(cmdline, options, errors)) << cmdline;
        auto result = executor.run(boot::run_job(options, disks,
                                                 {.executor = executor,
                                                  .dma = dma,
                                                  .heap_allocations = [] { return u64{0}; },
                                                  .clock_assumed = clock_assumed,
                                                  .clock_ahead = clock_ahead}));
        EXPECT_TRUE(result);
        return *result;
    }
    void attach() {
        ASSERT_TRUE(synthetic.announce(xvda, 0));
        ASSERT_TRUE(native.announce(hdb, 1));
    }
};

TEST_F(Jobs, OneDiskAttachesOnce) {
    MemoryDisk hda{executor, "hda", 2048};
    EXPECT_TRUE(native.offered(0)); // not claimed yet: if a synthetic driver fails, the native one can have it
    ASSERT_TRUE(synthetic.announce(xvda, 0));
    EXPECT_FALSE(native.offered(0));
    EXPECT_TRUE(native.offered(1));
    EXPECT_FALSE(native.announce(hda, 0));
    EXPECT_EQ(disks.all().size(), 1u);
    EXPECT_TRUE(capture.has("\"record\":\"disk\",\"name\":\"xvda\""));
    EXPECT_TRUE(capture.has("\"features\":[\"one\",\"two\"]"));
}

TEST_F(Jobs, ANameIsFreeUntilAnyDriverAnnouncesADiskWithIt) {
    EXPECT_EQ(native.free_name("hd").view(), "hda");
    attach();
    EXPECT_EQ(synthetic.free_name("xvd").view(), "xvdb");
    EXPECT_EQ(native.free_name("xvd").view(), "xvdb");
    EXPECT_EQ(synthetic.free_name("hd").view(), "hda"); // only hdb is taken
    EXPECT_EQ(native.free_name("sd").view(), "sda");
}

TEST_F(Jobs, ADiskRemovedByTheHostMayBeReadded) {
    MemoryDisk again{executor, "xvdb", 2048};
    ASSERT_TRUE(synthetic.announce(xvda, 0));
    EXPECT_FALSE(synthetic.offered(0));
    native.withdraw(0); // it never had the device
    EXPECT_FALSE(synthetic.offered(0));
    synthetic.withdraw(drivers::DiskSink::no_twin);
    EXPECT_FALSE(synthetic.offered(0));
    synthetic.withdraw(0);
    EXPECT_TRUE(synthetic.offered(0));
    ASSERT_TRUE(synthetic.announce(again, 0));
    EXPECT_FALSE(synthetic.offered(0));
    EXPECT_FALSE(native.offered(0));
}

TEST_F(Jobs, TimesByAnAssumedClockAreMarked) {
    attach();
    EXPECT_EQ(run("job=boot").verdict, Verdict::success);
    const auto measured = run("job=bench disk=xvda workload=randread,count=4");
    EXPECT_EQ(measured.verdict, Verdict::success);
    EXPECT_EQ(measured.reason.view().find("assumed"), std::string_view::npos);
    EXPECT_FALSE(capture.has("assumed"));

    clock_assumed = true;
    EXPECT_EQ(run("job=boot").verdict, Verdict::success);
    EXPECT_NE(capture.text.find(",\"clock_assumed\":true}", capture.text.rfind("\"first_block\"")), std::string::npos);
    EXPECT_TRUE(capture.has("us after the entry (the clock's rate is assumed, not measured)"));
    const auto guessed = run("job=bench disk=xvda workload=randread,count=4");
    EXPECT_EQ(guessed.verdict, Verdict::success) << "the I/Os were done and counted";
    EXPECT_NE(guessed.reason.view().find("times are by an assumed clock"), std::string_view::npos);
    EXPECT_NE(capture.text.find("\"clock_assumed\":true", capture.text.rfind("\"record\":\"result\"")),
              std::string::npos);
    EXPECT_TRUE(capture.has("0 errors (the clock's rate is assumed, not measured)"));
}

TEST_F(Jobs, TheFirstBlockIsTimedFromTheEntryAlsoWhereTheClockRanAhead) {
    attach();
    clock = 10'000'000;
    clock_ahead = 9'000'000;
    EXPECT_EQ(run("job=boot").verdict, Verdict::success);
    const std::string before = "\"record\":\"first_block\",\"disk\":\"xvda\",\"ns\":";
    const auto at = capture.text.find(before);
    ASSERT_NE(at, std::string::npos);
    const u64 ns = std::strtoull(capture.text.c_str() + at + before.size(), nullptr, 10);
    EXPECT_GE(ns, 1'000'000u);
    EXPECT_LT(ns, 1'100'000u) << "a millisecond, not ten";
}

TEST_F(Jobs, BootReadsTheFirstBlockOfEveryDisk) {
    attach();
    EXPECT_EQ(run("job=boot").verdict, Verdict::success);
    EXPECT_EQ(xvda.counters().completed, 1u);
    EXPECT_EQ(hdb.counters().completed, 1u);
    EXPECT_TRUE(capture.has("\"record\":\"first_block\",\"disk\":\"xvda\""));
    EXPECT_EQ(capture.text.find("first_block"), capture.text.rfind("first_block"));
    hdb.fail_reads = true;
    EXPECT_EQ(run("job=boot").verdict, Verdict::failure);
}

TEST_F(Jobs, BootContinuesAfterABadDisk) {
    attach();
    const auto first = xvda.counters().completed;
    xvda.fail_reads = true;
    auto outcome = run("job=boot");
    EXPECT_EQ(outcome.verdict, Verdict::failure);
    EXPECT_EQ(outcome.reason, "xvda: block 0: the disk reports an error for this transfer");
    EXPECT_TRUE(capture.has("hdb: block 0 read"));
    EXPECT_TRUE(capture.has("\"record\":\"first_block\",\"disk\":\"hdb\"")) << "the first one that could be read";
    EXPECT_EQ(xvda.counters().completed, first + 1);
    hdb.fail_reads = true;
    outcome = run("job=boot");
    EXPECT_EQ(outcome.reason, "xvda: block 0: the disk reports an error for this transfer; hdb: block 0: the disk "
                              "reports an error for this transfer");
    EXPECT_TRUE(capture.has("error: hdb: i/o error: the disk reports an error for this transfer"));
}

TEST_F(Jobs, BenchRunsEveryWorkloadOnEveryChosenDisk) {
    attach();
    const auto outcome = run("job=bench workload=randread,count=50,qd=4 workload=read,bs=8k,count=10 disk=xvda");
    EXPECT_EQ(outcome.verdict, Verdict::success) << outcome.reason.view();
    EXPECT_EQ(xvda.counters().completed, 60u);
    EXPECT_EQ(hdb.counters().completed, 0u);
    EXPECT_TRUE(capture.has("\"workload\":\"randread\",\"bs\":4096,\"qd\":4,\"count\":50"));
}

TEST_F(Jobs, PhasesAreNumberedInTheOrderOfTheResults) {
    attach();
    static std::vector<u32> marks;
    marks.clear();
    boot::Options options;
    boot::OptionErrors errors;
    ASSERT_TRUE(boot::parse_options("job=bench workload=randread,count=5 workload=read,count=5", options, errors));
    const auto heap = [] { return u64{0}; };
    ASSERT_TRUE(executor.run(
        boot::run_job(options, disks, {executor, dma, heap, {}, [](u32 phase) { marks.push_back(phase); }})));
    EXPECT_EQ(marks, (std::vector<u32>{1, 0, 2, 0, 3, 0, 4, 0}));
}

TEST_F(Jobs, NothingIsWrittenOnADiskThatIsNoScratch) {
    attach();
    // The first workload only reads and would be harmless; the refusal precedes it.
    EXPECT_EQ(run("job=bench workload=randread,count=5 workload=randwrite,count=5 scratch=xvda").verdict,
              Verdict::error);
    EXPECT_EQ(xvda.counters().submitted + hdb.counters().submitted, 0u);
    EXPECT_TRUE(capture.has("hdb would be written"));
    EXPECT_EQ(run("job=bench workload=randwrite,count=5 disk=xvda scratch=xvda").verdict, Verdict::success);
    EXPECT_EQ(xvda.counters().submitted, 5u);
    EXPECT_EQ(run("job=verify").verdict, Verdict::error);
    EXPECT_EQ(hdb.counters().submitted, 0u);
}

TEST_F(Jobs, EverythingIsCheckedBeforeAnythingIsWritten) {
    attach();
    EXPECT_EQ(run("job=bench scratch=all workload=randwrite,count=5 workload=read,bs=4k,count=1000000").verdict,
              Verdict::error);
    EXPECT_EQ(xvda.counters().submitted + hdb.counters().submitted, 0u);
    EXPECT_TRUE(capture.has(
        "count of a workload: at most as many blocks of bs bytes as the disk has (expected 256, seen 1000000)"));
    MemoryDisk small{executor, "hdc", 16};
    ASSERT_TRUE(native.announce(small, 2));
    EXPECT_EQ(run("job=verify scratch=all bs=4k count=100").verdict, Verdict::error);
    EXPECT_EQ(xvda.counters().submitted + hdb.counters().submitted + small.counters().submitted, 0u);
}

TEST_F(Jobs, FailedTransfersFailTheJob) {
    attach();
    xvda.fail_reads = true;
    EXPECT_EQ(run("job=bench workload=randread,count=5 disk=xvda").verdict, Verdict::failure);
}

TEST_F(Jobs, VerifySeesACorruptDisk) {
    attach();
    EXPECT_EQ(run("job=verify scratch=all").verdict, Verdict::success);
    EXPECT_TRUE(capture.has("\"ok\":true"));
    hdb.corrupt = true;
    EXPECT_EQ(run("job=verify scratch=all generation=2").verdict, Verdict::failure);
    EXPECT_TRUE(capture.has("\"ok\":false"));
}

TEST_F(Jobs, OneIsNotSaidAsSeveral) {
    ASSERT_TRUE(synthetic.announce(xvda, 0));
    EXPECT_EQ(run("job=verify scratch=all bs=4k count=1").reason.view(), "1 disk verified");
    EXPECT_TRUE(capture.has("xvda: 1 block of 4096 bytes verified on 1 lane\n")) << capture.text;
    EXPECT_EQ(run("job=bench workload=randread,count=1").reason.view(), "1 workload, 0 failed I/Os");
    EXPECT_TRUE(capture.has(": 1 I/O in ")) << capture.text;
    xvda.fail_reads = true;
    EXPECT_EQ(run("job=bench workload=randread,count=1").reason.view(), "1 workload, 1 failed I/O");
    EXPECT_TRUE(capture.has(" us, 1 error\n")) << capture.text;
    ASSERT_TRUE(native.announce(hdb, 1));
    xvda.fail_reads = false;
    EXPECT_EQ(run("job=verify scratch=all bs=4k count=2").reason.view(), "2 disks verified");
    EXPECT_TRUE(capture.has("xvda: 2 blocks of 4096 bytes verified on 1 lane\n")) << capture.text;
}

TEST(NullDisks, AreThoseThatAreNamed) {
    using Names = std::vector<std::string_view>;
    EXPECT_EQ(boot::null_disks(Names{}), 0u);
    EXPECT_EQ(boot::null_disks(Names{"hda", "nul0", "null", "nullx", "null-1"}), 0u);
    EXPECT_EQ(boot::null_disks(Names{"null0"}), 1u);
    EXPECT_EQ(boot::null_disks(Names{"null3", "hda", "null1"}), 4u);
    EXPECT_EQ(boot::null_disks(Names{"null255"}), 256u);
    EXPECT_EQ(boot::null_disks(Names{"null256", "null99999999999999999999"}), 0u) << "reported as no such disk";
    EXPECT_EQ(boot::null_disks(Names{"null01", "null0x1", "null1k"}), 0u) << "another spelling is another name";
}

TEST_F(Jobs, SmallDisksAreShownInSmallUnits) {
    MemoryDisk tiny{executor, "xvdb", 1};
    MemoryDisk small{executor, "xvdc", 16};
    for (MemoryDisk* disk : {&xvda, &tiny, &small}) {
        ASSERT_TRUE(synthetic.announce(*disk, drivers::no_twin));
    }
    EXPECT_TRUE(capture.has("xvda: emulated disk by memory, 1 MiB, 512-byte sectors")) << capture.text;
    EXPECT_TRUE(capture.has("xvdb: emulated disk by memory, 512 bytes, 512-byte sectors")) << capture.text;
    EXPECT_TRUE(capture.has("xvdc: emulated disk by memory, 8 KiB, 512-byte sectors")) << capture.text;
    EXPECT_TRUE(capture.has("\"name\":\"xvdb\",\"driver\":\"memory\",\"kind\":\"emulated\",\"sectors\":1,"))
        << capture.text;
}

TEST_F(Jobs, UnknownNamesAreReportedWithTheExistingOnes) {
    attach();
    const auto outcome = run("job=bench disk=xvdb");
    EXPECT_EQ(outcome.verdict, Verdict::error);
    EXPECT_NE(std::string(outcome.reason.view()).find("disk=xvdb: no such disk; there are: xvda, hdb"),
              std::string::npos)
        << outcome.reason.view();
    EXPECT_EQ(run("job=bench workload=randreed").verdict, Verdict::error);
    EXPECT_EQ(run("job=verify bs=2m scratch=all").verdict, Verdict::error);
}

TEST_F(Jobs, WithoutADiskThereIsNothingToMeasure) {
    EXPECT_EQ(run("job=bench").verdict, Verdict::error);
    EXPECT_EQ(run("job=boot").verdict, Verdict::success);
}

TEST_F(Jobs, HundredsOfDisks) {
    std::vector<std::unique_ptr<MemoryDisk>> many;
    for (u32 i = 0; i < 300; ++i) {
        many.push_back(
            std::make_unique<MemoryDisk>(executor, ("sd" + std::string(drivers::drive_letters(i).view())).c_str(), 16));
        ASSERT_TRUE(synthetic.announce(*many.back(), drivers::no_twin));
    }
    EXPECT_NE(disks.find("sdkn"), nullptr);
    const auto outcome = run("job=boot");
    EXPECT_EQ(outcome.verdict, Verdict::success);
    EXPECT_FALSE(outcome.reason.truncated());
    EXPECT_NE(std::string(outcome.reason.view()).find("sda, sdb, "), std::string::npos);
    EXPECT_NE(std::string(outcome.reason.view()).find(" and 276 more"), std::string::npos) << outcome.reason.view();
    EXPECT_EQ(many.back()->counters().completed, 1u);
}

struct Listed : Jobs {
    boot::Devices devices;
    boot::Outcome run_with(const char* cmdline) {
        boot::Options options;
        boot::OptionErrors errors;
        EXPECT_TRUE(boot::parse_options(cmdline, options, errors)) << cmdline;
        boot::JobServices services{executor, dma, [] { return u64{0}; }};
        services.devices = &devices;
        auto result = executor.run(boot::run_job(options, disks, services));
        EXPECT_TRUE(result);
        return *result;
    }
    static boot::DeviceEntry entry(const char* address, std::optional<drivers::Unused> why, u32 on_it = 0) {
        boot::DeviceEntry e;
        e.bus.write("pci");
        e.address.write(address);
        e.what.write("NVMe controller");
        e.kind = boot::DeviceClass::disk;
        e.why = why;
        e.driver = why ? "" : "nvme";
        e.disks = on_it;
        return e;
    }
};

TEST_F(Listed, TheFirstBlockComesBeforeTheList) {
    attach();
    devices.add(entry("00:04.0", drivers::Unused::no_driver));
    EXPECT_EQ(run_with("job=boot").verdict, Verdict::success);
    const usize block = capture.text.find("\"record\":\"first_block\"");
    const usize listed = capture.text.find("\"record\":\"device\",\"bus\":\"pci\",\"address\":\"00:04.0\"");
    ASSERT_NE(block, std::string::npos);
    ASSERT_NE(listed, std::string::npos);
    EXPECT_LT(block, listed);
    EXPECT_EQ(capture.text.find("\"record\":\"device\""), capture.text.rfind("\"record\":\"device\"")) << "once";
    devices.add(entry("00:05.0", drivers::Unused::empty));
    EXPECT_TRUE(capture.has("\"address\":\"00:05.0\"")) << "later devices are reported immediately";
}

TEST_F(Listed, TheDriverThatHasTheSameDiskIsNamed) {
    boot::Attached shared{plan, &devices};
    boot::DriverSinks xen_blk_sinks{shared, "xen_blk"};
    boot::DriverSinks ata_sinks{shared, "ata"};
    boot::DriverDiskSink& ring = xen_blk_sinks.disks;
    boot::DriverDiskSink& ide = ata_sinks.disks;
    ASSERT_TRUE(ring.announce(xvda, 0));
    ASSERT_FALSE(ide.offered(0));
    ide.unused({"ide", "hda", "IDE disk", drivers::Unused::taken, {}, 0});
    devices.list();
    EXPECT_TRUE(capture.has("device ide hda, IDE disk: left to xen_blk, which has the same disk\n")) << capture.text;
    EXPECT_EQ(devices.failures(), 0u);
}

TEST_F(Listed, WithoutADiskTheVerdictSaysWhy) {
    devices.add(entry("00:01.1", std::nullopt, 0));
    devices.add(entry("00:04.0", drivers::Unused::no_driver));
    devices.add(entry("00:05.0", drivers::Unused::no_driver));
    devices.add(entry("00:06.0", drivers::Unused::empty));
    const std::string why =
        "of 4 devices that could be or have one: 2 no driver, 1 empty, 1 without disks; see the device lines";
    EXPECT_EQ(run_with("job=boot").reason.view(), "booted; disks: none (" + why + ")");
    EXPECT_TRUE(capture.has("\"address\":\"00:06.0\"")) << "the lines are there";
    const auto bench = run_with("job=bench");
    EXPECT_EQ(bench.verdict, Verdict::error);
    EXPECT_EQ(bench.reason.view(), "no disk was found: " + why);
    boot::Devices none;
    EXPECT_EQ(none.why_no_disk().view(), "no device that could be one was found");
    none.add(entry("00:06.0", drivers::Unused::empty));
    EXPECT_EQ(none.why_no_disk().view(), "of 1 device that could be or have one: 1 empty; see the device lines");
}
} // namespace
