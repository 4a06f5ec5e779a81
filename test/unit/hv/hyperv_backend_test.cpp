#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.interrupt;
import core.log;
import core.cpuid;
import core.processor;
import io.executor;
import io.task;
import io.block;
import hv.hyperv;

#include "unit/io/support.hpp"

#include "unit/hv/hyperv_fake.hpp"

namespace {
using namespace fl;
using namespace fl::hv::hyperv;

TEST(HyperVBackend, WritesItsIdentityBeforeTheHypercallPage) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.install());
    ASSERT_GE(m.host.writes.size(), 2u);
    EXPECT_EQ(m.host.writes[0].first, 0x40000000u);
    EXPECT_NE(m.host.writes[0].second, 0u);
    EXPECT_EQ(m.host.writes[0].second >> 63, 1u);
    EXPECT_EQ(m.host.writes[1].first, 0x40000001u);
    EXPECT_EQ(m.host.writes[1].second, reinterpret_cast<u64>(hyperv_fake::Host::page) | 1);
}

TEST(HyperVBackend, LivesAtEveryBase) {
    for (const u32 base : {0x40000000u, 0x40000100u}) {
        hyperv_fake::Machine m(base);
        EXPECT_TRUE(hv::HyperV::recognises(m.sightings));
        EXPECT_TRUE(m.up()) << std::hex << base;
    }
}

TEST(HyperVBackend, WithoutHypercallsThereIsNothingToInstall) {
    hyperv_fake::Machine m(0x40000000, 0xe7f & ~(1u << 5));
    const auto installed = m.install();
    ASSERT_FALSE(installed);
    EXPECT_EQ(installed.error().code, Code::not_supported);
}

TEST(HyperVBackend, SynicIsSetUpAsTheSpecificationHasIt) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    EXPECT_EQ(m.host.msrs[0x40000083] & 1, 1u) << "message page";
    EXPECT_EQ(m.host.msrs[0x40000082] & 1, 1u) << "event page";
    EXPECT_NE(m.host.msrs[0x40000083] & ~u64{0xfff}, m.host.msrs[0x40000082] & ~u64{0xfff});
    EXPECT_EQ(m.host.msrs[0x40000080] & 1, 1u) << "control";
    EXPECT_EQ(m.host.msrs[0x40000092], 0x41u | 1u << 17) << "SINT2: vector, auto-EOI, not masked";
    EXPECT_FALSE(m.host.interrupts.eoi);
    EXPECT_EQ(m.guest.synic().vp_index(0), 7u);
}

TEST(HyperVBackend, NoAutoEoiWhereTheHostAdvisesAgainstIt) {
    hyperv_fake::Machine m(0x40000000, 0xe7f, 1u << 9);
    ASSERT_TRUE(m.start());
    EXPECT_EQ(m.host.msrs[0x40000092], 0x41u);
    EXPECT_TRUE(m.host.interrupts.eoi);
}

TEST(HyperVBackend, WithoutSynicItIsAClock) {
    hyperv_fake::Machine m(0x40000000, 0xe7f & ~(1u << 2));
    ASSERT_TRUE(m.start());
    EXPECT_EQ(m.guest.bus(), nullptr);
    hv::DeviceList list;
    EXPECT_TRUE(m.enumerate(list));
    EXPECT_EQ(list.count(), 0u);
    EXPECT_TRUE(m.guest.tsc_hz());
    EXPECT_TRUE(m.host.posted.empty());
}

// In any state, every function can be called, and in the end the host has none of the guest's pages.
void call_everything(hyperv_fake::Machine& m) {
    hv::DeviceList list;
    EXPECT_TRUE(m.enumerate(list));
    EXPECT_EQ(list.count(), m.guest.bus() != nullptr ? 1u : 0u);
    if (hv::HyperV::Timer* timer = m.guest.timer()) {
        m.host.interrupts.full = false;
        EXPECT_TRUE(timer->start([](void*) {}, nullptr));
        timer->arm(1000);
    }
    io::Executor other(m.clock.platform());
    set_this_processor(3);
    static_cast<void>(m.guest.join(3, other)); // memory may be short
    m.guest.leave(3);
    set_this_processor(0);
    m.guest.uninstall();
    EXPECT_EQ(m.guest.bus(), nullptr);
    for (const u32 number : {0x40000083u, 0x40000082u, 0x40000080u, 0x40000021u, 0x40000001u}) {
        EXPECT_EQ(m.host.msrs[number] & 1, 0u) << std::hex << number;
    }
    EXPECT_EQ(m.host.msrs[0x40000000], 0u);
}

TEST(HyperVBackend, BeforeInstallationCallsReportErrors) {
    hyperv_fake::Machine m;
    EXPECT_EQ(m.guest.bus(), nullptr);
    EXPECT_EQ(m.guest.timer(), nullptr);
    hv::Services services{m.host.interrupts, m.executor, 1'000'000};
    EXPECT_FALSE(m.guest.start(services));
    EXPECT_EQ(m.guest.bus(), nullptr);
    call_everything(m);
    EXPECT_TRUE(m.host.writes.empty());
}

TEST(HyperVBackend, InstalledAndNotStartedItHasNoBusAndNoTimer) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.install());
    EXPECT_EQ(m.guest.bus(), nullptr);
    EXPECT_EQ(m.guest.timer(), nullptr);
    call_everything(m);
}

TEST(HyperVBackend, AnyFailedStepFreesWhatItAllocated) {
    // In order: the hypercall page, the reference TSC page; then the bus's interrupt page, its monitor pages, and the
    // SynIC's pages.
    constexpr u32 pages = 5;
    for (u32 left = 0; left <= pages; ++left) {
        SCOPED_TRACE(left);
        hyperv_fake::Machine m;
        m.memory.left = left;
        EXPECT_EQ(static_cast<bool>(m.start()), left >= 1) << "without a page for hypercalls there is nothing";
        EXPECT_EQ(m.guest.bus() != nullptr, left == pages);
        EXPECT_EQ(m.guest.timer() != nullptr, left >= 1) << "direct mode needs no SynIC";
        if (m.guest.bus() == nullptr) {
            EXPECT_EQ(m.memory.outstanding, std::min(left, 2u)) << "what the bus took is free again";
            EXPECT_EQ(m.host.interrupts.handler, nullptr);
            EXPECT_EQ(m.host.msrs[0x40000080] & 1, 0u);
        }
        call_everything(m);
    }
}

TEST(HyperVBackend, WithoutAVectorOrTheHypercallPageToo) {
    {
        hyperv_fake::Machine m;
        m.host.interrupts.full = true;
        ASSERT_TRUE(m.start());
        EXPECT_EQ(m.guest.bus(), nullptr);
        EXPECT_EQ(m.memory.outstanding, 2u);
        EXPECT_EQ(m.host.msrs[0x40000080] & 1, 0u);
        call_everything(m);
    }
    {
        hyperv_fake::Machine m;
        m.host.hypercalls = false;
        EXPECT_EQ(m.start().error().code, Code::not_supported);
        EXPECT_EQ(m.guest.bus(), nullptr);
        EXPECT_EQ(m.guest.timer(), nullptr);
        EXPECT_EQ(m.memory.outstanding, 0u);
        call_everything(m);
    }
    { // a timer in message mode needs the SynIC, which did not start
        hyperv_fake::Machine m;
        m.cpuid.leaves[0].value.edx &= ~(1u << 19);
        m.host.interrupts.full = true;
        ASSERT_TRUE(m.start());
        EXPECT_EQ(m.guest.timer(), nullptr);
        call_everything(m);
    }
}

TEST(HyperVBackend, WithoutTheRegisterOfItsIndexAProcessorIsItsNumber) {
    hyperv_fake::Machine m(0x40000000, 0xe7f & ~(1u << 6));
    ASSERT_TRUE(m.up());
    EXPECT_EQ(m.guest.synic().vp_index(0), 0u);
}

TEST(HyperVBackend, TheFrequencyIsReadFromItsRegisterOrFromThePage) {
    {
        hyperv_fake::Machine m;
        m.host.msrs[0x40000022] = 2'600'000'000;
        ASSERT_TRUE(m.install());
        EXPECT_EQ(m.guest.tsc_hz(), 2'600'000'000u);
        EXPECT_EQ(m.guest.clock_name(), "Hyper-V frequency register");
    }
    { // a register with an invalid value: the page is used
        hyperv_fake::Machine m;
        m.host.msrs[0x40000022] = 12;
        ASSERT_TRUE(m.install());
        EXPECT_EQ(m.guest.clock_name(), "Hyper-V reference TSC");
    }
    {
        hyperv_fake::Machine m(0x40000000, 0xe7f & ~(1u << 11));
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.guest.tsc_hz());
        EXPECT_NEAR(static_cast<double>(*m.guest.tsc_hz()), 2e9, 2e3);
        EXPECT_EQ(m.guest.clock_name(), "Hyper-V reference TSC");
    }
    {
        hyperv_fake::Machine m(0x40000000, 0xe7f & ~(1u << 11));
        m.host.tsc_sequence = 0; // not valid
        ASSERT_TRUE(m.install());
        EXPECT_FALSE(m.guest.tsc_hz());
    }
}

TEST(HyperVClock, PageAndCounterHaveTheSameUnit) {
    hyperv_fake::Machine m;
    m.host.tsc_offset = 500;
    ASSERT_TRUE(m.install());
    EXPECT_TRUE(m.guest.clock().page_valid());
    // One second at 2 GHz is 10^7 units of 100 ns.
    EXPECT_NEAR(static_cast<double>(*m.guest.clock().now(2'000'000'000)), 1e7 + 500, 20);

    hyperv_fake::Machine without;
    without.host.tsc_sequence = 0;
    ASSERT_TRUE(without.install());
    EXPECT_FALSE(without.guest.clock().page_valid());
    EXPECT_EQ(without.guest.clock().now(2'000'000'000), 1010u) << "the counter's register";
}

TEST(HyperVClock, ScalesThatAreNoFrequencies) {
    EXPECT_FALSE(frequency_of_scale(0));
    EXPECT_FALSE(frequency_of_scale(1));
    EXPECT_FALSE(frequency_of_scale(~u64{0}));
    ASSERT_TRUE(frequency_of_scale(0x0147ae147ae147ae));
    EXPECT_NEAR(static_cast<double>(*frequency_of_scale(0x0147ae147ae147ae)), 2e9, 2);
}

TEST(HyperVSynic, MessagesAreCopiedEndedAndKeptInOrder) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    Synic& synic = m.guest.synic();
    for (u32 i = 0; i < 10; ++i) {
        m.host.send(hyperv_fake::Host::message(100 + i, {i}));
    }
    m.host.interrupt();
    SynicMessage message;
    for (u32 i = 0; i < 10; ++i) {
        ASSERT_TRUE(synic.next(message)) << i;
        EXPECT_EQ(message.size, 12u);
        u32 type;
        std::memcpy(&type, message.payload.data(), 4);
        EXPECT_EQ(type, 100 + i);
    }
    EXPECT_FALSE(synic.next(message));
    EXPECT_EQ(m.host.eoms, 9u) << "only where another one waited";
}

TEST(HyperVSynic, AFullQueueLosesNothing) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    constexpr u32 many = Synic::queue_length * 3;
    for (u32 i = 0; i < many; ++i) {
        m.host.send(hyperv_fake::Host::message(100 + i, {}));
    }
    m.host.interrupt();
    SynicMessage message;
    for (u32 i = 0; i < many; ++i) {
        ASSERT_TRUE(m.guest.synic().next(message)) << i;
        u32 type;
        std::memcpy(&type, message.payload.data(), 4);
        ASSERT_EQ(type, 100 + i);
        m.host.interrupt();
    }
    EXPECT_FALSE(m.guest.synic().next(message));
}

TEST(HyperVSynic, WorksWithInterruptsOff) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    m.host.interrupts_on = false;
    m.host.send(hyperv_fake::Host::message(5, {}));
    SynicMessage message;
    EXPECT_TRUE(m.guest.synic().next(message));
}

// next() takes messages from the slot, and each that follows interrupts it there. The last one must not stay in the
// slot: the host would wait for it, and no other interrupt comes.
TEST(HyperVSynic, AMessageThatInterruptsTheLookAtTheSlotIsTaken) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    constexpr u32 many = Synic::messages_per_interrupt + 2;
    static_assert(many < Synic::queue_length);
    m.host.interrupts_on = false;
    for (u32 i = 0; i < many; ++i) {
        m.host.send(hyperv_fake::Host::message(100 + i, {}));
    }
    m.host.interrupts_on = true;
    m.host.interrupts_at_once = true;
    m.host.pending_interrupt = false; // the first one's was lost: interrupts were off
    SynicMessage message;
    for (u32 i = 0; i < many; ++i) {
        ASSERT_TRUE(m.guest.synic().next(message)) << i;
        u32 type;
        std::memcpy(&type, message.payload.data(), 4);
        ASSERT_EQ(type, 100 + i);
        std::memcpy(&type, m.host.slot(), 4);
        ASSERT_EQ(type, 0u) << "left in the slot";
    }
}

TEST(HyperVSynic, EventsAreCountedForTheirChannel) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.guest.synic().watch(1000);
    m.host.raise(3);
    m.host.raise(1000);
    m.host.raise(1000);
    EXPECT_EQ(m.guest.synic().events(3).load(), 1u);
    EXPECT_EQ(m.guest.synic().events(1000).load(), 2u);
    EXPECT_EQ(m.guest.synic().events(1001).load(), 0u);
}

TEST(HyperVSynic, AMessageIsNotLongerThanItsSlot) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    m.host.send(hyperv_fake::Host::message(5, {}));
    m.host.slot()[4] = 255; // of at most 240 [TLFS HV_MESSAGE_HEADER]
    m.host.interrupt();
    SynicMessage message;
    ASSERT_TRUE(m.guest.synic().next(message));
    EXPECT_EQ(message.size, 240u);
}

TEST(HyperVSynic, StrayMessagesAreDroppedAndCounted) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    m.host.send(hyperv_fake::Host::message(5, {}));
    const u32 type = 0x12345;
    std::memcpy(m.host.slot(), &type, 4);
    m.host.interrupt();
    SynicMessage message;
    EXPECT_FALSE(m.guest.synic().next(message));
    EXPECT_EQ(m.guest.synic().unexpected_messages(), 1u);
    u32 now;
    std::memcpy(&now, m.host.slot(), 4);
    EXPECT_EQ(now, 0u) << "the slot is free for the next one";
}

TEST(HyperVSynic, AnotherProcessorJoinsAndLeaves) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.start());
    set_this_processor(3);
    m.host.msrs[0x40000002] = 9;
    const u64 first = m.host.msrs[0x40000083];
    io::Executor other(m.clock.platform());
    ASSERT_TRUE(m.guest.join(3, other));
    EXPECT_TRUE(m.guest.synic().enabled(3));
    EXPECT_EQ(m.guest.synic().vp_index(3), 9u);
    EXPECT_NE(m.host.msrs[0x40000083], first) << "pages of its own";
    m.guest.synic().watch(5);
    m.host.version = 0x00050003;
    m.host.raise(5);
    EXPECT_EQ(m.guest.synic().events(5).load(), 1u);
    m.guest.leave(3);
    EXPECT_EQ(m.host.msrs[0x40000083] & 1, 0u);
    EXPECT_EQ(m.host.msrs[0x40000092] >> 16 & 1, 1u) << "masked";
    EXPECT_FALSE(m.guest.synic().enabled(3));
    set_this_processor(0);
}

TEST(HyperVTimer, DirectAndByMessage) {
    static int fired;
    fired = 0;
    const auto handler = [](void*) { ++fired; };
    {
        hyperv_fake::Machine m;
        ASSERT_TRUE(m.start());
        ASSERT_NE(m.guest.timer(), nullptr);
        ASSERT_TRUE(m.guest.timer()->start(handler, nullptr));
        EXPECT_EQ(m.host.msrs[0x400000b0], 1u << 12 | u64{0x41} << 4 | 1u << 3) << "direct, vector, enabled by a count";
        m.guest.timer()->arm(1'000'000);
        EXPECT_EQ(m.host.msrs[0x400000b1], 1010u + 10'000u) << "absolute, in 100 ns";
    }
    {
        hyperv_fake::Machine m;
        m.cpuid.leaves[0].value.edx &= ~(1u << 19);
        ASSERT_TRUE(m.start());
        ASSERT_TRUE(m.guest.timer()->start(handler, nullptr));
        EXPECT_EQ(m.host.msrs[0x400000b0], u64{2} << 16 | 1u << 3) << "by SINT2";
        m.host.send(hyperv_fake::Host::message(0, {}));
        const u32 type = 0x80000010;
        std::memcpy(m.host.slot(), &type, 4);
        m.host.interrupt();
        EXPECT_EQ(fired, 1);
    }
}

TEST(HyperVBackend, UninstallLeavesNothing) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.guest.uninstall();
    EXPECT_EQ(m.host.of(16).size(), 1u) << "unload";
    for (const u32 number : {0x40000083u, 0x40000082u, 0x40000080u, 0x40000021u, 0x40000001u}) {
        EXPECT_EQ(m.host.msrs[number] & 1, 0u) << std::hex << number;
    }
    EXPECT_EQ(m.host.msrs[0x40000000], 0u);
    const usize writes = m.host.writes.size();
    m.guest.uninstall();
    EXPECT_EQ(m.host.of(16).size(), 1u) << "once";
    EXPECT_LE(m.host.writes.size(), writes + 2);
}

TEST(HyperVBackend, UninstallDoesNotWaitForEver) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.host.answers_unload = false;
    m.clock.step = 10'000;
    const Instant before = m.clock.time;
    m.guest.uninstall();
    EXPECT_LT(m.clock.time - before, 2'000'000'000u);
}

// The machine is stopped between any two readings of the clock: each stop counts as one step of the clock, and the wait
// restarts after it until it is twice as long. So the host is polled about twenty times within a bound of a second.
TEST(HyperVBackend, UninstallDoesNotTakeAStopForSilence) {
    hyperv_fake::Machine m;
    ASSERT_TRUE(m.up());
    m.host.answers_unload = false;
    m.clock.step = 7'000'000'000;
    const Instant before = m.clock.time;
    m.guest.uninstall();
    EXPECT_GE(m.clock.time - before, 19 * m.clock.step);
    EXPECT_LE(m.clock.time - before, 22 * m.clock.step);
}

} // namespace
