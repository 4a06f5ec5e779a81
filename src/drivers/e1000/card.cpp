module;
#include "core/try.hpp"
module drivers.e1000.card;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.net;

namespace fl::drivers::e1000 {

namespace {
constexpr u32 receive_causes = rxt0 | rxo | rxdmt0 | lsc;
} // namespace

void Card::prepare(const Identity& identity, const Memory& memory, Nanoseconds timeout, void (*wake)(void* context),
                   void* context) {
    identity_ = identity;
    timeout_ = timeout;
    wake_ = wake;
    context_ = context;
    receiver_.open(memory.rings.subspan(0, ring_bytes), memory.receive);
    transmitter_.open(memory.rings.subspan(ring_bytes, ring_bytes), memory.transmit);
}

void Card::start() {
    counters_.send_errors += transmitter_.reset();
    receiver_.reset();
    published_ = 0;
    offered_ = true;
    silence_.reset();
    adapter_.start(identity_.mac, receiver_.place(), transmitter_.place());
    const bool first = !std::exchange(added_, true);
    read_link(first);
    running_ = true;
    reset_wanted_ = false;
    masked_.store(true, std::memory_order_relaxed); // arm() unmasks
    live_.store(true, std::memory_order_relaxed);
    if (first) {
        executor().add(*this);
        set_open(true);
    } else {
        executor().poll(*this);
        room();
    }
}

void Card::leave() {
    live_.store(false, std::memory_order_relaxed);
    running_ = false;
    set_open(false);
    if (std::exchange(added_, false)) {
        executor().remove(*this);
    }
}

void Card::fail(const Error& why) {
    if (!is_open()) {
        return;
    }
    log::error("{}: closed: {}", identity_.name.view(), why);
    live_.store(false, std::memory_order_relaxed);
    running_ = false;
    adapter_.stop();
    set_open(false);
    wake_(context_);
}

void Card::request_reset(const Error& why) {
    if (++resets_ > max_resets) {
        fail(why);
        return;
    }
    log::warning("{}: {}: reset {} of {}", identity_.name.view(), why, resets_, max_resets);
    live_.store(false, std::memory_order_relaxed);
    running_ = false;
    reset_wanted_ = true;
    adapter_.stop();
    wake_(context_);
}

void Card::read_link(bool first) {
    const bool up = adapter_.link_up();
    if (!first && up != link_up()) {
        log::info("{}: link {}", identity_.name.view(), up ? "up" : "down");
    }
    silence_.reset(); // counted anew
    set_link(up);
}

// ---- sending ----

bool Card::start(const io::OutgoingFrame& frame, io::Checksum) {
    if (!running_ || !transmitter_.fits()) {
        executor().poll(
            *this); // drain() frees entries, arm() requests an interrupt; start() calls room() after a reset
        return false;
    }
    transmitter_.send(frame);
    executor().touch(*this);
    return true;
}

void Card::flush() {
    if (!running_) {
        return;
    }
    if (const u32 tail = transmitter_.tail(); tail != published_) {
        published_ = tail;
        adapter_.send_up_to(tail);
        ++counters_.notifications;
        if (!silence_) {
            silence_.emplace(executor(), timeout_);
        }
    }
    if (!std::exchange(offered_, true)) {
        adapter_.offer_up_to(receiver_.tail());
    }
    counters_.device_accesses += adapter_.take_accesses();
}

// ---- receiving ----

void Card::on_interrupt() {
    // The line may be another device's: whether it was this one is seen in the rings.
    if (!live_.load(std::memory_order_relaxed)) {
        return;
    }
    adapter_.mask_in_handler();
    interrupts_.store(interrupts_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    masked_.store(true, std::memory_order_relaxed);
    executor().raise(*this);
}

void Card::progress() {
    resets_ = 0;
    silence_.reset();
    if (transmitter_.in_flight() != 0) {
        silence_.emplace(executor(), timeout_);
    }
}

bool Card::drain() {
    if (!running_) {
        return false;
    }
    counters_.interrupts = interrupts_.load(std::memory_order_relaxed);
    const auto received = receive();
    if (!received) {
        request_reset(received.error());
        return true;
    }
    return (running_ && reap()) || *received;
}

// One batch: at most as many descriptors as were offered.
Result<bool> Card::receive() {
    bool some = false;
    for (u32 i = 0; i < ring_entries - 1; ++i) {
        TRY(const Receiver::Got got, receiver_.take());
        if (got == Receiver::Got::none) {
            break;
        }
        some = true;
        offered_ = false;
        if (got == Receiver::Got::damaged) {
            ++counters_.receive_errors;
        } else if (got == Receiver::Got::frame) {
            resets_ = 0;
            deliver(receiver_.frame(), io::Checksum::unknown);
            if (!running_) {
                return true;
            }
        }
    }
    if (some) {
        executor().touch(*this);
    }
    return some;
}

bool Card::reap() {
    if (transmitter_.reap(counters_.send_errors) == 0) {
        return false;
    }
    progress();
    room();
    return true;
}

bool Card::arm() {
    if (!running_) {
        return false;
    }
    const bool room_wanted = waits_for_room();
    if (masked_.load(std::memory_order_relaxed)) {
        const u32 causes = adapter_.take_causes();
        if (causes == ~u32{0}) {
            fail({Code::device_gone, "the network card does not answer: its registers read as all ones"});
            return true;
        }
        if ((causes & lsc) != 0) {
            read_link(false);
        }
        // Later causes are kept by the card, and interrupt when they are unmasked.
        if (receiver_.ready() || (waits_for_room() && transmitter_.ready())) {
            return true;
        }
        room_interrupt_ = room_wanted;
        masked_.store(false, std::memory_order_relaxed); // before unmasking: the handler may run in between
        adapter_.unmask(receive_causes | (room_wanted ? u32{txdw} : 0));
    } else if (room_wanted && !room_interrupt_) {
        room_interrupt_ = true;
        adapter_.unmask(txdw);
    }
    counters_.device_accesses += adapter_.take_accesses();
    return receiver_.ready() || (waits_for_room() && transmitter_.ready());
}

void Card::tick(Instant now) {
    if (!running_ || !silence_ || !silence_->passed(now)) {
        return;
    }
    if (!adapter_.link_up()) { // it may wait for the link
        silence_.emplace(executor(), timeout_);
        return;
    }
    request_reset({Code::timed_out, "the network card has sent no frame for a whole time-out"});
}

} // namespace fl::drivers::e1000
