// SMBIOS strings that name the machine's manufacturer: a fallback for hypervisor detection.
export module core.smbios;
import core.std;
import core.result;
import core.text;
import core.physical;

export namespace fl {

/// Strings that the firmware does not supply are empty. Bytes that are not printable ASCII are replaced by '?'.
struct Smbios {
    u8 major = 0;
    u8 minor = 0;
    FixedText<64> bios_vendor;  // type 0 [smbios §7.1]
    FixedText<64> bios_version; // type 0
    FixedText<64> manufacturer; // type 1 [smbios §7.2]
    FixedText<64> product;      // type 1
    FixedText<64> version;      // type 1
};

/// Parses a structure table: at most 1024 structures. A structure that extends past the table, or is shorter than its
/// header, ends the walk; strings found before it are kept.
void parse_smbios_table(std::span<const std::byte> table, Smbios& into);

/// Reads the entry point at physical address `entry` ("_SM_" [smbios §5.2.1] or "_SM3_" [smbios §5.2.2], checksums
/// verified) and its table. 0: searches the BIOS area 0xf0000–0xfffff on 16-byte boundaries. Error{not_found}: no entry
/// point; Error{protocol}: malformed. At most 32 KiB of the table are read.
Result<Smbios> read_smbios(PhysicalReader& memory, u64 entry);

} // namespace fl
