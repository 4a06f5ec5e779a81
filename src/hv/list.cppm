// The hypervisors of this build, in no particular order: which one is used is decided by the policy in hv.detect. A new
// one is its import and its line.
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

/// Whether a backend of the list takes that guest.
template <class... Bs>
constexpr bool listed(BackendList<Bs...>, VmGuest guest) {
    return (visit_detail::serves<Bs>(guest) || ...);
}

} // namespace fl::hv

namespace fl::hv {
// What the build options promise (built_for) is what the list holds: the policy relies on it.
static_assert([] {
    for (usize g = 0; g < vm_guest_names.size(); ++g) {
        if (built_for(static_cast<VmGuest>(g)) != listed(list, static_cast<VmGuest>(g))) {
            return false;
        }
    }
    return true;
}());

} // namespace fl::hv
