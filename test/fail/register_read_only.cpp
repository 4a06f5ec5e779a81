// A read-only field cannot be set.
// expect: WritableField
import core.std;
import core.registers;

namespace {
struct Status : fl::Register<Status, fl::u16> {
    static constexpr Bit<4, fl::Attribute::read_only> capabilities_list{};
    static constexpr auto layout = fields(capabilities_list);
};
[[maybe_unused]] void caller() {
    Status status{};
    status.set(Status::capabilities_list, true);
}
} // namespace
