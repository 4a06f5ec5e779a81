// The test host's loader and its tables, read back by offset, as specified, and by the kernel's own readers.
#include "gtest_macros.hpp"
#include "unit/host/vmm_support.hpp"
import test.gtest;
import host.std;
import core.result;
import core.physical;
import core.acpi;
import vmm.acpi;
import vmm.loader;
import vmm.memory;

namespace {
using namespace fl;
using Bytes = std::vector<std::uint8_t>;
using vmm_test::put;

constexpr u64 mebibyte = 1 << 20;

vmm::GuestMemory memory_of(u64 size) {
    auto made = vmm::GuestMemory::create(size);
    EXPECT_TRUE(made.has_value());
    return *std::move(made);
}

u64 value(const vmm::GuestMemory& memory, u64 address, usize size) {
    u64 found = 0;
    EXPECT_TRUE(memory.read(address, std::as_writable_bytes(std::span{&found, 1}).first(size))) << std::hex << address;
    return found;
}

std::string text(const vmm::GuestMemory& memory, u64 address) {
    std::string found;
    while (const char c = static_cast<char>(value(memory, address++, 1))) {
        found += c;
    }
    return found;
}

/// One loadable segment at `base` with `code` followed by `zeroes`, and a note segment with the entry.
Bytes elf(u64 base, u64 entry, const Bytes& code, u64 zeroes = 0, u32 note_type = 18) {
    Bytes file(0x1000 + code.size());
    const Bytes ident{0x7f, 'E', 'L', 'F', 2, 1, 1};
    std::copy(ident.begin(), ident.end(), file.begin());
    put(file, 16, 2, 2);  // executable
    put(file, 18, 62, 2); // x86-64
    put(file, 20, 1, 4);
    put(file, 24, base, 8); // 64-bit entry
    put(file, 32, 64, 8);   // program headers
    put(file, 52, 64, 2);
    put(file, 54, 56, 2);
    put(file, 56, 2, 2);
    put(file, 64, 1, 4); // PT_LOAD
    put(file, 68, 5, 4);
    put(file, 72, 0x1000, 8);
    put(file, 80, base, 8);
    put(file, 88, base, 8);
    put(file, 96, code.size(), 8);
    put(file, 104, code.size() + zeroes, 8);
    put(file, 120, 4, 4); // PT_NOTE
    put(file, 128, 0x200, 8);
    put(file, 152, 20, 8);
    put(file, 0x200, 4, 4);
    put(file, 0x204, 4, 4);
    put(file, 0x208, note_type, 4);
    file[0x20c] = 'X', file[0x20d] = 'e', file[0x20e] = 'n';
    put(file, 0x210, entry, 4);
    std::copy(code.begin(), code.end(), file.begin() + 0x1000);
    return file;
}

TEST(HostLoader, PvhPutsSegmentsCommandLineModuleAndMap) {
    const auto memory = memory_of(16 * mebibyte);
    const Bytes module(5000, 0x5a);
    const auto file = elf(0x20'0000, 0x20'0001, {0x90, 0x91, 0x92}, 100);
    const auto entry =
        vmm::load_pvh(memory, std::as_bytes(std::span{file}),
                      {.command_line = "job=boot", .module = std::as_bytes(std::span{module}), .rsdp = 0xe0000});
    ASSERT_TRUE(entry.has_value()) << entry.error().message;
    EXPECT_EQ(entry->mode, vmm::Entry::Mode::protected32);
    EXPECT_EQ(entry->address, 0x20'0001u);
    EXPECT_EQ(value(memory, 0x20'0000, 3), 0x929190u);
    const u64 info = entry->argument;
    EXPECT_EQ(value(memory, info, 4), 0x336ec578u);
    EXPECT_EQ(value(memory, info + 4, 4), 1u);
    ASSERT_EQ(value(memory, info + 12, 4), 1u);
    const u64 list = value(memory, info + 16, 8);
    EXPECT_EQ(value(memory, list + 8, 8), 5000u);
    const u64 at = value(memory, list, 8);
    EXPECT_EQ(at % 4096, 0u);
    EXPECT_EQ(value(memory, at + 4999, 1), 0x5au);
    EXPECT_EQ(text(memory, value(memory, info + 24, 8)), "job=boot");
    EXPECT_EQ(value(memory, info + 32, 8), 0xe0000u);
    ASSERT_EQ(value(memory, info + 48, 4), 3u);
    const u64 map = value(memory, info + 40, 8);
    EXPECT_EQ(value(memory, map + 24 + 16, 4), 2u); // the tables' memory is not usable
    EXPECT_EQ(value(memory, map + 48, 8), mebibyte);
    EXPECT_EQ(value(memory, map + 56, 8), 15 * mebibyte);
}

TEST(HostLoader, PvhRefusesWhatHasNoEntryOrNoRoom) {
    const auto memory = memory_of(4 * mebibyte);
    const auto refused = [&](const Bytes& file, const vmm::Payload& payload = {}) {
        const auto entry = vmm::load_pvh(memory, std::as_bytes(std::span{file}), payload);
        return !entry && !entry.error().message.empty();
    };
    EXPECT_TRUE(refused(elf(0x20'0000, 0x20'0000, {0x90}, 0, 17)));        // another note
    EXPECT_TRUE(refused(elf(0x20'0000, 0x10'0000, {0x90})));               // entry outside of the image
    EXPECT_TRUE(refused(elf(0x3f'f000, 0x3f'f000, {0x90}, 2 * mebibyte))); // beyond the end of memory
    EXPECT_TRUE(refused(elf(0x1000, 0x1000, {0x90})));                     // where the loader's tables are
    EXPECT_TRUE(refused({0x7f, 'E', 'L', 'F'}));
    const Bytes large(3 * mebibyte);
    EXPECT_TRUE(refused(elf(0x20'0000, 0x20'0000, {0x90}), {.module = std::as_bytes(std::span{large})}));
    const std::string line(70000, 'x');
    EXPECT_TRUE(refused(elf(0x20'0000, 0x20'0000, {0x90}), {.command_line = line}));
    auto cut = elf(0x20'0000, 0x20'0000, {0x90});
    cut.resize(0x100);
    EXPECT_TRUE(refused(cut));
}

Bytes bzimage(u16 version, u16 load_flags) {
    Bytes file(5 * 512 + 100, 0);
    file[0x1f1] = 4; // setup sectors
    put(file, 0x202, 0x53726448, 4);
    file[0x201] = 0x68; // the header ends at 0x26a
    put(file, 0x206, version, 2);
    put(file, 0x236, load_flags, 2);
    put(file, 0x238, 2047, 4);
    put(file, 0x258, 0x100'0000, 8);
    put(file, 0x260, 0x20'0000, 4);
    file[5 * 512] = 0xcc;
    return file;
}

TEST(HostLoader, BzImageGetsAZeroPage) {
    const auto memory = memory_of(32 * mebibyte);
    const Bytes initrd(4097, 7);
    const auto file = bzimage(0x020f, 1);
    ASSERT_TRUE(vmm::is_bzimage(std::as_bytes(std::span{file})));
    const auto entry =
        vmm::load_bzimage(memory, std::as_bytes(std::span{file}),
                          {.command_line = "quiet", .module = std::as_bytes(std::span{initrd}), .rsdp = 0xe0000});
    ASSERT_TRUE(entry.has_value()) << entry.error().message;
    EXPECT_EQ(entry->mode, vmm::Entry::Mode::long64);
    EXPECT_EQ(entry->address, 0x100'0200u);
    EXPECT_EQ(value(memory, 0x100'0000, 1), 0xccu);
    const u64 zero = entry->argument;
    EXPECT_EQ(value(memory, zero + 0x202, 4), 0x53726448u);
    EXPECT_EQ(value(memory, zero + 0x210, 1), 0xffu);
    EXPECT_EQ(value(memory, zero + 0x218, 4), 32 * mebibyte - 8192);
    EXPECT_EQ(value(memory, zero + 0x21c, 4), 4097u);
    EXPECT_EQ(text(memory, value(memory, zero + 0x228, 4)), "quiet");
    EXPECT_EQ(value(memory, zero + 0x70, 8), 0xe0000u);
    ASSERT_EQ(value(memory, zero + 0x1e8, 1), 3u);
    EXPECT_EQ(value(memory, zero + 0x2d0 + 40, 8), mebibyte);
    EXPECT_EQ(value(memory, zero + 0x2d0 + 56, 4), 1u);
    // The page tables identity-map the last page of 4 GiB.
    const u64 root = value(memory, entry->page_table, 8) & ~u64{0xfff};
    const u64 directory = value(memory, root + 24, 8) & ~u64{0xfff};
    EXPECT_EQ(value(memory, directory + 511 * 8, 8), 0xffe0'0083u);
    EXPECT_EQ(value(memory, entry->descriptors + 0x10, 8), 0x00af'9a00'0000'ffffu);
}

TEST(HostLoader, BzImageRefusesOldOnesAndSmallMemory) {
    const auto memory = memory_of(32 * mebibyte);
    for (const auto& file : {bzimage(0x020a, 1), bzimage(0x020f, 0)}) {
        EXPECT_FALSE(vmm::load_bzimage(memory, std::as_bytes(std::span{file}), {}).has_value());
    }
    const auto file = bzimage(0x020f, 1);
    EXPECT_FALSE(vmm::load_bzimage(memory_of(17 * mebibyte), std::as_bytes(std::span{file}), {}).has_value());
    const std::string line(2048, 'x'); // the image's limit is 2047
    EXPECT_FALSE(vmm::load_bzimage(memory, std::as_bytes(std::span{file}), {.command_line = line}).has_value());
}

// ---- ACPI ----

/// A DSDT with \_S5 only: Name (_S5_, Package (4) { 5, 5, 0, 0 }).
Bytes dsdt() {
    Bytes table(36);
    const Bytes body{0x08, '_', 'S', '5', '_', 0x12, 0x08, 0x04, 0x0a, 0x05, 0x0a, 0x05, 0x00, 0x00};
    table.insert(table.end(), body.begin(), body.end());
    std::copy_n("DSDT", 4, table.begin());
    put(table, 4, table.size(), 4);
    table[8] = 2;
    u8 sum = 0;
    for (const u8 byte : table) {
        sum = static_cast<u8>(sum + byte);
    }
    table[9] = static_cast<u8>(-sum);
    return table;
}

struct Reader final : PhysicalReader {
    explicit Reader(const vmm::GuestMemory& m) : memory(m) {}
    bool read(u64 address, std::span<std::byte> into) override { return memory.read(address, into); }
    const vmm::GuestMemory& memory;
};

TEST(HostAcpi, TheKernelsReaderFindsEverything) {
    const auto memory = memory_of(2 * mebibyte);
    const auto table = dsdt();
    const auto rsdp = vmm::write_acpi(memory, std::as_bytes(std::span{table}), 4);
    ASSERT_TRUE(rsdp.has_value()) << rsdp.error().message;
    Reader reader(memory);
    for (const u64 start : {*rsdp, u64{0}}) { // given, and found by a scan
        const auto tables = acpi::read_tables(reader, start);
        ASSERT_TRUE(tables.has_value()) << tables.error().message;
        EXPECT_EQ(tables->damaged, 0u);
        ASSERT_TRUE(tables->madt && tables->fadt);
        EXPECT_EQ(tables->madt->processor_count, 4u);
        EXPECT_EQ(tables->madt->processors[3], 3u);
        ASSERT_EQ(tables->madt->io_apic_count, 1u);
        EXPECT_EQ(tables->madt->io_apics[0].address, 0xfec0'0000u);
        EXPECT_EQ(tables->madt->override_count, 2u);
        EXPECT_TRUE(tables->madt->overrides[1].level);
        EXPECT_EQ(tables->fadt->pm_timer, 0x608);
        EXPECT_TRUE(tables->fadt->pm_timer_32);
        EXPECT_EQ(tables->fadt->pm1a_control, 0x604);
        EXPECT_EQ(tables->fadt->reset.address, 0xcf9u);
        const auto sleep = acpi::find_s5(reader, *tables);
        ASSERT_TRUE(sleep.has_value());
        EXPECT_EQ(sleep->a, 5);
    }
}

TEST(HostAcpi, EveryTableSumsToZero) {
    const auto memory = memory_of(2 * mebibyte);
    const auto table = dsdt();
    const auto rsdp = vmm::write_acpi(memory, std::as_bytes(std::span{table}), 64);
    ASSERT_TRUE(rsdp.has_value());
    const auto sum = [&](u64 at, u64 size) {
        u8 total = 0;
        for (u64 i = 0; i < size; ++i) {
            total = static_cast<u8>(total + value(memory, at + i, 1));
        }
        return total;
    };
    EXPECT_EQ(sum(*rsdp, 20), 0);
    EXPECT_EQ(sum(*rsdp, 36), 0);
    const u64 xsdt = value(memory, *rsdp + 24, 8);
    EXPECT_EQ(sum(xsdt, value(memory, xsdt + 4, 4)), 0);
    for (u64 i = 0; i < 2; ++i) {
        const u64 at = value(memory, xsdt + 36 + 8 * i, 8);
        EXPECT_EQ(sum(at, value(memory, at + 4, 4)), 0) << i;
        EXPECT_LT(at + value(memory, at + 4, 4), vmm::acpi_end);
    }
}

TEST(HostAcpi, RefusesWhatIsNoTable) {
    const auto memory = memory_of(2 * mebibyte);
    auto table = dsdt();
    EXPECT_FALSE(vmm::write_acpi(memory, std::as_bytes(std::span{table}), 0).has_value());
    EXPECT_FALSE(vmm::write_acpi(memory, std::as_bytes(std::span{table}), 65).has_value());
    EXPECT_FALSE(vmm::write_acpi(memory, std::as_bytes(std::span{table}).first(40), 1).has_value());
    table[0] = 'X';
    EXPECT_FALSE(vmm::write_acpi(memory, std::as_bytes(std::span{table}), 1).has_value());
}

TEST(HostMemory, SpansLieInsideOrAreEmpty) {
    const auto memory = memory_of(mebibyte);
    EXPECT_EQ(memory.at(mebibyte - 8, 8).size(), 8u);
    EXPECT_TRUE(memory.at(mebibyte - 8, 9).empty());
    EXPECT_TRUE(memory.at(~u64{0}, 2).empty());
    EXPECT_TRUE(memory.at(mebibyte + 1, 1).empty());
    EXPECT_FALSE(vmm::GuestMemory::create(mebibyte + 1).has_value());
    EXPECT_FALSE(vmm::GuestMemory::create(vmm::GuestMemory::max_size + 4096).has_value());
}

} // namespace
