#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.physical;
import core.smbios;

namespace {
using namespace fl;

struct Memory final : PhysicalReader {
    std::map<u64, std::vector<u8>> regions;
    bool read(u64 address, std::span<std::byte> into) override {
        for (const auto& [base, bytes] : regions) {
            if (address >= base && address - base <= bytes.size() && into.size() <= bytes.size() - (address - base)) {
                std::memcpy(into.data(), bytes.data() + (address - base), into.size());
                return true;
            }
        }
        return false;
    }
};

void text(std::vector<u8>& out, const std::string& s) {
    out.insert(out.end(), s.begin(), s.end());
    out.push_back(0);
}

// Types 0, 1 and 127, byte by byte as laid out in DSP0134.
std::vector<u8> table(const std::string& vendor = "SeaBIOS", const std::string& maker = "QEMU",
                      const std::string& product = "Standard PC") {
    std::vector<u8> t{0, 24, 0, 0, 1, 2, 0, 0xe8, 3, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0xff, 0xff};
    text(t, vendor);
    text(t, "1.16.2");
    text(t, "04/01/2014");
    t.push_back(0);
    const std::vector<u8> system{1, 27, 0, 1, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0};
    t.insert(t.end(), system.begin(), system.end());
    text(t, maker);
    text(t, product);
    text(t, "pc-i440fx-7.2");
    t.push_back(0);
    const std::vector<u8> end{127, 4, 0, 2, 0, 0};
    t.insert(t.end(), end.begin(), end.end());
    return t;
}

void fix(std::vector<u8>& bytes, usize from, usize size, usize checksum) {
    bytes[checksum] = 0;
    u8 sum = 0;
    for (usize i = from; i < from + size; ++i) {
        sum = static_cast<u8>(sum + bytes[i]);
    }
    bytes[checksum] = static_cast<u8>(-sum);
}

std::vector<u8> entry2(u32 address, u16 size) {
    std::vector<u8> e{'_', 'S', 'M', '_', 0, 0x1f, 2, 8, 0, 1, 0, 0, 0, 0, 0, 0, '_', 'D', 'M', 'I', '_', 0};
    e.push_back(static_cast<u8>(size));
    e.push_back(static_cast<u8>(size >> 8));
    for (int i = 0; i < 4; ++i) {
        e.push_back(static_cast<u8>(address >> (8 * i)));
    }
    e.insert(e.end(), {3, 0, 0x28});
    fix(e, 0x10, 0x0f, 0x15);
    fix(e, 0, 0x1f, 4);
    e.resize(0x20);
    return e;
}

std::vector<u8> entry3(u64 address, u32 size) {
    std::vector<u8> e{'_', 'S', 'M', '3', '_', 0, 0x18, 3, 2, 0, 1, 0};
    for (int i = 0; i < 4; ++i) {
        e.push_back(static_cast<u8>(size >> (8 * i)));
    }
    for (int i = 0; i < 8; ++i) {
        e.push_back(static_cast<u8>(address >> (8 * i)));
    }
    fix(e, 0, 0x18, 5);
    e.resize(0x20);
    return e;
}

TEST(Smbios, BothEntryPoints) {
    Memory m;
    m.regions[0xf5000] = table();
    m.regions[0x1000] = entry2(0xf5000, static_cast<u16>(table().size()));
    m.regions[0x2000] = entry3(0xf5000, 0x10000); // version 3.0 gives a maximum, larger than the actual size
    for (u64 at : {u64{0x1000}, u64{0x2000}}) {
        const auto s = read_smbios(m, at);
        ASSERT_TRUE(s) << at;
        EXPECT_EQ(s->bios_vendor, "SeaBIOS");
        EXPECT_EQ(s->bios_version, "1.16.2");
        EXPECT_EQ(s->manufacturer, "QEMU");
        EXPECT_EQ(s->product, "Standard PC");
        EXPECT_EQ(s->version, "pc-i440fx-7.2");
    }
    EXPECT_EQ(read_smbios(m, 0x1000)->major, 2);
    EXPECT_EQ(read_smbios(m, 0x2000)->major, 3);
}

TEST(Smbios, SearchesTheBiosArea) {
    Memory m;
    m.regions[0x8000] = table();
    std::vector<u8> area(0x10000, 0);
    const auto broken = [] {
        auto e = entry2(0x8000, 10);
        e[4] ^= 1;
        return e;
    }();
    const auto good = entry2(0x8000, static_cast<u16>(table().size()));
    std::copy(broken.begin(), broken.end(), area.begin() + 0x100);
    std::copy(good.begin(), good.end(), area.begin() + 0x5210);
    m.regions[0xf0000] = area;
    const auto s = read_smbios(m, 0);
    ASSERT_TRUE(s) << "a broken entry point hides the good one after it";
    EXPECT_EQ(s->manufacturer, "QEMU");
    Memory empty;
    const auto none = read_smbios(empty, 0);
    ASSERT_FALSE(none);
    EXPECT_EQ(none.error().code, Code::not_found);
}

TEST(Smbios, MalformedEntryPointsAreRefused) {
    Memory m;
    m.regions[0xf5000] = table();
    const auto refused = [&](std::vector<u8> e) {
        m.regions[0x1000] = std::move(e);
        const auto s = read_smbios(m, 0x1000);
        return !s && s.error().code == Code::protocol;
    };
    auto e = entry2(0xf5000, 100);
    e[4] ^= 0x40;
    EXPECT_TRUE(refused(e)) << "checksum";
    e = entry2(0xf5000, 100);
    e[5] = 0xff;
    EXPECT_TRUE(refused(e)) << "length beyond what is there";
    e = entry2(0xf5000, 100);
    e[0x15] ^= 1;
    fix(e, 0, 0x1f, 4);
    EXPECT_TRUE(refused(e)) << "intermediate checksum";
    e = entry3(0xf5000, 100);
    e[6] = 3;
    EXPECT_TRUE(refused(e)) << "too short";
    EXPECT_TRUE(refused(std::vector<u8>(0x20, 0x41))) << "no anchor";
    EXPECT_TRUE(refused(entry2(0xdead0000, 100))) << "the table is not there";
    e = entry2(0xf5000, 100);
    e[5] = 0x1e; // as version 2.1 was implemented: the checksum still covers 0x1f bytes
    fix(e, 0, 0x1f, 4);
    EXPECT_FALSE(refused(e));
}

Smbios parsed(const std::vector<u8>& bytes) {
    Smbios s;
    parse_smbios_table(std::as_bytes(std::span(bytes)), s);
    return s;
}

TEST(Smbios, ATableThatEndsEarlyNeverLeadsOutOfIt) {
    const auto whole = table();
    for (usize size = 0; size <= whole.size(); ++size) {
        // ASan checks its end
        const std::vector<u8> cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
        const Smbios s = parsed(cut);
        EXPECT_EQ(s.bios_vendor.empty(), size < 24 + 27) << size;
    }
    auto bad = whole;
    bad[1] = 3; // shorter than its own header
    EXPECT_TRUE(parsed(bad).bios_vendor.empty());
    bad[1] = 0xff; // longer than the table
    EXPECT_TRUE(parsed(bad).bios_vendor.empty());
}

TEST(Smbios, StrangeStrings) {
    auto t = table();
    t[4] = 9; // a nonexistent string
    EXPECT_TRUE(parsed(t).bios_vendor.empty());
    t[4] = 0;
    EXPECT_TRUE(parsed(t).bios_vendor.empty());
    EXPECT_EQ(parsed(table("A\x01\xff")).bios_vendor, "A??");
    EXPECT_EQ(parsed(table("BIOS   ")).bios_vendor, "BIOS");
    const Smbios s = parsed(table(std::string(300, 'x')));
    EXPECT_EQ(s.bios_vendor.size(), 64u);
    EXPECT_EQ(s.manufacturer, "QEMU");
    // An endless sequence of small structures terminates as well.
    std::vector<u8> many;
    for (int i = 0; i < 20000; ++i) {
        many.insert(many.end(), {2, 4, 0, 0, 0, 0});
    }
    EXPECT_TRUE(parsed(many).manufacturer.empty());
}
} // namespace
