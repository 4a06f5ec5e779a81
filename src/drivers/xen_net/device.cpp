module;
#include "core/try.hpp"
module drivers.xen_net.device;
import core.std;
import core.result;
import core.dma;
import core.log;
import core.time;
import io.executor;
import io.net;
import io.task;
import hv.xen.events;
import hv.xen.grants;

namespace fl::drivers::xen_net {

Result<void> Lane::prepare(const Identity& identity, bool offloads_checksums, DmaSpan rings, hv::xen::Domain domain,
                           hv::xen::Port port, DmaAllocator& dma) {
    static constexpr u32 vlan_tag = 4; // a bridge may pass tagged frames on
    static constexpr u32 ring = static_cast<u32>(page_size);
    identity_ = identity;
    offloads_checksums_ = offloads_checksums;
    port_ = port;
    masked_.store(true, std::memory_order_relaxed);
    CHECK(transmitter_.open(rings.subspan(0, ring), domain, dma));
    CHECK(receiver_.open(rings.subspan(ring, ring), domain, dma, max_frame() + vlan_tag));
    // Visible once the back end connects, which start() follows with a notification.
    static_cast<void>(receiver_.publish());
    return {};
}

io::Task<Result<void>> Lane::start() {
    if (!std::exchange(added_, true)) {
        executor().add(*this);
    }
    connected_ = true;
    set_open(true);
    room(); // for what has waited for the connection
    executor().poll(*this);
    co_return events_.send(port_); // the back end may have looked before the buffers were offered
}

io::Task<Result<void>> Lane::hold() {
    connected_ = false;
    co_return Result<void>{};
}

io::Task<Result<void>> Lane::stop() {
    connected_ = false;
    set_open(false);
    if (std::exchange(added_, false)) {
        executor().remove(*this);
    }
    co_return Result<void>{};
}

void Lane::reclaim() {
    transmitter_.pages().reclaim();
    receiver_.pages().reclaim();
}

void Lane::abandon() {
    transmitter_.pages().abandon();
    receiver_.pages().abandon();
}

void Lane::fail(const Error& why) {
    events_.mask(port_);
    if (!lanes_.failed.exchange(true, std::memory_order_acq_rel)) { // one line for the card
        log::error("{}: closed: {}", identity_.name.view(), why);
        if (lanes_.on_failure != nullptr) {
            lanes_.on_failure(lanes_.context);
        }
    }
    set_open(false);
}

// ---- sending ----

bool Lane::start(const io::OutgoingFrame& frame, io::Checksum checksum) {
    if (!connected_) {
        return false; // until start()
    }
    if (!transmitter_.fits(frame.size())) {
        executor().poll(*this); // drain() frees slots, arm() requests an event
        return false;
    }
    transmitter_.send(frame, checksum == io::Checksum::partial ? tx_checksum_blank | tx_data_validated : 0);
    executor().touch(*this);
    return true;
}

void Lane::flush() {
    if (!is_open() || !connected_) {
        return;
    }
    const bool buffers = receiver_.publish();
    if (!transmitter_.publish() && !buffers) {
        return;
    }
    ++counters_.notifications;
    ++counters_.hypercalls;
    if (const auto sent = events_.send(port_); !sent) {
        fail(sent.error());
    }
}

// ---- receiving ----

void Lane::on_event() {
    interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    // At most one event between two sleeps of the executor, however many the back end sends.
    events_.mask(port_);
    masked_.store(true, std::memory_order_relaxed);
    executor().raise(*this);
}

bool Lane::drain() {
    if (!is_open() || !connected_) {
        return false;
    }
    counters_.interrupts = interrupts_.load(std::memory_order_relaxed);
    const auto received = receive();
    if (!received) {
        fail(received.error());
        return true;
    }
    const auto answered = is_open() ? reap() : false;
    if (!answered) {
        fail(answered.error());
        return true;
    }
    return *received || *answered;
}

// One batch: at most as many responses as there are buffers.
Result<bool> Lane::receive() {
    TRY(const u32 count, receiver_.available());
    if (count == 0) {
        return false;
    }
    for (u32 i = 0; i < count; ++i) {
        TRY(const Receiver::Got got, receiver_.take());
        if (got == Receiver::Got::frame) {
            deliver(receiver_.frame(), receiver_.checksum());
            if (!is_open()) {
                return true;
            }
        } else if (got == Receiver::Got::damaged) {
            ++counters_.receive_errors;
        }
    }
    CHECK(receiver_.give_back(count));
    executor().touch(*this);
    return true;
}

Result<bool> Lane::reap() {
    TRY(const u32 count, transmitter_.reap(counters_.send_errors));
    if (count != 0) {
        room();
    }
    return count != 0;
}

bool Lane::arm() {
    if (!is_open() || !connected_) {
        return false;
    }
    if (masked_.load(std::memory_order_relaxed)) {
        masked_.store(false, std::memory_order_relaxed); // before unmasking: the handler may run in between
        if (events_.unmask(port_)) {
            masked_.store(true, std::memory_order_relaxed); // consumed here, as the handler would do
            events_.mask(port_);
            return true;
        }
    }
    const auto found = request_events();
    if (!found) {
        fail(found.error());
        return true; // who waited for room continues
    }
    return *found;
}

Result<bool> Lane::request_events() {
    TRY(const bool received, receiver_.arm());
    if (!waits_for_room()) {
        return received;
    }
    // A quarter of the answers: an event for each would cost an interrupt each, and one after all would let the back
    // end run dry.
    TRY(const bool answered, transmitter_.arm(std::max(transmitter_.owed() / 4, 1u)));
    return received || answered;
}

} // namespace fl::drivers::xen_net
