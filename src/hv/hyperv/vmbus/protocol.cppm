// VMBus messages between guest and host: types, sizes and field offsets. Structures and constants only. Values written
// by the host are open enums: unknown values are representable, and the reader must handle them. Little endian.
// [vmbus-protocol]
module;
#include <cstddef>
export module hv.hyperv.vmbus.protocol;
import core.std;
import core.text;

export namespace fl::hv::hyperv {

// ---- names ----

/// A GUID in memory format: the first three parts little endian, the last eight bytes in order.
struct Guid {
    std::array<u8, 16> bytes{};

    /// Parses "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", in either case; nothing for any other text.
    static constexpr std::optional<Guid> parse(std::string_view text);
    /// The same format, in lower case.
    constexpr FixedText<36> text() const;
    constexpr bool is_null() const { return *this == Guid{}; }
    friend constexpr bool operator==(const Guid&, const Guid&) = default;
};
static_assert(sizeof(Guid) == 16);

namespace guid_detail {
/// The position in memory of byte i in text order.
inline constexpr std::array<u8, 16> order{3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr bool dash_before(usize byte) { return byte == 4 || byte == 6 || byte == 8 || byte == 10; }
constexpr int digit(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}
} // namespace guid_detail

constexpr std::optional<Guid> Guid::parse(std::string_view text) {
    Guid result;
    if (text.size() != 36) {
        return std::nullopt;
    }
    usize at = 0;
    for (usize i = 0; i < 16; ++i) {
        if (guid_detail::dash_before(i) && text[at++] != '-') {
            return std::nullopt;
        }
        const int high = guid_detail::digit(text[at]);
        const int low = guid_detail::digit(text[at + 1]);
        if (high < 0 || low < 0) {
            return std::nullopt;
        }
        result.bytes[guid_detail::order[i]] = static_cast<u8>(high << 4 | low);
        at += 2;
    }
    return result;
}

constexpr FixedText<36> Guid::text() const {
    constexpr std::string_view digits = "0123456789abcdef";
    FixedText<36> result;
    for (usize i = 0; i < 16; ++i) {
        if (guid_detail::dash_before(i)) {
            result.write("-");
        }
        const u8 byte = bytes[guid_detail::order[i]];
        result.write(digits.substr(byte >> 4, 1));
        result.write(digits.substr(byte & 0xf, 1));
    }
    return result;
}

/// Device classes used by drivers [vmbus-protocol, class ids in Linux's include/linux/hyperv.h].
namespace classes {
inline constexpr std::string_view scsi = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f";
inline constexpr std::string_view ide = "32412632-86cb-44a2-9b5c-50d1417354f5";
inline constexpr std::string_view shutdown = "0e0b6031-5213-4934-818b-38d90ced39db";
inline constexpr std::string_view time_sync = "9527e630-d0ae-497b-adce-e80ab0175caf";
inline constexpr std::string_view heartbeat = "57164f39-9115-4e78-ab55-382f3bd5422d";
inline constexpr std::string_view dynamic_memory = "525074dc-8985-46e2-8057-a307dc18a502";
} // namespace classes

// ---- versions ----

/// major << 16 | minor
enum class Version : u32 {
    none = 0,
    v0_13 = 0x0000000d, // Windows Server 2008
    v1_1 = 0x00010001,  // Windows Server 2008 R2
    v2_4 = 0x00020004,  // Windows Server 2012: event flags are raised on the channel's own processor
    v3_0 = 0x00030000,
    v4_0 = 0x00040000,
    v4_1 = 0x00040001, // a channel's target processor can be changed
    v5_0 = 0x00050000, // first contact through connection 4; the response names the connection to use afterwards
    v5_1 = 0x00050001,
    v5_2 = 0x00050002,
    v5_3 = 0x00050003, // a change of processor is confirmed
};
/// Newest first: the order of negotiation.
inline constexpr std::array<Version, 10> versions{Version::v5_3, Version::v5_2, Version::v5_1, Version::v5_0,
                                                  Version::v4_1, Version::v4_0, Version::v3_0, Version::v2_4,
                                                  Version::v1_1, Version::v0_13};

// ---- hypervisor connection ids ----

inline constexpr u32 message_connection = 1; // messages, before version 5.0
// versions 0.13 and 1.1: signals for channels without a connection of their own
inline constexpr u32 event_connection = 2;
inline constexpr u32 message_connection_5_0 = 4; // the first contact, from 5.0 on
inline constexpr u32 channel_message = 1;        // type of the hypervisor message that carries VMBus messages
inline constexpr usize max_message = 240;        // bytes per message [hv-tlfs §11.8.1]
inline constexpr u32 vmbus_sint = 2;

// ---- messages ----

enum class MessageType : u32 {
    invalid = 0,
    offer_channel = 1,
    rescind_channel_offer = 2,
    request_offers = 3,
    all_offers_delivered = 4,
    open_channel = 5,
    open_channel_result = 6,
    close_channel = 7,
    gpadl_header = 8,
    gpadl_body = 9,
    gpadl_created = 10,
    gpadl_teardown = 11,
    gpadl_torndown = 12,
    relid_released = 13,
    initiate_contact = 14,
    version_response = 15,
    unload = 16,
    unload_response = 17,
    open_reserved_channel = 18,
    close_reserved_channel = 19,
    close_reserved_response = 20,
    tl_connect_request = 21,
    modify_channel = 22,
    tl_connect_result = 23,
    modify_channel_response = 24,
    modify_connection = 25,
    modify_connection_response = 26,
};

/// Status codes are the host's; 0 is success.
enum class HostStatus : u32 { success = 0 };

struct MessageHeader {
    MessageType type = MessageType::invalid;
    u32 padding = 0;
};
static_assert(sizeof(MessageHeader) == 8 && offsetof(MessageHeader, padding) == 4);

struct OfferChannel {
    static constexpr MessageType type = MessageType::offer_channel;
    MessageHeader header{type};
    Guid interface_type;
    Guid instance;
    std::array<u32, 4> reserved0{};
    u16 flags = 0;
    u16 mmio_megabytes = 0;
    std::array<u8, 120> user_defined{};
    u16 sub_channel_index = 0; // 0: the device's primary channel
    u16 reserved2 = 0;
    u32 relid = 0;
    u8 monitor_id = 0;
    u8 monitor_allocated = 0;    // bit 0
    u16 dedicated_interrupt = 0; // bit 0; from version 1.1 on
    u32 connection_id = 0;       // from version 1.1 on
};
static_assert(sizeof(OfferChannel) == 196 && offsetof(OfferChannel, interface_type) == 8 &&
              offsetof(OfferChannel, instance) == 24 && offsetof(OfferChannel, reserved0) == 40 &&
              offsetof(OfferChannel, flags) == 56 && offsetof(OfferChannel, mmio_megabytes) == 58 &&
              offsetof(OfferChannel, user_defined) == 60 && offsetof(OfferChannel, sub_channel_index) == 180 &&
              offsetof(OfferChannel, relid) == 184 && offsetof(OfferChannel, monitor_id) == 188 &&
              offsetof(OfferChannel, monitor_allocated) == 189 && offsetof(OfferChannel, dedicated_interrupt) == 190 &&
              offsetof(OfferChannel, connection_id) == 192);

namespace offer_flags {
inline constexpr u16 enumerate_device_interface = 0x1;
inline constexpr u16 named_pipe_mode = 0x10;
inline constexpr u16 loopback_offer = 0x100;
inline constexpr u16 parent_offer = 0x200;
inline constexpr u16 request_monitored_notification = 0x400;
inline constexpr u16 tlnpi_provider = 0x2000;
} // namespace offer_flags

/// Messages whose body is a relid: rescind, close, release.
template <MessageType T>
struct RelidMessage {
    static constexpr MessageType type = T;
    MessageHeader header{T};
    u32 relid = 0;
};
using RescindChannelOffer = RelidMessage<MessageType::rescind_channel_offer>;
using CloseChannel = RelidMessage<MessageType::close_channel>;
using RelidReleased = RelidMessage<MessageType::relid_released>;
static_assert(sizeof(RescindChannelOffer) == 12 && offsetof(RescindChannelOffer, relid) == 8);

/// Messages without a body.
template <MessageType T>
struct BareMessage {
    static constexpr MessageType type = T;
    MessageHeader header{T};
};
using RequestOffers = BareMessage<MessageType::request_offers>;
using AllOffersDelivered = BareMessage<MessageType::all_offers_delivered>;
using Unload = BareMessage<MessageType::unload>;
using UnloadResponse = BareMessage<MessageType::unload_response>;
static_assert(sizeof(RequestOffers) == 8);

struct OpenChannel {
    static constexpr MessageType type = MessageType::open_channel;
    MessageHeader header{type};
    u32 relid = 0;
    u32 open_id = 0;
    u32 ring_gpadl = 0;
    u32 target_vp = 0;
    u32 downstream_page_offset = 0; // in pages: offset in the GPADL of the ring that the host writes
    std::array<u8, 120> user_data{};
};
static_assert(sizeof(OpenChannel) == 148 && offsetof(OpenChannel, relid) == 8 && offsetof(OpenChannel, open_id) == 12 &&
              offsetof(OpenChannel, ring_gpadl) == 16 && offsetof(OpenChannel, target_vp) == 20 &&
              offsetof(OpenChannel, downstream_page_offset) == 24 && offsetof(OpenChannel, user_data) == 28);

struct OpenChannelResult {
    static constexpr MessageType type = MessageType::open_channel_result;
    MessageHeader header{type};
    u32 relid = 0;
    u32 open_id = 0;
    HostStatus status = HostStatus::success;
};
static_assert(sizeof(OpenChannelResult) == 20 && offsetof(OpenChannelResult, open_id) == 12 &&
              offsetof(OpenChannelResult, status) == 16);

/// Followed by one range (GpaRange) and as many 64-bit page numbers as fit into the message; the rest is sent in
/// bodies.
struct GpadlHeader {
    static constexpr MessageType type = MessageType::gpadl_header;
    MessageHeader header{type};
    u32 relid = 0;
    u32 gpadl = 0;
    u16 range_bytes = 0; // all ranges with their page numbers
    u16 range_count = 0;
};
static_assert(sizeof(GpadlHeader) == 20 && offsetof(GpadlHeader, relid) == 8 && offsetof(GpadlHeader, gpadl) == 12 &&
              offsetof(GpadlHeader, range_bytes) == 16 && offsetof(GpadlHeader, range_count) == 18);

/// A buffer in guest memory: `byte_count` bytes, starting at `byte_offset` in the first page. 64-bit page numbers
/// follow.
struct GpaRange {
    u32 byte_count = 0;
    u32 byte_offset = 0;
};
static_assert(sizeof(GpaRange) == 8 && offsetof(GpaRange, byte_offset) == 4);

/// Followed by page numbers.
struct GpadlBody {
    static constexpr MessageType type = MessageType::gpadl_body;
    MessageHeader header{type};
    u32 number = 0; // index of this body
    u32 gpadl = 0;
};
static_assert(sizeof(GpadlBody) == 16 && offsetof(GpadlBody, number) == 8 && offsetof(GpadlBody, gpadl) == 12);

inline constexpr usize pages_in_header = (max_message - sizeof(GpadlHeader) - sizeof(GpaRange)) / 8;
inline constexpr usize pages_in_body = (max_message - sizeof(GpadlBody)) / 8;
static_assert(pages_in_header == 26 && pages_in_body == 28);
/// Limited by range_bytes, which has 16 bits.
inline constexpr usize max_gpadl_pages = (0xffff - sizeof(GpaRange)) / 8;

struct GpadlCreated {
    static constexpr MessageType type = MessageType::gpadl_created;
    MessageHeader header{type};
    u32 relid = 0;
    u32 gpadl = 0;
    HostStatus status = HostStatus::success;
};
static_assert(sizeof(GpadlCreated) == 20 && offsetof(GpadlCreated, gpadl) == 12 &&
              offsetof(GpadlCreated, status) == 16);

struct GpadlTeardown {
    static constexpr MessageType type = MessageType::gpadl_teardown;
    MessageHeader header{type};
    u32 relid = 0;
    u32 gpadl = 0;
};
static_assert(sizeof(GpadlTeardown) == 16 && offsetof(GpadlTeardown, relid) == 8 &&
              offsetof(GpadlTeardown, gpadl) == 12);

struct GpadlTorndown {
    static constexpr MessageType type = MessageType::gpadl_torndown;
    MessageHeader header{type};
    u32 gpadl = 0;
};
static_assert(sizeof(GpadlTorndown) == 12 && offsetof(GpadlTorndown, gpadl) == 8);

struct InitiateContact {
    static constexpr MessageType type = MessageType::initiate_contact;
    MessageHeader header{type};
    Version version = Version::none;
    u32 target_vp = 0; // the virtual processor that receives the messages
    // before 5.0: physical address of the interrupt page; from 5.0 on: SINT in bits 0–7, VTL in 8–15
    u64 interrupt_page_or_target = 0;
    u64 monitor_page_from_host = 0; // physical addresses
    u64 monitor_page_to_host = 0;
};
static_assert(sizeof(InitiateContact) == 40 && offsetof(InitiateContact, version) == 8 &&
              offsetof(InitiateContact, target_vp) == 12 && offsetof(InitiateContact, interrupt_page_or_target) == 16 &&
              offsetof(InitiateContact, monitor_page_from_host) == 24 &&
              offsetof(InitiateContact, monitor_page_to_host) == 32);

enum class ConnectionState : u8 { successful = 0, low_resources = 1, unknown_failure = 2 };
struct VersionResponse {
    static constexpr MessageType type = MessageType::version_response;
    MessageHeader header{type};
    u8 supported = 0; // not 0: supported
    ConnectionState state = ConnectionState::successful;
    u16 padding = 0;
    u32 message_connection = 0; // from 5.0 on; older versions omit this field or leave it undefined
};
static_assert(sizeof(VersionResponse) == 16 && offsetof(VersionResponse, supported) == 8 &&
              offsetof(VersionResponse, state) == 9 && offsetof(VersionResponse, message_connection) == 12);
/// The part that every host sends, in bytes.
inline constexpr usize version_response_min = 10;

struct ModifyChannel {
    static constexpr MessageType type = MessageType::modify_channel;
    MessageHeader header{type};
    u32 relid = 0;
    u32 target_vp = 0;
};
static_assert(sizeof(ModifyChannel) == 16 && offsetof(ModifyChannel, target_vp) == 12);

struct ModifyChannelResponse {
    static constexpr MessageType type = MessageType::modify_channel_response;
    MessageHeader header{type};
    u32 relid = 0;
    HostStatus status = HostStatus::success;
};
static_assert(sizeof(ModifyChannelResponse) == 16 && offsetof(ModifyChannelResponse, status) == 12);

// ---- shared pages ----

/// Versions 0.13 and 1.1: one bit per channel, the host's half first.
struct InterruptPage {
    std::array<u64, 256> from_host{};
    std::array<u64, 256> to_host{};
};
static_assert(sizeof(InterruptPage) == 4096 && offsetof(InterruptPage, to_host) == 2048);

/// Deferred signals: the host checks the `pending` bits of each group within the group's latency [hv-tlfs §11.11].
struct MonitorPage {
    struct Group {
        u32 pending = 0;
        u32 armed = 0;
    };
    u32 trigger_state = 0; // bits 0–3: groups that the host checks
    u32 reserved0 = 0;
    std::array<Group, 4> groups{};
    std::array<u64, 3> reserved1{};
    std::array<u32, 128> next_check{};
    std::array<u16, 128> latency{}; // in units of 100 ns
    std::array<u64, 32> reserved2{};
    struct Parameter {
        u32 connection_id = 0;
        u16 flag = 0;
        u16 reserved = 0;
    };
    std::array<Parameter, 128> parameters{};
    std::array<u8, 1984> reserved3{};
};
static_assert(sizeof(MonitorPage) == 4096 && offsetof(MonitorPage, groups) == 8 &&
              offsetof(MonitorPage, next_check) == 64 && offsetof(MonitorPage, latency) == 576 &&
              offsetof(MonitorPage, parameters) == 1088);
inline constexpr u32 monitors = 128;

/// Relids from here on have no event flag.
inline constexpr u32 max_relids = 2048;

} // namespace fl::hv::hyperv
