// The subset of the C++20 library that the project uses, in the kernel and on the host: what libc++ offers without an
// operating system. Omissions are deliberate (no hidden allocation, no locale, no clock).
module;
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <compare>
#include <concepts>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <source_location>
#include <span>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
export module core.std;

export namespace std {
// <cstddef>, <cstdint>, <cstring>, <new>
using std::align_val_t;
using std::byte;
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::memcmp;
using std::memcpy;
using std::memmove;
using std::memset;
using std::nothrow;
using std::nothrow_t;
using std::nullptr_t;
using std::ptrdiff_t;
using std::size_t;
using std::to_integer;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
using std::uintptr_t;
using std::operator|;
using std::operator&;
using std::operator^;
using std::operator~;

// <concepts>, <type_traits>
using std::assignable_from;
using std::conditional_t;
using std::constructible_from;
using std::convertible_to;
using std::copyable;
using std::decay_t;
using std::default_initializable;
using std::derived_from;
using std::destructible;
using std::enable_if_t;
using std::equality_comparable;
using std::false_type;
using std::floating_point;
using std::integral;
using std::invocable;
using std::invoke_result_t;
using std::is_const_v;
using std::is_convertible_v;
using std::is_enum_v;
using std::is_integral_v;
using std::is_lvalue_reference_v;
using std::is_move_constructible_v;
using std::is_nothrow_move_constructible_v;
using std::is_pointer_v;
using std::is_same_v;
using std::is_standard_layout_v;
using std::is_trivially_copyable_v;
using std::is_trivially_destructible_v;
using std::is_unsigned_v;
using std::is_void_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::movable;
using std::regular;
using std::remove_const_t;
using std::remove_cv_t;
using std::remove_cvref_t;
using std::remove_pointer_t;
using std::remove_reference_t;
using std::same_as;
using std::signed_integral;
using std::totally_ordered;
using std::true_type;
using std::type_identity;
using std::type_identity_t;
using std::underlying_type_t;
using std::unsigned_integral;

// <compare>, <utility>, <tuple>, <limits>, <initializer_list>, <source_location>
using std::apply;
using std::as_const;
using std::cmp_equal;
using std::cmp_greater;
using std::cmp_less;
using std::common_comparison_category_t;
using std::declval;
using std::exchange;
using std::forward;
using std::get;
using std::in_place;
using std::in_place_index;
using std::in_place_index_t;
using std::in_place_t;
using std::in_place_type;
using std::in_range;
using std::index_sequence;
using std::index_sequence_for;
using std::initializer_list;
using std::integer_sequence;
using std::make_index_sequence;
using std::make_pair;
using std::make_tuple;
using std::move;
using std::numeric_limits;
using std::pair;
using std::partial_ordering;
using std::source_location;
using std::strong_ordering;
using std::swap;
using std::tie;
using std::tuple;
using std::tuple_element_t;
using std::tuple_size;
using std::tuple_size_v;
using std::weak_ordering;

// <bit>, <charconv>
using std::bit_cast;
using std::bit_ceil;
using std::bit_floor;
using std::bit_width;
using std::countl_one;
using std::countl_zero;
using std::countr_one;
using std::countr_zero;
using std::endian;
using std::errc;
using std::from_chars;
using std::from_chars_result;
using std::has_single_bit;
using std::popcount;
using std::rotl;
using std::rotr;
using std::to_chars;
using std::to_chars_result;

// <array>, <span>, <string_view>, <optional>, <variant>, <memory>, <iterator>
using std::addressof;
using std::array;
using std::as_bytes;
using std::as_writable_bytes;
using std::begin;
using std::bidirectional_iterator;
using std::construct_at;
using std::contiguous_iterator;
using std::data;
using std::default_delete;
using std::destroy_at;
using std::dynamic_extent;
using std::end;
using std::forward_iterator;
using std::get_if;
using std::holds_alternative;
using std::make_optional;
using std::monostate;
using std::nullopt;
using std::nullopt_t;
using std::optional;
using std::random_access_iterator;
using std::size;
using std::span;
using std::ssize;
using std::string_view;
using std::to_address;
using std::to_array;
using std::unique_ptr;
using std::variant;
using std::variant_alternative_t;
using std::variant_size_v;
using std::visit;
using std::operator==;
using std::operator<=>;

// <algorithm>
using std::all_of;
using std::any_of;
using std::clamp;
using std::copy;
using std::copy_n;
using std::count;
using std::count_if;
using std::equal;
using std::fill;
using std::fill_n;
using std::find;
using std::find_if;
using std::lexicographical_compare;
using std::lower_bound;
using std::max;
using std::max_element;
using std::min;
using std::min_element;
using std::none_of;
using std::rotate;
using std::search;
using std::sort;
using std::stable_sort;
using std::upper_bound;
namespace ranges {
using std::ranges::all_of;
using std::ranges::any_of;
using std::ranges::copy;
using std::ranges::count_if;
using std::ranges::equal;
using std::ranges::fill;
using std::ranges::find;
using std::ranges::find_if;
using std::ranges::lower_bound;
using std::ranges::max;
using std::ranges::max_element;
using std::ranges::min;
using std::ranges::none_of;
using std::ranges::reverse;
using std::ranges::sort;
using std::ranges::upper_bound;
} // namespace ranges

// <atomic>
using std::atomic;
using std::atomic_bool;
using std::atomic_flag;
using std::atomic_ref;
using std::atomic_signal_fence;
using std::atomic_thread_fence;
using std::memory_order;
using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;

// <coroutine>
using std::coroutine_handle;
using std::coroutine_traits;
using std::noop_coroutine;
using std::noop_coroutine_handle;
using std::suspend_always;
using std::suspend_never;
} // namespace std

// For importers, argument-dependent lookup finds these operators in std's inline namespace only if they are exported.
export namespace std::inline __1 {
using std::__1::operator==;
using std::__1::operator<=>;
} // namespace std::inline __1

// operator new (placement) is found in the global namespace.
export using ::operator new;
export using ::operator delete;

export namespace fl {
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using usize = std::size_t;

inline namespace literals {
consteval u64 operator""_KiB(unsigned long long n) { return n << 10; }
consteval u64 operator""_MiB(unsigned long long n) { return n << 20; }
consteval u64 operator""_GiB(unsigned long long n) { return n << 30; }
consteval u64 operator""_us(unsigned long long n) { return n * 1'000; }
consteval u64 operator""_ms(unsigned long long n) { return n * 1'000'000; }
consteval u64 operator""_s(unsigned long long n) { return n * 1'000'000'000; }
} // namespace literals

// C++23's to_underlying, which libc++ does not provide in C++20.
template <class E>
    requires std::is_enum_v<E>
constexpr std::underlying_type_t<E> to_underlying(E e) {
    return static_cast<std::underlying_type_t<E>>(e);
}

template <std::unsigned_integral T>
constexpr T align_up(T value, T alignment) { // alignment: a power of two
    return (value + alignment - 1) & ~(alignment - 1);
}
template <std::unsigned_integral T>
constexpr T align_down(T value, T alignment) {
    return value & ~(alignment - 1);
}
} // namespace fl
