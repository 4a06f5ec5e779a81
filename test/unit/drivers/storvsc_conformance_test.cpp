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
import io.executor;
import io.shared_lane;
import io.block;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "unit/io_support.hpp"
// Depends on the includes above.
#include "unit/drivers/storvsc_fake.hpp"
#include "unit/io_block_conformance_shared.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;

class StorvscRig final : public Rig {
  public:
    StorvscRig(drivers::storvsc::Version version, bool resets) : resets_(resets) {
        hv::hyperv::Gate gate;
        gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
        EXPECT_TRUE(hypercalls_.install(gate, dma_));
        auto rings = dma_.buffer(2 * fake::StorageHost::ring_size);
        host_.attach(rings->data());
        hv::hyperv::Channel::Signalling signalling;
        signalling.hypercalls = &hypercalls_;
        EXPECT_TRUE(channel_.attach({}, 0, std::move(*rings), fake::StorageHost::ring_size, signalling, events_));
        queue_.agree({version, max_transfer});
        host_.packet_length = version >= drivers::storvsc::Version::win8 ? 64 : 48;
        parameters_ = *dma_.buffer(4096);
        queue_.start(parameters_, timeout);
        io::Geometry geometry;
        geometry.sectors = sectors;
        geometry.flush = true;
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("sda");
        drivers::storvsc::Disk::Unit unit;
        unit.max_transfer = max_transfer;
        disk_.emplace(queue_, unit, geometry, identity);
        clock_.on_idle_context = this;
        clock_.on_idle = [](void* self) { static_cast<StorvscRig*>(self)->look(); };
        facts = {.capacity = drivers::storvsc::Transport::max_commands - drivers::storvsc::Transport::kept_commands,
                 .part_bytes = max_transfer,
                 .retries = true,
                 .ids = true,
                 .timeout = timeout,
                 .timeouts = 4};
    }
    ~StorvscRig() {
        queue_.stop();
        reclaim();
        disk_.reset();
        channel_.detach().reset();
    }
    io::BlockDevice& disk(u32) override { return *disk_; }
    void turn() override { executor_.turn(); }
    Instant now() override { return executor_.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return dma_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (const usize at : commands()) {
            const fake::Command& c = host_.commands[at];
            const bool is_long = c.cdb(0) >= 0x80;
            held.push_back(
                {(c.cdb(0) & 0x0f) == 8 ? io::Op::read : io::Op::write, is_long ? c.be(2, 8) : c.be(2, 4), c.bytes()});
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
        say(commands()[index], reply);
    }
    void answer_again(usize index) override { say(commands()[index], {.srb_status = 4, .scsi_status = 8}); } // BUSY
    void answer_wrongly(u32 kind) override {
        switch (kind) {
        case 0: say(commands()[0], {.id = 0x1234567}); break;
        case 1: say(commands()[0], {.id = host_.past_ids.front()}); break;
        default: say(commands()[0], {.twice = true}); break;
        }
    }
    void event() override {
        events_.fetch_add(1);
        executor_.wake();
    }
    bool reachable(DmaSpan span) override {
        host_.take(); // the host may take it at any time
        for (const fake::Command& c : host_.commands) {
            for (const auto& [data, bytes] : c.data) {
                if (data < span.data + span.size && span.data < data + bytes) {
                    return true;
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, host_.disk.data() + lba * 512, count * 512);
    }
    void close(Status status) override { queue_.shut(status, {Code::device_gone, "the test closes it"}); }
    void stop() override { queue_.stop(); }
    void reclaim() override {
        host_.take();
        host_.commands.clear();
        queue_.reclaim();
    }
    bool is_open() override { return queue_.is_open(); }
    u32 under_way() override { return queue_.under_way(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    static constexpr u32 max_transfer = 32768;

    /// Indices of the reads and writes among the host's commands; the others are bus resets.
    std::vector<usize> commands() {
        std::vector<usize> found;
        for (usize i = 0; i < host_.commands.size(); ++i) {
            if (host_.commands[i].operation() == 3) {
                found.push_back(i);
            }
        }
        return found;
    }
    void say(usize index, const fake::Reply& reply) {
        const InFake scope;
        const u64 wanted = host_.signals_wanted;
        host_.say = [&](const fake::Command&) { return reply; };
        host_.answer(index);
        host_.say = nullptr;
        if (host_.signals_wanted != wanted) {
            event();
        }
    }
    void look() {
        const InFake scope;
        host_.take();
        const auto reset =
            std::ranges::find_if(host_.commands, [](const fake::Command& c) { return c.operation() == 6; });
        if (reset != host_.commands.end() && (resets_ || awake_)) {
            say(static_cast<usize>(reset - host_.commands.begin()), {});
            while (resets_ && !host_.commands.empty()) {
                say(0, {.srb_status = 0x0e});
            }
        }
    }

    const bool resets_;
    bool awake_ = false; // the host responds again, also to a reset
    test::FakeMachine clock_;
    io::Executor executor_{clock_.platform()};
    test::HeapDma dma_;
    hv::hyperv::Hypercalls hypercalls_;
    std::atomic<u32> events_{0};
    hv::hyperv::Channel channel_;
    drivers::storvsc::Shared shared_;
    fake::StorageHost host_;
    DmaBuffer parameters_;
    drivers::storvsc::Queue queue_{executor_, channel_, shared_, true};
    std::optional<drivers::storvsc::Disk> disk_;
};
} // namespace

namespace fl::test::conformance {
INSTANTIATE_TEST_SUITE_P(
    Storvsc, BlockConformance,
    testing::Values(
        Make{"storvsc", [] { return std::make_unique<StorvscRig>(drivers::storvsc::Version::win10, true); }},
        Make{"storvsc_silent", [] { return std::make_unique<StorvscRig>(drivers::storvsc::Version::win10, false); }},
        Make{"storvsc_win6", [] { return std::make_unique<StorvscRig>(drivers::storvsc::Version::win6, true); }}),
    name_of);
INSTANTIATE_TEST_SUITE_P(SharedStorvsc, BlockConformance,
                         testing::ValuesIn(shared({Make{
                             "storvsc",
                             [] { return std::make_unique<StorvscRig>(drivers::storvsc::Version::win10, true); }}})),
                         name_of);
} // namespace fl::test::conformance
