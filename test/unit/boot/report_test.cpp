// The printed report about the loader's and the firmware's tables, and about the parts not used.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.acpi;
import core.log;
import core.text;
import hv.detect;
import drivers.table;
import boot.devices;
import boot.handoff;
import boot.options;
import boot.report;

namespace {
using namespace fl;

struct Report : testing::Test, log::Sink {
    std::string text;
    std::unique_ptr<boot::BootInfo> info = std::make_unique<boot::BootInfo>(); // too large for a stack
    std::unique_ptr<acpi::Tables> tables = std::make_unique<acpi::Tables>();
    boot::Devices devices;
    Report() {
        boot::begin(*info, boot::Entry::pvh, 0);
        log::attach(*this);
    }
    ~Report() override { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(std::string_view part) const { return text.find(part) != std::string::npos; }
    bool left_out(std::string_view what, u32 count, bool disk) const {
        return has("{\"record\":\"left_out\",\"what\":\"" + std::string(what) +
                   "\",\"count\":" + std::to_string(count) + ",\"disk\":" + (disk ? "true" : "false"));
    }
};

TEST_F(Report, NothingIsLeftOutOfWholeTables) {
    boot::report_left_out(*info, tables.get(), true, devices);
    boot::report_left_out(*info, nullptr, true, devices);
    EXPECT_EQ(text, "");
}

TEST_F(Report, MemoryRanges) {
    info->ranges_truncated = 1;
    boot::report_left_out(*info, nullptr, true, devices);
    EXPECT_TRUE(left_out("memory ranges", 1, false)) << text;
    boot::print_boot_info(*info);
    EXPECT_TRUE(has("warning: the memory map has more than 255 ranges: the others are not used\n")) << text;
}

TEST_F(Report, AMapFileThatIsCut) {
    info->map_file_truncated = 1;
    boot::print_boot_info(*info);
    EXPECT_TRUE(has("warning: the map file is longer than 16384 bytes: its end is missing\n")) << text;
}

TEST_F(Report, DamagedTables) {
    tables->damaged = acpi::Tables::max_damages + 3;
    for (acpi::Damage& damage : tables->damages) {
        damage = {{'M', 'C', 'F', 'G'}, 0x1000, 60, acpi::Damage::Kind::checksum};
    }
    boot::report_left_out(*info, tables.get(), true, devices);
    EXPECT_TRUE(has("left out: ACPI tables (1): MCFG at 0x1000, length 60, has a wrong checksum\n")) << text;
    EXPECT_TRUE(left_out("ACPI tables", 3, false)) << text;
    EXPECT_FALSE(devices.disk_left_out()) << "segment 0 is reached through the ports";
    boot::report_left_out(*info, tables.get(), false, devices);
    EXPECT_TRUE(devices.disk_left_out()) << "no PCI function is found without them";
}

TEST_F(Report, TablesBeyondTheLimit) {
    tables->dropped = 2;
    tables->ssdts_dropped = 5;
    tables->fadt.emplace();
    boot::report_left_out(*info, tables.get(), true, devices);
    EXPECT_TRUE(left_out("ACPI tables", 2, false)) << text;
    EXPECT_TRUE(left_out("SSDTs", 5, false));
    EXPECT_FALSE(devices.disk_left_out());
    tables->fadt->hardware_reduced = true;
    boot::report_left_out(*info, tables.get(), true, devices);
    EXPECT_TRUE(left_out("SSDTs", 5, true)) << "they may name virtio-mmio devices";
}

TEST_F(Report, WhatTheMadtHasTooMuch) {
    tables->madt.emplace();
    tables->madt->processors_dropped = 1;
    tables->madt->io_apics_dropped = 2;
    tables->madt->overrides_dropped = 3;
    tables->madt->bytes_dropped = 4;
    boot::report_left_out(*info, tables.get(), true, devices);
    EXPECT_TRUE(left_out("processors", 1, false)) << text;
    EXPECT_TRUE(left_out("IOAPICs", 2, false));
    EXPECT_TRUE(left_out("interrupt overrides", 3, false));
    EXPECT_TRUE(left_out("bytes of the MADT", 4, false));
}

TEST_F(Report, WordsForLinux) {
    boot::LoaderWords words;
    boot::print_loader_words(words);
    EXPECT_EQ(text, "");
    for (u32 i = 0; i < boot::TextList::capacity + 2; ++i) {
        words.ignore("quiet");
    }
    boot::print_loader_words(words);
    EXPECT_TRUE(has("quiet and 2 more\n")) << text;
    EXPECT_TRUE(has("\"more\":2}")) << text;
}

TEST_F(Report, ErrorsOfTheCommandLine) {
    boot::OptionErrors errors;
    errors.list[errors.count++] = FixedText<384>("expected this, seen that");
    errors.dropped = 1;
    boot::print_option_errors(errors);
    EXPECT_TRUE(has("error: expected this, seen that\n")) << text;
    EXPECT_TRUE(has("\"message\":\"expected this, seen that\""));
    EXPECT_TRUE(has("error: the command line: 1 more error not shown\n"));
}

TEST_F(Report, MalformedRules) {
    drivers::Table table;
    table.apply("\nadn\n");
    EXPECT_FALSE(table.apply_word("rank,xen"));
    boot::print_diagnostics(table);
    EXPECT_TRUE(
        has("error: map file, line 2: expected what to do (add, remove, rank), seen 'adn': did you mean 'add'?\n"))
        << text;
    EXPECT_TRUE(has("error: map= on the command line: expected a native driver (ata, nvme, ahci, e1000), seen the end "
                    "of the line\n"));
    EXPECT_TRUE(has("\"message\":\"map file, line 2: "));
}

TEST_F(Report, TheBootRecord) {
    boot::add_range(*info, 0x100000, 0x200000, boot::MemoryKind::usable);
    boot::add_range(*info, 0x400000, 0x1000, boot::MemoryKind::reserved);
    hv::Sightings sightings;
    boot::boot_record(*info, sightings,
                      {.backend = "fake",
                       .clock = "a clock",
                       .tsc_hz = 2'000'000'000,
                       .clock_assumed = true,
                       .detected = 17,
                       .first_probe = 23});
    EXPECT_TRUE(has("@{\"record\":\"boot\",\"entry\":\"pvh\",\"vm_guest\":\"")) << text;
    EXPECT_TRUE(has("\"backend\":\"fake\",\"signatures\":[],\"memory_bytes\":2097152,\"tsc_khz\":2000000,"
                    "\"clock\":\"a clock\",\"clock_assumed\":true,\"detect_ns\":17,\"first_probe_ns\":23}\n"))
        << text;
}

} // namespace
