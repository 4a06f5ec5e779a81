// The AHCI port in the conformance suite: with NCQ, without, and with every transfer bounced.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
// depends on the includes above
#include "unit/drivers/ata_machine.hpp"
// depends on the includes above
#include "unit/drivers/ahci_fake.hpp"
import test.gtest;
import host.std;
import io.block_queue;
import io.slots;
#include "unit/io/block_conformance.hpp"

namespace {
using namespace ahci_test;
using namespace fl::test::conformance;
using io::Status;

struct Way {
    u32 depth = 0;
    bool bounced = false; // buffers lie above 4 GiB, out of the HBA's reach
    bool line = false;
};

class AhciRig final : public Rig {
  public:
    explicit AhciRig(Way way) {
        Port& port = m.add(0, sectors, 512, way.depth);
        if (way.bounced) {
            m.hba.cap &= 0x7fffffff;
        }
        if (way.line) {
            m.withhold(drivers::Feature::messages);
        }
        EXPECT_TRUE(m.attach());
        port.codes.reserve(1 << 16); // nothing is allocated while the driver runs
        if (way.bounced) {
            m.memory.high_bus = u64{1} << 32;
            // allocates the whole bounce buffer
            EXPECT_TRUE(m.read(m.disk(), 0, *m.memory.allocate(256 * 1024, ~u64{0})));
        }
        port.hold = true;
    }
    static Facts facts(Way way) {
        return {.capacity = way.bounced ? std::min(way.depth, 32u) : std::max(way.depth, 1u),
                .part_bytes = way.bounced ? 32 * 1024u : 512 * 1024u,
                .discard_bytes = 0,
                .discards = true,
                .copies = way.bounced,
                .drains = true,
                .withdraws = true,
                .retries = true,
                .retries_flush = false,
                .timeout = timeout,
                .timeouts = 16};
    }
    io::BlockDevice& disk(u32) override { return m.disk(); }
    void turn() override { m.executor.turn(); }
    Instant now() override { return m.executor.now(); }
    void jump(Nanoseconds length) override { m.clock.stop(length); }
    DmaAllocator& memory() override { return m.memory; }
    std::vector<Held> held() override {
        std::vector<Held> all;
        for (const Port::Command& c : port().held()) {
            if (c.code != 0x2f && c.code != 0xec) {
                all.push_back({c.op(), c.lba, c.count * 512});
            }
            if (c.op() == io::Op::discard) {
                std::array<u64, 64> ranges;
                std::memcpy(ranges.data(), m.memory.at(c.memory[0].first, 512), 512);
                all.back().lba = ranges[0] & 0xffff'ffff'ffff;
                all.back().bytes = 0;
                for (const u64 r : ranges) {
                    all.back().bytes += static_cast<u32>(r >> 48) * 512;
                }
            }
        }
        return all;
    }
    void answer(usize index, Status how) override {
        const InFake in_fake;
        port().answer(m.hba, index,
                      how == Status::ok                            ? Port::How::ok
                      : port().held()[index].op() <= io::Op::write ? Port::How::unreadable
                                                                   : Port::How::refused);
    }
    void answer_again(usize index) override {
        const InFake in_fake;
        port().answer(m.hba, index, Port::How::garbled);
    }
    void event(u32) override { m.hba.spurious(); }
    bool reachable(DmaSpan span) override { // a discarded range has no address
        return span.data != nullptr && port().reachable(span.bus, span.size);
    }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        for (u32 i = 0; i < count; ++i) {
            port().drive->read(lba + i, into + i * 512);
        }
    }
    void close(u32, Status status) override {
        m.disk().queue().close(status, {Code::device_gone, "the test closes it"});
    }
    void stop(u32) override { m.disk().close(); }
    void reclaim(u32) override {
        port().reset();
        m.disk().queue().reclaim();
    }
    bool is_open(u32) override { return m.disk().queue().is_open(); }
    u32 in_flight(u32) override { return m.disk().queue().in_flight(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    Port& port() { return m.hba.ports[0]; }
    Machine m{timeout};
};

Make rig(const char* name, Way way) {
    return {name, AhciRig::facts(way), [way] { return std::make_unique<AhciRig>(way); }};
}

} // namespace

namespace fl::test::conformance {
CONFORM(Ahci, {rig("ncq", {.depth = 32}), rig("ncq4_line", {.depth = 4, .line = true}), rig("no_ncq", {}),
               rig("below_4_gib", {.depth = 4, .bounced = true})});
CONFORM(SharedAhci, shared({rig("below_4_gib", {.depth = 4, .bounced = true})}));
} // namespace fl::test::conformance
