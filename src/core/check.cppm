// Checks of the kernel's own rules that a release image does without: rules of the hot path, and rules whose check
// costs more than what it protects. On in host builds and in kernels that are built with FIRSTLIGHT_CHECKS=ON.
// Values of hosts, devices and users are not checked here: those checks are always on, and end in an Error.
export module core.check;
import core.std;
import core.panic;

export namespace fl {

#ifdef FIRSTLIGHT_CHECKS
inline constexpr bool checks_enabled = true;
#else
inline constexpr bool checks_enabled = false;
#endif

/// Panics with `rule`, which says what must hold, when it does not. `holds` must have no side effects: a release image
/// does not evaluate it.
[[gnu::always_inline]] inline void check(bool holds, std::string_view rule) {
    if constexpr (checks_enabled) {
        if (!holds) [[unlikely]] {
            panic("check failed: {}", rule);
        }
    }
}

} // namespace fl
