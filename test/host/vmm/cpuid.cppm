// CPUID of the machine's processors: the leaves supported by KVM, with one topology, and Hyper-V's leaves on request.
module;
#include <linux/kvm.h>
export module vmm.cpuid;
import host.std;

export namespace fl::vmm {

inline constexpr u32 hypervisor_base = 0x4000'0000;

struct Identity {
    u32 processors = 1;
    /// Base of Hyper-V's leaves: 0x40000000, or another; then 0x40000000 has a foreign signature without further
    /// leaves.
    u32 hyperv_base = hypervisor_base;
    bool hyperv = true; // false: no hypervisor leaves except those of kvm_leaves
    // Hyper-V's leaves as those of OpenVMM on KVM: privileges' high half (EBX) zero, no direct-mode timers
    bool openvmm = false;
    bool kvm_leaves = false; // KVM's signature and features at 0x40000100
    bool tsc_deadline = false;
};

/// The table for processor `number`, from what KVM supports (`basic` and `hyperv`, as returned by the ioctls).
std::vector<kvm_cpuid_entry2> processor_cpuid(std::span<const kvm_cpuid_entry2> basic,
                                              std::span<const kvm_cpuid_entry2> hyperv, const Identity& identity,
                                              u32 number);

} // namespace fl::vmm
