// Which hypervisor this is: the one thing about hypervisors that machine-independent code may know. Constants and a
// variable, nothing else; how it is found out is hv.detect's, what is done with it is the backends'.
export module hv.vm_guest;
import core.std;

export namespace fl::hv {

/// `bare`: no hypervisor was seen. `other`: there is one, and nobody here knows its name.
enum class VmGuest : u8 {
    bare,
    other,
    xen,
    hyperv,
    kvm,
    tcg,
    vmware,
    bhyve,
    virtualbox,
    parallels,
    acrn,
    qnx,
    nvmm,
    jailhouse,
    openbsd
};

/// All of them, in order; the names are those of the command line and the map file.
inline constexpr std::array<std::string_view, 15> vm_guest_names{"bare", "other",  "xen",   "hyperv",     "kvm",
                                                                 "tcg",  "vmware", "bhyve", "virtualbox", "parallels",
                                                                 "acrn", "qnx",    "nvmm",  "jailhouse",  "openbsd"};
static_assert(to_underlying(VmGuest::openbsd) + 1 == vm_guest_names.size());

constexpr std::string_view name(VmGuest guest) {
    return to_underlying(guest) < vm_guest_names.size() ? vm_guest_names[to_underlying(guest)] : "unknown";
}
constexpr std::optional<VmGuest> vm_guest_named(std::string_view text) {
    for (usize i = 0; i < vm_guest_names.size(); ++i) {
        if (vm_guest_names[i] == text) {
            return static_cast<VmGuest>(i);
        }
    }
    return std::nullopt;
}

/// Set once by boot, before the first driver attaches; `bare` until then. One processor writes it before the others are
/// started.
VmGuest vm_guest();
void set_vm_guest(VmGuest guest);

/// Whether this build has a module for that hypervisor: usable in `if constexpr`, so that a driver for a hypervisor
/// that was left out costs nothing. `kvm` serves TCG as well.
constexpr bool built_for(VmGuest guest) {
    switch (guest) {
    case VmGuest::bare: return true;
    case VmGuest::xen:
#ifdef FIRSTLIGHT_HV_XEN
        return true;
#else
        return false;
#endif
    case VmGuest::hyperv:
#ifdef FIRSTLIGHT_HV_HYPERV
        return true;
#else
        return false;
#endif
    case VmGuest::kvm:
    case VmGuest::tcg:
#ifdef FIRSTLIGHT_HV_KVM
        return true;
#else
        return false;
#endif
    default: return false;
    }
}

} // namespace fl::hv
