// ICMP: echo and destination unreachable [rfc792]. No I/O.
module;
#include <cstddef>
export module io.net.icmp;
import core.std;
import io.net.drop;
import io.net.ipv4;
import io.net.udp;
import io.net.wire;

export namespace fl::io::net {

enum class IcmpType : u8 { echo_reply = 0, unreachable = 3, echo_request = 8 };

/// Of an unreachable destination; others are possible.
enum class Unreachable : u8 { network = 0, host = 1, protocol = 2, port = 3, too_long = 4 };

struct IcmpHeader {
    u8 type = 0;
    u8 code = 0;
    Big16 checksum;
    Big16 identifier; // of echo; unused in an error
    Big16 sequence;
};
static_assert(sizeof(IcmpHeader) == 8 && offsetof(IcmpHeader, checksum) == 2 && offsetof(IcmpHeader, identifier) == 4 &&
              offsetof(IcmpHeader, sequence) == 6);

struct IcmpMessage {
    IcmpHeader header;
    std::span<const std::byte> data;
};

constexpr Parsed<IcmpMessage> parse_icmp(std::span<const std::byte> bytes) {
    if (bytes.size() < sizeof(IcmpHeader)) {
        return Drop::icmp_malformed;
    }
    InternetSum sum;
    sum.add(bytes);
    if (sum.sum() != 0xffff) {
        return Drop::icmp_checksum;
    }
    return IcmpMessage{take<IcmpHeader>(bytes), bytes.subspan(sizeof(IcmpHeader))};
}

/// A header with the checksum over itself and the data.
constexpr IcmpHeader make_icmp(IcmpType type, u8 code, u16 identifier, u16 sequence, std::span<const std::byte> data) {
    IcmpHeader header{to_underlying(type), code, {}, identifier, sequence};
    std::array<std::byte, sizeof(IcmpHeader)> bytes{};
    put(std::span(bytes), header);
    InternetSum sum;
    sum.add(std::span(bytes));
    sum.add(data);
    header.checksum = sum.checksum();
    return header;
}

/// What an error says about a packet that was sent from here. Of an ICMP message the ports are identifier and sequence.
struct LostPacket {
    Protocol protocol = Protocol::udp;
    Ipv4Address source;
    Ipv4Address destination;
    u16 source_port = 0;
    u16 destination_port = 0;
};
/// `data`: of an error: the beginning of the packet that it is about, its header and at least 8 bytes [rfc792]. The
/// rest may be cut off, so neither its length nor its checksums can be verified. Nothing: that is not all there, or no
/// packet that is sent from here begins so.
constexpr std::optional<LostPacket> parse_lost(std::span<const std::byte> data) {
    if (data.size() < sizeof(Ipv4Header)) {
        return std::nullopt;
    }
    const auto header = take<Ipv4Header>(data);
    const usize head = (header.version_and_length & 15) * usize{4};
    if (header.version_and_length >> 4 != 4 || head < sizeof(Ipv4Header) || data.size() < head + 8) {
        return std::nullopt;
    }
    if (header.protocol == to_underlying(Protocol::udp)) {
        const auto udp = take<UdpHeader>(data.subspan(head));
        return LostPacket{Protocol::udp, header.source, header.destination, udp.source, udp.destination};
    }
    const auto echo = take<IcmpHeader>(data.subspan(head));
    if (header.protocol != to_underlying(Protocol::icmp) || echo.type != to_underlying(IcmpType::echo_request)) {
        return std::nullopt;
    }
    return LostPacket{Protocol::icmp, header.source, header.destination, echo.identifier, echo.sequence};
}

} // namespace fl::io::net
