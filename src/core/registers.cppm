// Typed registers. A register is a struct that names its fields as the manual does, high bit first, each with its
// access attribute. It is a value of the register's width and costs no more than an integer. It is read and written
// through a RegisterAccess: memory (core.mmio), I/O ports, PCI configuration space, or a test script that also checks
// the order of accesses.
//
//     struct Control : Register<Control, u16> {                          // [PCI-3.0 §6.8.2.3]
//         static constexpr u64 offset = 2;                               // in its block: here, of the capability
//         static constexpr Bit<15> enable{};
//         static constexpr Bit<14> function_mask{};
//         static constexpr Field<10, 0, Attribute::read_only> last{};
//         static constexpr auto layout = fields(enable, function_mask, last);
//     };
//     Control control = Control::read(device, capability);
//     control.set(Control::enable, true).write(device, capability);
//
// These do not compile: overlapping fields, a field wider than the register, a field of another register, a field that
// is missing in `layout`, writing a read-only or reserved field, reading a write-only one, and a constant that is too
// large for its field.
export module core.registers;
import core.std;
import core.panic;

export namespace fl {

/// Register widths: 8, 16, 32 or 64 bits.
template <class T>
concept RegisterValue = std::same_as<T, u8> || std::same_as<T, u16> || std::same_as<T, u32> || std::same_as<T, u64>;

/// Access to registers of one width. `at` is an offset in bytes. Each call performs one access of exactly this width,
/// in program order.
template <class A, class T>
concept RegisterAccess = RegisterValue<T> && requires(A& access, u64 at, T value) {
    { access.template read<T>(at) } -> std::same_as<T>;
    access.template write<T>(at, value);
};

/// Access attribute of a field.
enum class Attribute : u8 {
    read_write,
    read_only,
    write_only,        // value read is undefined
    write_1_to_clear,  // writing 1 clears it, writing 0 does not; change() writes 0
    reserved_preserve, // must be written back as read; so are bits that no field covers
    reserved_zero,     // must be written as 0; write() does so
};
constexpr bool can_read(Attribute a) {
    return a == Attribute::read_write || a == Attribute::read_only || a == Attribute::write_1_to_clear;
}
constexpr bool can_set(Attribute a) { return a == Attribute::read_write || a == Attribute::write_only; }

template <class Owner, RegisterValue Value, unsigned High, unsigned Low, Attribute What, class T>
struct RegisterField {
    static_assert(High >= Low, "the high bit of a register's field comes first");
    static_assert(High < 8 * sizeof(Value), "a field lies outside of its register");
    static_assert(std::is_enum_v<T> || std::is_integral_v<T>);
    using Register = Owner;
    using Type = T;
    static constexpr unsigned low = Low;
    static constexpr Attribute attribute = What;
    static constexpr Value limit =
        static_cast<Value>(static_cast<Value>(~Value{0}) >> (8 * sizeof(Value) - 1 - High + Low));
    static constexpr Value mask = static_cast<Value>(limit << Low);
};

/// All fields of a register, and the bits that need care on writes.
template <RegisterValue Value, class... Fields>
struct RegisterLayout {
    static constexpr Value of(Attribute attribute) {
        return static_cast<Value>((Value{0} | ... | (Fields::attribute == attribute ? Fields::mask : Value{0})));
    }
    static constexpr bool overlap() {
        Value seen = 0;
        bool both = false;
        ((both = both || (seen & Fields::mask) != 0, seen = static_cast<Value>(seen | Fields::mask)), ...);
        return both;
    }
    static_assert(!overlap(), "two fields of a register overlap");
    template <class F>
    static constexpr bool has = (std::same_as<F, Fields> || ...);
};

/// A field of this register that its layout lists.
template <class F, class R>
concept FieldOf = std::same_as<typename F::Register, R> && R::layout.template has<F>;
template <class F, class R>
concept ReadableField = FieldOf<F, R> && can_read(F::attribute);
template <class F, class R>
concept WritableField = FieldOf<F, R> && can_set(F::attribute);
/// A bit that can be written as 1: to set it, or to clear a write_1_to_clear bit.
template <class F, class R>
concept SingleBitField =
    FieldOf<F, R> && F::limit == 1 && (can_set(F::attribute) || F::attribute == Attribute::write_1_to_clear);

/// Base of a register struct, which defines `layout` and, for accesses, `offset`. An aggregate of the raw value.
template <class Derived, RegisterValue Int>
struct Register {
    using Value = Int;
    template <unsigned High, unsigned Low, Attribute What = Attribute::read_write, class T = Int>
    using Field = RegisterField<Derived, Int, High, Low, What, T>;
    template <unsigned At, Attribute What = Attribute::read_write, class T = bool>
    using Bit = RegisterField<Derived, Int, At, At, What, T>;

    Int raw = 0;

    template <class... F>
    static consteval RegisterLayout<Int, F...> fields(F...) {
        return {};
    }
    static constexpr Derived from(Int raw) {
        Derived value{};
        value.raw = raw;
        return value;
    }
    /// A value with exactly these bits set.
    template <class... F>
        requires(SingleBitField<F, Derived> && ...)
    static constexpr Derived of(F...) {
        return from(static_cast<Int>((Int{0} | ... | F::mask)));
    }

    template <ReadableField<Derived> F>
    constexpr typename F::Type get(F) const {
        return static_cast<typename F::Type>((raw & F::mask) >> F::low);
    }
    /// A value that does not fit the field is truncated; test builds panic.
    template <WritableField<Derived> F>
    constexpr Derived& set(F, typename F::Type value) {
        const auto bits = static_cast<Int>(value);
#if __STDC_HOSTED__
        if (bits > F::limit) {
            panic("{:#x} does not fit into a register's field: at most {:#x}", u64{bits}, u64{F::limit});
        }
#endif
        raw = static_cast<Int>((raw & static_cast<Int>(~F::mask)) | ((bits << F::low) & F::mask));
        return static_cast<Derived&>(*this);
    }
    /// True if all of these bits are set.
    template <class... F>
        requires(ReadableField<F, Derived> && ...)
    constexpr bool has(F...) const {
        constexpr Int mask = static_cast<Int>((Int{0} | ... | F::mask));
        return (raw & mask) == mask;
    }
    friend constexpr bool operator==(const Register&, const Register&) = default;

    /// One access. `block`: base address that `offset` is relative to (a capability, a table entry).
    template <RegisterAccess<Int> A>
    static Derived read(A&& access, u64 block = 0) {
        return from(access.template read<Int>(block + Derived::offset));
    }
    /// One access. reserved_zero bits are written as 0.
    template <RegisterAccess<Int> A>
    void write(A&& access, u64 block = 0) const {
        constexpr Int zero = Derived::layout.of(Attribute::reserved_zero);
        access.template write<Int>(block + Derived::offset, static_cast<Int>(raw & static_cast<Int>(~zero)));
    }
    /// Two accesses: reads, modifies with `edit(Derived&)`, writes. write_1_to_clear bits are written as 0 unless
    /// `edit` calls clear() on them.
    template <RegisterAccess<Int> A, class Edit>
    static Derived change(A&& access, u64 block, Edit&& edit) {
        Derived value = read(access, block);
        constexpr Int ones_clear = Derived::layout.of(Attribute::write_1_to_clear);
        value.raw = static_cast<Int>(value.raw & static_cast<Int>(~ones_clear));
        edit(value);
        value.write(access, block);
        return value;
    }
    /// Writes a 1 to this field, so that the next write() clears it.
    template <FieldOf<Derived> F>
        requires(F::attribute == Attribute::write_1_to_clear)
    constexpr Derived& clear(F) {
        raw = static_cast<Int>(raw | F::mask);
        return static_cast<Derived&>(*this);
    }
};

} // namespace fl
