// Hyper-V's integration services' wire format [hv-ic]: a pipe header, a message header, a body. Little endian,
// naturally aligned. No I/O.
module;
#include <cstddef>
export module drivers.hv_util.protocol;
import core.std;

export namespace fl::drivers::hv_util {

inline constexpr std::string_view shutdown_class = "0e0b6031-5213-4934-818b-38d90ced39db";
inline constexpr std::string_view time_sync_class = "9527e630-d0ae-497b-adce-e80ab0175caf";
inline constexpr std::string_view heartbeat_class = "57164f39-9115-4e78-ab55-382f3bd5422d";

struct PipeHeader {
    u32 flags;
    u32 message_bytes; // after this header
};
static_assert(sizeof(PipeHeader) == 8 && offsetof(PipeHeader, message_bytes) == 4);

struct Version {
    u16 major;
    u16 minor;
    friend constexpr auto operator<=>(const Version&, const Version&) = default;
};
static_assert(sizeof(Version) == 4 && offsetof(Version, minor) == 2);

enum class MessageType : u16 { negotiate = 0, heartbeat = 1, kvp_exchange = 2, shutdown = 3, time_sync = 4, vss = 5 };

/// Header::status.
inline constexpr u32 status_ok = 0;
inline constexpr u32 status_fail = 0x80004005;
inline constexpr u32 status_not_supported = 0x80070032;

/// Header::flags.
inline constexpr u8 flag_transaction = 1;
inline constexpr u8 flag_request = 2;
inline constexpr u8 flag_response = 4;

struct Header {
    Version framework;
    MessageType type;
    Version message;
    u16 size; // of the body
    u32 status;
    u8 transaction;
    u8 flags;
    u8 reserved[2];
};
static_assert(sizeof(Header) == 20 && offsetof(Header, type) == 4 && offsetof(Header, message) == 6 &&
              offsetof(Header, size) == 10 && offsetof(Header, status) == 12 && offsetof(Header, transaction) == 16 &&
              offsetof(Header, flags) == 17 && offsetof(Header, reserved) == 18);

/// Body of a negotiation, followed by the versions: first the framework's, then the messages'. The answer holds one
/// of each, or counts of zero if none matches.
struct Negotiate {
    u16 framework_count;
    u16 message_count;
    u32 reserved;
};
static_assert(sizeof(Negotiate) == 8 && offsetof(Negotiate, message_count) == 2 && offsetof(Negotiate, reserved) == 4);
inline constexpr u32 max_versions = 100; // of one negotiation, both kinds together

struct Shutdown {
    u32 reason;
    u32 timeout_seconds;
    u32 flags;
};
static_assert(sizeof(Shutdown) == 12 && offsetof(Shutdown, timeout_seconds) == 4 && offsetof(Shutdown, flags) == 8);
inline constexpr u32 shutdown_force = 1;
inline constexpr u32 shutdown_restart = 2;
inline constexpr u32 shutdown_hibernate = 4;

struct Heartbeat {
    u64 sequence;
    u32 reserved[8];
};
static_assert(sizeof(Heartbeat) == 40 && offsetof(Heartbeat, reserved) == 8);

/// Up to version 3.0. Times in units of 100 ns, the host's since 1601-01-01 00:00 UTC. On the wire the structure ends
/// with `flags`.
struct TimeSync {
    u64 host_time;
    u64 guest_time;
    u64 round_trip;
    u8 flags;
};
static_assert(offsetof(TimeSync, guest_time) == 8 && offsetof(TimeSync, round_trip) == 16 &&
              offsetof(TimeSync, flags) == 24);
inline constexpr u32 time_sync_bytes = 25;
/// From 4.0 on: with the partition's reference counter at the time the host read its clock.
struct TimeSync4 {
    u64 host_time;
    u64 reference_time;
    u8 flags;
    u8 leap;
    u8 stratum;
    u8 reserved[5];
};
static_assert(sizeof(TimeSync4) == 24 && offsetof(TimeSync4, reference_time) == 8 && offsetof(TimeSync4, flags) == 16 &&
              offsetof(TimeSync4, leap) == 17 && offsetof(TimeSync4, stratum) == 18 &&
              offsetof(TimeSync4, reserved) == 19);
inline constexpr u32 time_sync_4_bytes = 19; // minimum length; the rest is reserved
inline constexpr u8 time_sync_now = 1;       // set the clock: after a start or pause
inline constexpr u8 time_sync_sample = 2;

/// 1601-01-01 to 1970-01-01, in units of 100 ns.
inline constexpr u64 unix_epoch = 116'444'736'000'000'000;

inline constexpr u32 headers_bytes = sizeof(PipeHeader) + sizeof(Header);
/// The longest message of the three services: a shutdown with its text.
inline constexpr u32 max_message = headers_bytes + sizeof(Shutdown) + 2048;

} // namespace fl::drivers::hv_util
