// KVM's guest interface: feature bits, MSRs and the clock page [kvm-cpuid], [kvm-msr]. No I/O.
export module hv.kvm.protocol;
import core.std;

export namespace fl::hv::kvm {

/// Leaf base + 1, EAX [kvm-cpuid].
enum class Feature : u32 {
    clocksource = 1u << 0,         // the clock at the old MSRs 0x11 and 0x12
    clocksource2 = 1u << 3,        // the clock at msr_system_time
    pv_eoi = 1u << 6,              // not used: saves an exit per interrupt only without APIC virtualisation
    clocksource_stable = 1u << 24, // consistent between processors
};
constexpr bool has(u32 features, Feature f) { return (features & to_underlying(f)) != 0; }

// physical address of a ClockPage, bit 0: enable [kvm-msr MSR_KVM_SYSTEM_TIME_NEW]
inline constexpr u32 msr_system_time = 0x4b564d01;

/// Written by the host on each entry of the processor; `version` is odd during an update. Little endian, 4-byte
/// aligned, must not cross a page boundary [kvm-msr MSR_KVM_SYSTEM_TIME_NEW].
struct ClockPage {
    u32 version;
    u32 pad0;
    u64 tsc_timestamp;     // counter value at system_time
    u64 system_time;       // nanoseconds
    u32 tsc_to_system_mul; // fraction of 2^32
    i8 tsc_shift;          // applied to the counter difference; > 0: to the left
    u8 flags;              // bit 0: stable
    u8 pad[2];
};
static_assert(sizeof(ClockPage) == 32 && std::is_standard_layout_v<ClockPage> &&
              std::is_trivially_copyable_v<ClockPage>);
static_assert(__builtin_offsetof(ClockPage, version) == 0 && __builtin_offsetof(ClockPage, pad0) == 4 &&
              __builtin_offsetof(ClockPage, tsc_timestamp) == 8 && __builtin_offsetof(ClockPage, system_time) == 16 &&
              __builtin_offsetof(ClockPage, tsc_to_system_mul) == 24 &&
              __builtin_offsetof(ClockPage, tsc_shift) == 28 && __builtin_offsetof(ClockPage, flags) == 29 &&
              __builtin_offsetof(ClockPage, pad) == 30);

/// The counter's frequency in Hz, given that ns = ((difference << shift) * mul) >> 32; 0 if the values are invalid (a
/// multiplier of 0, or a shift of more than 31 bits).
constexpr u64 frequency_of(u32 mul, i8 shift) {
    if (mul == 0 || shift > 31 || shift < -31) {
        return 0;
    }
    const u64 unshifted = (1'000'000'000ull << 32) / mul;
    if (shift >= 0) {
        return unshifted >> shift;
    }
    const int left = -shift;
    return unshifted > (~u64{0} >> left) ? 0 : unshifted << left;
}

} // namespace fl::hv::kvm
