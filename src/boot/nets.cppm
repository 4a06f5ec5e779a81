// The list of announced network cards, and the record printed for each. The claims (boot.sinks) decide which driver may
// announce which card.
export module boot.nets;
import core.std;
import core.result;
import core.text;
import io.net;

export namespace fl::boot {

class Nets {
  public:
    static constexpr usize capacity = 64; // fixed: jobs hold a span of the list while cards are added

    /// Whether add() would accept this card. Error{busy}: another open card has its name; Error{exhausted}: the list is
    /// full.
    Result<void> takes(const io::NetDevice& card) const;
    /// Requires success of takes(). The card must live until the machine ends. A card that was closed and works again
    /// keeps its place.
    void add(io::NetDevice& card);
    /// In order of attachment; cards that were closed meanwhile included.
    std::span<io::NetDevice* const> all() const { return {cards_.data(), count_}; }
    /// An open card of this name, else a closed one; nullptr: there is none.
    io::NetDevice* find(std::string_view name) const;
    bool has(const io::NetDevice& card) const { return std::ranges::find(all(), &card) != all().end(); }
    /// The first of eth0, eth1 … that no open card has.
    FixedText<16> free_name() const;
    /// "eth0, eth1" for messages; "none" if there are none.
    FixedText<256> names() const;

  private:
    std::array<io::NetDevice*, capacity> cards_{};
    usize count_ = 0;
};

/// Prints the `net` record and its human-readable line.
void report(const io::NetDevice& card);

} // namespace fl::boot
