// UDP datagrams [rfc768]. No I/O.
module;
#include <cstddef>
export module io.net.udp;
import core.std;
import io.net;
import io.net.drop;
import io.net.ipv4;
import io.net.wire;

export namespace fl::io::net {

struct Endpoint {
    Ipv4Address address;
    u16 port = 0;
    friend constexpr bool operator==(const Endpoint&, const Endpoint&) = default;
};

struct UdpHeader {
    Big16 source;
    Big16 destination;
    Big16 length; // of header and data
    Big16 checksum;
};
static_assert(sizeof(UdpHeader) == 8 && offsetof(UdpHeader, destination) == 2 && offsetof(UdpHeader, length) == 4 &&
              offsetof(UdpHeader, checksum) == 6);

struct UdpDatagram {
    UdpHeader header;
    std::span<const std::byte> data;
};

/// The checksum is verified if it is `unknown` and the sender has computed one.
constexpr Parsed<UdpDatagram> parse_udp(const Ipv4Packet& packet, Checksum checksum) {
    const std::span<const std::byte> bytes = packet.payload;
    if (bytes.size() < sizeof(UdpHeader)) {
        return Drop::udp_malformed;
    }
    const auto header = take<UdpHeader>(bytes);
    const usize length = header.length;
    if (length < sizeof(UdpHeader) || length > bytes.size()) {
        return Drop::udp_malformed;
    }
    if (checksum == Checksum::unknown && header.checksum != 0) {
        InternetSum sum = pseudo_header(Protocol::udp, packet.header.source, packet.header.destination, length);
        sum.add(bytes.first(length));
        if (sum.sum() != 0xffff) {
            return Drop::udp_checksum;
        }
    }
    return UdpDatagram{header, bytes.subspan(sizeof(UdpHeader), length - sizeof(UdpHeader))};
}

/// A header with its checksum; with `partial` the sum of the pseudo header only, which the device completes.
constexpr UdpHeader make_udp(Ipv4Address source, u16 source_port, Ipv4Address destination, u16 destination_port,
                             std::span<const std::byte> data, Checksum checksum) {
    UdpHeader header{source_port, destination_port, static_cast<u16>(sizeof(UdpHeader) + data.size()), {}};
    InternetSum sum = pseudo_header(Protocol::udp, source, destination, header.length);
    if (checksum == Checksum::partial) {
        header.checksum = sum.sum();
        return header;
    }
    std::array<std::byte, sizeof(UdpHeader)> bytes{};
    put(std::span(bytes), header);
    sum.add(std::span(bytes));
    sum.add(data);
    header.checksum = sum.checksum() == 0 ? u16{0xffff} : sum.checksum(); // 0 means: none
    return header;
}

} // namespace fl::io::net
