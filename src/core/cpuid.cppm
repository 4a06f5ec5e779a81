// A snapshot of CPUID, read once: under a hypervisor every CPUID exits. It is a plain value, so a recorded machine is
// one too.
//
// Hypervisors may be at 0x40000000, 0x40000100 … 0x4000ff00, and none announces the last one. If one of the first
// `usual_bases` holds one, the others are not tried: under a hypervisor each of them costs an exit. This would miss a
// machine with one interface among the first four and another one behind a gap. None is known: the interfaces of one
// host follow each other. QEMU shows three at most (Hyper-V, Xen, KVM); Xen itself moves by one for its Hyper-V
// interface [xen-cpuid], and so does KVM [kvm-cpuid]. If none of the four holds one, all are tried.
// The scan does not depend on the hypervisor bit (leaf 1, ECX 31): hypervisors can be configured to hide it while their
// leaves remain. On bare metal CPUID does not exit, and the whole scan takes microseconds. It is safe there because a
// base counts only if its answer is valid: for an unknown leaf, processors return the data of the highest basic leaf
// [SDM-2A CPUID].
export module core.cpuid;
import core.std;
import core.cpu_registers;
import core.text;

export namespace fl {

struct CpuidRegisters {
    u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
    friend constexpr bool operator==(const CpuidRegisters&, const CpuidRegisters&) = default;
};

/// One leaf. Leaves that depend on ECX are stored per subleaf.
struct CpuidLeaf {
    u32 leaf = 0;
    u32 subleaf = 0;
    CpuidRegisters value;
};

/// The first leaf of a hypervisor.
struct HypervisorBase {
    u32 base = 0;            // 0x40000000 + n * 0x100
    u32 max_leaf = 0;        // reported maximum, within [base, base + 0xff]
    FixedText<12> signature; // trailing NULs removed
};

/// The leaves that scan_cpuid() has stored.
struct CpuidSnapshot {
    static constexpr usize max_leaves = 160;
    static constexpr usize max_bases = 8;
    static constexpr u32 leaves_per_base = 32; // stored per hypervisor; the highest in use today is base + 0x10
    static constexpr u32 first_base = 0x40000000;
    static constexpr u32 last_base = 0x4000ff00;
    static constexpr u32 usual_bases = 4;

    std::array<CpuidLeaf, max_leaves> leaves{};
    std::array<HypervisorBase, max_bases> bases{};
    u32 leaf_count = 0;
    u32 base_count = 0;
    u32 executed = 0;       // CPUID instructions executed by the scan
    bool truncated = false; // a leaf or a base did not fit

    constexpr std::span<const CpuidLeaf> all() const { return {leaves.data(), leaf_count}; }
    constexpr std::span<const HypervisorBase> hypervisors() const { return {bases.data(), base_count}; }
    /// The registers of a stored leaf, or nothing.
    constexpr std::optional<CpuidRegisters> find(u32 leaf, u32 subleaf = 0) const {
        for (const CpuidLeaf& l : all()) {
            if (l.leaf == leaf && l.subleaf == subleaf) {
                return l.value;
            }
        }
        return std::nullopt;
    }
    /// Zeroes for a leaf that was not stored, so that its feature bits read as off.
    constexpr CpuidRegisters get(u32 leaf, u32 subleaf = 0) const {
        return find(leaf, subleaf).value_or(CpuidRegisters{});
    }

    constexpr u32 max_basic() const { return get(0).eax; }
    constexpr u32 max_extended() const { return get(0x80000000).eax; }
    constexpr bool hypervisor_bit() const { return Cpuid1Ecx::from(get(1).ecx).get(Cpuid1Ecx::hypervisor); }
    constexpr bool invariant_tsc() const {
        return Cpuid80000007Edx::from(get(0x80000007).edx).get(Cpuid80000007Edx::invariant_tsc);
    }
    /// "GenuineIntel", "AuthenticAMD"
    constexpr FixedText<12> vendor() const;
};

/// Twelve bytes from three registers, lowest byte first, without trailing NULs.
constexpr FixedText<12> text_of(u32 a, u32 b, u32 c) {
    std::array<char, 12> bytes{};
    for (usize i = 0; i < 12; ++i) {
        const u32 word = i < 4 ? a : i < 8 ? b : c;
        bytes[i] = static_cast<char>(word >> (i % 4 * 8) & 0xff);
    }
    usize size = 12;
    while (size > 0 && bytes[size - 1] == 0) {
        --size;
    }
    return FixedText<12>(std::string_view(bytes.data(), size));
}

constexpr FixedText<12> CpuidSnapshot::vendor() const {
    const CpuidRegisters r = get(0);
    return text_of(r.ebx, r.edx, r.ecx);
}

/// The hypervisor that answered at `base`, or nothing. Its highest leaf must be in the base's block of 256, and its
/// signature must be up to 12 printable characters, NUL-padded. Old KVM returns 0 as the highest leaf and means base +
/// 1 [kvm-cpuid]; this is accepted only for "KVMKVMKVM".
constexpr std::optional<HypervisorBase> hypervisor_at(u32 base, const CpuidRegisters& r) {
    // Nearly all of the 256 bases are empty: these are rejected before a text is built.
    if (r.ebx == 0 || (r.eax != 0 && (r.eax < base || r.eax > base + 0xff))) {
        return std::nullopt;
    }
    HypervisorBase found{base, r.eax, text_of(r.ebx, r.ecx, r.edx)};
    const std::string_view signature = found.signature.view();
    if (!std::ranges::all_of(signature, [](char c) { return c >= 0x20 && c <= 0x7e; })) {
        return std::nullopt;
    }
    if (r.eax == 0) {
        if (signature != "KVMKVMKVM") {
            return std::nullopt;
        }
        found.max_leaf = base + 1;
    }
    return found;
}

/// Executes CPUID through `read(leaf, subleaf) -> CpuidRegisters` and stores the leaves that this project uses. Called
/// once, by boot.
template <class Read>
    requires requires(Read& read, u32 leaf, u32 subleaf) {
        { read(leaf, subleaf) } -> std::convertible_to<CpuidRegisters>;
    }
constexpr void scan_cpuid(CpuidSnapshot& into, Read&& read) {
    into = {};
    auto keep = [&](u32 leaf, u32 subleaf, const CpuidRegisters& value) {
        if (into.leaf_count == CpuidSnapshot::max_leaves) {
            into.truncated = true;
            return;
        }
        into.leaves[into.leaf_count++] = {leaf, subleaf, value};
    };
    auto query = [&](u32 leaf, u32 subleaf) {
        ++into.executed;
        const CpuidRegisters value = read(leaf, subleaf);
        keep(leaf, subleaf, value);
        return value;
    };

    const u32 max_basic = query(0, 0).eax;
    // 1 features, 6 power (ARAT), 7 features, 0xd state sizes, 0x15 and 0x16 frequencies.
    for (u32 leaf : {1u, 6u, 7u, 0xdu, 0x15u, 0x16u}) {
        if (leaf <= max_basic) {
            query(leaf, 0);
        }
    }
    const u32 max_extended = query(0x80000000, 0).eax;
    if ((max_extended & 0xffff0000) == 0x80000000) {
        // 1 features (NX, long mode, 1 GiB pages), 7 invariant TSC, 8 address widths, 0xa SVM.
        for (u32 leaf : {0x80000001u, 0x80000007u, 0x80000008u, 0x8000000au}) {
            if (leaf <= max_extended) {
                query(leaf, 0);
            }
        }
    }
    for (u32 base = CpuidSnapshot::first_base; base <= CpuidSnapshot::last_base; base += 0x100) {
        if (base == CpuidSnapshot::first_base + CpuidSnapshot::usual_bases * 0x100 && into.base_count != 0) {
            break;
        }
        ++into.executed;
        const CpuidRegisters value = read(base, 0u);
        const auto found = hypervisor_at(base, value);
        if (!found) {
            continue;
        }
        if (into.base_count == CpuidSnapshot::max_bases) {
            into.truncated = true;
            continue;
        }
        into.bases[into.base_count++] = *found;
        keep(base, 0, value);
        const u32 end = std::min(found->max_leaf, base + CpuidSnapshot::leaves_per_base - 1);
        for (u32 leaf = base + 1; leaf <= end; ++leaf) {
            query(leaf, 0);
        }
        // Xen's time leaf has three subleaves (scale and offset in 1, host frequency in 2) [xen-cpuid].
        if (found->signature.view() == "XenVMMXenVMM" && found->max_leaf >= base + 3) {
            query(base + 3, 1);
            query(base + 3, 2);
        }
    }
}

/// The time stamp counter's frequency in Hz according to CPUID, or nothing. A hypervisor's timing leaf (0x40000010 EAX,
/// in kHz: defined by VMware, also used by QEMU with KVM, VirtualBox and ACRN; other hypervisors use this number for
/// other purposes) takes precedence over the processor's leaf 0x15 [SDM-2A CPUID.15H], which a hypervisor may pass
/// through from a host with a different rate.
constexpr std::optional<u64> tsc_hz_by_cpuid(const CpuidSnapshot& cpuid) {
    constexpr std::array<std::string_view, 4> with_timing_leaf{"VMwareVMware", "KVMKVMKVM", "VBoxVBoxVBox",
                                                               "ACRNACRNACRN"};
    auto plausible = [](u64 hz) -> std::optional<u64> {
        return hz >= 1'000'000 && hz <= 100'000'000'000 ? std::optional(hz) : std::nullopt;
    };
    for (const HypervisorBase& h : cpuid.hypervisors()) {
        if (h.base == CpuidSnapshot::first_base && h.max_leaf >= h.base + 0x10 &&
            std::ranges::find(with_timing_leaf, h.signature.view()) != with_timing_leaf.end()) {
            if (auto hz = plausible(u64{cpuid.get(h.base + 0x10).eax} * 1000)) {
                return hz;
            }
        }
    }
    const CpuidRegisters ratio = cpuid.get(0x15);
    if (ratio.eax == 0 || ratio.ebx == 0 || ratio.ecx == 0) {
        return std::nullopt;
    }
    return plausible(u64{ratio.ecx} * ratio.ebx / ratio.eax);
}

} // namespace fl
