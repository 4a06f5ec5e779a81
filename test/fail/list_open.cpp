// The closed list accepts only backends.
// expect: constraints not satisfied
// expect: does not satisfy 'Backend'
import core.std;
import hv.visit;
import hv.bare;

namespace {
struct NoBackend {};
[[maybe_unused]] constexpr fl::hv::BackendList<NoBackend, fl::hv::Bare> list{};
} // namespace
