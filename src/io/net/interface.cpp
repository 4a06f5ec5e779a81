module;
#include "core/try.hpp"
module io.net.interface;
import core.std;
import core.log;
import core.processor;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.latch;
import io.net;
import io.net.arp;
import io.net.drop;
import io.net.ethernet;
import io.net.icmp;
import io.net.ipv4;
import io.net.lanes;
import io.net.udp;
import io.net.wire;
import io.random;
import io.run_on;
import io.task;

namespace fl::io::net {

namespace {

constexpr Error gone{Code::device_gone, "the network device is closed"};
constexpr Error no_address{Code::not_found, "the network interface has no address"};

constexpr auto ping_data = [] {
    std::array<std::byte, 56> data{};
    for (usize i = 0; i < data.size(); ++i) {
        data[i] = static_cast<std::byte>(i);
    }
    return data;
}();

Error error_of(u8 code) {
    switch (static_cast<Unreachable>(code)) {
    case Unreachable::network: return {Code::not_found, "a router says that the network is unreachable"};
    case Unreachable::host: return {Code::not_found, "a router says that the host is unreachable"};
    case Unreachable::protocol: return {Code::not_found, "the host says that it does not have the protocol"};
    case Unreachable::port: return {Code::not_found, "the host says that nobody receives on the port"};
    case Unreachable::too_long: return {Code::bad_argument, "a router says that the packet is too long for its way"};
    }
    return {Code::not_found, "a router or the host refuses the packet"};
}

Task<Result<void>> set_receiver(NetDevice& lane, FrameReceiver* receiver) {
    lane.set_receiver(receiver);
    co_return Result<void>{};
}

} // namespace

// ---- opening and closing ----

Interface::Interface(NetDevice& device, u64 seed)
    : device_(device), random_(seed), ping_identifier_(static_cast<u16>(random_.next())),
      probe_conflict_(device.executor()) {
    executor().add(*this);
}

Interface::~Interface() {
    device_.set_receiver(nullptr);
    for (u32 i = 1; i < max_processors; ++i) {
        if (forwarders_[i]) {
            LaneForwarder::give_up(std::move(forwarders_[i]));
        } else if (opened_ && i < device_.lanes() && &device_.lane(i).executor() == &executor()) {
            device_.lane(i).set_receiver(nullptr);
        }
    }
    end_waiting(nullptr, gone);
    executor().remove(*this);
}

Task<Result<void>> Interface::open() {
    if (opened_) {
        co_return Error{Code::busy, "the network interface is open already"};
    }
    opened_ = true;
    device_.set_receiver(this);
    for (u32 i = 1; i < device_.lanes(); ++i) {
        NetDevice& lane = device_.lane(i);
        if (&lane.executor() == &executor()) {
            lane.set_receiver(this);
            continue;
        }
        forwarders_[i] = LaneForwarder::create(*this, executor(), lane);
        if (!forwarders_[i]) {
            co_return Error{Code::exhausted, "no memory for the frames of another lane"};
        }
        CO_CHECK(co_await run_on(lane.executor(), set_receiver(lane, forwarders_[i].get())));
    }
    co_return Result<void>{};
}

Task<Result<void>> Interface::close() {
    device_.set_receiver(nullptr);
    for (u32 i = 1; i < device_.lanes(); ++i) {
        NetDevice& lane = device_.lane(i);
        if (&lane.executor() == &executor()) {
            lane.set_receiver(nullptr);
        } else if (forwarders_[i]) {
            CO_CHECK(co_await run_on(lane.executor(), set_receiver(lane, nullptr)));
            forwarders_[i]->withdraw();
            drops_.count(Drop::lane_full, forwarders_[i]->dropped());
            forwarders_[i].reset();
        }
    }
    opened_ = false;
    give_up_held();
    end_waiting(nullptr, gone);
    co_return Result<void>{};
}

DropCounters Interface::drops() const {
    DropCounters all = drops_;
    for (const auto& forwarder : forwarders_) {
        if (forwarder) {
            all.count(Drop::lane_full, forwarder->dropped());
        }
    }
    return all;
}

void Interface::link_changed(NetDevice&) {
    if (!device_.is_open()) {
        end_waiting(nullptr, gone);
        for (UdpSocket* socket = sockets_; socket != nullptr; socket = socket->next_) {
            if (socket->receiver_ != nullptr) {
                socket->receiver_->end(gone);
            }
        }
        for (Ping* ping = pings_; ping != nullptr; ping = ping->next) {
            ping->error = gone;
            ping->answered.open();
        }
        return;
    }
    log::info("{}: link {}", device_.identity().name.view(), device_.link_up() ? "up" : "down");
    if (device_.link_up() && config_) { // another switch, which has to learn where this station is
        announce();
    }
}

// ---- the address ----

void Interface::configure(const Config& config) {
    if (config_ && *config_ != config) {
        deconfigure();
    }
    config_ = config;
    announce();
}

void Interface::deconfigure() {
    config_.reset();
    arp_.clear();
    give_up_held();
    end_waiting(nullptr, no_address);
}

void Interface::announce() { // an announcement is a request for the own address [rfc5227 §2.3]
    ++counters_.arp_requests;
    send_arp(broadcast_mac, ArpOperation::request, address(), {}, address());
}

Task<Result<void>> Interface::probe(Ipv4Address address) {
    if (!probing_.none()) {
        co_return Error{Code::busy, "another address is being probed"};
    }
    probing_ = address;
    probe_conflict_.close();
    bool conflict = false;
    for (u32 i = 0; i < probes && !conflict; ++i) {
        ++counters_.arp_requests;
        send_arp(broadcast_mac, ArpOperation::request, {}, {}, address);
        conflict = co_await probe_conflict_.wait_until(executor().now() + probe_interval);
    }
    probing_ = {};
    if (conflict) {
        log::warning("{}: {} is in use by another station of the network", device_.identity().name.view(),
                     text(address).view());
        co_return Error{Code::busy, "the address is in use by another station of the network"};
    }
    co_return Result<void>{};
}

void Interface::conflict(const MacAddress& mac) {
    ++counters_.conflicts;
    const Instant now = executor().turn_time();
    if (defended_ != 0 && now < after(defended_, defend_interval)) {
        return; // the address is kept [rfc5227 §2.4 (c)]
    }
    defended_ = now;
    log::warning("{}: {} also uses the address {}", device_.identity().name.view(), text(mac).view(),
                 text(address()).view());
    announce();
}

// ---- ARP ----

void Interface::send_arp(const MacAddress& to, ArpOperation operation, Ipv4Address sender, const MacAddress& target_mac,
                         Ipv4Address target) {
    std::array<std::byte, sizeof(EthernetHeader) + sizeof(ArpPacket)> frame{};
    const MacAddress& own = device_.identity().mac;
    put(std::span(frame), EthernetHeader{to, own, to_underlying(EtherType::arp)});
    put(std::span(frame).subspan(sizeof(EthernetHeader)), make_arp(operation, own, sender, target_mac, target));
    send_own({frame});
}

void Interface::ask(Ipv4Address address, const MacAddress& to) {
    ++counters_.arp_requests;
    send_arp(to, ArpOperation::request, this->address(), {}, address);
}

Drop Interface::take_arp(std::span<const std::byte> bytes) {
    const auto packet = parse_arp(bytes);
    if (!packet) {
        return packet.why;
    }
    if (packet->sender_mac == device_.identity().mac) {
        return Drop::ethernet_source;
    }
    const bool request = packet->operation == to_underlying(ArpOperation::request);
    // Another station has the address, or probes for it as well [rfc5227 §2.1.1].
    if (!probing_.none() &&
        (packet->sender == probing_ || (request && packet->sender.none() && packet->target == probing_))) {
        probe_conflict_.open();
        return Drop::none;
    }
    if (config_ && packet->sender == address()) {
        conflict(packet->sender_mac);
        return Drop::none;
    }
    const bool learned =
        !packet->sender.none() && arp_.learn(packet->sender, packet->sender_mac, executor().turn_time());
    if (learned) {
        for (PacketSend* send = waiting_; send != nullptr; send = send->next_) {
            if (send->waits_ && send->next_hop_ == packet->sender) {
                send->resolved(packet->sender_mac);
            }
        }
    }
    if (request && config_ && packet->target == address()) {
        ++counters_.arp_replies;
        send_arp(packet->sender_mac, ArpOperation::reply, address(), packet->sender_mac, packet->sender);
        return Drop::none;
    }
    return learned ? Drop::none : Drop::arp_unknown;
}

void Interface::tick(Instant now) {
    arp_.tick(
        now, [this](Ipv4Address address, const MacAddress& to) { ask(address, to); },
        [this](Ipv4Address address) {
            end_waiting(&address, {Code::timed_out, "no station answers for the address (ARP): is it switched on?"});
        });
}

// ---- received packets ----

void Interface::receive(NetDevice&, std::span<const std::byte> frame, Checksum checksum) {
    if (const Drop why = process(frame, checksum); why != Drop::none) {
        drops_.count(why);
    }
}

Drop Interface::process(std::span<const std::byte> frame, Checksum checksum) {
    const auto ethernet = parse_ethernet(frame);
    if (!ethernet) {
        return ethernet.why;
    }
    if (ethernet->source.is_group() || ethernet->source == device_.identity().mac) {
        return Drop::ethernet_source;
    }
    if (ethernet->destination != device_.identity().mac && ethernet->destination != broadcast_mac) {
        return Drop::other_station;
    }
    const std::span<const std::byte> bytes = frame.subspan(sizeof(EthernetHeader));
    switch (static_cast<EtherType>(u16{ethernet->type})) {
    case EtherType::arp: return take_arp(bytes);
    case EtherType::ipv4: return take_ipv4(*ethernet, bytes, checksum);
    }
    return Drop::ethernet_type;
}

bool Interface::is_broadcast(Ipv4Address address) const {
    return address.is_broadcast() || (config_ && address == config_->subnet.broadcast());
}

Drop Interface::take_ipv4(const EthernetHeader& ethernet, std::span<const std::byte> bytes, Checksum checksum) {
    const auto packet = parse_ipv4(bytes);
    if (!packet) {
        return packet.why;
    }
    const Ipv4Address from = packet->header.source;
    const Ipv4Address to = packet->header.destination;
    if (!from.is_host() || is_broadcast(from) || (config_ && from == address())) {
        return Drop::ipv4_source;
    }
    const bool to_all = is_broadcast(to);
    // A broadcast frame carries only packets to all [rfc1122 §3.3.6]. Before there is an address, only a socket that
    // accepts everything gets them.
    if (config_ && !to_all && (to != address() || ethernet.destination == broadcast_mac)) {
        return Drop::ipv4_destination;
    }
    switch (static_cast<Protocol>(packet->header.protocol)) {
    case Protocol::icmp: return config_ && !to_all ? take_icmp(ethernet, *packet) : Drop::ipv4_destination;
    case Protocol::udp: return take_udp(ethernet, *packet, checksum, to_all || !config_);
    }
    return Drop::ipv4_protocol;
}

bool Interface::may_answer() {
    const Instant now = executor().turn_time();
    const u64 earned = (now - std::min(answers_since_, now)) / answer_interval;
    if (earned != 0) {
        answers_left_ =
            static_cast<u32>(std::min<u64>(answer_burst, answers_left_ + std::min<u64>(earned, answer_burst)));
        answers_since_ = now;
    }
    if (answers_left_ == 0) {
        return false;
    }
    --answers_left_;
    return true;
}

// Goes back to the station that sent the question, be it a neighbour or a router.
void Interface::answer(const MacAddress& mac, Ipv4Address to, const IcmpHeader& icmp, std::span<const std::byte> data) {
    std::array<std::byte, sizeof(EthernetHeader) + sizeof(Ipv4Header) + sizeof(IcmpHeader)> head{};
    put(std::span(head), EthernetHeader{mac, device_.identity().mac, to_underlying(EtherType::ipv4)});
    put(std::span(head).subspan(sizeof(EthernetHeader)),
        make_ipv4(Protocol::icmp, address(), to, sizeof(IcmpHeader) + data.size()));
    put(std::span(head).subspan(sizeof(EthernetHeader) + sizeof(Ipv4Header)), icmp);
    send_own({head, data});
}

// Behind those that are held already, and behind packets that wait for room.
void Interface::send_own(const OutgoingFrame& frame) {
    const SendStatus status = held_count_ != 0 ? SendStatus::timed_out : device_.send_now(frame);
    if (status == SendStatus::sent) {
        return;
    }
    bool kept = status == SendStatus::timed_out && held_count_ < max_held && frame.size() <= held_bytes;
    if (kept && held_count_ == 0) {
        kept = static_cast<bool>(held_task_.emplace(executor()).spawn(send_held()));
    }
    if (!kept) {
        ++counters_.answers_lost;
        return;
    }
    Held& held = held_[(held_first_ + held_count_++) % max_held];
    held.size = static_cast<u32>(frame.size());
    const auto rest = std::ranges::copy(frame.head, held.bytes.begin()).out;
    std::ranges::copy(frame.body, rest);
}

Task<Result<void>> Interface::send_held() {
    while (held_count_ != 0) {
        const Held& held = held_[held_first_];
        const SendStatus status = co_await device_.send({std::span(held.bytes).first(held.size)}, held_bound);
        if (status != SendStatus::sent) {
            counters_.answers_lost += std::exchange(held_count_, 0);
            break;
        }
        held_first_ = (held_first_ + 1) % max_held;
        --held_count_;
    }
    co_return Result<void>{};
}

// Those of an address that is gone must not leave any more.
void Interface::give_up_held() {
    held_task_.reset();
    counters_.answers_lost += std::exchange(held_count_, 0);
}

Drop Interface::take_icmp(const EthernetHeader& ethernet, const Ipv4Packet& packet) {
    const auto message = parse_icmp(packet.payload);
    if (!message) {
        return message.why;
    }
    const IcmpHeader& header = message->header;
    switch (static_cast<IcmpType>(header.type)) {
    case IcmpType::echo_request:
        if (!may_answer()) {
            return Drop::icmp_rate;
        }
        ++counters_.echo_replies;
        answer(ethernet.source, packet.header.source,
               make_icmp(IcmpType::echo_reply, 0, header.identifier, header.sequence, message->data), message->data);
        return Drop::none;
    case IcmpType::echo_reply:
        for (Ping* ping = pings_; ping != nullptr; ping = ping->next) {
            if (header.identifier == ping_identifier_ && header.sequence == ping->sequence &&
                packet.header.source == ping->address && ping->at == 0 &&
                std::ranges::equal(message->data, ping_data)) {
                ++counters_.received;
                ping->at = executor().elapsed();
                ping->answered.open();
                return Drop::none;
            }
        }
        return Drop::icmp_unasked;
    case IcmpType::unreachable: return take_error(*message);
    }
    return Drop::icmp_type;
}

Drop Interface::take_error(const IcmpMessage& message) {
    const auto lost = parse_lost(message.data);
    if (!lost || lost->source != address()) {
        return Drop::icmp_type;
    }
    const Error error = error_of(message.header.code);
    if (lost->protocol == Protocol::udp) {
        UdpSocket* const socket = find_socket(lost->source_port);
        if (socket == nullptr || socket->last_sent_to_ != Endpoint{lost->destination, lost->destination_port}) {
            return Drop::icmp_type;
        }
        ++counters_.errors;
        socket->fail(error);
        return Drop::none;
    }
    for (Ping* ping = pings_; ping != nullptr; ping = ping->next) {
        if (lost->source_port == ping_identifier_ && lost->destination_port == ping->sequence &&
            lost->destination == ping->address) {
            ++counters_.errors;
            ping->error = error;
            ping->answered.open();
            return Drop::none;
        }
    }
    return Drop::icmp_type;
}

Drop Interface::take_udp(const EthernetHeader& ethernet, const Ipv4Packet& packet, Checksum checksum, bool to_all) {
    const auto datagram = parse_udp(packet, checksum);
    if (!datagram) {
        return datagram.why;
    }
    UdpSocket* const socket = find_socket(datagram->header.destination);
    if (socket == nullptr || (to_all && !socket->accepts_all_)) {
        if (!to_all && may_answer()) { // [rfc1122 §4.1.3.1]
            ++counters_.unreachables;
            const std::span<const std::byte> begin{packet.head.data(), packet.head.size() + sizeof(UdpHeader)};
            answer(ethernet.source, packet.header.source,
                   make_icmp(IcmpType::unreachable, to_underlying(Unreachable::port), 0, 0, begin), begin);
        }
        return Drop::udp_port;
    }
    if (!socket->deliver({packet.header.source, datagram->header.source}, datagram->data)) {
        return Drop::udp_full;
    }
    ++counters_.received;
    return Drop::none;
}

// ---- sending ----

Result<Ipv4Address> Interface::next_hop(Ipv4Address to) const {
    if (is_broadcast(to)) {
        return Ipv4Address::of(~u32{0});
    }
    if (!config_) {
        return no_address;
    }
    if (!to.is_host() || to == address()) {
        return Error{Code::not_supported, "expected the address of another station: neither a group nor the own one"};
    }
    if (config_->subnet.contains(to)) {
        return to;
    }
    if (config_->gateway.none()) {
        return Error{Code::not_found, "the address is not in the subnet, and there is no gateway"};
    }
    return config_->gateway;
}

void Interface::unlink(PacketSend& send) {
    if (!std::exchange(send.listed_, false)) {
        return;
    }
    PacketSend** at = &waiting_;
    while (*at != &send) {
        at = &(*at)->next_;
    }
    *at = send.next_;
}

void Interface::end_waiting(const Ipv4Address* next_hop, const Error& error) {
    for (PacketSend* send = waiting_; send != nullptr; send = send->next_) {
        if (next_hop == nullptr || (send->waits_ && send->next_hop_ == *next_hop)) {
            send->failed(error);
        }
    }
}

PacketSend::~PacketSend() {
    interface_.executor().cancel(*this);
    interface_.unlink(*this);
}

bool PacketSend::await_ready() {
    if (socket_ != nullptr && socket_->error_) {
        error_ = std::exchange(socket_->error_, std::nullopt);
        return true;
    }
    if (socket_ != nullptr && socket_->port_ == 0) {
        error_ = {Code::bad_argument, "the UDP socket has no port: bind() comes first"};
        return true;
    }
    NetDevice& device = interface_.device_;
    const usize size = sizeof(Ipv4Header) + sizeof(UdpHeader) + body_.size();
    if (size > device.identity().mtu) {
        error_ = {Code::bad_argument, "the packet is longer than the device's MTU permits, and nothing is fragmented",
                  device.identity().mtu, size};
        return true;
    }
    const auto hop = interface_.next_hop(to_.address);
    if (!hop) {
        error_ = hop.error();
        return true;
    }
    const auto transport = std::span(head_).subspan(sizeof(EthernetHeader) + sizeof(Ipv4Header));
    const Ipv4Address source = interface_.address();
    put(std::span(head_).subspan(sizeof(EthernetHeader)),
        make_ipv4(protocol_, source, to_.address, sizeof(UdpHeader) + body_.size()));
    if (protocol_ == Protocol::udp) {
        checksum_ = device.offloads_checksums() ? Checksum::partial : Checksum::unknown;
        put(transport, make_udp(source, from_, to_.address, to_.port, body_, checksum_));
        socket_->last_sent_to_ = to_;
    } else {
        put(transport, make_icmp(IcmpType::echo_request, 0, from_, to_.port, body_));
    }
    if (hop->is_broadcast()) {
        return transmit(broadcast_mac, length_);
    }
    const auto answer = interface_.arp_.look_up(*hop, interface_.executor().turn_time());
    if (answer.ask) {
        interface_.ask(*hop, answer.state == ArpTable::Answer::State::known ? answer.mac : broadcast_mac);
        interface_.executor().poll(interface_); // wants_tick()
    }
    switch (answer.state) {
    case ArpTable::Answer::State::known: return transmit(answer.mac, length_);
    case ArpTable::Answer::State::full:
        error_ = {Code::exhausted, "too many neighbours are being asked for (ARP)", ArpTable::capacity,
                  ArpTable::capacity + 1};
        return true;
    case ArpTable::Answer::State::asked: break;
    }
    next_hop_ = *hop;
    return false;
}

bool PacketSend::transmit(const MacAddress& mac, Nanoseconds bound) {
    put(std::span(head_), EthernetHeader{mac, interface_.device_.identity().mac, to_underlying(EtherType::ipv4)});
    device_send_.emplace(interface_.device_, OutgoingFrame{head_, body_}, checksum_, bound);
    return device_send_->await_ready();
}

void PacketSend::await_suspend(std::coroutine_handle<> h) {
    waiter = h;
    listed_ = true;
    next_ = std::exchange(interface_.waiting_, this);
    if (device_send_) {
        device_send_->await_suspend(h);
        return;
    }
    Bound(interface_.executor(), length_).apply_to(*this);
    interface_.executor().start(*this);
    waits_ = true;
}

// The neighbour has answered: what is left of the bound is for the device.
void PacketSend::resolved(const MacAddress& mac) {
    Executor& executor = interface_.executor();
    const Instant now = executor.now();
    const Instant end = executor.end_of_bound(begun, length_);
    executor.cancel(*this);
    waits_ = false;
    if (transmit(mac, end - std::min(now, end))) {
        executor.make_ready(*this);
    } else {
        device_send_->await_suspend(waiter);
    }
}

void PacketSend::failed(const Error& error) {
    interface_.executor().cancel(*this);
    device_send_.reset(); // withdraws it
    waits_ = false;
    error_ = error;
    interface_.executor().make_ready(*this);
}

Result<void> PacketSend::await_resume() {
    interface_.unlink(*this);
    if (waits_) { // resumed by the timer
        error_ = {Code::timed_out, "no station has answered for the address (ARP) within the bound"};
    }
    if (error_) {
        return *error_;
    }
    if (const SendStatus status = device_send_->await_resume(); status != SendStatus::sent) {
        return to_error(status);
    }
    ++interface_.counters_.sent;
    if (socket_ != nullptr) {
        ++socket_->counters_.sent;
    }
    return {};
}

// ---- echo ----

// In the interface's list as long as a coroutine waits.
class Interface::PingInList {
  public:
    PingInList(Interface& interface, Ipv4Address address, u16 sequence)
        : interface_(interface), ping(interface.executor()) {
        ping.address = address;
        ping.sequence = sequence;
        ping.next = std::exchange(interface.pings_, &ping);
    }
    PingInList(const PingInList&) = delete;
    PingInList& operator=(const PingInList&) = delete;
    ~PingInList() {
        Ping** at = &interface_.pings_;
        while (*at != &ping) {
            at = &(*at)->next;
        }
        *at = ping.next;
    }

  private:
    Interface& interface_;

  public:
    Ping ping;
};

Task<Result<Nanoseconds>> Interface::ping(Ipv4Address address, u16 sequence, Nanoseconds bound) {
    PingInList waiting(*this, address, sequence);
    Ping& ping = waiting.ping;
    const Bound end(executor(), bound);
    const Instant begun = executor().elapsed();
    CO_CHECK(
        co_await PacketSend(*this, nullptr, Protocol::icmp, ping_identifier_, {address, sequence}, ping_data, bound));
    const bool answered = co_await ping.answered.wait(end);
    if (ping.error) {
        co_return *ping.error;
    }
    if (!answered) {
        co_return Error{Code::timed_out, "no answer to an echo request within the bound"};
    }
    co_return ping.at - begun;
}

} // namespace fl::io::net
