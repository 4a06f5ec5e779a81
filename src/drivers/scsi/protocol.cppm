// SCSI disks, independent of the transport: CDBs, returned data, status and sense data. Big endian. No I/O. Every
// parser takes the bytes that actually arrived, however few. Specifications: [SAM-5] architecture, [SPC-4] primary
// commands, [SBC-3] block commands.
export module drivers.scsi.protocol;
import core.std;
import core.result;
import core.text;

export namespace fl::drivers::scsi {

inline constexpr u8 status_good = 0x00;
inline constexpr u8 status_check_condition = 0x02;
inline constexpr u8 status_busy = 0x08;
inline constexpr u8 status_reservation_conflict = 0x18;
inline constexpr u8 status_task_set_full = 0x28;
inline constexpr u8 status_task_aborted = 0x40;
constexpr std::string_view status_name(u8 status) {
    switch (status) {
    case status_good: return "GOOD";
    case status_check_condition: return "CHECK CONDITION";
    case status_busy: return "BUSY";
    case status_reservation_conflict: return "RESERVATION CONFLICT";
    case status_task_set_full: return "TASK SET FULL";
    case status_task_aborted: return "TASK ABORTED";
    default: return "unknown status";
    }
}

// ---- commands ----

enum class Opcode : u8 {
    test_unit_ready = 0x00,
    inquiry = 0x12,
    mode_sense_6 = 0x1a,
    read_capacity_10 = 0x25,
    read_10 = 0x28,
    write_10 = 0x2a,
    synchronize_cache_10 = 0x35,
    unmap = 0x42,
    mode_sense_10 = 0x5a,
    read_16 = 0x88,
    write_16 = 0x8a,
    synchronize_cache_16 = 0x91,
    write_same_16 = 0x93,
    service_action_in_16 = 0x9e, // READ CAPACITY(16) is service action 0x10
    report_luns = 0xa0,
};
std::string_view name(Opcode opcode);

/// A command descriptor block; unused bytes are zero.
inline constexpr u32 cdb_bytes = 16; // the longest one used here
inline constexpr u8 cdb_fua = 0x08;  // byte 1 of WRITE: ends when the data is on the medium [SBC-3 §5.38]
struct Cdb {
    std::array<u8, cdb_bytes> bytes{};
    u8 length = 0;
    constexpr Opcode opcode() const { return static_cast<Opcode>(bytes[0]); }
};

constexpr void put_be(std::span<u8> into, u64 value) {
    for (usize i = into.size(); i-- > 0; value >>= 8) {
        into[i] = static_cast<u8>(value);
    }
}
constexpr u64 get_be(std::span<const u8> from) {
    u64 value = 0;
    for (u8 byte : from) {
        value = value << 8 | byte;
    }
    return value;
}

constexpr Cdb test_unit_ready() { return {{}, 6}; }
/// Vital product data page `page`, or (nullopt) the standard data [SPC-4 §6.6].
constexpr Cdb inquiry(std::optional<u8> page, u16 allocation) {
    Cdb cdb{{0x12, static_cast<u8>(page ? 1 : 0), page.value_or(0)}, 6};
    put_be(std::span(cdb.bytes).subspan(3, 2), allocation);
    return cdb;
}
/// All logical units except the well-known ones [SPC-4 §6.33].
constexpr Cdb report_luns(u32 allocation) {
    Cdb cdb{{0xa0}, 12};
    put_be(std::span(cdb.bytes).subspan(6, 4), allocation);
    return cdb;
}
constexpr Cdb read_capacity_10() { return {{0x25}, 10}; }
constexpr Cdb read_capacity_16(u32 allocation) {
    Cdb cdb{{0x9e, 0x10}, 16};
    put_be(std::span(cdb.bytes).subspan(10, 4), allocation);
    return cdb;
}
/// Current values, without block descriptors [SPC-4 §6.11].
constexpr Cdb mode_sense_6(u8 page, u8 allocation) { return {{0x1a, 0x08, page, 0, allocation}, 6}; }
constexpr Cdb synchronize_cache_10() { return {{0x35}, 10}; } // LBA 0, 0 blocks: the whole medium [SBC-3 §5.24]
constexpr Cdb synchronize_cache_16() { return {{0x91}, 16}; }
/// `parameters`: bytes of the parameter list [SBC-3 §5.28].
constexpr Cdb unmap(u16 parameters) {
    Cdb cdb{{0x42}, 10};
    put_be(std::span(cdb.bytes).subspan(7, 2), parameters);
    return cdb;
}
constexpr Cdb read_write_16(bool write, u64 lba, u32 blocks) {
    Cdb cdb{{static_cast<u8>(write ? 0x8a : 0x88)}, 16};
    put_be(std::span(cdb.bytes).subspan(2, 8), lba);
    put_be(std::span(cdb.bytes).subspan(10, 4), blocks);
    return cdb;
}

/// With one block of data, which is written to all of them; neither unmapped nor anchored [SBC-3 §5.44]. `blocks` is
/// not 0, which would mean all up to the last.
constexpr Cdb write_same_16(u64 lba, u32 blocks) {
    Cdb cdb{{0x93}, 16};
    put_be(std::span(cdb.bytes).subspan(2, 8), lba);
    put_be(std::span(cdb.bytes).subspan(10, 4), blocks);
    return cdb;
}

/// An UNMAP parameter list with one descriptor [SBC-3 §5.28.2].
inline constexpr u32 unmap_list_bytes = 24;
constexpr void unmap_list(std::span<u8, unmap_list_bytes> into, u64 lba, u32 blocks) {
    std::fill(into.begin(), into.end(), u8{0});
    put_be(into.subspan(0, 2), unmap_list_bytes - 2);
    put_be(into.subspan(2, 2), 16);
    put_be(into.subspan(8, 8), lba);
    put_be(into.subspan(16, 4), blocks);
}

// ---- answers ----

/// Standard INQUIRY data [SPC-4 §6.6.2]. Texts are truncated at the first unprintable byte, and trailing blanks
/// removed.
struct Inquiry {
    u8 qualifier = 3; // 0: unit present; 1: none now; 3: none possible
    u8 device_type = 0x1f;
    bool removable = false;
    FixedText<8> vendor;
    FixedText<16> product;
    FixedText<4> revision;
    constexpr bool disk() const { return qualifier == 0 && device_type == 0; }
};
inline constexpr u32 inquiry_bytes = 36;
/// Error{protocol}: fewer than five bytes were received.
Result<Inquiry> parse_inquiry(std::span<const u8> data);

struct Capacity {
    u64 blocks = 0;
    u32 block_bytes = 0;
    u32 physical_shift = 0;      // a physical block is block_bytes << this
    bool thin = false;           // LBPME: unmapping is meaningful
    bool beyond_32_bits = false; // (10) only: use (16)
    bool short_form = false;     // the unit supports only (10)
};
inline constexpr u32 capacity_10_bytes = 8;
inline constexpr u32 capacity_16_bytes = 32;
/// Error{protocol}: too short, or an impossible size.
Result<Capacity> parse_capacity_10(std::span<const u8> data);
Result<Capacity> parse_capacity_16(std::span<const u8> data);

/// Calls `f` with the number of each unit; ~0: its address format has no number here. Well-known units are not
/// devices and are skipped. Error{protocol}: the list is longer than the data received.
inline constexpr u32 lun_entry_bytes = 8;
template <class F>
Result<void> parse_luns(std::span<const u8> data, F&& f) {
    if (data.size() < 8) {
        return Error{Code::protocol, "REPORT LUNS: expected a header of 8 bytes", 8, data.size()};
    }
    const u64 bytes = get_be(data.subspan(0, 4));
    const usize received = std::min<u64>(bytes, data.size() - 8);
    for (usize at = 0; at + lun_entry_bytes <= received; at += lun_entry_bytes) {
        const auto entry = data.subspan(8 + at, lun_entry_bytes);
        // Single level, peripheral or flat space [SAM-5 §4.7]; 0xc1: a well-known unit.
        if (entry[0] == 0xc1) {
            continue;
        }
        const bool flat = entry[0] == 0x00 || entry[0] >> 6 == 1;
        f(flat && get_be(entry.subspan(2, 6)) == 0 ? u32{entry[0] & 0x3fu} << 8 | entry[1] : ~u32{0});
    }
    if (bytes % lun_entry_bytes != 0 || received != bytes) {
        return Error{Code::protocol, "REPORT LUNS: the list is truncated", bytes, data.size() - 8};
    }
    return {};
}

/// WCE of the caching mode page in the answer to mode_sense_6(0x08), and WP and DPOFUA of its header [SBC-3 §6.4.1].
/// write_cache is nullopt if the page is missing.
inline constexpr u8 caching_page = 0x08;
struct ModeAnswer {
    bool write_protected = false;
    bool force_unit_access = false; // FUA of writes is supported
    std::optional<bool> write_cache;
};
/// Error{protocol}: too short.
Result<ModeAnswer> parse_mode_6(std::span<const u8> data);

/// The contents of a vital product data page after its header; empty if it is a different page, or too short.
std::span<const u8> page_body(std::span<const u8> data, u8 page);
/// Whether a supported-pages list (VPD page 0x00) contains the page.
bool lists_page(std::span<const u8> data, u8 page);
/// VPD page 0xb0 [SBC-3 §6.5.3]; zero: not reported.
struct BlockLimits {
    u32 max_transfer_blocks = 0;
    u32 max_unmap_blocks = 0;
    u32 max_unmap_descriptors = 0;
    u64 max_write_same_blocks = 0;
};
/// Error{protocol}: too short.
Result<BlockLimits> parse_block_limits(std::span<const u8> data);
/// VPD page 0xb2 [SBC-3 §6.5.6].
struct Provisioning {
    bool unmap = false;      // LBPU: UNMAP is supported
    bool write_same = false; // LBPWS: WRITE SAME(16) is, with UNMAP set
};
/// Error{protocol}: too short.
Result<Provisioning> parse_provisioning(std::span<const u8> data);

// ---- sense data ----

/// Sense data, from fixed (0x70, 0x71) or descriptor format (0x72, 0x73) [SPC-4 §4.5].
struct Sense {
    u8 key = 0;
    u8 asc = 0;
    u8 ascq = 0;
    std::optional<u64> information; // normally the LBA
    constexpr u32 code() const { return static_cast<u32>(asc << 8 | ascq); }
};
/// nullopt: unknown format, or too short for its key.
std::optional<Sense> parse_sense(std::span<const u8> data);

inline constexpr u8 key_no_sense = 0x0;
inline constexpr u8 key_recovered = 0x1;
inline constexpr u8 key_not_ready = 0x2;
inline constexpr u8 key_illegal_request = 0x5;
inline constexpr u8 key_unit_attention = 0x6;
inline constexpr u8 key_data_protect = 0x7;
inline constexpr u8 key_aborted_command = 0xb;
inline constexpr u8 asc_not_ready = 0x04;             // LOGICAL UNIT NOT READY
inline constexpr u8 ascq_manual_intervention = 0x03;  // of asc_not_ready
inline constexpr u8 asc_invalid_opcode = 0x20;        // INVALID COMMAND OPERATION CODE
inline constexpr u8 asc_lba_out_of_range = 0x21;      // LOGICAL BLOCK ADDRESS OUT OF RANGE
inline constexpr u8 asc_no_unit = 0x25;               // LOGICAL UNIT NOT SUPPORTED
inline constexpr u8 asc_medium_changed = 0x28;        // NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED
inline constexpr u8 asc_parameters_changed = 0x2a;    // PARAMETERS CHANGED, CAPACITY DATA HAS CHANGED
inline constexpr u8 asc_no_medium = 0x3a;             // MEDIUM NOT PRESENT
inline constexpr u8 asc_conditions_changed = 0x3f;    // TARGET OPERATING CONDITIONS HAVE CHANGED
inline constexpr u8 ascq_inquiry_data_changed = 0x03; // of asc_conditions_changed
/// "Becoming ready", or aborted by the device: worth a retry [SPC-4 §4.5.6].
constexpr bool passes(const Sense& sense) {
    return (sense.key == key_not_ready && sense.asc == 0x04 && sense.ascq == 0x01) || sense.key == key_aborted_command;
}
std::string_view sense_key_name(u8 key);
/// Empty: not a code that disks return.
std::string_view sense_code_name(u8 asc, u8 ascq);
/// "MEDIUM ERROR, unrecovered read error (3/11/00) at LBA 1234". `lba`: the command's, used if the sense data has none.
FixedText<120> describe(const Sense& sense, std::optional<u64> lba);

// ---- command results ----

/// The transport's result for a command, separate from the unit's status: the service response [SAM-5 §5.1], with
/// failures distinguished where they are handled differently.
enum class ServiceResponse : u8 {
    command_complete, // the unit has answered: its status and sense data are valid
    busy,             // the transport or the host has no room now
    aborted,          // ended without being executed, e.g. by a reset
    no_unit,          // no unit at this address, or no longer
    failed,           // any other transport failure
};

/// The transport's own code, for log lines: "SRB status error (0x4)". Empty `field`: none.
struct TransportStatus {
    std::string_view field;
    std::string_view name;
    u32 code = 0;
};

/// Result of one command.
struct Response {
    ServiceResponse service = ServiceResponse::command_complete;
    u8 status = status_good;
    u32 moved = 0; // bytes of data transferred
    std::optional<Sense> sense;
    TransportStatus transport;
    /// Data read by Nexus::execute(); valid until its next call.
    std::span<const u8> data{};

    constexpr bool good() const { return service == ServiceResponse::command_complete && status == status_good; }
    /// A later retry of the same command may succeed.
    constexpr bool transient() const {
        return status == status_busy || status == status_task_set_full || status == status_task_aborted ||
               service == ServiceResponse::busy || (sense ? passes(*sense) : service == ServiceResponse::aborted);
    }
    constexpr bool unit_attention() const { return sense && sense->key == key_unit_attention; }
    /// There is no logical unit at this address.
    constexpr bool no_unit() const {
        return service == ServiceResponse::no_unit || (sense && sense->asc == asc_no_unit);
    }
};

} // namespace fl::drivers::scsi
