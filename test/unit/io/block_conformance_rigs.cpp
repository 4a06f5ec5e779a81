// Every registered rig meets every case of the conformance suite that it can express; and rigs behind a shared lane.
// The suites are instantiated here, once: doing so in each driver's test took it three times as long to compile.
#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.time;
import core.dma;
import io.executor;
import io.block;
import io.block_queue;
import io.shared_lane;

#include "unit/io/block_conformance.hpp"
// depends on the include above
#include "unit/io/block_conformance_cases.hpp"

namespace fl::test::conformance {

namespace {
std::deque<Make>& registered() { // entries stay where they are: the tests' parameters point at them
    static std::deque<Make> all; // registrations run before main()
    return all;
}

// Home and target are one processor here; unit/io/shared_lane_test.cpp and test/model/executor_tsan.cpp have two.
class SharedRig final : public Rig {
  public:
    /// `way`: how far completions have come after drain(): 1: at the target's queue, 2: being sent home.
    SharedRig(std::unique_ptr<Rig> inner, u32 way)
        : inner_(std::move(inner)), lane_(inner_->disk(0).executor(), inner_->disk(0)), way_(way) {}
    ~SharedRig() {
        for (u32 i = 0; i < 3; ++i) { // answers to `forget`
            inner_->turn();
        }
    }
    io::BlockDevice& disk(u32) override { return lane_; }
    void enter(u32) override { inner_->enter(0); }
    /// With the further turns that posts take on their way; no time passes in these.
    void turn() override {
        io::Executor& executor = lane_.executor();
        const u64 slept = executor.idles();
        inner_->turn();
        const auto on_the_way = [&] {
            const u64 sent = std::min<u64>(lane_.in_flight(), io::SharedLane::max_forwarded);
            return executor.idles() == slept || sent > inner_->disk(0).in_flight();
        };
        for (u32 i = 0; i < 2 && on_the_way(); ++i) {
            inner_->turn();
        }
    }
    void drain() override {
        for (u32 i = 0; i < way_; ++i) {
            inner_->turn();
        }
    }
    Instant now() override { return inner_->now(); }
    void jump(Nanoseconds length) override { inner_->jump(length); }
    DmaAllocator& memory() override { return inner_->memory(); }
    std::vector<Held> held() override { return inner_->held(); }
    void answer(usize index, io::Status how) override { inner_->answer(index, how); }
    void answer_again(usize index) override { inner_->answer_again(index); }
    void answer_wrongly(u32 kind) override { inner_->answer_wrongly(kind); }
    void event(u32) override { inner_->event(0); }
    u32 resets() override { return inner_->resets(); }
    bool reachable(DmaSpan span) override { return inner_->reachable(span); }
    void read_medium(u64 lba, u32 count, std::byte* into) override { inner_->read_medium(lba, count, into); }
    void close(u32, io::Status status) override { inner_->close(0, status); }
    void stop(u32) override { inner_->stop(0); }
    void reclaim(u32) override { inner_->reclaim(0); }
    bool is_open(u32) override { return inner_->is_open(0); }
    u32 in_flight(u32) override { return inner_->in_flight(0); }

  private:
    std::unique_ptr<Rig> inner_;
    io::SharedLane lane_;
    u32 way_;
};
} // namespace

Registration::Registration(const char* driver, std::vector<Make> rigs) {
    for (Make& rig : rigs) {
        rig.name = std::string(driver) + "_" + rig.name;
        registered().push_back(std::move(rig));
    }
}

std::vector<Make> shared(const std::vector<Make>& all) {
    std::vector<Make> made;
    for (const Make& of : all) {
        Facts facts = of.facts;
        facts.forwarded = true;
        facts.capacity = std::min(facts.capacity, io::SharedLane::max_forwarded);
        facts.exchanges = 0;
        facts.faults.clear();
        facts.elsewhere = false;
        for (u32 way = 1; way <= 2; ++way) {
            made.push_back({of.name + "_" + std::to_string(way), facts,
                            [of, way] { return std::make_unique<SharedRig>(of.make(), way); }});
        }
    }
    return made;
}

namespace {
template <class Fixture>
std::vector<const Make*> fitting() {
    std::vector<const Make*> some;
    for (const Make& rig : registered()) {
        if (Fixture::fits(rig.facts)) {
            some.push_back(&rig);
        }
    }
    return some;
}
std::string name_of(const testing::TestParamInfo<const Make*>& info) { return info.param->name; }
} // namespace

// GoogleTest calls the generators when it registers the tests, in main().
#define RUN_ON_RIGS(fixture) INSTANTIATE_TEST_SUITE_P(, fixture, testing::ValuesIn(fitting<fixture>()), name_of)
RUN_ON_RIGS(BlockConformance);
RUN_ON_RIGS(BlockConformanceHeld);
RUN_ON_RIGS(BlockConformanceParts);
RUN_ON_RIGS(BlockConformanceGather);
RUN_ON_RIGS(BlockConformanceIds);
RUN_ON_RIGS(BlockConformanceEvents);
RUN_ON_RIGS(BlockConformanceResets);
RUN_ON_RIGS(BlockConformanceStop);
RUN_ON_RIGS(BlockConformanceExchanges);
RUN_ON_RIGS(BlockConformanceFaults);
RUN_ON_RIGS(BlockConformanceElsewhere);
RUN_ON_RIGS(BlockConformanceLanes);

} // namespace fl::test::conformance
