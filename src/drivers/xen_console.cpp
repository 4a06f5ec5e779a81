module;
#include "core/try.hpp"
module drivers.xen_console;
import core.std;
import core.result;
import core.log;
import io.executor;
import io.shutdown;
import io.task;
import hv.xen;
import drivers.driver;

namespace fl::drivers::xen_console {

Console::Console(Environment& environment, hv::Xen& xen)
    : BusDevice(device_type, 0), environment_(environment), xen_(xen), input_(xen.console_page()),
      tasks_(environment.executor) {}

Console::~Console() {
    if (bound_) {
        environment_.executor.remove(*this);
    }
}

Result<void> Console::connect() {
    if (xen_.console_page() == nullptr || environment_.shutdown == nullptr) {
        return Error{Code::not_supported, "there is no console, or nothing that its input could end"};
    }
    environment_.executor.add(*this);
    bound_ = true;
    CHECK(xen_.events().bind(xen_.console_port(), on_event, this));
    environment_.executor.raise(*this); // something may have been typed before
    return {};
}

// In another domain the event channel is another one.
void Console::resumed(bool moved) {
    if (!moved) {
        return;
    }
    if (auto again = xen_.events().bind(xen_.console_port(), on_event, this); !again) {
        log::warning("xen_console: its input is ignored from now on: {}", again.error());
        return;
    }
    environment_.executor.raise(*this);
}

// Runs in the upcall.
void Console::on_event(void* self) {
    Console& console = *static_cast<Console*>(self);
    console.environment_.executor.raise(console);
}

// One ring in each turn: an end that types without pause does not keep the processor from its other work.
bool Console::drain() {
    std::array<char, hv::xen::console_in_bytes> text;
    static_cast<void>(xen_.events().unmask(xen_.console_port())); // before the look: what comes later is an event
    const auto taken = input_.take(text);
    if (!taken) {
        log::warning("xen_console: {}: its input is ignored from now on", taken.error());
        xen_.events().mask(xen_.console_port());
        return false;
    }
    if (*taken != 0) {
        static_cast<void>(xen_.events().send(xen_.console_port())); // there is room again
        type(std::string_view(text.data(), *taken));
    }
    return *taken != 0;
}

void Console::type(std::string_view text) {
    if (text.find(interrupt_key) == std::string_view::npos) {
        return;
    }
    log::info("xen_console: Ctrl-C");
    if (environment_.shutdown->request("Ctrl-C at Xen's console")) {
        if (auto begun = tasks_.spawn(shut_down()); !begun) {
            environment_.shutdown->answered();
        }
    }
}

io::Task<Result<void>> Console::shut_down() {
    static_cast<void>(co_await environment_.shutdown->await_quiesced());
    environment_.shutdown->answered(); // the answer is the end of the domain
    co_return Result<void>{};
}

io::Task<Result<void>> probe(Environment& environment, hv::Xen& xen, const hv::SyntheticDevice&) {
    auto* console = new (std::nothrow) Console(environment, xen); // lives until machine shutdown
    if (console == nullptr) {
        co_return Error{Code::exhausted, "no memory for the console's input"};
    }
    auto connected = console->connect();
    if (!connected) {
        delete console;
    } else {
        xen.devices().add(*console);
    }
    co_return connected;
}

} // namespace fl::drivers::xen_console
