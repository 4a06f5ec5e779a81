// The symbol table as boot/link.sh writes it, in bytes written from the format's description.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.symbols;

namespace fl {
namespace {

using Bytes = std::vector<unsigned char>;

void add(Bytes& to, std::string_view text) { to.insert(to.end(), text.begin(), text.end()); }

// Functions at 0x10, 0x40, 0x100, 0x180; three names, the last one shared by two functions; two scopes besides the
// empty one.
Bytes table() {
    Bytes t;
    add(t, "FLSYMTAB");
    t.insert(t.end(), {4, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0});
    t.insert(t.end(), {0x10, 0, 0, 0, 0x40, 0, 0, 0, 0x00, 1, 0, 0, 0x80, 1, 0, 0});
    t.insert(t.end(), {0, 0, 5, 0, 11, 0, 11, 0});
    add(t, std::string_view("\0fl::\0fl::io::\0", 15));
    add(t, std::string_view("\0one\0\1two2\0\2three\0", 18));
    return t;
}
auto bytes(const Bytes& t) { return std::as_bytes(std::span(t)); }

std::string whole(const std::optional<Symbols::Symbol>& symbol) {
    return symbol ? std::string(symbol->scope) + std::string(symbol->name) : "nothing";
}

TEST(Symbols, FindsTheFunctionThatAnAddressLiesIn) {
    const Bytes t = table();
    const Symbols symbols(bytes(t));
    ASSERT_EQ(symbols.count(), 4u);
    EXPECT_EQ(whole(symbols.find(0x0f)), "nothing");
    EXPECT_EQ(whole(symbols.find(0x10)), "one");
    EXPECT_EQ(symbols.find(0x3f)->offset, 0x2fu);
    EXPECT_EQ(whole(symbols.find(0x40)), "fl::two2");
    EXPECT_EQ(whole(symbols.find(0x17f)), "fl::io::three");
    EXPECT_EQ(symbols.find(0x17f)->offset, 0x7fu);
    EXPECT_EQ(whole(symbols.find(0x12345)), "fl::io::three");
    EXPECT_EQ(symbols.find(0x12345)->offset, 0x12345u - 0x180u);
}

TEST(Symbols, ReadNothingBeyondATableThatIsCut) {
    const Bytes t = table();
    for (usize size = 0; size < t.size(); ++size) {
        const Bytes cut(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(size)); // of exactly this size, for ASan
        const Symbols symbols(bytes(cut));
        EXPECT_EQ(whole(symbols.find(0x180)), "nothing") << size; // the last name
        for (const u32 at : {0u, 0x20u, 0x50u, 0x100u}) {
            static_cast<void>(symbols.find(at));
        }
    }
}

TEST(Symbols, RefuseWhatCannotBe) {
    const auto changed = [](usize at, unsigned char value) {
        Bytes t = table();
        t[at] = value;
        return t;
    };
    const auto count = [](const Bytes& t) { return Symbols(bytes(t)).count(); };
    EXPECT_EQ(count(changed(0, 'f')), 0u);
    EXPECT_EQ(count(changed(11, 0xff)), 0u);      // 4 billion functions
    EXPECT_EQ(count(changed(12, 1)), 0u);         // another version
    EXPECT_EQ(count(changed(16, 9)), 0u);         // more scopes than strings
    EXPECT_EQ(count(changed(18, 1)), 0u);         // more than an index can address
    const Bytes far = changed(20 + 16 + 7, 0xff); // the last name, far outside
    EXPECT_EQ(whole(Symbols(bytes(far)).find(0x180)), "nothing");
    EXPECT_EQ(whole(Symbols(bytes(far)).find(0x100)), "fl::io::three");
    const Bytes scope = changed(20 + 24 + 15 + 5, 3); // there are three, 0 to 2
    EXPECT_EQ(whole(Symbols(bytes(scope)).find(0x40)), "nothing");
}

} // namespace
} // namespace fl
