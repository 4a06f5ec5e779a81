// Hypervisor detection. Sightings are facts (hypervisors reported by CPUID or SMBIOS); the policy that picks one of
// them is a table, with a reason for each rule.
export module hv.detect;
import core.std;
import core.text;
import core.cpuid;
import core.smbios;
export import hv.vm_guest;

export namespace fl::hv {

/// A hypervisor that was detected.
struct Sighting {
    VmGuest guest = VmGuest::bare;
    u32 base = 0;     // first CPUID leaf; 0: seen in SMBIOS only
    u32 max_leaf = 0; // last CPUID leaf
    FixedText<12> signature;
    u32 version = 0;       // major << 16 | minor, if reported (Xen, Hyper-V); 0 otherwise
    u32 build = 0;         // Hyper-V's build number
    u32 features = 0;      // KVM: leaf base+1 EAX; Hyper-V: base+3 EAX (privileges, low half); Xen: base+4 EAX
    u32 features_high = 0; // Hyper-V: base+3 EBX (privileges, high half); logged only
};

/// All hypervisors that were detected.
struct Sightings {
    static constexpr usize capacity = CpuidSnapshot::max_bases + 1;

    std::array<Sighting, capacity> list{};
    u32 count = 0;
    bool hypervisor_bit = false;

    constexpr std::span<const Sighting> all() const { return {list.data(), count}; }
    /// The first sighting of this hypervisor (lowest base), or nullptr.
    constexpr const Sighting* find(VmGuest guest) const {
        for (u32 i = 0; i < count; ++i) {
            if (list[i].guest == guest) {
                return &list[i];
            }
        }
        return nullptr;
    }
    constexpr bool has(VmGuest guest) const { return find(guest) != nullptr; }
};

/// Uses CPUID; SMBIOS strings only if CPUID shows no hypervisor. `smbios` may be nullptr.
Sightings detect(const CpuidSnapshot& cpuid, const Smbios* smbios);

/// Whether a VMBus is possible: a Hyper-V interface with hypercalls and SynIC [hv-tlfs §2.4.4]. Only connecting shows
/// whether there is one. The privileges to post messages and signal events are not required, since some hosts support
/// both and set neither bit.
bool offers_vmbus(const Sighting& sighting);

/// Whether messages and IOAPICs can address processors by 15-bit APIC ids [kvm-cpuid KVM_FEATURE_MSI_EXT_DEST_ID],
/// [xen-cpuid XEN_HVM_CPUID_EXT_DEST_ID].
bool offers_extended_destinations(const Sightings& sightings);

/// The user's choice. `guest`: use this backend, whatever was detected; `late`: install the backend after a fully
/// virtualised start, at the last point before buses are probed (hv=late, hv=late:xen).
struct Preference {
    std::optional<VmGuest> guest;
    bool late = false;
};

/// Parses "auto", a vm_guest name, "late", or "late:" and a vm_guest name; nothing for any other text.
std::optional<Preference> parse_preference(std::string_view text);

enum class When : u8 { entry, late };
constexpr std::string_view name(When when) { return when == When::entry ? "entry" : "late"; }

/// The selected backend.
struct Choice {
    VmGuest guest = VmGuest::bare;
    When when = When::entry;
    bool overridden = false; // by the command line
    bool unsighted = false;  // overridden with a hypervisor that was not detected: warn
    std::string_view reason; // static storage, one clause
};

/// One rule of the policy; the first match wins. The table is searched twice, first for hypervisors that this build
/// supports only, so that a supported one takes precedence over one that can only be named.
struct PolicyRule {
    VmGuest guest;
    bool (*applies)(const Sighting& sighting); // nullptr: matches if sighted
    std::string_view reason;
};
/// The rules in order of priority.
std::span<const PolicyRule> policy();

/// `built`: whether this build supports a guest; by default hv.vm_guest's built_for().
Choice choose(const Sightings& sightings, Preference preference, bool (*built)(VmGuest) = nullptr);

/// Logs each sighting, then the choice with its reason (and the warning).
void log_detection(const CpuidSnapshot& cpuid, const Sightings& sightings, const Choice& choice);

} // namespace fl::hv
