// Identity of a device of the machine, independent of its driver. A hypervisor presents many devices twice: as
// emulated hardware and as a synthetic device. Both drivers use the same id, and claims (drivers.claims) are made by
// id.
export module drivers.device;
import core.std;

export namespace fl::drivers {

/// Device classes that can have a twin. Numbers are per class.
enum class DeviceKind : u8 { disk, network, keyboard, pointer, display };
constexpr std::string_view name(DeviceKind kind) {
    constexpr std::array<std::string_view, 5> names{"disk", "network card", "keyboard", "pointing device", "display"};
    return names[static_cast<u8>(kind)];
}

/// The number of a device without a twin: such devices are never claimed.
inline constexpr u32 no_twin = ~u32{0};

/// A device of the machine. Disk 0 is the primary master and the synthetic disk that a hypervisor pairs with it (Xen:
/// xvda, hda), disk 1 the primary slave, disk 2 the secondary master, disk 3 the secondary slave. Other classes: in
/// the order in which the machine lists them.
struct DeviceId {
    DeviceKind kind = DeviceKind::disk;
    u32 number = no_twin;
    friend constexpr bool operator==(const DeviceId&, const DeviceId&) = default;
};
constexpr DeviceId disk_id(u32 number) { return {DeviceKind::disk, number}; }
/// channel: 0 primary, 1 secondary; unit: 0 master, 1 slave.
constexpr DeviceId ide_id(u32 channel, u32 unit) { return disk_id(channel * 2 + unit); }

} // namespace fl::drivers
