// The PCI bus: configuration space, a bounded walk over all functions, base address registers, capabilities, and the
// data that a driver is matched by. Portable: drivers.pci.registers has the registers, drivers.pci.access the two ways
// to reach configuration space, drivers.pci.msi interrupts; tests have a fake.
//
// A machine has a root bus for each host bridge. Bus 0 is always one; the others are found in this order, cheapest
// first:
//   1. No function of class host bridge beside 00:00.0, and no MCFG table (a conventional PC): there is no other root.
//   2. The bus numbers that ACPI gives (_BBN, core.acpi): 32 reads a bus. QEMU's pxb and pxb-pcie show a host bridge
//      function and have a _BBN.
//   3. No ACPI, or a host bridge whose _BBN is computed: every bus that no bridge leads to: 32 reads each, 8160 in all.
//      A read costs two exits where the ports are emulated, so this is the last resort.
export module drivers.pci;
export import drivers.pci.registers;
import core.std;
import core.mmio;
import core.registers;
import core.result;

export namespace fl::drivers::pci {

/// Where a function sits. Devices beyond 31 and functions beyond 7 do not exist. A segment has 256 buses of its own
/// [PCI-FW 3.3 §4.1.2].
struct Address {
    u8 bus = 0;
    u8 device = 0;
    u8 function = 0;
    u16 segment = 0;

    friend constexpr bool operator==(const Address&, const Address&) = default;
};

/// Bytes of a function's configuration space [PCI-3.0 §6.1], [PCIe-5.0 §7.2].
inline constexpr u16 conventional_size = 256;
inline constexpr u16 extended_size = 4096;

/// Configuration space of the functions of a segment, or of some buses of it, little endian. References live as long
/// as the machine.
class Config {
  public:
    /// One access of `width` bytes: 1, 2 or 4. `offset` is a multiple of it below extended_size. All ones, and a write
    /// is ignored: no function is there, it is in another segment, or this way does not get to the offset.
    virtual u32 read(Address at, u16 offset, u32 width) = 0;
    virtual void write(Address at, u16 offset, u32 width, u32 value) = 0;
    /// Whether offsets from conventional_size on are reached for this function.
    virtual bool reaches_extended(Address at) const = 0;
    virtual u16 segment() const { return 0; }
    /// Reads so far that did not get to a function's registers and gave all ones for that, not for an empty place.
    virtual u32 failed_reads() const { return 0; }

  protected:
    ~Config() = default;
};

/// A base address register, decoded and sized [PCI-3.0 §6.2.5.1].
struct Bar {
    enum class Kind : u8 { none, io, memory32, memory64 };
    Kind kind = Kind::none; // none: not implemented
    bool prefetchable = false;
    u64 base = 0; // a port number or a physical address; 0: nobody has assigned one
    u64 size = 0; // bytes, a power of two
};

/// Capability ids that have a use here; other values occur [PCI-3.0 appendix H].
enum class CapabilityId : u8 { power = 0x01, msi = 0x05, vendor = 0x09, express = 0x10, msix = 0x11 };
/// Extended capability ids [PCIe-5.0 §7.9]; other values occur.
enum class ExtendedCapabilityId : u16 { error_reporting = 0x01, serial_number = 0x03, vendor = 0x0b };

struct Capability {
    u16 id = 0;     // a CapabilityId, or an ExtendedCapabilityId
    u16 offset = 0; // of its header, in configuration space
    u8 version = 0; // of an extended one
};

struct Device;

/// The capabilities of a function, in the order of the list. Each place is visited once, so a list with a loop ends,
/// and so does one with a pointer into the header.
class Capabilities {
  public:
    /// The next one; nothing: that was all. One or two reads.
    std::optional<Capability> next();
    std::optional<Capability> next(CapabilityId id) { return next_with(to_underlying(id)); }
    std::optional<Capability> next(ExtendedCapabilityId id) { return next_with(to_underlying(id)); }

  private:
    friend struct Device;
    Capabilities(const Device& device, bool extended);
    std::optional<Capability> next_with(u16 id);

    const Device* device_;                           // it outlives this
    std::array<u64, extended_size / 4 / 64> seen_{}; // a bit for each dword
    u16 at_ = 0;                                     // of the next header; 0: there is none
    bool extended_;
};

/// One function, as read once. Holds a pointer to its configuration space. A model of RegisterAccess for 8, 16 and 32
/// bits: `Command::read(device)`, `MsiControl::read(device, capability)`.
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

    /// One access; as Config's.
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

    /// INTx pin: 0 none, 1 to 4 INTA to INTD. Line: what the firmware routed it to; 0xff: nothing.
    u8 interrupt_pin() const { return InterruptPin::read(*this).get(InterruptPin::pin); }
    u8 interrupt_line() const { return InterruptPin::read(*this).get(InterruptPin::line); }
    Command command() const { return Command::read(*this); }
    /// Sets and clears bits of the command register; a register that has them already is not written.
    void change_command(Command set, Command clear = {}) const;
    /// Reads and sizes BAR `index` (0 to 5). Decoding is off while the size is read, so do this before the device is in
    /// use. Error{bad_argument}: no such register in this header; Error{protocol}: a type, or a size, that does not
    /// exist.
    Result<Bar> bar(u8 index) const;
    /// bar() of a register that a driver needs for registers in memory: Error{not_supported} says what it is instead
    /// (I/O ports, not implemented, without an address); Error{protocol}: the upper half of a 64-bit register.
    Result<Bar> memory_bar(u8 index) const;
    /// Maps `size` bytes at `at_byte` of a BAR, and switches the decoding of memory on. Its errors are those of
    /// memory_bar() and MmioMapper::map(); Error{protocol}: the BAR is smaller.
    Result<Mmio> map_bar(MmioMapper& mapper, u8 index, u64 at_byte, u64 size) const;
    /// The whole BAR.
    Result<Mmio> map_bar(MmioMapper& mapper, u8 index) const;

    Capabilities capabilities() const { return {*this, false}; }
    /// Those beyond the first 256 bytes; none where they are not reached, or the function is not PCI Express.
    Capabilities extended_capabilities() const { return {*this, true}; }
    /// Offset of the first capability with this id; nothing when there is none.
    std::optional<u16> capability(CapabilityId id) const;
    /// Brings the function to D0 [PCI-PM-1.2 §5.4]. Gives how many nanoseconds must pass before the next access to it:
    /// 0 where it was there already or has no power management, 10 ms from D3.
    u64 power_on() const;
};
static_assert(RegisterAccess<const Device, u8> && RegisterAccess<const Device, u16> &&
              RegisterAccess<const Device, u32>);

/// What a driver looks for. Fields left alone match everything.
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

/// The function at this address, or nothing.
std::optional<Device> look_up(Config& config, Address at);

/// A set of bus numbers.
struct BusSet {
    std::array<u64, 4> bits{};
    constexpr bool has(u8 bus) const { return (bits[bus / 64] >> bus % 64 & 1) != 0; }
    constexpr void add(u8 bus) { bits[bus / 64] |= u64{1} << bus % 64; }
};

/// A walk over the functions of one segment. Each bus is walked once, whatever the bridges claim; a bus costs at least
/// 32 reads, one for function 0 of each device number.
class Walk {
  public:
    /// Called for every function, in order of discovery.
    using Found = void (*)(void* context, const Device& device);

    Walk(Config& config, Found found, void* context) : config_(config), found_(found), context_(context) {}

    /// A bus, and every bus that a bridge on the way leads to.
    void tree(u8 root);
    /// All buses from `first` to `last` that were not walked yet: for machines where nobody says which of them are
    /// roots.
    void rest(u8 first, u8 last);
    /// Whether a host bridge was seen beside the one at 00:00.0: there may be root buses that no bridge leads to.
    bool more_host_bridges() const { return more_host_bridges_; }
    /// Functions found.
    u32 functions() const { return functions_; }
    /// Places that could not be looked at, one for each device number: what is there, and behind it, is not found.
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

/// What the firmware says about the root buses of a segment.
struct Roots {
    BusSet buses;        // whose number it gives
    bool others = false; // there are some whose number it does not give
    u8 first = 0;        // the buses that exist
    u8 last = 255;
};

/// What a search found.
struct Enumerated {
    u32 functions = 0;
    u32 unreachable = 0; // as Walk's
};

/// All functions of a segment: the tree of bus `first`, those of the other root buses, and all buses there are where
/// nobody says which of them are roots. `ask` is called when there may be further roots, and may be nullptr or give
/// nothing: nothing is known then. `always`: ask even where no second host bridge shows itself.
Enumerated enumerate(Config& config, Walk::Found found, void* context, u8 first = 0,
                     std::optional<Roots> (*ask)() = nullptr, bool always = false);

} // namespace fl::drivers::pci
