// Implements hv.backend's Privileged with the processor's instructions.
export module hv.machine.privileged;
import core.std;
import core.cpuid;
import core.machine.cpu;
import hv.backend;

export namespace fl::hv {

class MachinePrivileged final : public Privileged {
  public:
    u64 read_msr(u32 msr) override { return cpu::read_msr(msr); }
    void write_msr(u32 msr, u64 value) override { cpu::write_msr(msr, value); }
    u8 in8(u16 port) override { return cpu::in8(port); }
    u16 in16(u16 port) override { return cpu::in16(port); }
    u32 in32(u16 port) override { return cpu::in32(port); }
    void out8(u16 port, u8 value) override { cpu::out8(port, value); }
    void out16(u16 port, u16 value) override { cpu::out16(port, value); }
    void out32(u16 port, u32 value) override { cpu::out32(port, value); }
    CpuidRegisters cpuid_leaf(u32 leaf) override {
        const cpu::CpuidRegisters r = cpu::cpuid(leaf);
        return {r.eax, r.ebx, r.ecx, r.edx};
    }
};

} // namespace fl::hv
