// Panics whose message a death test can match. Include before the imports.
#pragma once
#include <cstdio>
#include <cstdlib>
import host.std;
import core.panic;

namespace fl::test {

/// Call it in the statement of an EXPECT_DEATH: from then on a panic prints its message to stderr and aborts. The
/// default hook traps silently, so that a death test could not distinguish a panic from a crash.
inline void panic_prints() {
    set_panic_hook([](std::string_view message) {
        std::fprintf(stderr, "panic: %.*s\n", static_cast<int>(message.size()), message.data());
        std::abort();
    });
}

} // namespace fl::test
