module core.symbols;
import core.std;

namespace fl {

namespace {
constexpr usize header_size = 20;
constexpr u32 version = 2;
constexpr std::string_view magic = "FLSYMTAB";
} // namespace

template <class T>
T Symbols::read(usize at) const {
    T value = 0;
    std::memcpy(&value, table_.data() + at, sizeof(value));
    return value;
}

// The string at `at`, if it is terminated within the table.
std::optional<std::string_view> Symbols::string(usize at) const {
    for (usize end = at; end < table_.size(); ++end) {
        if (table_[end] == std::byte{0}) {
            return std::string_view(reinterpret_cast<const char*>(table_.data() + at), end - at);
        }
    }
    return std::nullopt;
}

Symbols::Symbols(std::span<const std::byte> table) : table_(table) {
    if (table.size() < header_size || std::memcmp(table.data(), magic.data(), magic.size()) != 0) {
        return;
    }
    const u32 count = read<u32>(8);
    const u32 scope_count = read<u32>(16);
    if (read<u32>(12) != version || count > (table.size() - header_size) / 6 || scope_count > 256) {
        return;
    }
    scopes_ = header_size + usize{count} * 6;
    names_ = scopes_;
    for (u32 i = 0; i < scope_count; ++i) {
        const auto scope = string(names_);
        if (!scope) {
            return;
        }
        names_ += scope->size() + 1;
    }
    count_ = count;
    scope_count_ = scope_count;
}

std::optional<Symbols::Symbol> Symbols::find(u32 offset) const {
    u32 low = 0; // every function before index `low` begins at or before the offset
    u32 high = count_;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        if (read<u32>(header_size + usize{middle} * 4) <= offset) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == 0) {
        return std::nullopt;
    }
    const usize at = names_ + read<u16>(header_size + usize{count_} * 4 + usize{low - 1} * 2);
    if (at >= table_.size()) {
        return std::nullopt;
    }
    const auto scope_index = read<u8>(at);
    const auto name = string(at + 1);
    if (!name || scope_index >= scope_count_) {
        return std::nullopt;
    }
    std::string_view scope = *string(scopes_); // the constructor has checked the terminators
    for (u32 i = 0; i < scope_index; ++i) {
        scope = *string(static_cast<usize>(reinterpret_cast<const std::byte*>(scope.data()) - table_.data()) +
                        scope.size() + 1);
    }
    return Symbol{scope, *name, offset - read<u32>(header_size + usize{low - 1} * 4)};
}

} // namespace fl
