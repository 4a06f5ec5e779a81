// NVMe queue pairs in the conformance suite: doorbells, shadow doorbells, two lanes.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.mmio;
import core.log;
import core.processor;
import io.executor;
import io.block;
import io.block_queue;
import drivers.nvme.disk;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/nvme_fake.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
namespace nvme = drivers::nvme;

class NvmeRig final : public Rig {
  public:
    static Facts facts(u32 lanes) {
        return {.lanes = lanes,
                .capacity = nvme::Transport::max_commands,
                .part_bytes = max_bytes,
                .zeroes_bytes = max_bytes,
                .discards = true,
                .zeroes = true,
                .retries = true,
                .resets = true,
                .ids = true,
                .elsewhere = true,
                .faults = {Fault::next, Fault::tick},
                .timeout = timeout_of(lanes),
                .timeouts = 6,
                .answers = {Status::ok, Status::io_error, Status::not_supported, Status::read_only}};
    }
    NvmeRig(bool shadow, u32 lanes) : lane_count_(lanes) {
        device_.hold = true;
        device_.cc = 1;
        if (shadow) {
            shadow_ = *dma_.buffer(4096);
            events_ = *dma_.buffer(4096);
            device_.shadow = shadow_.bus();
            device_.event_index = events_.bus();
        }
        device_.interrupt = [this](u16 vector) { event(vector); };
        for (u32 i = 0; i < lanes; ++i) {
            enter(i);
            executors_.push_back(std::make_unique<io::Executor>(clock_.platform(), i));
            if (i == 0) {
                recovery_.emplace(*executors_[0]);
            }
            lanes_.push_back(std::make_unique<Lane>(*executors_[i], group_, *recovery_));
            start(*lanes_[i], i);
        }
        enter(0);
        clock_.on_idle_context = this;
        clock_.on_idle = [](void* self) { static_cast<NvmeRig*>(self)->look(); };
    }
    ~NvmeRig() {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            stop(i);
            reclaim(i);
            lanes_[i]->disk.reset();
        }
        enter(0);
    }
    io::BlockDevice& disk(u32 lane) override { return *lanes_[lane]->disk; }
    void enter(u32 lane) override { set_this_processor(lane); }
    void turn() override {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            lanes_[i]->executor.turn();
        }
        enter(0);
        look();
        recover();
    }
    Instant now() override { return lanes_[0]->executor.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override {
        std::vector<Held> all;
        for (const usize at : order()) {
            const auto& c = device_.held[at];
            const u32 lane = c.queue - 1u;
            switch (c.opcode()) {
            case 0: all.push_back({.op = io::Op::flush, .lane = lane}); break;
            case 8:
                all.push_back({io::Op::write_zeroes, nvme_fake::wide(c.entry, 10), device_.bytes_of(c.entry), lane});
                break;
            case 9: {
                const u64 range = nvme_fake::wide(c.entry, 6);
                all.push_back(
                    {io::Op::discard, nvme_fake::load<u64>(range + 8), nvme_fake::load<u32>(range + 4) * 512, lane});
                break;
            }
            default:
                all.push_back({c.opcode() == 2 ? io::Op::read : io::Op::write, nvme_fake::wide(c.entry, 10),
                               device_.bytes_of(c.entry), lane});
            }
        }
        return all;
    }
    void answer(usize index, Status how) override {
        const InFake scope;
        const u16 status = how == Status::ok              ? 0
                           : how == Status::not_supported ? 0x001
                           : how == Status::read_only     ? 0x182
                                                          : 0x281; // unrecovered read error
        device_.answer(order()[index], status);
    }
    void answer_again(usize index) override { // Namespace Not Ready, DNR clear
        const InFake scope;
        device_.answer(order()[index], 0x082);
    }
    void answer_wrongly(u32 kind) override {
        const InFake scope;
        switch (kind) {
        case 0: device_.complete(1, 0x7ffe, 0); break;
        case 1: device_.complete(1, *device_.last_cid, 0); break;
        default: {
            const u16 cid = device_.held[order()[0]].cid();
            device_.answer(order()[0]);
            device_.complete(1, cid, 0);
        }
        }
    }
    void event(u32 lane) override {
        nvme::QueueInterrupts::on_interrupt(&lanes_[lane]->queue.transport().interrupts());
    }
    u32 resets() override { return static_cast<u32>(recovery_->resets()); }
    Injected inject(u32 lane, Fault fault) override {
        device_.hostile = true; // it may complete commands of a closed queue, which reports no head any more
        if (fault == Fault::tick) {
            device_.options.fatal = true;
            return {"CSTS.CFS", Status::device_gone};
        }
        const u16 id = static_cast<u16>(lane + 1);
        device_.post(id, {0, 0, 0x7fff | u32{id} << 16, 0}); // a head beyond the queue
        return {"not between its last one and the tail", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        look(); // the controller may take commands at any time
        for (const auto& c : device_.held) {
            if (c.opcode() != 1 && c.opcode() != 2) {
                continue;
            }
            for (const auto& [bus, bytes] : nvme_fake::Controller::ranges(c.entry, device_.bytes_of(c.entry))) {
                if (bus < span.bus + span.size && span.bus < bus + bytes) {
                    return true;
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, device_.medium.data() + lba * 512, count * 512);
    }
    void close(u32 lane, Status status) override {
        lanes_[lane]->queue.close(status, {Code::device_gone, "the test closes it"});
    }
    void close_elsewhere(Status status) override { group_.close_first(status); }
    void stop(u32 lane) override { lanes_[lane]->queue.stop(); }
    void reclaim(u32 lane) override {
        std::erase_if(device_.held, [&](const auto& c) { return c.queue == lane + 1; });
        device_.pairs[lane + 1].there = false;
        lanes_[lane]->queue.reclaim();
    }
    bool is_open(u32 lane) override { return lanes_[lane]->queue.is_open(); }
    u32 in_flight(u32 lane) override { return lanes_[lane]->queue.in_flight(); }

  private:
    static Nanoseconds timeout_of(u32 lanes) { return lanes * 200'000'000; } // a turn lasts a tick for each lane
    static constexpr u32 max_bytes = 32768;

    struct Lane {
        Lane(io::Executor& executor, io::QueueGroup& group, nvme::Recovery& recovery)
            : executor(executor), queue(executor, group, recovery) {}
        io::Executor& executor;
        DmaBuffer submissions, completions, lists;
        nvme::Queue queue;
        std::optional<nvme::Disk> disk;
    };
    void start(Lane& lane, u32 number) {
        const u16 id = static_cast<u16>(number + 1);
        lane.submissions = *dma_.buffer(nvme::Transport::max_entries * 64);
        lane.completions = *dma_.buffer(nvme::Transport::max_completions * 16);
        lane.lists = *dma_.buffer(nvme::Transport::max_entries * nvme::list_bytes);
        device_.pairs[id] = {.sq = lane.submissions.bus(),
                             .cq = lane.completions.bus(),
                             .size = nvme::Transport::max_entries,
                             .cq_size = nvme::Transport::max_completions,
                             .vector = static_cast<u16>(number),
                             .there = true};
        lane.queue.transport().interrupts().use(Mmio(device_, 0x2000), false);
        lay_out(lane, id);
        lane.queue.start(timeout_of(lane_count_));
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("nvme0n1");
        lane.disk.emplace(lane.queue, 1, nvme::Limits{.transfer = max_bytes, .zeroes = max_bytes},
                          io::Geometry{.sectors = sectors, .flush = true, .discard = true, .write_zeroes = true},
                          identity);
        lane.disk->link(lane.executor);
    }
    void lay_out(Lane& lane, u16 id) {
        EXPECT_TRUE(lane.queue.transport().lay_out({.registers = Mmio(device_, 0x2000),
                                                    .submissions = lane.submissions,
                                                    .completions = lane.completions,
                                                    .lists = lane.lists,
                                                    .shadow = shadow_,
                                                    .events = events_,
                                                    .entries = nvme::Transport::max_entries,
                                                    .completion_entries = nvme::Transport::max_completions,
                                                    .id = id,
                                                    .lazy = true}));
    }
    /// The part of the controller's task: a reset begins in one turn and ends in another, once every queue is quiet. No
    /// command is aborted.
    void recover() {
        nvme::Recovery::Request asked = recovery_->request();
        if (asked.kind == nvme::Recovery::Kind::abort) {
            recovery_->request_reset(nvme::Recovery::Cause::silent);
            asked = recovery_->request();
        }
        if (asked.kind == nvme::Recovery::Kind::none || group_.closed()) {
            return;
        }
        if (!std::exchange(resetting_, true)) {
            if (device_.options.fatal || !recovery_->count_reset()) {
                const Status status = device_.options.fatal ? Status::device_gone : Status::timed_out;
                if (group_.close_first(status)) {
                    log::error("nvme0: closed: CSTS.CFS, or too many resets");
                }
                return;
            }
            recovery_->hold();
        }
        group_.raise_queues();
        for (const auto& lane : lanes_) {
            const nvme::Transport& transport = lane->queue.transport();
            if (!transport.recovery().quiet() && !transport.quiescent()) {
                return;
            }
        }
        const InFake scope;
        device_.held.clear();
        for (u32 i = 0; i < lane_count_; ++i) {
            Lane& lane = *lanes_[i];
            std::memset(lane.submissions.data(), 0, lane.submissions.size());
            std::memset(lane.completions.data(), 0, lane.completions.size());
            if (shadow_) {
                std::memset(shadow_.data(), 0, shadow_.size());
                std::memset(events_.data(), 0, events_.size());
            }
            device_.pairs[i + 1].restart();
            lay_out(lane, static_cast<u16>(i + 1));
        }
        resetting_ = false;
        recovery_->done(asked);
        recovery_->release();
        group_.raise_queues();
    }
    /// Indices of the device's commands, lane by lane.
    std::vector<usize> order() {
        look();
        std::vector<usize> all;
        for (u32 q = 1; q <= lane_count_; ++q) {
            for (usize i = 0; i < device_.held.size(); ++i) {
                if (device_.held[i].queue == q) {
                    all.push_back(i);
                }
            }
        }
        return all;
    }
    void look() {
        const InFake scope;
        device_.look();
    }

    const u32 lane_count_;
    test::FakeMachine clock_; // of all lanes
    test::HeapDma dma_;
    nvme_fake::Controller device_;
    io::QueueGroup group_;
    DmaBuffer shadow_, events_;
    std::vector<std::unique_ptr<io::Executor>> executors_;
    std::optional<nvme::Recovery> recovery_;
    std::vector<std::unique_ptr<Lane>> lanes_;
    bool resetting_ = false;
};

std::vector<Make> rigs() {
    std::vector<Make> all;
    const auto add = [&](const char* name, bool shadow, u32 lanes) {
        all.push_back({name, NvmeRig::facts(lanes), [=] { return std::make_unique<NvmeRig>(shadow, lanes); }});
    };
    add("plain", false, 1);
    add("shadow_doorbells", true, 1);
    add("two_lanes", false, 2);
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(Nvme, rigs());
CONFORM(SharedNvme, shared({rigs().front()}));
} // namespace fl::test::conformance
