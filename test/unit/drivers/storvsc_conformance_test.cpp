// The VMBus storage channel in the conformance suite: a host that completes everything when the bus is reset, and one
// that does not.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.processor;
import io.executor;
import io.block;
import io.block_queue;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/storvsc_fake.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;

class StorvscRig final : public Rig {
  public:
    using Transport = drivers::storvsc::Transport;
    using Version = drivers::storvsc::Version;

    static Facts facts(u32 lanes) {
        return {.lanes = lanes,
                .capacity = Transport::max_commands - Transport::reserved_commands,
                .part_bytes = max_transfer,
                .discard_bytes = max_transfer,
                .discards = true,
                .retries = true,
                .ids = true,
                .elsewhere = true,
                .exchanges = Transport::reserved_commands,
                .faults = {Fault::send, Fault::next},
                .timeout = timeout_of(lanes),
                .timeouts = 4};
    }
    StorvscRig(Version version, bool resets, u32 lanes) : version_(version), resets_(resets), lane_count_(lanes) {
        hv::hyperv::Gate gate;
        gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
        EXPECT_TRUE(hypercalls_.install(gate, dma_));
        for (u32 i = 0; i < lanes; ++i) {
            enter(i);
            lanes_.push_back(std::make_unique<Lane>(clock_, i, shared_));
            start(*lanes_[i], i);
        }
        enter(0);
        clock_.on_idle_context = this;
        clock_.on_idle = [](void* self) { static_cast<StorvscRig*>(self)->look(); };
    }
    ~StorvscRig() {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            stop(i);
            reclaim(i);
            lanes_[i]->disk.reset();
            lanes_[i]->channel.detach().reset();
        }
        enter(0);
    }
    io::BlockDevice& disk(u32 lane) override { return *lanes_[lane]->disk; }
    io::QueueCore* queue(u32 lane) override { return &lanes_[lane]->queue; }
    void enter(u32 lane) override { set_this_processor(lane); }
    void turn() override {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            lanes_[i]->executor.turn();
        }
        enter(0);
        look(); // a turn with work left does not sleep
    }
    Instant now() override { return lanes_[0]->executor.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (u32 i = 0; i < lanes_.size(); ++i) {
            for (const usize at : commands(i)) {
                const fake::Command& c = lanes_[i]->host.commands[at];
                if (c.cdb(0) == synchronize_cache_10 || c.cdb(0) == synchronize_cache_16) {
                    held.push_back({.op = io::Op::flush, .lane = i});
                } else if (c.cdb(0) == unmap) {
                    const auto list = std::as_bytes(std::span(c.data[0].first, c.data[0].second));
                    const auto be = [&](usize from, usize n) {
                        u64 value = 0;
                        for (usize k = from; k < from + n; ++k) {
                            value = value << 8 | std::to_integer<u8>(list[k]);
                        }
                        return value;
                    };
                    held.push_back({io::Op::discard, be(8, 8), static_cast<u32>(be(16, 4) * 512), i});
                } else {
                    const bool is_long = c.cdb(0) >= 0x80;
                    held.push_back({(c.cdb(0) & 0x0f) == 8 ? io::Op::read : io::Op::write,
                                    is_long ? c.be(2, 8) : c.be(2, 4), c.bytes(), i});
                }
            }
        }
        return held;
    }
    void answer(usize index, Status how) override {
        awake_ = true;
        fake::Reply reply;
        if (how != Status::ok) { // MEDIUM ERROR, unrecovered read error
            reply.srb_status = 4;
            reply.scsi_status = 2;
            reply.sense = std::string("\x70\0\x03\0\0\0\0\x0a\0\0\0\0\x11\0\0\0\0\0", 18);
        }
        const auto [lane, at] = place(index);
        send_reply(lane, at, reply);
    }
    void answer_again(usize index) override { // BUSY
        const auto [lane, at] = place(index);
        send_reply(lane, at, {.srb_status = 4, .scsi_status = 8});
    }
    void answer_wrongly(u32 kind) override {
        const usize first = commands(0)[0];
        switch (kind) {
        case 0: send_reply(0, first, {.id = 0x1234567}); break;
        case 1: send_reply(0, first, {.id = lanes_[0]->host.past_ids.front()}); break;
        default: send_reply(0, first, {.twice = true}); break;
        }
    }
    void event(u32 lane) override {
        lanes_[lane]->events.fetch_add(1);
        lanes_[lane]->executor.wake();
    }
    Injected inject(u32 lane, Fault fault) override {
        Lane& l = *lanes_[lane];
        l.damaged = true;
        if (fault == Fault::send) {
            fake::put32(l.host.out_ring() + 4, fake::StorageHost::ring_data + 8);
            return {"the host's read index is not between", Status::protocol_error};
        }
        l.host.send(99, 0, std::vector<std::byte>(64));
        return {"a packet of a type that a storage host does not send", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        for (const auto& lane : lanes_) {
            take(*lane); // the host may take it at any time
            for (const fake::Command& c : lane->host.commands) {
                for (const auto& [data, bytes] : c.data) {
                    if (span.data != nullptr && data < span.data + span.size && span.data < data + bytes) {
                        return true;
                    }
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, lanes_[0]->host.disk.data() + lba * 512, count * 512);
    }

    std::unique_ptr<io::Exchange> exchange(u32 lane) override { // TEST UNIT READY
        auto exchange = std::make_unique<drivers::storvsc::Exchange>(lanes_[lane]->executor);
        exchange->packet.header = {drivers::storvsc::Operation::execute_srb, drivers::storvsc::flag_completion, 0};
        exchange->packet.srb.length = static_cast<u16>(drivers::storvsc::srb_bytes(version_));
        exchange->packet.srb.cdb_length = 6;
        return exchange;
    }
    u32 held_exchanges(u32 lane) override { return static_cast<u32>(commands(lane, true).size()); }
    void answer_exchange(u32 lane) override { send_reply(lane, commands(lane, true)[0], {}); }

    void close(u32 lane, Status status) override {
        lanes_[lane]->queue.close(status, {Code::device_gone, "the test closes it"});
    }
    void close_elsewhere(Status status) override { shared_.close_first(status); }
    void stop(u32 lane) override { lanes_[lane]->queue.stop(); }
    void reclaim(u32 lane) override {
        take(*lanes_[lane]);
        lanes_[lane]->host.commands.clear();
        lanes_[lane]->queue.reclaim();
    }
    bool is_open(u32 lane) override { return lanes_[lane]->queue.is_open(); }
    u32 in_flight(u32 lane) override { return lanes_[lane]->queue.in_flight(); }

  private:
    static Nanoseconds timeout_of(u32 lanes) { return lanes * 200'000'000; } // a turn lasts a tick for each lane
    static constexpr u32 max_transfer = 32768;
    // [SPC-4], [SBC-3]
    static constexpr u8 test_unit_ready = 0x00;
    static constexpr u8 synchronize_cache_10 = 0x35;
    static constexpr u8 synchronize_cache_16 = 0x91;
    static constexpr u8 unmap = 0x42;

    struct Lane {
        Lane(test::FakeMachine& clock, u32 number, drivers::storvsc::Shared& shared)
            : executor(clock.platform(), number), queue(executor, channel, shared, number == 0) {}
        io::Executor executor;
        std::atomic<u32> events{0};
        hv::hyperv::Channel channel;
        fake::StorageHost host;
        DmaBuffer parameters;
        drivers::storvsc::Queue queue;
        std::optional<drivers::storvsc::Disk> disk;
        bool damaged = false; // the host does not look at the ring any more
    };
    void start(Lane& lane, u32 number) {
        auto rings = dma_.buffer(2 * fake::StorageHost::ring_size);
        lane.host.attach(rings->data());
        lane.host.packet_length = version_ >= Version::win8 ? 64 : 48;
        lane.host.medium = &lanes_[0]->host;
        hv::hyperv::Channel::Signalling signalling;
        signalling.hypercalls = &hypercalls_;
        EXPECT_TRUE(
            lane.channel.attach({}, number, std::move(*rings), fake::StorageHost::ring_size, signalling, lane.events));
        lane.queue.set_terms({version_, max_transfer});
        lane.parameters = *dma_.buffer(4096);
        lane.queue.start(lane.parameters, timeout_of(lane_count_));
        io::Geometry geometry;
        geometry.sectors = sectors;
        geometry.flush = true;
        geometry.discard = true;
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("sda");
        drivers::storvsc::Disk::Unit unit;
        unit.max_transfer = max_transfer;
        unit.max_unmap_blocks = max_transfer / 512;
        lane.disk.emplace(lane.queue, unit, geometry, identity);
        lane.disk->link(lane.executor);
    }
    static void take(Lane& lane) {
        if (!lane.damaged) {
            lane.host.take();
        }
    }
    /// Indices of a lane's commands for requests, or of those for exchanges. The others are bus resets.
    std::vector<usize> commands(u32 lane, bool exchanges = false) {
        std::vector<usize> found;
        const auto& all = lanes_[lane]->host.commands;
        for (usize i = 0; i < all.size(); ++i) {
            if (all[i].operation() == 3 && (all[i].cdb(0) == test_unit_ready) == exchanges) {
                found.push_back(i);
            }
        }
        return found;
    }
    /// The lane of held()[index], and its place among the commands of the lane's host.
    std::pair<u32, usize> place(usize index) {
        for (u32 lane = 0;; ++lane) {
            const auto found = commands(lane);
            if (index < found.size()) {
                return {lane, found[index]};
            }
            index -= found.size();
        }
    }
    void send_reply(u32 lane, usize index, const fake::Reply& reply) {
        const InFake scope;
        fake::StorageHost& host = lanes_[lane]->host;
        const u64 wanted = host.signals_wanted;
        host.reply_override = [&](const fake::Command&) { return reply; };
        host.answer(index);
        host.reply_override = nullptr;
        if (host.signals_wanted != wanted) {
            event(lane);
        }
    }
    /// Takes what the guest has published. A bus reset, which is sent on the first channel, ends everything.
    void look() {
        const InFake scope;
        for (const auto& lane : lanes_) {
            take(*lane);
        }
        auto& first = lanes_[0]->host.commands;
        const auto reset = std::ranges::find_if(first, [](const fake::Command& c) { return c.operation() == 6; });
        if (reset == first.end() || !(resets_ || awake_)) {
            return;
        }
        send_reply(0, static_cast<usize>(reset - first.begin()), {});
        for (u32 lane = 0; lane < lanes_.size() && resets_; ++lane) {
            while (!lanes_[lane]->host.commands.empty()) {
                send_reply(lane, 0, {.srb_status = 0x0e});
            }
        }
    }

    const Version version_;
    const bool resets_;
    const u32 lane_count_;
    bool awake_ = false;      // the host responds again, also to a reset
    test::FakeMachine clock_; // of all lanes
    test::HeapDma dma_;
    hv::hyperv::Hypercalls hypercalls_;
    drivers::storvsc::Shared shared_;
    std::vector<std::unique_ptr<Lane>> lanes_;
};

std::vector<Make> rigs() {
    using enum drivers::storvsc::Version;
    std::vector<Make> all;
    const auto add = [&](const char* name, drivers::storvsc::Version version, bool resets, u32 lanes) {
        all.push_back(
            {name, StorvscRig::facts(lanes), [=] { return std::make_unique<StorvscRig>(version, resets, lanes); }});
    };
    add("win10", win10, true, 1);
    add("silent", win10, false, 1);
    add("win6", win6, true, 1);
    add("two_lanes", win10, true, 2);
    add("four_lanes", win10, true, 4);
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(Storvsc, rigs());
CONFORM(SharedStorvsc, shared({rigs().front()}));
} // namespace fl::test::conformance
