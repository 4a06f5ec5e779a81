// KVM, and QEMU's TCG, which looks the same to a guest but offers less. Neither requires hypercalls or has a bus of its
// own. They supply the frequency of the time stamp counter, so that it need not be calibrated.
export module hv.kvm;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;

export namespace fl::hv {

class Kvm {
  public:
    static constexpr std::string_view name = "kvm";
    static constexpr VmGuest guest = VmGuest::kvm;
    static constexpr bool serves(VmGuest g) { return g == VmGuest::kvm || g == VmGuest::tcg; }

    static bool recognises(const Sightings& sightings) {
        return sightings.has(VmGuest::kvm) || sightings.has(VmGuest::tcg);
    }
    /// Determines the frequency: from CPUID's timing leaf, else from the clock page, which is registered, read once and
    /// withdrawn, so that the host does not keep writing to guest memory. If the host supplies implausible values, logs
    /// a warning, and the counter is calibrated.
    Result<void> install(Environment& environment);
    Result<void> start(Services&) { return {}; }

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return clock_name_; }
    /// KVM's feature bits (hv.kvm.protocol); 0 under TCG.
    u32 features() const { return features_; }

  private:
    std::optional<u64> tsc_hz_;
    std::string_view clock_name_ = "none";
    u32 features_ = 0;
};
static_assert(Backend<Kvm>);

} // namespace fl::hv
