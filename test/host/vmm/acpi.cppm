// The ACPI tables of the machine: RSDP, XSDT, FADT, FACS, MADT and the compiled DSDT [ACPI 6.5 §5.2].
export module vmm.acpi;
import core.std;
import core.result;
import vmm.memory;

export namespace fl::vmm {

/// Guest physical addresses of the tables: in the BIOS area, which the memory map lists as reserved; the RSDP is
/// 16-byte aligned, as a scan requires.
inline constexpr u64 acpi_base = 0xe0000;
inline constexpr u64 acpi_end = 0xf0000;
inline constexpr u64 io_apic_address = 0xfec0'0000;
inline constexpr u64 local_apic_address = 0xfee0'0000;
inline constexpr u32 io_apic_id = 0xff; // not the id of a processor

/// Writes all tables and returns the RSDP's address. `dsdt` is a complete table as written by iasl. `processors`: 1 to
/// 64. Error{bad_argument}: `dsdt` is not a table, or `processors` is out of range.
Result<u64> write_acpi(const GuestMemory& memory, std::span<const std::byte> dsdt, u32 processors);

} // namespace fl::vmm
