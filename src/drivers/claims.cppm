// The same disk never attaches twice. A machine's disk can be reached as an emulated one and as a synthetic one; both
// drivers name it by the same slot, and whoever attaches first, in the plan's order, has it. A driver asks offered()
// before it touches the device and says attached() once it works; what fails to attach is not claimed, so that the
// other driver still gets it.
export module drivers.claims;
import core.std;
import core.result;
import core.text;
import core.vector;
import drivers.table;

export namespace fl::drivers {

enum class SlotKind : u8 { disk, net, keyboard, pointer, display };
constexpr std::string_view name(SlotKind kind) {
    constexpr std::array<std::string_view, 5> names{"disk", "net", "keyboard", "pointer", "display"};
    return names[to_underlying(kind)];
}

/// A device of the machine, however it is reached. Disk 0 is the primary master and what a hypervisor pairs with it
/// (Xen: xvda, hda), disk 1 the primary slave, disk 2 the secondary master, disk 3 the secondary slave.
struct Slot {
    SlotKind kind = SlotKind::disk;
    u32 index = 0;
    friend constexpr bool operator==(const Slot&, const Slot&) = default;
};
constexpr Slot disk_slot(u32 index) { return {SlotKind::disk, index}; }
/// channel: 0 primary, 1 secondary; unit: 0 master, 1 slave.
constexpr Slot ide_slot(u32 channel, u32 unit) { return disk_slot(channel * 2 + unit); }

class Claims {
  public:
    /// The plan must outlive this.
    constexpr explicit Claims(const Plan& plan) : plan_(&plan) {}

    /// Whether `driver` may look at the device in that slot: nobody has it, or the plan lets both attach.
    bool offered(std::string_view driver, Slot slot) const;
    /// `driver` has attached it. Error{busy}: it was not offered, or the driver has it already; Error{exhausted}: no
    /// memory.
    Result<void> attached(std::string_view driver, Slot slot);
    /// The device is gone, or its driver gave it up: the slot is free again. Returns whether it was held.
    bool released(std::string_view driver, Slot slot);
    /// Who attached the slot first; empty when nobody.
    std::string_view holder(Slot slot) const;
    usize size() const { return claims_.size(); }

  private:
    struct Claim {
        Slot slot;
        std::string_view driver;
    };
    const Plan* plan_;
    Vector<Claim> claims_;
};

} // namespace fl::drivers
