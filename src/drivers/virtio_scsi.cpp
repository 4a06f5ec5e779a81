module;
#include "core/try.hpp"
#include <cstddef>
module drivers.virtio_scsi;
import core.std;
import core.dma;
import core.log;
import core.mmio;
import core.result;
import core.text;
import core.time;
import core.vector;
import io.block;
import io.block_queue;
import io.executor;
import io.latch;
import io.ring.any;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.scsi.units;
import drivers.virtio.device;
import drivers.virtio.mmio;
import drivers.virtio.pci;
import drivers.virtio_scsi.disk;

namespace fl::drivers::virtio_scsi {

namespace {

constexpr u32 max_queue_size = 256; // descriptors, of a request queue
constexpr u32 most_commands = 128;  // on each queue
constexpr std::string_view driver_name = "virtio_scsi";
constexpr u32 event_count = 8; // buffers for events

/// The features that the environment allows, of those that this driver knows.
u64 supported(const Environment& environment, bool legacy) {
    const auto unless = [&](Feature name, u64 features) { return environment.allows(name) ? features : 0; };
    u64 features = feature_hotplug | feature_change;
    features |= unless(Feature::indirect, virtio::feature_indirect);
    features |= unless(Feature::event_idx, virtio::feature_event_idx);
    if (!legacy) {
        features |= virtio::feature_version_1 | virtio::feature_access_platform | virtio::feature_order_platform;
        features |=
            unless(Feature::packed, virtio::feature_packed) | unless(Feature::in_order, virtio::feature_in_order);
    }
    return features;
}

/// The parts that do not depend on the queues: configuration, commands of a scan, events. Runs on the boot
/// processor.
class Host : public scsi::Host {
  protected:
    static constexpr u32 probed_luns = 8; // of a target that does not list its units

    Host(Environment& environment, virtio::Device& device, u64 features)
        : scsi::Host(environment.executor, driver_name), environment_(environment), device_(device),
          features_(features), units_(*this, environment.disks), changes_(environment.executor) {
        shared_.notify = [](void* self) { static_cast<Host*>(self)->changes_.raise(); };
        shared_.context = this;
    }
    ~Host() = default;

    /// Sends one command and waits for its end.
    virtual io::Task<Result<void>> send_request(Exchange& exchange) = 0;

    Result<void> read_config();
    io::Task<Result<void>> scan() { return units_.scan(max_target_ + 1); }
    void handle(const Event& event);
    bool has(u64 feature) const { return (features_ & feature) != 0; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    virtio::Device& device_;
    u64 features_;
    u32 queue_count_ = 1; // request queues that the device has
    Terms terms_;
    Shared shared_;
    scsi::Units units_;
    io::Signal changes_; // see Controller::watch()

  private:
    io::Task<Result<void>> execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) override;

    u32 max_target_ = 0;
    DmaBuffer scratch_; // for the host's own commands, one at a time
};

Result<void> Host::read_config() {
    u32 seg_max = 0;
    u32 max_sectors = 0;
    u32 cmd_per_lun = 0;
    u32 event_bytes = 0;
    u32 max_lun = 0;
    CHECK(device_.read_config([&] {
        queue_count_ = device_.config(config::queue_count, 4);
        seg_max = device_.config(config::seg_max, 4);
        max_sectors = device_.config(config::max_sectors, 4);
        cmd_per_lun = device_.config(config::cmd_per_lun, 4);
        event_bytes = device_.config(config::event_info_size, 4);
        terms_.sense_bytes = device_.config(config::sense_size, 4);
        terms_.cdb_bytes = device_.config(config::cdb_size, 4);
        max_target_ = device_.config(config::max_target, 2);
        max_lun = device_.config(config::max_lun, 4);
    }));
    if (queue_count_ == 0 || queue_count_ > 0xffff - first_request_queue) {
        return Error{Code::protocol, "the virtio SCSI host has an impossible number of queues (num_queues)", 1,
                     queue_count_};
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
    terms_.max_commands = std::min(cmd_per_lun, most_commands);
    terms_.indirect = has(virtio::feature_indirect);
    units_.set_rules({.name = FixedText<48>(device_.name()),
                      .transport = scsi::transport_limits(environment_, terms_.max_transfer),
                      .last_lun = std::min(max_lun, u32{last_lun}),
                      .probed_luns = probed_luns});
    return {};
}

// ---- units ----

io::Task<Result<void>> Host::execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) {
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
    if (auto done = co_await send_request(exchange); !done) {
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

void Host::handle(const Event& event) {
    const auto unit = unit_of(event.lun);
    bool rescan = (event.event & events_missed) != 0;
    switch (static_cast<EventType>(event.event & ~events_missed)) {
    case EventType::transport_reset:
        if (event.reason == reset_removed && unit) {
            units_.remove({unit->target, unit->lun});
        }
        rescan = rescan || event.reason == reset_rescan;
        break;
    case EventType::param_change: rescan = true; break;
    case EventType::none:
    case EventType::async_notify: break;
    default: log::debug("{}: unknown event {:#x}", device_.name(), event.event); break;
    }
    if (rescan) {
        shared_.rescan_requested.store(true, std::memory_order_relaxed); // watch() looks at it next
    }
}

/// A device in use. Lives until the machine ends once it has a disk. Runs on the boot processor, except for its further
/// request queues.
class Controller final : public Host {
  public:
    /// `device`: owned by the caller, started and negotiated.
    Controller(Environment& environment, virtio::Device& device, u64 features)
        : Host(environment, device, features), tasks_(environment.executor) {}
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    io::Task<Result<void>> attach();
    /// Ends everything and resets the device. On an Error it, or another processor, may still access the controller's
    /// memory.
    io::Task<Result<void>> detach();

  private:
    static constexpr u32 max_lanes = 1 + Disk::max_further_lanes;

    /// A virtqueue's memory.
    struct Memory {
        DmaBuffer ring;
        Vector<io::VirtqueueRow> rows;
        io::VirtqueueLayout layout;
        u32 size = 0; // in descriptors
    };
    struct Lane {
        Lane(io::Executor& executor, Shared& shared) : queue(executor, shared) {}
        Queue queue;
        Memory memory;
        DmaBuffer commands;
    };
    /// The control queue's requests and the event queue's buffers.
    struct Messages {
        TaskManagement request;
        u8 answer = response_unwritten;
        std::array<Event, event_count> events{};
    };

    Result<void> make_lanes();
    Result<void> attach_interrupts();
    Result<Ring> make_ring(u16 queue, Memory& memory, u32 least, u32 most);
    Result<virtio::Notifier> enable(u16 queue, const Memory& memory, u16 vector);
    Result<void> enable_lane(u32 index);
    Result<void> enable_messages();
    u16 vector_of(u32 number) const { return device_.by_line() ? virtio::no_vector : static_cast<u16>(number); }

    io::Task<Result<void>> send_request(Exchange& exchange) override;
    bool is_open() const override { return lanes_[0]->queue.is_open(); }
    scsi::Unit* make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                     io::BlockDevice::Identity& identity) override;

    io::Task<Result<void>> watch();
    Result<void> take_events();
    io::Task<Result<void>> reset_units();
    io::Task<Result<void>> reset_unit(Address address);

    friend io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features);

    static void on_queue(void* self);  // vector 0, or the line
    static void on_change(void* self); // vector 1: configuration and events
    static void on_lane(void* queue);  // vectors 2…: the request queues after the first, each on its own processor

    Queue& queue() { return lanes_[0]->queue; }

    std::array<Lane*, max_lanes> lanes_{};
    u32 made_ = 0;       // lanes that exist
    u32 lane_count_ = 0; // of these, in use
    u32 started_ = 0;    // of these, known to their processor
    Memory control_memory_;
    Memory event_memory_;
    std::optional<Ring> control_;
    std::optional<Ring> events_;
    virtio::Notifier control_notifier_;
    virtio::Notifier event_notifier_;
    DmaBuffer messages_;
    bool change_vector_ = false; // configuration and events have a vector of their own
    std::atomic<bool> config_changed_{false};
    io::TaskGroup tasks_;
    Controller* next_ = nullptr; // list of controllers in use
};

constinit Controller* controllers = nullptr; // live until the machine ends

// ---- setting up ----

// Only after detach() without an error: no queue may be registered.
Controller::~Controller() {
    units_.clear(); // before the queues
    for (Lane* lane : lanes_) {
        delete lane;
    }
}

Result<void> Controller::make_lanes() {
    const bool several = !environment_.executors.empty() && environment_.allows(Feature::multi_queue);
    const u32 wanted =
        std::min({queue_count_, max_lanes, several ? static_cast<u32>(environment_.executors.size()) : u32{1}});
    for (; made_ < wanted; ++made_) {
        lanes_[made_] =
            new (std::nothrow) Lane(made_ == 0 ? environment_.executor : *environment_.executors[made_], shared_);
        if (lanes_[made_] == nullptr) {
            return Error{Code::exhausted, "no memory for a virtqueue"};
        }
    }
    return {};
}

/// Vectors: the first request queue, configuration and events, the other request queues. Without a vector of its own a
/// queue is not used, because its interrupt would arrive on another processor.
Result<void> Controller::attach_interrupts() {
    std::array<virtio::InterruptUse, 1 + max_lanes> uses;
    const u32 here = environment_.executor.processor();
    uses[0] = {here, on_queue, this};
    uses[1] = {here, on_change, this};
    for (u32 i = 1; i < made_; ++i) {
        uses[i + 1] = {lanes_[i]->queue.executor().processor(), on_lane, &lanes_[i]->queue};
    }
    TRY(const u32 count, device_.attach(std::span(uses).first(made_ + 1), environment_.allows(Feature::messages)));
    change_vector_ = count >= 2;
    lane_count_ = change_vector_ ? count - 1 : 1;
    terms_.max_commands = std::max(terms_.max_commands / lane_count_, 1u); // cmd_per_lun, on all queues together
    return device_.set_config_vector(change_vector_ ? u16{1} : virtio::no_vector);
}

Result<Ring> Controller::make_ring(u16 queue, Memory& memory, u32 least, u32 most) {
    const u32 maximum = device_.max_size(queue);
    if (maximum == 0 || maximum > io::virtqueue_max_size) {
        return Error{Code::protocol, "a queue of the virtio SCSI host has an impossible size", io::virtqueue_max_size,
                     maximum};
    }
    const bool packed = has(virtio::feature_packed);
    memory.size = Ring::usable_size(std::min(maximum, most), packed);
    memory.layout = Ring::layout(memory.size, packed, device_.legacy() ? virtio::legacy_align : 64);
    if (memory.size < least) {
        return Error{Code::not_supported, "a queue of the virtio SCSI host is too small", least, memory.size};
    }
    TRY(memory.ring, environment_.dma.buffer(static_cast<u32>(memory.layout.bytes)));
    for (u32 i = 0; i < memory.size; ++i) {
        if (!memory.rows.push({})) {
            return Error{Code::exhausted, "no memory for the table of a virtqueue"};
        }
    }
    return Ring::create(io::MappedMemory(memory.ring.data(), memory.ring.size()), memory.layout, memory.size,
                        {memory.rows.begin(), memory.rows.size()},
                        {.event_index = has(virtio::feature_event_idx),
                         .in_order = has(virtio::feature_in_order),
                         .indirect = has(virtio::feature_indirect),
                         .packed = packed,
                         .readable_in_length = true});
}

Result<virtio::Notifier> Controller::enable(u16 queue, const Memory& memory, u16 vector) {
    const virtio::QueueAddresses at{memory.ring.bus() + memory.layout.descriptors,
                                    memory.ring.bus() + memory.layout.driver, memory.ring.bus() + memory.layout.device};
    return device_.enable(queue, memory.size, at, vector);
}

Result<void> Controller::enable_lane(u32 index) {
    Lane& lane = *lanes_[index];
    const auto queue = static_cast<u16>(first_request_queue + index);
    TRY(const Ring ring, make_ring(queue, lane.memory, Transport::max_elements, max_queue_size));
    TRY(lane.commands, environment_.dma.buffer(Transport::command_bytes));
    lane.queue.transport().set_up(ring, lane.commands, terms_);
    TRY(const virtio::Notifier notifier, enable(queue, lane.memory, vector_of(index == 0 ? 0 : index + 1)));
    lane.queue.transport().set_notifier(notifier);
    return {};
}

// The control queue is polled: it is used only to recover from a silent device.
Result<void> Controller::enable_messages() {
    TRY(messages_, environment_.dma.buffer(sizeof(Messages)));
    TRY(control_, make_ring(control_queue, control_memory_, 2, 2));
    TRY(control_notifier_, enable(control_queue, control_memory_, virtio::no_vector));
    control_->disarm();
    TRY(events_, make_ring(event_queue, event_memory_, 1, event_count));
    TRY(event_notifier_, enable(event_queue, event_memory_, vector_of(change_vector_ ? 1 : 0)));
    return {};
}

void Controller::on_queue(void* self) {
    auto& controller = *static_cast<Controller*>(self);
    u32 accesses = 0;
    u8 reasons = virtio::isr_queue;
    if (controller.device_.by_line()) {
        reasons = controller.device_.take_interrupt(accesses);
    }
    if ((reasons & virtio::isr_config) != 0) {
        on_change(self);
    }
    if ((reasons & virtio::isr_queue) != 0) {
        if (!controller.change_vector_) {
            controller.changes_.raise(); // it may be an event
        }
        controller.queue().transport().on_interrupt(accesses);
    }
}

void Controller::on_lane(void* queue) { static_cast<Queue*>(queue)->transport().on_interrupt(0); }

void Controller::on_change(void* self) {
    auto& controller = *static_cast<Controller*>(self);
    controller.config_changed_.store(true, std::memory_order_relaxed); // ordered by raise()
    controller.changes_.raise();
}

io::Task<Result<void>> Controller::attach() {
    CO_CHECK(read_config());
    CO_CHECK(make_lanes());
    CO_CHECK(attach_interrupts());
    CO_CHECK(enable_messages());
    for (u32 i = 0; i < lane_count_; ++i) {
        CO_CHECK(enable_lane(i));
    }
    device_.run();
    while (started_ < lane_count_) {
        Queue& queue = lanes_[started_++]->queue;
        CO_CHECK(co_await queue.start_there(environment_.executor, environment_.timeout,
                                            [](io::GroupedQueue<Transport>& there, Nanoseconds timeout) {
                                                static_cast<Queue&>(there).start(timeout);
                                            }));
    }
    for (u32 i = 0; i < event_memory_.size; ++i) {
        const io::BufferElement element{messages_.bus() + offsetof(Messages, events) + i * sizeof(Event), sizeof(Event),
                                        true};
        CO_CHECK(events_->add(static_cast<u16>(i), std::span(&element, 1)));
    }
    if (events_->publish()) {
        event_notifier_.notify();
    }
    CO_CHECK(co_await scan());
    if (auto watched = tasks_.spawn(watch()); !watched) {
        log::warning("{}: changes of the device will not be detected: {}", device_.name(), watched.error());
    }
    changes_.raise(); // an event may have arrived already
    co_return Result<void>{};
}

// ---- units ----

io::Task<Result<void>> Controller::send_request(Exchange& exchange) {
    return scsi::send_and_wait(queue(), exchange, environment_.executor, environment_.timeout);
}

scsi::Unit* Controller::make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                             io::BlockDevice::Identity& identity) {
    print(identity.features, "{}{}{}{}{} queues={} queue-size={}", has(virtio::feature_packed) ? "packed " : "",
          has(virtio::feature_event_idx) ? "event-idx " : "", has(virtio::feature_indirect) ? "indirect " : "",
          has(virtio::feature_in_order) ? "in-order " : "", device_.by_line() ? "line" : "msix", lane_count_,
          lanes_[0]->memory.size);
    return scsi::make_lanes<Disk>(lane_count_, [&](u32 i) {
        return new (std::nothrow) Disk(lanes_[i]->queue, {at.target, at.lun}, found.limits, found.geometry, identity);
    });
}

// ---- in use ----

io::Task<Result<void>> Controller::watch() {
    for (;;) {
        co_await changes_.wait();
        if (config_changed_.exchange(false, std::memory_order_relaxed) && queue().is_open() && device_.needs_reset()) {
            queue().close(io::Status::device_gone, {Code::io, "the virtio SCSI host has failed (DEVICE_NEEDS_RESET)"});
        }
        if (queue().is_open()) {
            if (auto taken = take_events(); !taken) {
                queue().close(io::Status::protocol_error, taken.error());
            }
        }
        if (queue().is_open() && shared_.reset_requested.exchange(false, std::memory_order_relaxed)) {
            if (auto reset = co_await reset_units(); !reset) {
                log::warning("{}: {}", device_.name(), reset.error());
            }
        }
        if (queue().is_open() && shared_.rescan_requested.exchange(false, std::memory_order_relaxed)) {
            log::info("{}: the host reports changed units", device_.name());
            static_cast<void>(co_await scan()); // logged
        }
        if (!queue().is_open()) {
            static_cast<void>(co_await detach());
            co_return Result<void>{};
        }
    }
}

/// Handles the events and gives their buffers back. Error{protocol}: an impossible buffer.
Result<void> Controller::take_events() {
    do {
        for (;;) {
            TRY(const std::optional<io::UsedBuffer> used, events_->take());
            if (!used) {
                break;
            }
            if (used->length < sizeof(Event)) {
                return Error{Code::protocol, "the SCSI host returned an event that is too short", sizeof(Event),
                             used->length};
            }
            const usize at = offsetof(Messages, events) + used->slot * sizeof(Event);
            Event event; // a copy: the device may still write
            io::MappedMemory(messages_.data(), messages_.size())
                .copy_out(at, reinterpret_cast<std::byte*>(&event), sizeof event);
            handle(event);
            const io::BufferElement element{messages_.bus() + at, sizeof(Event), true};
            CHECK(events_->add(used->slot, std::span(&element, 1)));
        }
        if (events_->publish()) {
            event_notifier_.notify();
        }
        TRY(const bool found, events_->arm(1));
        if (!found) {
            return {};
        }
    } while (true);
}

io::Task<Result<void>> Controller::reset_units() {
    for (u32 i = 0; queue().is_open();) {
        const auto unit = units_.next(i);
        if (!unit) {
            break;
        }
        CO_CHECK(co_await reset_unit(address_of(unit->target, unit->lun)));
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::reset_unit(Address address) {
    auto& messages = *reinterpret_cast<Messages*>(messages_.data());
    if (control_->outstanding() != 0) {
        co_return Error{Code::timed_out, "the SCSI host has not answered an earlier task management function"};
    }
    messages.request = {.lun = address};
    messages.answer = response_unwritten;
    const std::array elements{
        io::BufferElement{messages_.bus() + offsetof(Messages, request), sizeof(TaskManagement), false},
        io::BufferElement{messages_.bus() + offsetof(Messages, answer), 1, true}};
    CO_CHECK(control_->add(0, elements));
    if (control_->publish()) {
        control_notifier_.notify();
    }
    const io::Bound bound(environment_.executor, environment_.timeout);
    for (;;) {
        CO_TRY(const std::optional<io::UsedBuffer> used, control_->take());
        if (used) {
            break;
        }
        if (bound.passed() || !queue().is_open()) {
            co_return Error{Code::timed_out, "the SCSI host does not answer LOGICAL UNIT RESET"};
        }
        co_await environment_.executor.sleep(1'000'000);
    }
    const u8 answer = io::MappedMemory(messages_.data(), messages_.size()).load_relaxed<u8>(offsetof(Messages, answer));
    if (answer != to_underlying(ResponseCode::ok) && answer != to_underlying(ResponseCode::function_succeeded)) {
        log::warning("{}: LOGICAL UNIT RESET: {} ({})", device_.name(), virtio_scsi::name(ResponseCode{answer}),
                     answer);
    }
    co_return Result<void>{};
}

io::Task<Result<void>> Controller::detach() {
    if (made_ == 0) {
        co_return Result<void>{};
    }
    queue().stop();
    shared_.close(io::Status::device_gone);
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    Result<void> done;
    for (u32 i = 1; i < started_; ++i) {
        if (auto ended = co_await lanes_[i]->queue.ended(environment_.executor, bound); !ended) {
            done = ended;
        }
    }
    if (auto reset = co_await device_.reset(environment_.executor, environment_.timeout); !reset) {
        done = reset;
    }
    device_.detach();
    if (done) {
        for (u32 i = 0; i < made_; ++i) {
            lanes_[i]->queue.reclaim(); // quiet: its processor no longer accesses it
        }
        co_return done;
    }
    log::warning("{}: {}: its memory is not reused", device_.name(), done.error());
    for (u32 i = 0; i < made_; ++i) {
        lanes_[i]->memory.ring.abandon();
        lanes_[i]->commands.abandon();
    }
    control_memory_.ring.abandon();
    event_memory_.ring.abandon();
    messages_.abandon();
    co_return done;
}

// ---- probing ----

io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features) {
    auto* controller = new (std::nothrow) Controller(environment, device, features);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio SCSI host"};
    }
    auto attached = co_await controller->attach();
    if (!attached && co_await controller->detach() && controller->started_ <= 1 && controller->units_.attached() == 0) {
        delete controller;
        co_return attached;
    }
    controller->next_ = std::exchange(controllers, controller); // also if the device may still access its memory
    co_return attached;
}

io::Task<Result<void>> attach(Environment& environment, virtio::Device& device) {
    CO_CHECK(co_await device.start(environment.executor, environment.timeout));
    const bool legacy = device.legacy();
    const auto features =
        device.negotiate(supported(environment, legacy), legacy ? 0 : virtio::feature_version_1, feature_names);
    auto attached = Result<void>{};
    if (!features) {
        attached = features.error();
    } else {
        attached = co_await attach_controller(environment, device, *features);
    }
    if (!attached) {
        device.fail();
    }
    co_return attached;
}

} // namespace

io::Task<Result<void>> probe(Environment& environment, pci::Device function) {
    auto* device = new (std::nothrow) virtio::PciDevice(function, environment.interrupts, environment.mmio);
    if (device == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio device"};
    }
    auto attached = device->open();
    if (attached) {
        attached = co_await attach(environment, *device);
    }
    if (!attached) {
        delete device;
    }
    co_return attached;
}

io::Task<Result<void>> probe(Environment& environment, u64 base, std::optional<u32> gsi) {
    CO_TRY(const Mmio registers, environment.mmio.map(base, virtio::mmio::bytes));
    auto* device = new (std::nothrow) virtio::MmioDevice(registers, base, gsi, environment.interrupts);
    if (device == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio device"};
    }
    auto attached = device->open();
    if (attached) {
        attached = co_await attach(environment, *device);
    }
    if (!attached) {
        delete device;
    }
    co_return attached;
}

} // namespace fl::drivers::virtio_scsi
