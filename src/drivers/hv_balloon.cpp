module;
#include "core/try.hpp"
module drivers.hv_balloon;
import core.std;
import core.result;
import core.time;
import core.log;
import io.executor;
import io.task;
import hv.hyperv;
import drivers.driver;

namespace fl::drivers::hv_balloon {

using hv::hyperv::Offer;
using hv::hyperv::Sent;
using hv::hyperv::Vmbus;

Result<void> Device::send(std::span<const std::byte> message, u32 transaction) {
    switch (channel_.send_inband(message, transaction)) {
    case Sent::queued: inbox_->touch(); return {};
    case Sent::broken: return channel_.broken().value_or(Error{Code::protocol, "the channel is broken"});
    default: return Error{Code::exhausted, "the host does not read its memory messages: the ring is full"};
    }
}

// Handles all received packets.
Result<void> Device::take_all() {
    hv::hyperv::Packet packet;
    for (;;) {
        TRY(const bool got, channel_.receive(packet));
        if (!got) {
            channel_.release();
            return {};
        }
        if (packet.type == hv::hyperv::PacketType::inband) {
            CHECK(balloon_.take(packet.payload));
        }
    }
}

io::Task<Result<void>> Device::connect(Offer offer) {
    CO_CHECK(co_await bus_.open(channel_, offer,
                                {.send_bytes = ring_bytes, .receive_bytes = ring_bytes, .may_defer = false}));
    inbox_.emplace(channel_, environment_.executor);
    Result<void> result = balloon_.begin();
    const io::Bound bound(environment_.executor, environment_.timeout);
    while (result && balloon_.state() != Balloon::State::running) {
        if (channel_.rescinded()) {
            result = Error{Code::device_gone, "the host has rescinded dynamic memory"};
        } else if (!co_await inbox_->wait(bound)) {
            result = Error{Code::timed_out, "the host does not answer the dynamic memory handshake"};
        } else {
            result = take_all();
        }
    }
    if (!result) {
        static_cast<void>(co_await close());
        co_return result;
    }
    log::info("hv_balloon: version {}.{}, pressure is {}reported", to_underlying(balloon_.version()) >> 16,
              to_underlying(balloon_.version()) & 0xffff, balloon_.reports_wanted() ? "" : "not ");
    auto kept = tasks_.spawn(serve());
    if (!kept) { // the channel must not outlive us
        static_cast<void>(co_await close());
    }
    co_return kept;
}

io::Task<Result<void>> Device::serve() {
    Result<void> result;
    while (result && !channel_.rescinded()) {
        const bool looked = co_await inbox_->wait_until(
            balloon_.reports_wanted() ? after(environment_.executor.now(), report_interval) : never);
        result = looked ? take_all() : balloon_.report();
        if (!result && result.error().code == Code::exhausted) {
            result = {}; // no room for a report: skip it, the next one follows
        }
    }
    if (!result) {
        log::error("hv_balloon: closed: {}", result.error());
    }
    co_return co_await close();
}

io::Task<Result<void>> Device::close() {
    inbox_.reset();
    co_return co_await bus_.close(channel_);
}

io::Task<Result<Device*>> attach(Environment& environment, Vmbus& bus, Offer offer, const Memory& memory) {
    auto* device = new (std::nothrow) Device(environment, bus, memory); // lives until machine shutdown
    if (device == nullptr) {
        co_return Error{Code::exhausted, "no memory for a balloon"};
    }
    if (auto connected = co_await device->connect(offer); !connected) {
        if (device->closed()) {
            delete device;
        } // else the bus still refers to its channel, and it must stay
        co_return connected.error();
    }
    co_return device;
}

io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device,
                             const Memory& memory) {
    const auto offer = bus.vmbus().find(device.number);
    if (!offer) {
        co_return Error{Code::device_gone, "the balloon's channel was rescinded already"};
    }
    const auto attached = co_await attach(environment, bus.vmbus(), *offer, memory);
    if (!attached) {
        co_return attached.error();
    }
    co_return Result<void>{};
}

} // namespace fl::drivers::hv_balloon
