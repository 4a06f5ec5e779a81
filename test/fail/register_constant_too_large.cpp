// A constant that a field cannot hold.
// expect: must be initialized by a constant expression
import core.std;
import core.registers;

namespace {
struct Entry : fl::Register<Entry, fl::u32> {
    static constexpr Field<10, 8> delivery{};
    static constexpr auto layout = fields(delivery);
};
constexpr Entry entry = Entry{}.set(Entry::delivery, 8);
} // namespace
