// PVSCSI wire formats: registers, commands of the adapter, rings state, descriptors, host status [pvscsi]. Little
// endian. No I/O.
export module drivers.pvscsi.protocol;
import core.std;
import core.dma;
import core.registers;
import core.result;
import core.text;
export import drivers.scsi.protocol;

export namespace fl::drivers::pvscsi {

// ---- registers, relative to the memory BAR ----

inline constexpr u64 register_bytes = 8 * 4096;
inline constexpr u64 command_register = 0x0000;
inline constexpr u64 command_data_register = 0x0004;
inline constexpr u64 command_status_register = 0x0008;
inline constexpr u64 kick_non_rw_io_register = 0x3014;
inline constexpr u64 kick_rw_io_register = 0x4018;
/// Written as read to clear. With messages it need not be cleared.
struct InterruptStatus : Register<InterruptStatus, u32> {
    static constexpr u64 offset = 0x100c;
    static constexpr Field<3, 2, Attribute::write_1_to_clear> msg{};
    static constexpr Field<1, 0, Attribute::write_1_to_clear> cmpl{};
    static constexpr auto layout = fields(msg, cmpl);
    static constexpr u32 known = msg.mask | cmpl.mask;
    constexpr bool absent() const { return raw == ~u32{0}; }
};
/// The same bits; 1 enables the interrupt.
struct InterruptMask : Register<InterruptMask, u32> {
    static constexpr u64 offset = 0x2010;
    static constexpr Field<3, 2> msg{};
    static constexpr Field<1, 0> cmpl{};
    static constexpr auto layout = fields(msg, cmpl);
};

// ---- commands of the adapter ----

/// The number goes to the command register, the descriptor in dwords to the command data register.
enum class AdapterCommand : u32 {
    adapter_reset = 1,
    setup_rings = 3,
    reset_bus = 4,
    reset_device = 5,
    abort_cmd = 6,
    config = 7,
    setup_msg_ring = 8,
    setup_reqcallthreshold = 10,
};
constexpr std::string_view name(AdapterCommand command) {
    switch (command) {
    case AdapterCommand::adapter_reset: return "ADAPTER_RESET";
    case AdapterCommand::setup_rings: return "SETUP_RINGS";
    case AdapterCommand::reset_bus: return "RESET_BUS";
    case AdapterCommand::reset_device: return "RESET_DEVICE";
    case AdapterCommand::abort_cmd: return "ABORT_CMD";
    case AdapterCommand::config: return "CONFIG";
    case AdapterCommand::setup_msg_ring: return "SETUP_MSG_RING";
    case AdapterCommand::setup_reqcallthreshold: return "SETUP_REQCALLTHRESHOLD";
    default: return "unknown command";
    }
}
/// The command status register: unknown or failed, and data outstanding. Other values are success: 0, or the number
/// of dwords of the descriptor.
inline constexpr u32 status_failed = ~u32{0};
inline constexpr u32 status_not_enough_data = ~u32{1};

struct SetupRings {
    static constexpr u32 max_pages = 32;
    u32 request_pages = 0; // powers of two
    u32 completion_pages = 0;
    u64 state_page = 0; // page numbers
    std::array<u64, max_pages> request_page{};
    std::array<u64, max_pages> completion_page{};
};
static_assert(sizeof(SetupRings) == 528 && __builtin_offsetof(SetupRings, request_page) == 16 &&
              __builtin_offsetof(SetupRings, completion_page) == 272);
struct SetupMessageRing {
    static constexpr u32 max_pages = 16;
    u32 pages = 0; // a power of two
    u32 reserved = 0;
    std::array<u64, max_pages> page{};
};
static_assert(sizeof(SetupMessageRing) == 136 && __builtin_offsetof(SetupMessageRing, page) == 8);
struct ResetDevice {
    u32 target = 0;
    std::array<u8, 8> lun{};
};
static_assert(sizeof(ResetDevice) == 12);
struct AbortCommand {
    u64 context = 0;
    u32 target = 0;
    u32 reserved = 0;
};
static_assert(sizeof(AbortCommand) == 16 && __builtin_offsetof(AbortCommand, target) == 8);
struct Config {
    u64 completion_address = 0; // where the page is stored
    u64 page_address = 0;
    u32 page_number = 0;
    u32 reserved = 0;
};
static_assert(sizeof(Config) == 24 && __builtin_offsetof(Config, page_number) == 16);

/// The configuration page of the controller, as far as it is used.
inline constexpr u32 config_page_controller = 0x1958;
inline constexpr u64 config_controller_address = u64{0x2120} << 32;
inline constexpr u32 config_host_status_at = 6; // u16; SCSI status at 8
inline constexpr u32 config_scsi_status_at = 8;
inline constexpr u32 config_targets_at = 472; // u32
inline constexpr u32 config_bytes = 476;
inline constexpr u32 default_targets = 16;
inline constexpr u32 max_targets = 65;
/// The number of targets from the page that the adapter has stored; default_targets: it has not, or it is impossible.
u32 targets_of(std::span<const std::byte, config_bytes> page);

/// Page counts of the rings: a power of two, 1 to `most`.
constexpr bool valid_pages(u32 pages, u32 most) { return std::has_single_bit(pages) && pages <= most; }

// ---- rings ----

/// Offsets in the rings state page.
struct RingsState {
    static constexpr usize request_producer = 0;
    static constexpr usize request_consumer = 4;
    static constexpr usize request_log2 = 8;
    static constexpr usize completion_producer = 12;
    static constexpr usize completion_consumer = 16;
    static constexpr usize completion_log2 = 20;
    static constexpr usize request_call_threshold = 24;
    static constexpr usize message_producer = 128;
    static constexpr usize message_consumer = 132;
    static constexpr usize message_log2 = 136;
};

inline constexpr u32 flag_sg_list = 1 << 0;
inline constexpr u32 flag_dir_none = 1 << 2;
inline constexpr u32 flag_dir_to_host = 1 << 3;
inline constexpr u32 flag_dir_to_device = 1 << 4;
inline constexpr u8 simple_queue_tag = 0x20;

struct RequestDescriptor {
    static constexpr u32 stride = 128; // bytes in the ring; those after `used` are 0
    u64 context = 0;                   // not 0, upper 32 bits 0
    u64 data_address = 0;
    u64 data_length = 0;
    u64 sense_address = 0;
    u32 sense_length = 0;
    u32 flags = 0;
    std::array<u8, scsi::cdb_bytes> cdb{};
    u8 cdb_length = 0;
    std::array<u8, 8> lun{};
    u8 tag = 0;
    u8 bus = 0;
    u8 target = 0;
    u8 vcpu_hint = 0;
    std::array<u8, 3> reserved{};
};
static_assert(sizeof(RequestDescriptor) == 72 && __builtin_offsetof(RequestDescriptor, sense_length) == 32 &&
              __builtin_offsetof(RequestDescriptor, cdb) == 40 &&
              __builtin_offsetof(RequestDescriptor, cdb_length) == 56 &&
              __builtin_offsetof(RequestDescriptor, lun) == 57 && __builtin_offsetof(RequestDescriptor, tag) == 65 &&
              __builtin_offsetof(RequestDescriptor, target) == 67 &&
              __builtin_offsetof(RequestDescriptor, vcpu_hint) == 68);

struct SgElement {
    u64 address = 0;
    u32 length = 0;
    u32 flags = 0;
};
static_assert(sizeof(SgElement) == 16 && __builtin_offsetof(SgElement, length) == 8);
/// The longest element. Linux's drivers send no longer one.
inline constexpr u32 sg_element_bytes = 64 * 1024;

struct CompletionDescriptor {
    u64 context = 0;
    u64 data_length = 0; // may be 0 although data was moved
    u32 sense_length = 0;
    u16 host_status = 0;
    u16 scsi_status = 0;
    u64 reserved = 0;
};
static_assert(sizeof(CompletionDescriptor) == 32 && __builtin_offsetof(CompletionDescriptor, host_status) == 20 &&
              __builtin_offsetof(CompletionDescriptor, scsi_status) == 22);

enum class MessageType : u32 { device_added = 0, device_removed = 1 };
struct MessageDescriptor {
    MessageType type{};
    u32 bus = 0;
    u32 target = 0;
    std::array<u8, 8> lun{};
    std::array<u32, 27> reserved{};
};
static_assert(sizeof(MessageDescriptor) == 128 && __builtin_offsetof(MessageDescriptor, lun) == 12);

// ---- host status ----

enum class HostStatus : u16 {
    success = 0x00,
    linked_complete = 0x0a,
    linked_complete_with_flag = 0x0b,
    data_underrun = 0x0c,
    selection_timeout = 0x11,
    data_run = 0x12,
    bus_free = 0x13,
    invalid_phase = 0x14,
    lun_mismatch = 0x17,
    invalid_parameter = 0x1a,
    sense_failed = 0x1b,
    tag_reject = 0x1c,
    bad_message = 0x1d,
    hardware = 0x20,
    no_response = 0x21,
    sent_reset = 0x22,
    received_reset = 0x23,
    disconnect = 0x24,
    bus_reset = 0x25,
    abort_queue = 0x26,
    software = 0x27,
    timeout = 0x30,
    scsi_parity = 0x34,
};
std::string_view name(HostStatus status);
scsi::ServiceResponse service_of(HostStatus status);
/// Bytes that were moved, of `requested`. Adapters report a shorter transfer by data_underrun or data_run, or by
/// success with data_length; a successful one may have data_length 0.
constexpr u32 moved_of(const CompletionDescriptor& completion, u32 requested) {
    const auto status = static_cast<HostStatus>(completion.host_status);
    const bool exact =
        completion.data_length != 0 || status == HostStatus::data_underrun || status == HostStatus::data_run;
    return exact ? static_cast<u32>(completion.data_length) : requested;
}
/// Without sense data.
scsi::Response response_of(const CompletionDescriptor& completion, u32 requested);

} // namespace fl::drivers::pvscsi
