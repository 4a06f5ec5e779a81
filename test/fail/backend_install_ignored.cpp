// The result of installing a backend must be checked.
// expect: ignoring return value
import core.std;
import core.result;
import hv.backend;
import hv.bare;

namespace {
[[maybe_unused]] void caller(fl::hv::Bare& bare, fl::hv::Environment& environment) { bare.install(environment); }
} // namespace
