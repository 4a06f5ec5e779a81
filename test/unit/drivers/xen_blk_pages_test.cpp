// The pages of a Xen disk's commands: how many a command gets, how its segments are described, what the back end may
// access and when, against a grant table in plain memory.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.dma;
import hv.xen.grants;
import drivers.xen_blk.pages;
import drivers.xen_blk.protocol;

using namespace fl;
using namespace fl::drivers::xen_blk;

namespace {

// Memory at consecutive bus addresses.
class Memory final : public DmaAllocator {
  public:
    u64 next = 0x10'0000;
    std::map<u64, std::vector<std::byte>> blocks;

    Result<DmaSpan> allocate(u32 size, u64) override {
        auto& block = blocks[next];
        block.resize(size);
        return DmaSpan{block.data(), std::exchange(next, next + size), size};
    }
    void free(DmaSpan span) override { EXPECT_EQ(blocks.erase(span.bus), 1u); }
};

class XenBlkPages : public testing::Test {
  protected:
    static constexpr hv::xen::Domain domain = 3;
    static constexpr u32 requests = 8;
    static constexpr u32 entries = hv::xen::grants_per_frame - hv::xen::grants_reserved; // one frame: 504

    XenBlkPages() { grants->install(table, 1); }

    void open(const PageTerms& terms, u32 sector_size = 512) {
        if (terms.persistent) {
            ASSERT_TRUE(pages->start_pool(domain, memory));
        }
        ASSERT_TRUE(pages->open(terms, sector_size, requests, memory));
    }
    // Buffer of `size` bytes that begins `offset` bytes into a page.
    DmaSpan buffer(u32 size, u32 offset = 0) {
        return memory.allocate((offset + size + 4095) / 4096 * 4096, ~u64{0})->subspan(offset, size);
    }
    // take() and fill() for a direct command.
    std::vector<Segment> direct(CommandPages& command, DmaSpan data, bool write) {
        data.size = pages->take(command, data, false);
        EXPECT_FALSE(command.indirect);
        std::vector<Segment> segments(command.segments);
        pages->fill(command, data, write, segments);
        return segments;
    }

    Memory memory;
    std::vector<hv::xen::GrantEntry> table{hv::xen::grants_per_frame};
    std::unique_ptr<hv::xen::Grants> grants = std::make_unique<hv::xen::Grants>();
    std::unique_ptr<Pages> pages = std::make_unique<Pages>(*grants);
};

TEST_F(XenBlkPages, GrantsEachPageOfABufferForTheCommandOnly) {
    open({.domain = domain});
    const DmaSpan data = buffer(3 * 4096, 1024);
    CommandPages command;
    for (const bool write : {true, false}) {
        const auto segments = direct(command, data, write);
        ASSERT_EQ(segments.size(), 4u);
        const std::array<std::pair<int, int>, 4> sectors{{{2, 7}, {0, 7}, {0, 7}, {0, 1}}};
        for (u32 i = 0; i < 4; ++i) {
            EXPECT_EQ(segments[i].first_sector, sectors[i].first);
            EXPECT_EQ(segments[i].last_sector, sectors[i].second);
            const hv::xen::GrantEntry& entry = table[segments[i].grant];
            EXPECT_EQ(entry.domain, domain);
            EXPECT_EQ(entry.frame, data.bus / 4096 + i);
            EXPECT_EQ(entry.flags, hv::xen::grant_permit_access | (write ? hv::xen::grant_read_only : 0));
        }
        EXPECT_EQ(grants->available(), entries - 4);
        EXPECT_TRUE(pages->release(command));
        EXPECT_EQ(command.segments, 0u);
        for (const Segment& segment : segments) {
            EXPECT_EQ(table[segment.grant].flags, 0u);
        }
        EXPECT_EQ(grants->available(), entries);
    }
}

TEST_F(XenBlkPages, SegmentsBeginAtMultiplesOfTheSectorSize) {
    open({.domain = domain, .wire_unit = 4096}, 4096);
    EXPECT_TRUE(pages->admits(buffer(4096)));
    EXPECT_FALSE(pages->admits(buffer(4096, 512)));
    CommandPages command;
    const auto segments = direct(command, buffer(8192), false);
    ASSERT_EQ(segments.size(), 2u);
    EXPECT_EQ(segments[1].first_sector, 0u); // in units of 4096 bytes
    EXPECT_EQ(segments[1].last_sector, 0u);
    EXPECT_TRUE(pages->release(command));
}

TEST_F(XenBlkPages, ShortensACommandOnlyIfNoOtherOneWillFreeGrants) {
    open({.domain = domain});
    std::vector<hv::xen::GrantRef> elsewhere; // another disk's
    while (grants->available() != 2) {
        elsewhere.push_back(grants->take_unchecked());
    }
    const DmaSpan data = buffer(4 * 4096, 512);
    CommandPages command;
    EXPECT_EQ(pages->take(command, data, true), 0u);
    EXPECT_EQ(command.segments, 0u);
    EXPECT_EQ(pages->take(command, data, false), 2 * 4096 - 512u);
    EXPECT_EQ(command.segments, 2u);
    std::array<Segment, 2> segments;
    pages->fill(command, data.subspan(0, 2 * 4096 - 512), false, segments);
    CommandPages second;
    EXPECT_EQ(pages->take(second, data, false), 0u); // none at all
    EXPECT_TRUE(pages->release(command));
    EXPECT_EQ(grants->available(), 2u);
}

TEST_F(XenBlkPages, UsesTheSlotsSegmentsWhenTheIndirectPagesAreInUse) {
    open({.domain = domain, .indirect_segments = 256});
    const u32 indirect_pages = requests;
    EXPECT_EQ(grants->available(), entries - indirect_pages);
    const DmaSpan data = buffer(40 * 4096);
    std::vector<CommandPages> commands(indirect_pages + 1);
    std::set<hv::xen::GrantRef> refs;
    for (u32 i = 0; i < indirect_pages; ++i) {
        ASSERT_EQ(pages->take(commands[i], data, false), 32 * 4096u);
        ASSERT_TRUE(commands[i].indirect);
        refs.insert(pages->indirect_grant(commands[i]));
        const std::span<Segment> segments = pages->indirect_segments(commands[i]);
        ASSERT_EQ(segments.size(), 32u);
        pages->fill(commands[i], data.subspan(0, 32 * 4096), false, segments);
        const hv::xen::GrantEntry& entry = table[pages->indirect_grant(commands[i])];
        EXPECT_EQ(entry.flags, hv::xen::grant_permit_access | hv::xen::grant_read_only);
        const auto block = std::prev(memory.blocks.upper_bound(u64{entry.frame} * 4096));
        EXPECT_EQ(block->second.data() + (u64{entry.frame} * 4096 - block->first),
                  reinterpret_cast<std::byte*>(segments.data()));
        EXPECT_EQ(table[segments[31].grant].frame, data.bus / 4096 + 31);
    }
    EXPECT_EQ(refs.size(), indirect_pages);
    EXPECT_EQ(direct(commands[indirect_pages], data, false).size(), segments_in_slot);
    EXPECT_TRUE(pages->release(commands[indirect_pages]));
    EXPECT_TRUE(pages->release(commands[0]));
    EXPECT_EQ(pages->take(commands[0], data.subspan(0, 11 * 4096), false), 11 * 4096u); // fits into the slot
    EXPECT_FALSE(commands[0].indirect);
    EXPECT_EQ(pages->take(commands[0], data.subspan(0, 12 * 4096), false), 12 * 4096u);
    EXPECT_TRUE(commands[0].indirect);
}

TEST_F(XenBlkPages, CopiesThroughPersistentlyGrantedPages) {
    open({.domain = domain, .persistent = true});
    EXPECT_EQ(grants->available(), entries - Pages::pool_chunk);
    const DmaSpan data = buffer(4096 + 1024, 4); // bounce pages make any alignment possible
    EXPECT_TRUE(pages->admits(data));
    for (u32 i = 0; i < data.size; ++i) {
        data.data[i] = static_cast<std::byte>(i * 7 + i / 256);
    }
    const std::vector<std::byte> original(data.bytes().begin(), data.bytes().end());
    const auto bounce = [&](const Segment& segment) {
        const u64 bus = u64{table[segment.grant].frame} * 4096;
        const auto block = std::prev(memory.blocks.upper_bound(bus));
        return std::span(block->second).subspan(bus - block->first, 4096);
    };
    CommandPages command;
    auto segments = direct(command, data, true);
    ASSERT_EQ(segments.size(), 2u);
    EXPECT_EQ(segments[0].last_sector, 7u);
    EXPECT_EQ(segments[1].first_sector, 0u);
    EXPECT_EQ(segments[1].last_sector, 1u);
    EXPECT_TRUE(std::ranges::equal(bounce(segments[0]), std::span(original).first(4096)));
    EXPECT_TRUE(std::ranges::equal(bounce(segments[1]).first(1024), std::span(original).subspan(4096)));
    EXPECT_TRUE(pages->release(command));
    EXPECT_EQ(table[segments[0].grant].flags, hv::xen::grant_permit_access); // still, and for both directions

    segments = direct(command, data, false);
    std::ranges::fill(bounce(segments[0]), std::byte{0xaa});
    std::ranges::fill(bounce(segments[1]), std::byte{0xbb});
    EXPECT_TRUE(std::ranges::equal(data.bytes(), original));
    pages->copy_back(command, data);
    EXPECT_EQ(data.data[0], std::byte{0xaa});
    EXPECT_EQ(data.data[4095], std::byte{0xaa});
    EXPECT_EQ(data.data[4096], std::byte{0xbb});
    EXPECT_EQ(data.data[5119], std::byte{0xbb});
    EXPECT_TRUE(pages->release(command));

    std::array<CommandPages, 3> commands; // 32 pages: 11, 11 and 10
    EXPECT_EQ(direct(commands[0], buffer(11 * 4096), false).size(), 11u);
    EXPECT_EQ(direct(commands[1], buffer(11 * 4096), false).size(), 11u);
    EXPECT_EQ(pages->take(commands[2], buffer(11 * 4096), true), 0u);
    EXPECT_EQ(pages->take(commands[2], buffer(11 * 4096), false), 10 * 4096u);
    EXPECT_EQ(grants->available(), entries - Pages::pool_chunk);
}

TEST_F(XenBlkPages, PersistentGrantsNeedAPool) {
    const auto opened = pages->open({.domain = domain, .persistent = true}, 512, requests, memory);
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::bad_argument);
}

TEST_F(XenBlkPages, KeepsTheReferencesOfAnUnansweredCommand) {
    open({.domain = domain});
    CommandPages command;
    const auto segments = direct(command, buffer(2 * 4096), false);
    EXPECT_TRUE(pages->end_access(command));
    EXPECT_EQ(table[segments[0].grant].flags, 0u);
    EXPECT_EQ(table[segments[1].grant].flags, 0u);
    EXPECT_EQ(grants->available(), entries - 2);
    EXPECT_TRUE(pages->release(command)); // answered
    EXPECT_EQ(grants->available(), entries);
}

TEST_F(XenBlkPages, QuarantinesTheGrantOfAMappedPage) {
    open({.domain = domain});
    CommandPages command;
    const auto segments = direct(command, buffer(2 * 4096), false);
    table[segments[1].grant].flags |= hv::xen::grant_writing;
    EXPECT_FALSE(pages->end_access(command));
    EXPECT_FALSE(pages->release(command));
    EXPECT_TRUE(pages->in_quarantine());
    EXPECT_EQ(grants->available(), entries - 1);
    table[segments[1].grant].flags &= static_cast<u16>(~hv::xen::grant_writing);
    pages->tick(false);
    EXPECT_FALSE(pages->in_quarantine());
    EXPECT_EQ(table[segments[1].grant].flags, 0u);
    EXPECT_EQ(grants->available(), entries);
}

TEST_F(XenBlkPages, ReclaimFreesWhatIsNotMapped) {
    open({.domain = domain, .persistent = true, .indirect_segments = 32});
    EXPECT_EQ(memory.blocks.size(), 2u); // the bounce pages and the indirect pages; the spare memory is free again
    pages->reclaim();
    EXPECT_EQ(memory.blocks.size(), 0u);
    EXPECT_EQ(grants->available(), entries);
    EXPECT_TRUE(std::ranges::all_of(table, [](const auto& entry) { return entry.flags == 0; }));
}

TEST_F(XenBlkPages, GivesUpMemoryThatIsMappedOrWasNotReclaimed) {
    for (const bool reclaimed : {true, false}) {
        auto disk = std::make_unique<Pages>(*grants);
        ASSERT_TRUE(disk->start_pool(domain, memory));
        ASSERT_TRUE(disk->open({.domain = domain, .persistent = true, .indirect_segments = 32}, 512, requests, memory));
        const usize blocks = memory.blocks.size();
        if (reclaimed) {
            const auto granted = std::ranges::find_if(table, [](const auto& entry) { return entry.flags != 0; });
            granted->flags |= hv::xen::grant_writing;
            disk->reclaim();
            EXPECT_EQ(grants->available(), entries - 1);
        }
        disk.reset();
        EXPECT_EQ(memory.blocks.size(), blocks); // not freed: the back end may still write to it
    }
}

} // namespace
