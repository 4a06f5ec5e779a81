module core.symbols;
import core.std;

namespace fl {

namespace {
constexpr usize header_size = 16;
constexpr usize entry_size = 8;
constexpr u32 version = 1;
constexpr std::string_view magic = "FLSYMTAB";
} // namespace

u32 Symbols::word(usize at) const {
    u32 value = 0;
    std::memcpy(&value, table_.data() + at, sizeof(value));
    return value;
}

Symbols::Symbols(std::span<const std::byte> table) : table_(table) {
    if (table.size() < header_size || std::memcmp(table.data(), magic.data(), magic.size()) != 0) {
        return;
    }
    const u32 count = word(8);
    if (word(12) == version && count <= (table.size() - header_size) / entry_size) {
        count_ = count;
        names_ = header_size + usize{count} * entry_size;
    }
}

std::optional<Symbols::Symbol> Symbols::find(u32 offset) const {
    u32 low = 0; // everything before it begins at or before the offset
    u32 high = count_;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        if (word(header_size + usize{middle} * entry_size) <= offset) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == 0) {
        return std::nullopt;
    }
    const usize entry = header_size + usize{low - 1} * entry_size;
    const usize name = names_ + word(entry + 4);
    if (name >= table_.size()) {
        return std::nullopt;
    }
    const auto* begin = reinterpret_cast<const char*>(table_.data() + name);
    usize size = 0;
    while (name + size < table_.size() && begin[size] != '\0') {
        ++size;
    }
    return Symbol{{begin, size}, offset - word(entry)};
}

} // namespace fl
