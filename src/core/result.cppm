// Error and Result: a subset of C++23's std::expected. The TRY and CO_TRY macros are in core/try.hpp.
export module core.result;
import core.std;

export namespace fl {

/// Error category. The details are in Error::message.
enum class Code : u8 {
    bad_argument,  // invalid request from the caller (command line, map file, unaligned access)
    not_found,     // no such disk, key, node, device
    not_supported, // not offered by the host, by the device or by this build
    exhausted,     // memory, frames, slots, coroutine frames
    timed_out,     // the bound of a wait was reached
    cancelled,     // withdrawn by its owner
    io,            // the device reports an error
    device_gone,   // closed, unplugged, rescinded
    protocol,      // the peer violated its specification
    corrupt,       // data read differs from data written
    busy,          // held by another user
};

constexpr std::string_view name(Code code) {
    using enum Code;
    switch (code) {
    case bad_argument: return "bad argument";
    case not_found: return "not found";
    case not_supported: return "not supported";
    case exhausted: return "exhausted";
    case timed_out: return "timed out";
    case cancelled: return "cancelled";
    case io: return "i/o error";
    case device_gone: return "device gone";
    case protocol: return "protocol error";
    case corrupt: return "corrupt data";
    case busy: return "busy";
    }
    return "unknown";
}

/// A fixed-size value. `message` refers to static storage and says what was expected and what to do. `expected` and
/// `seen` are printed if `has_values`.
struct Error {
    Code code;
    std::string_view message;
    bool has_values = false;
    u64 expected = 0;
    u64 seen = 0;

    constexpr Error(Code c, std::string_view text) : code(c), message(text) {}
    constexpr Error(Code c, std::string_view text, u64 want, u64 got)
        : code(c), message(text), has_values(true), expected(want), seen(got) {}
};

/// A value or an Error. Discarding one is a compile-time warning, which this build treats as an error.
template <class T = void>
class [[nodiscard]] Result {
    static_assert(!std::is_lvalue_reference_v<T>, "a Result holds values; return a pointer for a reference");

  public:
    using value_type = T;
    constexpr Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
    constexpr Result(Error error) : state_(std::in_place_index<1>, error) {}

    constexpr explicit operator bool() const { return state_.index() == 0; }
    constexpr bool has_value() const { return state_.index() == 0; }
    constexpr T& operator*() & { return *std::get_if<0>(&state_); }
    constexpr const T& operator*() const& { return *std::get_if<0>(&state_); }
    constexpr T&& operator*() && { return std::move(*std::get_if<0>(&state_)); }
    constexpr T* operator->() { return std::get_if<0>(&state_); }
    constexpr const T* operator->() const { return std::get_if<0>(&state_); }
    constexpr const Error& error() const { return *std::get_if<1>(&state_); }
    constexpr T value_or(T other) const { return has_value() ? **this : std::move(other); }

  private:
    std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
  public:
    using value_type = void;
    constexpr Result() = default;
    constexpr Result(Error error) : error_(error) {}

    constexpr explicit operator bool() const { return !error_; }
    constexpr bool has_value() const { return !error_; }
    constexpr const Error& error() const { return *error_; }

  private:
    std::optional<Error> error_;
};

} // namespace fl
