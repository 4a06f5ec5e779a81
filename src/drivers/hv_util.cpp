module;
#include "core/try.hpp"
module drivers.hv_util;
import core.std;
import core.result;
import core.time;
import core.log;
import core.wall_clock;
import io.executor;
import io.task;
import io.shutdown;
import hv.hyperv;
import drivers.driver;

namespace fl::drivers::hv_util {

using hv::hyperv::Offer;
using hv::hyperv::Vmbus;

io::Task<Result<void>> Utility::connect(Offer offer) {
    CO_CHECK(co_await bus_.open(channel_, offer,
                                {.send_bytes = ring_bytes, .receive_bytes = ring_bytes, .may_defer = false}));
    inbox_.emplace(channel_, environment_.executor);
    auto kept = tasks_.spawn(serve());
    if (!kept) { // the channel must not outlive us
        inbox_.reset();
        static_cast<void>(co_await bus_.close(channel_));
    }
    co_return kept;
}

io::Task<Result<void>> Utility::serve() {
    Result<void> result;
    while (result && !channel_.rescinded()) {
        static_cast<void>(co_await inbox_->wait());
        for (;;) {
            hv::hyperv::Packet packet;
            const auto got = channel_.receive(packet);
            if (!got) {
                result = got.error();
                break;
            }
            if (!*got) {
                break;
            }
            if (packet.type != hv::hyperv::PacketType::inband) {
                continue; // an answer without a request of ours
            }
            const usize bytes = packet.payload.size();
            // the channel's copy is valid only until the next packet
            std::memcpy(message_.data(), packet.payload.data(), bytes);
            const std::span<std::byte> message = std::span(message_).first(bytes);
            const auto ends = take(message, packet.transaction);
            result = !ends   ? Result<void>(ends.error())
                     : *ends ? co_await shut_down(message, packet.transaction)
                             : Result<void>{};
            if (!result) {
                break;
            }
        }
        channel_.release();
    }
    if (!result) {
        log::error("hv_util: {}: closed: {}", service_.kind(), result.error());
    } else {
        log::info("hv_util: {}: the host has rescinded the service", service_.kind());
    }
    inbox_.reset();
    co_return co_await bus_.close(channel_);
}

// Answers the message, except for a shutdown request. True: the host requests a shutdown, which takes time. Not a
// coroutine: heartbeats are frequent, and must not allocate.
Result<bool> Utility::take(std::span<std::byte> message, u64 transaction) {
    const bool negotiated = service_.negotiated();
    TRY(const Service::Action action, service_.answer(message));
    if (!negotiated && service_.negotiated()) {
        log::info("hv_util: {}: framework {}.{}, version {}.{}", service_.kind(), service_.framework_version().major,
                  service_.framework_version().minor, service_.message_version().major,
                  service_.message_version().minor);
    }
    if (action == Service::Action::set_clock) {
        set_clock();
    }
    if (action == Service::Action::shut_down) {
        return true;
    }
    if (auto replied = reply(message, transaction); !replied) {
        return replied.error();
    }
    return false;
}

io::Task<Result<void>> Utility::shut_down(std::span<std::byte> message, u64 transaction) {
    log::info("hv_util: the host requests a shutdown");
    io::Shutdown* const shutdown = environment_.shutdown;
    if (shutdown == nullptr || !shutdown->request("the host")) { // for example a second channel of this class
        Service::refuse(message);
        co_return reply(message, transaction);
    }
    static_cast<void>(co_await shutdown->await_quiesced());
    if (!shutdown->flushed()) {
        Service::refuse(message);
    }
    auto replied = reply(message, transaction);
    shutdown->answered();
    co_return replied;
}

Result<void> Utility::reply(std::span<const std::byte> message, u64 transaction) {
    const auto sent = channel_.send_inband(message, transaction);
    static_cast<void>(channel_.publish());
    if (sent == hv::hyperv::Sent::broken || !channel_.sound()) {
        return channel_.broken().value_or(Error{Code::protocol, "the channel is broken"});
    }
    if (sent != hv::hyperv::Sent::queued) { // the host does not read the answers to its requests
        log::warning("hv_util: {}: no room for an answer, dropped", service_.kind());
    }
    return {};
}

void Utility::set_clock() {
    const Instant now = environment_.executor.elapsed(); // the time of day advances while the machine is stopped
    const UnixNanoseconds host = service_.host_time().at(reference_ != nullptr ? reference_->counter() : std::nullopt);
    const auto guest = wall_clock(now);
    set_wall_clock(now, host);
    if (!std::exchange(clock_logged_, true)) {
        const CivilTime t = civil_time(host);
        log::info("hv_util: the host's time is {}-{:02}-{:02} {:02}:{:02}:{:02} UTC", t.year, t.month, t.day, t.hour,
                  t.minute, t.second);
    }
    if (guest && !std::exchange(difference_logged_, true)) {
        const bool behind = host > *guest;
        log::info("hv_util: the clock was {} us {} the host's", (behind ? host - *guest : *guest - host) / 1000,
                  behind ? "behind" : "ahead of");
    }
}

io::Task<Result<Utility*>> attach(Environment& environment, Vmbus& bus, Offer offer,
                                  const hv::hyperv::ReferenceClock* reference) {
    std::optional<Kind> kind;
    for (const Kind k : {Kind::shutdown, Kind::heartbeat, Kind::time_sync}) {
        if (offer.type.text() == class_of(k)) {
            kind = k;
        }
    }
    if (!kind) {
        co_return Error{Code::not_supported, "not an integration service that this driver knows"};
    }
    auto* utility = new (std::nothrow) Utility(environment, bus, *kind, reference); // lives until machine shutdown
    if (utility == nullptr) {
        co_return Error{Code::exhausted, "no memory for an integration service"};
    }
    if (auto connected = co_await utility->connect(offer); !connected) {
        if (utility->closed()) {
            delete utility;
        } // else the bus still refers to its channel, and it must stay
        co_return connected.error();
    }
    co_return utility;
}

io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device) {
    const auto offer = bus.vmbus().find(device.number);
    if (!offer) {
        co_return Error{Code::device_gone, "the service's channel was rescinded already"};
    }
    const auto attached = co_await attach(environment, bus.vmbus(), *offer, &bus.clock());
    if (!attached) {
        co_return attached.error();
    }
    co_return Result<void>{};
}

} // namespace fl::drivers::hv_util
