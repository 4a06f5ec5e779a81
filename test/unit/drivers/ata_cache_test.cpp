// The write cache of a disk that is used without flushes: it is switched off, also after each reset.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"

#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;
import core.log;
import core.dma;
import io.block_queue;
import io.slots;
#include "unit/io/support.hpp"

namespace {
using namespace ata_test;

constexpr std::string_view warned = "hda: it has a volatile write cache, which is neither flushed";

struct Cached {
    Machine m;
    test::CapturedLog log;
    std::optional<ata::Controller<Ports>> controller;
    std::vector<std::unique_ptr<io::Request>> requests;

    void attach(bool withheld = true) {
        m.environment.withheld_features = withheld ? to_underlying(drivers::Feature::flush) : 0;
        controller.emplace(m.environment, Ports{&m.all});
        ASSERT_TRUE(m.executor.run(controller->attach(*pci::look_up(m.space, {0, 1, 1}))));
        m.primary.codes.clear();
    }
    DmaSpan buffer() { return *m.memory.allocate(4096, ~u64{0}); }
    Drive& drive(int unit) { return *m.primary.drives[unit]; }
};
struct AtaCache : testing::Test, Cached {};

TEST_F(AtaCache, AWriteIsStableWhenItEnds) {
    m.add(m.primary, 0);
    attach();
    EXPECT_FALSE(m.disk(0).geometry().flush);
    ASSERT_TRUE(m.write(m.disk(0), 8, buffer()));
    EXPECT_TRUE(drive(0).is_flushed);
    EXPECT_FALSE(log.has(warned));
}

TEST_F(AtaCache, ADiskWithoutFlushCommandsIsTreatedAlike) {
    m.add(m.primary, 0).id.words[83] = 0x4400; // 48 bits, no FLUSH CACHE
    attach(false);
    EXPECT_TRUE(drive(0).cache_off);
    EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 write-through words");
    EXPECT_FALSE(log.has(warned));
}

TEST_F(AtaCache, OneThatIsOffIsLeftAlone) {
    m.add(m.primary, 0).id.words[85] = 0x4000;
    attach();
    EXPECT_FALSE(drive(0).cache_off);
    EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 words");
    EXPECT_FALSE(log.has(warned));
}

TEST_F(AtaCache, ARefusalIsReportedAndTheDiskUsed) {
    m.add(m.primary, 0).keeps_cache = true;
    attach();
    EXPECT_TRUE(log.has(warned));
    EXPECT_EQ(m.disk(0).identity().features.view(), "udma5 lba48 words");
    EXPECT_TRUE(m.read(m.disk(0), 40, buffer()));
    EXPECT_EQ(m.primary.codes, (std::vector<u8>{0xc8}));
}

TEST_F(AtaCache, OnlyTheDiskThatNeedsItIsSet) {
    m.add(m.primary, 0).id.words[85] = 0x4000;
    m.add(m.primary, 1);
    attach();
    EXPECT_FALSE(drive(0).cache_off);
    EXPECT_TRUE(drive(1).cache_off);
}

// Also after the reset that the second device's silence causes while both are set up.
TEST_F(AtaCache, BothDisksAfterTheResetOfTheSetUp) {
    m.add(m.primary, 0);
    m.add(m.primary, 1);
    m.primary.hang_code = 0xec;
    m.primary.hang_unit = 1;
    attach();
    EXPECT_EQ(m.primary.resets, 1u);
    EXPECT_TRUE(drive(0).cache_off && drive(1).cache_off);
}

TEST(AtaCaches, BothDisksAfterAReset) {
    for (const bool native : {false, true}) {
        Cached t;
        if (native) {
            t.m.set_native();
        }
        t.m.add(t.m.primary, 0);
        t.m.add(t.m.primary, 1);
        t.attach();
        t.m.primary.hang = 1;
        EXPECT_FALSE(t.m.read(t.m.disk(0), 8, t.buffer()));
        EXPECT_TRUE(t.m.write(t.m.disk(1), 16, t.buffer()));
        EXPECT_EQ(t.m.primary.resets, 1u);
        EXPECT_EQ(t.m.primary.codes, (std::vector<u8>{0xc8, 0xef, 0xef, 0xca}));
        EXPECT_TRUE(t.drive(0).cache_off && t.drive(1).cache_off && t.drive(1).is_flushed);
        EXPECT_TRUE(t.m.write(t.m.disk(0), 16, t.buffer())) << "its interrupts are on again";
        EXPECT_EQ(t.controller->queue(0)->lost_interrupts(), 0u);
    }
}

// A reset that the disk does not survive as it was set is repeated; after the third in a row the channel is closed.
TEST_F(AtaCache, ARefusalAfterAResetIsTriedAgainAndThenCloses) {
    m.add(m.primary, 0);
    attach();
    m.primary.hang_code = 0xc8;
    m.primary.refuse_features = 2;
    EXPECT_FALSE(m.read(m.disk(0), 8, buffer()));
    EXPECT_TRUE(m.write(m.disk(0), 16, buffer()));
    EXPECT_EQ(m.primary.resets, 3u);
    EXPECT_TRUE(drive(0).is_flushed);

    m.primary.hang = 1;
    drive(0).keeps_cache = true;
    EXPECT_FALSE(m.read(m.disk(0), 8, buffer()));
    EXPECT_EQ(m.write(m.disk(0), 24, buffer()).error().code, Code::device_gone);
    EXPECT_TRUE(controller->queue(0)->closed());
    EXPECT_EQ(m.primary.resets, 3u + 3);
    EXPECT_TRUE(log.has("closed: the disk does not switch off its write cache after a reset (SET FEATURES 82h)"));
    EXPECT_FALSE(drive(0).written.contains(24));
}

TEST_F(AtaCache, SilenceAfterAResetIsBounded) {
    m.add(m.primary, 0);
    attach();
    m.primary.hang = 1000;
    const Instant begin = m.clock.time;
    EXPECT_FALSE(m.read(m.disk(0), 8, buffer()));
    EXPECT_EQ(m.write(m.disk(0), 24, buffer()).error().code, Code::device_gone);
    EXPECT_TRUE(controller->queue(0)->closed());
    EXPECT_LE(m.clock.time - begin, 2'000'000'000u);
    EXPECT_FALSE(drive(0).written.contains(24));
}

TEST_F(AtaCache, SilenceDuringTheSetUpIsAFailure) {
    m.add(m.primary, 0);
    m.primary.hang_code = 0xef;
    attach();
    EXPECT_TRUE(m.sink.disks.empty());
    EXPECT_EQ(m.sink.left.at("hda"), drivers::Unused::failed);
}

} // namespace
