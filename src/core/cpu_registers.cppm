// Processor registers: control registers, model-specific registers, and the parts of CPUID that are used here [SDM-3
// 2.5, 2.2.1], [SDM-2A CPUID]. Layouts only; core.machine.cpu has the instructions.
export module core.cpu_registers;
import core.std;
import core.registers;

export namespace fl {

// ---- control registers [SDM-3 2.5] ----

struct Cr0 : Register<Cr0, u64> {
    static constexpr Bit<31> paging{};
    static constexpr Bit<16> write_protect{};
    static constexpr Bit<0> protection_enable{};
    static constexpr auto layout = fields(paging, write_protect, protection_enable);
};
struct Cr4 : Register<Cr4, u64> {
    static constexpr Bit<21> smap{}; // no access to user pages
    static constexpr Bit<20> smep{}; // no execution of user pages
    static constexpr Bit<11> umip{}; // no SGDT, SIDT … in user mode
    static constexpr Bit<5> physical_address_extension{};
    static constexpr auto layout = fields(smap, smep, umip, physical_address_extension);
};

// ---- model-specific registers [SDM-4 2.1] ----

struct Efer : Register<Efer, u64> {
    static constexpr u32 msr = 0xc0000080;
    static constexpr Bit<11> no_execute_enable{};
    static constexpr Bit<10, Attribute::read_only> long_mode_active{};
    static constexpr Bit<8> long_mode_enable{};
    static constexpr auto layout = fields(no_execute_enable, long_mode_active, long_mode_enable);
};
/// [SDM-3 11.4.4], [SDM-3 11.12.1]
struct ApicBase : Register<ApicBase, u64> {
    static constexpr u32 msr = 0x1b;
    static constexpr Field<51, 12> page{}; // page number of the physical address of the register page
    static constexpr Bit<11> enable{};
    static constexpr Bit<10> x2apic{}; // must not be set in the same write as `enable`
    static constexpr Bit<8, Attribute::read_only> boot_processor{};
    static constexpr auto layout = fields(page, enable, x2apic, boot_processor);

    constexpr u64 address() const { return get(page) << 12; }
};

// ---- CPUID: leaf, register ----

struct Cpuid1Ecx : Register<Cpuid1Ecx, u32> {
    static constexpr Bit<31, Attribute::read_only> hypervisor{}; // reserved for hypervisors
    static constexpr Bit<24, Attribute::read_only> tsc_deadline{};
    static constexpr Bit<21, Attribute::read_only> x2apic{};
    static constexpr auto layout = fields(hypervisor, tsc_deadline, x2apic);
};
struct Cpuid1Edx : Register<Cpuid1Edx, u32> {
    static constexpr Bit<9, Attribute::read_only> apic{};
    static constexpr auto layout = fields(apic);
};
struct Cpuid7Ebx : Register<Cpuid7Ebx, u32> {
    static constexpr Bit<20, Attribute::read_only> smap{};
    static constexpr Bit<7, Attribute::read_only> smep{};
    static constexpr auto layout = fields(smap, smep);
};
struct Cpuid7Ecx : Register<Cpuid7Ecx, u32> {
    static constexpr Bit<2, Attribute::read_only> umip{};
    static constexpr auto layout = fields(umip);
};
struct Cpuid80000001Edx : Register<Cpuid80000001Edx, u32> {
    static constexpr Bit<26, Attribute::read_only> gigabyte_pages{};
    static constexpr Bit<20, Attribute::read_only> no_execute{};
    static constexpr auto layout = fields(gigabyte_pages, no_execute);
};
struct Cpuid80000007Edx : Register<Cpuid80000007Edx, u32> {
    static constexpr Bit<8, Attribute::read_only> invariant_tsc{}; // [SDM-3 17.17]
    static constexpr auto layout = fields(invariant_tsc);
};
struct Cpuid80000008Eax : Register<Cpuid80000008Eax, u32> {
    static constexpr Field<7, 0, Attribute::read_only> physical_bits{};
    static constexpr auto layout = fields(physical_bits);
};

} // namespace fl
