// A field belongs to one register and must be in its list of fields.
// expect: ReadableField
// expect: no matching member function for call to 'get'
import core.std;
import core.registers;

namespace {
struct Status : fl::Register<Status, fl::u8> {
    static constexpr Bit<7> busy{};
    static constexpr Bit<0> error{}; // not listed
    static constexpr auto layout = fields(busy);
};
struct Control : fl::Register<Control, fl::u8> {
    static constexpr Bit<7> enable{};
    static constexpr auto layout = fields(enable);
};
[[maybe_unused]] bool foreign() { return Status{}.get(Control::enable); }
[[maybe_unused]] bool unlisted() { return Status{}.get(Status::error); }
} // namespace
