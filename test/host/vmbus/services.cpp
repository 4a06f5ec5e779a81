module;
#include <cstddef>
module host.services;
import host.std;
import host.channel;

namespace fl::host {
namespace {

// A packet's payload: the pipe's header, the service's header, then the message [hv-ic].
constexpr u32 pipe_data = 1;
constexpr u16 type_negotiate = 0;
constexpr u16 type_heartbeat = 1;
constexpr u16 type_shutdown = 3;
constexpr u16 type_time_sync = 4;
constexpr u8 flag_transaction = 1;
constexpr u8 flag_request = 2;
constexpr u8 flag_response = 4;

struct Header {
    u32 pipe_type;
    u32 pipe_bytes; // length of the following data, without padding
    u16 framework_major;
    u16 framework_minor;
    u16 type;
    u16 message_major;
    u16 message_minor;
    u16 message_bytes;
    u32 status;
    u8 transaction;
    u8 flags;
    u8 reserved[2];
};
static_assert(sizeof(Header) == 28 && offsetof(Header, pipe_bytes) == 4 && offsetof(Header, framework_major) == 8 &&
              offsetof(Header, framework_minor) == 10 && offsetof(Header, type) == 12 &&
              offsetof(Header, message_major) == 14 && offsetof(Header, message_minor) == 16 &&
              offsetof(Header, message_bytes) == 18 && offsetof(Header, status) == 20 &&
              offsetof(Header, transaction) == 24 && offsetof(Header, flags) == 25);
constexpr u32 pipe_header_bytes = 8;
constexpr usize message_limit = 4096;

constexpr std::array<u32, 2> frameworks{0x00010000, 0x00030000};

/// Consecutive values, as in the messages of the services.
class Body {
  public:
    template <std::unsigned_integral T>
    Body& add(T value) {
        std::memcpy(bytes_.data() + size_, &value, sizeof value);
        size_ += sizeof value;
        return *this;
    }
    Body& zeros(usize count) {
        size_ += count;
        return *this;
    }
    Body& version(u32 value) { return add(static_cast<u16>(value >> 16)).add(static_cast<u16>(value)); }
    std::span<const std::byte> bytes() const { return std::span(bytes_).first(size_); }

  private:
    std::array<std::byte, message_limit> bytes_{};
    usize size_ = 0;
};

DeviceOffer pipe_offer(const Guid& type, const Guid& instance) {
    DeviceOffer offer{.type = type, .instance = instance, .flags = 0x11}; // ENUMERATE_DEVICE_INTERFACE, NAMED_PIPE_MODE
    offer.user[0] = 4;                                                    // messages, not a stream of bytes
    return offer;
}

} // namespace

// ---- common parts ----

void Service::opened(Channel& channel) {
    channel_ = &channel;
    versions_ = {};
    outstanding_ = false;
}

void Service::closed(Channel&) {
    channel_ = nullptr;
    versions_ = {};
    outstanding_ = false;
}

bool Service::write(Channel& channel, u16 type, std::span<const std::byte> body) {
    std::array<std::byte, sizeof(Header) + message_limit> bytes;
    Header header{};
    header.pipe_type = pipe_data;
    header.pipe_bytes = static_cast<u32>(sizeof(Header) - pipe_header_bytes + body.size());
    header.framework_major = static_cast<u16>(versions_.framework >> 16);
    header.framework_minor = static_cast<u16>(versions_.framework);
    header.type = type;
    header.message_major = static_cast<u16>(versions_.message >> 16);
    header.message_minor = static_cast<u16>(versions_.message);
    header.message_bytes = static_cast<u16>(body.size());
    header.flags = flag_transaction | flag_request;
    std::memcpy(bytes.data(), &header, sizeof header);
    std::memcpy(bytes.data() + sizeof header, body.data(), body.size());
    outstanding_ = channel.send(PacketType::data_inband, 0, 0, std::span(bytes).first(sizeof header + body.size()));
    request_type_ = type;
    return outstanding_;
}

bool Service::request(Channel& channel, u16 type, std::span<const std::byte> body) {
    return write(channel, type, body);
}

u64 Service::tick(Channel& channel, u64 now) {
    if (outstanding_ || channel.broken()) {
        return ~u64{0}; // until the reply arrives
    }
    u64 next = ~u64{0};
    if (versions_.framework == 0) {
        Body body;
        body.add(static_cast<u16>(frameworks.size())).add(static_cast<u16>(offered_.size())).add(u32{0});
        for (const u32 version : frameworks) {
            body.version(version);
        }
        for (const u32 version : offered_) {
            body.version(version);
        }
        static_cast<void>(write(channel, type_negotiate, body.bytes()));
    } else {
        next = ready(channel, now);
    }
    static_cast<void>(channel.finish());
    return next;
}

bool Service::serve(Channel& channel) {
    channel.begin();
    while (const auto packet = channel.receive()) {
        take(channel, *packet);
    }
    return channel.finish();
}

void Service::negotiated(Channel& channel, std::span<const std::byte> body) {
    std::array<u16, 8> words{}; // two counts, four reserved bytes, framework and message version
    std::memcpy(words.data(), body.data(), std::min(body.size(), sizeof words));
    const u32 framework = u32{words[4]} << 16 | words[5];
    const u32 message = u32{words[6]} << 16 | words[7];
    const bool known = std::find(frameworks.begin(), frameworks.end(), framework) != frameworks.end() &&
                       std::find(offered_.begin(), offered_.end(), message) != offered_.end();
    if (body.size() < sizeof words || words[0] != 1 || words[1] != 1 || !known) {
        bus_->judge().violation(
            "channel %u (%s): the negotiation was answered with %u framework and %u message versions, %u.%u and %u.%u; "
            "expected one of each that was offered",
            channel.relid(), name().data(), words[0], words[1], words[4], words[5], words[6], words[7]);
        outstanding_ = true; // no further request
        return;
    }
    versions_ = {framework, message};
    bus_->judge().note("%s: framework %u.%u, message version %u.%u", name().data(), words[4], words[5], words[6],
                       words[7]);
}

void Service::take(Channel& channel, const Packet& packet) {
    Header header{};
    const auto bad = [&](const char* what, u64 expected, u64 seen) {
        bus_->judge().violation("channel %u (%s): %s; expected %llu, seen %llu", channel.relid(), name().data(), what,
                                static_cast<unsigned long long>(expected), static_cast<unsigned long long>(seen));
    };
    if (packet.type != PacketType::data_inband || packet.payload.size() < sizeof header) {
        return bad("an answer is an in-band packet with both headers", sizeof header, packet.payload.size());
    }
    std::memcpy(&header, packet.payload.data(), sizeof header);
    const usize there = packet.payload.size() - pipe_header_bytes;
    if (header.pipe_type != pipe_data || header.pipe_bytes > there ||
        header.pipe_bytes < sizeof header - pipe_header_bytes) {
        return bad("the pipe's header does not fit the packet", there, header.pipe_bytes);
    }
    if (!outstanding_ || header.type != request_type_) {
        return bad("an answer of an unexpected type", outstanding_ ? request_type_ : 0xffff, header.type);
    }
    if ((header.flags & (flag_transaction | flag_request | flag_response)) != (flag_transaction | flag_response)) {
        return bad("an answer has the response flag", flag_transaction | flag_response, header.flags);
    }
    outstanding_ = false;
    const usize room = header.pipe_bytes - (sizeof header - pipe_header_bytes);
    const auto body = packet.payload.subspan(sizeof header, room);
    if (header.type == type_negotiate) {
        negotiated(channel, body);
    } else {
        answered(header.type, header.status, body);
    }
}

// ---- shutdown ----

ShutdownService::ShutdownService() : Service({0x00010000, 0x00030000, 0x00030001, 0x00030002}) {}

DeviceOffer ShutdownService::offer() const {
    return pipe_offer(guid("0e0b6031-5213-4934-818b-38d90ced39db"), guid("b6650ff7-33bc-4840-8048-e0676786f393"));
}

void ShutdownService::request_shutdown(bool restart) {
    wanted_ = true;
    restart_ = restart;
    if (bus_ != nullptr) {
        bus_->kick(*this);
    }
}

u64 ShutdownService::ready(Channel& channel, u64) {
    if (wanted_) {
        Body body; // reason (planned), seconds, flags (force, restart), 2048 bytes of text
        body.add(u32{0x80000000}).add(u32{0}).add(restart_ ? u32{2} : u32{0}).zeros(2048);
        if (request(channel, type_shutdown, body.bytes())) {
            wanted_ = false;
            shutdown_ = ShutdownState::requested;
        }
    }
    return ~u64{0};
}

void ShutdownService::answered(u16, u32 status, std::span<const std::byte>) {
    shutdown_ = status == 0 ? ShutdownState::accepted : ShutdownState::refused;
    bus_->judge().note("shutdown: the guest answers 0x%x", status);
}

// ---- heartbeat ----

HeartbeatService::HeartbeatService() : Service({0x00010000, 0x00030000}) {}

DeviceOffer HeartbeatService::offer() const {
    return pipe_offer(guid("57164f39-9115-4e78-ab55-382f3bd5422d"), guid("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"));
}

u64 HeartbeatService::ready(Channel& channel, u64 now) {
    if (bus_->heartbeat_interval() == 0) {
        return ~u64{0};
    }
    if (now >= next_) {
        Body body; // sequence number, application state, reserved
        body.add(sequence_).zeros(32);
        if (request(channel, type_heartbeat, body.bytes())) {
            ++sent_;
            next_ = now + bus_->heartbeat_interval();
        }
    }
    return next_;
}

void HeartbeatService::answered(u16, u32, std::span<const std::byte> body) {
    u64 sequence = 0;
    std::memcpy(&sequence, body.data(), std::min(body.size(), sizeof sequence));
    if (body.size() < sizeof sequence || sequence != sequence_ + 1) {
        bus_->judge().violation("heartbeat: the sequence number is not one more; expected %llu, seen %llu",
                                static_cast<unsigned long long>(sequence_ + 1),
                                static_cast<unsigned long long>(sequence));
    }
    sequence_ += 2;
    ++answers_;
    ++bus_->counters().heartbeats;
}

// ---- time ----

TimeSyncService::TimeSyncService(std::function<u64()> wall_clock, std::function<u64()> reference)
    : Service({0x00010000, 0x00030000, 0x00040000}), wall_clock_(std::move(wall_clock)),
      reference_(std::move(reference)) {}

DeviceOffer TimeSyncService::offer() const {
    return pipe_offer(guid("9527e630-d0ae-497b-adce-e80ab0175caf"), guid("2dd1ce17-079e-403c-b352-a1921ee207ee"));
}

u64 TimeSyncService::ready(Channel& channel, u64 now) {
    if (now >= next_) {
        constexpr u8 sync = 1;
        constexpr u8 sample = 2;
        Body body;
        const u8 flags = first_ ? sync : sample;
        // host time, partition reference time at that moment, flags, leap indicator, stratum
        if (versions().message >= 0x00040000) {
            body.add(wall_clock_()).add(reference_()).add(flags).zeros(7);
        } else { // host time, guest time, round trip, flags
            body.add(wall_clock_()).add(u64{0}).add(u64{0}).add(flags).zeros(3);
        }
        if (request(channel, type_time_sync, body.bytes())) {
            first_ = false;
            next_ = bus_->time_sync_interval() == 0 ? ~u64{0} : now + bus_->time_sync_interval();
        }
    }
    return next_;
}

void TimeSyncService::answered(u16, u32, std::span<const std::byte>) { ++answers_; }

} // namespace fl::host
