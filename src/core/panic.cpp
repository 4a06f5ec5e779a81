module core.panic;
import core.std;

namespace fl {

namespace {
constinit PanicHook hook = nullptr;
} // namespace

void set_panic_hook(PanicHook to) { hook = to; }

[[noreturn]] void panic_with(std::string_view message) {
    if (hook != nullptr) {
        hook(message);
    }
    __builtin_trap();
}

} // namespace fl
