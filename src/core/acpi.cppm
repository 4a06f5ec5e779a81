// The ACPI tables that the kernel uses [ACPI 6.5 §5.2]: interrupt controllers, the power management timer, power-off
// and reset. Tables are copied through a PhysicalReader; every length is bounded and every checksum verified.
export module core.acpi;
import core.std;
import core.result;
import core.physical;

export namespace fl::acpi {

/// Generic address [§5.2.3.2]. Only these two address spaces are supported.
enum class Space : u8 { memory = 0, io = 1 };
struct Register {
    Space space = Space::memory;
    u64 address = 0; // 0: none
};

/// An I/O APIC of the MADT [§5.2.12.3].
struct IoApic {
    u32 id;
    u64 address; // physical
    u32 first_gsi;
};

/// An ISA interrupt that is not identity-mapped to its GSI [§5.2.12.5].
struct Override {
    u8 irq;
    u32 gsi;
    bool level;
    bool active_low;
};

/// Multiple APIC Description Table [§5.2.12].
struct Madt {
    static constexpr usize max_io_apics = 64;
    static constexpr usize max_overrides = 16; // one for each ISA interrupt
    static constexpr usize max_processors = 64;

    u64 local_apic = 0; // physical
    bool has_8259 = false;
    u32 io_apic_count = 0;
    u32 override_count = 0;
    u32 processor_count = 0; // enabled processors
    // listed but not enabled: "online capable" processors that may be hot-added, or unused entries
    u32 disabled_count = 0;
    u32 processors_dropped = 0; // enabled, but beyond max_processors
    u32 io_apics_dropped = 0;
    u32 overrides_dropped = 0;
    u32 bytes_dropped = 0; // after an entry of impossible length, where parsing stops
    std::array<IoApic, max_io_apics> io_apics{};
    std::array<Override, max_overrides> overrides{};
    std::array<u32, max_processors> processors{}; // APIC ids

    std::span<const IoApic> all_io_apics() const { return {io_apics.data(), io_apic_count}; }
    std::span<const Override> all_overrides() const { return {overrides.data(), override_count}; }
    std::span<const u32> all_processors() const { return {processors.data(), processor_count}; }
};

/// Fixed ACPI Description Table [§5.2.9].
struct Fadt {
    u64 dsdt = 0;           // physical
    u16 sci = 0;            // GSI
    u16 smi_command = 0;    // port; 0: ACPI mode is always on
    u8 acpi_enable = 0;     // value to write to smi_command
    u16 pm1a_event = 0;     // port of the status register, the enable register follows; 0: none
    u8 pm1_event_bytes = 0; // of both registers
    u16 pm1a_control = 0;   // port; 0: none
    u16 pm1b_control = 0;   // port; 0: none
    u16 gpe0 = 0;           // port of the status registers, the enable registers follow; 0: none
    u8 gpe0_bytes = 0;      // of both
    u16 pm_timer = 0;       // port; 0: none
    bool pm_timer_32 = false;
    bool hardware_reduced = false;
    Register reset; // address 0: not supported
    u8 reset_value = 0;
    Register sleep_control; // hardware-reduced machines only
};

/// A table that was found but is ignored.
struct Damage {
    enum class Kind : u8 { unreadable, length, checksum };
    std::array<char, 4> signature{}; // zeros if unreadable
    u64 address = 0;
    u32 length = 0; // from the table's header
    Kind kind = Kind::unreadable;

    std::string_view name() const {
        return signature[0] == 0 ? std::string_view("?") : std::string_view(signature.data(), 4);
    }
    std::string_view what() const {
        return kind == Kind::unreadable ? "cannot be read"
               : kind == Kind::length   ? "has an invalid length"
                                        : "has a wrong checksum";
    }
};

/// The tables that were found, and what was left out.
struct Tables {
    static constexpr usize max_damages = 8;
    static constexpr usize max_ssdts = 32;

    u64 rsdp = 0; // physical address of the RSDP
    std::optional<Madt> madt;
    std::optional<Fadt> fadt;
    u64 mcfg = 0;                              // physical address of the table; 0: none
    u32 tables = 0;                            // examined, of those listed in the XSDT or RSDT
    u32 dropped = 0;                           // listed, but beyond the limit of tables examined
    u32 damaged = 0;                           // used tables that were ignored: unreadable, bad length or bad checksum
    std::array<Damage, max_damages> damages{}; // the first max_damages of them
    u32 ssdt_count = 0;
    u32 ssdts_dropped = 0;
    std::array<u64, max_ssdts> ssdts{}; // physical addresses; not verified

    std::span<const Damage> all_damages() const { return {damages.data(), std::min<usize>(damaged, max_damages)}; }
    std::span<const u64> all_ssdts() const { return {ssdts.data(), ssdt_count}; }
};

/// `rsdp`: physical address; 0 searches the first KiB of the EBDA and 0xe0000–0xfffff [§5.2.5.1]. Error{not_found}: no
/// RSDP; Error{protocol}: the RSDP is invalid, or there is neither a valid XSDT nor a valid RSDT.
Result<Tables> read_tables(PhysicalReader& memory, u64 rsdp);

/// One MCFG entry: PCI configuration space in memory [PCI-FW 3.3 §4.1.2]. `base` is the physical address of bus 0's
/// registers, even if `first_bus` is higher.
struct Ecam {
    u64 base;
    u16 segment;
    u8 first_bus;
    u8 last_bus;
};
/// Entry number `index`; nothing past the last entry or for an invalid one. `mcfg`: as in Tables.
std::optional<Ecam> ecam(PhysicalReader& memory, u64 mcfg, u32 index);
/// Number of entries in the MCFG table at physical address `mcfg`; 0 if the table is missing or damaged.
u32 ecam_count(PhysicalReader& memory, u64 mcfg);

/// PCI root bridges, found by scanning the DSDT and the SSDTs for _HID names with PNP0A03 or PNP0A08 and for _BBN,
/// without interpreting AML [§6.5.5]. A bridge without _BBN has bus 0.
struct RootBridges {
    u32 bridges = 0;            // _HIDs of root bridges
    u32 numbered = 0;           // _BBNs with a constant value
    std::array<u64, 4> buses{}; // bitmap of those values
    bool incomplete = false;    // a table was unreadable: there may be more bridges
    // the first constant _CBA: the ECAM base if there is no MCFG [PCI-FW 3.3 §4.1.3]
    u64 cba = 0;
    bool gives(u8 bus) const { return (buses[bus / 64] >> bus % 64 & 1) != 0; }
    /// True if some bridge's bus number is unknown.
    bool others() const { return incomplete || bridges > numbered + (gives(0) ? 0 : 1); }
};
RootBridges find_root_bridges(PhysicalReader& memory, const Tables& tables);

/// A virtio-mmio device of ACPI. `gsi`: its interrupt, if it is a constant.
struct VirtioMmioNode {
    u64 base = 0; // physical
    u32 size = 0; // bytes
    std::optional<u32> gsi;
};
/// Calls `found` for each virtio-mmio device that the DSDT and the SSDTs name (_HID LNRO0005), with the first memory
/// range that follows the name, and the first interrupt after that. AML is only scanned, as above: computed ranges and
/// interrupts are not found. Returns the number of names without a range.
u32 find_virtio_mmio(PhysicalReader& memory, const Tables& tables,
                     void (*found)(void* context, const VirtioMmioNode& node), void* context);

/// SLP_TYP values of \_S5 [§7.4.2.6], found by scanning the DSDT, then the SSDTs in order, without interpreting AML.
/// Tables with a bad length or checksum are skipped.
struct SleepType {
    u8 a;
    u8 b;
};
/// Error{not_found}: no usable \_S5.
Result<SleepType> find_s5(PhysicalReader& memory, const Tables& tables);

/// The port of QEMU's pvpanic device (_HID "QEMU0001"), found by scanning the DSDT for its _CRS.
std::optional<u16> find_pvpanic(PhysicalReader& memory, u64 dsdt);

/// The port of QEMU's PCI hot plug registers, found by scanning the DSDT for the operation region PCST
/// [qemu docs/specs/acpi_pci_hotplug.rst].
std::optional<u16> find_pci_hotplug(PhysicalReader& memory, u64 dsdt);

} // namespace fl::acpi
