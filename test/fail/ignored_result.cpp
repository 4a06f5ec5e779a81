// An ignored Result.
// expect: ignoring return value
import core.std;
import core.result;

namespace {
fl::Result<void> write_something() { return {}; }
[[maybe_unused]] void caller() { write_something(); }
} // namespace
