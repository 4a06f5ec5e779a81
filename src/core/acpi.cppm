// The few ACPI tables that the kernel needs [ACPI 6.5 §5.2]: interrupt controllers, the power management timer, how to switch off. Everything is
// read by copy through a PhysicalReader, every length is bounded, every checksum verified.
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
    static constexpr usize max_io_apics = 8;
    static constexpr usize max_overrides = 16;
    static constexpr usize max_processors = 64;

    u64 local_apic = 0; // physical
    bool has_8259 = false;
    u32 io_apic_count = 0;
    u32 override_count = 0;
    u32 processor_count = 0;    // enabled ones
    u32 disabled_count = 0;     // listed and not enabled: places for processors that may come (ACPI's "online capable"), or nothing
    u32 processors_dropped = 0; // enabled, and beyond max_processors
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

struct Tables {
    u64 rsdp = 0; // where it was
    std::optional<Madt> madt;
    std::optional<Fadt> fadt;
    u32 tables = 0;  // listed by the XSDT or RSDT
    u32 damaged = 0; // unreadable, of impossible length or with a wrong checksum: ignored
};

/// `rsdp` 0: looks in the first KiB of the EBDA and in 0xe0000–0xfffff [§5.2.5.1]. Error{not_found}: there is none; Error{protocol}: it is there
/// and the list of tables is not.
Result<Tables> read_tables(PhysicalReader& memory, u64 rsdp);

/// What \_S5 asks to be written to sleep [§7.4.2.6]; from a scan of the DSDT, without interpreting it.
struct SleepType {
    u8 a;
    u8 b;
};
Result<SleepType> find_s5(PhysicalReader& memory, u64 dsdt);

/// The port of QEMU's pvpanic device (_HID "QEMU0001"), from its _CRS in the DSDT, by a scan too.
std::optional<u16> find_pvpanic(PhysicalReader& memory, u64 dsdt);

} // namespace fl::acpi
