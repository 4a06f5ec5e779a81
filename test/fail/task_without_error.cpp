// A task whose value cannot be an Error could not say that there was no frame for it.
// expect: a Task yields a Result: running out of frames is an error value
import core.std;
import io.task;

namespace {
fl::io::Task<fl::u32> work() { co_return 1u; }
[[maybe_unused]] constexpr auto keep = &work;
} // namespace
