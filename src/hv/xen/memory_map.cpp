module hv.xen.memory_map;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;
import hv.xen.hypercall;

namespace fl::hv::xen {

Result<u32> read_memory_map(const CpuidSnapshot& cpuid, Privileged& cpu, const Gate& gate, u64 page,
                            std::span<E820Entry> into) {
    const auto bases = cpuid.hypervisors();
    const auto found =
        std::ranges::find_if(bases, [](const HypervisorBase& h) { return h.signature.view() == "XenVMMXenVMM"; });
    if (found == bases.end() || found->max_leaf < found->base + 2) {
        return Error{Code::not_found, "the loader gave no memory map, and there is no Xen to request it from"};
    }
    // Leaf base + 2: EAX the number of hypercall pages, EBX the MSR that fills them [xen-public arch-x86/cpuid.h].
    const CpuidRegisters leaf = cpuid.get(found->base + 2);
    if (leaf.eax == 0 || leaf.ebx == 0 || gate.call == nullptr) {
        return Error{Code::not_supported, "Xen announces no hypercall page, so it cannot return the memory map", 1,
                     leaf.eax};
    }
    if (gate.page != nullptr) {
        cpu.write_msr(leaf.ebx, page);
    }
    Hypercalls calls(gate);
    MemoryMap map{static_cast<u32>(into.size()), 0, into.data()};
    if (const i64 answer = calls.call(Hypercall::memory_op, MemoryOp::memory_map, map); answer < 0) {
        return Error{Code::not_supported, "Xen does not report the memory map (errno)", 0, static_cast<u64>(-answer)};
    }
    if (map.count > into.size()) {
        return Error{Code::protocol, "Xen returns more memory ranges than there is room for", into.size(), map.count};
    }
    return map.count;
}

} // namespace fl::hv::xen
