// No hypervisor, or none that this build has a module for: the machine as it looks, fully virtualised or real. Always
// in the build, and the backend that everything falls back to.
export module hv.bare;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;

export namespace fl::hv {

class Bare {
  public:
    static constexpr std::string_view name = "bare";
    static constexpr VmGuest guest = VmGuest::bare;

    /// Everything: it touches nothing that needs a hypervisor.
    static bool recognises(const Sightings&) { return true; }
    Result<void> install(Environment& environment);
    Result<void> start(Services&) { return {}; }

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return tsc_hz_ ? "cpuid" : "none"; }

  private:
    std::optional<u64> tsc_hz_;
};
static_assert(Backend<Bare>);

} // namespace fl::hv
