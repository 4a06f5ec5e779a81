// The network interface's wire format: the contents of ring slots [xen-netif].
module;
#include <cstddef>
export module drivers.xen_net.protocol;
import core.std;

export namespace fl::drivers::xen_net {

inline constexpr u32 buffer_bytes = 4096; // of one slot: a granted page

/// Slots of one frame that either side accepts without negotiation (XEN_NETIF_NR_SLOTS_MIN).
inline constexpr u32 max_frame_slots = 18;
inline constexpr u32 longest_frame = 0xffff; // bytes: the width of TxRequest::size

/// The first slot of a frame has the size of the whole frame, each further one its own.
struct TxRequest {
    u32 grant;
    u16 offset; // of the data in the page
    u16 flags;
    u16 id; // ours, returned in the response
    u16 size;
};
static_assert(sizeof(TxRequest) == 12 && offsetof(TxRequest, offset) == 4 && offsetof(TxRequest, flags) == 6 &&
              offsetof(TxRequest, id) == 8 && offsetof(TxRequest, size) == 10);
inline constexpr u16 tx_checksum_blank = 1; // TCP or UDP checksum: only the pseudo header's sum
inline constexpr u16 tx_data_validated = 2;
inline constexpr u16 tx_more_data = 4;  // the next slot continues the frame
inline constexpr u16 tx_extra_info = 8; // an ExtraInfo follows the first slot

struct TxResponse {
    u16 id;
    i16 status;
};
static_assert(sizeof(TxResponse) == 4 && offsetof(TxResponse, status) == 2);

// Status; positive values of a received slot are sizes.
inline constexpr i16 status_dropped = -2;
inline constexpr i16 status_error = -1;
inline constexpr i16 status_okay = 0;

struct RxRequest {
    u16 id;
    u16 padding;
    u32 grant;
};
static_assert(sizeof(RxRequest) == 8 && offsetof(RxRequest, grant) == 4);

/// Always in the slot of its request.
struct RxResponse {
    u16 id;
    u16 offset; // of the data in the page
    u16 flags;
    i16 status; // bytes in this slot, or a negative status
};
static_assert(sizeof(RxResponse) == 8 && offsetof(RxResponse, offset) == 2 && offsetof(RxResponse, flags) == 4 &&
              offsetof(RxResponse, status) == 6);
inline constexpr u16 rx_data_validated = 1;
inline constexpr u16 rx_checksum_blank = 2;
inline constexpr u16 rx_more_data = 4;
inline constexpr u16 rx_extra_info = 8;
inline constexpr u16 rx_gso_prefix = 16;

/// In place of a slot: further facts of the frame whose first slot precedes it. It has no id.
struct ExtraInfo {
    u8 type;
    u8 flags;
    std::array<u8, 6> data;
};
static_assert(sizeof(ExtraInfo) == 8 && offsetof(ExtraInfo, flags) == 1 && offsetof(ExtraInfo, data) == 2);
inline constexpr u8 extra_none = 0; // invalid
inline constexpr u8 extra_gso = 1;  // the frame is to be cut into several
inline constexpr u8 extra_more = 1; // flag: another one follows
/// Of one frame: one of each type that the interface defines.
inline constexpr u32 max_extras = 4;

// A ring's page: four words, then the slots; a response is at the beginning of a slot [xen-ring].
inline constexpr usize ring_request_producer = 0;
inline constexpr usize ring_request_event = 4;
inline constexpr usize ring_response_producer = 8;
inline constexpr usize ring_response_event = 12;
inline constexpr usize ring_slots = 64;
inline constexpr u32 tx_slot_bytes = sizeof(TxRequest);
inline constexpr u32 rx_slot_bytes = sizeof(RxResponse);

} // namespace fl::drivers::xen_net
