// The block interface's wire format: the contents of a ring slot, 64-bit layout ("x86_64-abi") [xen-blkif]. Sectors
// in sector numbers, in a segment's first and last sector, and in the node "sectors" are 512 bytes, regardless of the
// disk's sector size (for back ends that count otherwise see Terms::wire_unit).
module;
#include <cstddef>
export module drivers.xen_blk.protocol;
import core.std;

export namespace fl::drivers::xen_blk {

/// The requested operation. Repeated in the response, which may contain any value.
enum class Operation : u8 { read = 0, write = 1, write_barrier = 2, flush = 3, discard = 5, indirect = 6 };

inline constexpr u32 wire_sector = 512;
inline constexpr u32 segments_in_slot = 11;
inline constexpr u32 indirect_pages_in_slot = 8;

/// A part of one page: sectors first_sector to last_sector, inclusive.
struct Segment {
    u32 grant;
    u8 first_sector;
    u8 last_sector;
    u16 padding;
};
static_assert(sizeof(Segment) == 8 && offsetof(Segment, first_sector) == 4 && offsetof(Segment, last_sector) == 5);
inline constexpr u32 segments_in_page = 4096 / sizeof(Segment);

struct RequestHeader {
    Operation operation;
    u8 segment_count;
    u16 handle;
    u32 padding;
    u64 id; // ours, returned in the response
    u64 sector;
};
static_assert(sizeof(RequestHeader) == 24 && offsetof(RequestHeader, segment_count) == 1 &&
              offsetof(RequestHeader, handle) == 2 && offsetof(RequestHeader, id) == 8 &&
              offsetof(RequestHeader, sector) == 16);

/// read, write, write_barrier, flush
struct DirectRequest {
    RequestHeader header;
    std::array<Segment, segments_in_slot> segments;
};
static_assert(sizeof(DirectRequest) == 112 && offsetof(DirectRequest, segments) == 24);

struct DiscardRequest {
    RequestHeader header; // segment_count: discard_secure, or 0
    u64 sector_count;
};
static_assert(sizeof(DiscardRequest) == 32 && offsetof(DiscardRequest, sector_count) == 24);

/// The segments are in separate pages, segments_in_page in each.
struct IndirectRequest {
    Operation operation;   // indirect
    Operation indirect_op; // read or write
    u16 segment_count;
    u32 padding0;
    u64 id;
    u64 sector;
    u16 handle;
    u16 padding1;
    std::array<u32, indirect_pages_in_slot> pages; // grants
    u32 padding2;
};
static_assert(sizeof(IndirectRequest) == 64 && offsetof(IndirectRequest, indirect_op) == 1 &&
              offsetof(IndirectRequest, segment_count) == 2 && offsetof(IndirectRequest, id) == 8 &&
              offsetof(IndirectRequest, sector) == 16 && offsetof(IndirectRequest, handle) == 24 &&
              offsetof(IndirectRequest, pages) == 28);

struct Response {
    u64 id;
    Operation operation; // for an indirect request its indirect_op, or indirect itself: back ends differ
    u8 padding0;
    i16 status;
    u32 padding1;
};
static_assert(sizeof(Response) == 16 && offsetof(Response, operation) == 8 && offsetof(Response, status) == 10);

/// Flag of a discard: no copy of the data may be left. A back end without "discard-secure" may ignore it (Linux does).
inline constexpr u8 discard_secure = 1;

inline constexpr i16 status_ok = 0;
inline constexpr i16 status_error = -1;
inline constexpr i16 status_not_supported = -2;

// The ring page: four words, then the slots; a response is at the beginning of a slot [xen-ring].
inline constexpr usize ring_request_producer = 0;
inline constexpr usize ring_request_event = 4;
inline constexpr usize ring_response_producer = 8;
inline constexpr usize ring_response_event = 12;
inline constexpr usize ring_slots = 64;
inline constexpr u32 slot_bytes = sizeof(DirectRequest);

// Bits of the node "info".
inline constexpr u64 info_cdrom = 1;
inline constexpr u64 info_removable = 2;
inline constexpr u64 info_read_only = 4;

} // namespace fl::drivers::xen_blk
