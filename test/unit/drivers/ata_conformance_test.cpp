// The IDE channel in the conformance suite: one command at a time, adjacent requests gathered, recovery by a reset.
#include "gtest_macros.hpp"

#include "unit/drivers/ata_fake.hpp"
#include "unit/drivers/pci_fake.hpp"
// depends on the includes above
#include "unit/drivers/ata_machine.hpp"
import test.gtest;
import host.std;
import io.block_queue;
import io.slots;
#include "unit/io/block_conformance.hpp"

namespace {
using namespace ata_test;
using namespace fl::test::conformance;
using io::Status;

class AtaRig final : public Rig {
  public:
    // `high`: buffers lie above 4 GiB, and every transfer is bounced.
    explicit AtaRig(bool native, bool high = false) {
        Drive& drive = m.add(m.primary, 0, sectors);
        drive.id.words[83] = 0x5000; // no 48-bit commands: 256 sectors each
        drive.id.words[86] = 0x1000;
        if (native) {
            m.set_native();
        }
        EXPECT_TRUE(m.attach());
        m.primary.codes.reserve(1 << 16); // nothing is allocated while the driver runs
        if (high) {
            m.memory.high_bus = u64{1} << 32;
            EXPECT_TRUE(m.read(m.disk(0), 0, *m.memory.allocate(4096, ~u64{0}))); // allocates the bounce buffer
        }
        m.primary.hold = true;
    }
    static Facts facts(bool high) {
        return {.capacity = 1,
                .part_bytes = high ? 64 * 1024u : 256 * 512u,
                .gathers = true,
                .copies = high,
                .retries = true,
                .retries_flush = false,
                .timeout = timeout,
                .timeouts = 16};
    }
    io::BlockDevice& disk(u32) override { return m.disk(0); }
    void turn() override { m.executor.turn(); }
    Instant now() override { return m.executor.now(); }
    void jump(Nanoseconds length) override { m.clock.stop(length); }
    DmaAllocator& memory() override { return m.memory; }
    std::vector<Held> held() override {
        const auto t = m.primary.held();
        if (!t) {
            return {};
        }
        return {{t->count == 0 ? io::Op::flush : t->is_write ? io::Op::write : io::Op::read, t->lba, t->count * 512}};
    }
    void answer(usize, Status how) override {
        const auto t = m.primary.held();
        if (how != Status::ok && t->count == 0) {
            m.primary.abort = 1;
        } else if (how != Status::ok) {
            m.primary.bad.insert(t->lba);
        }
        m.primary.release();
        m.primary.bad.clear();
    }
    void answer_again(usize) override {
        m.primary.crc_error = 1;
        m.primary.release();
    }
    void event(u32) override { m.primary.raise_line(); }
    bool reachable(DmaSpan span) override { return m.primary.reachable(span.bus, span.size); }
    void read_medium(u64 lba, u32 count, std::byte* into) override {
        for (u32 i = 0; i < count; ++i) {
            m.primary.drives[0]->read(lba + i, into + i * 512);
        }
    }
    void close(u32, Status status) override { core().close(status, {Code::device_gone, "the test closes it"}); }
    void stop(u32) override { m.queue().close(); }
    void reclaim(u32) override { core().reclaim(); } // a channel that was reset has no command
    bool is_open(u32) override { return m.queue().is_open(); }
    u32 in_flight(u32) override { return m.queue().in_flight(); }

  private:
    static constexpr Nanoseconds timeout = 200'000'000;
    io::QueueCore& core() { return m.queue(); }
    Machine m{timeout};
};

} // namespace

namespace fl::test::conformance {
CONFORM(Ata, {Make{"isa", AtaRig::facts(false), [] { return std::make_unique<AtaRig>(false); }},
              Make{"native", AtaRig::facts(false), [] { return std::make_unique<AtaRig>(true); }},
              Make{"above_4_gib", AtaRig::facts(true), [] { return std::make_unique<AtaRig>(true, true); }}});
CONFORM(SharedAta, shared({Make{"native", AtaRig::facts(false), [] { return std::make_unique<AtaRig>(true); }}}));
} // namespace fl::test::conformance
