// The hypervisor's identity: the only knowledge of hypervisors in machine-independent code. Constants and one variable;
// hv.detect determines the value, and the backends act on it.
export module hv.vm_guest;
import core.std;

export namespace fl::hv {

/// `bare`: no hypervisor was detected. `other`: one that this kernel does not know.
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

/// Names in the order of VmGuest, as used on the command line and in the map file.
inline constexpr std::array<std::string_view, 15> vm_guest_names{"bare", "other",  "xen",   "hyperv",     "kvm",
                                                                 "tcg",  "vmware", "bhyve", "virtualbox", "parallels",
                                                                 "acrn", "qnx",    "nvmm",  "jailhouse",  "openbsd"};
static_assert(to_underlying(VmGuest::openbsd) + 1 == vm_guest_names.size());

constexpr std::string_view name(VmGuest guest) {
    return to_underlying(guest) < vm_guest_names.size() ? vm_guest_names[to_underlying(guest)] : "unknown";
}
/// The guest with this name; nothing for an unknown name.
constexpr std::optional<VmGuest> vm_guest_named(std::string_view text) {
    for (usize i = 0; i < vm_guest_names.size(); ++i) {
        if (vm_guest_names[i] == text) {
            return static_cast<VmGuest>(i);
        }
    }
    return std::nullopt;
}

/// Set once by boot, before the first driver attaches and before other processors start; `bare` until then.
VmGuest vm_guest();
void set_vm_guest(VmGuest guest);

/// Whether this build supports the hypervisor. Usable in `if constexpr`, so that a driver for an excluded hypervisor
/// costs nothing. `kvm` serves TCG as well.
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
