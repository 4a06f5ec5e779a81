module;
#include "core/try.hpp"
#include <cstddef>
module drivers.virtio_scsi;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import io.executor;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.scsi.units;
import drivers.virtio.controller;
import drivers.virtio_scsi.disk;

namespace fl::drivers::virtio_scsi {

namespace {

constexpr u32 event_count = 8; // buffers for events
constexpr u32 most_resets = 8; // LOGICAL UNIT RESETs with the device at once

u64 features_of(const Environment&, bool) { return feature_hotplug | feature_change; }

/// A device in use. Lives until the machine ends once it has a disk. Runs on the boot processor, except for its further
/// request queues.
class Controller final : public virtio::Controller, public scsi::Host {
  public:
    Controller(Environment& environment, virtio::Device& device, u64 features)
        : virtio::Controller(environment, device, features), scsi::Host(environment.executor, Transport::driver),
          units_(*this, environment.disks), rescans_(environment.executor) {}
    ~Controller() override = default; // units_ before the queues

  private:
    using Lane = virtio::DiskLane<Transport>;
    static constexpr u32 probed_luns = 8; // of a target that does not list its units

    /// The control queue's requests, each with its answer, and the event queue's buffers.
    struct Messages {
        std::array<TaskManagement, most_resets> requests{};
        std::array<u8, most_resets> answers{};
        std::array<Event, event_count> events{};
    };
    /// The LOGICAL UNIT RESETs of one reset_units(), a bit for each.
    struct Resets {
        u32 with_device = 0;
        u32 sent = 0;     // so far
        u32 answered = 0; // of them
    };

    // virtio::Controller
    Result<u32> configure() override;
    virtio::Lane* make_lane(io::Executor& executor) override { return new (std::nothrow) Lane(executor, shared_); }
    Result<void> enable() override;
    io::Task<Result<void>> find() override;
    Result<bool> look() override;
    io::Task<Result<void>> serve() override;
    void abandon() override;
    bool unknown() const override { return units_.attached() == 0; }
    // scsi::Host
    bool is_open() const override { return lane(0).is_open(); }
    scsi::Unit* make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                     io::BlockDevice::Identity& identity) override;
    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;

    Result<void> take_events();
    void handle(const Event& event);
    io::BufferElement event_buffer(u32 number) const;
    io::Task<Result<void>> rescan();
    io::Task<Result<void>> reset_units();
    Result<bool> send_reset(Address address, Resets& resets);
    Result<void> take_reset_answers(Resets& resets);
    Queue& queue(u32 index) const { return static_cast<Lane&>(lane(index)).queue(); }

    Terms terms_;
    u32 max_target_ = 0;
    scsi::Units units_;
    bool rescanning_ = false;
    virtio::Queue control_;
    u32 resets_with_device_ = 0; // a bit for each slot of the control queue
    virtio::Queue events_;
    DmaBuffer messages_;
    DmaBuffer scratch_; // for the host's own commands, one at a time
    io::TaskGroup rescans_;
};

// ---- setting up ----

Result<u32> Controller::configure() {
    u32 queues = 0;
    u32 seg_max = 0;
    u32 max_sectors = 0;
    u32 cmd_per_lun = 0;
    u32 event_bytes = 0;
    u32 max_lun = 0;
    CHECK(device_.read_config([&] {
        queues = device_.config(config::queue_count, 4);
        seg_max = device_.config(config::seg_max, 4);
        max_sectors = device_.config(config::max_sectors, 4);
        cmd_per_lun = device_.config(config::cmd_per_lun, 4);
        event_bytes = device_.config(config::event_info_size, 4);
        terms_.sense_bytes = device_.config(config::sense_size, 4);
        terms_.cdb_bytes = device_.config(config::cdb_size, 4);
        max_target_ = device_.config(config::max_target, 2);
        max_lun = device_.config(config::max_lun, 4);
    }));
    if (queues == 0 || queues > 0xffff - first_request_queue) {
        return Error{Code::protocol, "the virtio SCSI host has an impossible number of queues (num_queues)", 1, queues};
    }
    if (seg_max == 0) {
        return Error{Code::protocol, "the virtio SCSI host accepts no data (seg_max)", 1, seg_max};
    }
    if (max_sectors < 8) {
        return Error{Code::not_supported, "the virtio SCSI host's largest transfer is below 4096 bytes (max_sectors)",
                     8, max_sectors};
    }
    if (cmd_per_lun == 0) {
        return Error{Code::protocol, "the virtio SCSI host accepts no commands (cmd_per_lun)", 1, cmd_per_lun};
    }
    if (event_bytes > sizeof(Event)) {
        return Error{Code::not_supported, "the virtio SCSI host's events have an unknown size (event_info_size)",
                     sizeof(Event), event_bytes};
    }
    if (terms_.sense_bytes == 0 || terms_.sense_bytes > default_sense_bytes) {
        return Error{Code::protocol,
                     "the virtio SCSI host's sense data has an impossible size after a reset (sense_size)",
                     default_sense_bytes, terms_.sense_bytes};
    }
    if (terms_.cdb_bytes < scsi::cdb_bytes || terms_.cdb_bytes > default_cdb_bytes) {
        return Error{Code::protocol, "the virtio SCSI host's CDBs have an impossible size after a reset (cdb_size)",
                     default_cdb_bytes, terms_.cdb_bytes};
    }
    max_target_ = std::min(max_target_, last_target);
    terms_.max_transfer = align_down<u32>(static_cast<u32>(std::min<u64>(u64{max_sectors} * 512, 0x7fff'f000)), 4096u);
    terms_.max_commands = std::min(cmd_per_lun, u32{Transport::max_commands});
    units_.set_rules({.name = FixedText<48>(device_.name()),
                      .transport = scsi::transport_limits(environment_, terms_.max_transfer),
                      .last_lun = std::min(max_lun, u32{last_lun}),
                      .probed_luns = probed_luns});
    return environment_.allows(Feature::multi_queue) ? queues : 1;
}

// The control queue is polled: it is used only to recover from a silent device.
Result<void> Controller::enable() {
    TRY(messages_, environment_.dma.buffer(sizeof(Messages)));
    CHECK(control_.make(device_, control_queue, features(), {.least = 2, .most = 2 * most_resets}, environment_.dma));
    CHECK(control_.enable(device_, virtio::no_vector));
    control_.ring().disarm();
    CHECK(events_.make(device_, event_queue, features(), {.least = 1, .most = event_count}, environment_.dma));
    CHECK(events_.enable(device_, change_vector()));
    terms_.max_commands = std::max(terms_.max_commands / lane_count(), 1u); // cmd_per_lun, on all queues together
    for (u32 i = 0; i < lane_count(); ++i) {
        Transport& transport = queue(i).transport();
        CHECK(transport.make(device_, static_cast<u16>(first_request_queue + i), features(), Transport::needs,
                             Transport::command_bytes, environment_.dma));
        transport.set_terms(terms_);
        CHECK(transport.enable(device_, vector_of(i)));
    }
    return {};
}

io::BufferElement Controller::event_buffer(u32 number) const {
    return {messages_.bus() + offsetof(Messages, events) + number * sizeof(Event), sizeof(Event), true};
}

io::Task<Result<void>> Controller::find() {
    for (u32 i = 0; i < events_.ring().size(); ++i) {
        const io::BufferElement element = event_buffer(i);
        CO_CHECK(events_.ring().add(static_cast<u16>(i), std::span(&element, 1)));
    }
    static_cast<void>(events_.publish());
    co_return co_await units_.scan(max_target_ + 1);
}

// ---- units ----

io::Task<Result<void>> Controller::execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) {
    if (bytes != 0 && !scratch_) { // the first time, or abandoned by a command that was not answered
        CO_TRY(scratch_, environment_.dma.buffer(max_data));
    }
    Exchange exchange(environment_.executor);
    exchange.lun = address_of(target(), lun);
    exchange.cdb = cdb;
    if (bytes != 0) {
        std::memset(scratch_.data(), 0, bytes);
        exchange.data = scratch_.span().subspan(0, bytes);
    }
    if (auto done = co_await scsi::send_and_wait(queue(0), exchange, environment_.executor, environment_.timeout);
        !done) {
        if (bytes != 0) { // the device may still write to it
            scratch_.abandon();
        }
        co_return done.error();
    }
    response = exchange.response;
    if (bytes != 0) {
        response.data = {reinterpret_cast<const u8*>(scratch_.data()), std::min(response.moved, bytes)};
    }
    co_return Result<void>{};
}

scsi::Unit* Controller::make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                             io::BlockDevice::Identity& identity) {
    print_features(identity.features, queue(0).transport().queue_size());
    return scsi::make_lanes<Disk>(lane_count(), [&](u32 i) {
        return new (std::nothrow) Disk(queue(i), {at.target, at.lun}, found.limits, found.geometry, identity);
    });
}

// ---- in use ----

Result<bool> Controller::look() {
    CHECK(take_events());
    return shared_.requested(reset_request) || (!rescanning_ && shared_.requested(rescan_request));
}

// A rescan waits for each target that does not answer, so it has a task of its own: a reset does not wait for it.
io::Task<Result<void>> Controller::serve() {
    if (shared_.take(reset_request)) {
        if (auto reset = co_await reset_units(); !reset) {
            log::warning("{}: {}", device_.name(), reset.error());
        }
    }
    if (is_open() && !rescanning_ && shared_.take(rescan_request)) {
        rescanning_ = true;
        if (auto spawned = rescans_.spawn(rescan()); !spawned) {
            rescanning_ = false;
            log::warning("{}: the changed units are not looked at: {}", device_.name(), spawned.error());
        }
    }
    co_return Result<void>{};
}

/// Until nothing has changed during it.
io::Task<Result<void>> Controller::rescan() {
    do {
        log::info("{}: the host reports changed units", device_.name());
        static_cast<void>(co_await units_.scan(max_target_ + 1)); // logged
    } while (is_open() && shared_.take(rescan_request));
    rescanning_ = false;
    co_return Result<void>{};
}

void Controller::handle(const Event& event) {
    const auto unit = unit_of(event.lun);
    bool rescan = (event.event & events_missed) != 0;
    switch (static_cast<EventType>(event.event & ~events_missed)) {
    case EventType::transport_reset:
        if (event.reason == reset_removed && unit) {
            units_.remove({unit->target, unit->lun});
        }
        // A removal ends what a rescan is doing with that unit, which may have been replaced.
        rescan = rescan || event.reason == reset_rescan || (event.reason == reset_removed && rescanning_);
        break;
    case EventType::param_change: rescan = true; break;
    case EventType::none:
    case EventType::async_notify: break;
    default: log::debug("{}: unknown event {:#x}", device_.name(), event.event); break;
    }
    if (rescan) {
        shared_.request(rescan_request);
    }
}

/// Handles the events and gives their buffers back. Error{protocol}: an impossible buffer.
Result<void> Controller::take_events() {
    do {
        for (;;) {
            TRY(const std::optional<io::UsedBuffer> used, events_.ring().take());
            if (!used) {
                break;
            }
            // The used length is not looked at: Linux's vhost-scsi leaves it 0. A buffer that was not written is
            // `none`.
            const usize at = offsetof(Messages, events) + used->slot * sizeof(Event);
            Event event; // a copy: the device may still write
            io::MappedMemory(messages_.data(), messages_.size())
                .copy_out(at, reinterpret_cast<std::byte*>(&event), sizeof event);
            handle(event);
            reinterpret_cast<Messages*>(messages_.data())->events[used->slot] = {};
            const io::BufferElement element = event_buffer(used->slot);
            CHECK(events_.ring().add(used->slot, std::span(&element, 1)));
        }
        static_cast<void>(events_.publish());
        TRY(const bool found, events_.ring().arm(1));
        if (!found) {
            return {};
        }
    } while (true);
}

/// Of all units in use, several at once, within one timeout: a unit that does not answer holds up no other.
io::Task<Result<void>> Controller::reset_units() {
    const io::Bound bound(environment_.executor, environment_.timeout);
    Resets resets;
    u32 index = 0;
    for (auto unit = units_.next(index);;) {
        CO_CHECK(take_reset_answers(resets));
        for (; unit; unit = units_.next(index)) {
            CO_TRY(const bool sent, send_reset(address_of(unit->target, unit->lun), resets));
            if (!sent) {
                break;
            }
        }
        static_cast<void>(control_.publish());
        if (!is_open() || (!unit && resets.with_device == 0)) {
            co_return Result<void>{};
        }
        if (bound.passed()) {
            break;
        }
        co_await environment_.executor.sleep(1'000'000);
    }
    co_return Error{Code::timed_out,
                    "the SCSI host does not answer LOGICAL UNIT RESET (number sent, of these answered)", resets.sent,
                    resets.answered};
}

/// False: the device has as many as there is room for.
Result<bool> Controller::send_reset(Address address, Resets& resets) {
    const u32 room = std::min(control_.ring().size() / 2, most_resets);
    const u32 slot = static_cast<u32>(std::countr_one(resets_with_device_));
    if (slot >= room) {
        return false;
    }
    auto& messages = *reinterpret_cast<Messages*>(messages_.data());
    messages.requests[slot] = {.lun = address};
    messages.answers[slot] = response_unwritten;
    const std::array elements{
        io::BufferElement{messages_.bus() + offsetof(Messages, requests) + slot * sizeof(TaskManagement),
                          sizeof(TaskManagement), false},
        io::BufferElement{messages_.bus() + offsetof(Messages, answers) + slot, 1, true}};
    CHECK(control_.ring().add(static_cast<u16>(slot), elements));
    resets_with_device_ |= 1u << slot;
    resets.with_device |= 1u << slot;
    ++resets.sent;
    return true;
}

/// Also late ones, of an earlier reset_units(). Error{protocol}: an impossible buffer.
Result<void> Controller::take_reset_answers(Resets& resets) {
    for (;;) {
        TRY(const std::optional<io::UsedBuffer> used, control_.ring().take());
        if (!used) {
            return {};
        }
        const u32 bit = 1u << used->slot;
        resets_with_device_ &= ~bit;
        if ((resets.with_device & bit) == 0) {
            continue;
        }
        resets.with_device &= ~bit;
        ++resets.answered;
        const u8 answer = io::MappedMemory(messages_.data(), messages_.size())
                              .load_relaxed<u8>(offsetof(Messages, answers) + used->slot);
        if (answer != to_underlying(ResponseCode::ok) && answer != to_underlying(ResponseCode::function_succeeded)) {
            log::warning("{}: LOGICAL UNIT RESET: {} ({})", device_.name(), virtio_scsi::name(ResponseCode{answer}),
                         answer);
        }
    }
}

void Controller::abandon() {
    control_.abandon();
    events_.abandon();
    messages_.abandon();
}

} // namespace

virtio::Controller* make_controller(Environment& environment, virtio::Device& device, u64 features) {
    return new (std::nothrow) Controller(environment, device, features);
}

namespace {

constexpr virtio::Type type{.features = features_of, .names = feature_names, .make = make_controller};

} // namespace

io::Task<Result<void>> probe(Environment& environment, pci::Device function) {
    return virtio::probe(type, environment, function);
}

io::Task<Result<void>> probe(Environment& environment, u64 base, std::optional<u32> gsi) {
    return virtio::probe(type, environment, base, gsi);
}

} // namespace fl::drivers::virtio_scsi
