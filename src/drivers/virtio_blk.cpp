module;
#include "core/try.hpp"
module drivers.virtio_blk;
import core.std;
import core.dma;
import core.log;
import core.result;
import core.text;
import core.time;
import io.block;
import io.block_queue;
import io.executor;
import io.latch;
import io.task;
import drivers.driver;
import drivers.pci;
import drivers.virtio.controller;
import drivers.virtio_blk.disk;

namespace fl::drivers::virtio_blk {

namespace {

u64 features_of(const Environment& environment, bool legacy) {
    const auto unless = [&](Feature name, u64 features) { return environment.allows(name) ? features : 0; };
    u64 features = feature_size_max | feature_seg_max | feature_ro | feature_blk_size | feature_topology;
    features |= unless(Feature::flush, feature_flush) | unless(Feature::discard, feature_discard);
    features |= unless(Feature::write_zeroes, feature_write_zeroes);
    if (!legacy) {
        features |= unless(Feature::config_wce, feature_config_wce) | unless(Feature::multi_queue, feature_mq);
    }
    return features;
}

/// `capacity`: in units of 512 bytes.
Result<u64> sectors_of(u64 capacity, u32 sector_size) {
    constexpr u64 most = u64{1} << 54;
    if (capacity > most) {
        return Error{Code::protocol, "the virtio disk has an impossible size (capacity)", most, capacity};
    }
    return capacity / (sector_size / 512);
}

/// A device in use. Lives until the machine ends once its disk is announced.
class Controller final : public virtio::Controller {
  public:
    using virtio::Controller::Controller;
    ~Controller() override {
        for (Disk* disk : disks_) {
            delete disk;
        }
    }

  private:
    using Lane = virtio::DiskLane<Transport>;

    Result<u32> configure() override;
    virtio::Lane* make_lane(io::Executor& executor) override { return new (std::nothrow) Lane(executor, shared_); }
    Result<void> enable() override;
    io::Task<Result<void>> find() override;
    void config_changed() override;

    void set_cache_mode();
    io::Task<Result<FixedText<24>>> serial_number();
    io::BlockDevice::Identity identify(std::string_view serial) const;
    Result<void> make_disks(const io::BlockDevice::Identity& identity);
    Result<void> announce();
    Queue& queue(u32 index) const { return static_cast<Lane&>(lane(index)).queue(); }

    io::Geometry geometry_;
    bool write_through_ = false; // what is acknowledged is on stable storage
    Limits limits_;
    FixedText<24> serial_;
    std::array<Disk*, max_lanes> disks_{}; // owned; none: it has 0 bytes
};

// ---- setting up ----

Result<u32> Controller::configure() {
    u32 queues = 1;
    u64 capacity = 0; // in units of 512 bytes
    u32 size_max = 0;
    u32 seg_max = 0;
    u32 block = 0;
    u32 exponent = 0;
    u32 discard = 0;
    u32 zeroes = 0;
    CHECK(device_.read_config([&] {
        capacity = device_.config64(config::capacity);
        size_max = device_.config(config::size_max, 4);
        seg_max = device_.config(config::seg_max, 4);
        block = device_.config(config::blk_size, 4);
        exponent = device_.config(config::physical_block_exp, 1);
        discard = device_.config(config::max_discard_sectors, 4);
        zeroes = device_.config(config::max_write_zeroes_sectors, 4);
        limits_.zeroes_unmap = device_.config(config::write_zeroes_may_unmap, 1) == 1;
        queues = has(feature_mq) ? device_.config(config::queue_count, 2) : 1;
    }));
    if (queues == 0) {
        return Error{Code::protocol, "the virtio disk has no queues (num_queues)", 1, 0};
    }
    io::Geometry& geometry = geometry_;
    geometry.sector_size = has(feature_blk_size) ? block : 512;
    if (geometry.sector_size < 512 || geometry.sector_size > 4096 || !std::has_single_bit(geometry.sector_size)) {
        return Error{Code::not_supported,
                     "the virtio disk's block size is none that this driver knows (blk_size: 512 to 4096, a power of "
                     "two)",
                     4096, block};
    }
    TRY(geometry.sectors, sectors_of(capacity, geometry.sector_size));
    geometry.physical_sector_size =
        has(feature_topology) && exponent < 8 ? geometry.sector_size << exponent : geometry.sector_size;
    geometry.read_only = has(feature_ro);
    geometry.flush = has(feature_flush);
    const auto whole = [&](u32 units) { // of 512 bytes, as bytes of whole sectors
        return static_cast<u32>(align_down<u64>(std::min<u64>(u64{units} * 512, 0x7fff'f000), geometry.sector_size));
    };
    limits_.discard_bytes = whole(discard);
    limits_.zeroes_bytes = whole(zeroes);
    geometry.discard = has(feature_discard) && !geometry.read_only && limits_.discard_bytes != 0;
    geometry.write_zeroes = has(feature_write_zeroes) && !geometry.read_only && limits_.zeroes_bytes != 0;
    set_cache_mode();
    if (has(feature_size_max)) {
        limits_.segment_bytes = align_down(size_max, geometry.sector_size);
        if (limits_.segment_bytes == 0) {
            return Error{Code::not_supported, "the virtio disk's largest segment is smaller than a sector (size_max)",
                         geometry.sector_size, size_max};
        }
    }
    limits_.segments = has(feature_seg_max) && seg_max > 1 ? seg_max : 1;
    return queues;
}

/// A driver that does not flush must switch the cache to write-through, if the device has the choice; without
/// VIRTIO_BLK_F_CONFIG_WCE a device that is not to be flushed does so by itself [virtio-1.2 §5.2.5, §5.2.6.2].
void Controller::set_cache_mode() {
    if (!has(feature_config_wce)) {
        write_through_ = !geometry_.flush;
        return;
    }
    if (!geometry_.flush) {
        device_.write_config(config::writeback, 0);
    }
    write_through_ = device_.config(config::writeback, 1) == 0;
    if (!geometry_.flush && !write_through_) {
        log::warning("{}: its write cache cannot be flushed and does not become write-through (writeback): data that "
                     "was written may be lost if its host fails",
                     device_.name());
    }
}

Result<void> Controller::enable() {
    for (u32 i = 0; i < lane_count(); ++i) {
        Transport& transport = queue(i).transport();
        CHECK(transport.make(device_, static_cast<u16>(i), features(), Transport::needs, Transport::command_bytes,
                             environment_.dma));
        transport.set_limits(limits_);
        CHECK(transport.enable(device_, vector_of(i)));
    }
    return {};
}

io::Task<Result<FixedText<24>>> Controller::serial_number() {
    FixedText<24> serial;
    auto memory = environment_.dma.buffer(id_bytes);
    if (!memory) {
        co_return serial;
    }
    IdExchange exchange(environment_.executor);
    exchange.data = memory->span().subspan(0, id_bytes);
    if (!queue(0).send(exchange)) {
        co_return serial;
    }
    if (!co_await exchange.done.wait({environment_.executor, environment_.timeout})) {
        queue(0).abandon(exchange);
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

io::BlockDevice::Identity Controller::identify(std::string_view serial) const {
    io::BlockDevice::Identity identity;
    identity.name = environment_.disks.free_name("vd");
    identity.driver = Transport::driver;
    identity.kind = io::Kind::synthetic;
    print(identity.model, "virtio block device{}{}", serial.empty() ? "" : " ", serial);
    print(identity.features, "{}{}{}{}", geometry_.flush ? "flush " : "", geometry_.discard ? "discard " : "",
          geometry_.write_zeroes ? "write-zeroes " : "", write_through_ ? "write-through " : "");
    print_features(identity.features, queue(0).transport().queue_size());
    return identity;
}

Result<void> Controller::make_disks(const io::BlockDevice::Identity& identity) {
    for (u32 i = 0; i < lane_count(); ++i) {
        disks_[i] = new (std::nothrow) Disk(queue(i), geometry_, identity);
        if (disks_[i] == nullptr) {
            return Error{Code::exhausted, "no memory for a disk"};
        }
        if (i != 0) {
            disks_[0]->add_lane(*disks_[i]);
        }
    }
    return {};
}

io::Task<Result<void>> Controller::find() {
    CO_TRY(const FixedText<24> serial, co_await serial_number());
    if (!queue(0).is_open()) {
        co_return Error{Code::io, "the virtio disk was closed before its first request, as said above"};
    }
    serial_ = serial;
    if (geometry_.sectors == 0) {                  // it may get some: see config_changed()
        const FixedText<48> name = device_.name(); // "virtio 00:04.0", "virtio-mmio 0xfeb00000"
        const usize blank = name.view().find(' ');
        environment_.disks.unused({name.view().starts_with("virtio-mmio") ? "virtio-mmio" : "pci",
                                   name.view().substr(blank + 1), "virtio disk", Unused::empty, "it has 0 bytes"});
        co_return Result<void>{};
    }
    co_return announce();
}

Result<void> Controller::announce() {
    auto announced = make_disks(identify(serial_.view()));
    if (announced) {
        announced = environment_.disks.announce(*disks_[0], DiskSink::no_twin);
    }
    if (!announced) {
        for (Disk*& disk : disks_) {
            delete std::exchange(disk, nullptr);
        }
        return announced;
    }
    for (u32 i = 0; i < lane_count(); ++i) {
        // no other coroutine has run since, so this precedes any request to the lane
        disks_[i]->link(environment_.executor);
    }
    return {};
}

// ---- in use ----

void Controller::config_changed() {
    u64 capacity = 0;
    Result<u64> sectors = 0;
    if (auto read = device_.read_config([&] { capacity = device_.config64(config::capacity); }); !read) {
        sectors = read.error();
    } else {
        sectors = sectors_of(capacity, geometry_.sector_size);
    }
    if (!sectors) {
        const FixedText<48> name = device_.name();
        log::warning("{}: the disk keeps its size: {}",
                     disks_[0] != nullptr ? disks_[0]->identity().name.view() : name.view(), sectors.error());
    } else if (disks_[0] != nullptr) {
        disks_[0]->resize(*sectors);
    } else if (*sectors != 0) {
        geometry_.sectors = *sectors;
        if (auto announced = announce(); !announced) {
            log::warning("{}: the disk has got a size and is not used: {}", device_.name(), announced.error());
        }
    }
}

constexpr virtio::Type type{
    .features = features_of,
    .names = feature_names,
    .make = [](Environment& environment, virtio::Device& device, u64 features) -> virtio::Controller* {
        return new (std::nothrow) Controller(environment, device, features);
    }};

} // namespace

io::Task<Result<void>> probe(Environment& environment, pci::Device function) {
    return virtio::probe(type, environment, function);
}

io::Task<Result<void>> probe(Environment& environment, u64 base, std::optional<u32> gsi) {
    return virtio::probe(type, environment, base, gsi);
}

} // namespace fl::drivers::virtio_blk
