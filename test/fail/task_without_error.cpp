// A task's result must be able to hold an Error, to report that there was no frame for it.
// expect: a Task yields a Result: running out of frames is an error value
import core.std;
import io.task;

namespace {
fl::io::Task<fl::u32> work() { co_return 1u; }
[[maybe_unused]] constexpr auto keep = &work;
} // namespace
