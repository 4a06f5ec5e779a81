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
import core.processor;
import core.interrupt;
import io.executor;
import io.block;
import io.block_queue;
import io.ring.any;
import drivers.virtio.device;
import drivers.virtio_blk.disk;

#include "unit/io/support.hpp"
// depends on the include above
#include "unit/drivers/virtio_blk_fake.hpp"
// depends on the include above
#include "unit/drivers/virtio_queue_device.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
namespace virtio = drivers::virtio;
namespace virtio_blk = drivers::virtio_blk;

struct Form {
    bool packed = false;
    u32 size = 256; // of a queue
    bool event_index = true;
    bool indirect = false;
    u32 segments = 1;
    u32 segment_bytes = 64 * 1024;
    u32 lanes = 1;
};

class VirtioBlkRig final : public Rig {
  public:
    explicit VirtioBlkRig(const Form& form) : form_(form) {
        for (u32 i = 0; i < form.lanes; ++i) {
            enter(i);
            lanes_.push_back(std::make_unique<Lane>(*this, i));
        }
        enter(0);
    }
    static Facts facts(const Form& form) {
        return {.lanes = form.lanes,
                .capacity = form.indirect ? virtio_blk::Transport::max_commands - 1 : form.size / 3,
                .part_bytes = form.segments * form.segment_bytes,
                .discard_bytes = discard_bytes,
                .zeroes_bytes = zeroes_bytes,
                .discards = true,
                .zeroes = true,
                .ids = true,
                .elsewhere = true,
                .faults = !form.packed ? std::vector{Fault::next} : std::vector<Fault>{},
                .timeout = timeout_of(form),
                .answers = {Status::ok, Status::io_error, Status::not_supported}};
    }
    ~VirtioBlkRig() {
        for (u32 i = 0; i < form_.lanes; ++i) {
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
        for (u32 i = 0; i < form_.lanes; ++i) {
            enter(i);
            lanes_[i]->executor.turn();
        }
        enter(0);
    }
    Instant now() override { return lanes_[0]->executor.now(); }
    void jump(Nanoseconds length) override { machine_.time += length; }
    DmaAllocator& memory() override { return memory_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (u32 i = 0; i < form_.lanes; ++i) {
            for (const auto& t : lanes_[i]->backend.taken) {
                const io::Op op = t.kind == virtio_test::Kind::in        ? io::Op::read
                                  : t.kind == virtio_test::Kind::out     ? io::Op::write
                                  : t.kind == virtio_test::Kind::flush   ? io::Op::flush
                                  : t.kind == virtio_test::Kind::discard ? io::Op::discard
                                                                         : io::Op::write_zeroes;
                held.push_back({op, t.sector, static_cast<u32>(t.bytes), i});
            }
        }
        return held;
    }
    void answer(usize index, Status how) override {
        const InFake scope;
        for (auto& lane : lanes_) {
            if (index < lane->backend.taken.size()) {
                lane->backend.complete(index, how == Status::ok ? 0 : how == Status::io_error ? 1 : 2);
                if (lane->damaged) {
                    lane->backend.damage();
                    lane->transport().on_interrupt(0);
                }
                return;
            }
            index -= lane->backend.taken.size();
        }
    }
    void answer_wrongly(u32 kind) override {
        const InFake scope;
        auto& backend = lanes_[0]->backend;
        virtqueue_fake::Chain chain = backend.taken.front().chain;
        switch (kind) {
        case 0: chain.id = 0x1234; break;
        case 1: chain.id = backend.last_id; break;
        default: backend.complete(0, 0);
        }
        backend.push(chain, 1);
        event(0); // of whatever kind it is, the driver looks
    }
    void event(u32 lane) override { lanes_[lane]->transport().on_interrupt(0); }
    Injected inject(u32 lane, Fault) override {
        lanes_[lane]->backend.dead = lanes_[lane]->damaged = true;
        lanes_[lane]->backend.damage();
        return {"the device has returned more buffers than it holds", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        for (const auto& lane : lanes_) {
            for (const auto& t : lane->backend.taken) {
                for (const auto& piece : t.chain.pieces) {
                    if (piece.bus < span.bus + span.size && span.bus < piece.bus + piece.length) {
                        return true;
                    }
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, lanes_[0]->backend.disk.data() + lba * 512, count * 512);
    }
    void close(u32 lane, Status status) override {
        lanes_[lane]->queue.close(status, {Code::device_gone, "the test closes it"});
    }
    void close_elsewhere(Status status) override { shared_.close_first(status); }
    void stop(u32 lane) override { lanes_[lane]->queue.stop(); }
    void reclaim(u32 lane) override { // the device has been reset
        lanes_[lane]->backend.reset();
        lanes_[lane]->queue.reclaim();
    }
    bool is_open(u32 lane) override { return lanes_[lane]->queue.is_open(); }
    u32 in_flight(u32 lane) override { return lanes_[lane]->queue.in_flight(); }

  private:
    static constexpr u32 discard_bytes = 128 * 1024;
    static constexpr u32 zeroes_bytes = 64 * 1024;
    static Nanoseconds timeout_of(const Form& form) { return form.lanes * 200'000'000; } // a turn: a tick for each lane

    struct Lane {
        Lane(VirtioBlkRig& rig, u32 number)
            : executor(rig.machine_.platform(), number), queue(executor, rig.shared_),
              backend(number == 0 ? virtio_test::Backend(rig.memory_, sectors)
                                  : virtio_test::Backend(rig.memory_, rig.lanes_[0]->backend)),
              device(
                  rig.form_.size, rig.form_.event_index,
                  [this, &rig](u16, const auto& setup) { backend.set_queue(setup, rig.form_.packed); },
                  [this](u16) {
                      const InFake scope;
                      backend.notify();
                  }) {
            const Form& form = rig.form_;
            const u64 features = (form.event_index ? virtio::feature_event_idx : 0) |
                                 (form.indirect ? virtio::feature_indirect : 0) |
                                 (form.packed ? virtio::feature_packed : 0);
            EXPECT_TRUE(transport().make(device, static_cast<u16>(number), features, virtio_blk::Transport::needs,
                                         virtio_blk::Transport::command_bytes, rig.memory_));
            transport().set_limits({.segments = form.segments,
                                    .segment_bytes = form.segment_bytes,
                                    .discard_bytes = discard_bytes,
                                    .zeroes_bytes = zeroes_bytes});
            EXPECT_TRUE(transport().enable(device, 0));
            backend.hold = true;
            backend.interrupt = [this] { transport().on_interrupt(0); };
            backend.taken.reserve(256);
            queue.start(timeout_of(form));
            io::BlockDevice::Identity identity;
            identity.name = FixedText<16>("vda");
            disk.emplace(queue, io::Geometry{.sectors = sectors, .flush = true, .discard = true, .write_zeroes = true},
                         identity);
            disk->link(executor);
        }
        virtio_blk::Transport& transport() { return queue.transport(); }

        io::Executor executor;
        virtio_blk::Queue queue;
        virtio_test::Backend backend;
        virtio_test::QueueDevice device;
        std::optional<virtio_blk::Disk> disk;
        bool damaged = false;
    };

    const Form form_;
    fl::test::FakeMachine machine_; // of all lanes
    virtio_test::Memory memory_;
    virtio::Shared shared_;
    std::vector<std::unique_ptr<Lane>> lanes_;
};

void add(std::vector<Make>& all, const char* name, const Form& form) {
    all.push_back({name, VirtioBlkRig::facts(form), [form] { return std::make_unique<VirtioBlkRig>(form); }});
}

std::vector<Make> rigs() {
    std::vector<Make> all;
    add(all, "split", {});
    add(all, "split_small_without_events", {.size = 16, .event_index = false});
    add(all, "split_indirect", {.size = 128, .indirect = true});
    add(all, "split_segments", {.segments = 4, .segment_bytes = 16 * 1024});
    add(all, "split_two_lanes", {.lanes = 2});
    add(all, "packed", {.packed = true, .size = 99});
    add(all, "packed_indirect_without_events", {.packed = true, .size = 128, .event_index = false, .indirect = true});
    add(all, "packed_four_lanes", {.packed = true, .lanes = 4});
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(VirtioBlk, rigs());
CONFORM(SharedVirtioBlk, shared({rigs().front()}));
} // namespace fl::test::conformance
