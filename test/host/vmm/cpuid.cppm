// What the machine's processors answer to CPUID: what KVM offers, with one topology, and Hyper-V's leaves where they
// are wanted.
module;
#include <linux/kvm.h>
export module vmm.cpuid;
import host.std;

export namespace fl::vmm {

inline constexpr u32 hypervisor_base = 0x4000'0000;

struct Identity {
    u32 processors = 1;
    /// Where Hyper-V's leaves begin: 0x40000000, or another base; then a foreign signature without further leaves
    /// stands at the first one.
    u32 hyperv_base = hypervisor_base;
    bool hyperv = true; // false: no hypervisor leaves at all but those of kvm_leaves
    // Hyper-V's leaves show what OpenVMM's do on KVM: no bit in the privileges' high half, no direct timers
    bool openvmm = false;
    bool kvm_leaves = false; // KVM's signature and features at 0x40000100
    bool tsc_deadline = false;
};

/// The table for processor `number`, from what KVM supports (`basic` and `hyperv`, as the ioctls answer).
std::vector<kvm_cpuid_entry2> processor_cpuid(std::span<const kvm_cpuid_entry2> basic,
                                              std::span<const kvm_cpuid_entry2> hyperv, const Identity& identity,
                                              u32 number);

} // namespace fl::vmm
