// Recorded machines: the CPUID output of each, in the order of `cpuid -r`. The registers are transcribed from the
// hypervisors' specifications and sources and from public dumps (docs/hypervisors.md, "Recorded machines"), never from
// this project's constants. Unlisted leaves are answered as by the real machine: with the data of the highest basic
// leaf (Intel, and QEMU and KVM on Intel), or with zeroes (AMD).
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

namespace machines {

struct Leaf {
    std::uint32_t leaf, subleaf, eax, ebx, ecx, edx;
};

enum class Unknown { highest_basic, zero };

struct Machine {
    std::string_view name;
    Unknown unknown;
    std::span<const Leaf> leaves;
};

// The basic leaves of a processor, with the hypervisor bit (ECX of leaf 1, bit 31) set or clear.
#define INTEL_BASIC                                                                                                    \
    {0x0, 0, 0x0000000d, 0x756e6547, 0x6c65746e, 0x49656e69},                                                          \
        {0x1, 0, 0x000806ea, 0x00010800, 0xfffa3203, 0x0f8bfbff},                                                      \
        {0x7, 0, 0x00000000, 0x009c6fbf, 0x00000004, 0x84000000},                                                      \
        {0xd, 0, 0x0000001f, 0x00000440, 0x00000440, 0x00000000}, {0x80000000, 0, 0x80000008, 0, 0, 0},                \
        {0x80000001, 0, 0, 0, 0x00000121, 0x2c100800}, {0x80000007, 0, 0, 0, 0, 0x00000100},                           \
        {0x80000008, 0, 0x00003027, 0, 0, 0}
#define AMD_BASIC                                                                                                      \
    {0x0, 0, 0x00000010, 0x68747541, 0x444d4163, 0x69746e65},                                                          \
        {0x1, 0, 0x00a00f11, 0x00020800, 0xfef83203, 0x178bfbff}, {0x80000000, 0, 0x8000001f, 0, 0, 0},                \
        {0x80000001, 0, 0x00a00f11, 0, 0x000007f3, 0x2fd3fbff}, {0x80000007, 0, 0, 0, 0, 0x00000100}

// KVM under QEMU, -cpu host: one base. Features: clocksource, nop delay, clocksource2, async page fault, PV EOI …,
// stable clock.
inline constexpr Leaf kvm_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000001, 0, 0x01007efb, 0, 0, 0},
};
// The same with an invariant TSC: QEMU adds VMware's timing leaf (TSC kHz, APIC bus kHz).
inline constexpr Leaf kvm_timing_leaves[] = {
    AMD_BASIC,
    {0x40000000, 0, 0x40000010, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000001, 0, 0x01007efb, 0, 0, 0},
    {0x40000010, 0, 2994374, 1000000, 0, 0},
};
// KVM before 2012 returned 0 as the highest leaf, meaning 0x40000001.
inline constexpr Leaf kvm_old_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000001, 0, 0x0000003b, 0, 0, 0},
};
// QEMU -cpu host,hv-relaxed,hv-vpindex,hv-time,hv-synic,hv-stimer,hv-vapic,hv-runtime,hv-reset: Hyper-V at the lower
// base, KVM at the higher one.
#define QEMU_HYPERV_WITH_SYNIC                                                                                         \
    {0x40000000, 0, 0x40000005, 0x7263694d, 0x666f736f, 0x76482074}, {0x40000001, 0, 0x31237648, 0, 0, 0},             \
        {0x40000002, 0, 0x00003839, 0x000a0000, 0, 0}, {0x40000003, 0, 0x000002ff, 0x00000030, 0, 0x00000008},         \
        {0x40000004, 0, 0x00000028, 0xffffffff, 0, 0}, {0x40000005, 0, 0x00000040, 0, 0, 0}
inline constexpr Leaf kvm_hyperv_leaves[] = {
    AMD_BASIC,
    QEMU_HYPERV_WITH_SYNIC,
    {0x40000100, 0, 0x40000101, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000101, 0, 0x01007efb, 0, 0, 0},
};
// The same with kvm=off: no KVM leaves.
inline constexpr Leaf kvm_hidden_hyperv_leaves[] = {AMD_BASIC, QEMU_HYPERV_WITH_SYNIC};
// The default of management software for Windows guests: hv-relaxed, hv-vapic, hv-spinlocks. No SynIC, so no VMBus.
inline constexpr Leaf kvm_hyperv_no_synic_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x40000005, 0x7263694d, 0x666f736f, 0x76482074},
    {0x40000001, 0, 0x31237648, 0, 0, 0},
    {0x40000002, 0, 0x00003839, 0x000a0000, 0, 0},
    {0x40000003, 0, 0x00000030, 0, 0, 0},
    {0x40000004, 0, 0x0000002a, 0x00001fff, 0, 0},
    {0x40000005, 0, 0x00000040, 0, 0, 0},
    {0x40000100, 0, 0x40000101, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000101, 0, 0x01007efb, 0, 0, 0},
};
// hv-vendor-id=ExampleCloud: another name with the same interface.
inline constexpr Leaf kvm_hyperv_renamed_leaves[] = {
    AMD_BASIC,
    {0x40000000, 0, 0x40000005, 0x6d617845, 0x43656c70, 0x64756f6c},
    {0x40000001, 0, 0x31237648, 0, 0, 0},
    {0x40000002, 0, 0x00003839, 0x000a0000, 0, 0},
    {0x40000003, 0, 0x000002ff, 0x00000030, 0, 0},
};
// kvm=off only: the hypervisor bit without any leaf.
inline constexpr Leaf kvm_hidden_leaves[] = {INTEL_BASIC};
// -cpu host,-hypervisor: leaves present, but the bit (leaf 1 ECX 31) is clear.
inline constexpr Leaf kvm_no_bit_leaves[] = {
    {0x0, 0, 0x0000000d, 0x756e6547, 0x6c65746e, 0x49656e69},
    {0x1, 0, 0x000806ea, 0x00010800, 0x7ffa3203, 0x0f8bfbff},
    {0xd, 0, 0x0000001f, 0x00000440, 0x00000440, 0x00000000},
    {0x80000000, 0, 0x80000008, 0, 0, 0},
    {0x40000000, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000001, 0, 0x01007efb, 0, 0, 0},
};

// Xen 4.17. Leaf 2: one hypercall page, its MSR; leaf 4: HVM features.
#define XEN_AT(base, features)                                                                                         \
    {base, 0, (base) + 5, 0x566e6558, 0x65584d4d, 0x4d4d566e}, {(base) + 1, 0, 0x00040011, 0, 0, 0},                   \
        {(base) + 2, 0, 0x00000001, 0x40000000 + ((base) - 0x40000000), 0, 0},                                         \
        {(base) + 3, 0, 0x00000000, 0x00000003, 2600000, 1},                                                           \
        {(base) + 3, 1, 0x2b1e8a04, 0x000000d7, 0xc4ec4ec4, 0xffffffff}, {(base) + 3, 2, 2600000, 0, 0, 0},            \
        {(base) + 4, 0, features, 0, 7, 0}, {(base) + 5, 0, 0x00000027, 0, 0, 0}
inline constexpr Leaf xen_hvm_leaves[] = {INTEL_BASIC, XEN_AT(0x40000000, 0x0000005d)};
inline constexpr Leaf xen_pvh_leaves[] = {AMD_BASIC, XEN_AT(0x40000000, 0x0000007c)};
// viridian=1: Hyper-V's signature at the lower base, Xen's at the higher one.
inline constexpr Leaf xen_viridian_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x40000006, 0x7263694d, 0x666f736f, 0x76482074},
    {0x40000001, 0, 0x31237648, 0, 0, 0},
    {0x40000002, 0, 0x00001db1, 0x00060001, 1, 0},
    {0x40000003, 0, 0x00000872, 0, 0, 0x00000500},
    {0x40000004, 0, 0x0000002c, 0xffffffff, 0, 0},
    {0x40000006, 0, 0x00000009, 0, 0, 0},
    XEN_AT(0x40000100, 0x0000005d),
};
// QEMU -accel kvm,xen-version=0x40011: Xen's leaves first, then KVM's.
inline constexpr Leaf qemu_xen_leaves[] = {
    AMD_BASIC,
    {0x40000000, 0, 0x40000004, 0x566e6558, 0x65584d4d, 0x4d4d566e},
    {0x40000001, 0, 0x00040011, 0, 0, 0},
    {0x40000002, 0, 0x00000001, 0x40000000, 0, 0},
    {0x40000003, 0, 0, 0, 0, 0},
    {0x40000004, 0, 0x00000058, 0, 0, 0},
    {0x40000100, 0, 0x40000101, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000101, 0, 0x01007efb, 0, 0, 0},
};
// All three: QEMU with both emulations.
inline constexpr Leaf three_leaves[] = {
    AMD_BASIC,
    QEMU_HYPERV_WITH_SYNIC,
    {0x40000100, 0, 0x40000104, 0x566e6558, 0x65584d4d, 0x4d4d566e},
    {0x40000101, 0, 0x00040011, 0, 0, 0},
    {0x40000102, 0, 0x00000001, 0x40000200, 0, 0},
    {0x40000104, 0, 0x00000058, 0, 0, 0},
    {0x40000200, 0, 0x40000201, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x40000201, 0, 0x01007efb, 0, 0, 0},
};
// The highest possible hypervisor base.
inline constexpr Leaf last_base_leaves[] = {
    AMD_BASIC,
    {0x4000ff00, 0, 0x4000ff01, 0x4b4d564b, 0x564b4d56, 0x0000004d},
    {0x4000ff01, 0, 0x01007efb, 0, 0, 0},
};

inline constexpr Leaf tcg_leaves[] = {
    AMD_BASIC,
    {0x40000000, 0, 0x40000001, 0x54474354, 0x43544743, 0x47435447},
    {0x40000001, 0, 0, 0, 0, 0},
};
inline constexpr Leaf vmware_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x40000010, 0x61774d56, 0x4d566572, 0x65726177},
    {0x40000010, 0, 2599999, 66000, 0, 0},
};
inline constexpr Leaf bhyve_leaves[] = {INTEL_BASIC, {0x40000000, 0, 0x40000000, 0x76796862, 0x68622065, 0x20657679}};
inline constexpr Leaf virtualbox_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x40000010, 0x786f4256, 0x786f4256, 0x786f4256},
    {0x40000010, 0, 2904000, 1000000, 0, 0},
};
// Parallels' name with the letters of each word reversed, as some versions show it.
inline constexpr Leaf parallels_leaves[] = {INTEL_BASIC,
                                            {0x40000000, 0, 0x40000001, 0x70726c20, 0x68797065, 0x72762020}};
// Hyper-V in Azure, generation 2; privileges as printed by Linux there: low 0xae7f, high 0x3b8030.
inline constexpr Leaf azure_leaves[] = {
    INTEL_BASIC,
    {0x40000000, 0, 0x4000000c, 0x7263694d, 0x666f736f, 0x76482074},
    {0x40000001, 0, 0x31237648, 0, 0, 0},
    {0x40000002, 0, 0x00004f7c, 0x000a0000, 0, 0x00000a64},
    {0x40000003, 0, 0x0000ae7f, 0x003b8030, 2, 0x00bed7b2},
    {0x40000004, 0, 0x00064e24, 0x00000fff, 0, 0},
    {0x40000005, 0, 0x000000f0, 0x00000400, 0x00005d00, 0},
    {0x40000006, 0, 0x0000000f, 0, 0, 0},
};
// OpenVMM on KVM: a working VMBus without any bit set in EBX of the privileges (no PostMessages, no SignalEvents).
inline constexpr Leaf openvmm_kvm_leaves[] = {
    AMD_BASIC,
    {0x40000000, 0, 0x40000005, 0x7263694d, 0x666f736f, 0x76482074},
    {0x40000001, 0, 0x31237648, 0, 0, 0},
    {0x40000003, 0, 0x0000087f, 0, 0, 0x00000100},
    {0x40000004, 0, 0x00000200, 0xffffffff, 0, 0},
};
// Bare metal, Intel: unknown leaves return leaf 0xd's data.
inline constexpr Leaf bare_intel_leaves[] = {
    {0x0, 0, 0x0000000d, 0x756e6547, 0x6c65746e, 0x49656e69},
    {0x1, 0, 0x000306c3, 0x00100800, 0x7ffafbff, 0xbfebfbff},
    {0xd, 0, 0x00000007, 0x00000340, 0x00000340, 0x00000000},
    {0x80000000, 0, 0x80000008, 0, 0, 0},
    {0x80000007, 0, 0, 0, 0, 0x00000100},
};
inline constexpr Leaf bare_amd_leaves[] = {
    {0x0, 0, 0x00000010, 0x68747541, 0x444d4163, 0x69746e65},
    {0x1, 0, 0x00a00f11, 0x00020800, 0x7ef83203, 0x178bfbff},
    {0x80000000, 0, 0x8000001f, 0, 0, 0},
    {0x80000007, 0, 0, 0, 0, 0x00000100},
};
// A processor that reports crystal frequency and ratio: 24 MHz * 216 / 2.
inline constexpr Leaf bare_skylake_leaves[] = {
    {0x0, 0, 0x00000016, 0x756e6547, 0x6c65746e, 0x49656e69},
    {0x1, 0, 0x000506e3, 0x00100800, 0x7ffafbbf, 0xbfebfbff},
    {0x15, 0, 2, 216, 24000000, 0},
    {0x16, 0, 2600, 3500, 100, 0},
    {0x80000000, 0, 0x80000008, 0, 0, 0},
};

inline constexpr Machine kvm{"kvm", Unknown::highest_basic, kvm_leaves};
inline constexpr Machine kvm_timing{"kvm-timing", Unknown::zero, kvm_timing_leaves};
inline constexpr Machine kvm_old{"kvm-old", Unknown::highest_basic, kvm_old_leaves};
inline constexpr Machine kvm_hyperv{"kvm-hyperv", Unknown::zero, kvm_hyperv_leaves};
inline constexpr Machine kvm_hidden_hyperv{"kvm-hidden-hyperv", Unknown::zero, kvm_hidden_hyperv_leaves};
inline constexpr Machine kvm_hyperv_no_synic{"kvm-hyperv-no-synic", Unknown::highest_basic, kvm_hyperv_no_synic_leaves};
inline constexpr Machine kvm_hyperv_renamed{"kvm-hyperv-renamed", Unknown::zero, kvm_hyperv_renamed_leaves};
inline constexpr Machine kvm_hidden{"kvm-hidden", Unknown::highest_basic, kvm_hidden_leaves};
inline constexpr Machine kvm_no_bit{"kvm-no-bit", Unknown::highest_basic, kvm_no_bit_leaves};
inline constexpr Machine xen_hvm{"xen-hvm", Unknown::highest_basic, xen_hvm_leaves};
inline constexpr Machine xen_pvh{"xen-pvh", Unknown::zero, xen_pvh_leaves};
inline constexpr Machine xen_viridian{"xen-viridian", Unknown::highest_basic, xen_viridian_leaves};
inline constexpr Machine qemu_xen{"qemu-xen", Unknown::zero, qemu_xen_leaves};
inline constexpr Machine three{"three-at-once", Unknown::zero, three_leaves};
inline constexpr Machine last_base{"last-base", Unknown::zero, last_base_leaves};
inline constexpr Machine tcg{"tcg", Unknown::highest_basic, tcg_leaves};
inline constexpr Machine vmware{"vmware", Unknown::highest_basic, vmware_leaves};
inline constexpr Machine bhyve{"bhyve", Unknown::highest_basic, bhyve_leaves};
inline constexpr Machine virtualbox{"virtualbox", Unknown::highest_basic, virtualbox_leaves};
inline constexpr Machine parallels{"parallels", Unknown::highest_basic, parallels_leaves};
inline constexpr Machine azure{"azure", Unknown::highest_basic, azure_leaves};
inline constexpr Machine openvmm_kvm{"openvmm-kvm", Unknown::zero, openvmm_kvm_leaves};
inline constexpr Machine bare_intel{"bare-intel", Unknown::highest_basic, bare_intel_leaves};
inline constexpr Machine bare_amd{"bare-amd", Unknown::zero, bare_amd_leaves};
inline constexpr Machine bare_skylake{"bare-skylake", Unknown::highest_basic, bare_skylake_leaves};

inline constexpr const Machine* all[] = {&kvm,
                                         &kvm_timing,
                                         &kvm_old,
                                         &kvm_hyperv,
                                         &kvm_hidden_hyperv,
                                         &kvm_hyperv_no_synic,
                                         &kvm_hyperv_renamed,
                                         &kvm_hidden,
                                         &kvm_no_bit,
                                         &xen_hvm,
                                         &xen_pvh,
                                         &xen_viridian,
                                         &qemu_xen,
                                         &three,
                                         &last_base,
                                         &tcg,
                                         &vmware,
                                         &bhyve,
                                         &virtualbox,
                                         &parallels,
                                         &azure,
                                         &openvmm_kvm,
                                         &bare_intel,
                                         &bare_amd,
                                         &bare_skylake};

/// Executes CPUID on a recorded machine.
inline Leaf answer(const Machine& machine, std::uint32_t leaf, std::uint32_t subleaf) {
    for (const Leaf& l : machine.leaves) {
        if (l.leaf == leaf && l.subleaf == subleaf) {
            return l;
        }
    }
    const std::uint32_t highest = machine.leaves[0].eax;
    if (machine.unknown == Unknown::highest_basic && (leaf > highest && leaf < 0x80000000) && leaf != highest) {
        Leaf mirrored = answer(machine, highest, 0);
        mirrored.leaf = leaf;
        return mirrored;
    }
    return {leaf, subleaf, 0, 0, 0, 0};
}

} // namespace machines
