module;
#include "core/try.hpp"
module drivers.virtio.controller;
import core.std;
import core.log;
import core.mmio;
import core.result;
import core.text;
import core.time;
import io.block;
import io.executor;
import io.latch;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.virtio.mmio;
import drivers.virtio.pci;

namespace fl::drivers::virtio {

// ---- setting up ----

Controller::Controller(Environment& environment, Device& device, u64 features)
    : environment_(environment), device_(device), features_(features), changes_(environment.executor),
      tasks_(environment.executor) {
    shared_.set_listener([](void* self) { static_cast<Controller*>(self)->changes_.raise(); }, this);
}

Controller::~Controller() {
    for (Lane* lane : lanes_) {
        delete lane;
    }
}

void Controller::print_features(FixedText<96>& text, u32 queue_size) const {
    print(text, "{}{}{}{}{} queues={} queue-size={}", has(feature_packed) ? "packed " : "",
          has(feature_event_idx) ? "event-idx " : "", has(feature_indirect) ? "indirect " : "",
          has(feature_in_order) ? "in-order " : "", device_.by_line() ? "line" : "msix", lane_count_, queue_size);
}

Result<void> Controller::make_lanes(u32 queues) {
    const auto& executors = environment_.executors;
    const u32 processors = executors.empty() ? 1 : static_cast<u32>(executors.size());
    const u32 wanted = std::min({queues, max_lanes, processors});
    for (; made_ < wanted; ++made_) {
        lanes_[made_] = make_lane(made_ == 0 ? environment_.executor : *executors[made_]);
        if (lanes_[made_] == nullptr) {
            return Error{Code::exhausted, "no memory for a virtqueue"};
        }
    }
    return {};
}

/// Vectors: the first lane, changes, the other lanes. Without a vector of its own a lane is not used, because its
/// interrupt would arrive on another processor.
Result<void> Controller::attach_interrupts() {
    std::array<InterruptUse, 1 + max_lanes> uses;
    const u32 here = environment_.executor.processor();
    uses[0] = {here, on_first, this};
    uses[1] = {here, on_change, this};
    for (u32 i = 1; i < made_; ++i) {
        uses[i + 1] = {lanes_[i]->executor().processor(), on_lane, lanes_[i]};
    }
    TRY(const u32 count, device_.attach(std::span(uses).first(made_ + 1), environment_.allows(Feature::messages)));
    change_vector_ = count >= 2;
    lane_count_ = change_vector_ ? count - 1 : 1;
    return device_.set_config_vector(change_vector_ ? u16{1} : no_vector);
}

void Controller::on_first(void* self) {
    auto& controller = *static_cast<Controller*>(self);
    u32 accesses = 0;
    u8 reasons = isr_queue;
    if (controller.device_.by_line()) {
        reasons = controller.device_.take_interrupt(accesses);
    }
    if ((reasons & isr_config) != 0) {
        on_change(self);
    }
    if ((reasons & isr_queue) != 0) {
        if (!controller.change_vector_) {
            controller.changes_.raise(); // it may be for a queue with change_vector()
        }
        controller.lanes_[0]->on_interrupt(accesses);
    }
}

void Controller::on_change(void* self) { static_cast<Controller*>(self)->shared_.request(config_request); }

void Controller::on_lane(void* lane) { static_cast<Lane*>(lane)->on_interrupt(0); }

io::Task<Result<void>> Controller::attach() {
    CO_TRY(const u32 queues, configure());
    CO_CHECK(make_lanes(queues));
    CO_CHECK(attach_interrupts());
    CO_CHECK(enable());
    device_.run();
    while (started_ < lane_count_) {
        CO_CHECK(co_await lanes_[started_++]->start(environment_.executor, environment_.timeout));
    }
    CO_CHECK(co_await find());
    if (auto watched = tasks_.spawn(watch()); !watched) {
        log::warning("{}: changes of the device will not be detected: {}", device_.name(), watched.error());
    }
    changes_.raise(); // something may have happened already
    co_return Result<void>{};
}

// ---- in use ----

io::Task<Result<void>> Controller::watch() {
    Lane& first = *lanes_[0]; // closes together with every other one
    for (;;) {
        co_await changes_.wait();
        if (shared_.take(config_request) && first.is_open()) {
            if (device_.needs_reset()) {
                first.close(io::Status::device_gone, {Code::io, "the virtio device has failed (DEVICE_NEEDS_RESET)"});
            } else {
                config_changed();
            }
        }
        if (first.is_open()) {
            const auto wanted = look();
            Result<void> served;
            if (!wanted) {
                served = wanted.error();
            } else if (*wanted) {
                served = co_await serve();
            }
            if (!served && first.is_open()) {
                first.close(io::Status::protocol_error, served.error());
            }
        }
        if (!first.is_open()) {
            static_cast<void>(co_await detach());
            co_return Result<void>{};
        }
    }
}

io::Task<Result<void>> Controller::detach() {
    if (made_ == 0) {
        co_return Result<void>{};
    }
    lanes_[0]->stop();
    shared_.close(io::Status::device_gone);
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    Result<void> done;
    for (u32 i = 1; i < started_; ++i) {
        if (auto ended = co_await lanes_[i]->ended(environment_.executor, bound); !ended) {
            done = ended;
        }
    }
    if (auto reset = co_await device_.reset(environment_.executor, environment_.timeout); !reset) {
        done = reset;
    }
    device_.detach();
    if (done) {
        for (u32 i = 0; i < made_; ++i) {
            lanes_[i]->reclaim(); // quiet: its processor no longer accesses it
        }
        co_return done;
    }
    log::warning("{}: {}: its memory is not reused", device_.name(), done.error());
    for (u32 i = 0; i < made_; ++i) {
        lanes_[i]->abandon();
    }
    abandon();
    co_return done;
}

// ---- probing ----

namespace {

constinit Controller* controllers = nullptr; // live until the machine ends

/// The common features that the environment allows.
u64 common_features_of(const Environment& environment, bool legacy) {
    const auto unless = [&](Feature name, u64 features) { return environment.allows(name) ? features : 0; };
    u64 features = unless(Feature::indirect, feature_indirect) | unless(Feature::event_idx, feature_event_idx);
    if (!legacy) {
        features |= feature_version_1 | feature_access_platform | feature_order_platform;
        features |= unless(Feature::packed, feature_packed) | unless(Feature::in_order, feature_in_order);
    }
    return features;
}

io::Task<Result<void>> attach(const Type& type, Environment& environment, Device& device) {
    CO_CHECK(co_await device.start(environment.executor, environment.timeout));
    const bool legacy = device.legacy();
    const auto of = [&](const Environment& e) { return common_features_of(e, legacy) | type.features(e, legacy); };
    Environment everything = environment;
    everything.withheld_features = 0;
    const u64 supported = of(environment);
    const auto features =
        device.negotiate(supported, legacy ? 0 : feature_version_1, of(everything) & ~supported, type.names);
    Controller* controller = features ? type.make(environment, device, *features) : nullptr;
    Result<void> attached;
    if (!features) {
        attached = features.error();
    } else if (controller == nullptr) {
        attached = Error{Code::exhausted, "no memory for a virtio device"};
    } else {
        attached = co_await controller->attach();
        if (!attached && co_await controller->detach() && controller->disposable()) {
            delete controller;
        } else { // also if the device may still access its memory
            controller->next = std::exchange(controllers, controller);
        }
    }
    if (!attached) {
        device.fail();
    }
    co_return attached;
}

/// `device`: takes ownership.
io::Task<Result<void>> open(const Type& type, Environment& environment, auto* device) {
    if (device == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio device"};
    }
    auto attached = device->open();
    if (attached) {
        attached = co_await attach(type, environment, *device);
    }
    if (!attached) {
        delete device;
    }
    co_return attached;
}

} // namespace

io::Task<Result<void>> probe(const Type& type, Environment& environment, pci::Device function) {
    return open(type, environment, new (std::nothrow) PciDevice(function, environment.interrupts, environment.mmio));
}

io::Task<Result<void>> probe(const Type& type, Environment& environment, u64 base, std::optional<u32> gsi) {
    CO_TRY(const Mmio registers, environment.mmio.map(base, mmio::bytes));
    co_return co_await open(type, environment,
                            new (std::nothrow) MmioDevice(registers, base, gsi, environment.interrupts));
}

} // namespace fl::drivers::virtio
