#include "gtest_macros.hpp"
#include "machines/machines.hpp"
import test.gtest;
import host.std;
import core.text;
import core.cpuid;

namespace {
using namespace fl;

CpuidSnapshot scan(const machines::Machine& machine) {
    CpuidSnapshot s;
    scan_cpuid(s, [&](u32 leaf, u32 subleaf) {
        const machines::Leaf l = machines::answer(machine, leaf, subleaf);
        return CpuidRegisters{l.eax, l.ebx, l.ecx, l.edx};
    });
    return s;
}

std::string bases(const CpuidSnapshot& s) {
    std::string text;
    for (const HypervisorBase& h : s.hypervisors()) {
        FixedText<64> one;
        print(one, "{:x}-{:x} {}; ", h.base, h.max_leaf, h.signature.view());
        text += one.view();
    }
    return text;
}

TEST(Cpuid, FindsEveryBaseAndItsName) {
    EXPECT_EQ(bases(scan(machines::kvm)), "40000000-40000001 KVMKVMKVM; ");
    EXPECT_EQ(bases(scan(machines::kvm_hyperv)), "40000000-40000005 Microsoft Hv; 40000100-40000101 KVMKVMKVM; ");
    EXPECT_EQ(bases(scan(machines::xen_viridian)), "40000000-40000006 Microsoft Hv; 40000100-40000105 XenVMMXenVMM; ");
    EXPECT_EQ(bases(scan(machines::three)),
              "40000000-40000005 Microsoft Hv; 40000100-40000104 XenVMMXenVMM; 40000200-40000201 KVMKVMKVM; ");
    EXPECT_EQ(bases(scan(machines::last_base)), "4000ff00-4000ff01 KVMKVMKVM; ");
    EXPECT_EQ(bases(scan(machines::bhyve)), "40000000-40000000 bhyve bhyve ; ");
}

TEST(Cpuid, OldKvmReturnsZeroForOneLeaf) { EXPECT_EQ(bases(scan(machines::kvm_old)), "40000000-40000001 KVMKVMKVM; "); }

TEST(Cpuid, MirroredLeavesAreNoHypervisor) {
    EXPECT_EQ(bases(scan(machines::bare_intel)), "");
    EXPECT_EQ(bases(scan(machines::bare_amd)), "");
    EXPECT_EQ(bases(scan(machines::kvm_hidden)), "");
    // A mirrored leaf can hold anything: a highest leaf of another block, a name that is not printable.
    const CpuidRegisters good{0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d};
    EXPECT_TRUE(hypervisor_at(0x40000000, good));
    EXPECT_FALSE(hypervisor_at(0x40000100, good)) << "its highest leaf lies in another block";
    EXPECT_FALSE(hypervisor_at(0x40000000, {0x40000100, 0x4b4d564b, 0x564b4d56, 0x4d}));
    EXPECT_TRUE(hypervisor_at(0x40000000, {0x400000ff, 0x4b4d564b, 0x564b4d56, 0x4d}));
    EXPECT_FALSE(hypervisor_at(0x40000000, {0x40000001, 0, 0, 0})) << "no name";
    EXPECT_FALSE(hypervisor_at(0x40000000, {0x40000001, 0x4b4d564b, 0x564b0056, 0x4d})) << "a NUL amid the name";
    EXPECT_FALSE(hypervisor_at(0x40000000, {0x40000001, 0x4b4d56cb, 0x564b4d56, 0x4d})) << "a byte above 0x7e";
    EXPECT_FALSE(hypervisor_at(0x40000000, {0, 0x61774d56, 0x4d566572, 0x65726177})) << "0 is accepted from KVM only";
}

TEST(Cpuid, TheHypervisorBitDecidesNothing) {
    const CpuidSnapshot s = scan(machines::kvm_no_bit);
    EXPECT_FALSE(s.hypervisor_bit());
    EXPECT_EQ(s.base_count, 1u);
    EXPECT_TRUE(scan(machines::kvm_hidden).hypervisor_bit());
}

TEST(Cpuid, KeepsTheLeavesAndCountsWhatItExecuted) {
    const CpuidSnapshot s = scan(machines::xen_pvh);
    EXPECT_EQ(s.vendor(), "AuthenticAMD");
    EXPECT_EQ(s.get(0x40000001).eax, 0x00040011u);
    EXPECT_EQ(s.get(0x40000003, 2).eax, 2600000u);
    EXPECT_EQ(s.get(0x40000003, 1).edx, 0xffffffffu);
    EXPECT_FALSE(s.find(0x40000006));
    EXPECT_TRUE(s.invariant_tsc());
    EXPECT_FALSE(s.truncated);
    // Each leaf only once: CPUID causes an exit.
    for (const machines::Machine* machine : machines::all) {
        std::set<std::pair<u32, u32>> seen;
        u32 asked = 0;
        CpuidSnapshot snapshot;
        scan_cpuid(snapshot, [&](u32 leaf, u32 subleaf) {
            ++asked;
            EXPECT_TRUE(seen.insert({leaf, subleaf}).second) << machine->name << " " << std::hex << leaf;
            const machines::Leaf l = machines::answer(*machine, leaf, subleaf);
            return CpuidRegisters{l.eax, l.ebx, l.ecx, l.edx};
        });
        EXPECT_EQ(snapshot.executed, asked);
        const bool usual = snapshot.base_count != 0 && snapshot.bases[0].base < 0x40000400;
        EXPECT_EQ(asked >= 256, !usual) << machine->name;
        EXPECT_LE(asked, usual ? 40u : 300u) << machine->name;
    }
}

TEST(Cpuid, FindsWhatAScanOfAllBasesFinds) {
    for (const machines::Machine* machine : machines::all) {
        std::string all;
        for (u32 base = 0x40000000; base <= 0x4000ff00; base += 0x100) {
            const machines::Leaf l = machines::answer(*machine, base, 0);
            if (const auto found = hypervisor_at(base, {l.eax, l.ebx, l.ecx, l.edx})) {
                FixedText<64> one;
                print(one, "{:x}-{:x} {}; ", found->base, found->max_leaf, found->signature.view());
                all += one.view();
            }
        }
        EXPECT_EQ(bases(scan(*machine)), all) << machine->name;
    }
    // An interface anywhere among the first four stands for all; without one, each base is tried.
    for (u32 only = 0x40000000; only <= 0x4000ff00; only += 0x100) {
        CpuidSnapshot s;
        scan_cpuid(s, [&](u32 leaf, u32) {
            return leaf == only ? CpuidRegisters{leaf + 1, 0x4b4d564b, 0x564b4d56, 0x4d} : CpuidRegisters{};
        });
        ASSERT_EQ(s.base_count, 1u) << std::hex << only;
        EXPECT_EQ(s.bases[0].base, only);
    }
}

TEST(Cpuid, AFloodOfHypervisorsIsBounded) {
    CpuidSnapshot s;
    scan_cpuid(s, [](u32 leaf, u32) {
        const bool base = leaf >= 0x40000000 && leaf <= 0x4000ff00 && leaf % 0x100 == 0;
        return base ? CpuidRegisters{leaf + 0xff, 0x4b4d564b, 0x564b4d56, 0x4d} : CpuidRegisters{~0u, ~0u, ~0u, ~0u};
    });
    EXPECT_EQ(s.base_count, CpuidSnapshot::usual_bases);
    EXPECT_FALSE(s.truncated);
    scan_cpuid(s, [](u32 leaf, u32) { // none at the usual places
        const bool base = leaf >= 0x40000400 && leaf <= 0x4000ff00 && leaf % 0x100 == 0;
        return base ? CpuidRegisters{leaf + 0xff, 0x4b4d564b, 0x564b4d56, 0x4d} : CpuidRegisters{};
    });
    EXPECT_EQ(s.base_count, CpuidSnapshot::max_bases);
    EXPECT_EQ(s.leaf_count, CpuidSnapshot::max_leaves);
    EXPECT_TRUE(s.truncated);
}

TEST(Cpuid, FrequencyOfTheCounter) {
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::vmware)), 2'599'999'000u);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::kvm_timing)), 2'994'374'000u);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::virtualbox)), 2'904'000'000u);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::bare_skylake)), 2'592'000'000u);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::kvm)), std::nullopt);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::azure)), std::nullopt);
    EXPECT_EQ(tsc_hz_by_cpuid(scan(machines::bare_amd)), std::nullopt);
}
} // namespace
