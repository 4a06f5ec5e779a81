// DHCP messages [rfc2131] and their options [rfc2132], of a client. No I/O. What a server sends is checked here: its
// lengths, and whether its values can be those of a station.
module;
#include <cstddef>
export module io.net.dhcp;
import core.std;
import io.net;
import io.net.drop;
import io.net.ipv4;
import io.net.wire;

export namespace fl::io::net {

inline constexpr u16 dhcp_server_port = 67;
inline constexpr u16 dhcp_client_port = 68;

enum class DhcpType : u8 { discover = 1, offer, request, decline, ack, nak, release, inform };
constexpr std::string_view name(DhcpType type) {
    constexpr std::array<std::string_view, 9> names{"?",   "DISCOVER", "OFFER",   "REQUEST", "DECLINE",
                                                    "ACK", "NAK",      "RELEASE", "INFORM"};
    return to_underlying(type) < names.size() ? names[to_underlying(type)] : names[0];
}

enum class DhcpOption : u8 {
    pad = 0,
    mask = 1,
    routers = 3,
    dns = 6,
    requested = 50,
    lease = 51,
    overload = 52,
    type = 53,
    server = 54,
    parameters = 55,
    longest = 57,
    renewal = 58,
    rebinding = 59,
    end = 255,
};

struct DhcpHeader {
    u8 operation = 1; // 1: to a server, 2: to a client
    u8 hardware = 1;  // Ethernet
    u8 hardware_length = 6;
    u8 hops = 0;
    Big32 xid;
    Big16 seconds;
    Big16 flags;
    Ipv4Address client; // the client's own address, if it has one
    Ipv4Address your;   // the one that the server gives
    Ipv4Address next_server;
    Ipv4Address relay;
    MacAddress mac;
    std::array<u8, 10> mac_padding{};
    std::array<u8, 64> server_name{};
    std::array<u8, 128> file{};
    Big32 magic = u32{0x63825363};

    static constexpr u16 broadcast = 0x8000; // answers go to everybody, because the client has no address
};
static_assert(sizeof(DhcpHeader) == 240 && offsetof(DhcpHeader, xid) == 4 && offsetof(DhcpHeader, seconds) == 8 &&
              offsetof(DhcpHeader, flags) == 10 && offsetof(DhcpHeader, client) == 12 &&
              offsetof(DhcpHeader, your) == 16 && offsetof(DhcpHeader, next_server) == 20 &&
              offsetof(DhcpHeader, relay) == 24 && offsetof(DhcpHeader, mac) == 28 &&
              offsetof(DhcpHeader, server_name) == 44 && offsetof(DhcpHeader, file) == 108 &&
              offsetof(DhcpHeader, magic) == 236);

/// A message to a server.
struct DhcpRequest {
    DhcpType type = DhcpType::discover;
    u32 xid = 0;
    u16 seconds = 0; // since the client began
    MacAddress mac;
    Ipv4Address client;    // while it has one
    Ipv4Address requested; // none(): absent
    Ipv4Address server;    // none(): absent
};
/// BOOTP's shortest message, which some relays insist on [rfc1542 §2.1].
inline constexpr usize dhcp_request_bytes = 300;
using DhcpMessage = std::array<std::byte, dhcp_request_bytes>;

constexpr DhcpMessage make_dhcp(const DhcpRequest& request) {
    DhcpHeader header;
    header.xid = request.xid;
    header.seconds = request.seconds;
    header.flags = request.client.none() ? DhcpHeader::broadcast : u16{0};
    header.client = request.client;
    header.mac = request.mac;
    DhcpMessage message{};
    put(std::span(message), header);
    usize at = sizeof(DhcpHeader);
    const auto option = [&](DhcpOption code, std::span<const u8> data) {
        message[at++] = static_cast<std::byte>(code);
        message[at++] = static_cast<std::byte>(data.size());
        for (u8 byte : data) {
            message[at++] = static_cast<std::byte>(byte);
        }
    };
    option(DhcpOption::type, std::array{to_underlying(request.type)});
    if (!request.requested.none()) {
        option(DhcpOption::requested, request.requested.bytes);
    }
    if (!request.server.none()) {
        option(DhcpOption::server, request.server.bytes);
    }
    if (request.type == DhcpType::discover || request.type == DhcpType::request) {
        option(DhcpOption::longest, Big16(576).bytes);
        option(DhcpOption::parameters,
               std::array{to_underlying(DhcpOption::mask), to_underlying(DhcpOption::routers),
                          to_underlying(DhcpOption::dns), to_underlying(DhcpOption::lease),
                          to_underlying(DhcpOption::renewal), to_underlying(DhcpOption::rebinding)});
    }
    message[at] = static_cast<std::byte>(DhcpOption::end);
    return message;
}

/// A checked answer of a server: an OFFER, an ACK or a NAK. Of a NAK only the server is set.
struct DhcpAnswer {
    DhcpType type = DhcpType::nak;
    Subnet subnet; // the address given, and its mask
    Ipv4Address gateway;
    Ipv4Address dns;
    Ipv4Address server;
    u32 lease = 0; // seconds; `forever`: without end
    u32 renewal = 0;
    u32 rebinding = 0; // 0 < renewal <= rebinding <= lease

    static constexpr u32 forever = 0xffffffff;
};

namespace dhcp_detail {

// The values of the options that are used here; 0: absent.
struct Options {
    u8 type = 0;
    u8 overload = 0;
    u32 mask = 0;
    u32 router = 0;
    u32 dns = 0;
    u32 server = 0;
    u32 lease = 0;
    u32 renewal = 0;
    u32 rebinding = 0;
    u64 seen[4] = {}; // bits of the codes of these

    // Reads the options of one field. Absent: the field is malformed.
    constexpr Drop read(std::span<const std::byte> field) {
        while (!field.empty()) {
            const u8 code = std::to_integer<u8>(field[0]);
            if (static_cast<DhcpOption>(code) == DhcpOption::pad) {
                field = field.subspan(1);
                continue;
            }
            if (static_cast<DhcpOption>(code) == DhcpOption::end) {
                return Drop::none;
            }
            if (field.size() < 2 || field.size() - 2 < std::to_integer<usize>(field[1])) {
                return Drop::dhcp_malformed; // runs past the end
            }
            const auto data = field.subspan(2, std::to_integer<usize>(field[1]));
            field = field.subspan(2 + data.size());
            if (const Drop wrong = take_option(static_cast<DhcpOption>(code), data); wrong != Drop::none) {
                return wrong;
            }
        }
        return Drop::dhcp_malformed; // no end option
    }

  private:
    constexpr Drop take_option(DhcpOption code, std::span<const std::byte> data) {
        u32* number = nullptr;
        bool list = false;
        u8* small = nullptr;
        switch (code) {
        case DhcpOption::type: small = &type; break;
        case DhcpOption::overload: small = &overload; break;
        case DhcpOption::mask: number = &mask; break;
        case DhcpOption::server: number = &server; break;
        case DhcpOption::lease: number = &lease; break;
        case DhcpOption::renewal: number = &renewal; break;
        case DhcpOption::rebinding: number = &rebinding; break;
        case DhcpOption::routers:
            number = &router;
            list = true;
            break;
        case DhcpOption::dns:
            number = &dns;
            list = true;
            break;
        default: return Drop::none; // not asked for
        }
        u64& seen_here = seen[to_underlying(code) / 64];
        const u64 bit = u64{1} << to_underlying(code) % 64;
        if ((seen_here & bit) != 0) {
            return Drop::dhcp_option;
        }
        seen_here |= bit;
        if (small != nullptr) {
            if (data.size() != 1) {
                return Drop::dhcp_option;
            }
            *small = std::to_integer<u8>(data[0]);
            return Drop::none;
        }
        if (data.size() < 4 || data.size() % 4 != 0 || (!list && data.size() != 4)) {
            return Drop::dhcp_option;
        }
        *number = io::net::take<Big32>(data); // of a list the first one, which the server prefers [rfc2132 §3.5]
        return Drop::none;
    }
};

} // namespace dhcp_detail

/// `message`: the whole UDP datagram. `xid`, `mac`: of the exchange under way.
constexpr Parsed<DhcpAnswer> parse_dhcp(std::span<const std::byte> message, u32 xid, const MacAddress& mac) {
    if (message.size() < sizeof(DhcpHeader)) {
        return Drop::dhcp_malformed;
    }
    const auto header = take<DhcpHeader>(message);
    if (header.operation != 2 || header.hardware != 1 || header.hardware_length != 6 ||
        header.magic != DhcpHeader{}.magic) {
        return Drop::dhcp_malformed;
    }
    if (header.xid != xid || header.mac != mac) {
        return Drop::dhcp_foreign;
    }
    dhcp_detail::Options options;
    if (const Drop wrong = options.read(message.subspan(sizeof(DhcpHeader))); wrong != Drop::none) {
        return wrong;
    }
    if (options.overload > 3) {
        return Drop::dhcp_option;
    }
    struct Field { // that holds options instead [rfc2132 §9.3]
        u8 bit;
        usize at, size;
    };
    for (const Field& field : {Field{1, offsetof(DhcpHeader, file), sizeof(DhcpHeader::file)},
                               Field{2, offsetof(DhcpHeader, server_name), sizeof(DhcpHeader::server_name)}}) {
        if ((options.overload & field.bit) != 0) {
            if (const Drop wrong = options.read(message.subspan(field.at, field.size)); wrong != Drop::none) {
                return wrong;
            }
        }
    }
    DhcpAnswer answer;
    answer.type = static_cast<DhcpType>(options.type);
    answer.server = Ipv4Address::of(options.server);
    if (options.type == 0 || answer.server.none()) {
        return Drop::dhcp_missing;
    }
    if (answer.type == DhcpType::nak) {
        return answer;
    }
    if (answer.type != DhcpType::offer && answer.type != DhcpType::ack) {
        return Drop::dhcp_unexpected;
    }
    if (options.mask == 0 || options.lease == 0) {
        return Drop::dhcp_missing;
    }
    const u32 host_bits = ~options.mask;
    if ((host_bits & (host_bits + 1)) != 0) { // the mask has a gap
        return Drop::dhcp_option;
    }
    answer.subnet = {header.your, static_cast<u8>(std::countl_one(options.mask))};
    answer.gateway = Ipv4Address::of(options.router);
    answer.dns = Ipv4Address::of(options.dns);
    // A gateway may be outside of the subnet: clouds that give /32 do that.
    if (!answer.subnet.is_valid() || !answer.server.is_host() ||
        (!answer.gateway.none() && (!answer.gateway.is_host() || answer.gateway == header.your)) ||
        (!answer.dns.none() && !answer.dns.is_host())) {
        return Drop::dhcp_option;
    }
    answer.lease = options.lease;
    // The defaults of RFC 2131 §4.4.5, also for times in an impossible order.
    answer.renewal = options.renewal;
    answer.rebinding = options.rebinding;
    if (answer.rebinding == 0 || answer.rebinding > answer.lease) {
        answer.rebinding = answer.lease - answer.lease / 8;
    }
    if (answer.renewal == 0 || answer.renewal > answer.rebinding) {
        answer.renewal = std::min(answer.rebinding, std::max(answer.lease / 2, u32{1}));
    }
    return answer;
}

} // namespace fl::io::net
