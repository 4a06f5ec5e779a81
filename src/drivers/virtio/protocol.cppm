// Constants and registers of the virtio specification that all device types share [virtio-1.2 §2, §4, §6].
export module drivers.virtio.protocol;
import core.std;
import core.text;

export namespace fl::drivers::virtio {

inline constexpr u32 pci_vendor = 0x1af4;
/// Device types [virtio-1.2 §5].
inline constexpr u32 type_block = 2;
inline constexpr u32 type_scsi = 8;

/// PCI device ids [virtio-1.2 §4.1.2.1]: modern devices have 0x1040 + type; transitional ones have ids of their own.
constexpr u32 modern_pci_id(u32 type) { return 0x1040 + type; }
inline constexpr u32 transitional_block = 0x1001;
inline constexpr u32 transitional_scsi = 0x1004;

/// Device status bits [virtio-1.2 §2.1].
inline constexpr u8 status_acknowledge = 1;
inline constexpr u8 status_driver = 2;
inline constexpr u8 status_driver_ok = 4;
inline constexpr u8 status_features_ok = 8;
inline constexpr u8 status_needs_reset = 64;
inline constexpr u8 status_failed = 128;

/// Feature bits from 24 on, which are common to all device types [virtio-1.2 §6].
constexpr u64 feature(u32 bit) { return u64{1} << bit; }
inline constexpr u64 feature_notify_on_empty = feature(24); // legacy
inline constexpr u64 feature_any_layout = feature(27);      // legacy
inline constexpr u64 feature_indirect = feature(28);
inline constexpr u64 feature_event_idx = feature(29);
inline constexpr u64 feature_version_1 = feature(32);
inline constexpr u64 feature_access_platform = feature(33);
inline constexpr u64 feature_packed = feature(34);
inline constexpr u64 feature_in_order = feature(35);
inline constexpr u64 feature_order_platform = feature(36);
inline constexpr u64 feature_ring_reset = feature(40); // not negotiated: docs/decisions/0010-no-queue-reset.md

struct FeatureName {
    u32 bit;
    std::string_view name;
};
/// The names of the common ones, as in the specification, without VIRTIO_F_.
inline constexpr std::array<FeatureName, 14> common_features{{
    {24, "NOTIFY_ON_EMPTY"},
    {27, "ANY_LAYOUT"},
    {28, "INDIRECT_DESC"},
    {29, "EVENT_IDX"},
    {32, "VERSION_1"},
    {33, "ACCESS_PLATFORM"},
    {34, "RING_PACKED"},
    {35, "IN_ORDER"},
    {36, "ORDER_PLATFORM"},
    {37, "SR_IOV"},
    {38, "NOTIFICATION_DATA"},
    {39, "NOTIF_CONFIG_DATA"},
    {40, "RING_RESET"},
    {41, "ADMIN_VQ"},
}};

/// The queue's interrupt has been raised; the configuration has changed [virtio-1.2 §4.1.4.5, §4.2.2].
inline constexpr u8 isr_queue = 1;
inline constexpr u8 isr_config = 2;

inline constexpr u16 no_vector = 0xffff;

// ---- PCI [virtio-1.2 §4.1.4] ----

/// cfg_type of a vendor capability.
enum class CapabilityType : u8 { common = 1, notify = 2, isr = 3, device = 4, pci = 5 };
/// Offsets of its fields from its header [virtio-1.2 §4.1.4].
namespace pci_capability {
inline constexpr u16 type = 3;
inline constexpr u16 bar = 4;
inline constexpr u16 offset = 8;
inline constexpr u16 length = 12;
inline constexpr u16 notify_multiplier = 16; // of `notify` only
} // namespace pci_capability

/// The common configuration structure [virtio-1.2 §4.1.4.3]. Offsets in bytes; the width is in the name's comment.
namespace pci_common {
inline constexpr u64 device_feature_select = 0; // 32
inline constexpr u64 device_feature = 4;        // 32
inline constexpr u64 driver_feature_select = 8; // 32
inline constexpr u64 driver_feature = 12;       // 32
inline constexpr u64 config_vector = 16;        // 16
inline constexpr u64 queue_count = 18;          // 16
inline constexpr u64 device_status = 20;        // 8
inline constexpr u64 config_generation = 21;    // 8
inline constexpr u64 queue_select = 22;         // 16
inline constexpr u64 queue_size = 24;           // 16
inline constexpr u64 queue_vector = 26;         // 16
inline constexpr u64 queue_enable = 28;         // 16
inline constexpr u64 queue_notify_offset = 30;  // 16
inline constexpr u64 queue_descriptors = 32;    // 64, written as two halves
inline constexpr u64 queue_driver = 40;         // 64
inline constexpr u64 queue_device = 48;         // 64
inline constexpr u64 bytes = 56;                // up to and including queue_device
} // namespace pci_common

// ---- MMIO [virtio-1.2 §4.2.2], [virtio-1.2 §4.2.4] for version 1 ----

/// Register offsets; all registers are 32 bits wide.
namespace mmio {
inline constexpr u64 magic = 0x00;
inline constexpr u64 version = 0x04;
inline constexpr u64 device_id = 0x08;
inline constexpr u64 device_features = 0x10;
inline constexpr u64 device_features_select = 0x14;
inline constexpr u64 driver_features = 0x20;
inline constexpr u64 driver_features_select = 0x24;
inline constexpr u64 guest_page_size = 0x28; // version 1
inline constexpr u64 queue_select = 0x30;
inline constexpr u64 queue_size_max = 0x34;
inline constexpr u64 queue_size = 0x38;
inline constexpr u64 queue_align = 0x3c; // version 1
inline constexpr u64 queue_page = 0x40;  // version 1
inline constexpr u64 queue_ready = 0x44;
inline constexpr u64 queue_notify = 0x50;
inline constexpr u64 interrupt_status = 0x60;
inline constexpr u64 interrupt_acknowledge = 0x64;
inline constexpr u64 status = 0x70;
inline constexpr u64 queue_descriptors = 0x80; // two registers: low, high
inline constexpr u64 queue_driver = 0x90;
inline constexpr u64 queue_device = 0xa0;
inline constexpr u64 config_generation = 0xfc;
inline constexpr u64 config = 0x100;
inline constexpr u64 bytes = 0x200; // mapped: the registers and 256 bytes of configuration
} // namespace mmio

/// Alignment of a queue's used ring, and unit of its address, in a legacy device [virtio-1.2 §2.7.2, §4.2.4].
inline constexpr u32 legacy_align = 4096;

} // namespace fl::drivers::virtio
