// The request queues of a virtio SCSI host in the conformance suite: split and packed, chains and indirect tables, with
// several lanes; a host that answers everything when its units are reset, and one that does not.
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
import drivers.virtio_scsi.disk;

#include "unit/io/support.hpp"
// Depends on the include above.
#include "unit/drivers/virtio_blk_fake.hpp"
// Depends on the include above.
#include "unit/drivers/virtio_queue_device.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
using virtqueue_fake::Chain;
using virtqueue_fake::PackedDevice;
using virtqueue_fake::SplitDevice;
namespace virtio = drivers::virtio;
namespace virtio_scsi = drivers::virtio_scsi;

struct Form {
    bool packed = false;
    u32 size = 256; // of a queue
    bool event_index = true;
    bool indirect = false;
    bool resets = true; // answers everything when its units are reset
    u32 lanes = 1;
};

/// On the wire [virtio-1.2 §5.6.6.1], with the default sizes of CDB and sense data.
constexpr u32 header_size = 51;
constexpr u32 response_size = 108;
// [SPC-4], [SBC-3]
constexpr u8 test_unit_ready = 0x00;
constexpr u8 synchronize_cache_10 = 0x35;
constexpr u8 unmap = 0x42;
constexpr u8 synchronize_cache_16 = 0x91;
constexpr u8 write_same_16 = 0x93;

class VirtioScsiRig final : public Rig {
  public:
    explicit VirtioScsiRig(const Form& form) : form_(form) {
        shared_.set_listener([](void* self) { static_cast<VirtioScsiRig*>(self)->reset_units(); }, this);
        for (u32 i = 0; i < form.lanes; ++i) {
            enter(i);
            lanes_.push_back(std::make_unique<Lane>(*this, i));
        }
        enter(0);
        clock_.on_idle_context = this;
        clock_.on_idle = [](void* self) { static_cast<VirtioScsiRig*>(self)->reset_units(); };
    }
    static Facts facts(const Form& form) {
        const u32 most = virtio_scsi::Transport::max_commands - virtio_scsi::Transport::reserved_commands;
        return {.lanes = form.lanes,
                .capacity = form.indirect ? most : (form.size - 3) / 3, // room for an exchange is left
                .part_bytes = max_transfer,
                .discard_bytes = max_transfer,
                .zeroes_bytes = max_transfer,
                .discards = true,
                .zeroes = true,
                .retries = true,
                .ids = true,
                .elsewhere = true,
                .exchanges = virtio_scsi::Transport::reserved_commands,
                .faults = !form.packed ? std::vector{Fault::next} : std::vector<Fault>{},
                .timeout = timeout_of(form),
                // three repetitions after resets; the ticks of four lanes, one after the other, add up to one more
                .timeouts = form.lanes > 2 ? 5u : 4u};
    }
    ~VirtioScsiRig() {
        for (u32 i = 0; i < lanes_.size(); ++i) {
            enter(i);
            stop(i);
            reclaim(i);
            lanes_[i]->disk.reset();
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
        reset_units();
    }
    Instant now() override { return lanes_[0]->executor.now(); }
    void jump(Nanoseconds length) override { clock_.time += length; }
    DmaAllocator& memory() override { return memory_; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (u32 i = 0; i < lanes_.size(); ++i) {
            for (const usize at : commands(i)) {
                const Taken& t = lanes_[i]->taken[at];
                held.push_back({t.op, t.lba, t.bytes, i});
            }
        }
        return held;
    }
    void answer(usize index, Status how) override {
        const auto [lane, at] = place(index);
        if (how == Status::ok) {
            send_answer(lane, at, {});
        } else { // MEDIUM ERROR, unrecovered read error
            send_answer(lane, at, {.status = 2, .sense_key = 3, .asc = 0x11});
        }
    }
    void answer_again(usize index) override { // BUSY
        const auto [lane, at] = place(index);
        send_answer(lane, at, {.status = 8});
    }
    void answer_wrongly(u32 kind) override {
        const InFake scope;
        Lane& lane = *lanes_[0];
        Chain chain = lane.taken[commands(0)[0]].chain;
        switch (kind) {
        case 0: chain.id = 0x1234; break;
        case 1: chain.id = lane.last_id; break;
        default: send_answer(0, commands(0)[0], {});
        }
        lane.push(chain, response_size);
        event(0); // of whatever kind it is, the driver looks
    }
    void event(u32 lane) override { lanes_[lane]->queue.transport().on_interrupt(0); }
    Injected inject(u32 lane, Fault) override {
        lanes_[lane]->damaged = true;
        lanes_[lane]->damage();
        return {"the device has returned more buffers than it holds", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        for (const auto& lane : lanes_) {
            for (const Taken& t : lane->taken) {
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
        std::memcpy(into, medium_.data() + lba * 512, count * 512);
    }

    std::unique_ptr<io::Exchange> exchange(u32 lane) override { // TEST UNIT READY
        auto exchange = std::make_unique<virtio_scsi::Exchange>(lanes_[lane]->executor);
        exchange->lun = virtio_scsi::address_of(0, 0);
        return exchange;
    }
    u32 held_exchanges(u32 lane) override { return static_cast<u32>(commands(lane, true).size()); }
    void answer_exchange(u32 lane) override { send_answer(lane, commands(lane, true)[0], {}); }

    void close(u32 lane, Status status) override {
        lanes_[lane]->queue.close(status, {Code::device_gone, "the test closes it"});
    }
    void close_elsewhere(Status status) override { shared_.close_first(status); }
    void stop(u32 lane) override { lanes_[lane]->queue.stop(); }
    void reclaim(u32 lane) override { // the device has been reset
        lanes_[lane]->device.reset();
        lanes_[lane]->taken.clear();
        lanes_[lane]->queue.reclaim();
    }
    bool is_open(u32 lane) override { return lanes_[lane]->queue.is_open(); }
    u32 in_flight(u32 lane) override { return lanes_[lane]->queue.in_flight(); }

  private:
    static Nanoseconds timeout_of(const Form& form) { return form.lanes * 200'000'000; } // a turn: a tick for each lane
    static constexpr u32 max_transfer = 32768;

    /// A command that the device has taken from the queue.
    struct Taken {
        Chain chain;
        bool exchange = false;
        io::Op op = io::Op::read;
        u64 lba = 0;
        u32 bytes = 0;
        usize response = 0; // its piece
    };
    struct Answer {
        u8 response = 0;
        u8 status = 0;
        u8 sense_key = 0; // 0: no sense data
        u8 asc = 0;
    };

    struct Lane {
        Lane(VirtioScsiRig& rig, u32 number)
            : owner(rig), executor(rig.clock_.platform(), number), queue(executor, rig.shared_),
              front(
                  rig.form_.size, rig.form_.event_index, [this](u16, const auto& accepted) { accept(accepted); },
                  [this](u16) { notified(); }) {
            const Form& form = rig.form_;
            const u64 features = (form.event_index ? virtio::feature_event_idx : 0) |
                                 (form.indirect ? virtio::feature_indirect : 0) |
                                 (form.packed ? virtio::feature_packed : 0);
            virtio_scsi::Transport& transport = queue.transport();
            EXPECT_TRUE(transport.make(front, static_cast<u16>(2 + number), features, virtio_scsi::Transport::needs,
                                       virtio_scsi::Transport::command_bytes, rig.memory_));
            transport.set_terms({.max_transfer = max_transfer});
            EXPECT_TRUE(transport.enable(front, 0));
            taken.reserve(512);
            queue.start(timeout_of(form));
            io::BlockDevice::Identity identity;
            identity.name = FixedText<16>("sda");
            disk.emplace(queue, virtio_scsi::UnitNumber{0, 0},
                         drivers::scsi::UnitLimits{.max_transfer = max_transfer,
                                                   .max_unmap_blocks = max_transfer / 512,
                                                   .max_zero_blocks = max_transfer / 512},
                         io::Geometry{.sectors = sectors, .flush = true, .discard = true, .write_zeroes = true},
                         identity);
            disk->link(executor);
        }
        void accept(const SplitDevice::Setup& accepted) {
            setup = accepted;
            if (owner.form_.packed) {
                device.emplace(std::in_place_type<PackedDevice>, owner.memory_.guest, setup);
            } else {
                device.emplace(std::in_place_type<SplitDevice>, owner.memory_.guest, setup);
            }
            std::visit([](auto& d) { d.want(1); }, *device);
        }
        void notified() {
            const InFake scope;
            if (!device || damaged) {
                return;
            }
            std::visit(
                [&](auto& d) {
                    while (auto chain = d.pop()) {
                        taken.push_back(owner.examine(*chain));
                    }
                    d.want(1);
                },
                *device);
        }
        /// Returns a buffer, whatever it is, and raises the event that the driver has requested.
        void push(const Chain& chain, u32 length) {
            const bool due = std::visit(
                [&](auto& d) {
                    d.push(chain, length);
                    return d.interrupt();
                },
                *device);
            if (due) {
                queue.transport().on_interrupt(0);
            }
        }
        /// A split queue's used index claims more buffers than the device holds.
        void damage() {
            virtqueue_fake::Guest& guest = owner.memory_.guest;
            guest.put(setup.device + 2, guest.get(setup.device + 2, 2) + 1000, 2);
        }

        VirtioScsiRig& owner;
        io::Executor executor;
        virtio_scsi::Queue queue;
        virtio_test::QueueDevice front;
        SplitDevice::Setup setup{};
        std::optional<std::variant<SplitDevice, PackedDevice>> device;
        std::vector<Taken> taken; // held
        std::optional<virtio_scsi::Disk> disk;
        u16 last_id = 0;
        bool damaged = false; // takes nothing any more
    };

    Taken examine(const Chain& chain) {
        auto& guest = memory_.guest;
        const auto& p = chain.pieces;
        Taken t{chain};
        EXPECT_TRUE(p.size() >= 2 && p[0].length == header_size && !p[0].writable) << "the header";
        EXPECT_EQ(guest.get(p[0].bus, 8), 0x00400001u) << "target 0, LUN 0";
        EXPECT_EQ(guest.get(p[0].bus + 16, 3), 0u) << "SIMPLE, no priority";
        while (++t.response < p.size() - 1 && !p[t.response].writable) {
        }
        EXPECT_TRUE(p[t.response].writable && p[t.response].length == response_size) << "it comes before the data";
        u32 out = 0;
        u32 in = 0;
        for (usize i = 1; i < p.size(); ++i) {
            (i < t.response ? out : in) += i != t.response ? p[i].length : 0;
        }
        const auto be = [&](u64 from, u32 bytes) {
            u64 value = 0;
            for (u32 i = 0; i < bytes; ++i) {
                value = value << 8 | guest.get(from + i, 1);
            }
            return value;
        };
        const u64 cdb = p[0].bus + 19;
        const u8 code = static_cast<u8>(guest.get(cdb, 1));
        t.exchange = code == test_unit_ready;
        if (t.exchange || code == synchronize_cache_10 || code == synchronize_cache_16) {
            t.op = io::Op::flush;
            EXPECT_EQ(out + in, 0u);
        } else if (code == unmap) {
            t.op = io::Op::discard;
            EXPECT_TRUE(out == 24 && in == 0);
            t.lba = be(p[1].bus + 8, 8);
            t.bytes = static_cast<u32>(be(p[1].bus + 16, 4) * 512);
        } else if (code == write_same_16) {
            t.op = io::Op::write_zeroes;
            EXPECT_TRUE(out == 512 && in == 0) << "one block";
            for (u32 i = 0; i < 512; i += 8) {
                EXPECT_EQ(guest.get(p[1].bus + i, 8), 0u);
            }
            t.lba = be(cdb + 2, 8);
            t.bytes = static_cast<u32>(be(cdb + 10, 4) * 512);
        } else {
            const bool is_long = code >= 0x80;
            const bool is_read = (code & 0x0f) == 8;
            t.op = is_read ? io::Op::read : io::Op::write;
            t.lba = is_long ? be(cdb + 2, 8) : be(cdb + 2, 4);
            t.bytes = static_cast<u32>((is_long ? be(cdb + 10, 4) : be(cdb + 7, 2)) * 512);
            EXPECT_EQ(is_read ? in : out, t.bytes) << "room for the data";
            EXPECT_EQ(is_read ? out : in, 0u);
            EXPECT_LE(t.lba * 512 + t.bytes, medium_.size());
        }
        return t;
    }
    void carry_out(const Taken& t) {
        std::byte* at = medium_.data() + t.lba * 512;
        if (t.op == io::Op::discard || t.op == io::Op::write_zeroes) {
            std::memset(at, 0, t.bytes);
        }
        for (usize i = 1; i < t.chain.pieces.size() && t.op <= io::Op::write; ++i) {
            const auto& piece = t.chain.pieces[i];
            if (i == t.response) {
                continue;
            }
            std::byte* const data = memory_.guest.data() + (piece.bus - memory_.guest.bus);
            std::memcpy(t.op == io::Op::read ? data : at, t.op == io::Op::read ? at : data, piece.length);
            at += piece.length;
        }
    }
    void send_answer(u32 number, usize index, const Answer& answer) {
        const InFake scope;
        Lane& lane = *lanes_[number];
        const Taken t = lane.taken[index];
        lane.taken.erase(lane.taken.begin() + static_cast<std::ptrdiff_t>(index));
        lane.last_id = t.chain.id;
        auto& guest = memory_.guest;
        const u64 at = t.chain.pieces[t.response].bus;
        for (u32 i = 0; i < response_size; i += 4) {
            guest.put(at + i, 0, 4);
        }
        if (answer.response == 0 && answer.status == 0) {
            carry_out(t);
        }
        guest.put(at + 4, answer.status != 0 && !t.exchange && t.op <= io::Op::write ? t.bytes : 0, 4); // the residual
        guest.put(at + 10, answer.status, 1);
        guest.put(at + 11, answer.response, 1);
        if (answer.sense_key != 0) { // fixed format [SPC-4 §4.5.3]
            guest.put(at, 18, 4);
            guest.put(at + 12, 0x70, 1);
            guest.put(at + 12 + 2, answer.sense_key, 1);
            guest.put(at + 12 + 7, 10, 1);
            guest.put(at + 12 + 12, answer.asc, 1);
        }
        if (lane.damaged) {
            lane.damage();
            event(number);
            return;
        }
        lane.push(t.chain, response_size);
    }
    /// Indices of a lane's commands for requests, or of those for exchanges.
    std::vector<usize> commands(u32 lane, bool exchanges = false) {
        std::vector<usize> found;
        for (usize i = 0; i < lanes_[lane]->taken.size(); ++i) {
            if (lanes_[lane]->taken[i].exchange == exchanges) {
                found.push_back(i);
            }
        }
        return found;
    }
    /// The lane of held()[index], and its place among the lane's commands.
    std::pair<u32, usize> place(usize index) {
        for (u32 lane = 0;; ++lane) {
            const auto found = commands(lane);
            if (index < found.size()) {
                return {lane, found[index]};
            }
            index -= found.size();
        }
    }
    /// What the controller does when a queue asks for it: LOGICAL UNIT RESET ends everything with the response RESET.
    void reset_units() {
        if (!shared_.take(virtio_scsi::reset_request) || !form_.resets) {
            return;
        }
        for (u32 lane = 0; lane < lanes_.size(); ++lane) {
            while (!lanes_[lane]->taken.empty() && !lanes_[lane]->damaged) {
                send_answer(lane, 0, {.response = 4});
            }
        }
    }

    const Form form_;
    test::FakeMachine clock_; // of all lanes
    virtio_test::Memory memory_{4 << 20};
    Zeroed medium_{sectors * 512};
    virtio::Shared shared_;
    std::vector<std::unique_ptr<Lane>> lanes_;
};

std::vector<Make> rigs() {
    std::vector<Make> all;
    const auto add = [&](const char* name, const Form& form) {
        all.push_back({name, VirtioScsiRig::facts(form), [form] { return std::make_unique<VirtioScsiRig>(form); }});
    };
    add("split", {});
    add("split_small_without_events", {.size = 16, .event_index = false});
    add("split_indirect", {.indirect = true});
    add("silent", {.resets = false});
    add("split_two_lanes", {.lanes = 2});
    add("packed", {.packed = true, .size = 99});
    add("packed_indirect_without_events", {.packed = true, .size = 128, .event_index = false, .indirect = true});
    add("packed_four_lanes", {.packed = true, .lanes = 4});
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(VirtioScsi, rigs());
CONFORM(SharedVirtioScsi, shared({rigs().front()}));
} // namespace fl::test::conformance
