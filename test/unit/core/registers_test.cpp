#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
// Depends on the include above.
#include "unit/core/registers_mock.hpp"
import test.gtest;
import host.std;
import core.result;

namespace {
using namespace fl;
using register_test::AccessScript;
using register_test::ScriptedAccess;
using register_test::ScriptedMmio;

enum class Mode : u8 { off = 0, slow = 1, fast = 5 };

struct Control : Register<Control, u16> {
    static constexpr u64 offset = 6;
    static constexpr Bit<15> enable{};
    static constexpr Bit<14, Attribute::read_only> ready{};
    static constexpr Field<13, 11, Attribute::read_write, Mode> mode{};
    static constexpr Bit<10, Attribute::write_1_to_clear> failed{};
    static constexpr Field<9, 8, Attribute::reserved_zero> reserved{};
    static constexpr Bit<7, Attribute::write_only> go{};
    static constexpr Field<6, 2> count{}; // bits 1 and 0 are in no field
    static constexpr auto layout = fields(enable, ready, mode, failed, reserved, go, count);
};
struct Wide : Register<Wide, u64> {
    static constexpr u64 offset = 8;
    static constexpr Field<63, 0> all{};
    static constexpr auto layout = fields(all);
};
struct Byte : Register<Byte, u8> {
    static constexpr u64 offset = 0;
    static constexpr Field<7, 4> high{};
    static constexpr Field<3, 0> low{};
    static constexpr auto layout = fields(high, low);
};
static_assert(sizeof(Control) == 2 && sizeof(Wide) == 8 && sizeof(Byte) == 1);

// What must not compile; the messages are checked in test/fail.
template <class F>
concept CanSet = requires(Control c, F f, typename F::Type v) { c.set(f, v); };
template <class F>
concept CanGet = requires(Control c, F f) { c.get(f); };
template <class F>
concept CanClear = requires(Control c, F f) { c.clear(f); };
static_assert(CanSet<decltype(Control::enable)> && CanSet<decltype(Control::go)>);
static_assert(!CanSet<decltype(Control::ready)> && !CanSet<decltype(Control::failed)> &&
              !CanSet<decltype(Control::reserved)>);
static_assert(CanGet<decltype(Control::ready)> && CanGet<decltype(Control::failed)>);
static_assert(!CanGet<decltype(Control::go)> && !CanGet<decltype(Control::reserved)> && !CanGet<decltype(Byte::low)>);
static_assert(CanClear<decltype(Control::failed)> && !CanClear<decltype(Control::enable)>);

TEST(Register, FieldsAreTheBitsThatTheyName) {
    Control c = Control::from(0x6c57); // 0 1 101 1 00 0 10101 11
    EXPECT_FALSE(c.get(Control::enable));
    EXPECT_TRUE(c.get(Control::ready));
    EXPECT_EQ(c.get(Control::mode), Mode::fast);
    EXPECT_TRUE(c.get(Control::failed));
    EXPECT_EQ(c.get(Control::count), 0x15u);
    c.set(Control::enable, true).set(Control::mode, Mode::slow).set(Control::count, 0x0a);
    EXPECT_EQ(c.raw, 0xcc2bu);
    c.set(Control::count, 0).set(Control::enable, false);
    EXPECT_EQ(c.raw, 0x4c03u);
    EXPECT_TRUE(c.has(Control::ready, Control::failed));
    EXPECT_FALSE(c.has(Control::ready, Control::enable));
    EXPECT_EQ(Control::of(Control::enable, Control::failed).raw, 0x8400u);

    Wide w = Wide::from(0x0123456789abcdef);
    EXPECT_EQ(w.get(Wide::all), 0x0123456789abcdefu);
    w.set(Wide::all, ~u64{0});
    EXPECT_EQ(w.raw, ~u64{0});
    Byte b = Byte::from(0xa5);
    EXPECT_EQ(b.get(Byte::high), 0xau);
    EXPECT_EQ(b.set(Byte::high, 0x5).raw, 0x55u);
}

#define EXPECT_PANIC(statement, text) EXPECT_DEATH((test::panic_prints(), static_cast<void>(statement)), text)

TEST(Register, AValueThatDoesNotFitPanics) {
    Control c{};
    EXPECT_PANIC(c.set(Control::count, 32), "0x20 does not fit .* at most 0x1f");
    EXPECT_PANIC(c.set(Control::mode, static_cast<Mode>(8)), "0x8 does not fit .* at most 0x7");
}

TEST(Register, ReadAndWriteAreOneAccessOfTheWidth) {
    AccessScript script;
    ScriptedAccess access(script);
    script.expect_read(0x106, 2, 0x8003).expect_write(0x106, 2, 0x8003);
    script.expect_read(8, 8, 7).expect_read(3, 1, 0x21);
    const Control c = Control::read(access, 0x100);
    EXPECT_EQ(c.raw, 0x8003u);
    c.write(access, 0x100);
    EXPECT_EQ(Wide::read(access).raw, 7u);
    EXPECT_EQ(Byte::read(access, 3).raw, 0x21u);
}

TEST(Register, ReservedBitsAreWrittenAsTheManualSays) {
    AccessScript script;
    ScriptedAccess access(script);
    script.expect_write(6, 2, 0xfcff);
    Control::from(0xffff).write(access);
}

// A write-one-to-clear bit must not be cleared when another field changes.
TEST(Register, ChangeKeepsWhatAOneWouldClear) {
    AccessScript script;
    ScriptedAccess access(script);
    script.expect_read(6, 2, 0x4603).expect_write(6, 2, 0xc003);
    Control::change(access, 0, [](Control& c) { c.set(Control::enable, true); });
    script.expect_read(6, 2, 0x4403).expect_write(6, 2, 0x4403);
    Control::change(access, 0, [](Control& c) { c.clear(Control::failed); });
}

TEST(RegisterMock, SeesWhatIsUnexpectedMissingWrongAndReordered) {
    const auto failures = [](auto&& run) {
        AccessScript script;
        ScriptedAccess access(script);
        run(script, access);
        return script.take_failures();
    };
    using F = std::vector<std::string>;
    EXPECT_EQ(failures([](auto& s, auto& a) {
                  s.expect_read(4, 4, 9);
                  EXPECT_EQ(a.template read<u32>(4), 9u);
              }),
              F{});
    EXPECT_EQ(failures([](auto&, auto& a) { a.template read<u32>(4); }),
              F{"unexpected:  read32 at 4, expected: nothing"});
    EXPECT_EQ(failures([](auto& s, auto&) { s.expect_write(4, 2, 1); }), F{"missing:  write16 at 4 of 1"});
    EXPECT_EQ(failures([](auto& s, auto& a) {
                  s.expect_write(4, 4, 1).expect_write(8, 4, 2);
                  a.template write<u32>(8, 2);
                  a.template write<u32>(4, 1);
              }).size(),
              2u); // the second access is the expected one; the first one's entry remains
    EXPECT_EQ(failures([](auto& s, auto& a) {
                  s.expect_write(4, 4, 1);
                  a.template write<u32>(4, 3);
              }),
              (F{"unexpected:  write32 at 4 of 3, expected:  write32 at 4 of 1", "missing:  write32 at 4 of 1"}));
    EXPECT_EQ(failures([](auto& s, auto& a) {
                  s.expect_read(4, 4, 1);
                  a.template read<u16>(4);
              }).size(),
              2u);
    EXPECT_EQ(failures([](auto& s, auto&) {
                  ScriptedAccess other(s, "ports");
                  s.expect_read(4, 4, 1, "memory");
                  other.read<u32>(4);
              }).size(),
              2u);
}

TEST(Mmio, MemoryOfEveryWidth) {
    alignas(8) std::array<std::byte, 32> memory{};
    const Mmio region(memory.data(), memory.size());
    region.write<u64>(8, 0x1122334455667788);
    EXPECT_EQ(region.read<u8>(8), 0x88u);
    EXPECT_EQ(region.read<u16>(10), 0x5566u);
    EXPECT_EQ(region.read<u32>(12), 0x11223344u);
    region.write<u8>(15, 0xff);
    region.write<u16>(12, 0xabcd);
    region.write<u32>(16, 0xdeadbeef);
    EXPECT_EQ(region.read<u64>(8), 0xff22abcd55667788u);
    EXPECT_EQ(region.read<u64>(16), 0xdeadbeefu);
    const Mmio part = *region.part(16, 8);
    EXPECT_EQ(part.size(), 8u);
    EXPECT_EQ(part.read<u32>(0), 0xdeadbeefu);
    EXPECT_TRUE(region.part(32, 0));
    EXPECT_EQ(region.part(24, 9).error().code, Code::protocol);
    EXPECT_EQ(region.part(33, 0).error().code, Code::protocol);
    EXPECT_EQ(region.part(8, ~u64{0} - 4).error().code, Code::protocol);
}

TEST(Mmio, AccessesOutOfBoundsPanic) {
    alignas(8) std::array<std::byte, 16> memory{};
    const Mmio region(memory.data(), 12);
    EXPECT_PANIC(region.read<u32>(12), "a register of 4 bytes at 0xc does not lie in its region of 0xc bytes");
    EXPECT_PANIC(region.write<u64>(8, 0), "a register of 8 bytes at 0x8");
    EXPECT_PANIC(region.read<u16>(3), "a register of 2 bytes at 0x3");
    EXPECT_PANIC((*region.part(4, 4)).read<u8>(4), "a register of 1 bytes at 0x4 does not lie in its region of 0x4");
    EXPECT_EQ(region.read<u32>(8), 0u);
}

TEST(Mmio, AModelSeesEveryAccessInOrder) {
    AccessScript script;
    ScriptedMmio model(script, "device");
    const Mmio region(model, 0x1000);
    script.expect_write(0x806, 2, 0x8000, "device").expect_read(0x806, 2, 0x4000, "device");
    const Mmio part = *region.part(0x800, 16);
    Control::of(Control::enable).write(part);
    EXPECT_TRUE(Control::read(part).get(Control::ready));
}

TEST(Mmio, WithoutAMapperNothingIsMapped) {
    EXPECT_EQ(no_mmio().map(0xfeb00000, 4096).error().code, Code::not_supported);
}

} // namespace
