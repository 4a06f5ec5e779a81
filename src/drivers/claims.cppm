// The same device never attaches twice. A machine's disk, network card or keyboard can be reached as an emulated and as
// a synthetic one; both drivers name it by the same DeviceId, and the one that attaches first, in the plan's order, has
// it. A driver asks offered() before it touches the device, and claims it once it works; what fails to attach is not
// claimed, so that the other driver still gets it.
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

    /// Whether `driver` may look at the device: nobody has it, or the plan lets both attach.
    bool offered(std::string_view driver, DeviceId id) const;
    /// `driver` has attached it. Error{busy}: it was not offered, or the driver has it already; Error{exhausted}: no
    /// memory. Not for devices whose number is no_twin.
    Result<void> attached(std::string_view driver, DeviceId id);
    /// The device is gone, or its driver gave it up: it is free again. Returns whether it was held.
    bool released(std::string_view driver, DeviceId id);
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
