// ARP for IPv4 on Ethernet [rfc826]: packets, and the table of neighbours. No I/O.
module;
#include <cstddef>
export module io.net.arp;
import core.std;
import core.time;
import io.net;
import io.net.drop;
import io.net.ipv4;
import io.net.wire;

export namespace fl::io::net {

enum class ArpOperation : u16 { request = 1, reply = 2 };

struct ArpPacket {
    Big16 hardware = u16{1}; // Ethernet
    Big16 protocol = u16{0x0800};
    u8 hardware_length = 6;
    u8 protocol_length = 4;
    Big16 operation;
    MacAddress sender_mac;
    Ipv4Address sender;
    MacAddress target_mac;
    Ipv4Address target;
};
static_assert(sizeof(ArpPacket) == 28 && offsetof(ArpPacket, protocol) == 2 &&
              offsetof(ArpPacket, hardware_length) == 4 && offsetof(ArpPacket, protocol_length) == 5 &&
              offsetof(ArpPacket, operation) == 6 && offsetof(ArpPacket, sender_mac) == 8 &&
              offsetof(ArpPacket, sender) == 14 && offsetof(ArpPacket, target_mac) == 18 &&
              offsetof(ArpPacket, target) == 24);

/// `bytes`: what follows the Ethernet header. The sender is a station, with no address yet if it probes [rfc5227].
constexpr Parsed<ArpPacket> parse_arp(std::span<const std::byte> bytes) {
    if (bytes.size() < sizeof(ArpPacket)) {
        return Drop::arp_malformed;
    }
    const auto packet = take<ArpPacket>(bytes);
    const u16 operation = packet.operation;
    if (packet.hardware != 1 || packet.protocol != 0x0800 || packet.hardware_length != 6 ||
        packet.protocol_length != 4 || (operation != 1 && operation != 2) || packet.sender_mac.is_group() ||
        packet.sender_mac == MacAddress{} || (!packet.sender.none() && !packet.sender.is_host())) {
        return Drop::arp_malformed;
    }
    return packet;
}

constexpr ArpPacket make_arp(ArpOperation operation, const MacAddress& sender_mac, Ipv4Address sender,
                             const MacAddress& target_mac, Ipv4Address target) {
    ArpPacket packet;
    packet.operation = to_underlying(operation);
    packet.sender_mac = sender_mac;
    packet.sender = sender;
    packet.target_mac = target_mac;
    packet.target = target;
    return packet;
}

/// The neighbours that somebody here has asked for; nothing that arrives adds an entry. An entry is asked for again
/// when it is used after its lifetime, and used meanwhile. Times are machine time of the interface's executor.
class ArpTable {
  public:
    static constexpr usize capacity = 32;
    static constexpr u32 attempts = 3;
    static constexpr Nanoseconds interval = 1'000'000'000; // between attempts: one a second at most [rfc1122 §2.3.2.1]
    static constexpr Nanoseconds lifetime = 60'000'000'000;

    struct Answer {
        enum class State : u8 {
            known,
            asked, // wait until tick() or learn() says how it ended
            full,  // all entries are being asked for
        } state;
        MacAddress mac{}; // if known
        bool ask = false; // the caller is to send a request now, to this station if it is known
    };

    Answer look_up(Ipv4Address address, Instant now) {
        Entry* free = nullptr;
        for (Entry& entry : entries_) {
            if (entry.state != State::free && entry.address == address) {
                entry.used = now;
                if (entry.state == State::known && now >= after(entry.since, lifetime)) {
                    entry = {address, entry.mac, State::renewing, 1, now, now};
                    return {Answer::State::known, entry.mac, true};
                }
                return {entry.state == State::asked ? Answer::State::asked : Answer::State::known, entry.mac};
            }
            if (entry.state == State::free) {
                free = free == nullptr || free->state != State::free ? &entry : free;
            } else if (entry.state == State::known &&
                       (free == nullptr || (free->state == State::known && entry.used < free->used))) {
                free = &entry; // the one that was not used for the longest time
            }
        }
        if (free == nullptr) {
            return {Answer::State::full};
        }
        *free = {address, {}, State::asked, 1, now, now};
        return {Answer::State::asked, {}, true};
    }
    /// A station says that it has the address. False: nobody here has asked for it.
    bool learn(Ipv4Address address, const MacAddress& mac, Instant now) {
        Entry* const entry = find(address);
        if (entry == nullptr) {
            return false;
        }
        *entry = {address, mac, State::known, 0, now, entry->used};
        return true;
    }
    /// Whether answers are awaited, so that tick() is to be called.
    bool waits() const {
        return std::ranges::any_of(
            entries_, [](const Entry& e) { return e.state == State::asked || e.state == State::renewing; });
    }
    /// Calls ask(address, mac) for each request to be sent again (mac: whom to ask, or broadcast), and failed(address)
    /// for each address without an answer.
    template <class Ask, class Failed>
    void tick(Instant now, Ask&& ask, Failed&& failed) {
        for (Entry& entry : entries_) {
            if ((entry.state != State::asked && entry.state != State::renewing) || now < after(entry.since, interval)) {
                continue;
            }
            if (entry.attempts < attempts) {
                ++entry.attempts;
                entry.since = now;
                ask(entry.address, entry.state == State::asked ? broadcast_mac : entry.mac);
            } else {
                entry.state = State::free;
                failed(entry.address);
            }
        }
    }
    void clear() { entries_ = {}; }

  private:
    enum class State : u8 { free, asked, known, renewing };
    struct Entry {
        Ipv4Address address;
        MacAddress mac;
        State state = State::free;
        u8 attempts = 0;
        Instant since = 0; // asked: the last request; known: the last answer
        Instant used = 0;
    };
    Entry* find(Ipv4Address address) {
        for (Entry& entry : entries_) {
            if (entry.state != State::free && entry.address == address) {
                return &entry;
            }
        }
        return nullptr;
    }
    std::array<Entry, capacity> entries_{};
};

} // namespace fl::io::net
