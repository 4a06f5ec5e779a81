// panic(): for broken invariants of our own, never for what a host, a disk or a person said.
export module core.panic;
import core.std;
import core.text;

export namespace fl {

/// What ends the machine once the message is complete: the kernel's report with registers and backtrace; a host test
/// keeps the default, which traps. Must not return.
using PanicHook = void (*)(std::string_view message);
void set_panic_hook(PanicHook hook);

/// Ends the machine with this message.
[[noreturn]] void panic_with(std::string_view message);

/// Formats at most 256 bytes and ends the machine. Usable everywhere: allocates nothing, takes no lock.
template <class... Args>
[[noreturn]] void panic(text_detail::Format<std::type_identity_t<std::remove_cvref_t<Args>>...> format,
                        const Args&... args) {
    FixedText<256> message;
    print(message, format, args...);
    panic_with(message.view());
}

} // namespace fl
