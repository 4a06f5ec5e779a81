// NVMe's registers, commands, completions and identify data [nvme-1.4]. The controller is not trusted: what it returns
// is parsed and checked here.
export module drivers.nvme.protocol;
import core.std;
import core.result;
import core.registers;
import core.text;

export namespace fl::drivers::nvme {

// ---- registers [nvme-1.4 §3.1] ----

struct Capabilities : Register<Capabilities, u64> {
    static constexpr u64 offset = 0x00;
    static constexpr Field<55, 52, Attribute::read_only> mpsmax{}; // largest page: 2^(12 + mpsmax) bytes
    static constexpr Field<51, 48, Attribute::read_only> mpsmin{};
    static constexpr Field<44, 37, Attribute::read_only> css{};   // bit 0: NVM command set
    static constexpr Field<35, 32, Attribute::read_only> dstrd{}; // doorbell stride: 4 << dstrd bytes
    static constexpr Field<31, 24, Attribute::read_only> to{};    // bound of CSTS.RDY, in 500 ms
    static constexpr Field<15, 0, Attribute::read_only> mqes{};   // largest queue, 0's based
    static constexpr auto layout = fields(mpsmax, mpsmin, css, dstrd, to, mqes);
};
struct Version : Register<Version, u32> {
    static constexpr u64 offset = 0x08;
    static constexpr Field<31, 16, Attribute::read_only> major{};
    static constexpr Field<15, 8, Attribute::read_only> minor{};
    static constexpr auto layout = fields(major, minor);
};
inline constexpr u64 interrupt_mask_set = 0x0c;   // INTMS: not to be used with MSI-X
inline constexpr u64 interrupt_mask_clear = 0x10; // INTMC
struct Configuration : Register<Configuration, u32> {
    static constexpr u64 offset = 0x14;
    static constexpr Field<23, 20> iocqes{}; // log2 of the completion entry's bytes
    static constexpr Field<19, 16> iosqes{}; // log2 of the command's bytes
    static constexpr Field<15, 14> shn{};    // shutdown notification
    static constexpr Field<13, 11> ams{};
    static constexpr Field<10, 7> mps{};
    static constexpr Field<6, 4> css{};
    static constexpr Bit<0> en{};
    static constexpr auto layout = fields(iocqes, iosqes, shn, ams, mps, css, en);
};
struct ControllerStatus : Register<ControllerStatus, u32> {
    static constexpr u64 offset = 0x1c;
    static constexpr Bit<1, Attribute::read_only> cfs{}; // fatal
    static constexpr Bit<0, Attribute::read_only> rdy{};
    static constexpr auto layout = fields(cfs, rdy);
    bool absent() const { return raw == ~u32{0}; }
};
inline constexpr u64 admin_queue_attributes = 0x24; // AQA: ACQS in bits 27:16, ASQS in 11:0, 0's based
inline constexpr u64 admin_submission_base = 0x28;  // ASQ
inline constexpr u64 admin_completion_base = 0x30;  // ACQ
inline constexpr u64 doorbells = 0x1000;

/// Offset in bytes of a doorbell from the first one, also in the shadow doorbell buffer [nvme-1.4 §3.1.24, §B.5].
constexpr u32 doorbell_offset(u16 queue, bool completion, u32 stride) {
    return (2u * queue + (completion ? 1 : 0)) * (4u << stride);
}

// ---- commands [nvme-1.4 §4.2] ----

enum class AdminOpcode : u8 {
    create_submission_queue = 0x01,
    get_log_page = 0x02,
    create_completion_queue = 0x05,
    identify = 0x06,
    abort = 0x08,
    set_features = 0x09,
    asynchronous_event_request = 0x0c,
    doorbell_buffer_config = 0x7c,
};
enum class Opcode : u8 { flush = 0x00, write = 0x01, read = 0x02, write_zeroes = 0x08, dataset_management = 0x09 };

struct Submission {
    u8 opcode = 0;
    u8 flags = 0; // PRPs, not fused
    u16 cid = 0;
    u32 nsid = 0;
    u64 reserved = 0;
    u64 mptr = 0;
    u64 prp1 = 0;
    u64 prp2 = 0;
    u32 cdw10 = 0;
    u32 cdw11 = 0;
    u32 cdw12 = 0;
    u32 cdw13 = 0;
    u32 cdw14 = 0;
    u32 cdw15 = 0;
};
static_assert(sizeof(Submission) == 64 && __builtin_offsetof(Submission, prp1) == 24 &&
              __builtin_offsetof(Submission, cdw10) == 40);

struct CompletionEntry {
    u32 dw0 = 0;
    u32 reserved = 0;
    u16 sq_head = 0;
    u16 sq_id = 0;
    u16 cid = 0;
    u16 status = 0; // bit 0: phase, 8:1 SC, 11:9 SCT, 13:12 CRD, 14 More, 15 DNR
};
static_assert(sizeof(CompletionEntry) == 16 && __builtin_offsetof(CompletionEntry, status) == 14);
inline constexpr usize phase_offset = __builtin_offsetof(CompletionEntry, status);

/// The status field without the phase: SCT in bits 10:8, SC in 7:0.
constexpr u16 status_code(u16 status) { return status >> 1 & 0x7ff; }
constexpr bool do_not_retry(u16 status) { return (status & 0x8000) != 0; }
/// CRD: the command is to be sent again after this one of the retry delays, counted from 1; 0: at once.
constexpr u32 retry_delay(u16 status) { return status >> 12 & 3; }
inline constexpr u16 invalid_opcode = 0x001;
inline constexpr u16 invalid_field = 0x002;
inline constexpr u16 abort_requested = 0x007;
inline constexpr u16 abort_queue_deleted = 0x008;
inline constexpr u16 invalid_namespace = 0x00b;
inline constexpr u16 write_protected = 0x020;
inline constexpr u16 lba_out_of_range = 0x080;
inline constexpr u16 read_only_range = 0x182;
inline constexpr u16 media_errors = 0x200; // SCT 2

/// Dataset Management's range [nvme-1.4 §6.7].
struct DatasetRange {
    u32 attributes = 0;
    u32 blocks = 0;
    u64 lba = 0;
};
static_assert(sizeof(DatasetRange) == 16);
inline constexpr u32 deallocate = 1 << 2; // AD, in cdw11

inline constexpr u32 identify_bytes = 4096;
inline constexpr u32 cns_namespace = 0;
inline constexpr u32 cns_controller = 1;
inline constexpr u32 cns_active_namespaces = 2;
inline constexpr u32 cns_namespace_descriptors = 3;   // since version 1.3
inline constexpr u32 cns_allocated_namespaces = 0x10; // also those that are not attached to the controller
inline constexpr u32 cns_allocated_namespace = 0x11;
inline constexpr u16 status_invalid_command_set = 0x12c; // Invalid I/O Command Set [nvme-base-2.0 figure 98]
inline constexpr u32 cns_command_set = 6;                // limits of the NVM command set; CSI 0 [nvme-nvm-1.0 §4.1.5.2]
inline constexpr u32 feature_write_cache = 0x06;
inline constexpr u32 feature_number_of_queues = 0x07;
inline constexpr u32 feature_asynchronous_events = 0x0b;
inline constexpr u32 feature_host_behavior = 0x16;

// Asynchronous events [nvme-1.4 §5.2].
struct Event {
    u8 type = 0;
    u8 information = 0;
    u8 log_page = 0;
};
constexpr Event event_of(u32 dw0) {
    return {static_cast<u8>(dw0 & 7), static_cast<u8>(dw0 >> 8), static_cast<u8>(dw0 >> 16)};
}
inline constexpr u8 event_error = 0;
inline constexpr u8 event_health = 1;
inline constexpr u8 event_notice = 2;
inline constexpr u8 log_errors = 1;
inline constexpr u8 log_health = 2;
inline constexpr u8 log_changed_namespaces = 4;

// ---- admin commands, without their ids [nvme-1.4 §5] ----

constexpr Submission identify_command(u32 cns, u32 nsid, u64 into) {
    return {.opcode = to_underlying(AdminOpcode::identify), .nsid = nsid, .prp1 = into, .cdw10 = cns};
}
/// Clears the page's event: RAE 0. `bytes`: a multiple of 4, at most a page.
constexpr Submission log_page_command(u8 page, u32 bytes, u64 into) {
    return {.opcode = to_underlying(AdminOpcode::get_log_page),
            .nsid = ~u32{0},
            .prp1 = into,
            .cdw10 = (bytes / 4 - 1) << 16 | page};
}
constexpr Submission set_feature_command(u32 feature, u32 value) {
    return {.opcode = to_underlying(AdminOpcode::set_features), .cdw10 = feature, .cdw11 = value};
}
/// Of the feature Host Behavior Support [nvme-1.4 §5.21.1.22]: ACRE in byte 0, the rest 0.
inline constexpr u32 host_behavior_bytes = 512;
constexpr Submission host_behavior_command(u64 from) {
    return {.opcode = to_underlying(AdminOpcode::set_features), .prp1 = from, .cdw10 = feature_host_behavior};
}
/// `entries`, at least 2, at `base`; contiguous, with interrupts.
constexpr Submission create_completion_queue_command(u16 id, u32 entries, u64 base, u32 vector) {
    return {.opcode = to_underlying(AdminOpcode::create_completion_queue),
            .prp1 = base,
            .cdw10 = (entries - 1) << 16 | id,
            .cdw11 = vector << 16 | 2 | 1};
}
/// Its completions go to the completion queue of the same id; contiguous.
constexpr Submission create_submission_queue_command(u16 id, u32 entries, u64 base) {
    return {.opcode = to_underlying(AdminOpcode::create_submission_queue),
            .prp1 = base,
            .cdw10 = (entries - 1) << 16 | id,
            .cdw11 = u32{id} << 16 | 1};
}
constexpr Submission doorbell_buffer_command(u64 shadow, u64 events) {
    return {.opcode = to_underlying(AdminOpcode::doorbell_buffer_config), .prp1 = shadow, .prp2 = events};
}
constexpr Submission abort_command(u16 queue, u16 cid) {
    return {.opcode = to_underlying(AdminOpcode::abort), .cdw10 = u32{cid} << 16 | queue};
}
inline constexpr u32 not_aborted = 1; // in an Abort's dw0
constexpr Submission event_request_command() {
    return {.opcode = to_underlying(AdminOpcode::asynchronous_event_request)};
}

// ---- identify data ----

using IdentifyData = std::array<u8, identify_bytes>;

/// CRDT1 to CRDT3, in units of retry_delay_unit; 0: none.
using RetryDelays = std::array<u16, 3>;
inline constexpr u64 retry_delay_unit = 100'000'000; // nanoseconds

/// From Identify Controller [nvme-1.4 figure 247].
struct ControllerInfo {
    FixedText<48> serial;
    FixedText<48> model;
    FixedText<16> firmware;
    RetryDelays retry_delays{};
    u8 mdts = 0; // 2^mdts pages of the smallest size; 0: no limit
    u32 namespaces = 0;
    bool doorbell_buffers = false;
    bool dataset_management = false;
    bool write_zeroes = false;
    bool write_cache = false;
    bool queue_entries = false; // commands of 64 and completions of 16 bytes are possible
};
ControllerInfo parse_controller(std::span<const u8, identify_bytes> data);

/// From Identify Controller of the NVM command set. 0: no limit.
struct CommandSetLimits {
    u8 zeroes = 0;          // WZSL: 2^n pages of the smallest size
    u32 discard_blocks = 0; // DMRSL: of a range
    u64 discard_total = 0;  // DMSL: of a command
};
CommandSetLimits parse_command_set(std::span<const u8, identify_bytes> data);

/// What tells a namespace from others, wherever it is attached [nvme-1.4 §7.10, §7.11]; all 0: it has none of these.
struct NamespaceIdentity {
    std::array<u8, 8> eui64{};
    std::array<u8, 16> nguid{};
    std::array<u8, 16> uuid{}; // only a descriptor has it
    friend constexpr bool operator==(const NamespaceIdentity&, const NamespaceIdentity&) = default;
};
/// "NGUID 0123…, UUID 4567…", or "no identifier".
FixedText<128> text_of(const NamespaceIdentity& identity);
/// Adds what a Namespace Identification Descriptor list has [nvme-1.4 figure 246]. Unknown descriptors are skipped. One
/// that does not fit, or has another length than its type, ends the list: what follows cannot be located.
/// Returns the namespace's I/O command set; 0, which is NVM's: it has no descriptor of one [nvme-base-2.0 figure 277].
u8 parse_descriptors(std::span<const u8, identify_bytes> data, NamespaceIdentity& identity);

/// From Identify Namespace [nvme-1.4 figure 245]. Error{not_supported}: a format that this driver does not use.
/// `blocks` 0: the namespace is inactive or empty.
struct NamespaceInfo {
    u64 blocks = 0;
    u32 block_size = 0;
    bool write_protected = false;
    NamespaceIdentity identity; // without what only a descriptor has
};
Result<NamespaceInfo> parse_namespace(std::span<const u8, identify_bytes> data);

/// The next active namespace of a list; nullopt: its end. Ids ascend and are not 0 [nvme-1.4 §5.15.2.3].
/// `after`: the previous one. Error{protocol}: they do not ascend.
Result<u32> next_namespace(std::span<const u8, identify_bytes> list, u32 index, u32 after);

} // namespace fl::drivers::nvme
