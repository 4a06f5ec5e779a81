// An interface that gets arbitrary frames, damaged and well-formed ones, while sockets are open, pings are under way
// and DHCP runs. Checked: nothing outside of a frame is read, every wait ends within its bound, every frame sent is
// well-formed and comes from the own address, an address is valid, and answers have a limit.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <vector>
import core.std;
import core.result;
import core.text;
import core.dma;
import core.log;
import core.time;
import io.block;
import io.executor;
import io.net;
import io.net.arp;
import io.net.dhcp;
import io.net.dhcp_client;
import io.net.drop;
import io.net.ethernet;
import io.net.icmp;
import io.net.interface;
import io.net.ipv4;
import io.net.numbered;
import io.net.udp;
import io.net.wire;
import io.task;

#include "fuzz/input.hpp"
// Depends on the imports above.
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace fl::io::net;
using fuzz::require;
using io::Checksum;
using io::MacAddress;

constexpr MacAddress own_mac{{0x52, 0x54, 0, 0, 0, 1}};
constexpr MacAddress peer_mac{{0x52, 0x54, 0, 0, 0, 2}};
constexpr Ipv4Address own{{10, 0, 0, 1}};
constexpr Nanoseconds bound = 2'000'000'000;
constexpr Nanoseconds slack = 500'000'000; // a turn may take a tenth of a second here
constexpr u32 mtu = 600;

class Card final : public io::NetDevice {
  public:
    explicit Card(io::Executor& executor) : NetDevice(executor) {
        identity_.name = FixedText<16>("eth0");
        identity_.mac = own_mac;
        identity_.mtu = mtu;
        set_open(true);
    }
    ~Card() { set_open(false); }
    bool start(const io::OutgoingFrame& frame, Checksum checksum) override {
        if (room_left == 0) {
            return false;
        }
        --room_left;
        std::vector<std::byte> bytes(frame.head.begin(), frame.head.end());
        bytes.insert(bytes.end(), frame.body.begin(), frame.body.end());
        check(bytes, checksum);
        return true;
    }
    void give_room(u32 frames) {
        room_left += frames;
        room();
    }
    void arrive(std::span<const std::byte> frame, Checksum checksum) {
        const auto copy = std::make_unique<std::byte[]>(frame.size()); // ends with the frame
        std::copy(frame.begin(), frame.end(), copy.get());
        deliver({copy.get(), frame.size()}, checksum);
    }
    void close() { set_open(false); }
    void link(bool up) { set_link(up); }
    void offload(bool on) { offloads_checksums_ = on; }

    Interface* interface = nullptr;
    u32 room_left = 8;
    u32 xid = 0; // of the last DHCP message sent
    u64 answers = 0;

  private:
    void check(std::span<const std::byte> frame, Checksum checksum) {
        require(frame.size() <= max_frame());
        const auto ethernet = parse_ethernet(frame);
        require(ethernet && ethernet->source == own_mac);
        if (ethernet->type == to_underlying(EtherType::arp)) {
            const auto arp = parse_arp(frame.subspan(14));
            require(arp && arp->sender_mac == own_mac && frame.size() == 42);
            require(arp->sender.none() || arp->sender == interface->address());
            return;
        }
        require(ethernet->type == to_underlying(EtherType::ipv4));
        const auto packet = parse_ipv4(frame.subspan(14));
        require(packet && packet->payload.size() + 34 == frame.size());
        require(packet->header.source == interface->address() || packet->header.source.none());
        require(!packet->header.source.none() || packet->header.destination.is_broadcast());
        if (packet->header.protocol == to_underlying(Protocol::udp)) {
            const auto datagram = parse_udp(*packet, checksum == Checksum::partial ? checksum : Checksum::unknown);
            require(static_cast<bool>(datagram));
            if (datagram->header.destination == dhcp_server_port && datagram->data.size() == dhcp_request_bytes) {
                xid = take<DhcpHeader>(datagram->data).xid;
            }
            return;
        }
        require(packet->header.protocol == to_underlying(Protocol::icmp) && checksum == Checksum::unknown);
        const auto message = parse_icmp(packet->payload);
        require(static_cast<bool>(message));
        answers += message->header.type != to_underlying(IcmpType::echo_request) ? 1 : 0;
    }
};

struct Machine {
    fuzz::Input& input;
    io::Executor& executor;
    Card& card;
    Interface& interface;
    UdpSocket& socket;
    DhcpClient& dhcp;
    io::TaskGroup& tasks;
    test::FakeMachine& clock;
    u32 waits = 0; // under way
    bool dhcp_runs = false;
    bool receives = false;
    std::array<std::byte, 300> buffer{};
    std::array<std::byte, 700> data{};

    // A wait that began at `begun`, with this bound, ends now. Stops of the machine at most double it.
    void ended(Instant begun, Nanoseconds length) {
        --waits;
        require(executor.now() <= begun + 2 * length + slack);
    }
    static io::Task<Result<void>> send(Machine& m, Endpoint to, usize size) {
        const Instant begun = m.executor.now();
        const auto sent = co_await m.socket.send_to(to, std::span(m.data).first(size), bound);
        require(!sent || size + 28 <= mtu);
        m.ended(begun, 3 * bound / 2); // room is waited for with a bound of its own: what the neighbour has left
        co_return Result<void>{};
    }
    static io::Task<Result<void>> receive(Machine& m, usize size) {
        const Instant begun = m.executor.now();
        const auto datagram = co_await m.socket.receive(std::span(m.buffer).first(size), bound);
        require(!datagram || datagram->from.address.is_host());
        if (datagram) {
            static_cast<void>(parse_numbered(std::span(m.buffer).first(std::min<usize>(size, datagram->size))));
        }
        m.receives = false;
        m.ended(begun, bound);
        co_return Result<void>{};
    }
    static io::Task<Result<void>> ping(Machine& m, Ipv4Address to, u16 sequence) {
        const Instant begun = m.executor.now();
        static_cast<void>(co_await m.interface.ping(to, sequence, bound));
        m.ended(begun, 2 * bound); // the request, and the answer
        co_return Result<void>{};
    }
    static io::Task<Result<void>> run_dhcp(Machine& m) {
        static constexpr Nanoseconds length = 20'000'000'000;
        const Instant begun = m.executor.now();
        const auto got = co_await m.dhcp.acquire(length);
        m.ended(begun, length + bound);
        if (got) {
            require(m.interface.config().has_value());
            static_cast<void>(co_await m.dhcp.keep());
        }
        m.dhcp_runs = false;
        co_return Result<void>{};
    }
    void spawn(io::Task<Result<void>> task) {
        ++waits;
        require(static_cast<bool>(tasks.spawn(std::move(task))));
    }
    Ipv4Address some_address() {
        const u8 which = input.byte();
        switch (which % 8) {
        case 0: return interface.address();
        case 1: return {{255, 255, 255, 255}};
        case 2: return {{10, 0, 0, 255}};
        case 3: return {{192, 168, 1, which}};
        case 4: return Ipv4Address::of(input.word());
        default: return {{10, 0, 0, static_cast<u8>(which / 8)}};
        }
    }
    std::vector<std::byte> frame(EtherType type, bool to_all) {
        std::vector<std::byte> bytes(14);
        put(std::span(bytes), EthernetHeader{to_all ? io::broadcast_mac : own_mac, peer_mac, to_underlying(type)});
        return bytes;
    }
    void ipv4(Protocol protocol, bool to_all, std::span<const std::byte> transport) {
        const Ipv4Address from = some_address();
        const Ipv4Address to = some_address();
        auto bytes = frame(EtherType::ipv4, to_all);
        bytes.resize(34);
        put(std::span(bytes).subspan(14), make_ipv4(protocol, from, to, transport.size()));
        bytes.insert(bytes.end(), transport.begin(), transport.end());
        card.arrive(bytes, Checksum::verified); // the fuzzer cannot guess a UDP checksum
    }
    void icmp(bool to_all) {
        const auto type = static_cast<IcmpType>(input.byte() & 15);
        const u8 code = input.byte();
        const u16 identifier = static_cast<u16>(input.word());
        const u16 sequence = input.byte();
        const auto body = input.take(input.byte());
        std::vector<std::byte> bytes(8);
        put(std::span(bytes), make_icmp(type, code, identifier, sequence, body));
        bytes.insert(bytes.end(), body.begin(), body.end());
        ipv4(Protocol::icmp, to_all, bytes);
    }
    void udp(bool to_all, u16 from, u16 to, std::span<const std::byte> body) {
        std::vector<std::byte> bytes(8);
        put(std::span(bytes), UdpHeader{from, to, static_cast<u16>(8 + body.size()), {}});
        bytes.insert(bytes.end(), body.begin(), body.end());
        ipv4(Protocol::udp, to_all, bytes);
    }
    void dhcp_answer(bool to_all) {
        DhcpHeader header;
        header.operation = 2;
        header.xid = card.xid;
        header.mac = own_mac;
        header.your = some_address();
        const u8 shape = input.byte();
        std::vector<std::byte> bytes(240);
        put(std::span(bytes), header);
        const auto add = [&](std::initializer_list<u8> option) {
            for (u8 byte : option) {
                bytes.push_back(static_cast<std::byte>(byte));
            }
        };
        if ((shape & 1) != 0) { // what makes a whole one
            add({53, 1,
                 static_cast<u8>((shape >> 1 & 3) == 0   ? 2
                                 : (shape >> 1 & 3) == 1 ? 5
                                 : (shape >> 1 & 3) == 2 ? 6
                                                         : input.byte())});
            add({54, 4, 10, 0, 0, 2, 1, 4, 255, 255, 255, 0});
            add({51, 4, 0, 0, input.byte(), input.byte()});
        }
        const auto options = input.take(input.byte());
        bytes.insert(bytes.end(), options.begin(), options.end());
        if ((shape & 8) != 0) {
            add({255});
        }
        udp(to_all, 67, 68, bytes);
    }
    void arp() {
        auto bytes = frame(EtherType::arp, (input.byte() & 1) != 0);
        bytes.resize(42);
        MacAddress sender = peer_mac;
        sender.bytes[0] = input.byte();
        put(std::span(bytes).subspan(14),
            make_arp(static_cast<ArpOperation>(input.byte() & 3), sender, some_address(), own_mac, some_address()));
        card.arrive(bytes, Checksum::unknown);
    }

    // One action of a peer, the host or the guest.
    void step() {
        const u8 what = input.byte();
        const bool flag = (what & 0x80) != 0;
        switch (what & 15) {
        case 0: card.arrive(input.take(input.byte()), static_cast<Checksum>(what >> 4 & 1)); break;
        case 1: {
            auto bytes = frame(EtherType::ipv4, flag);
            const auto rest = input.take(input.byte());
            bytes.insert(bytes.end(), rest.begin(), rest.end());
            card.arrive(bytes, Checksum::unknown);
            break;
        }
        case 2: arp(); break;
        case 3: icmp(flag); break;
        case 4:
            udp(flag, input.byte(), (what & 0x10) != 0 ? u16{1000} : u16{input.byte()}, input.take(input.byte()));
            break;
        case 5:
        case 6: dhcp_answer(flag); break;
        case 7:
            if (waits < 20) {
                const Ipv4Address to = some_address();
                spawn(send(*this, {to, input.byte()}, std::min<usize>(input.byte() * 3, data.size())));
            }
            break;
        case 8:
            if (!receives && waits < 20) {
                receives = true;
                spawn(receive(*this, input.byte()));
            }
            break;
        case 9:
            if (waits < 20) {
                const Ipv4Address to = some_address();
                spawn(ping(*this, to, input.byte()));
            }
            break;
        case 10: card.give_room(what >> 4); break;
        case 11:
            if (!dhcp_runs && waits < 20) {
                dhcp_runs = true;
                spawn(run_dhcp(*this));
            }
            break;
        case 12:
            if (!dhcp_runs) {
                interface.configure({{own, 24}, {{10, 0, 0, 254}}});
            }
            break;
        case 13:
            if (!dhcp_runs) {
                interface.deconfigure();
            }
            break;
        case 14: clock.time += Nanoseconds{input.byte()} * 10'000'000; break;
        default:
            switch (what >> 4) {
            case 0: card.close(); break;
            case 1: card.link(false); break;
            case 2: card.link(true); break;
            case 3: card.offload(true); break;
            case 4: card.offload(false); break;
            default: clock.time += 1'000'000'000; break;
            }
        }
        if (const auto& config = interface.config()) {
            require(config->subnet.is_valid());
        }
    }
};
} // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    fuzz::Input input(data, size);
    test::FakeMachine clock;
    clock.step = 1'000;
    io::Executor executor(clock.platform());
    const Instant begun = executor.now();
    {
        Card card(executor);
        const auto interface = std::make_unique<Interface>(card, 1);
        card.interface = interface.get();
        std::array<std::byte, 1000> queue{};
        UdpSocket socket(*interface, queue);
        const auto dhcp = std::make_unique<DhcpClient>(*interface);
        io::TaskGroup tasks(executor);
        require(static_cast<bool>(executor.run(interface->open())));
        interface->configure({{own, 24}, {{10, 0, 0, 254}}});
        require(static_cast<bool>(socket.bind(1000)));
        Machine machine{input, executor, card, *interface, socket, *dhcp, tasks, clock};
        for (u32 turns = 0; !input.empty(); ++turns) {
            require(turns < 100'000);
            machine.step();
            executor.turn();
        }
        card.give_room(1000);
        for (u32 turns = 0; machine.waits != 0; ++turns) { // everything ends, if nothing arrives any more
            require(turns < 100'000);
            executor.turn();
        }
        require(card.answers <= Interface::answer_burst + (executor.now() - begun) / Interface::answer_interval + 1);
    }
    require(io::frame_pool().in_use() == 0);
    return 0;
}
