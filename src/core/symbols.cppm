// The image's own table of symbols, for backtraces. boot/link.sh writes it: "FLSYMTAB", u32 count, u32 version 1, count
// pairs of u32 (offset of the function from the image's begin, offset of its name), ascending; then names, each ended
// by 0.
export module core.symbols;
import core.std;

export namespace fl {

class Symbols {
  public:
    struct Symbol {
        std::string_view name;
        u32 offset; // bytes from the function's begin
    };

    /// `table` must outlive this. A table that is cut off or malformed has no symbols.
    explicit Symbols(std::span<const std::byte> table);
    /// The function that the offset lies in: the last that begins at or before it. Nothing before the first one.
    std::optional<Symbol> find(u32 offset_in_image) const;
    u32 count() const { return count_; }

  private:
    u32 word(usize at) const;

    std::span<const std::byte> table_;
    u32 count_ = 0;
    usize names_ = 0;
};

} // namespace fl
