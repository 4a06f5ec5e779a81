// The hypervisor backends of this build, in no particular order: the policy in hv.detect selects one. To add one,
// import it and list it here.
export module hv.list;
import core.std;
export import hv.backend;
export import hv.visit;
export import hv.bare;
#ifdef FIRSTLIGHT_HV_KVM
export import hv.kvm;
#endif
#ifdef FIRSTLIGHT_HV_XEN
export import hv.xen;
#endif
#ifdef FIRSTLIGHT_HV_HYPERV
export import hv.hyperv;
#endif

export namespace fl::hv {

using Backends = BackendList<
#ifdef FIRSTLIGHT_HV_XEN
    Xen,
#endif
#ifdef FIRSTLIGHT_HV_HYPERV
    HyperV,
#endif
#ifdef FIRSTLIGHT_HV_KVM
    Kvm,
#endif
    Bare>;
inline constexpr Backends list{};

/// Whether a backend of the list serves this guest.
template <class... Bs>
constexpr bool listed(BackendList<Bs...>, VmGuest guest) {
    return (visit_detail::serves<Bs>(guest) || ...);
}

} // namespace fl::hv

namespace fl::hv {
// The build options (built_for) must match the list: the policy relies on it.
static_assert([] {
    for (usize g = 0; g < vm_guest_names.size(); ++g) {
        if (built_for(static_cast<VmGuest>(g)) != listed(list, static_cast<VmGuest>(g))) {
            return false;
        }
    }
    return true;
}());

} // namespace fl::hv
