// Hypervisor detection on the running machine, right after entry.
export module hv.machine.detect;
import core.std;
import core.cpuid;
import core.machine.cpu;

export namespace fl::hv {

/// Executes CPUID (about 270 times, each an exit under a hypervisor). Call once per boot and keep the snapshot.
inline void read_cpuid(CpuidSnapshot& into) {
    scan_cpuid(into, [](u32 leaf, u32 subleaf) {
        const cpu::CpuidRegisters r = cpu::cpuid(leaf, subleaf);
        return CpuidRegisters{r.eax, r.ebx, r.ecx, r.edx};
    });
}

} // namespace fl::hv
