// Numbered datagrams, by which two programs count what is lost and duplicated between them: the sender numbers its
// datagrams, announces the end, and gets the receiver's counts as an answer. docs/INTERFACES.md has the format.
export module io.net.numbered;
import core.std;
import io.net.wire;

export namespace fl::io::net {

enum class NumberedKind : u32 { data = 1, end = 2, report = 3 };

/// The beginning of every datagram of this protocol.
struct NumberedHeader {
    Big32 magic = u32{0x464c5544}; // "FLUD"
    Big32 kind;
    Big64 run;    // chosen by the sender, the same in all datagrams of a run
    Big64 number; // data: from 0; end: datagrams sent; report: different ones received
    Big64 total;  // data, end: datagrams that the sender sends; report: duplicates received
};
static_assert(sizeof(NumberedHeader) == 32);

/// Nothing: it is none of these.
constexpr std::optional<NumberedHeader> parse_numbered(std::span<const std::byte> datagram) {
    if (datagram.size() < sizeof(NumberedHeader)) {
        return std::nullopt;
    }
    const auto header = take<NumberedHeader>(datagram);
    const u32 kind = header.kind;
    return header.magic == NumberedHeader{}.magic && kind >= 1 && kind <= 3 ? std::optional(header) : std::nullopt;
}

/// What has arrived of one run.
class NumberedCount {
  public:
    static constexpr u64 most = u64{1} << 20; // datagrams of a run

    /// False: the number cannot be.
    bool count(u64 number) {
        if (number >= most) {
            return false;
        }
        u64& word = seen_[number / 64];
        const u64 bit = u64{1} << number % 64;
        ++((word & bit) != 0 ? duplicates_ : different_);
        word |= bit;
        return true;
    }
    u64 different() const { return different_; }
    u64 duplicates() const { return duplicates_; }

  private:
    std::array<u64, most / 64> seen_{};
    u64 different_ = 0;
    u64 duplicates_ = 0;
};

} // namespace fl::io::net
