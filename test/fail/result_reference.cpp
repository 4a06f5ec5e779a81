// A Result of a reference would hide who owns the value.
// expect: a Result holds values; return a pointer for a reference
import core.std;
import core.result;

namespace {
fl::u32 number = 0;
[[maybe_unused]] fl::Result<fl::u32&> find() { return number; }
} // namespace
