// Hyper-V's dynamic memory protocol [hv-dm]: messages between the guest's balloon driver and the host. Little endian;
// every message begins with the header and is at most one page long. No I/O.
module;
#include <cstddef>
export module drivers.hv_balloon.protocol;
import core.std;

export namespace fl::drivers::hv_balloon {

inline constexpr std::string_view balloon_class = "525074dc-8985-46e2-8057-a307dc18a502";

/// major << 16 | minor
enum class Version : u32 { win7 = 0x0000'0003, win8 = 0x0001'0000, win10 = 0x0002'0000 };
/// Newest first: the order in which they are requested.
inline constexpr std::array<Version, 3> versions{Version::win10, Version::win8, Version::win7};

enum class MessageType : u16 {
    error = 0,
    version_request = 1, // guest
    version_response = 2,
    capabilities_report = 3, // guest
    capabilities_response = 4,
    status_report = 5, // guest
    balloon_request = 6,
    balloon_response = 7, // guest
    unballoon_request = 8,
    unballoon_response = 9, // guest
    hot_add_request = 10,
    hot_add_response = 11, // guest
    info = 12,             // from 1.0 on
    hot_remove_request = 13,
    hot_remove_response = 14, // guest
};
constexpr std::string_view name(MessageType type) {
    constexpr std::array<std::string_view, 15> names{
        "ERROR",           "VERSION_REQUEST",  "VERSION_RESPONSE", "CAPABILITIES_REPORT", "CAPABILITIES_RESPONSE",
        "STATUS_REPORT",   "BALLOON_REQUEST",  "BALLOON_RESPONSE", "UNBALLOON_REQUEST",   "UNBALLOON_RESPONSE",
        "HOT_ADD_REQUEST", "HOT_ADD_RESPONSE", "INFO_MESSAGE",     "HOT_REMOVE_REQUEST",  "HOT_REMOVE_RESPONSE"};
    return to_underlying(type) < names.size() ? names[to_underlying(type)] : "unknown message";
}

struct Header {
    MessageType type;
    u16 size; // bytes, including this header
    u32 transaction;
};
static_assert(sizeof(Header) == 8 && offsetof(Header, size) == 2 && offsetof(Header, transaction) == 4);

/// Pages of 4 KiB: number of the first one in the low 40 bits, count in the high 24.
struct PageRange {
    u64 bits;
    constexpr u64 first() const { return bits & 0xff'ffff'ffff; }
    constexpr u64 count() const { return bits >> 40; }
};
constexpr PageRange page_range(u64 first, u64 count) { return {first | count << 40}; }
static_assert(sizeof(PageRange) == 8);
inline constexpr u64 max_range_pages = (1u << 24) - 1;

struct VersionRequest {
    Header header;
    Version version;
    u32 last_attempt; // bit 0
};
static_assert(sizeof(VersionRequest) == 16 && offsetof(VersionRequest, version) == 8 &&
              offsetof(VersionRequest, last_attempt) == 12);

struct VersionResponse {
    Header header;
    u64 accepted; // bit 0
};
static_assert(sizeof(VersionResponse) == 16 && offsetof(VersionResponse, accepted) == 8);

inline constexpr u64 capability_balloon = 1;
inline constexpr u64 capability_hot_add = 2;
struct Capabilities {
    Header header;
    u64 capabilities;
    u64 min_pages;
    u64 max_page_number; // ~0: unlimited
};
static_assert(sizeof(Capabilities) == 32 && offsetof(Capabilities, capabilities) == 8 &&
              offsetof(Capabilities, min_pages) == 16 && offsetof(Capabilities, max_page_number) == 24);

struct CapabilitiesResponse {
    Header header;
    u64 flags;
};
static_assert(sizeof(CapabilitiesResponse) == 16 && offsetof(CapabilitiesResponse, flags) == 8);
inline constexpr u64 capabilities_accepted = 1;
inline constexpr u64 capabilities_no_reports = 4; // STATUS_REPORT is not wanted

/// All in pages.
struct StatusReport {
    Header header;
    u64 available;
    u64 committed; // used by the host to adjust memory
    u64 page_file;
    u64 zero_free;
    u32 page_file_writes;
    u32 io_difference;
};
static_assert(sizeof(StatusReport) == 48 && offsetof(StatusReport, available) == 8 &&
              offsetof(StatusReport, committed) == 16 && offsetof(StatusReport, page_file) == 24 &&
              offsetof(StatusReport, zero_free) == 32 && offsetof(StatusReport, page_file_writes) == 40 &&
              offsetof(StatusReport, io_difference) == 44);

struct BalloonRequest {
    Header header;
    u32 pages;
    u32 reserved;
};
static_assert(sizeof(BalloonRequest) == 16 && offsetof(BalloonRequest, pages) == 8);

/// Ranges follow.
struct BalloonResponse {
    Header header;
    u32 reserved;
    u32 more_and_count; // bit 0: more responses follow; other bits: number of ranges
};
static_assert(sizeof(BalloonResponse) == 16 && offsetof(BalloonResponse, more_and_count) == 12);

/// Ranges follow.
struct UnballoonRequest {
    Header header;
    u32 more; // bit 0: more requests follow, and only the last one is answered
    u32 range_count;
};
static_assert(sizeof(UnballoonRequest) == 16 && offsetof(UnballoonRequest, more) == 8 &&
              offsetof(UnballoonRequest, range_count) == 12);

struct HotAddResponse {
    Header header;
    u32 pages;
    u32 result; // 1: success; with 0 pages: do not ask again
};
static_assert(sizeof(HotAddResponse) == 16 && offsetof(HotAddResponse, pages) == 8 &&
              offsetof(HotAddResponse, result) == 12);

struct Info {
    Header header;
    u32 reserved;
    u32 bytes; // of the data that follows
};
static_assert(sizeof(Info) == 16 && offsetof(Info, bytes) == 12);
// block type in Info: a u32 type, a u32 size, then the number of pages (u64)
inline constexpr u32 info_max_pages = 0;

struct HotRemoveResponse {
    Header header;
    u32 result;
    u32 range_count;
    u64 more;
};
static_assert(sizeof(HotRemoveResponse) == 24 && offsetof(HotRemoveResponse, result) == 8 &&
              offsetof(HotRemoveResponse, range_count) == 12 && offsetof(HotRemoveResponse, more) == 16);

inline constexpr u32 max_message = 4096;
inline constexpr u32 ranges_in_message = (max_message - sizeof(BalloonResponse)) / sizeof(PageRange);

} // namespace fl::drivers::hv_balloon
