#include "gtest_macros.hpp"
#include "machines/machines.hpp"
import test.gtest;
import host.std;
import core.text;
import core.log;
import core.cpuid;
import core.smbios;
import hv.detect;

namespace {
using namespace fl;
using hv::VmGuest;
using hv::When;

CpuidSnapshot scan(const machines::Machine& machine) {
    CpuidSnapshot s;
    scan_cpuid(s, [&](u32 leaf, u32 subleaf) {
        const machines::Leaf l = machines::answer(machine, leaf, subleaf);
        return CpuidRegisters{l.eax, l.ebx, l.ecx, l.edx};
    });
    return s;
}

hv::Sightings detected(const machines::Machine& machine, const Smbios* smbios = nullptr) {
    return hv::detect(scan(machine), smbios);
}

bool everything(VmGuest) { return true; }
bool without_hyperv(VmGuest g) {
    return g == VmGuest::xen || g == VmGuest::kvm || g == VmGuest::tcg || g == VmGuest::bare;
}
bool without_xen(VmGuest g) { return g == VmGuest::hyperv || g == VmGuest::kvm || g == VmGuest::bare; }
bool bare_only(VmGuest g) { return g == VmGuest::bare; }

VmGuest chosen(const machines::Machine& machine, bool (*built)(VmGuest) = everything) {
    return hv::choose(detected(machine), {}, built).guest;
}

// Names are defined in one place, for `if constexpr` and for output.
static_assert(hv::name(VmGuest::hyperv) == "hyperv" && hv::name(VmGuest::openbsd) == "openbsd" &&
              hv::name(VmGuest::bare) == "bare");
static_assert(hv::vm_guest_named("kvm") == VmGuest::kvm && !hv::vm_guest_named("KVM") && !hv::vm_guest_named(""));
static_assert(hv::built_for(VmGuest::bare) && !hv::built_for(VmGuest::vmware));

TEST(Detect, RecordedMachines) {
    struct {
        const machines::Machine& machine;
        VmGuest with_everything;
        VmGuest today; // without a module for Hyper-V
    } const expected[] = {
        {machines::kvm, VmGuest::kvm, VmGuest::kvm},
        {machines::kvm_timing, VmGuest::kvm, VmGuest::kvm},
        {machines::kvm_old, VmGuest::kvm, VmGuest::kvm},
        {machines::kvm_hyperv, VmGuest::hyperv, VmGuest::kvm},
        {machines::kvm_hidden_hyperv, VmGuest::hyperv, VmGuest::hyperv},
        {machines::kvm_hyperv_no_synic, VmGuest::kvm, VmGuest::kvm},
        {machines::kvm_hyperv_renamed, VmGuest::hyperv, VmGuest::hyperv},
        {machines::kvm_hidden, VmGuest::other, VmGuest::other},
        {machines::kvm_no_bit, VmGuest::kvm, VmGuest::kvm},
        {machines::xen_hvm, VmGuest::xen, VmGuest::xen},
        {machines::xen_pvh, VmGuest::xen, VmGuest::xen},
        {machines::xen_viridian, VmGuest::xen, VmGuest::xen},
        {machines::qemu_xen, VmGuest::xen, VmGuest::xen},
        {machines::three, VmGuest::xen, VmGuest::xen},
        {machines::last_base, VmGuest::kvm, VmGuest::kvm},
        {machines::tcg, VmGuest::tcg, VmGuest::tcg},
        {machines::vmware, VmGuest::vmware, VmGuest::vmware},
        {machines::bhyve, VmGuest::bhyve, VmGuest::bhyve},
        {machines::virtualbox, VmGuest::virtualbox, VmGuest::virtualbox},
        {machines::parallels, VmGuest::parallels, VmGuest::parallels},
        {machines::azure, VmGuest::hyperv, VmGuest::hyperv},
        {machines::openvmm_kvm, VmGuest::hyperv, VmGuest::hyperv},
        {machines::bare_intel, VmGuest::bare, VmGuest::bare},
        {machines::bare_amd, VmGuest::bare, VmGuest::bare},
        {machines::bare_skylake, VmGuest::bare, VmGuest::bare},
    };
    ASSERT_EQ(std::size(expected), std::size(machines::all)) << "a recorded machine without an expectation";
    for (const auto& e : expected) {
        EXPECT_EQ(hv::name(chosen(e.machine)), hv::name(e.with_everything)) << e.machine.name;
        EXPECT_EQ(hv::name(chosen(e.machine, without_hyperv)), hv::name(e.today)) << e.machine.name;
    }
}

TEST(Detect, WhatCanBeUsedBeatsAName) {
    // Without Xen's module, Hyper-V's interface on the same machine is used; without any module, the policy's first
    // match is named.
    EXPECT_EQ(chosen(machines::three, without_xen), VmGuest::hyperv);
    EXPECT_EQ(chosen(machines::qemu_xen, without_xen), VmGuest::kvm);
    EXPECT_EQ(chosen(machines::three, bare_only), VmGuest::xen);
    EXPECT_EQ(chosen(machines::xen_viridian, without_xen), VmGuest::hyperv);
}

TEST(Detect, KeepsEverySighting) {
    const auto s = detected(machines::three);
    ASSERT_EQ(s.count, 3u);
    EXPECT_TRUE(s.hypervisor_bit);
    EXPECT_EQ(s.find(VmGuest::hyperv)->base, 0x40000000u);
    EXPECT_EQ(s.find(VmGuest::hyperv)->version, 0x000a0000u);
    EXPECT_EQ(s.find(VmGuest::hyperv)->build, 14393u);
    EXPECT_EQ(s.find(VmGuest::xen)->base, 0x40000100u);
    EXPECT_EQ(s.find(VmGuest::xen)->version, 0x00040011u);
    EXPECT_EQ(s.find(VmGuest::xen)->features, 0x58u);
    EXPECT_EQ(s.find(VmGuest::kvm)->base, 0x40000200u);
    EXPECT_EQ(s.find(VmGuest::kvm)->features, 0x01007efbu);
    EXPECT_EQ(s.find(VmGuest::vmware), nullptr);
}

TEST(Detect, AVmbusIsRuledOutOnlyByWhatMakesItImpossible) {
    const auto s = detected(machines::azure);
    const hv::Sighting whole = *s.find(VmGuest::hyperv);
    EXPECT_TRUE(hv::offers_vmbus(whole));
    for (u32 bit : {2u, 5u}) { // SynIC, hypercalls
        hv::Sighting less = whole;
        less.features &= ~(1u << bit);
        EXPECT_FALSE(hv::offers_vmbus(less)) << bit;
    }
    hv::Sighting less = whole;
    less.features = 1u << 2 | 1u << 5;
    less.features_high = 0;
    EXPECT_TRUE(hv::offers_vmbus(less)) << "the bus decides the rest";
    EXPECT_TRUE(hv::offers_vmbus(*detected(machines::openvmm_kvm).find(VmGuest::hyperv)));
    // A machine that shows KVM and Hyper-V's interface without SynIC counts as KVM; with SynIC the VMBus is tried; hv=
    // overrides both.
    EXPECT_EQ(chosen(machines::kvm_hyperv_no_synic), VmGuest::kvm);
    EXPECT_EQ(hv::choose(detected(machines::kvm_hyperv), *hv::parse_preference("kvm"), everything).guest, VmGuest::kvm);
    EXPECT_EQ(hv::choose(detected(machines::kvm_hyperv_no_synic), *hv::parse_preference("hyperv"), everything).guest,
              VmGuest::hyperv);
    EXPECT_FALSE(hv::offers_vmbus(*detected(machines::kvm_hyperv_no_synic).find(VmGuest::hyperv)));
    EXPECT_FALSE(hv::offers_vmbus(*detected(machines::xen_viridian).find(VmGuest::hyperv)));
}

TEST(Detect, FifteenBitDestinationsAreOfferedByKvmAndXen) {
    const auto with = [](VmGuest guest, u32 features) {
        hv::Sightings s;
        s.list[s.count++] = {.guest = guest, .features = features};
        return hv::offers_extended_destinations(s);
    };
    EXPECT_TRUE(with(VmGuest::kvm, 1u << 15));
    EXPECT_FALSE(with(VmGuest::kvm, ~(1u << 15)));
    EXPECT_TRUE(with(VmGuest::xen, 1u << 5));
    EXPECT_FALSE(with(VmGuest::xen, ~(1u << 5)));
    EXPECT_FALSE(with(VmGuest::hyperv, ~0u)) << "another meaning there";
    EXPECT_FALSE(hv::offers_extended_destinations({}));
}

TEST(Detect, ThePolicyNamesEveryGuestAndGivesReasons) {
    for (usize g = 1; g < hv::vm_guest_names.size(); ++g) {
        EXPECT_TRUE(std::ranges::any_of(
            hv::policy(), [&](const auto& r) { return r.guest == static_cast<VmGuest>(g) && r.applies == nullptr; }))
            << hv::vm_guest_names[g] << " would be sighted and never chosen";
    }
    for (const auto& rule : hv::policy()) {
        EXPECT_FALSE(rule.reason.empty());
    }
}

TEST(Detect, OverrideWinsAndWarnsWhenUnsighted) {
    const auto s = detected(machines::three);
    auto choice = hv::choose(s, *hv::parse_preference("kvm"), everything);
    EXPECT_EQ(choice.guest, VmGuest::kvm);
    EXPECT_TRUE(choice.overridden);
    EXPECT_FALSE(choice.unsighted);
    choice = hv::choose(s, *hv::parse_preference("vmware"), everything);
    EXPECT_EQ(choice.guest, VmGuest::vmware);
    EXPECT_TRUE(choice.unsighted);
    choice = hv::choose(s, *hv::parse_preference("bare"), everything);
    EXPECT_EQ(choice.guest, VmGuest::bare);
    EXPECT_FALSE(choice.unsighted) << "bare is always there";
    choice = hv::choose(s, *hv::parse_preference("late"), everything);
    EXPECT_EQ(choice.guest, VmGuest::xen);
    EXPECT_EQ(choice.when, When::late);
    EXPECT_FALSE(choice.overridden);
    choice = hv::choose(s, *hv::parse_preference("late:kvm"), everything);
    EXPECT_EQ(choice.guest, VmGuest::kvm);
    EXPECT_EQ(choice.when, When::late);
    EXPECT_EQ(hv::choose(s, *hv::parse_preference("auto"), everything).when, When::entry);
    for (std::string_view bad : {"", "Xen", "late:", "late:foo", "xen ", "latexen"}) {
        EXPECT_FALSE(hv::parse_preference(bad)) << bad;
    }
}

Smbios firmware(std::string_view vendor, std::string_view maker, std::string_view product) {
    Smbios s;
    s.bios_vendor = FixedText<64>(vendor);
    s.manufacturer = FixedText<64>(maker);
    s.product = FixedText<64>(product);
    return s;
}

TEST(Detect, FirmwareStringsOnlyWithoutLeaves) {
    const Smbios hyperv = firmware("American Megatrends Inc.", "Microsoft Corporation", "Virtual Machine");
    EXPECT_EQ(detected(machines::kvm, &hyperv).count, 1u);
    EXPECT_FALSE(detected(machines::kvm, &hyperv).has(VmGuest::hyperv));
    auto s = detected(machines::bare_intel, &hyperv);
    ASSERT_EQ(s.count, 1u);
    EXPECT_EQ(s.list[0].guest, VmGuest::hyperv);
    EXPECT_EQ(s.list[0].base, 0u);
    const auto choice = hv::choose(s, {}, everything);
    EXPECT_EQ(choice.guest, VmGuest::hyperv);
    EXPECT_EQ(choice.reason, "by the firmware's strings only");
    const Smbios laptop = firmware("Microsoft Corporation", "Microsoft Corporation", "Surface Pro");
    EXPECT_EQ(detected(machines::bare_intel, &laptop).count, 0u) << "a real computer of the same maker";
    const Smbios xen = firmware("Xen", "Xen", "HVM domU");
    EXPECT_TRUE(detected(machines::bare_intel, &xen).has(VmGuest::xen));
    const Smbios qemu = firmware("SeaBIOS", "QEMU", "Standard PC (i440FX + PIIX, 1996)");
    EXPECT_TRUE(detected(machines::kvm_hidden, &qemu).has(VmGuest::other));
    const Smbios vbox = firmware("innotek GmbH", "innotek GmbH", "VirtualBox");
    EXPECT_TRUE(detected(machines::bare_amd, &vbox).has(VmGuest::virtualbox));
    const Smbios nobody = firmware("", "", "");
    EXPECT_EQ(detected(machines::bare_amd, &nobody).count, 0u);
}

TEST(Detect, TheVariable) {
    EXPECT_EQ(hv::vm_guest(), VmGuest::bare);
    hv::set_vm_guest(VmGuest::xen);
    EXPECT_EQ(hv::vm_guest(), VmGuest::xen);
    hv::set_vm_guest(VmGuest::bare);
}

struct Capture final : log::Sink {
    std::string text;
    void write(std::string_view t) override { text += t; }
};

TEST(Detect, PrintsForPeople) {
    Capture capture;
    log::attach(capture);
    const auto cpuid = scan(machines::xen_viridian);
    const auto s = hv::detect(cpuid, nullptr);
    hv::log_detection(cpuid, s, hv::choose(s, {}, everything));
    hv::log_detection(cpuid, s, hv::choose(s, *hv::parse_preference("vmware"), everything));
    log::detach(capture);
    EXPECT_NE(capture.text.find("detection: hyperv at 0x40000000-0x40000006 \"Microsoft Hv\", version 6.1\n"),
              std::string::npos)
        << capture.text;
    EXPECT_NE(capture.text.find("detection: xen at 0x40000100-0x40000105 \"XenVMMXenVMM\", version 4.17\n"),
              std::string::npos);
    EXPECT_NE(capture.text.find("detection: vm_guest is xen: Xen's own leaves are present"), std::string::npos);
    EXPECT_NE(capture.text.find("warning: detection: vmware was requested (hv=)"), std::string::npos);
}
} // namespace
