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
import io.ring.memory;
import io.ring.virtqueue;
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
    }
    return features;
}

/// A device in use. Lives until the machine ends once its disk is announced.
template <class Ring>
class Controller {
  public:
    /// `device`: owned by the caller, started and negotiated.
    Controller(Environment& environment, virtio::Device& device, u64 features)
        : environment_(environment), device_(device), features_(features), disk_(environment.executor),
          changes_(environment.executor), tasks_(environment.executor) {}

    io::Task<Result<void>> attach();
    /// Ends everything and resets the device. On an Error it may still access the controller's memory.
    io::Task<Result<void>> detach();

  private:
    Result<Ring> make_ring();
    Result<void> attach_interrupts();
    Result<io::Geometry> read_geometry();
    io::Task<Result<FixedText<24>>> serial_number();
    io::BlockDevice::Identity identify(const io::Geometry& geometry, std::string_view serial) const;
    io::Task<Result<void>> watch();
    void check_capacity();

    template <class R>
    friend io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features);

    static void on_queue(void* self);  // vector 0, or the line
    static void on_config(void* self); // vector 1

    bool has(u64 feature) const { return (features_ & feature) != 0; }

    Environment environment_; // a copy: the objects it refers to outlive this, the Environment itself may not
    virtio::Device& device_;
    u64 features_;
    DmaBuffer ring_;
    DmaBuffer commands_;
    Vector<io::VirtqueueRow> rows_;
    io::VirtqueueLayout layout_;
    u32 size_ = 0;     // of the queue, in descriptors
    u64 capacity_ = 0; // in units of 512 bytes
    Limits limits_;
    bool config_vector_ = false; // configuration changes have a vector of their own
    Disk<Ring> disk_;
    io::Signal changes_; // the configuration has changed, or the queue has closed
    std::atomic<bool> config_changed_{false};
    io::TaskGroup tasks_;
    Controller* next_ = nullptr; // list of controllers in use
};

template <class Ring>
constinit Controller<Ring>* controllers = nullptr; // live until the machine ends

// ---- setting up ----

template <class Ring>
Result<io::Geometry> Controller<Ring>::read_geometry() {
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
    }));
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

template <class Ring>
Result<Ring> Controller<Ring>::make_ring() {
    const u32 maximum = device_.max_size(0);
    if (maximum == 0 || maximum > io::virtqueue_max_size) {
        return Error{Code::protocol, "the virtio disk's queue has an impossible size", io::virtqueue_max_size, maximum};
    }
    size_ = std::min(maximum, max_queue_size);
    if constexpr (std::same_as<Ring, SplitRing>) {
        size_ = std::bit_floor(size_);
        layout_ = device_.legacy() ? Ring::layout(size_, virtio::legacy_align) : Ring::layout(size_);
    } else {
        layout_ = Ring::layout(size_);
    }
    if (size_ < 3) { // header, data, status
        return Error{Code::not_supported, "the virtio disk's queue is too small for a request", 3, size_};
    }
    TRY(ring_, environment_.dma.buffer(static_cast<u32>(layout_.bytes)));
    TRY(commands_, environment_.dma.buffer(Transport<Ring>::command_bytes));
    for (u32 i = 0; i < size_; ++i) {
        if (!rows_.push({})) {
            return Error{Code::exhausted, "no memory for the table of a virtqueue"};
        }
    }
    return Ring::create(io::MappedMemory(ring_.data(), ring_.size()), layout_, size_, {rows_.begin(), rows_.size()},
                        {.event_index = has(virtio::feature_event_idx),
                         .in_order = has(virtio::feature_in_order),
                         .indirect = has(virtio::feature_indirect)});
}

template <class Ring>
Result<void> Controller<Ring>::attach_interrupts() {
    const std::array<virtio::InterruptUse, 2> uses{{{0, on_queue, this}, {0, on_config, this}}};
    TRY(const u32 count, device_.attach(uses, environment_.allows(Feature::messages)));
    config_vector_ = count == 2;
    return device_.set_config_vector(config_vector_ ? u16{1} : virtio::no_vector);
}

template <class Ring>
void Controller<Ring>::on_queue(void* self) {
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
        controller.disk_.transport().on_interrupt(accesses);
    }
}

template <class Ring>
void Controller<Ring>::on_config(void* self) {
    auto& controller = *static_cast<Controller*>(self);
    controller.config_changed_.store(true, std::memory_order_relaxed); // ordered by raise()
    controller.changes_.raise();
}

template <class Ring>
io::Task<Result<FixedText<24>>> Controller<Ring>::serial_number() {
    FixedText<24> serial;
    auto memory = environment_.dma.buffer(id_bytes);
    if (!memory) {
        co_return serial;
    }
    IdExchange exchange(environment_.executor);
    exchange.data = memory->span().subspan(0, id_bytes);
    auto& queue = disk_.queue();
    if (!queue.send(exchange)) {
        co_return serial;
    }
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        queue.abandon(exchange);
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

template <class Ring>
io::BlockDevice::Identity Controller<Ring>::identify(const io::Geometry& geometry, std::string_view serial) const {
    io::BlockDevice::Identity identity;
    identity.name = environment_.disks.free_name("vd");
    identity.driver = Transport<Ring>::driver;
    identity.kind = io::Kind::synthetic;
    print(identity.model, "virtio block device{}{}", serial.empty() ? "" : " ", serial);
    print(identity.features, "{}{}{}{}{}{}{} queue-size={}", geometry.flush ? "flush " : "",
          geometry.discard ? "discard " : "", std::same_as<Ring, PackedRing> ? "packed " : "",
          has(virtio::feature_event_idx) ? "event-idx " : "", has(virtio::feature_indirect) ? "indirect " : "",
          has(virtio::feature_in_order) ? "in-order " : "", device_.by_line() ? "line" : "msix", size_);
    return identity;
}

template <class Ring>
io::Task<Result<void>> Controller<Ring>::attach() {
    CO_TRY(const io::Geometry geometry, read_geometry());
    if (geometry.sectors == 0) {
        co_return Error{Code::not_supported, "the virtio disk has 0 bytes (capacity)"};
    }
    CO_TRY(const Ring ring, make_ring());
    CO_CHECK(attach_interrupts());
    const auto changed = [](void* self) { static_cast<Controller*>(self)->changes_.raise(); };
    disk_.transport().set_up(ring, commands_, has(virtio::feature_indirect), limits_, changed, this);
    const virtio::QueueAddresses at{ring_.bus() + layout_.descriptors, ring_.bus() + layout_.driver,
                                    ring_.bus() + layout_.device};
    CO_TRY(const virtio::Notifier notifier,
           device_.enable(0, size_, at, device_.by_line() ? virtio::no_vector : u16{0}));
    disk_.transport().set_notifier(notifier);
    device_.run();
    disk_.set_timeout(environment_.timeout);
    disk_.open(geometry);
    CO_TRY(const FixedText<24> serial, co_await serial_number());
    disk_.set_identity(identify(geometry, serial.view()));
    CO_CHECK(environment_.disks.announce(disk_, DiskSink::no_twin));
    if (auto watched = tasks_.spawn(watch()); !watched) {
        log::warning("{}: changes of the device will not be detected: {}", disk_.identity().name.view(),
                     watched.error());
    }
    co_return Result<void>{};
}

// ---- in use ----

template <class Ring>
void Controller<Ring>::check_capacity() {
    u64 capacity = 0;
    if (auto read = device_.read_config([&] { capacity = device_.config64(config::capacity); }); !read) {
        log::warning("{}: {}", disk_.identity().name.view(), read.error());
    } else if (capacity != capacity_) {
        log::warning("{}: the device has been resized from {} to {} units of 512 bytes: the disk keeps its size until "
                     "the machine restarts",
                     disk_.identity().name.view(), capacity_, capacity);
        capacity_ = capacity;
    }
}

template <class Ring>
io::Task<Result<void>> Controller<Ring>::watch() {
    for (;;) {
        co_await changes_.wait();
        if (config_changed_.exchange(false, std::memory_order_relaxed) && disk_.queue().is_open()) {
            if (device_.needs_reset()) {
                disk_.queue().close(io::Status::device_gone,
                                    {Code::io, "the virtio device has failed (DEVICE_NEEDS_RESET)"});
            } else {
                check_capacity();
            }
        }
        if (!disk_.queue().is_open()) {
            static_cast<void>(co_await detach());
            co_return Result<void>{};
        }
    }
}

template <class Ring>
io::Task<Result<void>> Controller<Ring>::detach() {
    disk_.queue().stop();
    const auto done = co_await device_.reset(environment_.executor, environment_.timeout);
    device_.detach();
    if (done) {
        disk_.queue().reclaim();
        co_return done;
    }
    log::warning("{}: {}: its memory is not reused", device_.name(), done.error());
    ring_.abandon();
    commands_.abandon();
    co_return done;
}

// ---- probing ----

template <class Ring>
io::Task<Result<void>> attach_controller(Environment& environment, virtio::Device& device, u64 features) {
    auto* controller = new (std::nothrow) Controller<Ring>(environment, device, features);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a virtio disk"};
    }
    auto attached = co_await controller->attach();
    if (!attached && co_await controller->detach()) {
        delete controller;
        co_return attached;
    }
    controller->next_ = std::exchange(controllers<Ring>, controller); // also if the device may still access its memory
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
    } else if ((*features & virtio::feature_packed) != 0) {
        attached = co_await attach_controller<PackedRing>(environment, device, *features);
    } else {
        attached = co_await attach_controller<SplitRing>(environment, device, *features);
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
