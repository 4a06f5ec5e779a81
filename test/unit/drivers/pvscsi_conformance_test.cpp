// The PVSCSI queue in the conformance suite: an adapter that ends everything when the bus is reset, one that does not,
// one that asks for few kicks, and one by a line.
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
import io.task;
import io.block;
import io.block_queue;
import drivers.pvscsi.disk;
import drivers.scsi.unit;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/pvscsi_fake.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
namespace pvscsi = drivers::pvscsi;

struct Way {
    bool resets = true;
    bool threshold = false;
    bool line = false;
};

class PvscsiRig final : public Rig {
  public:
    using Transport = pvscsi::Transport;
    static Facts facts(Way) {
        return {.capacity = Transport::max_commands - Transport::reserved_commands,
                .part_bytes = max_transfer,
                .discard_bytes = max_transfer,
                .zeroes_bytes = max_transfer,
                .discards = true,
                .zeroes = true,
                .retries = true,
                .ids = true,
                .exchanges = Transport::reserved_commands,
                .faults = {Fault::next, Fault::tick},
                .timeout = timeout,
                .timeouts = 4};
    }
    explicit PvscsiRig(Way way) : way_(way) {
        device_.units[{3, 0}] = {.blocks = sectors};
        device_.hold = true;
        device_.completes_resets = way.resets;
        device_.has_threshold = way.threshold;
        device_.past.reserve(1 << 16); // nothing is allocated while the driver runs
        device_.commands.reserve(1 << 12);
        device_.held.reserve(256);
        device_.interrupt = [this] { Transport::on_interrupt(&queue_.transport()); };
        auto& adapter = queue_.transport().adapter();
        adapter.open(Mmio(device_, pvscsi::register_bytes));
        rings_ = *dma_.buffer(pvscsi::Memory::ring_bytes);
        areas_ = *dma_.buffer(pvscsi::Memory::areas_bytes);
        const pvscsi::Memory memory{rings_, areas_};
        EXPECT_TRUE(adapter.command(pvscsi::AdapterCommand::adapter_reset));
        EXPECT_TRUE(adapter.set_up(memory));
        EXPECT_EQ(adapter.set_up_threshold(), way.threshold);
        queue_.open(timeout);
        EXPECT_TRUE(queue_.transport().start(
            memory, {.line = way.line, .threshold = way.threshold, .timeout = timeout, .notify = [](void*) {}}));
        adapter.enable_interrupts(false);
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("sda");
        pvscsi::Disk::Unit unit;
        unit.max_transfer = max_transfer;
        unit.max_unmap_blocks = max_transfer / 512;
        unit.max_zero_blocks = max_transfer / 512;
        unit.target = 3;
        disk_.emplace(queue_, unit,
                      io::Geometry{.sectors = sectors, .flush = true, .discard = true, .write_zeroes = true}, identity);
    }
    ~PvscsiRig() {
        stop(0);
        reclaim(0);
    }
    io::BlockDevice& disk(u32) override { return *disk_; }
    io::QueueCore* queue(u32) override { return &queue_; }
    void turn() override {
        if (way_.threshold) { // now and then it wants to be kicked later
            store_threshold(turns_++ % 3 == 0 ? 4 : 1);
        }
        executor_.turn();
    }
    Instant now() override { return executor_.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        poll();
        for (const usize at : commands(false)) {
            const auto& r = device_.held[at];
            if (r.cdb(0) == 0x35 || r.cdb(0) == 0x91) {
                held.push_back({.op = io::Op::flush});
            } else if (r.cdb(0) == 0x93) {
                held.push_back({io::Op::write_zeroes, r.be(2, 8), static_cast<u32>(r.be(10, 4) * 512)});
            } else if (r.cdb(0) == 0x42) {
                held.push_back({io::Op::discard, __builtin_bswap64(pvscsi_fake::load<u64>(r.address() + 8)),
                                __builtin_bswap32(pvscsi_fake::load<u32>(r.address() + 16)) * 512});
            } else {
                held.push_back({(r.cdb(0) & 0xf) == 8 ? io::Op::read : io::Op::write,
                                r.cdb(0) >= 0x80 ? r.be(2, 8) : r.be(2, 4), static_cast<u32>(r.length())});
            }
        }
        return held;
    }
    void answer(usize index, Status how) override {
        const InFake scope;
        device_.answer(commands(false)[index], how == Status::ok ? pvscsi_fake::Reply{} : unreadable());
    }
    void answer_again(usize index) override { // BUSY
        const InFake scope;
        device_.answer(commands(false)[index], {.status = 8});
    }
    void answer_wrongly(u32 kind) override {
        const InFake scope;
        const usize first = commands(false)[0];
        switch (kind) {
        case 0: device_.complete(0x7fff0002, 0, 0, 0, 0); break;
        case 1: device_.complete(device_.past.back(), 0, 0, 0, 0); break;
        default: {
            const u64 context = device_.held[first].context();
            device_.answer(first);
            device_.complete(context, 0, 0, 0, 0);
        }
        }
    }
    void event(u32) override {
        device_.causes |= 1;
        Transport::on_interrupt(&queue_.transport());
    }
    Injected inject(u32, Fault fault) override {
        device_.hostile = true;
        if (fault == Fault::tick) {
            device_.absent = true;
            return {"its registers read as all ones", Status::device_gone};
        }
        pvscsi_fake::store<u32>(device_.state + 12, pvscsi_fake::load<u32>(device_.state + 16) + 1000);
        device_.interrupt = nullptr;
        return {"the producer's position moves backwards or is out of range", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        poll();
        for (const auto& r : device_.held) {
            for (const auto& [bus, n] : r.ranges()) {
                if (bus < span.bus + span.size && span.bus < bus + n) {
                    return true;
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, device_.medium.data() + lba * 512, count * 512);
    }
    std::unique_ptr<io::Exchange> exchange(u32) override { // TEST UNIT READY
        auto exchange = std::make_unique<pvscsi::Exchange>(executor_);
        exchange->unit.target = 3;
        exchange->cdb = drivers::scsi::test_unit_ready();
        return exchange;
    }
    u32 held_exchanges(u32) override { return static_cast<u32>(commands(true).size()); }
    void answer_exchange(u32) override {
        const InFake scope;
        device_.answer(commands(true)[0]);
    }
    void close(u32, Status status) override { queue_.close(status, {Code::device_gone, "the test closes it"}); }
    void stop(u32) override {
        queue_.transport().recovery().leave();
        queue_.stop();
    }
    void reclaim(u32) override {
        device_.held.clear();
        queue_.reclaim();
    }
    bool is_open(u32) override { return queue_.is_open(); }
    u32 in_flight(u32) override { return queue_.in_flight(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    static constexpr u32 max_transfer = 32768;
    static pvscsi_fake::Reply unreadable() { // MEDIUM ERROR, unrecovered read error
        return {.status = 2, .sense = {0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0}};
    }
    void store_threshold(u32 value) { pvscsi_fake::store(device_.state + 24, value); }
    /// An adapter with a threshold looks at its ring by itself.
    void poll() {
        if (way_.threshold && device_.rings_valid) {
            const InFake scope;
            device_.write(0x3014, 4, 0);
        }
    }
    std::vector<usize> commands(bool exchanges) {
        std::vector<usize> found;
        for (usize i = 0; i < device_.held.size(); ++i) {
            if ((device_.held[i].cdb(0) == 0) == exchanges) {
                found.push_back(i);
            }
        }
        return found;
    }

    const Way way_;
    u32 turns_ = 0;
    test::FakeMachine clock_;
    test::HeapDma dma_;
    io::Executor executor_{clock_.platform()};
    pvscsi_fake::Adapter device_{sectors};
    DmaBuffer rings_, areas_;
    pvscsi::Queue queue_{executor_, executor_};
    std::optional<pvscsi::Disk> disk_;
};

std::vector<Make> rigs() {
    std::vector<Make> all;
    const auto add = [&](const char* name, Way way) {
        all.push_back({name, PvscsiRig::facts(way), [way] { return std::make_unique<PvscsiRig>(way); }});
    };
    add("message", {});
    add("silent", {.resets = false});
    add("threshold", {.threshold = true});
    add("line", {.line = true});
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(Pvscsi, rigs());
CONFORM(SharedPvscsi, shared({rigs().front()}));
} // namespace fl::test::conformance
