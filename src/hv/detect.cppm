// Where are we? Sightings are facts (every hypervisor that CPUID shows, what SMBIOS says); the policy that picks one of
// them is data and gives its reason.
export module hv.detect;
import core.std;
import core.text;
import core.cpuid;
import core.smbios;
export import hv.vm_guest;

export namespace fl::hv {

/// One hypervisor that showed itself.
struct Sighting {
    VmGuest guest = VmGuest::bare;
    u32 base = 0;     // its first CPUID leaf; 0: seen in SMBIOS only
    u32 max_leaf = 0; // its last one
    FixedText<12> signature;
    u32 version = 0;       // major << 16 | minor, where it says so (Xen, Hyper-V); 0 elsewhere
    u32 build = 0;         // Hyper-V's build number
    u32 features = 0;      // KVM: leaf base+1 EAX; Hyper-V: base+3 EAX (privileges, low half); Xen: base+4 EAX
    u32 features_high = 0; // Hyper-V: base+3 EBX (privileges, high half); told, and nothing is ruled out by it
};

struct Sightings {
    static constexpr usize capacity = CpuidSnapshot::max_bases + 1;

    std::array<Sighting, capacity> list{};
    u32 count = 0;
    bool hypervisor_bit = false;

    constexpr std::span<const Sighting> all() const { return {list.data(), count}; }
    /// The first sighting of that hypervisor (lowest base), or nullptr.
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

/// CPUID first; SMBIOS's strings only when CPUID shows no hypervisor at all. `smbios` may be nullptr.
Sightings detect(const CpuidSnapshot& cpuid, const Smbios* smbios);

/// Whether a VMBus is possible: Hyper-V's interface with hypercalls and SynIC [hv-tlfs §2.4.4]. Whether there is one is
/// only known when it has been asked; the bits for posting messages and signalling events are not demanded, since hosts
/// exist that answer both and set neither.
bool offers_vmbus(const Sighting& sighting);

/// Whether messages and IOAPICs may name processors by 15-bit APIC ids [kvm-cpuid KVM_FEATURE_MSI_EXT_DEST_ID],
/// [xen-cpuid XEN_HVM_CPUID_EXT_DEST_ID].
bool offers_extended_destinations(const Sightings& sightings);

/// What the person wants. `guest`: that one, whatever was sighted; `late`: the backend is installed after a fully
/// virtualised start, at the last point before buses are probed (hv=late, hv=late:xen).
struct Preference {
    std::optional<VmGuest> guest;
    bool late = false;
};

/// "auto", a vm_guest name, "late" or "late:" and a vm_guest name; nothing on any other text.
std::optional<Preference> parse_preference(std::string_view text);

enum class When : u8 { entry, late };
constexpr std::string_view name(When when) { return when == When::entry ? "entry" : "late"; }

struct Choice {
    VmGuest guest = VmGuest::bare;
    When when = When::entry;
    bool overridden = false; // by the command line
    bool unsighted = false;  // overridden with something that did not show itself: a warning is due
    std::string_view reason; // static storage, one clause
};

/// The policy, first match wins. Twice through: the first time only what this build has a module for, so that a
/// hypervisor which can be used beats one that can only be named.
struct PolicyRule {
    VmGuest guest;
    bool (*applies)(const Sighting& sighting); // nullptr: whenever sighted
    std::string_view reason;
};
std::span<const PolicyRule> policy();

/// `built`: what there are modules for; the default asks hv.vm_guest's built_for().
Choice choose(const Sightings& sightings, Preference preference, bool (*built)(VmGuest) = nullptr);

/// Lines for people: each sighting, then the choice with its reason (and the warning).
void log_detection(const CpuidSnapshot& cpuid, const Sightings& sightings, const Choice& choice);

} // namespace fl::hv
