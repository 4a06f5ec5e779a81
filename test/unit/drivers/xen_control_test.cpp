// The control device against the fake XenStore: what each request leads to, and what the toolstack sees of it.
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
import core.panic;
import io.executor;
import io.task;
import io.block;
import io.shutdown;
import hv.xen;
import drivers.driver;
import drivers.xen_control;

#include "unit/io/support.hpp"

#include "unit/hv/xen_fake.hpp"

namespace {
using namespace fl;
using drivers::xen_control::Control;

struct NoDisks final : drivers::DiskSink {
    bool offered(u32) override { return false; }
    FixedText<16> free_name(std::string_view) override { return {}; }
    Result<void> announce(io::BlockDevice&, u32) override { return {}; }
};

struct Capture final : log::Sink {
    Capture() { log::attach(*this); }
    ~Capture() { log::detach(*this); }
    void write(std::string_view t) override { text += t; }
    bool has(std::string_view part) const { return text.find(part) != std::string::npos; }
    std::string text;
};

struct XenControl : testing::Test {
    fake::Machine m;
    NoDisks disks;
    Capture log;
    std::optional<io::Shutdown> shutdown;
    std::optional<drivers::Environment> environment;
    std::optional<Control> control;

    void SetUp() override {
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
        m.xen.set("control/shutdown", "");
        shutdown.emplace(m.executor);
        environment.emplace(drivers::Environment{.executor = m.executor,
                                                 .dma = m.xen.memory,
                                                 .interrupts = m.xen.interrupts,
                                                 .disks = disks,
                                                 .shutdown = &*shutdown});
        control.emplace(*environment, m.guest);
        ASSERT_TRUE(m.run(control->connect()));
        settle();
    }
    void TearDown() override {
        EXPECT_TRUE(m.run(control->disconnect()));
        for (const auto& [path, token] : m.xen.watches) {
            EXPECT_EQ(path.find("/control"), std::string::npos) << path; // only the bus's own is left
        }
    }
    static io::Task<Result<void>> wait(io::Executor& executor) {
        co_await executor.sleep(100'000'000);
        co_return Result<void>{};
    }
    void settle() { ASSERT_TRUE(m.run(wait(m.executor))); }
};

TEST_F(XenControl, AnnouncesWhatItCanDo) {
    EXPECT_EQ(m.xen.get("control/feature-poweroff"), "1");
    EXPECT_EQ(m.xen.get("control/feature-reboot"), "1");
    EXPECT_EQ(m.xen.get("control/feature-suspend"), "1");
    EXPECT_FALSE(shutdown->requested());
}

TEST_F(XenControl, EachRequestEndsTheMachineAsItSays) {
    for (const auto& [text, end] : {std::pair("poweroff", io::Shutdown::End::off),
                                    {"halt", io::Shutdown::End::off},
                                    {"reboot", io::Shutdown::End::restart}}) {
        if (shutdown->requested()) { // one request for each machine
            TearDown();
            control.reset();
            shutdown.emplace(m.executor);
            control.emplace(*environment, m.guest);
            ASSERT_TRUE(m.run(control->connect()));
        }
        m.xen.set("control/shutdown", text);
        settle();
        EXPECT_TRUE(shutdown->requested()) << text;
        EXPECT_EQ(shutdown->end(), end) << text;
        EXPECT_EQ(shutdown->by(), "Xen's toolstack");
        EXPECT_TRUE(m.xen.tree.contains(m.xen.full("control/shutdown")));
        EXPECT_EQ(m.xen.get("control/shutdown"), "") << "confirmed";
    }
}

TEST_F(XenControl, TheMachineEndsOnlyWhenTheDisksAreQuiet) {
    m.xen.set("control/shutdown", "poweroff");
    settle();
    const auto answered = [&](Nanoseconds bound) {
        return m.run([](io::Shutdown& s, io::Bound b) -> io::Task<Result<bool>> {
            co_return co_await s.await_answer(b);
        }(*shutdown, {m.executor, bound}));
    };
    EXPECT_FALSE(*answered(50'000'000));
    shutdown->quiesced(true);
    EXPECT_TRUE(*answered(50'000'000));
}

TEST_F(XenControl, ARequestInConflictIsReadAgain) {
    m.xen.conflicts = 3;
    m.xen.set("control/shutdown", "reboot");
    settle();
    EXPECT_TRUE(shutdown->requested());
    EXPECT_EQ(m.xen.get("control/shutdown"), "");
}

TEST_F(XenControl, ARequestThatKeepsChangingIsGivenUp) {
    m.xen.conflicts = 1000;
    m.xen.set("control/shutdown", "reboot");
    settle();
    EXPECT_FALSE(shutdown->requested());
    EXPECT_TRUE(log.has("the toolstack keeps changing its request"));
    EXPECT_EQ(m.xen.conflicts, 1000u - hv::xen::Store::transaction_tries);
}

TEST_F(XenControl, UnknownRequestsAreLeftAsTheyAre) {
    for (const char* text :
         {"suspended", "s3", "powerof", "poweroff-now", "a request that is longer than any that is known"}) {
        m.xen.set("control/shutdown", text);
        settle();
        EXPECT_FALSE(shutdown->requested()) << text;
        EXPECT_EQ(m.xen.get("control/shutdown"), text);
        EXPECT_TRUE(log.has("left unanswered")) << text;
        log.text.clear();
    }
    m.xen.set("control/shutdown", "poweroff");
    settle();
    EXPECT_TRUE(shutdown->requested()) << "and a known one is still seen";
}

TEST_F(XenControl, ASuspensionIsConfirmedAndTheJobGoesOn) {
    m.xen.on_suspend = [&] {
        EXPECT_EQ(m.xen.get("control/shutdown"), "") << "confirmed before";
        return i64{1};
    };
    m.xen.set("control/shutdown", "suspend");
    settle();
    EXPECT_FALSE(shutdown->requested());
    EXPECT_TRUE(log.has("the toolstack has cancelled the suspension"));
    m.xen.on_suspend = [&] {
        m.xen.move_to_another_domain();
        for (const char* feature : {"poweroff", "reboot", "suspend"}) {
            m.xen.tree.erase(m.xen.full(std::string("control/feature-") + feature));
        }
        return i64{0};
    };
    m.xen.set("control/shutdown", "suspend");
    settle();
    EXPECT_FALSE(shutdown->requested());
    for (const char* feature : {"poweroff", "reboot", "suspend"}) {
        EXPECT_EQ(m.xen.get(std::string("control/feature-") + feature), "1") << "announced in the new domain";
    }
    m.xen.on_suspend = nullptr;
    m.xen.set("control/shutdown", "poweroff");
    settle();
    EXPECT_TRUE(shutdown->requested()) << "the watch is there again";
}

TEST_F(XenControl, ARequestBeforeTheWatchIsSeen) {
    fake::Machine other;
    ASSERT_TRUE(other.install());
    ASSERT_TRUE(other.start());
    other.xen.set("control/shutdown", "reboot");
    io::Shutdown wanted(other.executor);
    drivers::Environment with{.executor = other.executor,
                              .dma = other.xen.memory,
                              .interrupts = other.xen.interrupts,
                              .disks = disks,
                              .shutdown = &wanted};
    Control early(with, other.guest);
    ASSERT_TRUE(other.run(early.connect()));
    ASSERT_TRUE(other.run(wait(other.executor)));
    EXPECT_TRUE(wanted.requested());
    EXPECT_EQ(other.xen.get("control/shutdown"), "");
    EXPECT_TRUE(other.run(early.disconnect()));
}

// Nothing is read, and so nothing allocated, while a job is measured.
TEST_F(XenControl, ConnectingLeavesNothingToDo) {
    fake::Machine other;
    ASSERT_TRUE(other.install());
    ASSERT_TRUE(other.start());
    other.xen.set("control/shutdown", "");
    io::Shutdown unused(other.executor);
    drivers::Environment with{.executor = other.executor,
                              .dma = other.xen.memory,
                              .interrupts = other.xen.interrupts,
                              .disks = disks,
                              .shutdown = &unused};
    Control idle(with, other.guest);
    ASSERT_TRUE(other.run(idle.connect()));
    const auto before = other.xen.requests;
    ASSERT_TRUE(other.run(wait(other.executor)));
    EXPECT_EQ(other.xen.requests, before);
    EXPECT_TRUE(other.run(idle.disconnect()));
}

TEST_F(XenControl, AWithdrawnRequestIsNoRequest) {
    m.xen.tree.erase(m.xen.full("control/shutdown"));
    m.xen.changed(m.xen.full("control/shutdown"));
    settle();
    m.xen.set("control/shutdown", "");
    settle();
    EXPECT_FALSE(shutdown->requested());
    EXPECT_FALSE(log.has("xen_control:"));
}

TEST_F(XenControl, KeysAreNamedAndTakenOnce) {
    m.xen.set("control/sysrq", "h");
    settle();
    EXPECT_TRUE(log.has("sysrq 'h'"));
    EXPECT_EQ(m.xen.get("control/sysrq"), "");
    log.text.clear();
    settle();
    EXPECT_FALSE(log.has("sysrq"));
    m.xen.set("control/sysrq", "longer than a key");
    settle();
    EXPECT_FALSE(shutdown->requested());
}

TEST_F(XenControl, WithoutAWayToShutDownNothingIsAnnounced) {
    fake::Machine other;
    ASSERT_TRUE(other.install());
    ASSERT_TRUE(other.start());
    drivers::Environment without{
        .executor = other.executor, .dma = other.xen.memory, .interrupts = other.xen.interrupts, .disks = disks};
    Control idle(without, other.guest);
    EXPECT_EQ(other.run(idle.connect()).error().code, Code::not_supported);
    EXPECT_EQ(other.xen.get("control/feature-poweroff"), "");
    EXPECT_TRUE(other.xen.watches.empty());
}

TEST_F(XenControl, AStoreThatRefusesWatchesIsAnError) {
    fake::Machine other;
    ASSERT_TRUE(other.install());
    ASSERT_TRUE(other.start());
    other.xen.refuse_watches = true;
    drivers::Environment with{.executor = other.executor,
                              .dma = other.xen.memory,
                              .interrupts = other.xen.interrupts,
                              .disks = disks,
                              .shutdown = &*shutdown};
    Control refused(with, other.guest);
    EXPECT_FALSE(other.run(refused.connect()));
}

TEST_F(XenControl, IsADeviceOfTheBus) {
    const auto controls = [&] {
        hv::DeviceList list;
        EXPECT_TRUE(m.run(m.guest.enumerate(list)));
        return std::ranges::count(list.all(), "control",
                                  [](const auto& device) { return std::string(device.type.view()); });
    };
    EXPECT_EQ(controls(), 1);
    std::erase_if(m.xen.tree, [](const auto& node) { return node.first.find("/control/") != std::string::npos; });
    EXPECT_EQ(controls(), 0);
}

} // namespace
