#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.elf;

namespace {
using namespace fl;

// Little-endian writes at fixed offsets, from the specification and not from the structures under test.
struct File {
    std::vector<std::byte> bytes;

    explicit File(std::size_t size) : bytes(size) {}
    void put(std::size_t at, std::uint64_t value, int size) {
        for (int i = 0; i < size; ++i) {
            bytes.at(at + static_cast<std::size_t>(i)) = static_cast<std::byte>(value >> (8 * i));
        }
    }
    void put16(std::size_t at, std::uint64_t v) { put(at, v, 2); }
    void put32(std::size_t at, std::uint64_t v) { put(at, v, 4); }
    void put64(std::size_t at, std::uint64_t v) { put(at, v, 8); }
    void segment(std::size_t index, std::uint32_t type, std::uint32_t flags, std::uint64_t offset, std::uint64_t virt,
                 std::uint64_t phys, std::uint64_t in_file, std::uint64_t in_memory, std::uint64_t alignment) {
        const std::size_t at = 64 + index * 56;
        put32(at, type);
        put32(at + 4, flags);
        put64(at + 8, offset);
        put64(at + 16, virt);
        put64(at + 24, phys);
        put64(at + 32, in_file);
        put64(at + 40, in_memory);
        put64(at + 48, alignment);
    }
};

constexpr std::uint64_t base = 0xffffffff80000000;

// A note, code at 0x200000, data with .bss at 0x202000; the file is 0x2400 bytes long.
File good() {
    File f(0x2400);
    const unsigned char ident[16] = {0x7f, 'E', 'L', 'F', 2, 1, 1, 0};
    std::memcpy(f.bytes.data(), ident, sizeof ident);
    f.put16(16, 2);         // e_type ET_EXEC
    f.put16(18, 62);        // e_machine EM_X86_64
    f.put32(20, 1);         // e_version
    f.put64(24, base + 16); // e_entry
    f.put64(32, 64);        // e_phoff
    f.put16(52, 64);        // e_ehsize
    f.put16(54, 56);        // e_phentsize
    f.put16(56, 4);         // e_phnum
    f.segment(0, 4, 4, 0x300, 0, 0, 0x20, 0x20, 4);
    f.segment(1, 1, 5, 0x1000, base, 0x200000, 0x800, 0x800, 0x1000);
    f.segment(2, 1, 6, 0x2000, base + 0x2000, 0x202000, 0x400, 0x3000, 0x1000);
    f.segment(3, 1, 6, 0, 0, 0, 0, 0, 0); // empty: ignored
    for (std::size_t i = 0x1000; i < 0x2400; ++i) {
        f.bytes[i] = static_cast<std::byte>(i * 7 + 1);
    }
    return f;
}

Result<elf::Image> parse(const File& f) { return elf::Image::parse(f.bytes); }

TEST(Elf, ReadsAnExecutable) {
    const File f = good();
    const auto image = parse(f);
    ASSERT_TRUE(image) << std::string(image.error().message);
    EXPECT_EQ(image->entry(), base + 16);
    EXPECT_EQ(image->physical_base(), 0x200000u);
    EXPECT_EQ(image->physical_size(), 0x5000u);
    ASSERT_EQ(image->segments().size(), 2u);
    EXPECT_TRUE(image->segments()[0].executable());
    EXPECT_FALSE(image->segments()[0].writable());
    EXPECT_TRUE(image->segments()[1].writable());
    EXPECT_EQ(image->segments()[1].bytes.size(), 0x400u);
    EXPECT_TRUE(image->require_linear(base));
    EXPECT_FALSE(image->require_linear(base + 0x1000));
}

TEST(Elf, LoadsSegmentsAndZeroesTheRest) {
    const File f = good();
    const auto image = parse(f);
    ASSERT_TRUE(image);
    std::vector<std::byte> memory(0x5000, std::byte{0xee});
    ASSERT_TRUE(image->load(memory));
    EXPECT_EQ(std::memcmp(memory.data(), f.bytes.data() + 0x1000, 0x800), 0);
    EXPECT_EQ(std::memcmp(memory.data() + 0x2000, f.bytes.data() + 0x2000, 0x400), 0);
    for (std::size_t i = 0; i < memory.size(); ++i) {
        if ((i >= 0x800 && i < 0x2000) || i >= 0x2400) {
            ASSERT_EQ(memory[i], std::byte{0}) << i;
        }
    }
    memory.resize(0x4fff);
    EXPECT_FALSE(image->load(memory));
}

TEST(Elf, ReadsFromAnyAlignment) {
    const File f = good();
    std::vector<std::byte> shifted(f.bytes.size() + 1);
    std::memcpy(shifted.data() + 1, f.bytes.data(), f.bytes.size());
    EXPECT_TRUE(elf::Image::parse(std::span<const std::byte>(shifted).subspan(1)));
}

struct Bad {
    const char* name;
    std::function<void(File&)> corrupt;
};

TEST(Elf, RefusesWhatDoesNotFit) {
    const std::size_t p1 = 64 + 56;
    const std::size_t p2 = 64 + 2 * 56;
    const Bad bad[] = {
        {"magic", [](File& f) { f.put(1, 'e', 1); }},
        {"class 32", [](File& f) { f.put(4, 1, 1); }},
        {"big endian", [](File& f) { f.put(5, 2, 1); }},
        {"ident version", [](File& f) { f.put(6, 0, 1); }},
        {"version", [](File& f) { f.put32(20, 2); }},
        {"shared object", [](File& f) { f.put16(16, 3); }},
        {"machine", [](File& f) { f.put16(18, 3); }},
        {"header size", [](File& f) { f.put16(52, 52); }},
        {"program header size", [](File& f) { f.put16(54, 32); }},
        {"no program headers", [](File& f) { f.put16(56, 0); }},
        {"too many program headers", [](File& f) { f.put16(56, 0xffff); }},
        {"program headers behind the file", [](File& f) { f.put64(32, 0x2400 - 4 * 56 + 1); }},
        {"program header offset wraps", [](File& f) { f.put64(32, ~std::uint64_t{0} - 8); }},
        {"file size above memory size", [=](File& f) { f.put64(p1 + 32, 0x801); }},
        {"segment behind the file", [=](File& f) { f.put64(p2 + 32, 0x401); }},
        {"segment offset wraps", [=](File& f) { f.put64(p2 + 8, ~std::uint64_t{0} & ~0xfffull); }},
        {"virtual range wraps", [=](File& f) { f.put64(p2 + 40, 0x7fffffff); }},
        {"physical range wraps", [=](File& f) { f.put64(p2 + 24, ~std::uint64_t{0} - 0x100); }},
        {"alignment", [=](File& f) { f.put64(p1 + 48, 0x1800); }},
        {"misaligned", [=](File& f) { f.put64(p1 + 8, 0x1010); }},
        {"physical overlap", [=](File& f) { f.put64(p2 + 24, 0x2007ff); }},
        {"virtual overlap", [=](File& f) { f.put64(p2 + 16, base); }},
        {"entry outside", [](File& f) { f.put64(24, base + 0x800); }},
        {"entry in data", [](File& f) { f.put64(24, base + 0x2000); }},
        {"entry below", [](File& f) { f.put64(24, base - 1); }},
    };
    for (const Bad& b : bad) {
        File f = good();
        b.corrupt(f);
        EXPECT_FALSE(parse(f)) << b.name;
    }
}

TEST(Elf, RefusesMoreSegmentsThanItCanHold) {
    for (std::size_t count : {16u, 17u}) {
        File f(0x3000);
        std::memcpy(f.bytes.data(), good().bytes.data(), 64);
        f.put16(56, count);
        for (std::size_t i = 0; i < count; ++i) {
            f.segment(i, 1, 5, 0x1000, base + i * 0x1000, 0x200000 + i * 0x1000, 0x100, 0x100, 0x1000);
        }
        EXPECT_EQ(parse(f).has_value(), count == 16) << count;
    }
}

// Every prefix of a valid file is either rejected or (never, here) accepted with all its parts inside.
TEST(Elf, EveryShorterFileIsRefused) {
    const File f = good();
    for (std::size_t size = 0; size < f.bytes.size(); size += size < 400 ? 1 : 61) {
        // A separate allocation of the exact size, so that the sanitizer detects a read past its end.
        const std::vector<std::byte> cut(f.bytes.begin(), f.bytes.begin() + static_cast<std::ptrdiff_t>(size));
        EXPECT_FALSE(elf::Image::parse(cut)) << size;
    }
}

} // namespace
