// Registers of local APICs [SDM-3 11] and IOAPICs [82093AA 3]. Layouts only: core.machine.lapic and
// core.machine.interrupts access them.
export module core.apic;
import core.std;
import core.registers;

export namespace fl::apic {

/// Delivery mode, in redirection entries, the local vector table and the interrupt command register [SDM-3 11.5.1],
/// [82093AA 3.2.4].
enum class Delivery : u8 { fixed = 0, lowest_priority = 1, smi = 2, nmi = 4, init = 5, startup = 6, external = 7 };

// ---- local APIC: `offset` in its page; the MSR of an x2APIC is 0x800 + offset / 16 [SDM-3 11.12.1.2] ----

struct SpuriousVector : Register<SpuriousVector, u32> {
    static constexpr u64 offset = 0xf0;
    static constexpr Bit<8> enable{}; // software enable of the APIC
    static constexpr Field<7, 0, Attribute::read_write, u8> vector{};
    static constexpr auto layout = fields(enable, vector);
};
/// An entry of the local vector table: timer, LINT0, LINT1, error.
struct LocalVector : Register<LocalVector, u32> {
    enum class TimerMode : u8 { one_shot = 0, periodic = 1, tsc_deadline = 2 };
    static constexpr Field<18, 17, Attribute::read_write, TimerMode> timer_mode{};
    static constexpr Bit<16> mask{};
    static constexpr Bit<15> level_triggered{};
    static constexpr Bit<14, Attribute::read_only> remote_irr{};
    static constexpr Bit<13> active_low{};
    static constexpr Bit<12, Attribute::read_only> pending{};
    static constexpr Field<10, 8, Attribute::read_write, Delivery> delivery{};
    static constexpr Field<7, 0, Attribute::read_write, u8> vector{};
    static constexpr auto layout =
        fields(timer_mode, mask, level_triggered, remote_irr, active_low, pending, delivery, vector);
};
/// Low half of the interrupt command register; writing it sends the interrupt [SDM-3 11.6.1].
struct CommandLow : Register<CommandLow, u32> {
    static constexpr u64 offset = 0x300;
    static constexpr Field<19, 18> shorthand{}; // 0: use the destination in the high half
    static constexpr Bit<15> level_triggered{};
    static constexpr Bit<14> assert{};
    static constexpr Bit<12, Attribute::read_only> pending{};
    static constexpr Bit<11> logical{};
    static constexpr Field<10, 8, Attribute::read_write, Delivery> delivery{};
    static constexpr Field<7, 0, Attribute::read_write, u8> vector{};
    static constexpr auto layout = fields(shorthand, level_triggered, assert, pending, logical, delivery, vector);
};
struct CommandHigh : Register<CommandHigh, u32> {
    static constexpr u64 offset = 0x310;
    static constexpr Field<31, 24> destination{};
    static constexpr auto layout = fields(destination);
};
/// xAPIC mode only; an x2APIC id has 32 bits.
struct LocalId : Register<LocalId, u32> {
    static constexpr u64 offset = 0x20;
    static constexpr Field<31, 24, Attribute::read_only> id{};
    static constexpr auto layout = fields(id);
};

// ---- IOAPIC: `offset` is the index of a register ----

struct IoVersion : Register<IoVersion, u32> {
    static constexpr u64 offset = 1;
    static constexpr Field<23, 16, Attribute::read_only> last_entry{};
    static constexpr Field<7, 0, Attribute::read_only> version{};
    static constexpr auto layout = fields(last_entry, version);
};
/// Halves of a redirection entry; `block` is 2 * pin [82093AA 3.2.4]. Write the low half last: it unmasks.
struct RedirectionLow : Register<RedirectionLow, u32> {
    static constexpr u64 offset = 0x10;
    static constexpr Bit<16> mask{};
    static constexpr Bit<15> level_triggered{};
    static constexpr Bit<14, Attribute::read_only> remote_irr{};
    static constexpr Bit<13> active_low{};
    static constexpr Bit<12, Attribute::read_only> pending{};
    static constexpr Bit<11> logical{};
    static constexpr Field<10, 8, Attribute::read_write, Delivery> delivery{};
    static constexpr Field<7, 0, Attribute::read_write, u8> vector{};
    static constexpr auto layout =
        fields(mask, level_triggered, remote_irr, active_low, pending, logical, delivery, vector);
};
struct RedirectionHigh : Register<RedirectionHigh, u32> {
    static constexpr u64 offset = 0x11;
    static constexpr Field<31, 24> destination{};
    // Bits 14:8 of the APIC id, if the hypervisor supports them [kvm-cpuid KVM_FEATURE_MSI_EXT_DEST_ID].
    static constexpr Field<23, 17> extended_destination{};
    static constexpr auto layout = fields(destination, extended_destination);
};

/// RegisterAccess by index, through an IOAPIC's select and window registers [82093AA 3.1]: two accesses each.
template <RegisterAccess<u32> A>
class IndexedAccess {
  public:
    static constexpr u64 select_at = 0x00;
    static constexpr u64 window_at = 0x10;
    static constexpr u64 size = 0x20; // bytes to map

    constexpr IndexedAccess() = default;
    constexpr explicit IndexedAccess(A access) : access_(access) {}
    template <std::same_as<u32> T>
    T read(u64 index) const {
        access_.template write<u32>(select_at, static_cast<u32>(index));
        return access_.template read<u32>(window_at);
    }
    template <std::same_as<u32> T>
    void write(u64 index, T value) const {
        access_.template write<u32>(select_at, static_cast<u32>(index));
        access_.template write<u32>(window_at, value);
    }

  private:
    mutable A access_{};
};

} // namespace fl::apic
