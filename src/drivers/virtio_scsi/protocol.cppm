// The virtio SCSI host device on the wire [virtio-1.2 §5.6].
module;
#include <cstddef>
export module drivers.virtio_scsi.protocol;
import core.std;
import drivers.scsi.protocol;
import drivers.virtio.protocol;

export namespace fl::drivers::virtio_scsi {

/// Feature bits [virtio-1.2 §5.6.3].
inline constexpr u64 feature_hotplug = virtio::feature(1);
inline constexpr u64 feature_change = virtio::feature(2);
inline constexpr std::array<virtio::FeatureName, 4> feature_names{{
    {0, "INOUT"},
    {1, "HOTPLUG"},
    {2, "CHANGE"},
    {3, "T10_PI"},
}};

/// Virtqueues [virtio-1.2 §5.6.2].
inline constexpr u16 control_queue = 0;
inline constexpr u16 event_queue = 1;
inline constexpr u16 first_request_queue = 2;

/// Offsets in the configuration space, in bytes [virtio-1.2 §5.6.4].
namespace config {
inline constexpr u64 queue_count = 0;      // 32 bits: request queues
inline constexpr u64 seg_max = 4;          // 32
inline constexpr u64 max_sectors = 8;      // 32, in units of 512 bytes
inline constexpr u64 cmd_per_lun = 12;     // 32
inline constexpr u64 event_info_size = 16; // 32, bytes
inline constexpr u64 sense_size = 20;      // 32, bytes
inline constexpr u64 cdb_size = 24;        // 32, bytes
inline constexpr u64 max_target = 30;      // 16
inline constexpr u64 max_lun = 32;         // 32
} // namespace config

/// Values after a reset, and the largest ones that this driver has room for.
inline constexpr u32 default_sense_bytes = 96;
inline constexpr u32 default_cdb_bytes = 32;
/// The largest target number that an address can hold.
inline constexpr u32 last_target = 255;
/// The largest LUN of the flat space addressing format [SAM-5 §4.7.5].
inline constexpr u32 last_lun = 0x3fff;

/// A logical unit on the wire [virtio-1.2 §5.6.6.1]: 1, the target, then a single-level LUN.
using Address = std::array<u8, 8>;
constexpr Address address_of(u8 target, u16 lun) {
    return {1, target, static_cast<u8>(0x40 | lun >> 8), static_cast<u8>(lun), 0, 0, 0, 0};
}
/// A unit named by the device. nullopt: not an address of this format.
struct UnitNumber {
    u8 target = 0;
    u16 lun = 0;
};
constexpr std::optional<UnitNumber> unit_of(const Address& address) {
    const bool flat = address[2] == 0 || address[2] >> 6 == 1;
    if (address[0] != 1 || !flat || !std::ranges::all_of(std::span(address).subspan(4), [](u8 b) { return b == 0; })) {
        return std::nullopt;
    }
    return UnitNumber{address[1], static_cast<u16>((address[2] & 0x3f) << 8 | address[3])};
}

/// The device-readable part of a request, before the data [virtio-1.2 §5.6.6.1]. cdb_size bytes of `cdb` are on the
/// wire, hence header_bytes().
struct RequestHeader {
    Address lun{};
    u64 id = 0;
    u8 task_attribute = 0; // SIMPLE
    u8 priority = 0;
    u8 crn = 0;
    std::array<u8, default_cdb_bytes> cdb{};
};
static_assert(offsetof(RequestHeader, id) == 8 && offsetof(RequestHeader, task_attribute) == 16 &&
              offsetof(RequestHeader, crn) == 18 && offsetof(RequestHeader, cdb) == 19);
constexpr u32 header_bytes(u32 cdb_size) { return static_cast<u32>(offsetof(RequestHeader, cdb)) + cdb_size; }

/// Request::response, also of task management functions.
enum class ResponseCode : u8 {
    ok = 0, // also: the function is complete
    overrun = 1,
    aborted = 2,
    bad_target = 3,
    reset = 4,
    busy = 5,
    transport_failure = 6,
    target_failure = 7,
    nexus_failure = 8,
    failure = 9,
    function_succeeded = 10,
    function_rejected = 11,
    incorrect_lun = 12,
};
inline constexpr u8 response_unwritten = 0xff; // ours: the device has returned the request without a response
constexpr std::string_view name(ResponseCode code) {
    constexpr std::array<std::string_view, 13> names{"OK",
                                                     "OVERRUN",
                                                     "ABORTED",
                                                     "BAD_TARGET",
                                                     "RESET",
                                                     "BUSY",
                                                     "TRANSPORT_FAILURE",
                                                     "TARGET_FAILURE",
                                                     "NEXUS_FAILURE",
                                                     "FAILURE",
                                                     "FUNCTION_SUCCEEDED",
                                                     "FUNCTION_REJECTED",
                                                     "INCORRECT_LUN"};
    return static_cast<u8>(code) < names.size() ? names[static_cast<u8>(code)] : "unknown response";
}
/// nullopt: not a code that the specification defines for a command.
constexpr std::optional<scsi::ServiceResponse> service_of(u8 response) {
    switch (static_cast<ResponseCode>(response)) {
    case ResponseCode::ok: return scsi::ServiceResponse::command_complete;
    case ResponseCode::aborted:
    case ResponseCode::reset: return scsi::ServiceResponse::aborted;
    case ResponseCode::bad_target:
    case ResponseCode::incorrect_lun: return scsi::ServiceResponse::no_unit;
    case ResponseCode::busy: return scsi::ServiceResponse::busy;
    case ResponseCode::overrun:
    case ResponseCode::transport_failure:
    case ResponseCode::target_failure:
    case ResponseCode::nexus_failure:
    case ResponseCode::failure: return scsi::ServiceResponse::failed;
    default: return std::nullopt;
    }
}

/// The device-writable part of a request, before the data. sense_size bytes of `sense` are on the wire.
struct RequestResponse {
    u32 sense_length = 0;
    u32 residual = 0; // bytes of data not moved
    u16 status_qualifier = 0;
    u8 status = 0;
    u8 response = response_unwritten;
    std::array<u8, default_sense_bytes> sense{};
};
static_assert(sizeof(RequestResponse) == 108 && offsetof(RequestResponse, residual) == 4 &&
              offsetof(RequestResponse, status) == 10 && offsetof(RequestResponse, response) == 11 &&
              offsetof(RequestResponse, sense) == 12);
constexpr u32 response_bytes(u32 sense_size) { return static_cast<u32>(offsetof(RequestResponse, sense)) + sense_size; }

/// A task management function on the control queue [virtio-1.2 §5.6.6.2]; its answer is one ResponseCode.
inline constexpr u32 control_tmf = 0;
inline constexpr u32 tmf_logical_unit_reset = 5;
struct TaskManagement {
    u32 type = control_tmf;
    u32 subtype = tmf_logical_unit_reset;
    Address lun{};
    u64 id = 0; // of ABORT TASK and QUERY TASK
};
static_assert(sizeof(TaskManagement) == 24 && offsetof(TaskManagement, lun) == 8 && offsetof(TaskManagement, id) == 16);

/// Events [virtio-1.2 §5.6.6.3].
struct Event {
    u32 event = 0;
    Address lun{};
    u32 reason = 0;
};
static_assert(sizeof(Event) == 16 && offsetof(Event, lun) == 4 && offsetof(Event, reason) == 12);
inline constexpr u32 events_missed = 0x8000'0000; // a flag in Event::event
enum class EventType : u32 { none = 0, transport_reset = 1, async_notify = 2, param_change = 3 };
/// Event::reason of transport_reset.
inline constexpr u32 reset_hard = 0;
inline constexpr u32 reset_rescan = 1;
inline constexpr u32 reset_removed = 2;

} // namespace fl::drivers::virtio_scsi
