// The guest's memory map from Xen, for loaders that pass none (start_info version 0, used by Xen before 4.11 [PVH]).
export module hv.xen.memory_map;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// Fills `into` with the ranges in Xen's order and returns their number. Needs neither memory nor an installed backend:
/// fills the gate's page at guest-physical address `page`; install() does so again later. Error{not_found}: CPUID shows
/// no Xen; Error{not_supported}: this Xen (or its emulation) has no memory map call; Error{protocol}: more ranges than
/// fit into `into`.
Result<u32> read_memory_map(const CpuidSnapshot& cpuid, Privileged& cpu, const Gate& gate, u64 page,
                            std::span<E820Entry> into);

} // namespace fl::hv::xen
