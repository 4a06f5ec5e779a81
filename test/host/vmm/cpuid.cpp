module;
#include <linux/kvm.h>
module vmm.cpuid;
import host.std;

namespace fl::vmm {
namespace {

constexpr u32 kvm_base = 0x4000'0100;
constexpr u32 hyperv_interface = 0x3123'7648; // "Hv#1"
// Features [hv-tlfs §2.4.4] that are masked because they are not implemented.
constexpr u32 reenlightenment = 1u << 13; // privileges for migration between hosts, EAX
constexpr u32 debugging = 1u << 11;       // EBX
// Recommendations [hv-tlfs §2.4.5] for nested hypervisors.
constexpr u32 enlightened_vmcs = 1u << 14;

constexpr u32 word(const char* text) {
    u32 value = 0;
    for (unsigned i = 0; i < 4; ++i) {
        value |= static_cast<u32>(static_cast<unsigned char>(text[i])) << (8 * i);
    }
    return value;
}

kvm_cpuid_entry2 leaf(u32 function, u32 eax, u32 ebx, u32 ecx, u32 edx) {
    kvm_cpuid_entry2 entry{};
    entry.function = function;
    entry.eax = eax;
    entry.ebx = ebx;
    entry.ecx = ecx;
    entry.edx = edx;
    return entry;
}

kvm_cpuid_entry2 signature(u32 base, u32 highest, const char (&name)[13]) {
    return leaf(base, highest, word(name), word(name + 4), word(name + 8));
}

constexpr u32 log2_up(u32 count) { return count <= 1 ? 0 : static_cast<u32>(std::bit_width(count - 1)); }

} // namespace

std::vector<kvm_cpuid_entry2> processor_cpuid(std::span<const kvm_cpuid_entry2> basic,
                                              std::span<const kvm_cpuid_entry2> hyperv, const Identity& identity,
                                              u32 number) {
    std::vector<kvm_cpuid_entry2> table;
    const u32 count = identity.processors;
    const u32 shift = log2_up(count);
    bool topology = false;
    for (kvm_cpuid_entry2 entry : basic) {
        if (entry.function >= hypervisor_base && entry.function < hypervisor_base + 0x1'0000) {
            continue; // KVM's own leaves: only on request
        }
        switch (entry.function) {
        case 0x1:
            entry.ebx = (entry.ebx & 0xffff) | count << 16 | number << 24;
            entry.ecx |= 1u << 31; // hypervisor present
            entry.ecx |= identity.tsc_deadline ? 1u << 24 : 0;
            entry.edx = count > 1 ? entry.edx | 1u << 28 : entry.edx & ~(1u << 28);
            break;
        case 0x4: // caches: not shared, one core per processor
            entry.eax = (entry.eax & 0x3fff) | (count - 1) << 26;
            break;
        case 0xb: // one thread per core, all cores in one package
            if (topology) {
                continue;
            }
            topology = true;
            entry.index = 0;
            entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            entry.eax = 0;
            entry.ebx = 1;
            entry.ecx = 0x0100;
            entry.edx = number;
            table.push_back(entry);
            entry.index = 1;
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = 0x0201;
            break;
        case 0x8000'0008: entry.ecx = (entry.ecx & ~0xf0ffu) | shift << 12 | (count - 1); break;
        case 0x8000'001e:
            entry.eax = number;
            entry.ebx = number;
            entry.ecx = 0;
            break;
        default: break;
        }
        table.push_back(entry);
    }
    if (identity.hyperv) {
        if (identity.hyperv_base != hypervisor_base) {
            table.push_back(signature(hypervisor_base, hypervisor_base, "FirstlightVM"));
            // KVM serves Hyper-V's registers only to a processor whose leaf 0x40000001 announces them; the signature
            // above hides it from guests.
            table.push_back(leaf(hypervisor_base + 1, hyperv_interface, 0, 0, 0));
        }
        for (kvm_cpuid_entry2 entry : hyperv) {
            const u32 offset = entry.function - hypervisor_base;
            if (offset > 6) {
                continue; // nested virtualisation and debugging
            }
            switch (offset) {
            case 0: entry = signature(0, identity.hyperv_base + 6, "Microsoft Hv"); break;
            case 3:
                entry.eax &= ~reenlightenment;
                entry.ebx &= ~debugging;
                break;
            case 4: entry.eax &= ~enlightened_vmcs; break;
            case 5:
                entry.eax = count;
                entry.ebx = count;
                break;
            default: break;
            }
            if (identity.openvmm) {
                switch (offset) {
                case 0: entry.eax = identity.hyperv_base + 5; break;
                case 2: entry.eax = entry.ebx = entry.ecx = entry.edx = 0; break;
                // run time, reference counter, SynIC, timers, APIC, hypercalls, VP index, frequencies; the frequencies'
                // registers
                case 3:
                    entry.eax = 0x87f;
                    entry.ebx = entry.ecx = 0;
                    entry.edx = 0x100;
                    break;
                case 4: // auto-EOI is deprecated
                    entry.eax = 0x200;
                    entry.ebx = 0xffff'ffff;
                    entry.ecx = entry.edx = 0;
                    break;
                case 5:
                case 6: continue;
                default: break;
                }
            }
            entry.function = identity.hyperv_base + offset;
            table.push_back(entry);
        }
    }
    if (identity.kvm_leaves) {
        table.push_back(signature(kvm_base, kvm_base + 1, "KVMKVMKVM\0\0\0"));
        for (const kvm_cpuid_entry2& entry : basic) {
            if (entry.function == hypervisor_base + 1) { // KVM_CPUID_FEATURES
                table.push_back(leaf(kvm_base + 1, entry.eax, entry.ebx, entry.ecx, entry.edx));
            }
        }
    }
    return table;
}

} // namespace fl::vmm
