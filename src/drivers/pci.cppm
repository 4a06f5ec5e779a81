// The PCI bus: configuration space, bounded enumeration of all functions, base address registers, capabilities, and
// driver matching. Portable: drivers.pci.registers defines the registers, drivers.pci.access the two ways to access
// configuration space, drivers.pci.msi interrupts; tests use a fake.
//
// A machine has a root bus for each host bridge. Bus 0 always exists; further ones are found in this order, cheapest
// first:
//   1. No host bridge function besides 00:00.0, and no MCFG table (a conventional PC): there is no other root.
//   2. The bus numbers given by ACPI (_BBN, core.acpi): 32 reads per bus. QEMU's pxb and pxb-pcie have a host bridge
//      function and a _BBN.
//   3. No ACPI, or a host bridge whose _BBN is computed: every bus that no bridge leads to: 32 reads each, 8160 in
//   total.
//      A read costs two VM exits where the ports are emulated, so this is the last resort.
export module drivers.pci;
export import drivers.pci.registers;
import core.std;
import core.mmio;
import core.registers;
import core.result;

export namespace fl::drivers::pci {

/// Location of a function. Devices beyond 31 and functions beyond 7 do not exist. Each segment has its own 256 buses
/// [PCI-FW 3.3 §4.1.2].
struct Address {
    u8 bus = 0;
    u8 device = 0;
    u8 function = 0;
    u16 segment = 0;

    friend constexpr bool operator==(const Address&, const Address&) = default;
};

/// Size of a function's configuration space in bytes [PCI-3.0 §6.1], [PCIe-5.0 §7.2].
inline constexpr u16 conventional_size = 256;
inline constexpr u16 extended_size = 4096;

/// Configuration space of the functions of a segment, or of some of its buses, little endian. References are valid
/// for the lifetime of the machine.
class Config {
  public:
    /// One access of `width` bytes: 1, 2 or 4. `offset` is a multiple of it below extended_size. Reads return all
    /// ones and writes are ignored if no function is present, it is in another segment, or the access method cannot
    /// reach the offset.
    virtual u32 read(Address at, u16 offset, u32 width) = 0;
    virtual void write(Address at, u16 offset, u32 width, u32 value) = 0;
    /// Whether offsets from conventional_size on are reachable for this function.
    virtual bool reaches_extended(Address at) const = 0;
    virtual u16 segment() const { return 0; }
    /// Number of reads that returned all ones because the registers were unreachable, as opposed to absent functions.
    virtual u32 failed_reads() const { return 0; }

  protected:
    ~Config() = default;
};

/// A base address register, decoded and sized [PCI-3.0 §6.2.5.1].
struct Bar {
    enum class Kind : u8 { none, io, memory32, memory64 };
    Kind kind = Kind::none; // none: not implemented
    bool prefetchable = false;
    u64 base = 0; // a port number or a physical address; 0: unassigned
    u64 size = 0; // bytes, a power of two
};

/// Capability ids used here; other values occur [PCI-3.0 appendix H].
enum class CapabilityId : u8 { power = 0x01, msi = 0x05, vendor = 0x09, express = 0x10, msix = 0x11 };
/// Extended capability ids [PCIe-5.0 §7.9]; other values occur.
enum class ExtendedCapabilityId : u16 { error_reporting = 0x01, serial_number = 0x03, vendor = 0x0b };

struct Capability {
    u16 id = 0;     // a CapabilityId, or an ExtendedCapabilityId
    u16 offset = 0; // of its header, in configuration space
    u8 version = 0; // extended capabilities only
};

struct Device;

/// The capabilities of a function, in list order. Each position is visited once, so a list with a loop terminates,
/// and so does one with a pointer into the header.
class Capabilities {
  public:
    /// The next one; nullopt: end of the list. One or two reads.
    std::optional<Capability> next();
    std::optional<Capability> next(CapabilityId id) { return next_with(to_underlying(id)); }
    std::optional<Capability> next(ExtendedCapabilityId id) { return next_with(to_underlying(id)); }

  private:
    friend struct Device;
    Capabilities(const Device& device, bool extended);
    std::optional<Capability> next_with(u16 id);

    const Device* device_;                           // must outlive this
    std::array<u64, extended_size / 4 / 64> seen_{}; // one bit per dword
    u16 at_ = 0;                                     // of the next header; 0: none
    bool extended_;
};

/// One function, with identification fields read once. Holds a pointer to its configuration space. Models
/// RegisterAccess for 8, 16 and 32 bits: `Command::read(device)`, `MsiControl::read(device, capability)`.
struct Device {
    Config* config = nullptr;
    Address at{};
    u16 vendor = 0;
    u16 device = 0;
    u8 class_code = 0;
    u8 subclass = 0;
    u8 prog_if = 0;
    u8 revision = 0;
    u8 header_type = 0; // without the multi-function bit
    bool multi_function = false;

    /// One access; see Config.
    template <class T>
        requires(RegisterValue<T> && sizeof(T) <= 4)
    T read(u64 offset) const {
        return static_cast<T>(config->read(at, static_cast<u16>(offset), sizeof(T)));
    }
    template <class T>
        requires(RegisterValue<T> && sizeof(T) <= 4)
    void write(u64 offset, T value) const {
        config->write(at, static_cast<u16>(offset), sizeof(T), value);
    }

    /// INTx pin: 0 none, 1 to 4 INTA to INTD. Line: assigned by the firmware; 0xff: none.
    u8 interrupt_pin() const { return InterruptPin::read(*this).get(InterruptPin::pin); }
    u8 interrupt_line() const { return InterruptPin::read(*this).get(InterruptPin::line); }
    Command command() const { return Command::read(*this); }
    /// Sets and clears bits of the command register; writes only if that changes its value.
    void change_command(Command set, Command clear = {}) const;
    /// Reads and sizes BAR `index` (0 to 5). Decoding is disabled while the size is read, so call this before the
    /// device is in use. Error{bad_argument}: no such register in this header; Error{protocol}: an invalid type or
    /// size.
    Result<Bar> bar(u8 index) const;
    /// bar() for a BAR that must be memory: Error{not_supported} says what it is instead (I/O ports, not implemented,
    /// unassigned); Error{protocol}: the upper half of a 64-bit register.
    Result<Bar> memory_bar(u8 index) const;
    /// Maps `size` bytes at byte offset `at_byte` of a BAR, and enables memory decoding. Errors as for memory_bar()
    /// and MmioMapper::map(); Error{protocol}: the BAR is too small.
    Result<Mmio> map_bar(MmioMapper& mapper, u8 index, u64 at_byte, u64 size) const;
    /// Maps the whole BAR.
    Result<Mmio> map_bar(MmioMapper& mapper, u8 index) const;

    Capabilities capabilities() const { return {*this, false}; }
    /// Capabilities beyond the first 256 bytes; none if these are unreachable or the function is not PCI Express.
    Capabilities extended_capabilities() const { return {*this, true}; }
    /// Offset of the first capability with this id; nullopt: none.
    std::optional<u16> capability(CapabilityId id) const;
    /// Brings the function to D0 [PCI-PM-1.2 §5.4]. Returns the delay in nanoseconds required before the next access
    /// to it: 0 if it was in D0 already or has no power management, 10 ms from D3.
    u64 power_on() const;
};
static_assert(RegisterAccess<const Device, u8> && RegisterAccess<const Device, u16> &&
              RegisterAccess<const Device, u32>);

/// Matching criteria of a driver. Default fields match everything.
struct Match {
    static constexpr u32 any = ~u32{0};
    u32 vendor = any;
    u32 device = any;
    u32 class_code = any;
    u32 subclass = any;
    u32 prog_if = any;

    constexpr bool matches(const Device& d) const {
        const auto fits = [](u32 wanted, u32 seen) { return wanted == any || wanted == seen; };
        return fits(vendor, d.vendor) && fits(device, d.device) && fits(class_code, d.class_code) &&
               fits(subclass, d.subclass) && fits(prog_if, d.prog_if);
    }
};
constexpr bool matches(std::span<const Match> ids, const Device& device) {
    return std::ranges::any_of(ids, [&](const Match& id) { return id.matches(device); });
}

/// The function at this address, or nullopt.
std::optional<Device> look_up(Config& config, Address at);

/// A set of bus numbers.
struct BusSet {
    std::array<u64, 4> bits{};
    constexpr bool has(u8 bus) const { return (bits[bus / 64] >> bus % 64 & 1) != 0; }
    constexpr void add(u8 bus) { bits[bus / 64] |= u64{1} << bus % 64; }
};

/// Enumeration of the functions of one segment. Each bus is scanned once, regardless of the bridges' claims; a bus
/// costs at least 32 reads, one for function 0 of each device number.
class Walk {
  public:
    /// Called for every function, in order of discovery.
    using Found = void (*)(void* context, const Device& device);

    Walk(Config& config, Found found, void* context) : config_(config), found_(found), context_(context) {}

    /// Scans a bus and every bus that its bridges lead to.
    void tree(u8 root);
    /// Scans all buses from `first` to `last` not scanned yet: for machines whose root buses are unknown.
    void rest(u8 first, u8 last);
    /// Whether a host bridge other than 00:00.0 was found: there may be root buses that no bridge leads to.
    bool more_host_bridges() const { return more_host_bridges_; }
    /// Number of functions found.
    u32 functions() const { return functions_; }
    /// Number of inaccessible device numbers: functions there, and on buses beyond them, are not found.
    u32 unreachable() const { return unreachable_; }

  private:
    void bus(u8 number);
    void function(const Device& device);

    Config& config_;
    Found found_;
    void* context_;
    BusSet known_;
    BusSet walked_;
    bool more_host_bridges_ = false;
    u32 functions_ = 0;
    u32 unreachable_ = 0;
};

/// The root buses of a segment according to the firmware.
struct Roots {
    BusSet buses;        // root buses with known numbers
    bool others = false; // there are root buses with unknown numbers
    u8 first = 0;        // range of existing buses
    u8 last = 255;
};

/// Result of an enumeration.
struct Enumerated {
    u32 functions = 0;
    u32 unreachable = 0; // see Walk
};

/// Enumerates all functions of a segment: the tree of bus `first`, those of the other root buses, and every bus if
/// the root buses are unknown. `find_roots` is called when there may be further roots; it may be nullptr or return
/// nullopt, meaning that nothing is known. `always`: call it even without a second host bridge.
Enumerated enumerate(Config& config, Walk::Found found, void* context, u8 first = 0,
                     std::optional<Roots> (*find_roots)() = nullptr, bool always = false);

} // namespace fl::drivers::pci
