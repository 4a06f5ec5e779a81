module host.storvsp;
import host.std;
import host.channel;
import host.scsi;
import drivers.storvsc.protocol;

namespace fl::host {

namespace wire = fl::drivers::storvsc;

namespace {

// NTSTATUS values of a packet's header.
constexpr u32 nt_success = 0;
constexpr u32 nt_invalid_parameter = 0xc000000d;
constexpr u32 nt_invalid_request = 0xc0000010;
constexpr u32 nt_revision_mismatch = 0xc0000059;
constexpr u32 nt_does_not_exist = 0xc00000c0;
constexpr u32 nt_invalid_state = 0xc0000184;
constexpr u32 nt_io_error = 0xc0000185;
constexpr u32 nt_buffer_overflow = 0x80000005;

constexpr u32 srb_disable_autosense = 0x20;
constexpr usize lun_limit = 255; // more than Hyper-V's 64: all that a request can address, except the last
constexpr usize packet_limit = sizeof(wire::Packet);
constexpr u64 drain_limit = 10'000'000'000; // ns, for transfers to end: a second is long for a disk

constexpr Guid scsi_type = guid("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
constexpr Guid ide_type = guid("32412632-86cb-44a2-9b5c-50d1417354f5");
constexpr Guid scsi_instance = guid("46697273-746c-6967-6874-766d62757300"); // the last byte numbers the controllers

enum class Phase : u8 { begin, version, properties, ending, ready };

template <class T>
T read_as(std::span<const std::byte> bytes, usize at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
}

} // namespace

struct StorageDevice::State {
    StorageConfig config;
    bool ide = false;
    u8 path = 0;
    u8 target = 0;
    std::vector<LunConfig> initial;
    std::string name;

    Bus* bus = nullptr;
    std::array<std::unique_ptr<ScsiDisk>, lun_limit> luns;
    Channel* primary = nullptr;
    Phase phase = Phase::begin;
    u16 version = 0;
    bool enumerate = false; // must be reported to the guest
    bool remove = false;
    bool gone = false; // rescinded by a fault: sends no more replies
    u64 early = 0;     // a fault: completes this transaction, which does not exist
    DataBuffer data;

    // A request to a rate-limited disk, taken out of the ring and not completed yet; ordered by completion time.
    struct Held {
        Channel* channel;
        Packet packet; // its spans refer to the two members below
        std::vector<std::byte> ranges;
        std::vector<std::byte> payload;
    };
    std::multimap<u64, Held> held;
    std::array<u64, lun_limit> free_at{}; // when the disk has finished the requests so far

    // A request whose transfer ends later, or whose answer waits for its time.
    struct Request : Transfer {
        State* state = nullptr;
        Channel* channel = nullptr; // nullptr: closed, there will be no answer
        Packet packet{};            // its payload refers to `request`
        wire::Packet request{};
        ScsiResult result;
        u32 block_size = 512;
        u8 lun = 0;
        bool over = false; // the transfer has ended
        u64 due = 0;
    };
    std::vector<std::unique_ptr<Request>> requests;   // in use
    std::vector<std::unique_ptr<Request>> spare;      // kept for their memory
    std::map<Channel*, DelayQueue<Request*>> answers; // of each channel: those that have ended
    std::array<u64, lun_limit> written_at{};          // when the last write so far is answered
    Channel* serving = nullptr;                       // its answers are sent at the end of this turn

    void later(Channel& channel, const Packet& packet, const wire::Packet& request, ScsiDisk& disk,
               std::span<const u8, 16> cdb);
    static void on_end(Transfer& transfer);
    void release(Request& request);
    u64 send_due(Channel& channel, u64 now, usize room = packet_limit);
    bool drain(const Channel* channel, std::optional<u8> lun);
    void abandon(const Channel* channel);
    void answer(Channel& channel, const Packet& packet, const wire::Packet& request, const ScsiResult& result,
                wire::SrbStatus srb_status, u32 status);

    void hold(Channel& channel, const Packet& packet, const LunConfig& disk);
    void perform(Channel& channel, const Packet& packet, const wire::Packet& request);
    void handle(Channel& channel, const Packet& packet, StorageDevice& device);
    void negotiate(Channel& channel, const Packet& packet, const wire::Packet& request, StorageDevice& device);
    void execute(Channel& channel, const Packet& packet, const wire::Packet& request, StorageDevice& device);
    const char* gather(const Packet& packet, u32 bytes);
    void complete(Channel& channel, const Packet& packet, wire::Packet& answer, u32 status);
    void notify(Channel& channel);
    ScsiDisk* find(const wire::ScsiRequest& srb) const;
};

// ---- the device ----

StorageDevice::StorageDevice(std::unique_ptr<State> state) : state_(std::move(state)) {}
StorageDevice::~StorageDevice() {
    if (state_->config.transfers != nullptr && !state_->drain(nullptr, std::nullopt)) {
        for (auto& request : state_->requests) {
            request->state = nullptr;
            static_cast<void>(request.release()); // the medium may still write to it
        }
    }
}

std::unique_ptr<StorageDevice> StorageDevice::scsi(const StorageConfig& config, std::vector<LunConfig> luns) {
    auto state = std::make_unique<State>();
    state->config = config;
    state->initial = std::move(luns);
    state->name = "scsi " + std::to_string(config.number);
    return std::unique_ptr<StorageDevice>(new StorageDevice(std::move(state)));
}

std::unique_ptr<StorageDevice> StorageDevice::ide(u8 path, u8 target, const StorageConfig& config,
                                                  const LunConfig& disk) {
    auto state = std::make_unique<State>();
    state->config = config;
    state->config.sub_channels = 0;
    state->ide = true;
    state->path = path;
    state->target = target;
    state->initial = {disk};
    state->initial[0].lun = 0;
    state->name = "ide " + std::to_string(path) + ":" + std::to_string(target);
    return std::unique_ptr<StorageDevice>(new StorageDevice(std::move(state)));
}

std::string_view StorageDevice::name() const { return state_->name; }
u16 StorageDevice::negotiated_version() const { return state_->phase == Phase::ready ? state_->version : u16{0}; }

DeviceOffer StorageDevice::offer() const {
    DeviceOffer offer{.type = scsi_type, .instance = scsi_instance, .sub_channels = state_->config.sub_channels};
    if (state_->ide) {
        offer.type = ide_type;
        offer.instance = {state_->path, 0, 0, 0, state_->target, 0, 0x99, 0x88};
        offer.user[2] = state_->path; // for guests that look here instead of in the instance
        offer.user[3] = state_->target;
        offer.user[8] = 2; // the twin of an emulated IDE disk
    } else {
        offer.instance[15] = static_cast<u8>(state_->config.number);
    }
    return offer;
}

void StorageDevice::attached(Bus& bus) {
    state_->bus = &bus;
    for (const LunConfig& lun : state_->initial) {
        static_cast<void>(add_lun(lun));
    }
    state_->enumerate = false;
}

bool StorageDevice::add_lun(const LunConfig& lun) {
    State& s = *state_;
    if (lun.lun >= lun_limit || lun.store == nullptr || s.luns[lun.lun]) {
        return false;
    }
    s.luns[lun.lun] = std::make_unique<ScsiDisk>(lun, s.config.maximum_transfer, s.bus->counters(), s.bus->faults());
    s.enumerate = true;
    s.bus->kick(*this);
    return true;
}

bool StorageDevice::remove_lun(u8 lun) {
    State& s = *state_;
    if (lun >= lun_limit || !s.luns[lun]) {
        return false;
    }
    if (s.config.transfers != nullptr) {
        static_cast<void>(s.drain(nullptr, lun));
    }
    s.luns[lun].reset();
    s.enumerate = true;
    s.bus->kick(*this);
    return true;
}

void StorageDevice::announce_removal() {
    state_->remove = true;
    state_->bus->kick(*this);
}

void StorageDevice::opened(Channel& channel) {
    if (channel.index() == 0) {
        state_->primary = &channel;
        state_->phase = Phase::begin;
        state_->gone = false;
    }
}

void StorageDevice::closed(Channel& channel) {
    std::erase_if(state_->held, [&](const auto& entry) { return entry.second.channel == &channel; });
    if (state_->config.transfers != nullptr) {
        // The guest may use its pages for something else as soon as it knows that the channel is closed.
        static_cast<void>(state_->drain(&channel, std::nullopt));
        state_->abandon(&channel);
    }
    if (channel.index() == 0) {
        state_->primary = nullptr;
        state_->phase = Phase::begin;
    }
}

bool StorageDevice::serve(Channel& channel) {
    State& s = *state_;
    s.serving = &channel;
    channel.begin();
    while (channel.room(packet_limit)) {
        const auto packet = channel.receive();
        if (!packet) {
            break;
        }
        s.handle(channel, *packet, *this);
    }
    if (s.config.transfers != nullptr) {
        s.config.transfers->submit();
        static_cast<void>(s.send_due(channel, s.config.latency != nullptr ? s.config.transfers->now() : 0));
    }
    if (s.early != 0) [[unlikely]] {
        wire::Packet answer{};
        answer.header.operation = wire::Operation::complete_io;
        answer.srb.srb_status = static_cast<u8>(wire::SrbStatus::success);
        static_cast<void>(
            channel.send(PacketType::completion, 0, std::exchange(s.early, 0), std::as_bytes(std::span(&answer, 1))));
    }
    if (&channel == s.primary && s.phase == Phase::ready && (s.enumerate || s.remove)) [[unlikely]] {
        s.notify(channel);
    }
    s.serving = nullptr;
    return channel.finish();
}

bool StorageDevice::timed() const {
    const State& s = *state_;
    const auto limited = [](const auto& lun) { return lun && lun->config().iops != 0; };
    return s.config.latency != nullptr ||
           std::ranges::any_of(s.initial, [](const LunConfig& lun) { return lun.iops != 0; }) ||
           std::ranges::any_of(s.luns, limited);
}

u64 StorageDevice::tick(Channel& channel, u64 now) {
    constexpr u64 ring_full_interval = 1'000'000;
    State& s = *state_;
    s.serving = &channel;
    u64 next = ~u64{0};
    for (auto it = s.held.begin(); it != s.held.end();) {
        if (it->second.channel != &channel) {
            ++it;
        } else if (it->first > now) {
            next = it->first;
            break;
        } else if (!channel.room(packet_limit)) {
            next = now + ring_full_interval;
            break;
        } else {
            const auto due = s.held.extract(it++);
            const State::Held& held = due.mapped();
            wire::Packet request{};
            std::memcpy(&request, held.payload.data(), std::min(held.payload.size(), packet_limit));
            s.perform(channel, held.packet, request);
        }
    }
    if (s.config.transfers != nullptr) {
        s.config.transfers->submit();
        next = std::min(next, s.send_due(channel, now));
    }
    s.serving = nullptr;
    static_cast<void>(channel.finish());
    return next;
}

// ---- answers that come later ----

/// Begins the command's transfer. Its answer is sent when it has ended, and when the disk's latency is over.
void StorageDevice::State::later(Channel& channel, const Packet& packet, const wire::Packet& request, ScsiDisk& disk,
                                 std::span<const u8, 16> cdb) {
    if (spare.empty()) {
        spare.push_back(std::make_unique<Request>());
    }
    Request& r = *requests.emplace_back(std::move(spare.back()));
    spare.pop_back();
    r.state = this;
    r.channel = &channel;
    r.request = request;
    r.packet = packet;
    r.packet.ranges = {};
    r.packet.payload = std::as_bytes(std::span(&r.request, 1)).first(std::min(packet.payload.size(), packet_limit));
    r.block_size = disk.config().block_size;
    r.lun = disk.config().lun;
    r.over = false;
    r.due = 0;
    r.kind = Transfer::Kind::none;
    r.durable = false;
    r.ended = &State::on_end;
    r.result = disk.execute(cdb, data, &r);
    if (config.latency != nullptr) {
        r.due = config.transfers->now() + config.latency->draw();
        u64& written = written_at[r.lun];
        if (r.kind == Transfer::Kind::write) {
            written = std::max(written, r.due);
        } else if (r.kind == Transfer::Kind::flush) {
            r.due = std::max(r.due, written); // it does not overtake a write
        }
    }
    if (r.kind == Transfer::Kind::none) {
        r.good = true;
        on_end(r);
    } else {
        config.transfers->start(r);
    }
    bus->counters().later += !r.over || r.due != 0;
}

void StorageDevice::State::on_end(Transfer& transfer) {
    Request& r = static_cast<Request&>(transfer);
    if (r.state == nullptr) {
        return; // the device is gone
    }
    State& s = *r.state;
    r.over = true;
    if (!transfer.good) {
        r.result = medium_failure(transfer, r.block_size);
    }
    if (r.channel == nullptr) {
        s.release(r);
        return;
    }
    s.answers[r.channel].push(r.due, &r);
    if (r.channel != s.serving) {
        s.bus->kick(*r.channel);
    }
}

void StorageDevice::State::release(Request& request) {
    const auto found = std::ranges::find_if(requests, [&](const auto& one) { return one.get() == &request; });
    spare.push_back(std::move(*found));
    *found = std::move(requests.back());
    requests.pop_back();
}

/// Sends the answers that are due, as long as the ring has `room` for a payload. Returns when to go on; ~0: when
/// something happens.
u64 StorageDevice::State::send_due(Channel& channel, u64 now, usize room) {
    const auto found = answers.find(&channel);
    if (found == answers.end() || gone) {
        return ~u64{0};
    }
    DelayQueue<Request*>& queue = found->second;
    while (queue.next() <= now) {
        if (!channel.room(room)) {
            return ~u64{0}; // the guest signals, or the ring is polled
        }
        Request& r = **queue.pop(now);
        answer(channel, r.packet, r.request, r.result, wire::SrbStatus::success, nt_success);
        release(r);
    }
    return queue.next();
}

/// Waits for the transfers of a channel and a LUN, or of all. False: some have not ended in time.
bool StorageDevice::State::drain(const Channel* channel, std::optional<u8> lun) {
    const bool done = config.transfers->drain(
        [&](const Transfer& transfer) {
            if (transfer.ended != &State::on_end) {
                return false; // another kind of device's
            }
            const Request& r = static_cast<const Request&>(transfer);
            return r.state == this && (channel == nullptr || r.channel == channel) && (!lun || r.lun == *lun);
        },
        drain_limit);
    if (!done) {
        bus->judge().note("%s: transfers have not ended within %llu s", name.c_str(),
                          static_cast<unsigned long long>(drain_limit / 1'000'000'000));
    }
    return done;
}

/// The channel's requests will have no answer.
void StorageDevice::State::abandon(const Channel* channel) {
    std::vector<Request*> ended_ones;
    for (auto& request : requests) {
        if (request->channel == channel) {
            request->channel = nullptr;
            if (request->over) {
                ended_ones.push_back(request.get());
            }
        }
    }
    for (Request* const one : ended_ones) {
        release(*one);
    }
    std::erase_if(answers, [&](const auto& entry) { return entry.first == channel; });
}

// ---- packets ----

void StorageDevice::State::notify(Channel& channel) {
    const auto send_operation = [&](wire::Operation operation) {
        wire::Packet packet{};
        packet.header.operation = operation;
        const auto bytes =
            std::as_bytes(std::span(&packet, 1)).first(wire::packet_bytes(static_cast<wire::Version>(version)));
        return channel.send(PacketType::data_inband, 0, 0, bytes);
    };
    if (enumerate && version >= 0x0402) {
        enumerate = !send_operation(wire::Operation::enumerate_bus);
    }
    if (remove) {
        remove = !send_operation(wire::Operation::remove_device);
    }
}

void StorageDevice::State::complete(Channel& channel, const Packet& packet, wire::Packet& answer, u32 status) {
    answer.header = {wire::Operation::complete_io, 0, status};
    // As long as the request was: before a version is negotiated there is no other length to use.
    const auto bytes = std::as_bytes(std::span(&answer, 1)).first(std::min(packet.payload.size(), packet_limit));
    if (packet.wants_completion()) {
        static_cast<void>(channel.send(PacketType::completion, 0, packet.transaction, bytes));
    }
}

void StorageDevice::State::handle(Channel& channel, const Packet& packet, StorageDevice& device) {
    if (gone) {
        return;
    }
    if (packet.type != PacketType::data_inband && packet.type != PacketType::data_gpa_direct) {
        bus->judge().violation("channel %u (%s): a packet of type %u; expected data", channel.relid(), name.c_str(),
                               static_cast<u32>(packet.type));
        return;
    }
    if (packet.payload.size() < 48) { // header and the short SRB, common to all versions
        bus->judge().violation("channel %u (%s): a packet of %zu bytes; expected 48 or 64", channel.relid(),
                               name.c_str(), packet.payload.size());
        wire::Packet answer{};
        complete(channel, packet, answer, nt_invalid_parameter);
        return;
    }
    if (!packet.wants_completion()) {
        bus->judge().violation("channel %u (%s): a request without the completion flag", channel.relid(), name.c_str());
    }
    wire::Packet request{};
    std::memcpy(&request, packet.payload.data(), std::min(packet.payload.size(), packet_limit));
    if (request.header.operation == wire::Operation::execute_srb && phase == Phase::ready) [[likely]] {
        execute(channel, packet, request, device);
    } else {
        negotiate(channel, packet, request, device);
    }
}

void StorageDevice::State::negotiate(Channel& channel, const Packet& packet, const wire::Packet& request,
                                     StorageDevice& device) {
    using wire::Operation;
    const Operation operation = request.header.operation;
    wire::Packet answer = request;
    std::byte* const body = reinterpret_cast<std::byte*>(&answer.srb);
    u32 status = nt_success;
    const auto expect = [&](bool good) {
        if (!good) {
            bus->judge().violation("channel %u (%s): %s (%u) in a state that does not allow it", channel.relid(),
                                   name.c_str(), std::string(wire::name(operation)).c_str(),
                                   static_cast<u32>(operation));
            status = nt_invalid_state;
        }
        return good;
    };
    const bool first = channel.index() == 0;
    switch (operation) {
    case Operation::begin_initialization:
        if (expect(first && phase == Phase::begin)) {
            phase = Phase::version;
        }
        break;
    case Operation::query_protocol_version:
        if (expect(first && phase == Phase::version)) {
            const u16 asked = read_as<u16>(std::as_bytes(std::span(&answer.srb, 1)), 0);
            if (bus->faults().injects(Fault::no_storage_version)) {
                return;
            }
            if (bus->faults().fault() == Fault::refuse_storage_versions ||
                std::find(config.versions.begin(), config.versions.end(), asked) == config.versions.end()) {
                status = nt_revision_mismatch;
            } else {
                version = asked;
                phase = Phase::properties;
                bus->judge().note("%s: storage protocol %u.%u", name.c_str(), asked >> 8, asked & 0xff);
            }
        }
        break;
    case Operation::query_properties:
        if (expect(first && phase == Phase::properties)) {
            const bool multi = version >= 0x0501 && config.sub_channels != 0;
            const wire::ChannelProperties properties{.reserved = 0,
                                                     .max_sub_channels = multi ? config.sub_channels : u16{0},
                                                     .reserved1 = 0,
                                                     .flags = multi ? wire::properties_multi_channel : 0,
                                                     .max_transfer_bytes = config.maximum_transfer,
                                                     .reserved2 = 0};
            answer.srb = {};
            std::memcpy(body, &properties, sizeof properties);
            phase = Phase::ending;
        }
        break;
    case Operation::end_initialization:
        if (expect(first && phase == Phase::ending)) {
            phase = Phase::ready;
            enumerate = false; // the guest's next scan sees all earlier changes
        }
        break;
    case Operation::create_sub_channels:
        if (expect(first && (phase == Phase::ending || phase == Phase::ready) && version >= 0x0501)) {
            const u16 count = read_as<u16>(std::as_bytes(std::span(&answer.srb, 1)), 0);
            if (count == 0 || count > config.sub_channels) {
                bus->judge().violation("channel %u (%s): CREATE_SUB_CHANNELS for %u; at most %u were offered",
                                       channel.relid(), name.c_str(), count, config.sub_channels);
                status = nt_invalid_parameter;
            } else {
                complete(channel, packet, answer, nt_success);
                bus->offer_sub_channels(device, count);
                return;
            }
        }
        break;
    case Operation::reset_lun:
    case Operation::reset_adapter:
    case Operation::reset_bus:
        if (expect(phase == Phase::ready)) {
            if (config.transfers != nullptr && !drain(nullptr, std::nullopt)) {
                status = nt_io_error;
                break;
            }
            for (auto& [other, queue] : answers) { // before the reset's own answer
                queue.hasten();
                if (other != &channel) {
                    bus->kick(*other);
                }
            }
            // Three times one packet: there remains room for the reset's answer, headers included.
            static_cast<void>(send_due(channel, 0, 3 * packet_limit));
            for (auto& lun : luns) {
                if (lun) {
                    lun->set_unit_attention(0x29, 0x02); // SCSI bus reset occurred
                }
            }
        }
        break;
    case Operation::execute_srb: static_cast<void>(expect(false)); break;
    default:
        bus->judge().violation("channel %u (%s): operation %u, which a guest does not send", channel.relid(),
                               name.c_str(), static_cast<u32>(operation));
        status = nt_invalid_request;
        break;
    }
    complete(channel, packet, answer, status);
}

ScsiDisk* StorageDevice::State::find(const wire::ScsiRequest& srb) const {
    const bool here = ide ? srb.target_id == target && (srb.path_id == 0 || srb.path_id == path)
                          : srb.target_id == 0 && srb.path_id == 0;
    return here && srb.lun < lun_limit ? luns[srb.lun].get() : nullptr;
}

/// Resolves the guest pages of a request's data. Returns what is wrong with them, or nullptr.
const char* StorageDevice::State::gather(const Packet& packet, u32 bytes) {
    data.clear();
    if (bytes == 0) {
        return nullptr;
    }
    if (bytes > config.maximum_transfer) {
        return "more data than the channel's properties allow";
    }
    if (packet.type != PacketType::data_gpa_direct || packet.range_count != 1) {
        return "data without exactly one range of pages";
    }
    if (packet.ranges.size() < 16) {
        return "a range of pages without pages";
    }
    const u32 range_bytes = read_as<u32>(packet.ranges, 0);
    const u32 offset = read_as<u32>(packet.ranges, 4);
    if (offset >= 4096 || range_bytes < bytes) {
        return "a range that begins after its first page, or is shorter than the transfer";
    }
    const usize pages = (usize{offset} + range_bytes + 4095) / 4096;
    if (packet.ranges.size() - 8 < pages * 8) {
        return "a range with fewer pages than its length needs";
    }
    usize left = bytes;
    for (usize i = 0; left != 0; ++i) {
        const usize begin = i == 0 ? offset : 0;
        const usize now = std::min(left, 4096 - begin);
        std::byte* page = bus->memory().page(read_as<u64>(packet.ranges, 8 + i * 8));
        if (page == nullptr) {
            return "a page that is not memory";
        }
        data.add(std::span(page + begin, now));
        left -= now;
    }
    return nullptr;
}

void StorageDevice::State::execute(Channel& channel, const Packet& packet, const wire::Packet& request,
                                   StorageDevice& device) {
    const wire::ScsiRequest& srb = request.srb;
    FaultPlan& faults = bus->faults();
    Counters& counters = bus->counters();
    ++counters.requests;
    if (faults.injects(Fault::no_answer)) {
        return;
    }
    if (faults.injects(Fault::rescind_in_flight)) {
        gone = true;
        bus->rescind(device);
        return;
    }
    const auto known = static_cast<wire::Version>(version);
    if (packet.payload.size() < wire::packet_bytes(known) || srb.length != wire::srb_bytes(known)) {
        bus->judge().violation("channel %u (%s): an SRB of %u bytes in a packet of %zu; version %u.%u has %u",
                               channel.relid(), name.c_str(), srb.length, packet.payload.size(), version >> 8,
                               version & 0xff, wire::srb_bytes(known));
    }
    const ScsiDisk* disk = find(srb);
    if (disk != nullptr && disk->config().iops != 0 && reaches_medium(static_cast<u8>(srb.payload[0]))) [[unlikely]] {
        hold(channel, packet, disk->config());
        return;
    }
    perform(channel, packet, request);
}

/// The disk serves one request at a time, each in 1/iops seconds.
void StorageDevice::State::hold(Channel& channel, const Packet& packet, const LunConfig& disk) {
    u64& done = free_at[disk.lun];
    done = std::max(done, bus->now()) + 1'000'000'000 / disk.iops;
    const auto entry = held.emplace(done, Held{&channel,
                                               packet,
                                               {packet.ranges.begin(), packet.ranges.end()},
                                               {packet.payload.begin(), packet.payload.end()}});
    Held& kept = entry->second;
    kept.packet.ranges = kept.ranges;
    kept.packet.payload = kept.payload;
}

void StorageDevice::State::perform(Channel& channel, const Packet& packet, const wire::Packet& request) {
    const wire::ScsiRequest& srb = request.srb;
    Counters& counters = bus->counters();
    u32 status = nt_success;
    ScsiResult result;
    auto srb_status = wire::SrbStatus::success;
    std::array<u8, 16> cdb;
    std::memcpy(cdb.data(), srb.payload.data(), cdb.size());
    const u8 opcode = cdb[0];
    const char* wrong =
        srb.cdb_length > wire::cdb_bytes ? "a CDB longer than 16 bytes" : gather(packet, srb.data_transfer_length);
    const bool writes = opcode == 0x0a || opcode == 0x2a || opcode == 0x8a;
    const bool reads = opcode == 0x08 || opcode == 0x28 || opcode == 0x88;
    if (wrong == nullptr &&
        ((writes && srb.data_in != wire::Direction::out) || (reads && srb.data_in != wire::Direction::in))) {
        wrong = "a direction that is not the command's";
    }
    if (wrong != nullptr) {
        bus->judge().violation("channel %u (%s): command 0x%02x with %s (%u bytes)", channel.relid(), name.c_str(),
                               opcode, wrong, srb.data_transfer_length);
        srb_status = wire::SrbStatus::invalid_request;
        status = nt_invalid_parameter;
    } else if (opcode == opcode_report_luns) {
        std::array<u8, lun_limit> list;
        usize count = 0;
        for (u8 lun = 0; lun < lun_limit; ++lun) {
            wire::ScsiRequest at = srb;
            at.lun = lun;
            if (find(at) != nullptr) {
                list[count++] = lun;
            }
        }
        ++counters.opcodes[opcode], ++counters.others;
        result = report_luns(std::span(list).first(count), data);
    } else if (ScsiDisk* disk = find(srb)) {
        if (config.transfers != nullptr && reaches_medium(opcode)) {
            later(channel, packet, request, *disk, cdb);
            return;
        }
        result = disk->execute(cdb, data);
    } else if (opcode == opcode_inquiry) {
        ++counters.opcodes[opcode], ++counters.others;
        result = absent_inquiry(cdb, data);
    } else {
        result.status = ScsiStatus::check_condition;
        srb_status = wire::SrbStatus::invalid_lun;
        status = nt_does_not_exist;
    }
    answer(channel, packet, request, result, srb_status, status);
}

void StorageDevice::State::answer(Channel& channel, const Packet& packet, const wire::Packet& request,
                                  const ScsiResult& result, wire::SrbStatus srb_status, u32 status) {
    const wire::ScsiRequest& srb = request.srb;
    FaultPlan& faults = bus->faults();
    wire::Packet answer = request;
    wire::ScsiRequest& reply = answer.srb;
    reply.scsi_status = static_cast<u8>(result.status);
    reply.data_transfer_length = static_cast<u32>(result.transferred);
    reply.sense_info_length = 0;
    if (result.sense) {
        srb_status = wire::SrbStatus::error;
        status = nt_io_error;
    } else if (result.overrun) {
        srb_status = wire::SrbStatus::data_overrun;
        status = nt_buffer_overflow;
    }
    reply.srb_status = static_cast<u8>(srb_status);
    if (result.sense && srb.sense_info_length != 0 &&
        (version < 0x0501 || (srb.srb_flags & srb_disable_autosense) == 0)) {
        const auto sense = result.sense->bytes();
        const usize bytes = std::min<usize>(sense.size(), srb.sense_info_length);
        reply.payload = {};
        std::copy_n(sense.begin(), bytes, reply.payload.begin());
        reply.sense_info_length = static_cast<u8>(bytes);
        reply.srb_status |= wire::srb_autosense_valid;
    }
    bus->counters().errors += srb_status != wire::SrbStatus::success;
    answer.header = {wire::Operation::complete_io, 0, status};
    const auto bytes = std::as_bytes(std::span(&answer, 1)).first(std::min(packet.payload.size(), packet_limit));
    if (!packet.wants_completion()) {
        return;
    }
    if (faults.fault() == Fault::none) [[likely]] {
        static_cast<void>(channel.send(PacketType::completion, 0, packet.transaction, bytes));
        return;
    }
    if (faults.injects(Fault::completion_too_long)) {
        reply.data_transfer_length = srb.data_transfer_length + 4096;
    }
    static_cast<void>(channel.send(PacketType::completion, 0, packet.transaction, bytes, true));
    if (faults.injects(Fault::repeated_completion)) {
        static_cast<void>(channel.send(PacketType::completion, 0, packet.transaction, bytes));
    } else if (faults.injects(Fault::early_completion)) {
        early = packet.transaction + 1;
    }
}

} // namespace fl::host
