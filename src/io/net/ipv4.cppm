// IPv4: addresses, subnets, headers [rfc791, rfc1122]. No I/O. Options are skipped; fragments are not reassembled.
module;
#include <cstddef>
export module io.net.ipv4;
import core.std;
import core.text;
import io.net.drop;
import io.net.wire;

export namespace fl::io::net {

struct Ipv4Address {
    std::array<u8, 4> bytes{};

    constexpr u32 number() const { return u32{Big32(std::bit_cast<Big32>(bytes))}; }
    static constexpr Ipv4Address of(u32 number) { return {Big32(number).bytes}; }
    /// 0.0.0.0: no address.
    constexpr bool none() const { return number() == 0; }
    constexpr bool is_broadcast() const { return number() == 0xffffffff; }
    /// What one station can have: none of 0/8, 127/8, multicast, 240/4 [rfc1122 §3.2.1.3].
    constexpr bool is_host() const { return bytes[0] != 0 && bytes[0] != 127 && bytes[0] < 224; }
    friend constexpr bool operator==(const Ipv4Address&, const Ipv4Address&) = default;
};

/// "10.0.2.15"
constexpr FixedText<15> text(Ipv4Address address) {
    FixedText<15> result;
    for (usize i = 0; i < 4; ++i) {
        const u8 byte = address.bytes[i];
        std::array<char, 4> part{'.'};
        usize size = 1;
        if (byte >= 100) {
            part[size++] = static_cast<char>('0' + byte / 100);
        }
        if (byte >= 10) {
            part[size++] = static_cast<char>('0' + byte / 10 % 10);
        }
        part[size++] = static_cast<char>('0' + byte % 10);
        result.write({part.data() + (i == 0 ? 1 : 0), size - (i == 0 ? 1 : 0)});
    }
    return result;
}

/// Four decimal numbers with dots between them; nothing on a syntax error.
constexpr std::optional<Ipv4Address> parse_address(std::string_view text) {
    Ipv4Address address;
    for (usize i = 0; i < 4; ++i) {
        const usize dot = text.find('.');
        const std::string_view part = text.substr(0, dot);
        if (part.empty() || part.size() > 3 || (part.size() > 1 && part[0] == '0') ||
            (dot == std::string_view::npos) != (i == 3)) {
            return std::nullopt;
        }
        const auto number = parse_number(part);
        if (!number || *number > 255) {
            return std::nullopt;
        }
        address.bytes[i] = static_cast<u8>(*number);
        text.remove_prefix(i == 3 ? text.size() : dot + 1);
    }
    return address;
}

/// An address and the number of leading bits, 1 to 32, that it shares with its neighbours.
struct Subnet {
    Ipv4Address address;
    u8 prefix = 32;

    constexpr u32 mask() const { return ~u32{0} << (32 - prefix); }
    constexpr bool contains(Ipv4Address other) const { return ((other.number() ^ address.number()) & mask()) == 0; }
    /// The broadcast address of a subnet that has one; of /31 and /32 the limited one [rfc3021].
    constexpr Ipv4Address broadcast() const {
        return Ipv4Address::of(prefix > 30 ? ~u32{0} : address.number() | ~mask());
    }
    /// Whether the address can be a station's in this subnet.
    constexpr bool is_valid() const {
        return prefix >= 1 && prefix <= 32 && address.is_host() &&
               (prefix > 30 || ((address.number() & ~mask()) != 0 && address != broadcast()));
    }
    friend constexpr bool operator==(const Subnet&, const Subnet&) = default;
};

enum class Protocol : u8 { icmp = 1, udp = 17 };

struct Ipv4Header {
    u8 version_and_length = 0x45; // length in units of 4 bytes
    u8 service = 0;
    Big16 total_length;
    Big16 identification; // 0: not used, because nothing sent here may be fragmented [rfc6864 §4.1]
    Big16 fragment = dont_fragment;
    u8 ttl = 64;
    u8 protocol = 0;
    Big16 checksum;
    Ipv4Address source;
    Ipv4Address destination;

    static constexpr u16 dont_fragment = 0x4000;
    static constexpr u16 fragment_bits = 0x3fff; // more fragments, and the offset
};
static_assert(sizeof(Ipv4Header) == 20 && offsetof(Ipv4Header, total_length) == 2 &&
              offsetof(Ipv4Header, identification) == 4 && offsetof(Ipv4Header, fragment) == 6 &&
              offsetof(Ipv4Header, ttl) == 8 && offsetof(Ipv4Header, protocol) == 9 &&
              offsetof(Ipv4Header, checksum) == 10 && offsetof(Ipv4Header, source) == 12 &&
              offsetof(Ipv4Header, destination) == 16);

/// A received packet; the spans refer to the frame.
struct Ipv4Packet {
    Ipv4Header header;
    std::span<const std::byte> head; // with options
    std::span<const std::byte> payload;
};

/// `bytes`: what follows the Ethernet header; padding after the packet is cut off. Whether the addresses make sense is
/// not checked here.
constexpr Parsed<Ipv4Packet> parse_ipv4(std::span<const std::byte> bytes) {
    if (bytes.size() < sizeof(Ipv4Header)) {
        return Drop::ipv4_malformed;
    }
    const auto header = take<Ipv4Header>(bytes);
    const usize head = (header.version_and_length & 15) * usize{4};
    const usize total = header.total_length;
    if (header.version_and_length >> 4 != 4 || head < sizeof(Ipv4Header) || total < head || total > bytes.size()) {
        return Drop::ipv4_malformed;
    }
    InternetSum sum;
    sum.add(bytes.first(head));
    if (sum.sum() != 0xffff) {
        return Drop::ipv4_checksum;
    }
    if ((header.fragment & Ipv4Header::fragment_bits) != 0) {
        return Drop::ipv4_fragment;
    }
    return Ipv4Packet{header, bytes.first(head), bytes.subspan(head, total - head)};
}

/// A header with its checksum. `payload`: bytes that follow it.
constexpr Ipv4Header make_ipv4(Protocol protocol, Ipv4Address source, Ipv4Address destination, usize payload) {
    Ipv4Header header;
    header.total_length = static_cast<u16>(sizeof(Ipv4Header) + payload);
    header.protocol = to_underlying(protocol);
    header.source = source;
    header.destination = destination;
    std::array<std::byte, sizeof(Ipv4Header)> bytes{};
    put(std::span(bytes), header);
    InternetSum sum;
    sum.add(std::span(bytes));
    header.checksum = sum.checksum();
    return header;
}

/// The sum of the pseudo header, with which a UDP checksum begins [rfc768].
constexpr InternetSum pseudo_header(Protocol protocol, Ipv4Address source, Ipv4Address destination, usize length) {
    InternetSum sum;
    for (Ipv4Address address : {source, destination}) {
        sum.add(static_cast<u16>(address.number() >> 16));
        sum.add(static_cast<u16>(address.number()));
    }
    sum.add(to_underlying(protocol));
    sum.add(static_cast<u16>(length));
    return sum;
}

} // namespace fl::io::net
