// The image's symbol table, for backtraces. Written by boot/link.sh; little endian:
//
//   "FLSYMTAB", u32 count, u32 version 2, u32 scope_count
//   count × u32    offset of a function from the start of the image, ascending
//   count × u16    offset of its name from the first name
//   scopes         scope_count NUL-terminated strings: common prefixes of names ("fl::io::"); the first is empty
//   names          u8 index of a scope, then the rest of the name, NUL-terminated; functions may share one
export module core.symbols;
import core.std;

export namespace fl {

class Symbols {
  public:
    /// The function's full name is `scope` followed by `name`.
    struct Symbol {
        std::string_view scope;
        std::string_view name;
        u32 offset; // bytes from the start of the function
    };

    /// `table` must outlive this object. A truncated or malformed table is treated as empty.
    explicit Symbols(std::span<const std::byte> table);
    /// The last function that starts at or before the offset; nothing before the first one.
    std::optional<Symbol> find(u32 offset_in_image) const;
    u32 count() const { return count_; }

  private:
    template <class T>
    T read(usize at) const;
    std::optional<std::string_view> string(usize at) const;

    std::span<const std::byte> table_;
    u32 count_ = 0;
    u32 scope_count_ = 0;
    usize scopes_ = 0;
    usize names_ = 0;
};

} // namespace fl
