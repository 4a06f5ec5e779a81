// needs: hyperv
// A bus is accessed through the instance that started it, not through the backend's type.
// expect: no member named 'next_device' in 'fl::hv::HyperV'
// expect: no member named 'arm_timer' in 'fl::hv::HyperV'
import core.std;
import hv.hyperv;

namespace {
using namespace fl;
[[maybe_unused]] void late(hv::HyperV& backend) { static_cast<void>(backend.next_device()); }
[[maybe_unused]] void sleep(hv::HyperV& backend) { backend.arm_timer(1); }
} // namespace
