module hv.bare;
import core.std;
import core.result;
import core.cpuid;
import hv.backend;

namespace fl::hv {

Result<void> Bare::install(Environment& environment) {
    tsc_hz_ = tsc_hz_by_cpuid(environment.cpuid);
    return {};
}

} // namespace fl::hv
