// panic(): for violated kernel invariants only, never for bad input from a host, a disk or a user.
export module core.panic;
import core.std;
import core.text;

export namespace fl {

/// Called with the complete message; must not return. The kernel's hook reports registers and a backtrace; host tests
/// keep the default, which traps.
using PanicHook = void (*)(std::string_view message);
void set_panic_hook(PanicHook hook);

/// Stops the machine with this message.
[[noreturn]] void panic_with(std::string_view message);

/// Formats at most 256 bytes and stops the machine. Callable everywhere: allocates nothing, takes no lock.
template <class... Args>
[[noreturn]] void panic(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format,
                        const Args&... args) {
    FixedText<256> message;
    print(message, format, args...);
    panic_with(message.view());
}

} // namespace fl
