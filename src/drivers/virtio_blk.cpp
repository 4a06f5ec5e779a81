module;
#include "core/try.hpp"
module drivers.virtio_blk;
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
import drivers.virtio.device;
import drivers.virtio.mmio;
import drivers.virtio.pci;
import drivers.virtio_blk.disk;

namespace fl::drivers::virtio_blk {

namespace {

constexpr u32 max_queue_size = 256; // descriptors

/// The features that the environment allows, of those that this driver knows.
u64 supported(const Environment& environment, bool legacy) {
    const auto unless = [&](Feature name, u64 features) { return environment.allows(name) ? features : 0; };
    u64 features = feature_size_max | feature_seg_max | feature_ro | feature_blk_size | feature_topology;
    features |= unless(Feature::flush, feature_flush) | unless(Feature::discard, feature_discard);
    features |= unless(Feature::indirect, virtio::feature_indirect);
    features |= unless(Feature::event_idx, virtio::feature_event_idx);
    if (!legacy) {
        features |= unless(Feature::config_wce, feature_config_wce);
        features |= virtio::feature_version_1 | virtio::feature_access_platform | virtio::feature_order_platform;
        features |=
            unless(Feature::packed, virtio::feature_packed) | unless(Feature::in_order, virtio::feature_in_order);
        features |= unless(Feature::multi_queue, feature_mq);
    }
    return features;
}

/// A device in use. Lives until the machine ends once its disk is announced.
class Controller {
  public:
    /// `device`: owned by the caller, started and negotiated.
    Controller(Environment& environment, virtio::Device& device, u64 features)
        : environment_(environment), device_(device), features_(features), changes_(environment.executor),
          tasks_(environment.executor) {}
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    io::Task<Result<void>> attach();
    /// Ends everything and resets the device. On an Error it, or another processor, may still access the controller's
    /// memory.
    io::Task<Result<void>> detach();

  private:
    static constexpr u32 max_lanes = 1 + Disk::max_further_lanes;

    struct Lane {
        Lane(io::Executor& executor, io::QueueGroup& group) : queue(executor, group) {}
        Queue queue;
        DmaBuffer ring;
        DmaBuffer commands;
        Vector<io::VirtqueueRow> rows;
        io::VirtqueueLayout layout;
        u32 size = 0; // in descriptors
    };
    Result<io::Geometry> read_geometry();
    Result<void> make_lanes();
    Result<void> attach_interrupts();
    Result<Ring> make_ring(u32 index);
    Result<void> enable(u32 index);
    Result<void> make_disks(const io::Geometry& geometry, const io::BlockDevice::Identity& identity);
    io::Task<Result<FixedText<24>>> serial_number();
    io::BlockDevice::Identity identify(const io::Geometry& geometry, std::string_view serial) const;
    io::Task<Result<void>> watch();
    void check_capacity();

    friend io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features);

    static void on_queue(void* self);  // vector 0, or the line
    static void on_config(void* self); // vector 1
    static void on_lane(void* queue);  // vectors 2…: the queues after the first, each on its own processor

    bool has(u64 feature) const { return (features_ & feature) != 0; }
    Queue& queue() { return lanes_[0]->queue; }
    std::string_view name() const { return disks_[0] != nullptr ? disks_[0]->identity().name.view() : "virtio_blk"; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    virtio::Device& device_;
    u64 features_;
    u64 capacity_ = 0;    // in units of 512 bytes
    u32 queue_count_ = 1; // that the device has
    Limits limits_;
    io::QueueGroup group_;
    std::array<Lane*, max_lanes> lanes_{};
    u32 made_ = 0;       // lanes that exist
    u32 lane_count_ = 0; // of these, in use
    u32 started_ = 0;    // of these, known to their processor
    std::array<Disk*, max_lanes> disks_{};
    bool config_vector_ = false; // configuration changes have a vector of their own
    io::Signal changes_;         // the configuration has changed, or the queues have closed
    std::atomic<bool> config_changed_{false};
    io::TaskGroup tasks_;
    Controller* next_ = nullptr; // list of controllers in use
};

constinit Controller* controllers = nullptr; // live until the machine ends

// ---- setting up ----

// Only after detach() without an error: no queue may be registered.
Controller::~Controller() {
    for (Disk* disk : disks_) {
        delete disk;
    }
    for (Lane* lane : lanes_) {
        delete lane;
    }
}

Result<io::Geometry> Controller::read_geometry() {
    u32 size_max = 0;
    u32 seg_max = 0;
    u32 block = 0;
    u32 exponent = 0;
    u32 discard = 0;
    CHECK(device_.read_config([&] {
        capacity_ = device_.config64(config::capacity);
        size_max = device_.config(config::size_max, 4);
        seg_max = device_.config(config::seg_max, 4);
        block = device_.config(config::blk_size, 4);
        exponent = device_.config(config::physical_block_exp, 1);
        discard = device_.config(config::max_discard_sectors, 4);
        queue_count_ = has(feature_mq) ? device_.config(config::queue_count, 2) : 1;
    }));
    if (queue_count_ == 0) {
        return Error{Code::protocol, "the virtio disk has no queues (num_queues)", 1, 0};
    }
    io::Geometry geometry;
    geometry.sector_size = has(feature_blk_size) ? block : 512;
    if (geometry.sector_size < 512 || geometry.sector_size > 4096 || !std::has_single_bit(geometry.sector_size)) {
        return Error{Code::not_supported,
                     "the virtio disk's block size is none that this driver knows (blk_size: 512 to 4096, a power of "
                     "two)",
                     4096, block};
    }
    if (capacity_ > u64{1} << 54) {
        return Error{Code::protocol, "the virtio disk has an impossible size (capacity)", u64{1} << 54, capacity_};
    }
    geometry.sectors = capacity_ / (geometry.sector_size / 512);
    geometry.physical_sector_size =
        has(feature_topology) && exponent < 8 ? geometry.sector_size << exponent : geometry.sector_size;
    geometry.read_only = has(feature_ro);
    geometry.flush = has(feature_flush);
    geometry.discard = has(feature_discard) && !geometry.read_only && discard >= geometry.sector_size / 512;
    limits_.discard_bytes =
        static_cast<u32>(align_down<u64>(std::min<u64>(u64{discard} * 512, 0x7fff'f000), u64{geometry.sector_size}));
    if (has(feature_size_max)) {
        limits_.segment_bytes = align_down(size_max, geometry.sector_size);
        if (limits_.segment_bytes == 0) {
            return Error{Code::not_supported, "the virtio disk's largest segment is smaller than a sector (size_max)",
                         geometry.sector_size, size_max};
        }
    }
    limits_.segments = has(feature_seg_max) && seg_max > 1 ? seg_max : 1;
    return geometry;
}

Result<void> Controller::make_lanes() {
    const bool several = !environment_.executors.empty();
    const u32 wanted =
        std::min({queue_count_, max_lanes, several ? static_cast<u32>(environment_.executors.size()) : u32{1}});
    for (; made_ < wanted; ++made_) {
        lanes_[made_] =
            new (std::nothrow) Lane(made_ == 0 ? environment_.executor : *environment_.executors[made_], group_);
        if (lanes_[made_] == nullptr) {
            return Error{Code::exhausted, "no memory for a virtqueue"};
        }
    }
    return {};
}

/// Vectors: the first queue, changes of the configuration, the other queues. Without a vector of its own a queue is not
/// used, because its interrupt would arrive on another processor.
Result<void> Controller::attach_interrupts() {
    std::array<virtio::InterruptUse, 1 + max_lanes> uses;
    const u32 here = environment_.executor.processor();
    uses[0] = {here, on_queue, this};
    uses[1] = {here, on_config, this};
    for (u32 i = 1; i < made_; ++i) {
        uses[i + 1] = {lanes_[i]->queue.executor().processor(), on_lane, &lanes_[i]->queue};
    }
    TRY(const u32 count, device_.attach(std::span(uses).first(made_ + 1), environment_.allows(Feature::messages)));
    config_vector_ = count >= 2;
    lane_count_ = config_vector_ ? count - 1 : 1;
    return device_.set_config_vector(config_vector_ ? u16{1} : virtio::no_vector);
}

Result<Ring> Controller::make_ring(u32 index) {
    Lane& lane = *lanes_[index];
    const u32 maximum = device_.max_size(static_cast<u16>(index));
    if (maximum == 0 || maximum > io::virtqueue_max_size) {
        return Error{Code::protocol, "the virtio disk's queue has an impossible size", io::virtqueue_max_size, maximum};
    }
    const bool packed = has(virtio::feature_packed);
    lane.size = Ring::usable_size(std::min(maximum, max_queue_size), packed);
    lane.layout = Ring::layout(lane.size, packed, device_.legacy() ? virtio::legacy_align : 64);
    if (lane.size < 3) { // header, data, status
        return Error{Code::not_supported, "the virtio disk's queue is too small for a request", 3, lane.size};
    }
    TRY(lane.ring, environment_.dma.buffer(static_cast<u32>(lane.layout.bytes)));
    TRY(lane.commands, environment_.dma.buffer(Transport::command_bytes));
    for (u32 i = 0; i < lane.size; ++i) {
        if (!lane.rows.push({})) {
            return Error{Code::exhausted, "no memory for the table of a virtqueue"};
        }
    }
    return Ring::create(io::MappedMemory(lane.ring.data(), lane.ring.size()), lane.layout, lane.size,
                        {lane.rows.begin(), lane.rows.size()},
                        {.event_index = has(virtio::feature_event_idx),
                         .in_order = has(virtio::feature_in_order),
                         .indirect = has(virtio::feature_indirect),
                         .packed = packed});
}

Result<void> Controller::enable(u32 index) {
    TRY(const Ring ring, make_ring(index));
    Lane& lane = *lanes_[index];
    // The first queue closes together with every other one.
    const auto changed = [](void* self) { static_cast<Controller*>(self)->changes_.raise(); };
    lane.queue.transport().set_up(ring, lane.commands, has(virtio::feature_indirect), limits_,
                                  index == 0 ? static_cast<void (*)(void*)>(changed) : nullptr, this);
    const virtio::QueueAddresses at{lane.ring.bus() + lane.layout.descriptors, lane.ring.bus() + lane.layout.driver,
                                    lane.ring.bus() + lane.layout.device};
    const u16 vector = device_.by_line() ? virtio::no_vector : static_cast<u16>(index == 0 ? 0 : index + 1);
    TRY(const virtio::Notifier notifier, device_.enable(static_cast<u16>(index), lane.size, at, vector));
    lane.queue.transport().set_notifier(notifier);
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
        on_config(self);
    }
    if ((reasons & virtio::isr_queue) != 0) {
        controller.queue().transport().on_interrupt(accesses);
    }
}

void Controller::on_lane(void* queue) { static_cast<Queue*>(queue)->transport().on_interrupt(0); }

void Controller::on_config(void* self) {
    auto& controller = *static_cast<Controller*>(self);
    controller.config_changed_.store(true, std::memory_order_relaxed); // ordered by raise()
    controller.changes_.raise();
}

io::Task<Result<FixedText<24>>> Controller::serial_number() {
    FixedText<24> serial;
    auto memory = environment_.dma.buffer(id_bytes);
    if (!memory) {
        co_return serial;
    }
    IdExchange exchange(environment_.executor);
    exchange.data = memory->span().subspan(0, id_bytes);
    if (!queue().send(exchange)) {
        co_return serial;
    }
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        queue().abandon(exchange);
        memory->abandon(); // the device may still write to it
        co_return serial;
    }
    if (exchange.answered && exchange.status == io::Status::ok) {
        for (u32 i = 0; i < id_bytes; ++i) {
            const auto c = static_cast<char>(memory->data()[i]);
            if (c == 0) {
                break;
            }
            serial.write(std::string_view(c > ' ' && c < 0x7f ? &c : "?", 1));
        }
    }
    co_return serial;
}

io::BlockDevice::Identity Controller::identify(const io::Geometry& geometry, std::string_view serial) const {
    io::BlockDevice::Identity identity;
    identity.name = environment_.disks.free_name("vd");
    identity.driver = Transport::driver;
    identity.kind = io::Kind::synthetic;
    print(identity.model, "virtio block device{}{}", serial.empty() ? "" : " ", serial);
    print(identity.features, "{}{}{}{}{}{}{} queues={} queue-size={}", geometry.flush ? "flush " : "",
          geometry.discard ? "discard " : "", has(virtio::feature_packed) ? "packed " : "",
          has(virtio::feature_event_idx) ? "event-idx " : "", has(virtio::feature_indirect) ? "indirect " : "",
          has(virtio::feature_in_order) ? "in-order " : "", device_.by_line() ? "line" : "msix", lane_count_,
          lanes_[0]->size);
    return identity;
}

Result<void> Controller::make_disks(const io::Geometry& geometry, const io::BlockDevice::Identity& identity) {
    for (u32 i = 0; i < lane_count_; ++i) {
        disks_[i] = new (std::nothrow) Disk(lanes_[i]->queue, geometry, identity);
        if (disks_[i] == nullptr) {
            return Error{Code::exhausted, "no memory for a disk"};
        }
        if (i != 0) {
            disks_[0]->add_lane(*disks_[i]);
        }
    }
    return {};
}

io::Task<Result<void>> Controller::attach() {
    CO_TRY(const io::Geometry geometry, read_geometry());
    if (geometry.sectors == 0) {
        co_return Error{Code::not_supported, "the virtio disk has 0 bytes (capacity)"};
    }
    CO_CHECK(make_lanes());
    CO_CHECK(attach_interrupts());
    for (u32 i = 0; i < lane_count_; ++i) {
        CO_CHECK(enable(i));
    }
    device_.run();
    while (started_ < lane_count_) {
        Queue& queue = lanes_[started_++]->queue;
        CO_CHECK(co_await queue.start_there(environment_.executor, environment_.timeout,
                                            [](io::GroupedQueue<Transport>& there, Nanoseconds timeout) {
                                                static_cast<Queue&>(there).start(timeout);
                                            }));
    }
    CO_TRY(const FixedText<24> serial, co_await serial_number());
    CO_CHECK(make_disks(geometry, identify(geometry, serial.view())));
    CO_CHECK(environment_.disks.announce(*disks_[0], DiskSink::no_twin));
    for (u32 i = 0; i < lane_count_; ++i) {
        // no other coroutine has run since, so this precedes any request to the lane
        disks_[i]->link(environment_.executor);
    }
    if (auto watched = tasks_.spawn(watch()); !watched) {
        log::warning("{}: changes of the device will not be detected: {}", name(), watched.error());
    }
    co_return Result<void>{};
}

// ---- in use ----

void Controller::check_capacity() {
    u64 capacity = 0;
    if (auto read = device_.read_config([&] { capacity = device_.config64(config::capacity); }); !read) {
        log::warning("{}: {}", name(), read.error());
    } else if (capacity != capacity_) {
        log::warning("{}: the device has been resized from {} to {} units of 512 bytes: the disk keeps its size until "
                     "the machine restarts",
                     name(), capacity_, capacity);
        capacity_ = capacity;
    }
}

io::Task<Result<void>> Controller::watch() {
    for (;;) {
        co_await changes_.wait();
        if (config_changed_.exchange(false, std::memory_order_relaxed) && queue().is_open()) {
            if (device_.needs_reset()) {
                queue().close(io::Status::device_gone, {Code::io, "the virtio device has failed (DEVICE_NEEDS_RESET)"});
            } else {
                check_capacity();
            }
        }
        if (!queue().is_open()) {
            static_cast<void>(co_await detach());
            co_return Result<void>{};
        }
    }
}

io::Task<Result<void>> Controller::detach() {
    if (made_ == 0) {
        co_return Result<void>{};
    }
    queue().stop();
    group_.close(io::Status::device_gone);
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
        lanes_[i]->ring.abandon();
        lanes_[i]->commands.abandon();
    }
    co_return done;
}

// ---- probing ----

io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features) {
    auto* controller = new (std::nothrow) Controller(environment, device, features);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio disk"};
    }
    auto attached = co_await controller->attach();
    if (!attached && co_await controller->detach() && controller->started_ <= 1) {
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

} // namespace fl::drivers::virtio_blk
