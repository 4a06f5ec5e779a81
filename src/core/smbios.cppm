// The strings of SMBIOS that say who made the machine: the older way to recognise a hypervisor, kept as the fallback.
export module core.smbios;
import core.std;
import core.result;
import core.text;
import core.physical;

export namespace fl {

/// Empty strings where the firmware says nothing. Bytes that are not printable ASCII are shown as '?'.
struct Smbios {
    u8 major = 0;
    u8 minor = 0;
    FixedText<64> bios_vendor;  // type 0 [smbios §7.1]
    FixedText<64> bios_version; // type 0
    FixedText<64> manufacturer; // type 1 [smbios §7.2]
    FixedText<64> product;      // type 1
    FixedText<64> version;      // type 1
};

/// Parses the structure table itself: at most `max_structures` structures, `table` bytes. A structure that leaves the
/// table, or is shorter than its own header, ends the walk with what was found until then.
void parse_smbios_table(std::span<const std::byte> table, Smbios& into);

/// The entry point at `entry` ("_SM_" [smbios §5.2.1] or "_SM3_" [smbios §5.2.2], checksums verified) and its table. 0:
/// looks in the BIOS area 0xf0000–0xfffff, on 16-byte boundaries. Error{not_found}: there is none; Error{protocol}:
/// there is one, and it is malformed. At most 64 KiB of a longer table are read.
Result<Smbios> read_smbios(PhysicalReader& memory, u64 entry);

} // namespace fl
