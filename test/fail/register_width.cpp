// A field must lie within its register.
// expect: a field lies outside of its register
import core.std;
import core.registers;

namespace {
struct Status : fl::Register<Status, fl::u8> {
    static constexpr Field<8, 4> state{};
    static constexpr auto layout = fields(state);
};
[[maybe_unused]] int caller() { return Status{}.get(Status::state); }
} // namespace
