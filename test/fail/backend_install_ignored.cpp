// Whether a backend could be installed decides how the machine goes on.
// expect: ignoring return value
import core.std;
import core.result;
import hv.backend;
import hv.bare;

namespace {
[[maybe_unused]] void caller(fl::hv::Bare& bare, fl::hv::Environment& environment) { bare.install(environment); }
} // namespace
