// No hypervisor, or none that this build supports: real or fully virtualised hardware. Always built in; the fallback
// for every other backend.
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

    /// Always: it needs no hypervisor.
    static bool recognises(const Sightings&) { return true; }
    /// Takes the time stamp counter's frequency from CPUID; does not fail.
    Result<void> install(Environment& environment);
    Result<void> start(Services&) { return {}; }

    std::optional<u64> tsc_hz() const { return tsc_hz_; }
    std::string_view clock_name() const { return tsc_hz_ ? "cpuid" : "none"; }

  private:
    std::optional<u64> tsc_hz_;
};
static_assert(Backend<Bare>);

} // namespace fl::hv
