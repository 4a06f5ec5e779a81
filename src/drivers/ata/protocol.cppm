// ATA and bus-master IDE wire formats: registers, commands, the physical region descriptor, IDENTIFY data. No I/O.
// Specifications: [ACS] ATA/ATAPI Command Set, [ATA-7] the parallel interface (volume 2), [BMIDE] Programming
// Interface for Bus Master IDE, 1.0.
export module drivers.ata.protocol;
import core.std;
import core.registers;
import core.result;
import core.text;

export namespace fl::drivers::ata {

/// Command block registers, as offsets from the channel's first port [ATA-7 §6.2].
enum class Register : u8 {
    data = 0,     // 16 bits
    error = 1,    // read
    features = 1, // write
    sector_count = 2,
    lba_low = 3,
    lba_mid = 4,
    lba_high = 5,
    device = 6,
    status = 7,  // read: clears a pending interrupt
    command = 7, // write
};

/// Status register [ATA-7 §6.14].
struct Status : fl::Register<Status, u8> {
    static constexpr Bit<7, Attribute::read_only> bsy{}; // if set, no other bit is valid
    static constexpr Bit<6, Attribute::read_only> drdy{};
    static constexpr Bit<5, Attribute::read_only> df{};
    static constexpr Bit<3, Attribute::read_only> drq{};
    static constexpr Bit<0, Attribute::read_only> err{}; // details in the error register
    static constexpr auto layout = fields(bsy, drdy, df, drq, err);

    constexpr bool busy() const { return get(bsy); }
    constexpr bool ready() const { return get(drdy); }
    constexpr bool device_fault() const { return get(df); }
    constexpr bool data_request() const { return get(drq); }
    constexpr bool error() const { return get(err); }
    /// The bus is not driven: all pull-ups, or pull-ups with DD7's pull-down.
    constexpr bool floating() const { return raw == 0xff || raw == 0x7f; }
    /// A command is in progress: from its issue to its end BSY or DRQ is set [ATA-7 §9.3].
    constexpr bool in_progress() const { return busy() || data_request(); }
};

/// Error register, valid when Status::error() [ATA-7 §6.9, ACS §6.3].
struct ErrorRegister : fl::Register<ErrorRegister, u8> {
    static constexpr Bit<7, Attribute::read_only> icrc{}; // CRC error in an Ultra DMA transfer
    static constexpr Bit<6, Attribute::read_only> unc{};  // uncorrectable medium error
    static constexpr Bit<4, Attribute::read_only> idnf{}; // no such sector
    static constexpr Bit<2, Attribute::read_only> abrt{}; // command not supported, or not in the current state
    static constexpr auto layout = fields(icrc, unc, idnf, abrt);

    constexpr bool interface_crc() const { return get(icrc); }
    constexpr bool uncorrectable() const { return get(unc); }
    constexpr bool id_not_found() const { return get(idnf); }
    constexpr bool aborted() const { return get(abrt); }
};

/// Device register [ATA-7 §6.7].
struct DeviceRegister : fl::Register<DeviceRegister, u8> {
    static constexpr Bit<7> obsolete_7{}; // these two are set for compatibility, as in all drivers
    static constexpr Bit<6> lba{};        // addresses are LBAs
    static constexpr Bit<5> obsolete_5{};
    static constexpr Bit<4> dev{}; // the unit
    static constexpr Field<3, 0> lba_27_24{};
    static constexpr auto layout = fields(obsolete_7, lba, obsolete_5, dev, lba_27_24);
};
constexpr u8 device_register(u8 unit, u8 lba_27_24 = 0) {
    using D = DeviceRegister;
    return D::of(D::obsolete_7, D::lba, D::obsolete_5)
        .set(D::dev, (unit & 1) != 0)
        .set(D::lba_27_24, static_cast<u8>(lba_27_24 & 0x0f))
        .raw;
}

/// Device control register [ATA-7 §6.8].
enum class Control : u8 { none = 0x00, interrupts_off = 0x02, software_reset = 0x04, high_order_byte = 0x80 };
constexpr Control operator|(Control a, Control b) { return static_cast<Control>(to_underlying(a) | to_underlying(b)); }

/// Command codes [ACS §7].
enum class Command : u8 {
    read_dma = 0xc8,
    write_dma = 0xca,
    read_dma_ext = 0x25,
    write_dma_ext = 0x35,
    flush_cache = 0xe7,
    flush_cache_ext = 0xea,
    identify_packet_device = 0xa1,
    identify_device = 0xec,
    set_multiple_mode = 0xc6,
    set_features = 0xef,
};
/// Subcommands of SET FEATURES, in the features register [ACS §7.45].
enum class SetFeature : u8 {
    transfer_mode = 0x03,
    no_write_cache = 0x82, // disable the volatile write cache
};
inline constexpr u8 transfer_mode_multiword = 0x20; // | mode
// sectors addressable with 28 bits: the last LBA is one less [ACS §4.1.2]
inline constexpr u32 lba28_sectors = 0x0fff'ffff;
inline constexpr u32 lba28_max_count = 256;   // encoded as sector count 0
inline constexpr u32 lba48_max_count = 65536; // encoded as sector count 0

/// Contents of LBA mid and high after a reset or an aborted IDENTIFY DEVICE [ACS §4.3, table of signatures]; other
/// values occur.
enum class Signature : u16 { ata = 0x0000, packet = 0xeb14, serial_ata = 0xc33c, serial_packet = 0x9669 };

/// Bus-master registers of a channel, as offsets from its 8 ports [BMIDE §2].
enum class BusMaster : u8 { command = 0, status = 2, table = 4 };

/// Bus-master command [BMIDE §2.1].
struct BusMasterCommand : fl::Register<BusMasterCommand, u8> {
    // set: data moves from disk to memory; must not change while active
    static constexpr Bit<3> to_memory{};
    static constexpr Bit<0> start{}; // transfers begin on the transition from 0 to 1
    static constexpr auto layout = fields(to_memory, start);
};
inline constexpr u8 bus_master_start = BusMasterCommand::of(BusMasterCommand::start).raw;
inline constexpr u8 bus_master_to_memory = BusMasterCommand::of(BusMasterCommand::to_memory).raw;

/// Bus-master status [BMIDE §2.2].
struct BusMasterStatus : fl::Register<BusMasterStatus, u8> {
    static constexpr Bit<7, Attribute::read_only> simplex_only{}; // the two channels cannot transfer concurrently
    static constexpr Field<6, 5> drives_capable{};                // "drive can do DMA": set and used by software only
    // the device has raised its interrupt since this was cleared
    static constexpr Bit<2, Attribute::write_1_to_clear> interrupt_seen{};
    static constexpr Bit<1, Attribute::write_1_to_clear> failed{}; // a memory access failed
    static constexpr Bit<0, Attribute::read_only> transferring{};  // the end of the table is not reached
    static constexpr auto layout = fields(simplex_only, drives_capable, interrupt_seen, failed, transferring);

    constexpr bool simplex() const { return get(simplex_only); }
    constexpr bool interrupt() const { return get(interrupt_seen); }
    constexpr bool error() const { return get(failed); }
    constexpr bool active() const { return get(transferring); }
};

/// Physical region descriptor [BMIDE §1.2]: contiguous memory with even address and length, not crossing a 64 KiB
/// boundary.
struct Prd {
    u32 base = 0;
    u16 count = 0; // bytes; 0 means 64 KiB
    u16 flags = 0;

    static constexpr u16 last = 0x8000;
    static constexpr u32 boundary = 0x10000;
};
static_assert(sizeof(Prd) == 8 && __builtin_offsetof(Prd, base) == 0 && __builtin_offsetof(Prd, count) == 4 &&
              __builtin_offsetof(Prd, flags) == 6);
/// The table must be 4-byte aligned, below 4 GiB and not cross 64 KiB [BMIDE §1.1]; a page satisfies that.
inline constexpr usize prd_capacity = 512;

/// IDENTIFY DEVICE data, 512 bytes [ACS §7.12]; words are little endian on the bus.
struct IdentifyData {
    std::array<u16, 256> words{};
};
static_assert(sizeof(IdentifyData) == 512);

/// The part used by the driver.
struct DriveInfo {
    FixedText<40> model;
    u64 sectors = 0; // of sector_size
    u32 sector_size = 512;
    u32 physical_sector_size = 512;
    bool lba48 = false;
    bool write_cache = false; // volatile and enabled
    bool flush = false;       // FLUSH CACHE
    bool flush_ext = false;   // FLUSH CACHE EXT
    i8 ultra_dma = -1;        // selected mode, -1: none
    i8 multiword_dma = -1;    // selected mode, -1: none
    i8 multiword_best = -1;   // best supported mode, -1: none
};
/// How the driver uses a disk.
struct Usage {
    bool flush = false;         // by FLUSH CACHE (EXT)
    bool write_through = false; // its write cache was switched off, and must be after each reset
    bool words = false;         // 16-bit accesses to pairs of its registers
};

/// Serial number, firmware revision, model and size (words 10 to 19, 23 to 46, 60 and 61, 100 to 103) [ACS §7.12.7]:
/// identifies a device.
struct DeviceIdentity {
    std::array<u16, 40> words{};

    explicit constexpr DeviceIdentity(const IdentifyData& data) {
        std::copy_n(data.words.begin() + 10, 10, words.begin());
        std::copy_n(data.words.begin() + 23, 24, words.begin() + 10);
        std::copy_n(data.words.begin() + 60, 2, words.begin() + 34); // sectors
        std::copy_n(data.words.begin() + 100, 4, words.begin() + 36);
    }
    /// Whether both are the same device; never true with a blank serial number.
    constexpr bool same(const DeviceIdentity& other) const {
        const bool blank = std::all_of(words.begin(), words.begin() + 10, [](u16 w) { return w == 0 || w == 0x2020; });
        return !blank && std::equal(words.begin(), words.end(), other.words.begin());
    }
};
/// A disk that reports no sectors: a drive without a medium, or an image of 0 bytes.
constexpr bool is_empty(const IdentifyData& data) {
    const auto& w = data.words;
    return (w[0] & 0x8000) == 0 && (w[60] | w[61] | w[100] | w[101] | w[102] | w[103]) == 0;
}

/// Validates and decodes. Errors: a wrong checksum, a disk without LBA or DMA, a sector size other than 512 or 4096,
/// no sectors.
Result<DriveInfo> decode(const IdentifyData& data);

/// Human-readable register contents: status, error and bus-master bits.
template <TextSink S>
void describe(S& sink, Status status, ErrorRegister error, BusMasterStatus bus) {
    print(sink, "status {:#02x}", status.raw);
    if (status.device_fault()) {
        sink.write(", device fault");
    }
    if (status.error()) {
        print(sink, ", error {:#02x}", error.raw);
        if (error.interface_crc()) {
            sink.write(" ICRC (interface CRC error)");
        }
        if (error.uncorrectable()) {
            sink.write(" UNC (unreadable medium)");
        }
        if (error.id_not_found()) {
            sink.write(" IDNF (no such sector)");
        }
        if (error.aborted()) {
            sink.write(" ABRT (command refused)");
        }
    }
    if (bus.error()) {
        sink.write(", bus-master error (memory refused the transfer)");
    } else if (bus.active()) {
        sink.write(", ended before all data was transferred");
    }
}

} // namespace fl::drivers::ata
