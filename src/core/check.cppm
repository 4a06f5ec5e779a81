// Assertions of the kernel's own invariants that are compiled out of release images: those on the hot path, and those
// that cost more than what they protect. Enabled in host builds and in kernels built with FIRSTLIGHT_CHECKS=ON. Input
// from hosts, devices and users is not checked here: those checks are always enabled and return an Error.
export module core.check;
import core.std;
import core.panic;

export namespace fl {

#ifdef FIRSTLIGHT_CHECKS
inline constexpr bool checks_enabled = true;
#else
inline constexpr bool checks_enabled = false;
#endif

/// Panics with `rule`, a statement of what must hold, if `holds` is false. `holds` must have no side effects. `rule` is
/// a pointer, not a view: without builtins the length of a literal is a call, which would remain when checks are off.
[[gnu::always_inline]] inline void check(bool holds, const char* rule) {
    if constexpr (checks_enabled) {
        if (!holds) [[unlikely]] {
            panic("check failed: {}", std::string_view(rule));
        }
    }
}

} // namespace fl
