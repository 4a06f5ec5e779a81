// A hypervisor's module without install() is not a backend.
// expect: does not satisfy 'Backend'
// expect: 'b.install(environment)' would be invalid
import core.std;
import core.result;
import hv.backend;

namespace {
using namespace fl;
struct Incomplete {
    static constexpr std::string_view name = "incomplete";
    static constexpr hv::VmGuest guest = hv::VmGuest::other;
    static bool recognises(const hv::Sightings&) { return true; }
    Result<void> start(hv::Services&) { return {}; }
    std::optional<u64> tsc_hz() const { return std::nullopt; }
    std::string_view clock_name() const { return "none"; }
};
template <hv::Backend B>
void use(B&) {}
[[maybe_unused]] void caller(Incomplete& backend) { use(backend); }
} // namespace
