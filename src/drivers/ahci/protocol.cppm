// AHCI and Serial ATA wire formats: HBA and port registers, command list, received FIS area, command tables, FISes,
// and the parts of IDENTIFY data and of the NCQ error log that only Serial ATA disks have. No I/O.
// Specifications: [ahci-1.3.1] Serial ATA AHCI, [sata] Serial ATA 3.x, [ACS] ATA Command Set.
export module drivers.ahci.protocol;
import core.std;
import core.registers;
import core.result;
import core.text;
export import drivers.ata.protocol;

export namespace fl::drivers::ahci {

// ---- HBA registers [ahci-1.3.1 §3.1], relative to ABAR ----

struct Capabilities : Register<Capabilities, u32> {
    static constexpr u64 offset = 0x00;
    static constexpr Bit<31, Attribute::read_only> s64a{};     // 64-bit addressing
    static constexpr Bit<30, Attribute::read_only> sncq{};     // native command queuing
    static constexpr Bit<27, Attribute::read_only> sss{};      // staggered spin-up
    static constexpr Bit<24, Attribute::read_only> sclo{};     // command list override
    static constexpr Field<12, 8, Attribute::read_only> ncs{}; // command slots, less one
    static constexpr Field<4, 0, Attribute::read_only> np{};   // ports, less one
    static constexpr auto layout = fields(s64a, sncq, sss, sclo, ncs, np);
};
struct GlobalControl : Register<GlobalControl, u32> {
    static constexpr u64 offset = 0x04;
    static constexpr Bit<31> ae{}; // AHCI enable
    static constexpr Bit<1> ie{};  // interrupt enable
    static constexpr Bit<0> hr{};  // HBA reset: the HBA clears it
    static constexpr auto layout = fields(ae, ie, hr);
};
/// One bit for each port with an interrupt pending, written as 1 to clear it after the port's own status.
struct InterruptStatus : Register<InterruptStatus, u32> {
    static constexpr u64 offset = 0x08;
    static constexpr auto layout = fields();
};
struct PortsImplemented : Register<PortsImplemented, u32> {
    static constexpr u64 offset = 0x0c;
    static constexpr auto layout = fields();
};
struct Capabilities2 : Register<Capabilities2, u32> {
    static constexpr u64 offset = 0x24;
    static constexpr Bit<0, Attribute::read_only> boh{}; // BIOS/OS handoff
    static constexpr auto layout = fields(boh);
};
struct Handoff : Register<Handoff, u32> {
    static constexpr u64 offset = 0x28;
    static constexpr Bit<4> bb{};                               // the firmware is busy cleaning up
    static constexpr Bit<3, Attribute::write_1_to_clear> ooc{}; // ownership has changed
    static constexpr Bit<1> oos{};                              // owned by the operating system
    static constexpr Bit<0> bos{};                              // owned by the firmware
    static constexpr auto layout = fields(bb, ooc, oos, bos);
};
inline constexpr u64 first_port = 0x100;
inline constexpr u64 port_bytes = 0x80;
inline constexpr u32 max_ports = 32;

// ---- port registers [ahci-1.3.1 §3.3], relative to the port's block ----

inline constexpr u64 command_list_base = 0x00; // PxCLB, PxCLBU at 0x04: 1 KiB aligned
inline constexpr u64 fis_base = 0x08;          // PxFB, PxFBU at 0x0c: 256-byte aligned
/// PxIS; the same bits in PxIE enable the interrupt.
struct PortInterrupts : Register<PortInterrupts, u32> {
    static constexpr u64 offset = 0x10;
    static constexpr Bit<30, Attribute::write_1_to_clear> tfes{}; // task file error
    static constexpr Bit<29, Attribute::write_1_to_clear> hbfs{}; // host bus fatal error
    static constexpr Bit<28, Attribute::write_1_to_clear> hbds{}; // host bus data error
    static constexpr Bit<27, Attribute::write_1_to_clear> ifs{};  // interface fatal error
    static constexpr Bit<26, Attribute::write_1_to_clear> infs{}; // interface non-fatal error
    static constexpr Bit<24, Attribute::write_1_to_clear> ofs{};  // overflow
    static constexpr Bit<22, Attribute::read_only> prcs{};        // PhyRdy has changed: cleared by PxSERR.DIAG.N
    static constexpr Bit<6, Attribute::read_only> pcs{};          // a device was connected: PxSERR.DIAG.X
    static constexpr Bit<5, Attribute::write_1_to_clear> dps{};   // a descriptor is processed
    static constexpr Bit<4, Attribute::write_1_to_clear> ufs{};   // unknown FIS
    static constexpr Bit<3, Attribute::write_1_to_clear> sdbs{};  // Set Device Bits FIS
    static constexpr Bit<2, Attribute::write_1_to_clear> dss{};   // DMA Setup FIS
    static constexpr Bit<1, Attribute::write_1_to_clear> pss{};   // PIO Setup FIS
    static constexpr Bit<0, Attribute::write_1_to_clear> dhrs{};  // D2H Register FIS
    static constexpr auto layout = fields(tfes, hbfs, hbds, ifs, infs, ofs, prcs, pcs, dps, ufs, sdbs, dss, pss, dhrs);
    /// A command has ended without an error.
    static constexpr u32 ends = sdbs.mask | pss.mask | dhrs.mask | dss.mask | dps.mask;
    /// No command goes on before the port is restarted.
    static constexpr u32 fatal = tfes.mask | hbfs.mask | hbds.mask | ifs.mask;
    static constexpr u32 link = prcs.mask | pcs.mask;
    static constexpr u32 enabled = fatal | link | sdbs.mask | dhrs.mask;
};
inline constexpr u64 interrupt_enable = 0x14; // PxIE
struct PortCommand : Register<PortCommand, u32> {
    static constexpr u64 offset = 0x18;
    static constexpr Field<31, 28> icc{};                      // 1: active
    static constexpr Bit<15, Attribute::read_only> cr{};       // the command list runs
    static constexpr Bit<14, Attribute::read_only> fr{};       // received FISes are stored
    static constexpr Field<12, 8, Attribute::read_only> ccs{}; // current slot
    static constexpr Bit<4> fre{};                             // store received FISes
    static constexpr Bit<3> clo{};                             // clears BSY and DRQ, with CAP.SCLO
    static constexpr Bit<2> pod{};                             // power on
    static constexpr Bit<1> sud{};                             // spin up
    static constexpr Bit<0> st{};                              // process the command list
    static constexpr auto layout = fields(icc, cr, fr, ccs, fre, clo, pod, sud, st);
    static constexpr u32 command_list = cr.mask;
    static constexpr u32 fis_receive = fr.mask;
};
/// PxTFD: the device's status and error registers.
struct TaskFile : Register<TaskFile, u32> {
    static constexpr u64 offset = 0x20;
    static constexpr Field<15, 8, Attribute::read_only, u8> err{};
    static constexpr Field<7, 0, Attribute::read_only, u8> sts{};
    static constexpr auto layout = fields(err, sts);
    static constexpr u32 in_progress = 0x88; // BSY, DRQ
    constexpr ata::Status status() const { return {get(sts)}; }
    constexpr ata::ErrorRegister error() const { return {get(err)}; }
};
inline constexpr u64 signature = 0x24; // PxSIG, of the last device that was reset
enum class Signature : u32 {
    ata = 0x0000'0101,
    packet = 0xeb14'0101,
    enclosure = 0xc33c'0101,
    multiplier = 0x9669'0101
};
struct SataStatus : Register<SataStatus, u32> {
    static constexpr u64 offset = 0x28;
    static constexpr Field<3, 0, Attribute::read_only> det{}; // 0: nothing, 1: no communication, 3: established
    static constexpr auto layout = fields(det);
    static constexpr u32 there = 1; // set in 1 and 3
    static constexpr u32 up = 2;    // set in 3
    static constexpr u32 established = 3;
};
struct SataControl : Register<SataControl, u32> {
    static constexpr u64 offset = 0x2c;
    static constexpr Field<3, 0> det{}; // 1: COMRESET is sent until it is 0 again
    static constexpr auto layout = fields(det);
};
inline constexpr u64 sata_error = 0x30;    // PxSERR, written as 1 to clear
inline constexpr u64 sata_active = 0x34;   // PxSACT: NCQ tags under way
inline constexpr u64 command_issue = 0x38; // PxCI: slots under way

// ---- memory structures [ahci-1.3.1 §4.2] ----

/// Command header, one for each slot.
struct CommandHeader {
    u32 flags = 0;       // 4:0 length of the command FIS in dwords, 6 write, 31:16 number of descriptors
    u32 transferred = 0; // written by the HBA: bytes of a non-queued command
    u32 table = 0;       // 128-byte aligned
    u32 table_high = 0;
    std::array<u32, 4> reserved{};

    static constexpr u32 fis_dwords = 5;
    static constexpr u32 write = 1 << 6;
    static constexpr u32 flags_of(bool to_device, u32 descriptors) {
        return fis_dwords | (to_device ? write : 0) | descriptors << 16;
    }
};
static_assert(sizeof(CommandHeader) == 32);
/// Physical region descriptor: word-aligned memory of an even number of bytes, up to 4 MiB.
struct Prd {
    u32 base = 0;
    u32 base_high = 0;
    u32 reserved = 0;
    u32 count = 0; // bytes less one in 21:0

    static constexpr u32 max_bytes = 4 << 20;
    static constexpr Prd of(u64 bus, u32 bytes) {
        return {static_cast<u32>(bus), static_cast<u32>(bus >> 32), 0, bytes - 1};
    }
};
static_assert(sizeof(Prd) == 16);
/// H2D Register FIS [sata §10.5.5].
struct CommandFis {
    u8 type = 0x27;
    u8 flags = 0x80; // C: a command; port multiplier port 0
    u8 command = 0;
    u8 features = 0;
    std::array<u8, 3> lba_low{};
    u8 device = 0;
    std::array<u8, 3> lba_high{};
    u8 features_high = 0;
    u16 count = 0;
    u8 icc = 0;
    u8 control = 0;
    u32 auxiliary = 0;
};
static_assert(sizeof(CommandFis) == 20 && __builtin_offsetof(CommandFis, count) == 12);
inline constexpr u32 max_descriptors = 8;
struct CommandTable {
    CommandFis fis;
    std::array<u8, 44> rest{};
    std::array<u8, 16> packet{}; // ATAPI
    std::array<u8, 48> reserved{};
    std::array<Prd, max_descriptors> descriptors{};
};
static_assert(sizeof(CommandTable) == 256 && __builtin_offsetof(CommandTable, descriptors) == 0x80);

/// Received FIS area: 256 bytes, of which these two are read.
struct ReceivedFis {
    static constexpr u32 bytes = 256;
    static constexpr u32 register_at = 0x40; // D2H Register FIS
    static constexpr u32 bits_at = 0x58;     // Set Device Bits FIS; the tags that it ends are in its second dword
    static constexpr u8 register_type = 0x34;
    static constexpr u8 bits_type = 0xa1;
};
/// First dword of a D2H Register or Set Device Bits FIS [sata §10.5.6, §10.5.7].
struct FisHead : Register<FisHead, u32> {
    static constexpr u64 offset = 0;
    static constexpr Field<31, 24, Attribute::read_only, u8> error{};
    static constexpr Field<23, 16, Attribute::read_only, u8> status{};
    static constexpr Field<7, 0, Attribute::read_only, u8> type{};
    static constexpr auto layout = fields(error, status, type);
};

// ---- commands [ACS §7] ----

enum class Opcode : u8 {
    data_set_management = 0x06,
    read_dma_ext = 0x25,
    read_log_ext = 0x2f,
    write_dma_ext = 0x35,
    read_fpdma_queued = 0x60,
    write_fpdma_queued = 0x61,
    read_dma = 0xc8,
    write_dma = 0xca,
    flush_cache = 0xe7,
    flush_cache_ext = 0xea,
    identify_device = 0xec,
    set_features = 0xef,
};

namespace detail {
constexpr CommandFis fis(Opcode opcode, u64 lba, u16 count, u8 device) {
    CommandFis f;
    f.command = to_underlying(opcode);
    f.device = device;
    f.count = count;
    for (u32 i = 0; i < 3; ++i) {
        f.lba_low[i] = static_cast<u8>(lba >> 8 * i);
        f.lba_high[i] = static_cast<u8>(lba >> (24 + 8 * i));
    }
    return f;
}
} // namespace detail
/// READ or WRITE FPDMA QUEUED: the count is in the features, the tag in the count. `sectors`: 1 to 65536.
constexpr CommandFis queued_fis(bool write, u64 lba, u32 sectors, u32 tag) {
    CommandFis f = detail::fis(write ? Opcode::write_fpdma_queued : Opcode::read_fpdma_queued, lba,
                               static_cast<u16>(tag << 3), 0x40);
    f.features = static_cast<u8>(sectors);
    f.features_high = static_cast<u8>(sectors >> 8);
    return f;
}
/// READ or WRITE DMA (EXT). `wide`: 48-bit addresses, up to 65536 sectors; otherwise up to 256.
constexpr CommandFis dma_fis(bool write, bool wide, u64 lba, u32 sectors) {
    if (wide) {
        return detail::fis(write ? Opcode::write_dma_ext : Opcode::read_dma_ext, lba, static_cast<u16>(sectors), 0x40);
    }
    return detail::fis(write ? Opcode::write_dma : Opcode::read_dma, lba & 0xff'ffff, static_cast<u16>(sectors & 0xff),
                       static_cast<u8>(0x40 | (lba >> 24 & 0x0f)));
}
constexpr CommandFis plain_fis(Opcode opcode) { return detail::fis(opcode, 0, 0, 0x40); }
/// SET FEATURES, disable the volatile write cache [ACS §7.45.7].
constexpr CommandFis no_write_cache_fis() {
    CommandFis f = plain_fis(Opcode::set_features);
    f.features = 0x82;
    return f;
}
/// DATA SET MANAGEMENT with TRIM, and one block of ranges.
constexpr CommandFis trim_fis() {
    CommandFis f = detail::fis(Opcode::data_set_management, 0, 1, 0x40);
    f.features = 1;
    return f;
}
/// READ LOG EXT of the first page of the NCQ command error log.
constexpr CommandFis error_log_fis() { return detail::fis(Opcode::read_log_ext, 0x10, 1, 0x40); }

/// A block of ranges for TRIM [ACS §7.10.3.1]: LBA in 47:0, sectors in 63:48, unused entries 0.
inline constexpr u32 trim_ranges = 64;
inline constexpr u32 trim_max_sectors = 65535; // of a range
constexpr void fill_trim(std::span<u64, trim_ranges> block, u64 lba, u64 sectors) {
    for (u64& entry : block) {
        const u64 length = std::min<u64>(sectors, trim_max_sectors);
        entry = length == 0 ? 0 : lba | length << 48;
        lba += length;
        sectors -= length;
    }
}

/// The NCQ command error log [ACS §9.14]: which tag failed, and how.
struct QueueError {
    u8 tag = 0;
    ata::Status status{};
    ata::ErrorRegister error{};
};
/// `page`: 512 bytes. Nullopt: the checksum is wrong, or no queued command has failed.
constexpr std::optional<QueueError> decode_error_log(std::span<const u8, 512> page) {
    u8 sum = 0;
    for (const u8 byte : page) {
        sum = static_cast<u8>(sum + byte);
    }
    if (sum != 0 || (page[0] & 0x80) != 0) { // NQ: a non-queued command
        return std::nullopt;
    }
    return QueueError{static_cast<u8>(page[0] & 0x1f), {page[2]}, {page[3]}};
}

/// What IDENTIFY DEVICE says of a Serial ATA disk, in addition to ata::DriveInfo.
struct SataInfo {
    u32 queue_depth = 0; // commands with NCQ; 0: no NCQ
    bool trim = false;
};
constexpr SataInfo decode_sata(const ata::IdentifyData& data) {
    const auto& w = data.words;
    const bool serial = w[76] != 0 && w[76] != 0xffff; // [ACS §7.12.7.36]
    return {.queue_depth = serial && (w[76] & 0x100) != 0 ? (w[75] & 0x1fu) + 1 : 0, .trim = (w[169] & 1) != 0};
}

} // namespace fl::drivers::ahci
