module;
#include "core/try.hpp"
module drivers.storvsc;
import core.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.task;
import io.latch;
import io.block;
import hv.hyperv;
import drivers.driver;
import drivers.scsi.units;

namespace fl::drivers::storvsc {

using hv::hyperv::Offer;
using hv::hyperv::Vmbus;

namespace {
constinit Controller* attached = nullptr; // controllers live until machine shutdown
} // namespace

Controller::Controller(Environment& environment, Vmbus& bus)
    : Host(environment.executor, driver_name), environment_(environment), bus_(bus), changes_(environment.executor),
      units_(*this, environment.disks), tasks_(environment.executor) {
    shared_.notify = [](void* self) { static_cast<Controller*>(self)->changes_.open(); };
    shared_.context = this;
}

// Only after disconnect() or before connect(): no queue may be registered.
Controller::~Controller() {
    units_.clear(); // before the queues
    for (u32 i = 0; i < lane_count_; ++i) {
        delete lanes_[i];
    }
}

// ---- handshake ----

io::Task<Result<void>> Controller::open_lane(u32 index, Offer offer) {
    io::Executor& executor = index == 0 ? environment_.executor : *environment_.executors[index];
    auto* lane = new (std::nothrow) Lane(executor, shared_, index == 0);
    if (lane == nullptr) {
        co_return Error{Code::exhausted, "no memory for a storage channel"};
    }
    auto parameters = environment_.dma.buffer(scratch_bytes);
    if (!parameters) {
        delete lane;
        co_return parameters.error();
    }
    lane->parameters = std::move(*parameters);
    lane->channel.on_rescind([](void* self) { static_cast<Controller*>(self)->changes_.open(); }, this);
    const auto opened = co_await bus_.open(lane->channel, offer,
                                           {.send_bytes = send_bytes, .receive_bytes = receive_bytes, .cpu = index});
    if (!opened) {
        delete lane;
        co_return opened.error();
    }
    lane->queue.set_terms(terms_);
    lanes_[lane_count_++] = lane;
    if (index == 0) {
        lane->queue.start(lane->parameters, environment_.timeout);
        co_return Result<void>{};
    }
    lane->start.lane = lane;
    lane->start.timeout = environment_.timeout;
    lane->start.run = [](io::Post& post) {
        auto& start = static_cast<Lane::Start&>(post);
        start.lane->queue.start(start.lane->parameters, start.timeout);
    };
    if (!executor.post(lane->start)) {
        co_return Error{Code::device_gone, "a processor has stopped before it took its storage channel"};
    }
    const io::Bound bound(environment_.executor, environment_.timeout);
    while (lane->queue.quiescent()) {
        if (bound.passed()) {
            co_return Error{Code::timed_out, "a processor does not take its storage channel"};
        }
        co_await environment_.executor.sleep(100'000);
    }
    co_return Result<void>{};
}

// Sends one packet and waits for its answer.
io::Task<Result<void>> Controller::send_request(Exchange& exchange, Operation operation) {
    exchange.packet.header = {operation, flag_completion, 0};
    auto done = co_await scsi::send_and_wait(lanes_[0]->queue, exchange, environment_.executor, environment_.timeout);
    if (!done && done.error().code == Code::timed_out) {
        log::error("storvsc: no answer to {}", name(operation));
    }
    co_return done;
}

io::Task<Result<void>> Controller::negotiate_version() {
    for (const Version version : versions) {
        Exchange exchange(environment_.executor);
        const ProtocolVersion wanted{version, 0};
        std::memcpy(&exchange.packet.srb, &wanted, sizeof wanted);
        CO_CHECK(co_await send_request(exchange, Operation::query_protocol_version));
        if (exchange.packet.header.status == 0) {
            terms_.version = version;
            lanes_[0]->queue.set_terms(terms_);
            co_return Result<void>{};
        }
        log::info("storvsc: version {} is refused (status {:#x})", version, exchange.packet.header.status);
    }
    co_return Error{
        Code::not_supported,
        "the host refuses every version of the storage protocol that this driver knows (6.2, 6.0, 5.1, 4.2, 2.0)"};
}

io::Task<Result<ChannelProperties>> Controller::read_properties() {
    Exchange exchange(environment_.executor);
    CO_CHECK(co_await send_request(exchange, Operation::query_properties));
    if (exchange.packet.header.status != 0) {
        co_return Error{Code::io, "the host refuses QUERY_PROPERTIES (status)", 0, exchange.packet.header.status};
    }
    ChannelProperties properties;
    std::memcpy(&properties, &exchange.packet.srb, sizeof properties);
    co_return properties;
}

io::Task<Result<void>> Controller::connect(const Offer& offer) {
    offer_ = offer;
    CO_TRY(scratch_, environment_.dma.buffer(scratch_bytes));
    CO_CHECK(co_await open_lane(0, offer));
    {
        Exchange exchange(environment_.executor);
        CO_CHECK(co_await send_request(exchange, Operation::begin_initialization));
        if (exchange.packet.header.status != 0) {
            co_return Error{Code::io, "the host refuses BEGIN_INITIALIZATION (status)", 0,
                            exchange.packet.header.status};
        }
    }
    CO_CHECK(co_await negotiate_version());
    CO_TRY(const ChannelProperties properties, co_await read_properties());
    // Overhead of a packet: the descriptor, the range, one more page number for an unaligned buffer, the packet, the
    // trailer.
    const u32 around = 16 + 8 + 8 + 8 + static_cast<u32>(sizeof(Packet)) + 8;
    const u32 fits = (lanes_[0]->channel.send_capacity() / 2 - around) / 8 * static_cast<u32>(page_size);
    const u32 maximum = properties.max_transfer_bytes == 0 ? terms_.max_transfer : properties.max_transfer_bytes;
    terms_.max_transfer = align_down<u32>(std::min(maximum, fits), static_cast<u32>(page_size));
    if (terms_.max_transfer == 0) {
        co_return Error{Code::protocol, "the host's largest transfer is smaller than a page (max_transfer_bytes)",
                        page_size, maximum};
    }
    {
        Exchange exchange(environment_.executor);
        CO_CHECK(co_await send_request(exchange, Operation::end_initialization));
        if (exchange.packet.header.status != 0) {
            co_return Error{Code::io, "the host refuses END_INITIALIZATION (status)", 0, exchange.packet.header.status};
        }
    }
    lanes_[0]->queue.set_terms(terms_);
    if (auto further = co_await open_sub_channels(properties); !further) {
        log::warning("storvsc: channels for {} of {} processors: {}", lane_count_,
                     std::max<usize>(environment_.executors.size(), 1), further.error());
    }
    co_return Result<void>{};
}

// Opens a further channel for each further processor, up to the number that the host allows.
io::Task<Result<void>> Controller::open_sub_channels(ChannelProperties properties) {
    const u32 processors =
        static_cast<u32>(std::min<usize>(std::max<usize>(environment_.executors.size(), 1), Disk::max_lanes));
    if (terms_.version < Version::win8 || (properties.flags & properties_multi_channel) == 0 || processors == 1 ||
        properties.max_sub_channels == 0) {
        co_return Result<void>{};
    }
    const u32 count = std::min<u32>(properties.max_sub_channels, processors - 1);
    Exchange exchange(environment_.executor);
    const u16 wanted = static_cast<u16>(count);
    std::memcpy(&exchange.packet.srb, &wanted, sizeof wanted);
    CO_CHECK(co_await send_request(exchange, Operation::create_sub_channels));
    if (exchange.packet.header.status != 0) {
        co_return Error{Code::io, "the host refuses CREATE_SUB_CHANNELS (status)", 0, exchange.packet.header.status};
    }
    for (u32 i = 1; i <= count; ++i) {
        const io::Bound bound(environment_.executor, environment_.timeout);
        CO_TRY(const Offer offer, co_await bus_.sub_channel(offer_.instance, static_cast<u16>(i), bound));
        CO_CHECK(co_await open_lane(i, offer));
    }
    co_return Result<void>{};
}

// ---- units ----

// A command that reads up to `bytes` into scratch_. `lun` is below Units::max_luns.
io::Task<Result<void>> Controller::execute(u16 lun, scsi::Cdb cdb, u32 bytes, scsi::Response& response) {
    if (bytes != 0 && !scratch_) { // abandoned by a command that was not answered
        CO_TRY(scratch_, environment_.dma.buffer(scratch_bytes));
    }
    Exchange exchange(environment_.executor);
    ScsiRequest& srb = exchange.packet.srb;
    srb.length = static_cast<u16>(srb_bytes(terms_.version));
    srb.target_id = target();
    srb.lun = static_cast<u8>(lun);
    srb.cdb_length = cdb.length;
    srb.sense_info_length = sense_bytes(terms_.version);
    srb.data_in = bytes != 0 ? Direction::in : Direction::none;
    srb.data_transfer_length = bytes;
    srb.srb_flags = srb_common_flags | (bytes != 0 ? srb_data_in : 0);
    srb.queue_tag = queue_untagged;
    srb.queue_action = queue_simple_request;
    srb.time_out_value = static_cast<u32>(std::clamp<u64>(environment_.timeout / 1'000'000'000, 1, 3600));
    std::copy(cdb.bytes.begin(), cdb.bytes.end(), srb.payload.begin());
    if (bytes != 0) {
        std::memset(scratch_.data(), 0, bytes);
    }
    exchange.data = bytes == 0 ? DmaSpan{} : scratch_.span().subspan(0, bytes);
    const auto done = co_await send_request(exchange, Operation::execute_srb);
    if (!done) {
        if (bytes != 0) { // the host may still write to it
            scratch_.abandon();
        }
        co_return done.error();
    }
    response = response_of(srb, terms_.version);
    response.data = {reinterpret_cast<const u8*>(scratch_.data()), std::min(response.moved, bytes)};
    co_return Result<void>{};
}

// Hyper-V is not sent WRITE SAME, whatever its units report: which of its versions execute it is not documented, and
// Linux, on which they are tested, does not send it either.
scsi::TransportLimits Controller::transport_limits() const {
    scsi::TransportLimits limits = scsi::transport_limits(environment_, terms_.max_transfer);
    limits.write_zeroes = false;
    return limits;
}

scsi::Unit* Controller::make(scsi::UnitNumber at, const scsi::UnitDescription& found,
                             io::BlockDevice::Identity& identity) {
    Disk::Unit unit{found.limits};
    unit.target = at.target;
    unit.lun = static_cast<u8>(at.lun);
    print(identity.features, "{}version={} channels={} max-transfer={}", ide_ ? "ide " : "", terms_.version,
          lane_count_, unit.max_transfer);
    return scsi::make_lanes<Disk>(
        lane_count_, [&](u32 i) { return new (std::nothrow) Disk(lanes_[i]->queue, unit, found.geometry, identity); });
}

// ---- hot add, hot remove and shutdown ----

Result<void> Controller::keep() { return tasks_.spawn(watch_source()); }

io::Task<Result<void>> Controller::watch_source() {
    for (;;) {
        static_cast<void>(co_await changes_.wait());
        Queue& queue = lanes_[0]->queue;
        for (u32 i = 0; i < lane_count_; ++i) {
            if (lanes_[i]->channel.rescinded()) {
                queue.close(io::Status::device_gone,
                            {Code::device_gone, "the host has rescinded the storage controller"});
                if (ide_) {
                    environment_.disks.withdraw(ide_->disk_number());
                }
            }
        }
        if (!queue.is_open()) {
            co_return co_await disconnect();
        }
        if (shared_.rescan_requested.exchange(false, std::memory_order_relaxed)) {
            log::info("storvsc: the host reports changed units");
            if (auto scanned = co_await scan(); !scanned && queue.is_open()) {
                log::warning("storvsc: {}", scanned.error());
            }
        }
    }
}

io::Task<Result<void>> Controller::disconnect() {
    if (lane_count_ == 0) {
        co_return Result<void>{};
    }
    lanes_[0]->queue.stop();
    shared_.close(io::Status::device_gone);
    const io::Bound bound(environment_.executor, environment_.timeout); // for all of them together
    Result<void> result;
    for (u32 i = lane_count_; i-- > 0;) { // sub-channels first
        Lane& lane = *lanes_[i];
        while (!lane.queue.quiescent() && !bound.passed()) {
            co_await environment_.executor.sleep(1'000'000);
        }
        if (!lane.queue.quiescent()) {
            result = Error{Code::timed_out, "a processor does not release its storage channel: the channel stays open"};
            continue;
        }
        if (auto closed = co_await bus_.close(lane.channel); !closed) {
            result = closed;
        } else {
            lane.queue.reclaim(); // quiet: its processor no longer accesses it
        }
    }
    co_return result;
}

io::Task<Result<void>> probe(Environment& environment, hv::HyperV::Bus& bus, const hv::SyntheticDevice& device) {
    if (!matches(device)) {
        co_return Error{Code::not_supported, "not a storage channel"};
    }
    const auto offer = bus.vmbus().find(device.number);
    if (!offer) {
        co_return Error{Code::device_gone, "the storage channel was rescinded already"};
    }
    co_return co_await attach(environment, bus.vmbus(), *offer);
}

io::Task<Result<void>> attach(Environment& environment, Vmbus& bus, Offer offer) {
    std::optional<IdePath> ide;
    if (offer.type.text() == ide_class) {
        ide = ide_path(offer.instance.text());
        if (!ide) {
            environment.disks.unused(
                {"vmbus", offer.instance.text(), "IDE accelerator", Unused::failed, "its instance names no IDE disk"});
            co_return Result<void>{};
        }
    }
    if (!environment.disks.offered(ide ? ide->disk_number() : DiskSink::no_twin)) {
        environment.disks.unused({"vmbus",
                                  offer.instance.text(),
                                  "IDE accelerator",
                                  Unused::taken,
                                  {},
                                  ide ? ide->disk_number() : DiskSink::no_twin});
        co_return Result<void>{};
    }
    auto* controller = new (std::nothrow) Controller(environment, bus);
    if (controller == nullptr) {
        co_return Error{Code::exhausted, "no memory for a storage controller"};
    }
    controller->ide_ = ide;
    auto result = co_await controller->connect(offer);
    if (result) {
        log::info("storvsc: {}: version {}, {} {}, transfers up to {} bytes", offer.instance.text(),
                  controller->terms_.version, controller->lane_count_, plural(controller->lane_count_, "channels"),
                  controller->terms_.max_transfer);
        controller->select(ide ? ide->target : u8{0});
        controller->units_.set_rules({.name = FixedText<48>(offer.instance.text()),
                                      .transport = controller->transport_limits(),
                                      .several_targets = false,
                                      .lists_units = !ide,
                                      .probed_luns = Controller::max_hyperv_units,
                                      .disk_number = ide ? ide->disk_number() : DiskSink::no_twin});
        result = co_await controller->scan();
    }
    if (result) {
        controller->next_ = std::exchange(attached, controller);
        if (auto kept = controller->keep(); !kept) {
            log::warning("storvsc: changes by the host will not be detected: {}", kept.error());
        }
        co_return result;
    }
    const bool known = controller->disks() != 0 || controller->channels() > 1; // to the machine, or to other processors
    if (auto left = co_await controller->disconnect(); !left) {
        log::warning("storvsc: {}: leaving the bus: {}", offer.instance.text(), left.error());
        co_return result; // its memory is leaked: a queue may still access it
    }
    if (known) {
        controller->next_ = std::exchange(attached, controller); // kept, closed
    } else {
        delete controller;
    }
    co_return result;
}

} // namespace fl::drivers::storvsc
