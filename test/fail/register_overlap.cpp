// Two fields cannot share a bit.
// expect: two fields of a register overlap
import core.std;
import core.registers;

namespace {
struct Status : fl::Register<Status, fl::u16> {
    static constexpr Field<7, 4> state{};
    static constexpr Bit<7> busy{};
    static constexpr auto layout = fields(state, busy);
};
[[maybe_unused]] bool caller() { return Status{}.get(Status::busy); }
} // namespace
