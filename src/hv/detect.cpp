module hv.detect;
import core.std;
import core.text;
import core.log;
import core.cpuid;
import core.smbios;

namespace fl::hv {

namespace {

struct Signature {
    std::string_view text; // without trailing NULs; compared with leading and trailing blanks removed, since these vary
    VmGuest guest;
};
// Taken from each hypervisor's documentation or source; docs/hypervisors.md lists which.
constexpr std::array<Signature, 18> signatures{{
    {"XenVMMXenVMM", VmGuest::xen},
    {"Microsoft Hv", VmGuest::hyperv},
    {"Linux KVM Hv", VmGuest::hyperv}, // KVM's signature when it emulates Hyper-V
    {"KVMKVMKVM", VmGuest::kvm},
    {"TCGTCGTCGTCG", VmGuest::tcg},
    {"VMwareVMware", VmGuest::vmware},
    {"bhyve bhyve", VmGuest::bhyve},
    {"VBoxVBoxVBox", VmGuest::virtualbox},
    {"prl hyperv", VmGuest::parallels},
    {"lrpepyh  vr", VmGuest::parallels}, // the same, with the bytes of each word reversed
    {"lrpepyh vr", VmGuest::parallels},
    {"ACRNACRNACRN", VmGuest::acrn},
    {"QNXQVMBSQG", VmGuest::qnx},
    {"___ NVMM ___", VmGuest::nvmm},
    {"Jailhouse", VmGuest::jailhouse},
    {"OpenBSDVMM58", VmGuest::openbsd},
    {"EVMMEVMMEVMM", VmGuest::other},
    {"UnisysSpar64", VmGuest::other},
}};

constexpr u32 hyperv_interface = 0x31237648; // "Hv#1" [hv-tlfs §2.4.1]

constexpr std::string_view without_blanks(std::string_view text) {
    while (!text.empty() && text.front() == ' ') {
        text.remove_prefix(1);
    }
    while (!text.empty() && text.back() == ' ') {
        text.remove_suffix(1);
    }
    return text;
}

VmGuest guest_of(std::string_view signature, u32 interface) {
    const std::string_view plain = without_blanks(signature);
    for (const Signature& s : signatures) {
        if (s.text == plain) {
            return s.guest;
        }
    }
    // The vendor string is configurable (QEMU's hv-vendor-id); the interface signature then decides [hv-tlfs §2.4.1].
    return interface == hyperv_interface ? VmGuest::hyperv : VmGuest::other;
}

// Fallback: names in the firmware's SMBIOS strings. Prefixes, first match wins.
struct FirmwareName {
    FixedText<64> Smbios::* field;
    std::string_view prefix;
    VmGuest guest;
    FixedText<64> Smbios::* and_field; // nullptr: the first condition suffices
    std::string_view and_prefix;
};
constexpr std::array<FirmwareName, 14> firmware_names{{
    {&Smbios::manufacturer, "Xen", VmGuest::xen, nullptr, {}},
    {&Smbios::bios_vendor, "Xen", VmGuest::xen, nullptr, {}},
    // The manufacturer also sells physical machines: the product decides.
    {&Smbios::manufacturer, "Microsoft Corporation", VmGuest::hyperv, &Smbios::product, "Virtual Machine"},
    {&Smbios::manufacturer, "VMware", VmGuest::vmware, nullptr, {}},
    {&Smbios::product, "VMware", VmGuest::vmware, nullptr, {}},
    {&Smbios::product, "VirtualBox", VmGuest::virtualbox, nullptr, {}},
    {&Smbios::bios_vendor, "innotek GmbH", VmGuest::virtualbox, nullptr, {}},
    {&Smbios::manufacturer, "Parallels", VmGuest::parallels, nullptr, {}},
    {&Smbios::bios_vendor, "BHYVE", VmGuest::bhyve, nullptr, {}},
    {&Smbios::product, "BHYVE", VmGuest::bhyve, nullptr, {}},
    {&Smbios::product, "KVM", VmGuest::kvm, nullptr, {}},
    {&Smbios::manufacturer, "OpenBSD", VmGuest::openbsd, &Smbios::product, "VMM"},
    // QEMU supports several accelerators; one that is hidden in CPUID cannot be identified.
    {&Smbios::manufacturer, "QEMU", VmGuest::other, nullptr, {}},
    {&Smbios::bios_vendor, "Bochs", VmGuest::other, nullptr, {}},
}};

constexpr std::array<PolicyRule, 15> rules{{
    {VmGuest::xen, nullptr, "Xen's own leaves are present, in spite of others"},
    {VmGuest::hyperv, offers_vmbus, "it has what a VMBus needs, which outweighs a name"},
    {VmGuest::kvm, nullptr, "KVM's leaves are present, and no bus with synthetic disks"},
    {VmGuest::tcg, nullptr, "QEMU without hardware virtualisation"},
    {VmGuest::hyperv, nullptr, "Hyper-V's interface, without a VMBus"},
    {VmGuest::vmware, nullptr, "sighted"},
    {VmGuest::virtualbox, nullptr, "sighted"},
    {VmGuest::bhyve, nullptr, "sighted"},
    {VmGuest::parallels, nullptr, "sighted"},
    {VmGuest::acrn, nullptr, "sighted"},
    {VmGuest::qnx, nullptr, "sighted"},
    {VmGuest::nvmm, nullptr, "sighted"},
    {VmGuest::jailhouse, nullptr, "sighted"},
    {VmGuest::openbsd, nullptr, "sighted"},
    {VmGuest::other, nullptr, "an unknown hypervisor"},
}};

bool starts_with(std::string_view text, std::string_view prefix) {
    return !prefix.empty() && text.substr(0, prefix.size()) == prefix;
}

} // namespace

std::span<const PolicyRule> policy() { return rules; }

bool offers_extended_destinations(const Sightings& sightings) {
    constexpr u32 kvm_extended_destinations = 1 << 15;
    constexpr u32 xen_extended_destinations = 1 << 5;
    const Sighting* const kvm = sightings.find(VmGuest::kvm);
    const Sighting* const xen = sightings.find(VmGuest::xen);
    return (kvm != nullptr && (kvm->features & kvm_extended_destinations) != 0) ||
           (xen != nullptr && (xen->features & xen_extended_destinations) != 0);
}

bool offers_vmbus(const Sighting& s) {
    // AccessSynicRegs 2, AccessHypercallMsrs 5: required to send or receive messages. PostMessages and SignalEvents
    // (the high half) are not required: OpenVMM does not set them, although its bus works; nor is AccessVpIndex,
    // without whose register the SynIC works too.
    constexpr u32 needed = 1u << 2 | 1u << 5;
    return s.guest == VmGuest::hyperv && s.base != 0 && (s.features & needed) == needed;
}

Sightings detect(const CpuidSnapshot& cpuid, const Smbios* smbios) {
    Sightings result;
    result.hypervisor_bit = cpuid.hypervisor_bit();
    for (const HypervisorBase& h : cpuid.hypervisors()) {
        Sighting s;
        s.base = h.base;
        s.max_leaf = h.max_leaf;
        s.signature = h.signature;
        s.guest = guest_of(h.signature.view(), cpuid.get(h.base + 1).eax);
        switch (s.guest) {
        case VmGuest::xen: // [xen-cpuid]: version in leaf 1, HVM features in leaf 4
            s.version = cpuid.get(h.base + 1).eax;
            s.features = cpuid.get(h.base + 4).eax;
            break;
        case VmGuest::hyperv: { // [hv-tlfs §2.4.3, §2.4.4]
            const CpuidRegisters version = cpuid.get(h.base + 2);
            s.version = version.ebx;
            s.build = version.eax;
            s.features = cpuid.get(h.base + 3).eax;
            s.features_high = cpuid.get(h.base + 3).ebx;
            break;
        }
        case VmGuest::kvm: // [kvm-cpuid]
            s.features = cpuid.get(h.base + 1).eax;
            break;
        default: break;
        }
        result.list[result.count++] = s;
    }
    if (result.count > 0) {
        return result;
    }
    for (const FirmwareName& f : firmware_names) {
        if (smbios == nullptr) {
            break;
        }
        if (starts_with((smbios->*f.field).view(), f.prefix) &&
            (f.and_field == nullptr || starts_with((smbios->*f.and_field).view(), f.and_prefix))) {
            Sighting s;
            s.guest = f.guest;
            s.signature = FixedText<12>((smbios->*f.field).view().substr(0, 12));
            result.list[result.count++] = s;
            return result;
        }
    }
    if (result.hypervisor_bit) { // a hypervisor is present, but unknown
        Sighting s;
        s.guest = VmGuest::other;
        result.list[result.count++] = s;
    }
    return result;
}

std::optional<Preference> parse_preference(std::string_view text) {
    Preference p;
    if (text == "late") {
        p.late = true;
        return p;
    }
    if (starts_with(text, "late:")) {
        p.late = true;
        text.remove_prefix(5);
    }
    if (text == "auto") {
        return p;
    }
    p.guest = vm_guest_named(text);
    if (!p.guest) {
        return std::nullopt;
    }
    return p;
}

Choice choose(const Sightings& sightings, Preference preference, bool (*built)(VmGuest)) {
    if (built == nullptr) {
        built = built_for;
    }
    Choice choice;
    choice.when = preference.late ? When::late : When::entry;
    if (preference.guest) {
        choice.guest = *preference.guest;
        choice.overridden = true;
        choice.unsighted = *preference.guest != VmGuest::bare && !sightings.has(*preference.guest);
        choice.reason = "requested on the command line";
        return choice;
    }
    // First what this build supports, then anything that can be named.
    for (const bool usable_only : {true, false}) {
        for (const PolicyRule& rule : rules) {
            if (usable_only && !built(rule.guest)) {
                continue;
            }
            for (const Sighting& s : sightings.all()) {
                if (s.guest != rule.guest || (rule.applies != nullptr && !rule.applies(s))) {
                    continue;
                }
                choice.guest = rule.guest;
                choice.reason = s.base == 0 ? std::string_view("by the firmware's strings only") : rule.reason;
                return choice;
            }
        }
    }
    choice.reason = "nothing was detected";
    return choice;
}

void log_detection(const CpuidSnapshot& cpuid, const Sightings& sightings, const Choice& choice) {
    const FixedText<12> vendor = cpuid.vendor();
    log::info("detection: {} CPUID instructions, processor {}, hypervisor bit {}", cpuid.executed, vendor.view(),
              sightings.hypervisor_bit ? "set" : "clear");
    if (cpuid.truncated) {
        log::warning("detection: more CPUID leaves than there is room for; the last ones were left out");
    }
    for (const Sighting& s : sightings.all()) {
        if (s.base == 0) {
            log::info("detection: {} by SMBIOS \"{}\"", s.guest, s.signature.view());
        } else if (s.version != 0) {
            log::info("detection: {} at {:#x}-{:#x} \"{}\", version {}.{}", s.guest, s.base, s.max_leaf,
                      s.signature.view(), s.version >> 16, s.version & 0xffff);
        } else {
            log::info("detection: {} at {:#x}-{:#x} \"{}\"", s.guest, s.base, s.max_leaf, s.signature.view());
        }
    }
    log::info("detection: vm_guest is {}: {}", choice.guest, choice.reason);
    if (choice.unsighted) {
        log::warning(
            "detection: {} was requested (hv=) but not detected: if its start fails, the machine continues as bare",
            choice.guest);
    }
}

} // namespace fl::hv
