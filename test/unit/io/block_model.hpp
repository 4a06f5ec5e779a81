// A model transport that can do everything that io.block_queue allows, and its rig. Include after unit/io/support.hpp
// and unit/io/block_conformance.hpp.
#pragma once
#include "gtest_macros.hpp"
import test.gtest;
import host.std;

namespace fl::test::conformance {
using io::Op;
using io::Status;

struct ModelConfig {
    io::Fence fence = io::Fence::done;
    io::Recovery::Kind recovery = io::Recovery::Kind::give_up;
    io::Retry retry = io::Retry::alone;
    bool heeds = true;        // reacts to the request to complete everything
    bool may_give_up = false; // the queue may abandon requests without room instead of closing
    u32 room = 6;             // capacity in commands, for each lane
    u32 lanes = 1;
};

/// Sectors never written hold their own number in every 8 bytes.
class SparseMedium {
  public:
    void read(u64 lba, u32 bytes, std::byte* into) const {
        for (u32 done = 0; done < bytes; done += 512, ++lba) {
            if (const auto found = written_.find(lba); found != written_.end()) {
                std::memcpy(into + done, found->second.data(), 512);
                continue;
            }
            for (u32 i = 0; i < 512; i += 8) {
                std::memcpy(into + done + i, &lba, 8);
            }
        }
    }
    void write(u64 lba, u32 bytes, const std::byte* from) {
        for (u32 done = 0; done < bytes; done += 512, ++lba) {
            std::memcpy(written_[lba].data(), from + done, 512);
        }
    }

  private:
    std::map<u64, std::array<std::byte, 512>> written_;
};

struct ModelDevice;

/// What the lanes of one device have in common.
struct ModelHost {
    ModelConfig config;
    SparseMedium medium;
    std::vector<ModelDevice*> lanes;
    std::array<io::Listener, 4> queues; // of the lanes
    u32 late_writes = 0;                // of all lanes
    std::optional<Status> closed;       // another queue of the device has closed it, with this status
};

/// A lane of the device: holds commands until the test completes them.
struct ModelDevice {
    explicit ModelDevice(ModelHost& host) : host(host), config(host.config), medium(host.medium) {}
    struct Entry {
        u64 id = 0;
        Op op = Op::read;
        u64 lba = 0;
        u32 bytes = 0;
        std::vector<DmaSpan> spans;
        bool reaches = true;
        bool acts = true; // a write still reaches the medium
        std::vector<std::byte> copy;
        io::Exchange* exchange = nullptr;
    };
    ModelHost& host;
    ModelConfig& config;
    SparseMedium& medium;
    std::vector<Entry> staged;
    std::vector<Entry> commands;
    std::deque<io::Completion> answers;
    std::vector<u64> past;
    u32 events = 0;
    u32 arms = 0;
    bool asked = false;
    Instant ready_at = 0;       // in reset until then
    std::optional<Fault> fault; // what the next such call finds
    bool takes_resent = true;   // false: there is no room for a command that was sent before
    bool takes_exchanges = true;
    u64 counted_under_way = 0; // by the lane's last look at its commands
    u64 counted_answered = 0;

    void move(Entry& e) {
        u64 lba = e.lba;
        if (e.op >= Op::discard && e.acts) {
            medium.write(lba, e.bytes, std::vector<std::byte>(e.bytes).data());
        }
        if (e.op == Op::write && e.acts && !e.reaches) {
            medium.write(lba, static_cast<u32>(e.copy.size()), e.copy.data());
        }
        for (const DmaSpan& span : e.spans) {
            if (e.op == Op::write && e.acts && e.reaches) {
                medium.write(lba, span.size, span.data);
            } else if (e.op == Op::read && e.reaches) {
                medium.read(lba, span.size, span.data);
            }
            lba += span.size / 512;
        }
    }
    void answer(usize i, Status how, io::Retry retry) {
        const InFake scope;
        Entry e = std::move(commands[i]);
        commands.erase(commands.begin() + static_cast<std::ptrdiff_t>(i));
        if (how == Status::ok && retry == io::Retry::none) {
            move(e);
        }
        past.push_back(e.id);
        answers.push_back({e.id, how, retry});
        ++events;
    }
    bool find(u64 id, Entry*& found) {
        for (auto* list : {&staged, &commands}) {
            for (Entry& e : *list) {
                if (e.id == id) {
                    found = &e;
                    return true;
                }
            }
        }
        return false;
    }
    bool reachable(DmaSpan span) const {
        for (const auto* list : {&staged, &commands}) {
            for (const Entry& e : *list) {
                for (const DmaSpan& s : e.spans) {
                    if (e.reaches && s.bus < span.bus + span.size && span.bus < s.bus + s.size) {
                        return true;
                    }
                }
            }
        }
        return false;
    }
    /// Commands, without exchanges, as indices.
    std::vector<usize> transfers() const {
        std::vector<usize> found;
        for (usize i = 0; i < commands.size(); ++i) {
            if (commands[i].exchange == nullptr) {
                found.push_back(i);
            }
        }
        return found;
    }
    /// The oldest of them.
    std::optional<usize> transfer() const {
        for (usize i = 0; i < commands.size(); ++i) {
            if (commands[i].exchange == nullptr) {
                return i;
            }
        }
        return std::nullopt;
    }
    void stop() {
        staged.clear();
        commands.clear();
        answers.clear();
    }
};

template <bool gather>
class ModelDisk;

template <bool gather>
class ModelTransport : public io::TransportDefaults {
  public:
    using Disk = ModelDisk<gather>;
    using Command = io::Command<ModelTransport>;
    struct Wire {
        u64 id = 0;
        bool taken = false;
    };
    static constexpr std::string_view driver = "model";
    static constexpr u32 max_commands = 10;
    static constexpr u32 reserved_commands = 2;
    static constexpr bool gathers = gather;
    static constexpr u32 max_idle_events = 16;
    static constexpr u32 part_bytes = 16 * 1024;

    ModelTransport(io::Executor& executor, ModelDevice& device) : executor_(executor), device_(device) {}
    void use(io::CommandTable<ModelTransport>& commands) { commands_ = &commands; }
    io::Fit prepare(Command& c) {
        if (device_.staged.size() + device_.commands.size() + device_.answers.size() >= device_.config.room ||
            executor_.now() < device_.ready_at) {
            return io::Fit::full;
        }
        c.bytes = std::min(c.bytes, part_bytes);
        c.wire.taken = true;
        return io::Fit::ok;
    }
    bool join(Command& c, const io::Request& next) {
        return c.op <= Op::write && c.bytes + next.buffer.size <= part_bytes;
    }
    io::SendResult send(Command& c, u64 id) {
        const InFake scope;
        if (device_.fault == Fault::send) {
            return io::SendResult::broken;
        }
        if (executor_.now() < device_.ready_at) {
            EXPECT_TRUE(c.retries > 0 || c.exchange != nullptr) << "sent to a device in reset";
            return io::SendResult::full;
        }
        if ((c.retries != 0 && !device_.takes_resent) || (c.exchange != nullptr && !device_.takes_exchanges)) {
            return io::SendResult::full;
        }
        if (c.exchange != nullptr) {
            c.wire = {id, true};
            device_.staged.push_back({.id = id, .exchange = c.exchange});
            return io::SendResult::sent;
        }
        EXPECT_TRUE(c.wire.taken) << "sent without room";
        c.wire.id = id;
        ModelDevice::Entry e{id, c.op, c.lba, c.bytes, {}, true, true, {}};
        u32 bytes = 0;
        for (io::Request* r = c.first; r != nullptr && c.op <= Op::write; r = c.gathered ? r->link : nullptr) {
            e.spans.push_back(c.gathered ? r->buffer : c.data());
            bytes += e.spans.back().size;
        }
        EXPECT_TRUE(c.op > Op::write || bytes == c.bytes) << "the command is not its requests";
        device_.staged.push_back(std::move(e));
        return io::SendResult::sent;
    }
    Result<void> publish(io::Counters& counters) {
        const InFake scope;
        if (device_.fault == Fault::publish) {
            return fault();
        }
        counters.notifications += device_.staged.empty() ? 0 : 1;
        for (auto& e : device_.staged) {
            device_.commands.push_back(std::move(e));
        }
        device_.staged.clear();
        return {};
    }
    io::Next next(io::Completion& completion) {
        if (device_.fault == Fault::next) {
            return io::Next::broken;
        }
        if (device_.answers.empty()) {
            return io::Next::none;
        }
        completion = device_.answers.front();
        device_.answers.pop_front();
        const Command* command = commands_->find(completion.id);
        return command == nullptr || command->delayed ? io::Next::broken : io::Next::one;
    }
    u32 events() const { return device_.events; }
    Result<void> release(io::Counters&) {
        if (device_.fault == Fault::release) {
            return fault();
        }
        return {};
    }
    Error fault() const { return {Code::protocol, "the test has damaged the model's queue"}; }
    Result<bool> arm() {
        ++device_.arms;
        if (device_.fault == Fault::arm) {
            return Error{Code::io, "the test has damaged the model's events"};
        }
        return !device_.answers.empty();
    }
    bool finish(Command& c, Status) {
        EXPECT_TRUE(std::exchange(c.wire.taken, false)) << "finished twice, or never begun";
        return true;
    }
    io::Fence fence(Command& c) {
        const InFake scope;
        EXPECT_FALSE(c.delayed) << "the device does not have it";
        if (device_.config.fence == io::Fence::stopped) {
            device_.stop();
            begin_reset();
            return io::Fence::stopped;
        }
        if (c.gathered) {
            return io::Fence::reachable;
        }
        ModelDevice::Entry* e = nullptr;
        if (device_.find(c.wire.id, e) && device_.config.fence != io::Fence::reachable) {
            for (const DmaSpan& span : e->spans) {
                e->copy.insert(e->copy.end(), span.data, span.data + span.size);
            }
            e->reaches = false;
            e->acts = device_.config.fence == io::Fence::effect;
        }
        return device_.config.fence;
    }
    io::Recovery recover(const Command&, io::OldestWait::Finding, std::string_view) {
        using Kind = io::Recovery::Kind;
        switch (device_.config.recovery) {
        case Kind::stopped:
            device_.stop();
            begin_reset();
            return {.kind = Kind::stopped, .why = std::nullopt};
        case Kind::reset_requested:
            device_.asked = device_.config.heeds;
            return {.kind = Kind::reset_requested, .why = std::nullopt};
        case Kind::none: // the interrupt was lost
            if (const auto next = device_.transfer()) {
                device_.answer(*next, Status::ok, io::Retry::none);
            }
            return {.kind = Kind::none, .why = std::nullopt};
        default: return {.kind = device_.config.recovery, .why = std::nullopt};
        }
    }
    std::optional<Error> reset_ineffective(bool) { return Error{Code::timed_out, "asked in vain"}; }
    io::Stuck stuck(std::string_view names) {
        if (device_.config.may_give_up) {
            return {io::Stuck::Kind::give_up, Error{Code::timed_out, "no room"}};
        }
        return TransportDefaults::stuck(names);
    }
    void count_late_writes(i32 change) {
        device_.host.late_writes += static_cast<u32>(change);
        if (device_.host.late_writes == 0) {
            for (io::Listener& each : device_.host.queues) {
                each.raise();
            }
        }
    }
    bool late_writes_elsewhere(u32 own) const { return device_.host.late_writes != own; }
    io::OldestWait::Seen seen(io::OldestWait::Seen own) {
        device_.counted_under_way = own.in_flight;
        device_.counted_answered = own.answered;
        io::OldestWait::Seen all{.oldest = own.oldest, .in_flight = 0, .answered = 0};
        for (const ModelDevice* lane : device_.host.lanes) {
            all.in_flight += lane->counted_under_way;
            all.answered += lane->counted_answered;
        }
        return all;
    }
    std::optional<Status> closed_by_peer() const { return device_.host.closed; }
    bool closing(Status status) {
        if (device_.host.closed) {
            return false;
        }
        device_.host.closed = status;
        for (io::Listener& other : device_.host.queues) {
            other.raise();
        }
        return true;
    }
    void closed(bool) { device_.counted_under_way = 0; }
    Result<void> tick(Instant, bool) {
        if (device_.fault == Fault::tick) {
            return Error{Code::device_gone, "the test has removed the model"};
        }
        for (auto next = device_.transfer(); device_.asked && next; next = device_.transfer()) {
            device_.answer(*next, Status::timed_out, io::Retry::none);
        }
        device_.asked = false;
        return {};
    }

  private:
    void begin_reset() { device_.ready_at = executor_.now() + 25'000'000; }
    io::Executor& executor_;
    ModelDevice& device_;
    io::CommandTable<ModelTransport>* commands_ = nullptr;
};

template <bool gather>
class ModelDisk final : public io::QueueDisk<ModelTransport<gather>> {
  public:
    ModelDisk(io::Executor& executor, io::BlockQueue<ModelTransport<gather>>& queue)
        : io::QueueDisk<ModelTransport<gather>>(executor, queue) {
        this->identity_.name = FixedText<16>("model0");
        this->set_geometry({.sectors = Rig::sectors, .flush = true, .discard = true, .write_zeroes = true});
        queue.add(*this);
    }
};

template <bool gather>
class ModelRig final : public Rig {
  public:
    using Transport = ModelTransport<gather>;
    using Queue = io::BlockQueue<Transport>;

    static Facts facts(const ModelConfig& config) {
        return {.lanes = config.lanes,
                .capacity = std::min(config.room, Transport::max_commands - Transport::reserved_commands),
                .part_bytes = Transport::part_bytes,
                .discard_bytes = Transport::part_bytes,
                .zeroes_bytes = Transport::part_bytes,
                .discards = true,
                .zeroes = true,
                .gathers = gather,
                .answers_after_all = config.recovery == io::Recovery::Kind::none,
                .retries = true,
                .ids = true,
                .elsewhere = true,
                .exchanges = Transport::reserved_commands,
                .faults = {Fault::send, Fault::publish, Fault::next, Fault::release, Fault::arm, Fault::tick},
                .timeout = timeout(config),
                .timeouts = 16,
                .answers = {Status::ok, Status::io_error, Status::not_supported, Status::timed_out}};
    }
    static Nanoseconds timeout(const ModelConfig& config) {
        return config.lanes * 200'000'000; // a turn lasts a tick for each lane
    }
    explicit ModelRig(const ModelConfig& config) : host_{.config = config} {
        for (u32 i = 0; i < config.lanes; ++i) {
            enter(i);
            Lane& lane = *lanes_.emplace_back(std::make_unique<Lane>(clock_, i, host_));
            host_.lanes.push_back(&lane.device);
            host_.queues[i].set(lane.executor, lane.queue);
            lane.device.answers.resize(64);
            lane.device.answers.clear();
            lane.queue.open(timeout(config));
        }
        enter(0);
    }
    ~ModelRig() {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            host_.queues[i].clear();
            lanes_[i]->queue.stop();
        }
        enter(0);
    }
    io::BlockDevice& disk(u32 lane) override { return lanes_[lane]->disk; }
    io::Executor& executor(u32 lane = 0) { return lanes_[lane]->executor; }
    Queue* queue(u32 lane) override { return &lanes_[lane]->queue; }
    ModelDevice& device(u32 lane = 0) { return lanes_[lane]->device; }

    void enter(u32 lane) override { set_this_processor(lane); }
    void turn() override {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            lanes_[i]->executor.turn();
        }
        enter(0);
    }
    Instant now() override { return executor().now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (u32 lane = 0; lane < lanes_.size(); ++lane) {
            for (const usize i : device(lane).transfers()) {
                const auto& e = device(lane).commands[i];
                held.push_back({e.op, e.lba, e.bytes, lane});
            }
        }
        return held;
    }
    void answer(usize index, Status how) override { answer(index, how, io::Retry::none); }
    void answer_again(usize index) override { answer(index, Status::io_error, host_.config.retry); }
    void answer_wrongly(u32 kind) override {
        ModelDevice& d = device();
        if (kind == 2) {
            d.answers.push_back({d.commands[0].id});
            d.answer(0, Status::ok, io::Retry::none);
        } else {
            d.answers.push_back({kind == 0 ? 0x1234567 : d.past.front()});
        }
        executor().wake();
    }
    void event(u32 lane) override {
        ++device(lane).events;
        executor(lane).wake();
    }
    Injected inject(u32 lane, Fault fault) override {
        device(lane).fault = fault;
        switch (fault) {
        case Fault::arm: return {"the test has damaged the model's events", Status::device_gone};
        case Fault::tick: return {"the test has removed the model", Status::device_gone};
        default: return {"the test has damaged the model's queue", Status::protocol_error};
        }
    }
    bool reachable(DmaSpan span) override {
        return std::ranges::any_of(lanes_, [&](const auto& lane) { return lane->device.reachable(span); });
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override { host_.medium.read(lba, count * 512, into); }

    std::unique_ptr<io::Exchange> exchange(u32 lane) override { return std::make_unique<io::Exchange>(executor(lane)); }
    u32 held_exchanges(u32 lane) override {
        return static_cast<u32>(device(lane).commands.size() - device(lane).transfers().size());
    }
    void answer_exchange(u32 lane) override {
        ModelDevice& d = device(lane);
        const auto first = std::ranges::find_if(d.commands, [](const auto& e) { return e.exchange != nullptr; });
        d.answer(static_cast<usize>(first - d.commands.begin()), Status::ok, io::Retry::none);
        executor(lane).wake();
    }

    void close(u32 lane, Status status) override {
        queue(lane)->close(status, {Code::device_gone, "the test closes it"});
    }
    void close_elsewhere(Status status) override {
        host_.closed = status;
        for (io::Listener& each : host_.queues) {
            each.raise();
        }
    }
    void stop(u32 lane) override { queue(lane)->stop(); }
    void reclaim(u32 lane) override {
        device(lane).stop();
        queue(lane)->reclaim();
    }
    bool is_open(u32 lane) override { return queue(lane)->is_open(); }
    u32 in_flight(u32 lane) override { return queue(lane)->in_flight(); }

  private:
    struct Lane {
        Lane(test::FakeMachine& clock, u32 number, ModelHost& host)
            : executor(clock.platform(), number), device(host), queue(executor, executor, device),
              disk(executor, queue) {}
        io::Executor executor;
        ModelDevice device;
        Queue queue;
        ModelDisk<gather> disk;
    };
    void answer(usize index, Status how, io::Retry retry) {
        for (u32 lane = 0; lane < lanes_.size(); ++lane) {
            const auto places = device(lane).transfers();
            if (index < places.size()) {
                device(lane).answer(places[index], how, retry);
                executor(lane).wake();
                return;
            }
            index -= places.size();
        }
    }

    test::FakeMachine clock_; // of all lanes
    test::HeapDma dma_;
    ModelHost host_;
    std::vector<std::unique_ptr<Lane>> lanes_;
};

/// One of the two kinds of model, for a case that needs no more of it than a Rig.
inline Make model(const char* name, const ModelConfig& config, bool gather = false) {
    if (gather) {
        return {name, ModelRig<true>::facts(config), [config] { return std::make_unique<ModelRig<true>>(config); }};
    }
    return {name, ModelRig<false>::facts(config), [config] { return std::make_unique<ModelRig<false>>(config); }};
}

} // namespace fl::test::conformance
