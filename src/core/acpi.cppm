// The few ACPI tables that the kernel needs [ACPI 6.5 §5.2]: interrupt controllers, the power management timer, how to
// switch off. Everything is read by copy through a PhysicalReader, every length is bounded, every checksum verified.
export module core.acpi;
import core.std;
import core.result;
import core.physical;

export namespace fl::acpi {

/// A register's address [§5.2.3.2]. Other spaces than these two are not used here.
enum class Space : u8 { memory = 0, io = 1 };
struct Register {
    Space space = Space::memory;
    u64 address = 0; // 0: there is none
};

struct IoApic {
    u32 id;
    u64 address; // physical
    u32 first_gsi;
};

/// An ISA interrupt that is not wired one to one [§5.2.12.5].
struct Override {
    u8 irq;
    u32 gsi;
    bool level;
    bool active_low;
};

struct Madt {
    static constexpr usize max_io_apics = 64;
    static constexpr usize max_overrides = 16; // one for each ISA interrupt
    static constexpr usize max_processors = 64;

    u64 local_apic = 0; // physical
    bool has_8259 = false;
    u32 io_apic_count = 0;
    u32 override_count = 0;
    u32 processor_count = 0; // enabled ones
    // listed and not enabled: places for processors that may come (ACPI's "online capable"), or nothing
    u32 disabled_count = 0;
    u32 processors_dropped = 0; // enabled, and beyond max_processors
    u32 io_apics_dropped = 0;
    u32 overrides_dropped = 0;
    u32 bytes_dropped = 0; // behind an entry of impossible length: nothing there can be found
    std::array<IoApic, max_io_apics> io_apics{};
    std::array<Override, max_overrides> overrides{};
    std::array<u32, max_processors> processors{}; // APIC ids

    std::span<const IoApic> all_io_apics() const { return {io_apics.data(), io_apic_count}; }
    std::span<const Override> all_overrides() const { return {overrides.data(), override_count}; }
    std::span<const u32> all_processors() const { return {processors.data(), processor_count}; }
};

struct Fadt {
    u64 dsdt = 0;         // physical
    u16 sci = 0;          // GSI
    u16 smi_command = 0;  // port; 0: ACPI mode is always on
    u8 acpi_enable = 0;   // to be written there
    u16 pm1a_control = 0; // port; 0: none
    u16 pm1b_control = 0; // port; 0: none
    u16 pm_timer = 0;     // port; 0: none
    bool pm_timer_32 = false;
    bool hardware_reduced = false;
    Register reset; // address 0: not supported
    u8 reset_value = 0;
    Register sleep_control; // of hardware-reduced machines
};

/// A table that is not used.
struct Damage {
    enum class Kind : u8 { unreadable, length, checksum };
    std::array<char, 4> signature{}; // zeros: unreadable
    u64 address = 0;
    u32 length = 0; // as its header says
    Kind kind = Kind::unreadable;

    std::string_view name() const {
        return signature[0] == 0 ? std::string_view("?") : std::string_view(signature.data(), 4);
    }
    std::string_view what() const {
        return kind == Kind::unreadable ? "cannot be read"
               : kind == Kind::length   ? "has an impossible length"
                                        : "has a wrong checksum";
    }
};

struct Tables {
    static constexpr usize max_damages = 8;
    static constexpr usize max_ssdts = 32;

    u64 rsdp = 0; // where it was
    std::optional<Madt> madt;
    std::optional<Fadt> fadt;
    u64 mcfg = 0;    // physical address of the table; 0: none
    u32 tables = 0;  // that are looked at, of those listed by the XSDT or RSDT
    u32 dropped = 0; // listed beyond them
    u32 damaged = 0; // of those that are used here: unreadable, of impossible length or with a wrong checksum; ignored
    std::array<Damage, max_damages> damages{}; // the first ones of them
    u32 ssdt_count = 0;
    u32 ssdts_dropped = 0;
    std::array<u64, max_ssdts> ssdts{}; // physical addresses; not verified

    std::span<const Damage> all_damages() const { return {damages.data(), std::min<usize>(damaged, max_damages)}; }
    std::span<const u64> all_ssdts() const { return {ssdts.data(), ssdt_count}; }
};

/// `rsdp` 0: looks in the first KiB of the EBDA and in 0xe0000–0xfffff [§5.2.5.1]. Error{not_found}: there is none;
/// Error{protocol}: it is there and the list of tables is not.
Result<Tables> read_tables(PhysicalReader& memory, u64 rsdp);

/// PCI configuration space in memory: one entry of the MCFG table [PCI-FW 3.3 §4.1.2]. The registers of bus 0 would be
/// at `base`.
struct Ecam {
    u64 base;
    u16 segment;
    u8 first_bus;
    u8 last_bus;
};
/// The entry with this number; nothing beyond the last one, and for an entry that makes no sense. `mcfg`: as in Tables.
std::optional<Ecam> ecam(PhysicalReader& memory, u64 mcfg, u32 index);
u32 ecam_count(PhysicalReader& memory, u64 mcfg);

/// PCI root bridges, from a scan of the DSDT and the SSDTs for the names _HID with PNP0A03 or PNP0A08 and _BBN, without
/// interpreting them [§6.5.5]. A bridge without a _BBN has bus 0.
struct RootBridges {
    u32 bridges = 0;            // _HIDs that are a root bridge's
    u32 numbered = 0;           // _BBNs that are constants
    std::array<u64, 4> buses{}; // a bit for each of their values
    bool incomplete = false;    // a table could not be read: there may be more
    // the first constant _CBA: configuration space in memory where there is no MCFG [PCI-FW 3.3 §4.1.3]
    u64 cba = 0;
    bool gives(u8 bus) const { return (buses[bus / 64] >> bus % 64 & 1) != 0; }
    /// There are bridges whose bus is not known.
    bool others() const { return incomplete || bridges > numbered + (gives(0) ? 0 : 1); }
};
RootBridges find_root_bridges(PhysicalReader& memory, const Tables& tables);

/// The virtio-mmio devices that the DSDT and the SSDTs name (_HID LNRO0005) with the memory range that stands first
/// behind the name; calls `found` for each. From a scan, as above: a range that is computed is not seen. Returns the
/// number of names whose range was not found.
u32 find_virtio_mmio(PhysicalReader& memory, const Tables& tables, void (*found)(void* context, u64 base, u32 size),
                     void* context);

/// What \_S5 asks to be written to sleep [§7.4.2.6]; from a scan of the DSDT, and where that has none of the SSDTs in
/// their order, without interpreting them. A table whose length or checksum is wrong is passed over.
struct SleepType {
    u8 a;
    u8 b;
};
Result<SleepType> find_s5(PhysicalReader& memory, const Tables& tables);

/// The port of QEMU's pvpanic device (_HID "QEMU0001"), from its _CRS in the DSDT, by a scan too.
std::optional<u16> find_pvpanic(PhysicalReader& memory, u64 dsdt);

} // namespace fl::acpi
