module hv.vm_guest;
import core.std;

namespace fl::hv {

namespace {
constinit VmGuest current = VmGuest::bare;
} // namespace

VmGuest vm_guest() { return current; }
void set_vm_guest(VmGuest guest) { current = guest; }

} // namespace fl::hv
