#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import core.log;
import core.cpuid;
import io.executor;
import io.task;
import io.block;
import hv.xen;
import drivers.driver;
import drivers.xen_blk;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_blk_fake.hpp"

namespace {
using namespace fl;
using drivers::Feature;
using fake::Blkback;
using fake::DiskMachine;
using fake::Offer;
using Violation = Blkback::Violation;
constexpr u32 without(Feature f) { return to_underlying(f); }

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    std::string text;
};

// Writes random ranges, reads everything back in other ranges, compares with a model and with the image.
void verify(DiskMachine& m, u32 rounds = 60) {
    io::BlockDevice& disk = m.disk();
    const u32 sector = disk.geometry().sector_size;
    const u64 sectors = disk.geometry().sectors;
    std::mt19937_64 random(7);
    const std::span<std::byte> image = m.back.disk.bytes();
    std::vector<std::byte> model(image.begin(), image.end());
    DmaSpan buffer = m.buffer(512 * 1024);
    for (u32 i = 0; i < rounds; ++i) {
        const u64 lba = random() % sectors;
        const u32 count = static_cast<u32>(
            std::min<u64>({1 + random() % (i % 3 == 0 ? 400 : 20), sectors - lba, 400u * 512 / sector}));
        // not page-aligned if that is allowed
        const u32 shift = static_cast<u32>(random() % 8 * 512 / sector * sector);
        DmaSpan span = buffer.subspan(shift, count * sector);
        for (std::byte& b : span.bytes()) {
            b = static_cast<std::byte>(random());
        }
        if (i % 2 == 0) {
            std::memcpy(model.data() + lba * sector, span.data, span.size);
            ASSERT_TRUE(m.run(fake::write(disk, lba, span)));
        } else {
            ASSERT_TRUE(m.run(fake::read(disk, lba, span)));
            ASSERT_EQ(std::memcmp(model.data() + lba * sector, span.data, span.size), 0) << lba << "+" << count;
        }
    }
    EXPECT_TRUE(std::ranges::equal(model, image));
    EXPECT_EQ(m.back.bad_grants, 0u);
    EXPECT_TRUE(m.run(fake::flush(disk)));
}

TEST(XenBlkProtocol, GoldenBytes) {
    using namespace drivers::xen_blk;
    auto bytes = [](const auto& v) { return std::string(reinterpret_cast<const char*>(&v), sizeof v); };
    DirectRequest r{};
    r.header = {Operation::write, 2, 0xca00, 0, 0x1122334455667788, 0x99};
    r.segments[1] = {0x01020304, 3, 7, 0};
    std::string golden("\x01\x02\x00\xca\0\0\0\0\x88\x77\x66\x55\x44\x33\x22\x11\x99\0\0\0\0\0\0\0", 24);
    golden += std::string("\0\0\0\0\0\0\0\0\x04\x03\x02\x01\x03\x07\0\0", 16);
    EXPECT_EQ(bytes(r).substr(0, 40), golden);
    IndirectRequest i{Operation::indirect, Operation::read, 32, 0, 5, 6, 0xca00, 0, {0x0a0b0c0d}, 0};
    EXPECT_EQ(bytes(i).substr(0, 32),
              std::string("\x06\0\x20\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x00\xca\0\0\x0d\x0c\x0b\x0a", 32));
    Response a;
    std::memcpy(&a, "\x07\0\0\0\0\0\0\0\x03\0\xfe\xff\0\0\0\0", 16);
    EXPECT_EQ(a.id, 7u);
    EXPECT_EQ(a.operation, Operation::flush);
    EXPECT_EQ(a.status, -2);
}

struct Variant {
    const char* name;
    Offer offer;
    u32 withheld = 0;
    std::string_view features;
    u32 domain = 0; // of the back end
};
class XenBlkVariant : public testing::TestWithParam<Variant> {};

TEST_P(XenBlkVariant, VerifiesAndLeavesNothingGranted) {
    const Variant& v = GetParam();
    DiskMachine m(v.offer, v.withheld, 51712, v.domain);
    auto probed = m.probe();
    ASSERT_TRUE(probed) << probed.error().message;
    ASSERT_NE(m.sink.disk, nullptr);
    EXPECT_EQ(m.disk().identity().features.view(), v.features);
    EXPECT_EQ(m.disk().identity().name.view(), "xvda");
    EXPECT_EQ(m.sink.slot, 0u);
    EXPECT_EQ(m.back.state(), 4u);
    EXPECT_EQ(m.back.front_state(), 4u);
    const u32 before = m.xen.live_grants();
    verify(m);
    EXPECT_EQ(m.xen.live_grants(), before) << "what was granted for a request is taken back";
    EXPECT_EQ(m.disk().counters().device_accesses, 0u);
}

const Variant variants[] = {
    {"nothing", {.flush = false}, 0, "ring-pages=1"},
    {"flush", {}, 0, "flush ring-pages=1"},
    {"barrier_only", {.flush = false, .barrier = true}, 0, "barrier ring-pages=1"},
    {"everything",
     {.barrier = true, .discard = true, .persistent = true, .indirect = 256, .ring_order = 4},
     0,
     "flush discard persistent indirect ring-pages=4"},
    {"persistent", {.persistent = true}, 0, "flush persistent ring-pages=1"},
    {"indirect", {.indirect = 256}, 0, "flush indirect ring-pages=1"},
    {"few_indirect", {.indirect = 20}, 0, "flush indirect ring-pages=1"},
    {"useless_indirect", {.indirect = 8}, 0, "flush ring-pages=1"},
    {"four_pages", {.ring_order = 2}, 0, "flush ring-pages=4"},
    {"order_0", {.ring_order = 0}, 0, "flush ring-pages=1"},
    {"old_ring_keys", {.ring_pages = 2}, 0, "flush ring-pages=2"},
    {"sectors_4096", {.sector_size = 4096}, 0, "flush ring-pages=1"},
    {"sectors_4096_all",
     {.sector_size = 4096, .persistent = true, .indirect = 32, .ring_order = 1},
     0,
     "flush persistent indirect ring-pages=2"},
    {"all_withheld",
     {.barrier = true, .persistent = true, .indirect = 256, .ring_order = 4},
     without(Feature::persistent) | without(Feature::indirect) | without(Feature::ring_pages) |
         without(Feature::flush) | without(Feature::barrier),
     "ring-pages=1"},
    {"flush_withheld", {.barrier = true}, without(Feature::flush), "barrier ring-pages=1"},
    {"garbage",
     {.extra = {{"feature-barrier", "yes"},
                {"feature-max-indirect-segments", "-3"},
                {"physical-sector-size", "many"},
                {"feature-persistent", "99999999999999999999999999"},
                {"info", ""}}},
     0,
     "flush ring-pages=1"},
    {"missing",
     {.extra = {{"feature-barrier", "-"}, {"feature-flush-cache", "-"}, {"feature-persistent", "-"}, {"info", "-"}}},
     0,
     "ring-pages=1"},
    {"slow", {.slow_states = 30}, 0, "flush ring-pages=1"},
    {"driver_domain", {.indirect = 256, .ring_order = 4}, 0, "flush indirect ring-pages=4", 3},
    {"driver_domain_persistent",
     {.persistent = true, .indirect = 256, .ring_order = 4},
     0,
     "flush persistent indirect ring-pages=4",
     3},
};
INSTANTIATE_TEST_SUITE_P(All, XenBlkVariant, testing::ValuesIn(variants),
                         [](const auto& info) { return info.param.name; });

TEST(XenBlk, PublishesWhatTheBackEndReads) {
    DiskMachine plain({.ring_order = 0});
    ASSERT_TRUE(plain.probe());
    EXPECT_TRUE(plain.back.has_front("ring-ref"));
    EXPECT_FALSE(plain.back.has_front("ring-page-order"));
    EXPECT_EQ(plain.xen.get(plain.back.front + "/feature-persistent"), "1");
    DiskMachine large({.ring_order = 9}, without(Feature::persistent));
    ASSERT_TRUE(large.probe());
    EXPECT_FALSE(large.back.has_front("ring-ref"));
    EXPECT_FALSE(large.back.has_front("num-ring-pages"));
    EXPECT_EQ(large.back.front_number("ring-page-order"), 2u);
    EXPECT_TRUE(large.back.has_front("ring-ref3"));
    EXPECT_EQ(large.xen.get(large.back.front + "/feature-persistent"), "0");
    DiskMachine old({.ring_pages = 16});
    ASSERT_TRUE(old.probe());
    EXPECT_EQ(old.back.front_number("num-ring-pages"), 4u);
}

TEST(XenBlk, GeometryInUnitsOfTheDisk) {
    DiskMachine m(
        {.sectors = 8 * 1000 + 5, .sector_size = 4096, .read_only = true, .extra = {{"physical-sector-size", "4096"}}});
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.disk().geometry().sectors, 1000u);
    EXPECT_EQ(m.disk().geometry().sector_size, 4096u);
    EXPECT_TRUE(m.disk().geometry().read_only);
    const DmaSpan buffer = m.buffer(8192);
    EXPECT_EQ(m.run(fake::write(m.disk(), 0, buffer)).error().code, Code::bad_argument);
    EXPECT_EQ(m.run(fake::read(m.disk(), 0, buffer.subspan(512, 4096))).error().code, Code::bad_argument)
        << "a segment must be aligned, too";
    std::memset(m.back.disk.data() + 999 * 4096, 0x5a, 4096);
    ASSERT_TRUE(m.run(fake::read(m.disk(), 999, buffer.subspan(0, 4096))));
    EXPECT_EQ(buffer.data[4095], std::byte{0x5a});
    DiskMachine r({.extra = {{"mode", "r"}}});
    ASSERT_TRUE(r.probe());
    EXPECT_TRUE(r.disk().geometry().read_only);
}

TEST(XenBlk, ImpossibleDisksAreRefused) {
    for (const auto& [key, value] : std::vector<std::pair<std::string, std::string>>{{"sectors", "0"},
                                                                                     {"sectors", "-"},
                                                                                     {"sectors", "x"},
                                                                                     {"sectors", "99999999999999999"},
                                                                                     {"sector-size", "-"},
                                                                                     {"sector-size", "520"},
                                                                                     {"sector-size", "8192"},
                                                                                     {"sector-size", "256"}}) {
        SCOPED_TRACE(key + "=" + value);
        DiskMachine m({.extra = {{key, value}}});
        // A disk with an unsupported size is skipped with "not supported"; anything else is an error.
        static_cast<void>(m.probe());
        EXPECT_EQ(m.sink.disk, nullptr);
        EXPECT_EQ(m.back.front_state(), 6u);
        EXPECT_EQ(m.xen.live_grants(), 0u);
        EXPECT_FALSE(m.xen.open_ports.contains(m.back.port));
        EXPECT_EQ(m.xen.memory.outstanding, fake::backend_pages * 4096)
            << "only the shared page and the grant table are left";
    }
}

TEST(XenBlk, CdromsAndUnknownDevicesAreNotUsed) {
    DiskMachine cdrom({.device_type = "cdrom"});
    EXPECT_TRUE(cdrom.probe());
    EXPECT_EQ(cdrom.sink.disk, nullptr);
    EXPECT_EQ(cdrom.back.front_state(), 1u) << "untouched";
    using Left = std::vector<std::pair<std::string, drivers::Unused>>;
    EXPECT_EQ(cdrom.sink.left, (Left{{"51712", drivers::Unused::not_a_disk}}));
    DiskMachine empty({.extra = {{"sectors", "0"}}});
    EXPECT_TRUE(empty.probe()) << "a disk of 0 bytes is no failure";
    EXPECT_EQ(empty.sink.left, (Left{{"51712", drivers::Unused::empty}}));
    EXPECT_EQ(empty.back.front_state(), 6u);
    DiskMachine sixth({}, 0, 51792); // xvdf: the last one that an AHCI HBA can show
    ASSERT_TRUE(sixth.probe());
    EXPECT_EQ(sixth.sink.slot, 5u);
    DiskMachine seventh({}, 0, 51808); // xvdg: neither at an IDE controller nor at an AHCI HBA
    ASSERT_TRUE(seventh.probe());
    EXPECT_EQ(seventh.sink.slot, drivers::DiskSink::no_twin);
    DiskMachine strange({}, 0, 4711);
    EXPECT_TRUE(strange.probe());
    EXPECT_TRUE(strange.sink.asked.empty());
    EXPECT_EQ(strange.sink.left, (Left{{"4711", drivers::Unused::failed}}));
    DiskMachine taken({});
    taken.sink.offer = false;
    EXPECT_TRUE(taken.probe());
    EXPECT_EQ(taken.back.front_state(), 1u);
    EXPECT_EQ(taken.sink.left, (Left{{"51712", drivers::Unused::taken}}));
    DiskMachine busy({});
    busy.sink.refuse = true;
    EXPECT_EQ(busy.probe().error().code, Code::busy);
    EXPECT_EQ(busy.back.front_state(), 6u);
    EXPECT_EQ(busy.xen.live_grants(), 0u);
    DiskMachine scsi({}, 0, 2048);
    ASSERT_TRUE(scsi.probe());
    EXPECT_EQ(scsi.sink.slot, drivers::DiskSink::no_twin);
    DiskMachine hdc({}, 0, 5632);
    ASSERT_TRUE(hdc.probe());
    EXPECT_EQ(hdc.sink.slot, 2u);
}

// Each change of the state wakes the wait for it, so that the wait itself never times out.
TEST(XenBlk, FollowsANewSize) {
    for (const u32 sector : {512u, 4096u}) {
        // its medium has room to grow
        DiskMachine m({.sectors = 8 * 2100, .sector_size = sector, .extra = {{"sectors", "8000"}}});
        ASSERT_TRUE(m.probe());
        const u64 unit = m.disk().geometry().sectors == 1000 ? 8 : 1; // "sectors" counts units of 512 bytes, or sectors
        const auto change = [&](u64 sectors) {
            m.back.put("sectors", sectors);
            m.back.go(4);
            EXPECT_TRUE(m.run(fake::sleep(m.executor, 50'000'000)));
            return m.disk().geometry().sectors;
        };
        EXPECT_EQ(change(8 * 2000 + 7), (8 * 2000 + 7) / unit) << "grown";
        const DmaSpan buffer = m.buffer(4096);
        EXPECT_TRUE(m.run(fake::read(m.disk(), (8 * 1500) / unit, buffer))) << "beyond the old end";
        EXPECT_EQ(change(8 * 500), (8 * 500) / unit) << "shrunk";
        EXPECT_EQ(m.run(fake::read(m.disk(), (8 * 500) / unit, buffer)).error().code, Code::bad_argument);
        EXPECT_EQ(change(~u64{0}), (8 * 500) / unit) << "nonsense";
        m.xen.tree[m.back.back + "/sectors"] = "x";
        m.back.go(4);
        EXPECT_TRUE(m.run(fake::sleep(m.executor, 50'000'000)));
        EXPECT_EQ(m.disk().geometry().sectors, (8 * 500) / unit) << "not a number";
    }
}

TEST(XenBlk, ABackEndThatChangesItsStateForEverIsBounded) {
    DiskMachine m({.never_connects = true});
    u32 state = 1;
    u32 changes = 0; // limited, so that the test ends without the bound, too
    bool ended = false;
    m.world.device = [&] {
        const bool worked = m.back.step();
        if (!ended && m.back.state() < 4 && ++changes < 50'000) {
            m.back.go(state = 3 - state); // Initialising, InitWait
            m.world.now += 100'000;
            return true;
        }
        return worked;
    };
    const Instant before = m.world.now;
    const auto probed = m.probe();
    ended = true;
    ASSERT_FALSE(probed);
    EXPECT_EQ(probed.error().code, Code::timed_out);
    EXPECT_NE(probed.error().message.find("does not settle"), std::string_view::npos) << probed.error().message;
    EXPECT_LT(m.world.now - before, 3'000'000'000u);
}

TEST(XenBlk, ABackEndThatDoesNotConnectIsBounded) {
    for (int variant = 0; variant < 3; ++variant) {
        Offer offer{.never_connects = variant < 2, .closes_instead = variant == 2};
        DiskMachine m(offer);
        m.back.never_closes = variant == 1;
        const Instant before = m.world.now;
        const auto probed = m.probe();
        ASSERT_FALSE(probed);
        EXPECT_EQ(probed.error().code, variant == 2 ? Code::device_gone : Code::timed_out);
        EXPECT_LT(m.world.now - before, 1'500'000'000u);
        EXPECT_EQ(m.sink.disk, nullptr);
        if (variant != 1) {
            EXPECT_EQ(m.xen.live_grants(), 0u);
        }
    }
}

TEST(XenBlk, ConnectsAfterAPreviousFrontEnd) {
    DiskMachine m({});
    m.xen.tree[m.back.front + "/state"] = "4"; // a loader left it connected
    ASSERT_TRUE(m.probe());
    verify(m, 6);
}

TEST(XenBlk, FlushDiscardAndTheirRefusal) {
    DiskMachine m({.barrier = true, .discard = true});
    ASSERT_TRUE(m.probe());
    EXPECT_TRUE(m.run(fake::flush(m.disk())));
    EXPECT_EQ(m.back.served[3], 1u);
    EXPECT_EQ(m.back.served[2], 0u);
    std::memset(m.back.disk.data(), 0xff, m.back.disk.size());
    const DmaSpan buffer = m.buffer(8192);
    EXPECT_TRUE(m.run(fake::discard(m.disk(), 16, buffer)));
    EXPECT_EQ(m.back.disk.data()[16 * 512], std::byte{0});
    EXPECT_EQ(m.back.disk.data()[31 * 512 + 511], std::byte{0});
    EXPECT_EQ(m.back.disk.data()[32 * 512], std::byte{0xff});
    EXPECT_EQ(m.back.disk.data()[15 * 512], std::byte{0xff});
    m.back.refuse_flush = true;
    EXPECT_EQ(m.run(fake::flush(m.disk())).error().code, Code::not_supported);
    DiskMachine barrier({.flush = false, .barrier = true});
    ASSERT_TRUE(barrier.probe());
    EXPECT_TRUE(barrier.run(fake::flush(barrier.disk())));
    EXPECT_EQ(barrier.back.served[2], 1u);
    EXPECT_EQ(barrier.run(fake::discard(barrier.disk(), 0, buffer)).error().code, Code::not_supported);
}

TEST(XenBlk, ASecureDiscardIsSentOnlyWhereItIsOffered) {
    DiskMachine m({.discard = true, .extra = {{"discard-secure", "1"}}});
    ASSERT_TRUE(m.probe());
    EXPECT_TRUE(m.disk().geometry().secure_discard);
    EXPECT_EQ(m.disk().identity().features.view(), "flush discard secure-discard ring-pages=1");
    std::memset(m.back.disk.data(), 0xff, m.back.disk.size());
    EXPECT_TRUE(m.run(fake::secure_discard(m.disk(), 16, 8192)));
    EXPECT_EQ(m.back.secure_served, 1u);
    EXPECT_EQ(m.back.disk.data()[16 * 512], std::byte{0});
    EXPECT_EQ(m.back.disk.data()[31 * 512 + 511], std::byte{0});
    EXPECT_EQ(m.back.disk.data()[32 * 512], std::byte{0xff});
    EXPECT_TRUE(m.run(fake::discard(m.disk(), 16, m.buffer(4096))));
    EXPECT_EQ(m.back.secure_served, 1u) << "a plain one stays plain";
    // Anything but an offer, the other one withheld, or a write-protected disk: refused without asking the back end.
    const struct {
        fake::Offer offer;
        u32 withheld;
        bool discards;
        Code expected = Code::not_supported;
    } others[] = {
        {{.discard = true}, 0, true},
        {{.discard = true, .extra = {{"discard-secure", "0"}}}, 0, true},
        {{.discard = true, .extra = {{"discard-secure", "yes"}}}, 0, true},
        {{.extra = {{"discard-secure", "1"}}}, 0, false},
        {{.discard = true, .extra = {{"discard-secure", "1"}}}, without(Feature::secure_discard), true},
        {{.discard = true, .read_only = true, .extra = {{"discard-secure", "1"}}}, 0, false, Code::bad_argument},
    };
    for (const auto& other : others) {
        DiskMachine without_it(other.offer, other.withheld);
        ASSERT_TRUE(without_it.probe());
        EXPECT_EQ(without_it.disk().geometry().discard, other.discards);
        EXPECT_FALSE(without_it.disk().geometry().secure_discard);
        EXPECT_EQ(without_it.run(fake::secure_discard(without_it.disk(), 16, 8192)).error().code, other.expected);
        EXPECT_EQ(without_it.back.served[5], 0u);
    }
    DiskMachine only_secure({.discard = true, .extra = {{"discard-secure", "1"}}}, without(Feature::discard));
    ASSERT_TRUE(only_secure.probe());
    EXPECT_FALSE(only_secure.disk().geometry().discard);
    EXPECT_TRUE(only_secure.run(fake::secure_discard(only_secure.disk(), 16, 8192)));
}

TEST(XenBlk, SplitsIntoParts) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    const DmaSpan buffer = m.buffer(132 * 1024);
    ASSERT_TRUE(m.run(fake::read(m.disk(), 0, buffer.subspan(0, 128 * 1024))));
    EXPECT_EQ(m.back.served[0], 3u) << "11 + 11 + 10 pages";
    EXPECT_EQ(m.back.segment_count, 32u);
    ASSERT_TRUE(m.run(fake::read(m.disk(), 0, buffer.subspan(512, 128 * 1024))));
    EXPECT_EQ(m.back.served[0], 6u);
    EXPECT_EQ(m.back.segment_count, 32u + 33u) << "one page more; the parts meet where pages meet";
    DiskMachine i({.indirect = 256});
    ASSERT_TRUE(i.probe());
    ASSERT_TRUE(i.run(fake::read(i.disk(), 0, i.buffer(128 * 1024))));
    EXPECT_EQ(i.back.served[6], 1u);
    ASSERT_TRUE(i.run(fake::read(i.disk(), 0, i.buffer(44 * 1024))));
    EXPECT_EQ(i.back.served[0], 1u) << "what fits into a slot needs no page of segments";
}

TEST(XenBlk, ABackEndWithPersistentGrantsMapsEverythingForWriting) {
    DiskMachine m({.sectors = 8192, .persistent = true, .indirect = 256, .ring_order = 4});
    ASSERT_TRUE(m.probe());
    const DmaSpan buffer = m.buffer(512 * 1024);
    for (u32 i = 0; i < buffer.size; ++i) {
        buffer.data[i] = static_cast<std::byte>(i * 7 >> 3);
    }
    // 44 KiB: the largest request without a page of segments
    for (const u32 size : {44u * 1024, 48u * 1024, 128u * 1024, 512u * 1024}) {
        ASSERT_TRUE(m.run(fake::write(m.disk(), 8, buffer.subspan(0, size))));
        ASSERT_EQ(std::memcmp(m.back.disk.data() + 8 * 512, buffer.data, size), 0);
        const DmaSpan into = m.buffer(size);
        ASSERT_TRUE(m.run(fake::read(m.disk(), 8, into)));
        ASSERT_EQ(std::memcmp(into.data, buffer.data, size), 0);
    }
    EXPECT_EQ(m.back.indirect_served, 12u);
    EXPECT_EQ(m.xen.bad_maps, 0u);
    for (const auto& [ref, write] : m.back.kept) {
        EXPECT_TRUE(write);
    }
}

TEST(XenBlk, APoolThatTheBackEndDoesNotUseIsFreed) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    EXPECT_EQ(m.xen.live_grants(), 1u) << "only the ring";
    EXPECT_EQ(m.guest.grants().available(), 8 * 512u - 8 - 1);
    EXPECT_EQ(m.xen.memory.outstanding, (fake::backend_pages + 1) * 4096);
    DiskMachine kept({.persistent = true});
    ASSERT_TRUE(kept.probe());
    EXPECT_EQ(kept.xen.live_grants(), 1u + 352u) << "as many as a ring of 32 slots can use";
}

// ---- many disks ----

struct ManyDisks : fake::Machine {
    explicit ManyDisks(u32 count, const Offer& offer, usize bytes = 96u << 20) : Machine(bytes), sinks(count) {
        for (u32 i = 0; i < count; ++i) {
            numbers.push_back(i < 16 ? 51712 + 16 * i : 268435456 + 256 * i);
            backs.push_back(std::make_unique<Blkback>(xen, offer, numbers.back()));
        }
        world.device = [this] {
            bool did = false;
            for (auto& back : backs) {
                did = back->step() || did;
            }
            return did;
        };
    }
    /// The number of announced disks.
    u32 probe() {
        EXPECT_TRUE(install());
        EXPECT_TRUE(start());
        u32 attached = 0;
        for (usize i = 0; i < backs.size(); ++i) {
            environments.push_back(std::make_unique<drivers::Environment>(executor, xen.memory, xen.interrupts,
                                                                          sinks[i], 200'000'000, withheld));
            hv::SyntheticDevice device;
            device.type.write("vbd");
            device.address.write(std::to_string(numbers[i]));
            device.number = numbers[i];
            obtainable.push_back(guest.grants().obtainable());
            const u32 live = xen.live_grants();
            const auto probed = run(drivers::xen_blk::probe(*environments[i], guest, device));
            EXPECT_TRUE(probed) << i << ": " << probed.error().message;
            taken.push_back(xen.live_grants() - live);
            attached += sinks[i].disk != nullptr;
        }
        return attached;
    }
    bool persistent(u32 i) {
        return sinks[i].disk->identity().features.view().find("persistent") != std::string_view::npos;
    }
    void use_all() {
        const DmaSpan out = *xen.memory.allocate(300 * 1024, ~u64{0});
        const DmaSpan in = *xen.memory.allocate(300 * 1024, ~u64{0});
        for (u32 i = 0; i < backs.size(); ++i) {
            std::memset(out.data, static_cast<int>(i + 1), out.size);
            ASSERT_TRUE(run(fake::write(*sinks[i].disk, 16, out)));
            ASSERT_TRUE(run(fake::read(*sinks[i].disk, 16, in)));
            ASSERT_EQ(std::memcmp(in.data, out.data, in.size), 0) << i;
            EXPECT_EQ(backs[i]->disk.data()[16 * 512 + 300 * 1024 - 1], static_cast<std::byte>(i + 1));
        }
        EXPECT_EQ(xen.bad_maps, 0u);
    }
    std::vector<u32> numbers;
    std::vector<std::unique_ptr<Blkback>> backs;
    std::vector<fake::Sink> sinks;
    std::vector<std::unique_ptr<drivers::Environment>> environments;
    std::vector<u32> obtainable; // grants left before each disk
    std::vector<u32> taken;      // grants kept by each disk: ring, pool, pages of segments
    u32 withheld = 0;
};

const Offer linux_offer{.sectors = 2048, .persistent = true, .indirect = 256, .ring_order = 4};

TEST(XenBlkMany, TwentyFourDisksWithAllThatTheyCanUse) {
    ManyDisks m(24, linux_offer);
    EXPECT_EQ(m.probe(), 24u);
    for (u32 i = 0; i < 24; ++i) {
        EXPECT_EQ(m.sinks[i].disk->identity().features.view(), "flush persistent indirect ring-pages=4") << i;
    }
    EXPECT_EQ(m.xen.live_grants(), 24 * (4u + 512 + 64));
    EXPECT_LE(m.xen.frames_of_grants(), 28u) << "the table grows as needed";
    m.use_all();
}

TEST(XenBlkMany, WhereGrantsAreFewPoolsAreSmallerAndThenThereAreNone) {
    for (const u32 frames : {1u, 8u}) {
        SCOPED_TRACE(frames);
        ManyDisks m(24, linux_offer);
        m.xen.grant_frames_limit = m.xen.grant_frames_given = frames;
        EXPECT_EQ(m.probe(), 24u);
        EXPECT_TRUE(m.persistent(0));
        EXPECT_FALSE(m.persistent(23));
        EXPECT_EQ(m.xen.get(m.backs[0]->front + "/feature-persistent"), "1");
        EXPECT_EQ(m.xen.get(m.backs[23]->front + "/feature-persistent"), "0") << "and the back end is notified";
        m.use_all();
        EXPECT_GE(m.guest.grants().available(), 32u) << "something is left for buffers";
    }
}

// The first few disks must not take everything. A pool grows by 32 pages; one with fewer is not created.
TEST(XenBlkMany, NoDiskTakesMoreThanItsShareOfTheGrantsThatAreLeft) {
    constexpr u32 ring = 4;
    for (const u32 frames : {1u, 8u}) {
        SCOPED_TRACE(frames);
        ManyDisks pools(24, linux_offer, 40u << 20);
        pools.withheld = without(Feature::indirect);
        pools.xen.grant_frames_limit = pools.xen.grant_frames_given = frames;
        ASSERT_EQ(pools.probe(), 24u);
        u32 persistent = 0;
        for (u32 i = 0; i < 24; ++i) {
            const u32 eighth = (pools.obtainable[i] - ring) / 8;
            EXPECT_EQ(pools.persistent(i), eighth >= 32) << i;
            const u32 pool = pools.taken[i] - ring;
            EXPECT_EQ(pool % 32, 0u) << i;
            EXPECT_LE(pool, eighth) << i;
            EXPECT_GT(pool + 64, std::min(eighth, 512u)) << i << ": and less for no reason";
            persistent += pools.persistent(i) ? 1 : 0;
        }
        EXPECT_GE(persistent, std::min(24u, frames * 2)) << "an eighth each, and not all for the first ones";

        ManyDisks segments(24, linux_offer, 40u << 20);
        segments.withheld = without(Feature::persistent);
        segments.xen.grant_frames_limit = segments.xen.grant_frames_given = frames;
        ASSERT_EQ(segments.probe(), 24u);
        for (u32 i = 0; i < 24; ++i) {
            EXPECT_EQ(segments.taken[i] - ring, std::min((segments.obtainable[i] - ring) / 32, 64u)) << i;
        }
    }
}

TEST(XenBlkMany, WhereMemoryIsShortPoolsAreSmallerAndThenThereAreNone) {
    ManyDisks m(9, linux_offer, 6u << 20);
    m.xen.memory.reuse = true;
    EXPECT_EQ(m.probe(), 9u);
    EXPECT_TRUE(m.persistent(0));
    EXPECT_FALSE(m.persistent(8));
    EXPECT_GE(m.xen.memory.left(), 100u * 1024) << "for a job's buffers";
    m.xen.memory.reuse = false;
}

TEST(XenBlkMany, ADiskWithoutPersistentGrantsWorksWithTheFewThatAreLeft) {
    DiskMachine m({.sectors = 8192, .indirect = 256}, without(Feature::persistent));
    ASSERT_TRUE(m.probe());
    auto& grants = m.guest.grants();
    for (const u32 left : {40u, 12u, 3u, 1u}) {
        SCOPED_TRACE(left);
        std::vector<u32> taken;
        while (grants.available() > left) {
            taken.push_back(grants.take_unchecked());
        }
        const DmaSpan out = m.buffer(132 * 1024).subspan(512, 128 * 1024);
        std::memset(out.data, static_cast<int>(left), out.size);
        ASSERT_TRUE(m.run(fake::write(m.disk(), 0, out)));
        const DmaSpan in = m.buffer(132 * 1024).subspan(1024, 128 * 1024);
        ASSERT_TRUE(m.run(fake::read(m.disk(), 0, in)));
        EXPECT_EQ(std::memcmp(in.data, out.data, in.size), 0);
        EXPECT_EQ(grants.available(), left);
        for (const u32 ref : taken) {
            grants.recycle(ref);
        }
    }
    // None left: the table grows.
    std::vector<u32> taken;
    while (grants.available() != 0) {
        taken.push_back(grants.take_unchecked());
    }
    const u32 obtainable = grants.obtainable();
    EXPECT_TRUE(m.run(fake::read(m.disk(), 0, m.buffer(4096))));
    EXPECT_GT(grants.available(), 0u);
    EXPECT_EQ(grants.obtainable(), obtainable);
    // Exhausted: an error within the bound, then operation continues.
    while (grants.ensure(1)) {
        taken.push_back(grants.take_unchecked());
    }
    EXPECT_FALSE(m.run(fake::read(m.disk(), 0, m.buffer(4096))));
    for (const u32 ref : taken) {
        grants.recycle(ref);
    }
    EXPECT_EQ(m.xen.bad_maps, 0u);
}

// The ring has as many pages as there are grants for besides the 64 that are left to others.
TEST(XenBlkMany, WhereGrantsAreFewTheRingIsSmaller) {
    struct Row {
        u32 left;
        u32 pages;
    };
    for (const auto& [left, pages] : {Row{68, 4}, Row{67, 2}, Row{66, 2}, Row{65, 1}, Row{20, 1}}) {
        SCOPED_TRACE(left);
        DiskMachine m({.ring_order = 4}, without(Feature::persistent) | without(Feature::indirect));
        m.xen.grant_frames_limit = m.xen.grant_frames_given = 1;
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
        auto& grants = m.guest.grants();
        std::vector<u32> taken;
        while (grants.available() > left) {
            taken.push_back(grants.take_unchecked());
        }
        ASSERT_EQ(grants.available(), left);
        ASSERT_TRUE(m.run(drivers::xen_blk::probe(m.environment, m.guest, m.device)));
        EXPECT_EQ(m.back.pages, pages);
        EXPECT_EQ(grants.available(), left - pages);
        FixedText<32> text;
        print(text, "ring-pages={}", pages);
        EXPECT_NE(m.disk().identity().features.view().find(text.view()), std::string_view::npos)
            << m.disk().identity().features.view();
        EXPECT_TRUE(m.run(fake::read(m.disk(), 0, m.buffer(4096))));
        for (const u32 ref : taken) {
            grants.recycle(ref);
        }
    }
}

// The requests that wait for grants end; the disk stays open, because its back end has done nothing wrong.
TEST(XenBlkMany, WithoutGrantsRequestsTimeOutAndTheDiskStays) {
    Capture capture;
    DiskMachine m({}, without(Feature::persistent));
    m.xen.grant_frames_limit = m.xen.grant_frames_given = 1;
    ASSERT_TRUE(m.probe());
    auto& grants = m.guest.grants();
    std::vector<u32> taken;
    while (grants.ensure(1)) {
        taken.push_back(grants.take_unchecked());
    }
    const DmaSpan buffer = m.buffer(3 * 4096);
    std::vector<std::unique_ptr<io::BlockDevice::Transfer>> waiting;
    for (u32 i = 0; i < 3; ++i) {
        waiting.push_back(std::make_unique<io::BlockDevice::Transfer>(m.disk(), i == 1 ? io::Op::write : io::Op::read,
                                                                      8 * i, buffer.subspan(i * 4096, 4096)));
        m.disk().submit(*waiting.back());
    }
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 180'000'000))); // of 200 ms
    EXPECT_TRUE(std::ranges::all_of(waiting, [](const auto& t) { return t->pending(); }));
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 50'000'000))); // a tick for each
    for (const auto& transfer : waiting) {
        EXPECT_EQ(transfer->status, io::Status::timed_out);
        EXPECT_FALSE(transfer->buffer_lost) << "the back end has never seen it";
    }
    EXPECT_NE(capture.text.find("no grant entries became free for a request within the time-out"), std::string::npos)
        << capture.text;
    EXPECT_EQ(capture.text.find("closed"), std::string::npos) << capture.text;
    for (const u32 ref : taken) {
        grants.recycle(ref);
    }
    EXPECT_TRUE(m.run(fake::read(m.disk(), 0, buffer)));
    EXPECT_TRUE(m.run(fake::write(m.disk(), 0, buffer)));
    EXPECT_EQ(m.xen.bad_maps, 0u);
}

// ---- many at once ----

struct Load {
    io::BlockDevice& disk;
    u32 each;
    u32 bytes;
    bool writes;
    u32 failed = 0;
    Code code = Code::busy;
};
io::Task<Result<void>> worker(Load& load, DmaSpan buffer, u32 seed) {
    std::minstd_rand random(seed + 1);
    const u64 places = load.disk.geometry().sectors * load.disk.geometry().sector_size / load.bytes;
    const u64 step = load.bytes / load.disk.geometry().sector_size;
    for (u32 i = 0; i < load.each; ++i) {
        const u64 lba = random() % places * step;
        const auto done = load.writes ? co_await load.disk.write(lba, buffer) : co_await load.disk.read(lba, buffer);
        if (!done) {
            ++load.failed;
            load.code = done.error().code;
            co_return Result<void>{};
        }
    }
    co_return Result<void>{};
}
struct Figures {
    io::Counters counters;
    u64 frames = 0;
};
io::Task<Result<void>> run_load(DiskMachine& m, Load& load, u32 depth, Figures& figures) {
    co_await m.executor.sleep(1'000'000); // the driver has looked at the back end's last state
    io::TaskGroup group(m.executor);
    for (u32 i = 0; i < depth; ++i) {
        if (auto s = group.spawn(worker(load, m.buffer(load.bytes), i)); !s) {
            co_return s;
        }
    }
    const io::Counters before = load.disk.counters();
    const u64 frames = io::frame_pool().allocations();
    auto joined = co_await group.join();
    figures = {load.disk.counters() - before, io::frame_pool().allocations() - frames};
    co_return joined;
}

TEST(XenBlk, OneEventEachWayPerTransferAtDepthOne) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    Load load{m.disk(), 500, 4096, false};
    Figures f;
    ASSERT_TRUE(m.run(run_load(m, load, 1, f)));
    EXPECT_EQ(f.counters.completed, 500u);
    EXPECT_EQ(f.counters.notifications, 500u);
    EXPECT_EQ(f.counters.hypercalls, 500u);
    EXPECT_EQ(f.counters.interrupts, 500u);
    EXPECT_EQ(f.counters.errors, 0u);
    EXPECT_EQ(f.frames, 0u) << "no coroutine frame per transfer";
    EXPECT_LE(m.back.all_refs.size(), 1u) << "the same grant again and again";
}

TEST(XenBlk, OneEventForAllPartsOfATransfer) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    Load load{m.disk(), 100, 128 * 1024, false};
    Figures f;
    ASSERT_TRUE(m.run(run_load(m, load, 1, f)));
    EXPECT_EQ(m.back.served[0], 300u);
    EXPECT_EQ(f.counters.notifications, 100u);
    EXPECT_EQ(f.counters.interrupts, 100u);
}

TEST(XenBlk, EventsAreRareAtDepth32) {
    for (int variant = 0; variant < 4; ++variant) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.back.lazy = variant % 2 != 0;
        Load load{m.disk(), 100, 4096, variant >= 2};
        Figures f;
        ASSERT_TRUE(m.run(run_load(m, load, 32, f)));
        EXPECT_EQ(f.counters.completed, 3200u);
        EXPECT_LE(f.counters.notifications, 320u);
        EXPECT_LE(f.counters.interrupts, 320u);
        EXPECT_EQ(f.counters.hypercalls, f.counters.notifications);
        EXPECT_EQ(f.frames, 0u);
    }
}

TEST(XenBlk, OneSlowAnswerDoesNotKeepTheOthersWaiting) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.silent_for = 1;
    Load load{m.disk(), 200, 4096, false};
    Figures f;
    const Instant before = m.world.now;
    ASSERT_TRUE(m.run(run_load(m, load, 8, f)));
    EXPECT_EQ(load.failed, 1u) << "the one that is never answered";
    EXPECT_EQ(f.counters.completed, 7 * 200u + 1);
    // Otherwise every batch would wait for a tick: 200 times 10 ms.
    EXPECT_LT(m.world.now - before, 400'000'000u);
}

TEST(XenBlk, MoreThanTheRingHolds) {
    for (Offer offer : {Offer{}, Offer{.persistent = true}, Offer{.indirect = 256, .ring_order = 2},
                        Offer{.persistent = true, .indirect = 64}}) {
        DiskMachine m(offer);
        ASSERT_TRUE(m.probe());
        m.back.at_once = 5;
        m.back.lazy = true;
        Load load{m.disk(), 6, 256 * 1024, false};
        Figures f;
        ASSERT_TRUE(m.run(run_load(m, load, 24, f)));
        EXPECT_EQ(load.failed, 0u);
        EXPECT_EQ(f.counters.completed, 144u);
        if (offer.persistent) {
            EXPECT_LE(m.back.all_refs.size(), 512u);
        }
    }
}

// ---- a back end that misbehaves ----

TEST(XenBlkHostile, TheFirstBrokenRuleClosesTheDisk) {
    struct Case {
        Violation violation;
        const char* rule;
    };
    for (const Case& c :
         {Case{Violation::unknown_id, "id that is not in flight"},
          Case{Violation::repeated_id, "id that is not in flight"}, Case{Violation::far_ahead, "ring is broken"},
          Case{Violation::behind, "ring is broken"}, Case{Violation::wrong_operation, "another operation"},
          Case{Violation::bad_status, "status that the block interface"},
          Case{Violation::unasked, "id that is not in flight"}}) {
        SCOPED_TRACE(c.rule);
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        Capture log;
        m.back.after_good = 50;
        m.back.violation = c.violation;
        Load load{m.disk(), 100, 4096, false};
        Figures f;
        const Instant before = m.world.now;
        ASSERT_TRUE(m.run(run_load(m, load, 8, f)));
        EXPECT_EQ(load.failed, 8u) << "every request ends";
        EXPECT_TRUE(load.code == Code::protocol || load.code == Code::device_gone);
        EXPECT_LT(m.world.now - before, 150'000'000u) << "at once";
        const usize closed = log.text.find("xvda: closed");
        ASSERT_NE(closed, std::string::npos) << log.text;
        EXPECT_EQ(log.text.find("xvda: closed", closed + 1), std::string::npos) << "one line";
        EXPECT_NE(log.text.find(c.rule), std::string::npos) << log.text;
        EXPECT_EQ(m.run(fake::read(m.disk(), 0, m.buffer(4096))).error().code, Code::device_gone);
        ASSERT_TRUE(m.run(fake::sleep(m.executor, 500'000'000))); // the keeper removes it from the bus
        EXPECT_EQ(m.back.front_state(), 6u);
        EXPECT_EQ(m.xen.live_grants(), 0u);
    }
}

TEST(XenBlkHostile, AnAnswerThatChangesAfterwardsChangesNothing) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    Capture log;
    m.back.hold = true;
    constexpr u64 count = 4;
    std::array<DmaSpan, count> buffers;
    std::array<std::optional<io::BlockDevice::Transfer>, count> reads;
    for (u64 i = 0; i < count; ++i) {
        std::memset(m.back.disk.data() + i * 4096, static_cast<int>(0x21 + i), 4096);
        buffers[i] = m.buffer(4096);
        reads[i].emplace(m.disk(), io::Op::read, i * 8, buffers[i]);
        m.disk().submit(*reads[i]);
    }
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 1'000'000)));
    ASSERT_EQ(m.back.held().size(), count);
    // Each response is overwritten once the driver has taken it, while the others are still awaited.
    for (u64 i = 0; i < count; ++i) {
        const u32 slot = m.back.rsp_prod;
        m.back.answer(0, 0);
        ASSERT_TRUE(m.run(fake::sleep(m.executor, 20'000'000)));
        ASSERT_FALSE(reads[i]->pending());
        ASSERT_EQ(reads[i]->status, io::Status::ok) << log.text;
        std::memset(m.back.slot(slot), 0xee, 16);
        ASSERT_TRUE(m.run(fake::sleep(m.executor, 20'000'000)));
    }
    for (u64 i = 0; i < count; ++i) {
        EXPECT_EQ(reads[i]->status, io::Status::ok) << i;
        EXPECT_FALSE(reads[i]->buffer_lost) << i;
        EXPECT_TRUE(std::ranges::all_of(buffers[i].bytes(), [&](std::byte b) { return b == std::byte(0x21 + i); }))
            << i;
    }
    EXPECT_EQ(m.disk().counters().completed, count);
    EXPECT_EQ(m.disk().counters().errors, 0u);
    EXPECT_EQ(log.text.find("closed"), std::string::npos) << log.text;
    m.back.hold = false;
    EXPECT_TRUE(m.run(fake::read(m.disk(), 0, buffers[0]))) << "the disk is open";
}

TEST(XenBlkHostile, ErrorsAreTheRequestsOwn) {
    DiskMachine m({.indirect = 256});
    ASSERT_TRUE(m.probe());
    m.back.fail_sector = 100;
    EXPECT_EQ(m.run(fake::read(m.disk(), 0, m.buffer(256 * 1024))).error().code, Code::io) << "one part of several";
    EXPECT_EQ(m.run(fake::read(m.disk(), 96, m.buffer(4096))).error().code, Code::io);
    EXPECT_TRUE(m.run(fake::read(m.disk(), 104, m.buffer(4096))));
    EXPECT_EQ(m.disk().counters().errors, 2u);
}

TEST(XenBlkHostile, AStormOfEventsIsSurvived) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    u64 storm = 0;
    m.world.device = [&] {
        const bool did = m.back.step();
        if (m.back.ring != nullptr && storm < 100'000) {
            ++storm;
            m.xen.raise(m.back.port);
            return true;
        }
        return did;
    };
    Load load{m.disk(), 50, 4096, false};
    Figures f;
    ASSERT_TRUE(m.run(run_load(m, load, 4, f)));
    EXPECT_EQ(load.failed, 0u);
    const u64 before = m.disk().counters().interrupts;
    const Instant then = m.world.now;
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 100'000'000)));
    const u64 ticks = (m.world.now - then) / io::Executor::tick_length + 2;
    EXPECT_LE(m.disk().counters().interrupts - before, ticks * (drivers::xen_blk::Lane::max_idle_events + 1));
    EXPECT_TRUE(m.run(fake::read(m.disk(), 0, m.buffer(4096))));
}

TEST(XenBlkHostile, ALateAnswerIsRecognisedByItsId) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.silent_for = 1;
    const DmaSpan buffer = m.buffer(4096);
    io::BlockDevice::Transfer lost(m.disk(), io::Op::read, 0, buffer);
    m.disk().submit(lost);
    for (int i = 0; i < 30; ++i) { // others are completed meanwhile: the back end is not dead
        ASSERT_TRUE(m.run(fake::read(m.disk(), 8, m.buffer(4096))));
        ASSERT_TRUE(m.run(fake::sleep(m.executor, 10'000'000)));
    }
    EXPECT_FALSE(lost.pending());
    EXPECT_EQ(lost.status, io::Status::timed_out);
    EXPECT_FALSE(lost.buffer_lost) << "the grant could be ended: no domain can write there any more";
    ASSERT_EQ(m.back.withheld.size(), 1u);
    m.back.respond(m.back.withheld[0].first, m.back.withheld[0].second, 0);
    ASSERT_TRUE(m.run(fake::read(m.disk(), 8, m.buffer(4096))));
    m.back.respond(m.back.withheld[0].first, m.back.withheld[0].second, 0); // but not twice
    EXPECT_FALSE(m.run(fake::read(m.disk(), 8, m.buffer(4096))));
}

TEST(XenBlkHostile, AMappedBufferIsLostWhenTheRequestTimesOut) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold_grants = true;
    m.back.dead = false;
    m.back.silent_for = 1000;
    const DmaSpan buffer = m.buffer(4096);
    io::BlockDevice::Transfer lost(m.disk(), io::Op::read, 0, buffer);
    m.disk().submit(lost);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 400'000'000)));
    EXPECT_FALSE(lost.pending());
    EXPECT_EQ(lost.status, io::Status::timed_out);
    EXPECT_TRUE(lost.buffer_lost);
    EXPECT_EQ(m.run(fake::read(m.disk(), 0, m.buffer(4096))).error().code, Code::device_gone)
        << "a dead back end closes the disk";
}

TEST(XenBlkHostile, ABufferThatIsAnsweredAndStillMappedIsLost) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.hold_grants = true;
    const DmaSpan buffer = m.buffer(4096);
    io::BlockDevice::Transfer t(m.disk(), io::Op::read, 0, buffer);
    m.disk().submit(t);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 20'000'000)));
    EXPECT_EQ(t.status, io::Status::ok);
    EXPECT_TRUE(t.buffer_lost);
    EXPECT_EQ(m.guest.grants().in_quarantine(), 1u);
}

TEST(XenBlkHostile, ABufferThatIsMappedWhenTheDiskClosesIsLost) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.silent_for = 1000;
    const DmaSpan buffer = m.buffer(4096);
    io::BlockDevice::Transfer free(m.disk(), io::Op::read, 0, buffer);
    m.disk().submit(free);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 10'000'000)));
    m.back.hold_grants = true;
    const DmaSpan other = m.buffer(4096);
    io::BlockDevice::Transfer held(m.disk(), io::Op::read, 0, other);
    m.disk().submit(held);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 10'000'000)));
    ASSERT_EQ(m.back.withheld.size(), 2u);
    m.back.never_closes = true;
    m.back.offer.never_connects = true; // and does not confirm that it has released the memory
    m.back.put("online", 0);
    m.back.go(5);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 50'000'000)));
    EXPECT_FALSE(free.pending());
    EXPECT_FALSE(free.buffer_lost) << "no domain can map it any more";
    EXPECT_FALSE(held.pending());
    EXPECT_TRUE(held.buffer_lost);
    EXPECT_EQ(m.xen.live_grants(), 2u) << "the ring, and what is mapped";
}

// The back end is silent: memory that it may still read in the ring, or have mapped, is not reused.
TEST(XenBlkHostile, MemoryThatABackEndDoesNotReleaseIsNotReused) {
    for (const bool persistent : {false, true}) {
        DiskMachine m({.persistent = persistent});
        ASSERT_TRUE(m.probe());
        m.back.dead = true;
        m.back.never_closes = true;
        m.back.offer.never_connects = true;
        auto& grants = m.guest.grants();
        const u32 before = grants.available();
        const u64 memory = m.xen.memory.outstanding;
        const DmaSpan buffer = m.buffer(4096);
        io::BlockDevice::Transfer t(m.disk(), io::Op::read, 0, buffer);
        m.disk().submit(t);
        ASSERT_TRUE(m.run(fake::sleep(m.executor, 1'500'000'000))); // closes, requests a close, gives up
        EXPECT_FALSE(t.pending());
        EXPECT_EQ(m.back.front_state(), 6u);
        EXPECT_LE(grants.available(), before - (persistent ? 0 : 1)) << "an entry in the ring";
        EXPECT_GE(m.xen.memory.outstanding, memory) << "the ring's page and the pool's";
        EXPECT_EQ(m.xen.live_grants(), persistent ? 353u : 1u);
    }
}

// The back end reports that it has closed, with one page of the ring, of the pool, or with segments still mapped.
TEST(XenBlkHostile, PagesThatAreMappedAfterTheBackEndClosedAreNotReused) {
    enum class Page { none, ring, pool, indirect };
    const auto lost = [](Page page, bool persistent) {
        DiskMachine m({.persistent = persistent, .indirect = 64});
        EXPECT_TRUE(m.probe());
        const DmaSpan buffer = m.buffer(64 * 1024);
        m.back.hold_grants = true;
        EXPECT_TRUE(m.run(fake::read(m.disk(), 0, buffer)));
        EXPECT_EQ(m.back.indirect_served, 1u);
        for (const auto& [ref, write] : m.back.kept) {
            const bool ring = std::ranges::find(m.back.refs, ref) != m.back.refs.end();
            const bool data = m.back.all_refs.contains(ref);
            if (page == (ring ? Page::ring : data ? Page::pool : Page::indirect)) {
                m.back.never_unmapped.insert(ref);
                break;
            }
        }
        EXPECT_EQ(m.back.never_unmapped.size(), page == Page::none ? 0u : 1u);
        m.back.put("online", 0);
        m.back.go(5);
        EXPECT_TRUE(m.run(fake::sleep(m.executor, 500'000'000)));
        EXPECT_EQ(m.back.front_state(), 6u);
        EXPECT_EQ(m.back.state(), 6u);
        for (const u32 ref : m.back.never_unmapped) {
            EXPECT_NE(m.xen.grant_flags(ref) & 3, 0) << "the grant of a mapped page stays";
        }
        return m.xen.memory.outstanding / 4096;
    };
    for (const bool persistent : {false, true}) {
        const u64 none = lost(Page::none, persistent);
        const u64 indirect = lost(Page::indirect, persistent) - none;
        EXPECT_EQ(lost(Page::ring, persistent) - none, 1u) << "the ring has one page";
        if (persistent) {
            EXPECT_EQ(indirect, lost(Page::pool, persistent) - none) << "all pages of the disk";
            EXPECT_GE(indirect, 352u);
        } else {
            EXPECT_EQ(indirect, 32u) << "one page for each slot of the ring";
        }
    }
}

TEST(XenBlkHostile, ARequestThatIsPartlyIssuedAndTimesOutEndsOnce) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.dead = true;
    const u64 completed = m.disk().counters().completed;
    const DmaSpan buffer = m.buffer(2 * 1024 * 1024);
    io::BlockDevice::Transfer t(m.disk(), io::Op::read, 0, buffer);
    m.disk().submit(t);
    ASSERT_TRUE(m.run(fake::sleep(m.executor, 1'000'000'000)));
    EXPECT_EQ(t.status, io::Status::timed_out);
    EXPECT_EQ(m.disk().counters().completed - completed, 1u);
}

TEST(XenBlkHostile, ADeadBackEndClosesTheDiskWithinTheBound) {
    DiskMachine m({.persistent = true});
    ASSERT_TRUE(m.probe());
    m.back.dead = true;
    Load load{m.disk(), 100, 64 * 1024, true};
    Figures f;
    const Instant before = m.world.now;
    ASSERT_TRUE(m.run(run_load(m, load, 40, f)));
    EXPECT_EQ(load.failed, 40u);
    EXPECT_LT(m.world.now - before, 450'000'000u);
}

TEST(XenBlkHostile, ABackEndThatClosesEndsEverything) {
    for (u32 state : {5u, 6u, 0u, 77u}) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.back.silent_for = 4;
        bool closed = false;
        m.world.device = [&] {
            if (m.back.withheld.size() == 4 && !std::exchange(closed, true)) {
                m.back.put("online", 0);
                m.back.go(state);
                return true;
            }
            return m.back.step();
        };
        Load load{m.disk(), 1, 4096, false};
        Figures f;
        const Instant before = m.world.now;
        ASSERT_TRUE(m.run(run_load(m, load, 4, f)));
        EXPECT_EQ(load.failed, 4u);
        if (state == 77) {
            EXPECT_EQ(load.code, Code::timed_out) << "a state without a meaning means nothing";
        } else {
            EXPECT_EQ(load.code, Code::device_gone);
            EXPECT_LT(m.world.now - before, 150'000'000u) << "at once";
        }
    }
}

// ---- time ----

// The machine is stopped for longer than the time-out while requests are with the back end; afterwards both continue.
TEST(XenBlkTime, AStoppedMachineIsNoSilentBackEnd) {
    for (const bool persistent : {false, true}) {
        for (const bool writes : {false, true}) {
            for (const u32 depth : {1u, 32u}) {
                for (const Nanoseconds length :
                     {Nanoseconds{1'000'000'000}, Nanoseconds{7'000'000'000}, Nanoseconds{60'000'000'000}}) {
                    Capture capture;
                    DiskMachine m({.persistent = persistent});
                    ASSERT_TRUE(m.probe());
                    u32 stops = 0;
                    Instant next = 0;
                    u32 stopped_before = ~0u; // the request after which the last stop occurred: one stop per request
                    m.world.device = [&] {
                        const bool asked = m.back.ring != nullptr && m.back.req_cons != m.back.word(0);
                        if (stops < 3 && asked && m.world.now >= next && stopped_before != m.back.req_cons) {
                            ++stops;
                            stopped_before = m.back.req_cons;
                            m.world.now += length;           // the time-out is 200 ms
                            next = m.world.now + 60'000'000; // and the back end needs a while as well
                            return true;
                        }
                        return m.world.now < next ? false : m.back.step();
                    };
                    Load load{m.disk(), 5, 4096, writes};
                    Figures f;
                    ASSERT_TRUE(m.run(run_load(m, load, depth, f)));
                    EXPECT_EQ(load.failed, 0u) << capture.text;
                    EXPECT_GE(stops, 1u);
                    EXPECT_EQ(capture.text.find("closed"), std::string::npos) << capture.text;
                    EXPECT_TRUE(m.run(fake::read(m.disk(), 16, m.buffer(4096))));
                }
            }
        }
    }
}

// Stops of less than a second, one per request; the back end needs nearly the whole time-out for each and is stopped
// together with the machine.
TEST(XenBlkTime, ShortStopsOfASlowBackEndLoseNothing) {
    for (const Nanoseconds limit : {Nanoseconds{500'000'000}, Nanoseconds{5'000'000'000}}) {
        for (const u32 depth : {1u, 32u}) {
            for (const Nanoseconds length :
                 {Nanoseconds{200'000'000}, Nanoseconds{600'000'000}, Nanoseconds{1'000'000'000}}) {
                for (const Nanoseconds when :
                     {Nanoseconds{10'000'000}, Nanoseconds{250'000'000}, Nanoseconds{440'000'000}}) {
                    Capture capture;
                    DiskMachine m({});
                    m.environment.timeout = limit;
                    ASSERT_TRUE(m.probe());
                    m.back.at_once = 1;
                    u32 stops = 0;
                    bool works = false;
                    Instant done = 0;
                    Instant stop_at = never;
                    m.world.device = [&] {
                        if (m.back.ring == nullptr || m.back.req_cons == m.back.word(0)) {
                            return m.back.step();
                        }
                        if (!std::exchange(works, true)) {
                            done = m.world.now + limit - 50'000'000;
                            stop_at = m.world.now + when;
                        }
                        if (m.world.now >= stop_at) {
                            ++stops;
                            m.world.now += length;
                            done += length;
                            stop_at = never;
                        }
                        if (m.world.now < done) {
                            return false;
                        }
                        works = false;
                        return m.back.step();
                    };
                    Load load{m.disk(), 1, 4096, true};
                    Figures f;
                    ASSERT_TRUE(m.run(run_load(m, load, depth, f)));
                    EXPECT_EQ(load.failed, 0u) << limit << ", " << length << " after " << when << capture.text;
                    EXPECT_GE(stops, depth);
                    EXPECT_EQ(capture.text.find("closed"), std::string::npos) << capture.text;
                }
            }
        }
    }
}

// 32 requests at once, one completion every 150 ms: the last one after 24 time-outs.
TEST(XenBlkTime, ASlowBackEndIsNeverClosed) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.at_once = 1;
    Instant next = 0;
    m.world.device = [&] {
        if (m.world.now < next) {
            return false;
        }
        const bool did = m.back.step();
        next = did ? m.world.now + 150'000'000 : next;
        return did;
    };
    const Instant before = m.world.now;
    Load load{m.disk(), 2, 4096, true};
    Figures f;
    ASSERT_TRUE(m.run(run_load(m, load, 32, f)));
    EXPECT_EQ(load.failed, 0u);
    EXPECT_GE(m.world.now - before, 9'000'000'000u);
}

TEST(XenBlkTime, ADeadBackEndIsFoundInMachineTimeAlsoWithStops) {
    for (const u32 stops : {1u, 5u}) {
        DiskMachine m({});
        ASSERT_TRUE(m.probe());
        m.back.dead = true;
        u32 left = stops;
        Instant next = m.world.now + 100'000'000;
        m.world.device = [&] {
            if (left != 0 && m.world.now >= next) {
                --left;
                m.world.now += 7'000'000'000;
                next = m.world.now + 100'000'000;
                return true;
            }
            return m.back.step();
        };
        const Instant before = m.executor.now();
        Load load{m.disk(), 1, 4096, false};
        Figures f;
        ASSERT_TRUE(m.run(run_load(m, load, 40, f))); // eight of them get no slot
        EXPECT_EQ(load.failed, 40u);
        EXPECT_LE(m.executor.now() - before, 2 * 200'000'000u + MachineTime::longest_step + 30'000'000)
            << stops << " stops";
        EXPECT_EQ(m.run(fake::read(m.disk(), 0, m.buffer(4096))).error().code, Code::device_gone);
    }
}

// Abandoned requests keep their slots. Requests waiting for a slot are still handled.
TEST(XenBlkTime, SlotsThatAreNeverFreedCloseTheDisk) {
    Capture capture;
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.silent_for = 1000;
    const DmaSpan buffer = m.buffer(4096);
    for (u32 i = 0; i < 32; ++i) { // all slots of the ring, with abandoned requests
        io::BlockDevice::Transfer lost(m.disk(), io::Op::read, 0, buffer);
        m.disk().submit(lost);
        m.executor.turn();
    }
    const Instant before = m.executor.now();
    const auto read = m.run(fake::read(m.disk(), 8, m.buffer(4096)));
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code, Code::device_gone);
    EXPECT_LE(m.executor.now() - before, 230'000'000u);
    EXPECT_NE(capture.text.find("every slot is held by a request that the back end never completed"), std::string::npos)
        << capture.text;
}

TEST(XenBlk, CancelAndForget) {
    DiskMachine m({});
    ASSERT_TRUE(m.probe());
    m.back.silent_for = 1;
    const DmaSpan buffer = m.buffer(1024 * 1024);
    {
        io::BlockDevice::Transfer big(m.disk(), io::Op::read, 0, buffer); // 24 of 32 slots
        io::BlockDevice::Transfer more(m.disk(), io::Op::read, 0, buffer);
        io::BlockDevice::Transfer last(m.disk(), io::Op::read, 0, buffer);
        m.disk().submit(big);
        m.disk().submit(more);
        m.disk().submit(last);
        EXPECT_TRUE(m.disk().cancel(last));
        EXPECT_EQ(last.status, io::Status::cancelled);
        EXPECT_FALSE(m.disk().cancel(big)) << "the other side has it";
    } // both are abandoned
    EXPECT_TRUE(m.run(fake::read(m.disk(), 0, m.buffer(4096))));
    EXPECT_EQ(m.xen.live_grants(), 1u) << "only the ring";
}
} // namespace
