// The virtio block device on the wire [virtio-1.2 §5.2].
module;
#include <cstddef>
export module drivers.virtio_blk.protocol;
import core.std;
import drivers.virtio.protocol;

export namespace fl::drivers::virtio_blk {

/// Feature bits [virtio-1.2 §5.2.3].
inline constexpr u64 feature_size_max = virtio::feature(1);
inline constexpr u64 feature_seg_max = virtio::feature(2);
inline constexpr u64 feature_ro = virtio::feature(5);
inline constexpr u64 feature_blk_size = virtio::feature(6);
inline constexpr u64 feature_flush = virtio::feature(9);
inline constexpr u64 feature_topology = virtio::feature(10);
inline constexpr u64 feature_config_wce = virtio::feature(11);
inline constexpr u64 feature_mq = virtio::feature(12);
inline constexpr u64 feature_discard = virtio::feature(13);
inline constexpr u64 feature_write_zeroes = virtio::feature(14);
inline constexpr std::array<virtio::FeatureName, 14> feature_names{{
    {0, "BARRIER"},
    {1, "SIZE_MAX"},
    {2, "SEG_MAX"},
    {4, "GEOMETRY"},
    {5, "RO"},
    {6, "BLK_SIZE"},
    {7, "SCSI"},
    {9, "FLUSH"},
    {10, "TOPOLOGY"},
    {11, "CONFIG_WCE"},
    {12, "MQ"},
    {13, "DISCARD"},
    {14, "WRITE_ZEROES"},
    {16, "SECURE_ERASE"},
}};

/// Offsets in the configuration space, in bytes [virtio-1.2 §5.2.4].
namespace config {
inline constexpr u64 capacity = 0;                  // 64 bits, in units of 512 bytes
inline constexpr u64 size_max = 8;                  // 32
inline constexpr u64 seg_max = 12;                  // 32
inline constexpr u64 blk_size = 20;                 // 32
inline constexpr u64 physical_block_exp = 24;       // 8: log2 of logical blocks per physical block
inline constexpr u64 writeback = 32;                // 8
inline constexpr u64 queue_count = 34;              // 16
inline constexpr u64 max_discard_sectors = 36;      // 32, in units of 512 bytes
inline constexpr u64 max_write_zeroes_sectors = 48; // 32, in units of 512 bytes
inline constexpr u64 write_zeroes_may_unmap = 56;   // 8: whether segment_unmap has an effect
} // namespace config

enum class RequestType : u32 { in = 0, out = 1, flush = 4, get_id = 8, discard = 11, write_zeroes = 13 };

/// The first element of every request, read by the device [virtio-1.2 §5.2.6]. `sector`: in units of 512 bytes, 0 for
/// requests without an address.
struct RequestHeader {
    RequestType type = RequestType::in;
    u32 reserved = 0;
    u64 sector = 0;
};
static_assert(sizeof(RequestHeader) == 16 && offsetof(RequestHeader, sector) == 8);

/// The data of a discard or write zeroes request.
struct RangeSegment {
    u64 sector = 0; // in units of 512 bytes, like the next
    u32 sectors = 0;
    u32 flags = 0;
};
static_assert(sizeof(RangeSegment) == 16 && offsetof(RangeSegment, sectors) == 8 &&
              offsetof(RangeSegment, flags) == 12);
/// RangeSegment::flags of write zeroes: the device may deallocate the sectors, which read as zeros nevertheless.
inline constexpr u32 segment_unmap = 1;

/// The last element of every request: one byte, written by the device.
inline constexpr u8 status_ok = 0;
inline constexpr u8 status_io_error = 1;
inline constexpr u8 status_unsupported = 2;
inline constexpr u8 status_unwritten = 0xff; // ours: the device has returned the request without a status

/// Bytes of a serial number; a shorter one ends with a zero.
inline constexpr u32 id_bytes = 20;

} // namespace fl::drivers::virtio_blk
