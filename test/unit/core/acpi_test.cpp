#include "gtest_macros.hpp"
#include "unit/core/physical_fake.hpp"
import test.gtest;
import host.std;
import core.result;
import core.physical;
import core.acpi;

namespace {
using namespace fl;

struct Memory final : PhysicalReader, Pieces {
    bool read(u64 address, std::span<std::byte> into) override { return copy(address, into.data(), into.size()); }
};
using Bytes = std::vector<std::uint8_t>;

void put(Bytes& to, usize at, u64 value, usize size) {
    if (to.size() < at + size) {
        to.resize(at + size);
    }
    for (usize i = 0; i < size; ++i) {
        to[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
}

void checksum(Bytes& table, usize at, usize size) {
    table[at] = 0;
    unsigned sum = 0;
    for (usize i = 0; i < size; ++i) {
        sum += table[i];
    }
    table[at] = static_cast<std::uint8_t>(0 - sum);
}

Bytes table(const char* signature, const Bytes& body) {
    Bytes t(signature, signature + 4);
    t.resize(36);
    t.insert(t.end(), body.begin(), body.end());
    put(t, 4, t.size(), 4);
    checksum(t, 9, t.size());
    return t;
}

// The MADT of QEMU's pc machine with two processors, entry by entry from ACPI 6.5 §5.2.12.
// local APIC at 0xfee00000, 8259s present
const Bytes madt_body = {
    0x00, 0x00, 0xe0, 0xfe, 1, 0, 0, 0, 0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0, // two processors
    // a disabled one
    0, 8, 2, 2, 0, 0, 0, 0,
    // IOAPIC at 0xfec00000, from GSI 0
    1, 12, 0, 0, 0x00, 0x00, 0xc0, 0xfe, 0, 0, 0, 0, 2, 10, 0, 0, 2, 0, 0, 0, 0, 0, // IRQ 0 is GSI 2
    // IRQ 5: level, active high
    2, 10, 0, 5, 5, 0, 0, 0, 0x0d, 0,
    // IRQ 9: level, active low
    2, 10, 0, 9, 9, 0, 0, 0, 0x0f, 0, 4, 6, 0xff, 0, 0, 1}; // NMI

// Name (\_S5, Package (4) {One, One, Zero, Zero}), as iasl writes it.
const Bytes s5 = {0x08, '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x01, 0x0a, 0x07, 0x00, 0x00};

Bytes fadt_body() {
    Bytes b(244 - 36);
    put(b, 40 - 36, 0x7fe0040, 4); // DSDT
    put(b, 46 - 36, 9, 2);         // SCI
    put(b, 48 - 36, 0xb2, 4);      // SMI command
    put(b, 52 - 36, 0xf1, 1);      // ACPI enable
    put(b, 56 - 36, 0x600, 4);     // PM1a events
    put(b, 64 - 36, 0x604, 4);     // PM1a control
    put(b, 80 - 36, 0xafe0, 4);    // general-purpose events 0
    put(b, 88 - 36, 4, 1);         // length of the PM1 events
    put(b, 92 - 36, 4, 1);         // and of the general-purpose ones
    put(b, 76 - 36, 0x608, 4);     // timer
    put(b, 91 - 36, 4, 1);         // its length
    put(b, 112 - 36, 0x80a5 | 1 << 10 | 1 << 8, 4);
    put(b, 116 - 36, 1, 1); // reset register: I/O space
    put(b, 117 - 36, 8, 1);
    put(b, 120 - 36, 0xcf9, 8);
    put(b, 128 - 36, 0x0f, 1);
    return b;
}

struct Acpi : testing::Test {
    Memory memory;
    void SetUp() override {
        memory.put(0x7fe1000, table("FACP", fadt_body()));
        memory.put(0x7fe2000, table("APIC", madt_body));
        memory.put(0x7fe3000, table("HPET", Bytes(20, 1)));
        Bytes list;
        put(list, 0, 0x7fe1000, 4);
        put(list, 4, 0x7fe2000, 4);
        put(list, 8, 0x7fe3000, 4);
        memory.put(0x7fe4000, table("RSDT", list));
        Bytes wide;
        put(wide, 0, 0x7fe1000, 8);
        put(wide, 8, 0x7fe2000, 8);
        memory.put(0x7fe5000, table("XSDT", wide));
        rsdp(0xf5250, 0);
    }
    static acpi::Tables with_dsdt(u64 at) {
        acpi::Tables tables;
        tables.fadt.emplace().dsdt = at;
        return tables;
    }
    void rsdp(u64 at, int revision) {
        Bytes r = {'R', 'S', 'D', ' ', 'P', 'T', 'R', ' '};
        put(r, 15, static_cast<u64>(revision), 1);
        put(r, 16, 0x7fe4000, 4);
        checksum(r, 8, 20);
        if (revision >= 2) {
            put(r, 20, 36, 4);
            put(r, 24, 0x7fe5000, 8);
            put(r, 35, 0, 1);
            checksum(r, 32, 36);
        } else {
            r.resize(36); // read in 16 byte steps by the search
        }
        memory.put(at, r);
    }
};

TEST_F(Acpi, Version1) {
    const auto t = acpi::read_tables(memory, 0xf5250);
    ASSERT_TRUE(t);
    EXPECT_EQ(t->tables, 3u);
    EXPECT_EQ(t->damaged, 0u);
    ASSERT_TRUE(t->madt);
    EXPECT_EQ(t->madt->local_apic, 0xfee00000u);
    EXPECT_TRUE(t->madt->has_8259);
    EXPECT_EQ(t->madt->processor_count, 2u);
    EXPECT_EQ(t->madt->processors[1], 1u);
    ASSERT_EQ(t->madt->io_apic_count, 1u);
    EXPECT_EQ(t->madt->io_apics[0].address, 0xfec00000u);
    ASSERT_EQ(t->madt->override_count, 3u);
    const auto o = t->madt->overrides;
    EXPECT_TRUE(o[0].irq == 0 && o[0].gsi == 2 && !o[0].level && !o[0].active_low);
    EXPECT_TRUE(o[1].irq == 5 && o[1].gsi == 5 && o[1].level && !o[1].active_low);
    EXPECT_TRUE(o[2].irq == 9 && o[2].gsi == 9 && o[2].level && o[2].active_low);
    ASSERT_TRUE(t->fadt);
    EXPECT_EQ(t->fadt->pm_timer, 0x608);
    EXPECT_TRUE(t->fadt->pm_timer_32);
    EXPECT_EQ(t->fadt->pm1a_control, 0x604);
    EXPECT_EQ(t->fadt->pm1a_event, 0x600);
    EXPECT_EQ(t->fadt->pm1_event_bytes, 4);
    EXPECT_EQ(t->fadt->gpe0, 0xafe0);
    EXPECT_EQ(t->fadt->gpe0_bytes, 4);
    EXPECT_EQ(t->fadt->pm1b_control, 0);
    EXPECT_EQ(t->fadt->dsdt, 0x7fe0040u);
    EXPECT_EQ(t->fadt->reset.address, 0xcf9u);
    EXPECT_EQ(t->fadt->reset.space, acpi::Space::io);
    EXPECT_EQ(t->fadt->reset_value, 0x0f);
}

TEST_F(Acpi, Version2PrefersTheXsdt) {
    rsdp(0xf5250, 2);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->tables, 2u);
    memory[0x7fe5000][40] ^= 1; // a broken XSDT: the RSDT is still used
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->tables, 3u);
    rsdp(0xf5250, 2);
    memory[0x7fe5000][40] ^= 1;
    memory[0xf5250][32] ^= 1; // the extended checksum
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->tables, 3u);
}

TEST_F(Acpi, ExtendedFieldsWinOverTheOldOnes) {
    Bytes b = fadt_body();
    put(b, 140 - 36, 0x123456789000, 8);
    put(b, 172 - 36, 1, 1);
    put(b, 176 - 36, 0x1804, 8);
    put(b, 208 - 36, 1, 1);
    put(b, 212 - 36, 0x1808, 8);
    memory.put(0x7fe1000, table("FACP", b));
    auto t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->fadt->dsdt, 0x123456789000u);
    EXPECT_EQ(t->fadt->pm1a_control, 0x1804);
    EXPECT_EQ(t->fadt->pm_timer, 0x1808);
    put(b, 112 - 36, 1 << 20, 4); // hardware reduced: none of these is used …
    put(b, 91 - 36, 0, 1);
    put(b, 244 - 36, 0, 1);
    put(b, 248 - 36, 0xfea00000, 8);
    memory.put(0x7fe1000, table("FACP", b));
    t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->fadt->pm_timer, 0x1808)
        << "but the timer, which a host may have all the same (length 0: Cloud Hypervisor); it is tried";
    EXPECT_EQ(t->fadt->pm1a_control, 0);
    EXPECT_EQ(t->fadt->gpe0, 0);
    EXPECT_EQ(t->fadt->sleep_control.address, 0xfea00000u);
    EXPECT_EQ(t->fadt->sleep_control.space, acpi::Space::memory);
    EXPECT_EQ(t->fadt->reset.address, 0u);
}

TEST_F(Acpi, SearchesTheBiosAreaAndTheEbda) {
    Bytes& bios = memory.at(0xe0000, 0x20000);
    EXPECT_EQ(acpi::read_tables(memory, 0).error().code, Code::not_found);
    Memory other;
    std::swap(memory, other);
    SetUp();
    const Bytes r = memory[0xf5250];
    std::swap(memory, other);
    memory.put(0x7fe4000, other[0x7fe4000]);
    std::copy(r.begin(), r.end(), bios.begin() + 0x15250);
    EXPECT_EQ(acpi::read_tables(memory, 0)->rsdp, 0xf5250u);
    std::copy(r.begin(), r.end(), bios.begin() + 0x15008 - 8); // a first one with a bad checksum is skipped
    bios[0x15000 + 9] ^= 1;
    EXPECT_EQ(acpi::read_tables(memory, 0)->rsdp, 0xf5250u);
    memory.put(0x400, Bytes(0x100));
    put(memory[0x400], 0xe, 0x9fc0, 2);
    Bytes& ebda = memory.at(0x9fc00, 0x400);
    std::copy(r.begin(), r.end(), ebda.begin() + 0x20);
    EXPECT_EQ(acpi::read_tables(memory, 0)->rsdp, 0x9fc20u);
}

TEST_F(Acpi, DamagedTablesAreIgnoredAndCounted) {
    memory[0x7fe2000][50] ^= 1;
    auto t = acpi::read_tables(memory, 0xf5250);
    ASSERT_TRUE(t);
    EXPECT_FALSE(t->madt);
    EXPECT_TRUE(t->fadt);
    EXPECT_EQ(t->damaged, 1u);
    ASSERT_EQ(t->all_damages().size(), 1u);
    EXPECT_EQ(t->all_damages()[0].name(), "APIC");
    EXPECT_EQ(t->all_damages()[0].address, 0x7fe2000u);
    EXPECT_EQ(t->all_damages()[0].kind, acpi::Damage::Kind::checksum);
    put(memory[0x7fe1000], 4, 35, 4); // shorter than its header
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->all_damages()[0].kind, acpi::Damage::Kind::length);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->all_damages()[0].length, 35u);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->damaged, 2u);
    put(memory[0x7fe1000], 4, 0xfffffff0, 4);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->damaged, 2u);
    put(memory[0x7fe4000], 4, 0xfffffff0, 4);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250).error().code, Code::protocol);
    memory[0xf5250][0] = 'r';
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250).error().code, Code::protocol);
    EXPECT_EQ(acpi::read_tables(memory, 0x1234567800).error().code, Code::protocol);
}

TEST_F(Acpi, TablesBeyondTheLimitAreCounted) {
    Bytes list;
    put(list, 0, 0x7fe1000, 4); // the FADT is the first
    for (usize i = 1; i < 131; ++i) {
        put(list, 4 * i, 0x7fe0040, 4);
    }
    memory.put(0x7fe0040, table("OEM1", {}));
    memory.put(0x7fe4000, table("RSDT", list));
    const auto t = acpi::read_tables(memory, 0xf5250);
    ASSERT_TRUE(t);
    EXPECT_EQ(t->tables, 128u);
    EXPECT_EQ(t->dropped, 3u);
    EXPECT_EQ(t->damaged, 0u);
    EXPECT_TRUE(t->fadt);
}

TEST_F(Acpi, ProcessorsOfTheMadt) {
    Bytes b = {0x00, 0x00, 0xe0, 0xfe, 0, 0, 0, 0}; // local APIC at 0xfee00000
    const auto local = [&](u8 id, u8 flags) {       // type 0, 8 bytes [ACPI 6.5 §5.2.12.2]
        for (const u8 byte : {u8{0}, u8{8}, id, id, flags, u8{0}, u8{0}, u8{0}}) {
            b.push_back(byte);
        }
    };
    const auto extended = [&](u8 id, u8 high, u8 flags) { // type 9, 16 bytes [§5.2.12.12]
        for (const u8 byte : {u8{9}, u8{16}, u8{0}, u8{0}, id, high, u8{0}, u8{0}, flags, u8{0}, u8{0}, u8{0}, id,
                              u8{0}, u8{0}, u8{0}}) {
            b.push_back(byte);
        }
    };
    local(0, 1);
    local(2, 1);
    local(3, 0);       // disabled
    local(4, 2);       // online capable: not present yet
    extended(2, 0, 1); // listed before
    extended(0, 1, 1); // 256
    memory.put(0x7fe2000, table("APIC", b));
    const auto t = acpi::read_tables(memory, 0xf5250);
    ASSERT_TRUE(t->madt);
    EXPECT_EQ(t->madt->processor_count, 3u);
    EXPECT_EQ(t->madt->disabled_count, 2u);
    EXPECT_EQ(t->madt->processors_dropped, 0u);
    ASSERT_EQ(t->madt->all_processors().size(), 3u);
    EXPECT_EQ(t->madt->all_processors()[1], 2u);
    EXPECT_EQ(t->madt->all_processors()[2], 256u);
    for (u8 id = 10; id < 100; ++id) {
        local(id, 1);
    }
    memory.put(0x7fe2000, table("APIC", b));
    const auto full = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(full->madt->processor_count, acpi::Madt::max_processors);
    EXPECT_EQ(full->madt->processors_dropped, 93u - acpi::Madt::max_processors);
}

TEST_F(Acpi, MadtEntriesThatCannotBeEndTheWalk) {
    Bytes b = madt_body;
    b[8 + 16 + 1] = 0; // the third entry has no length
    memory.put(0x7fe2000, table("APIC", b));
    auto t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->madt->processor_count, 2u);
    EXPECT_EQ(t->madt->io_apic_count, 0u);
    EXPECT_EQ(t->madt->bytes_dropped, madt_body.size() - 24u) << "everything from the entry on is reported";
    b = madt_body;
    b[b.size() - 5] = 200; // the last one extends past the table
    memory.put(0x7fe2000, table("APIC", b));
    t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->madt->override_count, 3u);
    EXPECT_EQ(t->madt->bytes_dropped, 6u);
    b = madt_body;
    for (int i = 0; i < 70; ++i) { // more than fit
        b.insert(b.end(), {1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 10, 0, 3, 3, 0, 0, 0, 0, 0});
    }
    for (int i = 0; i < 100; ++i) {
        b.insert(b.end(), {9, 16, 0, 0, static_cast<std::uint8_t>(i), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0});
    }
    memory.put(0x7fe2000, table("APIC", b));
    t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->madt->io_apic_count, acpi::Madt::max_io_apics);
    EXPECT_EQ(t->madt->override_count, acpi::Madt::max_overrides);
    EXPECT_EQ(t->madt->processor_count, acpi::Madt::max_processors);
    EXPECT_EQ(t->madt->processors[2], 256u);
    EXPECT_EQ(t->madt->io_apics_dropped, 71u - acpi::Madt::max_io_apics);
    EXPECT_EQ(t->madt->overrides_dropped, 73u - acpi::Madt::max_overrides);
    EXPECT_EQ(t->madt->bytes_dropped, 0u);
}

// [PCI-FW 3.3 §4.1.2]
TEST_F(Acpi, ConfigurationSpaceInMemory) {
    Bytes b(8);
    const auto entry = [&](u64 base, u64 segment, u64 first, u64 last) {
        const usize at = b.size();
        put(b, at, base, 8);
        put(b, at + 8, segment, 2);
        put(b, at + 10, first, 1);
        put(b, at + 11, last, 1);
        put(b, at + 12, 0, 4);
    };
    entry(0xb0000000, 0, 0, 255);
    entry(0x3000000000, 1, 0x40, 0x7f);
    entry(0x10, 2, 0, 1);        // not aligned
    entry(0xc0000000, 3, 10, 9); // no buses
    memory.put(0x7fe3000, table("MCFG", b));
    const auto t = acpi::read_tables(memory, 0xf5250);
    EXPECT_EQ(t->mcfg, 0x7fe3000u);
    ASSERT_EQ(acpi::ecam_count(memory, t->mcfg), 4u);
    const auto second = acpi::ecam(memory, t->mcfg, 1);
    ASSERT_TRUE(second);
    EXPECT_EQ(second->base, 0x3000000000u);
    EXPECT_TRUE(second->segment == 1 && second->first_bus == 0x40 && second->last_bus == 0x7f);
    EXPECT_TRUE(acpi::ecam(memory, t->mcfg, 0));
    EXPECT_FALSE(acpi::ecam(memory, t->mcfg, 2));
    EXPECT_FALSE(acpi::ecam(memory, t->mcfg, 3));
    EXPECT_FALSE(acpi::ecam(memory, t->mcfg, 4));
    EXPECT_EQ(acpi::ecam_count(memory, 0), 0u);
    memory[0x7fe3000][50] ^= 1;
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->mcfg, 0u);
    EXPECT_EQ(acpi::read_tables(memory, 0xf5250)->all_damages()[0].name(), "MCFG");
}

// As compiled by iasl: Name (_HID, EisaId ("PNP0A08")), Name (_CID, EisaId ("PNP0A03")), Name (_BBN, 0x80).
const Bytes hid_a08 = {0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x0a, 0x08};
const Bytes cid_a03 = {0x08, '_', 'C', 'I', 'D', 0x0c, 0x41, 0xd0, 0x0a, 0x03};
const Bytes hid_a03 = {0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x0a, 0x03};
const Bytes bbn_80 = {0x08, '_', 'B', 'B', 'N', 0x0a, 0x80};

TEST_F(Acpi, RootBridges) {
    const auto with = [&](std::initializer_list<Bytes> parts, usize filler = 0) {
        Bytes body(filler, 0x5f);
        for (const Bytes& part : parts) {
            body.insert(body.end(), part.begin(), part.end());
        }
        memory.put(0x7fe0040, table("DSDT", body));
        return acpi::find_root_bridges(memory, *acpi::read_tables(memory, 0xf5250));
    };
    auto found = with({hid_a08, cid_a03});
    EXPECT_EQ(found.bridges, 1u);
    EXPECT_FALSE(found.others()) << "one, and its bus is 0";
    for (const usize filler : {0u, 880u, 890u, 896u, 900u, 1020u, 3000u}) {
        found = with({hid_a03, hid_a08, cid_a03, bbn_80}, filler);
        EXPECT_EQ(found.bridges, 2u) << filler;
        EXPECT_TRUE(found.gives(0x80)) << filler;
        EXPECT_FALSE(found.gives(0x81) || found.gives(0));
        EXPECT_FALSE(found.others()) << filler;
    }
    found = with({hid_a03, {0x08, '_', 'B', 'B', 'N', 0x00}, hid_a03, {0x08, '_', 'B', 'B', 'N', 0x0b, 0xc0, 0x00}});
    EXPECT_TRUE(found.gives(0) && found.gives(0xc0));
    EXPECT_FALSE(found.others());
    found = with({hid_a03, hid_a03, {0x14, 0x09, '_', 'B', 'B', 'N', 0x00, 0xa4, 'B', 'U', 'S', '0'}}); // a method
    EXPECT_EQ(found.numbered, 0u);
    EXPECT_TRUE(found.others());
    // one that returns a constant
    found = with({hid_a03, hid_a03, {0x14, 0x09, '_', 'B', 'B', 'N', 0x00, 0xa4, 0x0a, 0x42}});
    EXPECT_TRUE(found.gives(0x42) && !found.others());
    // one that begins differently
    found = with({hid_a03, hid_a03, {0x14, 0x0c, '_', 'B', 'B', 'N', 0x00, 0x70, 'B', 'U', 'S', '0', 0x60}});
    EXPECT_TRUE(found.numbered == 0 && found.others());
    EXPECT_EQ(with({{0x08, '_', 'H', 'I', 'D', 0x0d, 'P', 'N', 'P', '0', 'A', '0', '8', 0}}).bridges, 1u);
    EXPECT_EQ(with({{0x08, '_', 'H', 'I', 'D', 0x0c, 0x41, 0xd0, 0x0a, 0x05}}).bridges, 0u);
    EXPECT_EQ(with({{0x14, 0x0e, '_', 'C', 'B', 'A', 0x00, 0xa4, 0x0c, 0, 0, 0, 0xe0}}).cba, 0xe0000000u);
    memory[0x7fe0040][40] ^= 1;
    EXPECT_TRUE(acpi::find_root_bridges(memory, *acpi::read_tables(memory, 0xf5250)).others())
        << "a damaged table is ignored";
}

TEST_F(Acpi, RootBridgesOfSecondaryTables) {
    memory.put(0x7fe0040, table("DSDT", hid_a03));
    Bytes body(hid_a08);
    body.insert(body.end(), bbn_80.begin(), bbn_80.end());
    memory.put(0x7fe3000, table("SSDT", body));
    const auto t = acpi::read_tables(memory, 0xf5250);
    ASSERT_EQ(t->all_ssdts().size(), 1u);
    const auto found = acpi::find_root_bridges(memory, *t);
    EXPECT_EQ(found.bridges, 2u);
    EXPECT_TRUE(found.gives(0x80));
}

TEST_F(Acpi, VirtioMmioDevices) {
    const auto node = [](u8 base) { // as QEMU's microvm: _HID, _UID, _CCA, _CRS with Memory32Fixed and Interrupt
        return Bytes{0x08, '_',  'H',  'I',  'D',  0x0d, 'L',  'N',  'R',  'O',  '0',  '0',  '0',  '5',  0,
                     0x08, '_',  'U',  'I',  'D',  0x00, 0x08, '_',  'C',  'C',  'A',  0x01, 0x08, '_',  'C',
                     'R',  'S',  0x11, 0x1a, 0x0a, 0x17, 0x86, 0x09, 0x00, 0x01, 0x00, base, 0xb0, 0xfe, 0x00,
                     0x02, 0x00, 0x00, 0x89, 0x06, 0x00, 0x05, 0x01, 0x05, 0x00, 0x00, 0x00, 0x79, 0x00};
    };
    Bytes body = node(0x10);
    const Bytes second = node(0x20);
    body.insert(body.end(), second.begin(), second.end());
    const Bytes without = {0x08, '_', 'H', 'I', 'D', 0x0d, 'L', 'N', 'R', 'O',
                           '0',  '0', '0', '5', 0,   0x08, '_', 'H', 'I', 'D'};
    body.insert(body.end(), without.begin(), without.end());
    memory.put(0x7fe0040, table("DSDT", body));
    using Nodes = std::vector<std::tuple<u64, u32, std::optional<u32>>>;
    Nodes seen;
    const auto keep = [](void* context, const acpi::VirtioMmioNode& node) {
        static_cast<Nodes*>(context)->emplace_back(node.base, node.size, node.gsi);
    };
    EXPECT_EQ(acpi::find_virtio_mmio(memory, *acpi::read_tables(memory, 0xf5250), keep, &seen), 1u);
    EXPECT_EQ(seen, (Nodes{{0xfeb01000, 0x200, 5}, {0xfeb02000, 0x200, 5}}));
}

TEST_F(Acpi, RandomDamageNeverHurts) {
    std::mt19937 random(9);
    for (int round = 0; round < 20'000; ++round) {
        const u64 which[] = {0x7fe1000, 0x7fe2000, 0x7fe4000, 0xf5250};
        Bytes& t = memory[which[random() % 4]];
        const Bytes before = t;
        for (int i = 0; i < 4; ++i) {
            t[random() % t.size()] = static_cast<std::uint8_t>(random());
        }
        if (t.size() != 36) {
            checksum(t, 9, t.size());
        }
        const auto read = acpi::read_tables(memory, 0xf5250);
        if (read && read->madt) {
            EXPECT_LE(read->madt->io_apic_count, acpi::Madt::max_io_apics);
        }
        t = before;
    }
}

TEST_F(Acpi, FindsS5WhereverItIs) {
    for (const usize filler : {0u, 1u, 990u, 995u, 1000u, 1010u, 1023u, 1024u, 5000u}) {
        Bytes body(filler, 0x5f);
        body.insert(body.end(), s5.begin(), s5.end());
        body.resize(body.size() + 40);
        memory.put(0x7000000, table("DSDT", body));
        const auto found = acpi::find_s5(memory, with_dsdt(0x7000000));
        ASSERT_TRUE(found) << filler;
        EXPECT_EQ(found->a, 1);
        EXPECT_EQ(found->b, 7);
    }
}

TEST_F(Acpi, FindsS5InAnySsdt) {
    memory.put(0x7000000, table("DSDT", Bytes(100, 0xa3)));
    acpi::Tables tables = with_dsdt(0x7000000);
    const auto add = [&](const Bytes& bytes) {
        const u64 at = 0x7100000 + 0x1000 * tables.ssdt_count;
        memory.put(at, bytes);
        tables.ssdts[tables.ssdt_count++] = at;
    };
    add(table("SSDT", Bytes(2000, '_')));
    EXPECT_EQ(acpi::find_s5(memory, tables).error().message, "ACPI: neither the DSDT nor an SSDT has an \\_S5");
    Bytes other = s5;
    other[10] = 0x05;
    Bytes broken = table("SSDT", other);
    broken.back() ^= 1;
    add(broken);
    add(table("OEM1", other));
    tables.ssdts[tables.ssdt_count++] = 0x7ffffff0000; // unmapped
    EXPECT_EQ(acpi::find_s5(memory, tables).error().message,
              "ACPI: no \\_S5, and a DSDT or SSDT is missing or damaged");
    Bytes late(1500, 0xa3);
    late.insert(late.end(), s5.begin(), s5.end());
    late.resize(late.size() + 40);
    add(table("SSDT", late));
    add(table("SSDT", other)); // the first one counts
    auto found = acpi::find_s5(memory, tables);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->a, 1);
    EXPECT_EQ(found->b, 7);
    other.resize(other.size() + 40);
    memory.put(0x7000000, table("DSDT", other));
    found = acpi::find_s5(memory, tables);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->b, 5) << "and the DSDT's before all others";
    tables.fadt.reset();
    found = acpi::find_s5(memory, tables);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->b, 7);
}

TEST_F(Acpi, FindsPvpanicWhereverItIs) {
    // _HID "QEMU0001", then _CRS with an IO descriptor: 16 bits decoded, 0x505, one port.
    const Bytes device{'Q',  'E',  'M',  'U',  '0',  '0',  '0',  '1',  0x00, 0x08, '_',  'C',  'R',  'S',
                       0x11, 0x0d, 0x0a, 0x0a, 0x47, 0x01, 0x05, 0x05, 0x05, 0x05, 0x01, 0x01, 0x79, 0x00};
    for (const usize filler : {0u, 1u, 1780u, 1790u, 1793u, 2000u, 2030u, 2047u, 2048u, 5000u}) {
        Bytes body(filler, 'Q');
        body.insert(body.end(), device.begin(), device.end());
        memory.put(0x7000000, table("DSDT", body));
        EXPECT_EQ(acpi::find_pvpanic(memory, 0x7000000), 0x505) << filler;
        body.resize(body.size() - 5); // truncated in the descriptor
        memory.put(0x7000000, table("DSDT", body));
        EXPECT_FALSE(acpi::find_pvpanic(memory, 0x7000000)) << filler;
    }
    EXPECT_FALSE(acpi::find_pvpanic(memory, 0));
    memory.put(0x7000000, table("DSDT", s5));
    EXPECT_FALSE(acpi::find_pvpanic(memory, 0x7000000));
}

TEST_F(Acpi, FindsQemusHotplugRegistersWhereverTheyAre) {
    // OperationRegion (PCST, SystemIO, 0x0cc0, 0x08), as QEMU writes it.
    const Bytes region{0x5b, 0x80, 'P', 'C', 'S', 'T', 0x01, 0x0b, 0xc0, 0x0c, 0x0a, 0x08};
    const Bytes rest(16);
    for (const usize filler : {0u, 1u, 1780u, 1790u, 1793u, 2000u, 2030u, 2047u, 2048u, 5000u}) {
        Bytes body(filler, 0x5b);
        body.insert(body.end(), region.begin(), region.end());
        body.insert(body.end(), rest.begin(), rest.end());
        memory.put(0x7000000, table("DSDT", body));
        EXPECT_EQ(acpi::find_pci_hotplug(memory, 0x7000000), 0xcc0) << filler;
    }
    for (const auto& [at, byte] : {std::pair{6, 0x00}, std::pair{7, 0x10}, std::pair{5, 0x58}}) { // memory; computed
        Bytes body = region;
        body[static_cast<usize>(at)] = static_cast<u8>(byte);
        body.insert(body.end(), rest.begin(), rest.end());
        memory.put(0x7000000, table("DSDT", body));
        EXPECT_FALSE(acpi::find_pci_hotplug(memory, 0x7000000)) << at;
    }
    memory.put(0x7000000, table("DSDT", Bytes(region.begin(), region.begin() + 9)));
    EXPECT_FALSE(acpi::find_pci_hotplug(memory, 0x7000000)) << "cut off";
    EXPECT_FALSE(acpi::find_pci_hotplug(memory, 0));
}

TEST_F(Acpi, S5ThatIsNone) {
    const auto with = [&](Bytes body) {
        memory.put(0x7000000, table("DSDT", body));
        return acpi::find_s5(memory, with_dsdt(0x7000000));
    };
    EXPECT_EQ(with({}).error().code, Code::not_found);
    EXPECT_FALSE(with({0x10, '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x01, 0x01, 0x00, 0x00})); // not a Name
    EXPECT_FALSE(with({0x08, '_', 'S', '5', '_', 0x0a, 0x06, 0x04, 0x01, 0x01, 0x00, 0x00})); // not a Package
    // length bytes beyond the end
    EXPECT_FALSE(with({0x08, '_', 'S', '5', '_', 0x12, 0xff, 0x04, 0x01, 0x01}));
    // not a 3-bit number
    EXPECT_FALSE(with({0x08, '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x0a, 0x55, 0x00, 0x00, 0x00}));
    EXPECT_TRUE(with({0x08, '\\', '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x00, 0x00, 0x00, 0x00}));
    EXPECT_FALSE(acpi::find_s5(memory, with_dsdt(0)));
    EXPECT_FALSE(acpi::find_s5(memory, {}));
}

} // namespace
