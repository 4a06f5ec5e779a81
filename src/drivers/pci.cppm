// The PCI bus: configuration space, a bounded walk over all functions, base address registers, capabilities, and the
// data that a driver is matched by. Portable; drivers.machine.pci has the two ways to reach configuration space, tests
// have a fake.
//
// A machine has a root bus for each host bridge. Bus 0 is always one; the others are found in this order, cheapest
// first:
//   1. No function of class host bridge beside 00:00.0, and no MCFG table (a conventional PC): there is no other root.
//   2. The bus numbers that ACPI gives (_BBN, core.acpi): 32 reads a bus. QEMU's pxb and pxb-pcie show a host bridge
//      function and have a _BBN.
//   3. No ACPI, or a host bridge whose _BBN is computed: every bus that no bridge leads to: 32 reads each, 8160 in all.
//      A read costs two exits where the ports are emulated, so this is the last resort.
export module drivers.pci;
import core.std;
import core.result;

export namespace fl::drivers::pci {

/// Where a function sits. Values beyond 31 and 7 do not exist.
struct Address {
    u8 bus = 0;
    u8 device = 0;
    u8 function = 0;

    friend constexpr bool operator==(const Address&, const Address&) = default;
};

/// Configuration space, 256 bytes a function, little endian. Offsets are aligned to the access. A function that is not
/// there reads as all ones and ignores writes.
template <class C>
concept ConfigAccess = requires(C& config, Address at, u8 offset, u32 value32, u16 value16) {
    { config.read32(at, offset) } -> std::same_as<u32>;
    config.write32(at, offset, value32);
    config.write16(at, offset, value16);
};

/// The model of ConfigAccess that a Device can hold on to; references live as long as the machine.
class Config {
  public:
    virtual u32 read32(Address at, u8 offset) = 0;
    virtual void write32(Address at, u8 offset, u32 value) = 0;
    virtual void write16(Address at, u8 offset, u16 value) = 0;
    /// Reads so far that did not get to a function's registers and gave all ones for that, not for an empty place.
    virtual u32 failed_reads() const { return 0; }

  protected:
    ~Config() = default;
};
static_assert(ConfigAccess<Config>);

/// The address register of configuration mechanism #1 at port 0xcf8 [PCI-3.0 §3.2.2.3.2]: enable, bus, device,
/// function, dword.
class MechanismOneAddress {
  public:
    static constexpr u16 address_port = 0xcf8;
    static constexpr u16 data_port = 0xcfc;

    constexpr MechanismOneAddress(Address at, u8 offset)
        : value_(u32{1} << 31 | u32{at.bus} << 16 | (at.device & u32{31}) << 11 | (at.function & u32{7}) << 8 |
                 (offset & u32{0xfc})) {}
    constexpr u32 value() const { return value_; }

  private:
    u32 value_;
};

/// Offsets of the header's registers [PCI-3.0 §6.1]; the first 64 bytes.
enum class Field : u8 {
    identity = 0x00,     // device 31:16, vendor 15:0
    command = 0x04,      // status 31:16, command 15:0
    class_code = 0x08,   // class 31:24, subclass 23:16, programming interface 15:8, revision 7:0
    header_type = 0x0c,  // header type 23:16
    bar0 = 0x10,         // six in a type 0 header, two in a type 1 header
    bridge_buses = 0x18, // type 1: subordinate 23:16, secondary 15:8, primary 7:0
    capabilities = 0x34, // pointer 7:0
    interrupt = 0x3c,    // pin 15:8, line 7:0
};

/// The command register [PCI-3.0 §6.2.2].
struct Command {
    u16 raw = 0;

    static constexpr u16 interrupt_disable = 1u << 10;
    static constexpr u16 bus_master = 1u << 2;
    static constexpr u16 memory_space = 1u << 1;
    static constexpr u16 io_space = 1u << 0;

    constexpr bool has(u16 bits) const { return (raw & bits) == bits; }
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

/// One function, as read once. Holds a pointer to its configuration space.
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

    u32 read32(Field field) const { return config->read32(at, static_cast<u8>(field)); }
    /// INTx pin: 0 none, 1 to 4 INTA to INTD. Line: what the firmware routed it to; 0xff: nothing.
    u8 interrupt_pin() const { return static_cast<u8>(read32(Field::interrupt) >> 8); }
    u8 interrupt_line() const { return static_cast<u8>(read32(Field::interrupt)); }
    Command command() const { return {static_cast<u16>(read32(Field::command))}; }
    /// Sets and clears bits of the command register; a register that has them already is not written.
    void change_command(u16 set, u16 clear = 0) const;
    /// Reads and sizes BAR `index` (0 to 5). Decoding is off while the size is read, so do this before the device is in
    /// use. Error{bad_argument}: no such register in this header; Error{protocol}: a type, or a size, that does not
    /// exist.
    Result<Bar> bar(u8 index) const;
    /// Offset of the first capability with this id; nothing when there is none. Bounded: a list with a loop ends.
    std::optional<u8> capability(CapabilityId id) const;
};

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
