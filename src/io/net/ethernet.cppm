// Ethernet II frames: destination, source, type [rfc894]. No I/O.
module;
#include <cstddef>
export module io.net.ethernet;
import core.std;
import core.text;
import io.net;
import io.net.drop;
import io.net.wire;

export namespace fl::io::net {

enum class EtherType : u16 { ipv4 = 0x0800, arp = 0x0806 };

struct EthernetHeader {
    MacAddress destination;
    MacAddress source;
    Big16 type;
};
static_assert(sizeof(EthernetHeader) == ethernet_header && offsetof(EthernetHeader, destination) == 0 &&
              offsetof(EthernetHeader, source) == 6 && offsetof(EthernetHeader, type) == 12);

/// The header of a received frame. A type below 0x600 is a length: a frame of IEEE 802.3, which nothing here uses.
constexpr Parsed<EthernetHeader> parse_ethernet(std::span<const std::byte> frame) {
    if (frame.size() < sizeof(EthernetHeader)) {
        return Drop::ethernet_short;
    }
    return take<EthernetHeader>(frame);
}

/// "52:54:00:12:34:56"
constexpr FixedText<17> text(const MacAddress& address) {
    constexpr std::string_view digits = "0123456789abcdef";
    FixedText<17> result;
    for (usize i = 0; i < address.bytes.size(); ++i) {
        const std::array<char, 3> byte{':', digits[address.bytes[i] >> 4], digits[address.bytes[i] & 15]};
        result.write({byte.data() + (i == 0 ? 1 : 0), i == 0 ? 2u : 3u});
    }
    return result;
}

} // namespace fl::io::net
