// A format field with an invalid end.
// expect: expected {} or {:[fill<>][#][0][width][x]}
import core.std;
import core.text;

namespace {
[[maybe_unused]] void caller() {
    fl::FixedText<32> text;
    print(text, "{:q}", 1);
}
} // namespace
