// The guest's memory map from Xen itself: for a loader that gives none (start_info of version 0, which is what Xen
// before 4.11 hands over [PVH]).
export module hv.xen.memory_map;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;
export import hv.xen.hypercall;

export namespace fl::hv::xen {

/// Fills `into` with the ranges in Xen's order and says how many. Needs neither memory nor an installed backend: it
/// fills the gate's page itself, at guest-physical address `page`, as install() will do again. Error{not_found}: CPUID
/// shows no Xen; Error{not_supported}: this Xen (or its emulation) does not tell; Error{protocol}: it tells more ranges
/// than it was given room for.
Result<u32> read_memory_map(const CpuidSnapshot& cpuid, Privileged& cpu, const Gate& gate, u64 page,
                            std::span<E820Entry> into);

} // namespace fl::hv::xen
