// Detection on the machine that this runs on: the first thing after the entry.
export module hv.machine.detect;
import core.std;
import core.cpuid;
import core.machine.cpu;

export namespace fl::hv {

/// Executes CPUID, once per boot, and keeps the answers for good: about 270 instructions, each an exit under a
/// hypervisor.
inline void read_cpuid(CpuidSnapshot& into) {
    scan_cpuid(into, [](u32 leaf, u32 subleaf) {
        const cpu::CpuidRegisters r = cpu::cpuid(leaf, subleaf);
        return CpuidRegisters{r.eax, r.ebx, r.ecx, r.edx};
    });
}

} // namespace fl::hv
