// The debug checks that a release image omits: each ends the program when its rule is violated.
#include "gtest_macros.hpp"
#include "unit/panic_prints.hpp"
import test.gtest;
import host.std;
import core.check;
import core.dma;
import core.log;
import core.processor;
import core.result;
import core.text;
import core.time;
import io.block;
import io.executor;
import io.task;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using test::panic_prints;

static_assert(checks_enabled);

struct Checks : testing::Test {
    test::FakeMachine machine;
    io::Executor executor{machine.platform()};
};

struct Idle final : io::Service {
    bool drain() override { return false; }
};

TEST_F(Checks, AServiceIsTouchedOnItsProcessor) {
    Idle service;
    executor.add(service);
    executor.touch(service); // on the right executor nothing happens
    EXPECT_DEATH(
        {
            panic_prints();
            set_this_processor(1);
            executor.touch(service);
        },
        "on its own processor");
    EXPECT_DEATH(
        {
            panic_prints();
            set_this_processor(1);
            executor.poll(service);
        },
        "on its own processor");
    EXPECT_DEATH(
        {
            panic_prints();
            set_this_processor(1);
            executor.remove(service);
        },
        "on its own processor");
    executor.remove(service);
}

TEST_F(Checks, ACoroutineIsMadeReadyOnItsProcessor) {
    io::ReadyNode node;
    EXPECT_DEATH(
        {
            panic_prints();
            set_this_processor(1);
            executor.make_ready(node);
        },
        "on its own processor");
}

TEST_F(Checks, ARequestIsDestroyedOnItsLanesProcessor) {
    std::array<std::byte, 4096> storage{};
    test::MemoryDisk disk(executor, storage.data(), storage.size());
    disk.behaviour.never_answers = true;
    EXPECT_DEATH(
        {
            panic_prints();
            io::BlockDevice::Transfer transfer(disk, io::Op::flush, 0, {});
            disk.submit(transfer);
            set_this_processor(1);
        },
        "on its lane's processor");
}

io::Task<Result<void>> take(test::FakeMachine& machine, Nanoseconds length) {
    machine.time += length;
    co_return Result<void>{};
}

TEST_F(Checks, ATurnEndsWithinItsBudget) {
    io::Platform platform = machine.platform();
    platform.turn_budget = 50'000'000;
    io::Executor bounded(platform);
    EXPECT_TRUE(bounded.run(take(machine, 49'000'000)));
    EXPECT_DEATH(
        {
            panic_prints();
            static_cast<void>(bounded.run(take(machine, 51'000'000)));
        },
        "a turn ends within its budget");
}

} // namespace
