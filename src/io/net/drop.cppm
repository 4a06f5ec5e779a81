// Why a packet is not used: every frame that arrives is delivered, answered, or counted under one of these reasons.
export module io.net.drop;
import core.std;

export namespace fl::io::net {

enum class Drop : u8 {
    none,
    ethernet_short,   // no whole Ethernet header
    ethernet_source,  // a group's address, or this station's own: a frame that came back
    ethernet_type,    // neither IPv4 nor ARP, or not Ethernet II
    other_station,    // to another station, or to a group that is not the broadcast
    arp_malformed,    // not ARP for IPv4 on Ethernet, or addresses that no station has
    arp_unknown,      // about addresses that nobody here asked for
    ipv4_malformed,   // version, header length or total length
    ipv4_checksum,    // of the header
    ipv4_fragment,    // fragments are not reassembled
    ipv4_source,      // an address that no packet comes from
    ipv4_destination, // not to this interface
    ipv4_protocol,    // neither ICMP nor UDP
    icmp_malformed,   // shorter than its header
    icmp_checksum,    //
    icmp_type,        // none that is answered here, or an error about a packet that was not sent
    icmp_unasked,     // an echo reply that nobody waits for
    icmp_rate,        // an echo request, or a datagram without a socket, beyond the permitted rate of answers
    udp_malformed,    // length
    udp_checksum,     //
    udp_port,         // no socket has this port
    udp_full,         // the queue of the socket has no room
    lane_full,        // came by a lane whose frames were not fetched in time
    dhcp_malformed,   // not a whole BOOTP message with DHCP options
    dhcp_foreign,     // of another exchange or station
    dhcp_option,      // an option with a wrong length or an impossible value, or repeated
    dhcp_missing,     // an option that the message must have is missing
    dhcp_unexpected,  // a message that is no answer to the last one sent
};
inline constexpr auto drop_names = std::to_array<std::string_view>({
    "none",          "ethernet_short", "ethernet_source", "ethernet_type",   "other_station", "arp_malformed",
    "arp_unknown",   "ipv4_malformed", "ipv4_checksum",   "ipv4_fragment",   "ipv4_source",   "ipv4_destination",
    "ipv4_protocol", "icmp_malformed", "icmp_checksum",   "icmp_type",       "icmp_unasked",  "icmp_rate",
    "udp_malformed", "udp_checksum",   "udp_port",        "udp_full",        "lane_full",     "dhcp_malformed",
    "dhcp_foreign",  "dhcp_option",    "dhcp_missing",    "dhcp_unexpected",
});
inline constexpr usize drop_reasons = to_underlying(Drop::dhcp_unexpected) + 1;
static_assert(drop_names.size() == drop_reasons);
constexpr std::string_view name(Drop reason) { return drop_names[to_underlying(reason)]; }

/// Packets not used, by reason.
class DropCounters {
  public:
    void count(Drop reason) { ++counts_[to_underlying(reason)]; }
    void count(Drop reason, u64 more) { counts_[to_underlying(reason)] += more; }
    u64 operator[](Drop reason) const { return counts_[to_underlying(reason)]; }

  private:
    std::array<u64, drop_reasons> counts_{};
};

/// What a parser makes of a packet: a value, or why there is none.
template <class T>
struct Parsed {
    T value{};
    Drop why = Drop::none;

    constexpr Parsed(T parsed) : value(parsed) {}
    constexpr Parsed(Drop reason) : why(reason) {}
    constexpr explicit operator bool() const { return why == Drop::none; }
    constexpr const T* operator->() const { return &value; }
    constexpr const T& operator*() const { return value; }
};

} // namespace fl::io::net
