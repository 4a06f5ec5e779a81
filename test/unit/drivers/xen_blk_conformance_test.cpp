// The Xen block front end in the conformance suite: grants revoked or still mapped, persistent, indirect.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.processor;
import core.log;
import core.cpuid;
import io.executor;
import io.task;
import io.block;
import io.block_queue;
import hv.xen;
import drivers.driver;
import drivers.xen_blk;
import drivers.xen_blk.lane;

#include "unit/hv/xen_fake.hpp"
// Depends on the includes above.
#include "unit/drivers/xen_blk_fake.hpp"
#include "unit/io/block_conformance.hpp"

namespace {
using namespace fl;
using namespace fl::test::conformance;
using io::Status;
namespace xen_blk = drivers::xen_blk;

struct Kind {
    bool persistent = false;
    bool indirect = false;
    bool mapped = false; // the back end maps a request's pages when it takes it, and unmaps them when it responds
};

class XenBlkRig final : public Rig {
  public:
    explicit XenBlkRig(const Kind& kind)
        : back_(m_.xen, {.sectors = sectors,
                         .discard = true,
                         .persistent = kind.persistent,
                         .indirect = kind.indirect ? 256u : 0u}) {
        EXPECT_TRUE(m_.install());
        EXPECT_TRUE(m_.start());
        m_.world.device = [this] {
            const InFake scope;
            return back_.process();
        };
        back_.hold = true;
        back_.hold_mapped = kind.mapped;
        xen_blk::Terms terms;
        terms.handle = 51712;
        terms.flush = xen_blk::Operation::flush;
        terms.persistent = kind.persistent;
        terms.indirect_segments = kind.indirect ? 32 : 0;
        terms.discard = terms.secure_discard = true;
        terms.geometry = {.sectors = sectors, .flush = true};
        EXPECT_TRUE(lane_.prepare(0, kind.persistent, terms.domain, m_.xen.memory));
        EXPECT_EQ(lane_.has_pool(), kind.persistent);
        port_ = lane_.connection().port();
        m_.xen.tree[back_.front + "/ring-ref"] = std::to_string(lane_.connection().grant(0));
        m_.xen.tree[back_.front + "/event-channel"] = std::to_string(to_underlying(port_));
        m_.xen.tree[back_.front + "/protocol"] = "x86_64-abi";
        m_.xen.tree[back_.front + "/feature-persistent"] = kind.persistent ? "1" : "0";
        EXPECT_TRUE(back_.connect());
        io::BlockDevice::Identity identity;
        identity.name = FixedText<16>("xvda");
        lane_.disk().set_timeout(timeout);
        lane_.disk().identify(identity);
        EXPECT_TRUE(lane_.set_up(terms, m_.xen.memory, nullptr, nullptr));
        EXPECT_TRUE(lane_.listen());
        EXPECT_TRUE(m_.run(lane_.start()));
    }
    static Facts facts(const Kind& kind) {
        return {.capacity = 32,
                .part_bytes = (kind.indirect ? 32u : 11u) * 4096,
                .discards = true,
                .secure_discards = true,
                .stoppable = false,
                .ids = true,
                .faults = {Fault::next},
                .timeout = timeout,
                .answers = {Status::ok, Status::io_error, Status::not_supported}};
    }
    ~XenBlkRig() {
        if (lane_.is_open()) {
            lane_.close(Status::device_gone, {Code::device_gone, "the test is over"});
        }
        reclaim(0);
    }
    io::BlockDevice& disk(u32) override { return lane_.disk(); }
    void turn() override { m_.executor.turn(); }
    Instant now() override { return m_.executor.now(); }
    void jump(Nanoseconds length) override { m_.world.now += length; }
    DmaAllocator& memory() override { return m_.xen.memory; }
    std::vector<Held> held() override {
        std::vector<Held> held;
        for (const auto& h : back_.held()) {
            const io::Op op = h.op == 0   ? io::Op::read
                              : h.op == 1 ? io::Op::write
                              : h.op != 5 ? io::Op::flush
                              : fake::Xen::field<u8>(reinterpret_cast<u64>(h.slot.data()), 1) == 0
                                  ? io::Op::discard
                                  : io::Op::secure_discard;
            held.push_back({op, h.sector, h.sectors * 512});
        }
        return held;
    }
    void answer(usize index, Status how) override {
        const InFake scope;
        back_.answer(index, how == Status::ok ? 0 : how == Status::io_error ? -1 : -2);
        back_.violating = damaged_;
        m_.xen.deliver();
    }
    void answer_wrongly(u32 kind) override {
        const auto id = [](const fake::Blkback::Held& h) {
            return fake::Xen::field<u64>(reinterpret_cast<u64>(h.slot.data()), 8);
        };
        back_.violating = true; // it always notifies
        switch (kind) {
        case 0: back_.push(0x1234567, 0, 0); break;
        case 1: back_.push(*back_.last_id, 0, 0); break;
        default: {
            const u64 head = id(back_.held()[0]);
            const u8 op = back_.held()[0].op;
            back_.answer(0, 0);
            back_.push(head, op, 0);
        }
        }
        m_.xen.deliver();
    }
    void event(u32) override {
        m_.xen.raise(to_underlying(port_));
        m_.xen.deliver();
    }
    Injected inject(u32, Fault) override {
        damaged_ = back_.violating = true; // it takes nothing any more
        back_.rsp_prod += 1000;            // more responses than there are slots
        back_.word(8) = back_.rsp_prod;
        return {"out of range: the ring is broken", Status::protocol_error};
    }
    bool reachable(DmaSpan span) override {
        for (const std::byte* frame : m_.xen.grant_frames) {
            for (u32 i = 0; frame != nullptr && i < 512; ++i) {
                u64 entry; // flags, domain, frame
                std::memcpy(&entry, frame + i * 8, sizeof entry);
                const u64 page = (entry >> 32) * 4096;
                if ((entry & 3) == 1 && page < span.bus + span.size && span.bus < page + 4096) {
                    return true;
                }
            }
        }
        return false;
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        std::memcpy(into, back_.disk.data() + lba * 512, count * 512);
    }
    void close(u32, Status status) override { lane_.close(status, {Code::device_gone, "the test closes it"}); }
    void reclaim(u32) override {
        back_.forget();
        lane_.reclaim();
    }
    bool is_open(u32) override { return lane_.is_open(); }
    u32 in_flight(u32) override { return lane_.commands(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    fake::Machine m_{16u << 20};
    fake::Blkback back_;
    bool damaged_ = false;
    hv::xen::Port port_ = hv::xen::Port::none;
    io::QueueGroup group_;
    xen_blk::Lane lane_{m_.executor, group_, m_.guest.events(), m_.guest.grants()};
};

std::vector<Make> kinds() {
    std::vector<Make> all;
    const auto add = [&](const char* name, const Kind& kind) {
        all.push_back({name, XenBlkRig::facts(kind), [kind] { return std::make_unique<XenBlkRig>(kind); }});
    };
    add("plain", {});
    add("mapped", {.mapped = true});
    add("indirect", {.indirect = true});
    add("indirect_mapped", {.indirect = true, .mapped = true});
    add("persistent", {.persistent = true});
    add("persistent_indirect", {.persistent = true, .indirect = true});
    return all;
}
} // namespace

namespace fl::test::conformance {
CONFORM(XenBlk, kinds());
CONFORM(SharedXenBlk, shared({kinds().front()}));
} // namespace fl::test::conformance
