module;
#include <cstddef>
module drivers.hv_util.service;
import core.std;
import core.result;
import core.text;

namespace fl::drivers::hv_util {

namespace {

// Newest first.
constexpr std::array<Version, 2> framework_versions{{{3, 0}, {1, 0}}};
// a shutdown of version 3.1 could be a restart, of 3.2 a hibernation
constexpr std::array<Version, 2> plain_versions{{{3, 0}, {1, 0}}};
constexpr std::array<Version, 3> time_versions{{{4, 0}, {3, 0}, {1, 0}}};

constexpr std::span<const Version> supported_versions(Kind kind) {
    return kind == Kind::time_sync ? std::span<const Version>(time_versions) : std::span<const Version>(plain_versions);
}

template <class T>
T load(std::span<const std::byte> from) {
    T value;
    std::memcpy(&value, from.data(), sizeof value);
    return value;
}
template <class T>
void store(std::span<std::byte> into, const T& value) {
    std::memcpy(into.data(), &value, sizeof value);
}

// The newest of our versions that is among the `count` versions at `list`.
std::optional<Version> pick(std::span<const Version> mine, std::span<const std::byte> list, u32 count) {
    for (const Version& version : mine) {
        for (u32 i = 0; i < count; ++i) {
            if (load<Version>(list.subspan(i * sizeof(Version))) == version) {
                return version;
            }
        }
    }
    return std::nullopt;
}

} // namespace

Result<Service::Action> Service::answer(std::span<std::byte> message) {
    if (message.size() < headers_bytes) {
        return Error{Code::protocol, "an integration message is shorter than its headers", headers_bytes,
                     message.size()};
    }
    const PipeHeader pipe = load<PipeHeader>(message);
    Header header = load<Header>(message.subspan(sizeof pipe));
    const auto body = message.subspan(headers_bytes);
    if (pipe.message_bytes > message.size() - sizeof pipe) {
        return Error{Code::protocol, "an integration message is shorter than its pipe header says", pipe.message_bytes,
                     message.size() - sizeof pipe};
    }
    header.status = status_ok;
    Result<Action> action = Action::none;
    if (header.type == MessageType::negotiate) {
        action = negotiate(header, body);
    } else if (header.type == MessageType::shutdown && kind_ == Kind::shutdown) {
        action = shut_down(header, body);
    } else if (header.type == MessageType::heartbeat && kind_ == Kind::heartbeat) {
        action = on_heartbeat(header, body);
    } else if (header.type == MessageType::time_sync && kind_ == Kind::time_sync) {
        action = take_time(header, body);
    } else {
        header.status = status_not_supported;
    }
    if (!action) {
        return action;
    }
    header.flags = flag_transaction | flag_response;
    store(message.subspan(sizeof pipe), header);
    return action;
}

void Service::refuse(std::span<std::byte> message) {
    if (message.size() >= headers_bytes) {
        store(message.subspan(sizeof(PipeHeader) + offsetof(Header, status)), status_fail);
    }
}

Result<Service::Action> Service::negotiate(Header& header, std::span<std::byte> body) {
    if (body.size() < sizeof(Negotiate)) {
        return Error{Code::protocol, "a version negotiation is shorter than its counts", sizeof(Negotiate),
                     body.size()};
    }
    Negotiate offer = load<Negotiate>(body);
    const auto list = body.subspan(sizeof offer);
    const u32 count = u32{offer.framework_count} + offer.message_count;
    if (count > max_versions || count * sizeof(Version) > list.size()) {
        return Error{Code::protocol, "a version negotiation counts more versions than it holds",
                     list.size() / sizeof(Version), count};
    }
    const auto framework = pick(framework_versions, list, offer.framework_count);
    const auto version =
        pick(supported_versions(kind_), list.subspan(offer.framework_count * sizeof(Version)), offer.message_count);
    if (framework && version) {
        framework_version_ = *framework;
        message_version_ = *version;
        store(list, *framework);
        store(list.subspan(sizeof(Version)), *version);
    }
    offer.framework_count = offer.message_count = framework && version ? 1 : 0;
    store(body, offer);
    header.size = sizeof(Negotiate) + 2 * sizeof(Version);
    return Action::none;
}

Result<Service::Action> Service::shut_down(Header& header, std::span<std::byte> body) {
    if (body.size() < sizeof(Shutdown)) {
        return Error{Code::protocol, "a shutdown message is shorter than its fields", sizeof(Shutdown), body.size()};
    }
    const Shutdown request = load<Shutdown>(body);
    if ((request.flags & ~shutdown_force) != 0) {
        header.status = status_fail; // a restart or hibernation
        return Action::none;
    }
    return Action::shut_down;
}

Result<Service::Action> Service::on_heartbeat(Header&, std::span<std::byte> body) {
    if (body.size() < sizeof(u64)) {
        return Error{Code::protocol, "a heartbeat is shorter than its sequence number", sizeof(u64), body.size()};
    }
    store(body, load<u64>(body) + 1);
    ++heartbeats_;
    return Action::none;
}

Result<Service::Action> Service::take_time(Header& header, std::span<std::byte> body) {
    const bool with_reference = message_version_.major >= 4;
    const u32 needed = with_reference ? time_sync_4_bytes : time_sync_bytes;
    if (body.size() < needed) {
        return Error{Code::protocol, "a time message is shorter than its fields", needed, body.size()};
    }
    const u64 time = load<u64>(body);
    const u8 flags = load<u8>(body.subspan(with_reference ? 16 : 24));
    if ((flags & (time_sync_now | time_sync_sample)) == 0) {
        return Action::none; // a probe
    }
    // From 1970 on, and small enough for 64 bits of nanoseconds.
    if (time < unix_epoch || time - unix_epoch > ~u64{0} / 100) {
        header.status = status_fail;
        return Action::none;
    }
    host_time_ = {(time - unix_epoch) * 100, std::nullopt};
    if (with_reference) {
        host_time_.reference = load<u64>(body.subspan(8));
    }
    return Action::set_clock;
}

} // namespace fl::drivers::hv_util
