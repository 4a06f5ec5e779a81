// Prevents a device from being attached twice. A machine's disk, network card or keyboard may be reachable both as an
// emulated and as a synthetic device; both drivers use the same DeviceId for it, and the first to attach, in the
// plan's order, owns it. A driver calls offered() before it accesses the device, and claims the device once it works;
// a device that failed to attach is not claimed, so that the other driver can use it.
export module drivers.claims;
import core.std;
import core.result;
import core.vector;
import drivers.table;
export import drivers.device;

export namespace fl::drivers {

class Claims {
  public:
    /// The plan must outlive this.
    constexpr explicit Claims(const Plan& plan) : plan_(&plan) {}

    /// Whether `driver` may access the device: it is unclaimed, or the plan allows both drivers to attach, or both are
    /// native.
    bool offered(std::string_view driver, DeviceId id) const;
    /// Whether a native driver's devices can be those of a synthetic one in this machine.
    bool has_twins(std::string_view driver) const { return plan_->has_twins(driver); }
    /// Whether a driver's devices, native or synthetic, can be those of another driver in this machine.
    bool pairs(std::string_view driver) const { return plan_->pairs_with_twins(driver); }
    /// Records that `driver` has attached the device. Error{busy}: it was not offered, or the driver has it already;
    /// Error{exhausted}: no memory. Not for devices numbered no_twin.
    Result<void> attached(std::string_view driver, DeviceId id);
    /// Frees the device: it was removed, or its driver released it. Returns whether it was held.
    bool release(std::string_view driver, DeviceId id);
    /// The driver that attached it first; empty: none.
    std::string_view holder(DeviceId id) const;
    usize size() const { return claims_.size(); }

  private:
    struct Claim {
        DeviceId id;
        std::string_view driver;
    };
    const Plan* plan_;
    Vector<Claim> claims_;
};

} // namespace fl::drivers
