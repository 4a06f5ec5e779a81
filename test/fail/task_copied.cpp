// A task has one owner: a second one would destroy the frame twice.
// expect: call to implicitly-deleted copy constructor
import core.std;
import core.result;
import io.task;

namespace {
fl::io::Task<fl::Result<void>> work() { co_return fl::Result<void>{}; }
[[maybe_unused]] void caller() {
    auto first = work();
    auto second = first;
}
} // namespace
