// More fields than arguments.
// expect: the number of fields is not the number of arguments
import core.std;
import core.text;

namespace {
[[maybe_unused]] void caller() {
    fl::FixedText<32> text;
    print(text, "{} of {}", 1);
}
} // namespace
