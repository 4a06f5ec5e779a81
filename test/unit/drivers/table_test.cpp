#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.text;
import core.log;
import drivers.table;
import hv.backend;

namespace {
using namespace fl;
using drivers::Table;
using drivers::Twin;
using hv::VmGuest;

std::string order(const drivers::Plan& plan) {
    std::string text;
    for (std::string_view name : plan.drivers()) {
        text += std::string(name) + " ";
    }
    return text;
}

std::string complaints(const Table& table) {
    std::string text;
    for (const auto& d : table.diagnostics()) {
        text += std::to_string(d.line) + ": " + std::string(d.message.view()) + "\n";
    }
    return text;
}

TEST(Table, BuiltIn) {
    const Table table;
    const auto xen = table.plan(VmGuest::xen, std::nullopt);
    EXPECT_EQ(order(xen), "xen_blk storvsc virtio_blk virtio_scsi pvscsi ata nvme ahci xen_net e1000 ");
    ASSERT_NE(xen.pair("ata", "xen_blk"), nullptr);
    EXPECT_EQ(xen.pair("xen_blk", "ata"), xen.pair("ata", "xen_blk"));
    EXPECT_EQ(xen.pair("ata", "xen_blk")->rank, 100);
    EXPECT_EQ(xen.pair("ata", "xen_blk")->twin, Twin::leave);
    EXPECT_FALSE(xen.both("ata", "xen_blk"));
    EXPECT_FALSE(xen.unplugs().any());
    for (const std::string native : {"ahci", "nvme"}) { // [xen-unplug]: twins as well
        ASSERT_NE(xen.pair(native, "xen_blk"), nullptr);
        EXPECT_EQ(xen.pair(native, "xen_blk")->twin, Twin::leave);
        EXPECT_FALSE(xen.both(native, "xen_blk"));
        EXPECT_TRUE(xen.has_twins(native));
        EXPECT_FALSE(table.plan(VmGuest::kvm, std::nullopt).has_twins(native));
        EXPECT_FALSE(table.plan(VmGuest::hyperv, std::nullopt).has_twins(native));
    }
    EXPECT_TRUE(table.plan(VmGuest::hyperv, std::nullopt).has_twins("ata"));
    EXPECT_EQ(table.plan(VmGuest::xen, Twin::unplug).unplugs(),
              (hv::EmulatedClasses{.disks = true, .nics = true, .nvme = true}));
    const auto hyperv = table.plan(VmGuest::hyperv, std::nullopt);
    EXPECT_EQ(order(hyperv), "xen_blk storvsc virtio_blk virtio_scsi pvscsi ata nvme ahci xen_net e1000 ");
    ASSERT_NE(hyperv.pair("ata", "storvsc"), nullptr);
    EXPECT_EQ(hyperv.pair("ata", "storvsc")->rank, 100);
    EXPECT_EQ(hyperv.pair("ata", "storvsc")->twin, Twin::leave);
    EXPECT_EQ(hyperv.pair("ata", "xen_blk"), nullptr);
    ASSERT_NE(xen.pair("e1000", "xen_net"), nullptr);
    EXPECT_EQ(xen.pair("e1000", "xen_net")->rank, 100) << "the emulated card is the same one";
    EXPECT_FALSE(xen.both("e1000", "xen_net"));
    EXPECT_EQ(hyperv.pair("e1000", "xen_net"), nullptr);
    const auto kvm = table.plan(VmGuest::kvm, std::nullopt);
    EXPECT_EQ(kvm.pair("ata", "xen_blk"), nullptr);
    EXPECT_EQ(kvm.driver_count, drivers::known_drivers.size())
        << "every driver is tried everywhere: it finds its device or does not";
}

// The drivers of virtio's and VMware's disks come before those of each kind of emulated disk, on every hypervisor, and
// a rule can turn each pair round.
TEST(Table, ParavirtualDisksBeforeEmulatedOnes) {
    for (const VmGuest guest :
         {VmGuest::bare, VmGuest::kvm, VmGuest::tcg, VmGuest::vmware, VmGuest::xen, VmGuest::hyperv}) {
        for (const std::string native : {"ata", "nvme", "ahci"}) {
            EXPECT_FALSE(drivers::driver_named(native)->synthetic);
            for (const std::string synthetic : {"virtio_blk", "virtio_scsi", "pvscsi"}) {
                EXPECT_TRUE(drivers::driver_named(synthetic)->synthetic);
                Table table;
                const auto before = [&](const std::string& a, const std::string& b) {
                    const auto plan = table.plan(guest, std::nullopt);
                    EXPECT_FALSE(plan.conflicting);
                    return std::ranges::find(plan.drivers(), a) < std::ranges::find(plan.drivers(), b);
                };
                const auto plan = table.plan(guest, std::nullopt);
                ASSERT_NE(plan.pair(native, synthetic), nullptr) << native << ' ' << synthetic;
                EXPECT_TRUE(plan.both(native, synthetic)) << "they are different disks";
                EXPECT_FALSE(plan.unplugs().any());
                EXPECT_TRUE(before(synthetic, native));
                EXPECT_TRUE(table.apply_word("rank,*," + native + "," + synthetic + ",-60"));
                EXPECT_TRUE(before(native, synthetic));
            }
        }
    }
}

TEST(Table, TheMapFileTurnsThePreferenceRound) {
    Table table;
    EXPECT_EQ(table.apply("# IDE first\nrank xen ata xen_blk -100\n"), 0u);
    const auto plan = table.plan(VmGuest::xen, std::nullopt);
    EXPECT_EQ(order(plan), "storvsc virtio_blk virtio_scsi pvscsi ata xen_blk nvme ahci xen_net e1000 ");
    EXPECT_FALSE(plan.both("ata", "xen_blk"));
    EXPECT_EQ(plan.pair("ata", "xen_blk")->twin, Twin::leave);
}

TEST(Table, AddRemoveRankAndLines) {
    Table table;
    EXPECT_EQ(table.apply("\r\n  add  xen\tata xen_blk +7 unplug # why\r\n\n#only a comment\nremove * ata xen_blk\nadd "
                          "kvm ata xen_blk 0"),
              0u)
        << complaints(table);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk"), nullptr);
    const auto kvm = table.plan(VmGuest::kvm, std::nullopt);
    EXPECT_TRUE(kvm.both("ata", "xen_blk")) << "rank 0: both attach";
    EXPECT_TRUE(table.apply_word("add,xen,ata,xen_blk,5,unplug")) << complaints(table);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).unplugs(), hv::EmulatedClasses{.disks = true});
    EXPECT_EQ(table.wrong(), 0u);
}

TEST(Table, AMalformedRuleOfTheCommandLineIsDetectedAfterMalformedLines) {
    Table table;
    for (u32 i = 0; i < 2 * Table::max_diagnostics; ++i) {
        EXPECT_EQ(table.apply("adn"), 1u);
    }
    EXPECT_FALSE(table.wrong_word());
    EXPECT_FALSE(table.apply_word("rank,xen,ata,xen_blk,high"));
    EXPECT_TRUE(table.wrong_word());
}

TEST(Table, MalformedLinesAreReportedByNumberAndTheRestCounts) {
    Table table;
    const u32 bad = table.apply("adn xen ata xen_blk 1\n"         // 1
                                "add xne ata xen_blk 1\n"         // 2
                                "add xen xen_blk ata 1\n"         // 3
                                "add xen ata xen_blk ten\n"       // 4
                                "add xen ata\n"                   // 5
                                "add xen ata xen_blk 1 keeep\n"   // 6
                                "rank xen ata xen_blk -5\n"       // 7: right
                                "rank xen ata xen_blk 1 leave\n"  // 7: valid
                                "remove kvm ata xen_blk\n"        // 9
                                "add xen ata xen_blk -1 unplug\n" // 10
                                "rank xen ata xen_blk 1000001\n"  // 11
                                "\x01\xff rank\n");               // 12
    EXPECT_EQ(bad, 11u);
    EXPECT_EQ(table.wrong(), 11u);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk")->rank, -5);
    EXPECT_EQ(
        complaints(table),
        "1: expected what to do (add, remove, rank), seen 'adn': did you mean 'add'?\n"
        "2: expected a hypervisor's name or *, seen 'xne': did you mean 'xen'?\n"
        "3: expected a native driver (ata, nvme, ahci, e1000), seen 'xen_blk'\n"
        "4: expected a rank from -1000000 to 1000000, seen 'ten'\n"
        "5: expected a synthetic driver (xen_blk, storvsc, virtio_blk, virtio_scsi, pvscsi, xen_net), seen the end of "
        "the line\n"
        "6: expected what becomes of the emulated twin (leave, unplug, keep), seen 'keeep': did you mean 'keep'?\n"
        "8: expected the end of the rule, seen 'leave'\n"
        "9: expected a rule that is in the table, seen a pair for which it has none: add it, or name the hypervisor as "
        "its rule does\n"
        "10: expected a positive rank with unplug: it takes the native driver's device away, which would be tried "
        "first\n"
        "11: expected a rank from -1000000 to 1000000, seen '1000001'\n"
        "12: expected what to do (add, remove, rank), seen '?\?'\n");
}

TEST(Table, CommandLineRules) {
    Table table;
    EXPECT_TRUE(table.apply_word("rank,xen,ata,xen_blk,-1"));
    EXPECT_FALSE(table.apply_word("rank,xen,,xen_blk,-1"));
    EXPECT_FALSE(table.apply_word(""));
    EXPECT_FALSE(table.apply_word("rank xen ata xen_blk -1"));
    EXPECT_FALSE(table.apply_word("rank,xen,ata,xen_blk,-1,"));
    EXPECT_EQ(table.diagnostics()[0].line, 0u);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk")->rank, -1);
}

TEST(Table, AnyHypervisor) {
    Table table;
    EXPECT_EQ(table.apply("add * ata xen_blk 5 keep\n"), 0u);
    EXPECT_EQ(table.plan(VmGuest::kvm, std::nullopt).pair("ata", "xen_blk")->rank, 5);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk")->rank, 100) << "the named one beats it";
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair_count, 13u)
        << "the others are those of ahci and nvme, and of virtio_blk, virtio_scsi, pvscsi and xen_net";
    EXPECT_EQ(table.apply("rank * ata xen_blk -3\n"), 0u) << "every rule of the pair";
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk")->rank, -3);
    EXPECT_EQ(table.plan(VmGuest::kvm, std::nullopt).pair("ata", "xen_blk")->rank, -3);
    EXPECT_EQ(table.apply("remove xen ata xen_blk\n"), 0u);
    EXPECT_EQ(table.plan(VmGuest::xen, std::nullopt).pair("ata", "xen_blk")->twin, Twin::keep)
        << "now the general one shows";
}

TEST(Table, TheCommandLineOverridesTheTwin) {
    Table table;
    EXPECT_TRUE(table.plan(VmGuest::xen, Twin::keep).both("ata", "xen_blk"));
    EXPECT_TRUE(table.plan(VmGuest::xen, Twin::unplug).unplugs().disks);
    EXPECT_TRUE(table.apply_word("rank,xen,ata,xen_blk,-1"));
    EXPECT_EQ(table.plan(VmGuest::xen, Twin::unplug).unplugs(), (hv::EmulatedClasses{.nics = true, .nvme = true}))
        << "what comes first is not taken away";
}

TEST(Table, WithoutTwinsARuleGivesOnlyTheOrder) {
    Table table;
    for (const auto emulated : {std::optional<Twin>{}, std::optional(Twin::unplug), std::optional(Twin::leave)}) {
        const auto plan = table.plan(VmGuest::kvm, emulated);
        EXPECT_TRUE(plan.both("ata", "virtio_blk"));
        EXPECT_FALSE(plan.unplugs().any());
        EXPECT_LT(std::ranges::find(plan.drivers(), "virtio_blk") - plan.drivers().begin(),
                  std::ranges::find(plan.drivers(), "ata") - plan.drivers().begin());
    }
    EXPECT_TRUE(table.apply_word("rank,*,ata,virtio_blk,-1"));
    const auto plan = table.plan(VmGuest::kvm, std::nullopt);
    EXPECT_LT(std::ranges::find(plan.drivers(), "ata") - plan.drivers().begin(),
              std::ranges::find(plan.drivers(), "virtio_blk") - plan.drivers().begin());
}

TEST(Table, AFloodOfLinesIsBounded) {
    Table table;
    std::string file;
    for (int i = 0; i < 10000; ++i) {
        file += "nonsense\n";
    }
    EXPECT_EQ(table.apply(file), 10000u);
    EXPECT_EQ(table.diagnostics().size(), Table::max_diagnostics);
    // There is still room for one rule per hypervisor.
    for (std::string_view guest : hv::vm_guest_names) {
        EXPECT_TRUE(table.apply_word("add," + std::string(guest) + ",ata,xen_blk,1"));
    }
    EXPECT_LE(table.rules().size(), Table::max_rules);
}

TEST(Table, ThePlanIsPrinted) {
    struct Capture final : log::Sink {
        std::string text;
        void write(std::string_view t) override { text += t; }
    } capture;
    log::attach(capture);
    drivers::log_plan(Table{}.plan(VmGuest::xen, std::nullopt), VmGuest::xen);
    log::detach(capture);
    EXPECT_EQ(capture.text,
              "drivers on xen: xen_blk, storvsc, virtio_blk, virtio_scsi, pvscsi, ata, nvme, ahci, xen_net, e1000\n"
              "drivers: xen_blk and ata, rank 100, twin: leave\ndrivers: xen_blk and ahci, rank 100, twin: leave\n"
              "drivers: xen_blk and nvme, rank 100, twin: leave\ndrivers: xen_net and e1000, rank 100, twin: leave\n")
        << "without pairs that are never twins";
}

// Drivers of two classes, with two kinds of emulated devices that are unplugged separately.
constexpr std::array<drivers::DriverInfo, 5> classes{{
    {"front_disk", true, drivers::DeviceKind::disk},
    {"front_net", true, drivers::DeviceKind::network},
    {"ide", false, drivers::DeviceKind::disk, {.disks = true}},
    {"nvm", false, drivers::DeviceKind::disk, {.nvme = true}},
    {"nic", false, drivers::DeviceKind::network, {.nics = true}},
}};

TEST(Table, ARulePairsDriversOfOneClass) {
    Table table(classes, {});
    EXPECT_EQ(table.apply("add xen nic front_disk 1\nadd xen nic front_net 1\n"), 1u);
    EXPECT_EQ(complaints(table), "1: expected two drivers of one class of devices, seen 'nic' (class network card) and "
                                 "'front_disk' (class disk)\n");
    EXPECT_NE(table.plan(VmGuest::xen, std::nullopt).pair("nic", "front_net"), nullptr);
}

TEST(Table, WhatIsUnpluggedIsTheClassOfTheNativeDriver) {
    const auto unplugs = [](std::string_view rules, std::optional<Twin> twin = std::nullopt) {
        Table table(classes, {});
        EXPECT_EQ(table.apply(rules), 0u) << complaints(table);
        return table.plan(VmGuest::xen, twin).unplugs();
    };
    EXPECT_EQ(unplugs("add xen nic front_net 1 unplug\nadd xen ide front_disk 1 leave"),
              hv::EmulatedClasses{.nics = true});
    EXPECT_EQ(unplugs("add xen nvm front_disk 1 unplug"), hv::EmulatedClasses{.nvme = true});
    EXPECT_EQ(unplugs("add xen ide front_disk 1\nadd xen nic front_net -1\nadd xen nvm front_disk 0", Twin::unplug),
              hv::EmulatedClasses{.disks = true})
        << "what comes first, or is kept, is not taken away";
    EXPECT_FALSE(unplugs("add kvm ide front_disk 1 unplug").any()) << "another hypervisor's rule";
}
} // namespace
