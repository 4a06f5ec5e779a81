// A task that is not awaited would never start.
// expect: ignoring return value
import core.std;
import core.result;
import io.task;

namespace {
fl::io::Task<fl::Result<void>> work() { co_return fl::Result<void>{}; }
fl::io::Task<fl::Result<void>> caller() {
    work();
    co_return fl::Result<void>{};
}
[[maybe_unused]] constexpr auto keep = &caller;
} // namespace
