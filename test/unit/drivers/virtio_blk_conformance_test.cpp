// The virtio block device in the conformance suite: split and packed queues, chains and indirect tables.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import core.mmio;
import core.interrupt;
import io.executor;
import io.block;
import io.block_queue;
import io.ring.memory;
import io.ring.virtqueue;
import drivers.virtio.device;
import drivers.virtio_blk.disk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/drivers/virtio_blk_fake.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
namespace virtio = drivers::virtio;
namespace virtio_blk = drivers::virtio_blk;

struct Form {
    u32 size = 256; // of the queue
    bool event_index = true;
    bool indirect = false;
    u32 segments = 1;
    u32 segment_bytes = 64 * 1024;
};

template <class Ring>
class VirtioBlkRig final : public Rig, public MmioModel {
  public:
    explicit VirtioBlkRig(const Form& form) {
        const auto layout = Ring::layout(form.size);
        ring_ = *memory_.buffer(static_cast<u32>(layout.bytes));
        commands_ = *memory_.buffer(virtio_blk::Transport<Ring>::command_bytes);
        rows_.resize(form.size);
        const io::VirtqueueOptions options{.event_index = form.event_index, .indirect = form.indirect};
        const auto ring = Ring::create(io::MappedMemory(ring_.data(), ring_.size()), layout, form.size, rows_, options);
        EXPECT_TRUE(ring);
        disk_.transport().set_up(
            *ring, commands_, form.indirect,
            {.segments = form.segments, .segment_bytes = form.segment_bytes, .discard_bytes = discard_bytes}, nullptr,
            nullptr);
        disk_.transport().set_notifier(virtio::Notifier(Mmio(static_cast<MmioModel&>(*this), 16), 0, 0, false));
        backend_.set_queue({form.size, ring_.bus() + layout.descriptors, ring_.bus() + layout.driver,
                            ring_.bus() + layout.device, form.event_index},
                           std::same_as<Ring, virtio_blk::PackedRing>);
        backend_.hold = true;
        backend_.interrupt = [this] { disk_.transport().on_interrupt(0); };
        backend_.taken.reserve(256);
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("vda");
        disk_.set_identity(identity);
        disk_.set_timeout(timeout);
        disk_.open({.sectors = sectors, .flush = true, .discard = true});
    }
    static Facts facts(const Form& form) {
        return {.capacity = form.indirect ? virtio_blk::Transport<Ring>::max_commands - 1 : form.size / 3,
                .part_bytes = form.segments * form.segment_bytes,
                .discard_bytes = discard_bytes,
                .discards = true,
                .ids = true,
                .faults = std::same_as<Ring, virtio_blk::SplitRing> ? std::vector{Fault::next} : std::vector<Fault>{},
                .timeout = timeout,
                .answers = {Status::ok, Status::io_error, Status::not_supported}};
    }
    ~VirtioBlkRig() {
        disk_.queue().stop();
        reclaim(0);
    }
    u64 read(u64, u32) override { return 0; }
    void write(u64, u32, u64) override { // the notification
        const InFake scope;
        backend_.notify();
    }
    io::BlockDevice& disk(u32) override { return disk_; }
    void turn() override { executor_.turn(); }
    Instant now() override { return executor_.now(); }
    void jump(Nanoseconds length) override { machine_.time += length; }
    DmaAllocator& memory() override { return memory_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (const auto& t : backend_.taken) {
            const io::Op op = t.kind == virtio_test::Kind::in      ? io::Op::read
                              : t.kind == virtio_test::Kind::out   ? io::Op::write
                              : t.kind == virtio_test::Kind::flush ? io::Op::flush
                                                                   : io::Op::discard;
            held.push_back({op, t.sector, static_cast<u32>(t.bytes)});
        }
        return held;
    }
    void answer(usize index, Status how) override {
        const InFake scope;
        backend_.complete(index, how == Status::ok ? 0 : how == Status::io_error ? 1 : 2);
        if (damaged_) {
            backend_.damage();
            event(0);
        }
    }
    void answer_wrongly(u32 kind) override {
        const InFake scope;
        virtqueue_fake::Chain chain = backend_.taken.front().chain;
        switch (kind) {
        case 0: chain.id = 0x1234; break;
        case 1: chain.id = backend_.last_id; break;
        default: backend_.complete(0, 0);
        }
        backend_.push(chain, 1);
        event(0); // of whatever kind it is, the driver looks
    }
    void event(u32) override { disk_.transport().on_interrupt(0); }
    Injected inject(u32, Fault) override {
        backend_.dead = damaged_ = true;
        backend_.damage();
        return {"the device has returned more buffers than it holds", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        for (const auto& t : backend_.taken) {
            for (const auto& piece : t.chain.pieces) {
                if (piece.bus < span.bus + span.size && span.bus < piece.bus + piece.length) {
                    return true;
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, backend_.disk.data() + lba * 512, count * 512);
    }
    void close(u32, Status status) override { disk_.queue().close(status, {Code::device_gone, "the test closes it"}); }
    void stop(u32) override { disk_.queue().stop(); }
    void reclaim(u32) override { // the device has been reset
        backend_.reset();
        disk_.queue().reclaim();
    }
    bool is_open(u32) override { return disk_.queue().is_open(); }
    u32 in_flight(u32) override { return disk_.queue().in_flight(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    static constexpr u32 discard_bytes = 128 * 1024;
    fl::test::FakeMachine machine_;
    io::Executor executor_{machine_.platform()};
    virtio_test::Memory memory_;
    virtio_test::Backend backend_{memory_, sectors};
    bool damaged_ = false;
    DmaBuffer ring_;
    DmaBuffer commands_;
    std::vector<io::VirtqueueRow> rows_;
    virtio_blk::Disk<Ring> disk_{executor_};
};

template <class Ring>
void add(std::vector<Make>& all, const char* name, const Form& form) {
    all.push_back(
        {name, VirtioBlkRig<Ring>::facts(form), [form] { return std::make_unique<VirtioBlkRig<Ring>>(form); }});
}

std::vector<Make> rigs() {
    std::vector<Make> all;
    add<virtio_blk::SplitRing>(all, "split", {});
    add<virtio_blk::SplitRing>(all, "split_small_without_events", {.size = 16, .event_index = false});
    add<virtio_blk::SplitRing>(all, "split_indirect", {.size = 128, .indirect = true});
    add<virtio_blk::SplitRing>(all, "split_segments", {.segments = 4, .segment_bytes = 16 * 1024});
    add<virtio_blk::PackedRing>(all, "packed", {.size = 99});
    add<virtio_blk::PackedRing>(all, "packed_indirect_without_events",
                                {.size = 128, .event_index = false, .indirect = true});
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(VirtioBlk, rigs());
CONFORM(SharedVirtioBlk, shared({rigs().front()}));
} // namespace fl::test::conformance
