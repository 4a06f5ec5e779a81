// The storage channel's packets, which follow the VMBus packet's descriptor [storvsc]: a header, then
// operation-specific data. Little endian; the structures are naturally aligned. No I/O.
module;
#include <cstddef>
export module drivers.storvsc.protocol;
import core.std;

export namespace fl::drivers::storvsc {

/// Class GUIDs of the channels with this protocol, in the bus's notation.
inline constexpr std::string_view scsi_class = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f";
inline constexpr std::string_view ide_class = "32412632-86cb-44a2-9b5c-50d1417354f5";

/// major << 8 | minor. An answer may contain any value.
enum class Version : u16 {
    win6 = 0x0200, // Windows Server 2008
    win7 = 0x0402,
    win8 = 0x0501, // the longer SRB, sub-channels
    blue = 0x0600, // 8.1
    win10 = 0x0602,
};
/// Newest first: the order in which they are requested.
inline constexpr std::array<Version, 5> versions{Version::win10, Version::blue, Version::win8, Version::win7,
                                                 Version::win6};
constexpr std::string_view name(Version version) {
    switch (version) {
    case Version::win6: return "2.0";
    case Version::win7: return "4.2";
    case Version::win8: return "5.1";
    case Version::blue: return "6.0";
    case Version::win10: return "6.2";
    }
    return "unknown";
}

enum class Operation : u32 {
    complete_io = 1,   // host to guest: the answer to everything below
    remove_device = 2, // host to guest
    execute_srb = 3,
    reset_lun = 4,
    reset_adapter = 5,
    reset_bus = 6,
    begin_initialization = 7,
    end_initialization = 8,
    query_protocol_version = 9,
    query_properties = 10,
    enumerate_bus = 11, // host to guest, from 4.2 on: the units have changed
    fc_hba_data = 12,
    create_sub_channels = 13,
    event_notification = 14,
};
constexpr std::string_view name(Operation operation) {
    switch (operation) {
    case Operation::complete_io: return "COMPLETE_IO";
    case Operation::remove_device: return "REMOVE_DEVICE";
    case Operation::execute_srb: return "EXECUTE_SRB";
    case Operation::reset_lun: return "RESET_LUN";
    case Operation::reset_adapter: return "RESET_ADAPTER";
    case Operation::reset_bus: return "RESET_BUS";
    case Operation::begin_initialization: return "BEGIN_INITIALIZATION";
    case Operation::end_initialization: return "END_INITIALIZATION";
    case Operation::query_protocol_version: return "QUERY_PROTOCOL_VERSION";
    case Operation::query_properties: return "QUERY_PROPERTIES";
    case Operation::enumerate_bus: return "ENUMERATE_BUS";
    case Operation::fc_hba_data: return "FC_HBA_DATA";
    case Operation::create_sub_channels: return "CREATE_SUB_CHANNELS";
    case Operation::event_notification: return "EVENT_NOTIFICATION";
    }
    return "unknown operation";
}

/// PacketHeader::flags: an answer is requested.
inline constexpr u32 flag_completion = 1;

struct PacketHeader {
    Operation operation;
    u32 flags;
    u32 status; // in an answer: an NTSTATUS, 0 for success
};
static_assert(sizeof(PacketHeader) == 12 && offsetof(PacketHeader, flags) == 4 && offsetof(PacketHeader, status) == 8);

/// ScsiRequest::data_in.
enum class Direction : u8 { out = 0, in = 1, none = 2 };

/// ScsiRequest::srb_flags; from 5.1 on.
inline constexpr u32 srb_queue_action_enable = 0x02;
inline constexpr u32 srb_disable_synch_transfer = 0x08;
inline constexpr u32 srb_data_in = 0x40;
inline constexpr u32 srb_data_out = 0x80;
inline constexpr u32 srb_no_queue_freeze = 0x100; // an error does not stop commands queued after it
/// Common flags: tagged, with a tag chosen by the host; the host may reorder commands.
inline constexpr u32 srb_common_flags = srb_queue_action_enable | srb_disable_synch_transfer | srb_no_queue_freeze;
inline constexpr u8 queue_untagged = 0xff;       // queue_tag
inline constexpr u8 queue_simple_request = 0x20; // queue_action

/// ScsiRequest::srb_status: the low six bits are the status, the other two are flags.
enum class SrbStatus : u8 {
    pending = 0x00,
    success = 0x01,
    aborted = 0x02,
    error = 0x04,
    busy = 0x05,
    invalid_request = 0x06,
    no_device = 0x08,
    timeout = 0x09,
    selection_timeout = 0x0a,
    command_timeout = 0x0b,
    bus_reset = 0x0e,
    data_overrun = 0x12, // also: less data moved than requested
    request_flushed = 0x16,
    invalid_lun = 0x20,
    invalid_target_id = 0x21,
    internal_error = 0x30,
};
/// The host ended it without executing it, e.g. after a reset: worth a retry.
constexpr bool was_flushed(SrbStatus status) {
    return status == SrbStatus::bus_reset || status == SrbStatus::aborted || status == SrbStatus::request_flushed;
}
/// No unit at this address, or no longer.
constexpr bool is_no_device(SrbStatus status) {
    return status == SrbStatus::invalid_lun || status == SrbStatus::no_device || status == SrbStatus::invalid_target_id;
}
inline constexpr u8 srb_autosense_valid = 0x80;
inline constexpr u8 srb_queue_frozen = 0x40;
constexpr SrbStatus srb_status_of(u8 byte) { return static_cast<SrbStatus>(byte & 0x3f); }
constexpr std::string_view name(SrbStatus status) {
    switch (status) {
    case SrbStatus::pending: return "pending";
    case SrbStatus::success: return "success";
    case SrbStatus::aborted: return "aborted";
    case SrbStatus::error: return "error";
    case SrbStatus::busy: return "busy";
    case SrbStatus::invalid_request: return "invalid request";
    case SrbStatus::no_device: return "no device";
    case SrbStatus::timeout: return "timeout";
    case SrbStatus::selection_timeout: return "selection timeout";
    case SrbStatus::command_timeout: return "command timeout";
    case SrbStatus::bus_reset: return "bus reset";
    case SrbStatus::data_overrun: return "data overrun";
    case SrbStatus::request_flushed: return "request flushed";
    case SrbStatus::invalid_lun: return "invalid LUN";
    case SrbStatus::invalid_target_id: return "invalid target";
    case SrbStatus::internal_error: return "internal error";
    }
    return "unknown SRB status";
}

inline constexpr u32 cdb_bytes = 16;
inline constexpr u32 payload_bytes = 20;

/// A SCSI command and, in the answer, its result. Before 5.1 it ends with `payload`.
struct ScsiRequest {
    u16 length;    // of this structure: srb_bytes(version)
    u8 srb_status; // answer
    u8 scsi_status;
    u8 port_number;
    u8 path_id;
    u8 target_id;
    u8 lun;
    u8 cdb_length;
    u8 sense_info_length; // request: space for it; answer: its length
    Direction data_in;
    u8 properties;
    u32 data_transfer_length;              // bytes: to be moved; answer: moved
    std::array<u8, payload_bytes> payload; // request: the CDB; answer: sense data
    u16 reserved;
    u8 queue_tag;
    u8 queue_action;
    u32 srb_flags;
    u32 time_out_value; // seconds
    u32 queue_sort_key;
};
static_assert(sizeof(ScsiRequest) == 0x34 && offsetof(ScsiRequest, srb_status) == 2 &&
              offsetof(ScsiRequest, scsi_status) == 3 && offsetof(ScsiRequest, port_number) == 4 &&
              offsetof(ScsiRequest, path_id) == 5 && offsetof(ScsiRequest, target_id) == 6 &&
              offsetof(ScsiRequest, lun) == 7 && offsetof(ScsiRequest, cdb_length) == 8 &&
              offsetof(ScsiRequest, sense_info_length) == 9 && offsetof(ScsiRequest, data_in) == 10 &&
              offsetof(ScsiRequest, properties) == 11 && offsetof(ScsiRequest, data_transfer_length) == 12 &&
              offsetof(ScsiRequest, payload) == 16 && offsetof(ScsiRequest, reserved) == 36 &&
              offsetof(ScsiRequest, queue_tag) == 38 && offsetof(ScsiRequest, queue_action) == 39 &&
              offsetof(ScsiRequest, srb_flags) == 40 && offsetof(ScsiRequest, time_out_value) == 44 &&
              offsetof(ScsiRequest, queue_sort_key) == 48);

struct ChannelProperties {
    u32 reserved;
    u16 max_sub_channels;
    u16 reserved1;
    u32 flags;
    u32 max_transfer_bytes;
    u64 reserved2;
};
static_assert(sizeof(ChannelProperties) == 24 && offsetof(ChannelProperties, max_sub_channels) == 4 &&
              offsetof(ChannelProperties, reserved1) == 6 && offsetof(ChannelProperties, flags) == 8 &&
              offsetof(ChannelProperties, max_transfer_bytes) == 12 && offsetof(ChannelProperties, reserved2) == 16);
inline constexpr u32 properties_multi_channel = 1;

struct ProtocolVersion {
    Version version;
    u16 revision; // 0
};
static_assert(sizeof(ProtocolVersion) == 4 && offsetof(ProtocolVersion, revision) == 2);

/// The whole packet; before 5.1 the last 16 bytes are not on the wire.
struct Packet {
    PacketHeader header;
    ScsiRequest srb;
};
static_assert(sizeof(Packet) == 64 && offsetof(Packet, srb) == 12);
using PacketWords = std::array<u64, sizeof(Packet) / 8>;

/// Length of the SRB, and of the packet, on the wire, in bytes.
constexpr u32 srb_bytes(Version version) { return version >= Version::win8 ? 0x34 : 0x24; }
constexpr u32 packet_bytes(Version version) { return static_cast<u32>(sizeof(PacketHeader)) + srb_bytes(version); }
/// Space for sense data in bytes: 18 are the first part of the fixed format, 20 the whole payload.
constexpr u8 sense_bytes(Version version) { return version >= Version::win8 ? 0x14 : 0x12; }

/// The emulated IDE disk of an accelerator's channel, from the instance GUID's text ("00000001-0000-8899-…": path,
/// then target). nullopt: not a GUID, or not an IDE disk.
struct IdePath {
    u8 path = 0;   // 0 primary, 1 secondary
    u8 target = 0; // 0 master, 1 slave
    constexpr u32 disk_number() const { return path * 2u + target; }
};
constexpr std::optional<IdePath> ide_path(std::string_view instance) {
    const auto hex = [&](usize at, usize count) -> std::optional<u32> {
        u32 value = 0;
        for (usize i = at; i < at + count; ++i) {
            const char c = i < instance.size() ? instance[i] : ' ';
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) {
                return std::nullopt;
            }
            value = value << 4 | static_cast<u32>(digit);
        }
        return value;
    };
    const auto path = hex(0, 8);
    const auto target = hex(9, 4);
    if (!path || !target || instance[8] != '-' || *path > 1 || *target > 1) {
        return std::nullopt;
    }
    return IdePath{static_cast<u8>(*path), static_cast<u8>(*target)};
}

/// Terms negotiated with the host; common to all channels of a controller.
struct Terms {
    Version version = Version::win6; // before negotiation: the shorter packets, accepted by every host
    u32 max_transfer = 128 * 1024;   // bytes per command, a multiple of 4096
};

} // namespace fl::drivers::storvsc
