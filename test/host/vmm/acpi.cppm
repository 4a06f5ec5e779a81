// The ACPI tables of the machine: RSDP, XSDT, FADT, FACS, MADT and the compiled DSDT [ACPI 6.5 §5.2].
export module vmm.acpi;
import core.std;
import core.result;
import vmm.memory;

export namespace fl::vmm {

/// Where they go: in the old BIOS area, which the memory map says is reserved, the RSDP on a 16-byte boundary as a scan
/// expects it.
inline constexpr u64 acpi_base = 0xe0000;
inline constexpr u64 acpi_end = 0xf0000;
inline constexpr u64 io_apic_address = 0xfec0'0000;
inline constexpr u64 local_apic_address = 0xfee0'0000;
inline constexpr u32 io_apic_id = 0xff; // no processor has it

/// Writes all tables; the answer is the RSDP's address. `dsdt` is a complete table as iasl writes it.
/// Error{bad_argument}: it is not one, or
/// 1 to 64 processors were expected.
Result<u64> write_acpi(const GuestMemory& memory, std::span<const std::byte> dsdt, u32 processors);

} // namespace fl::vmm
