// Input of Xen's console against a fake xenconsoled: what is typed is taken, and Ctrl-C ends the machine.
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
import io.shutdown;
import hv.xen;
import drivers.driver;
import drivers.xen_console;

#include "unit/io/support.hpp"

#include "unit/hv/xen_fake.hpp"

namespace {
using namespace fl;
using drivers::xen_console::Console;

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

struct XenConsoleInput : testing::Test {
    static constexpr u32 in_consumer = 3072, in_producer = 3076; // in the page [xen-public io/console.h]

    fake::Machine m;
    NoDisks disks;
    Capture log;
    std::optional<io::Shutdown> shutdown;
    std::optional<drivers::Environment> environment;
    std::optional<Console> console;

    void connect(bool typed_before = false) {
        m.xen.console_port = 2;
        m.xen.console_status = 2; // bound by xenconsoled
        m.xen.give_console();
        // Free-running positions that soon pass 0.
        m.xen.console_word(in_consumer) = m.xen.console_word(in_producer) = 0xffffff00;
        ASSERT_TRUE(m.install());
        ASSERT_TRUE(m.start());
        if (typed_before) {
            put("\x03");
        }
        shutdown.emplace(m.executor);
        environment.emplace(drivers::Environment{.executor = m.executor,
                                                 .dma = m.xen.memory,
                                                 .interrupts = m.xen.interrupts,
                                                 .disks = disks,
                                                 .shutdown = &*shutdown});
        console.emplace(*environment, m.guest);
        ASSERT_TRUE(console->connect());
        settle();
    }
    static io::Task<Result<void>> wait(io::Executor& executor) {
        co_await executor.sleep(1'000'000);
        co_return Result<void>{};
    }
    void settle() { ASSERT_TRUE(m.run(wait(m.executor))); }
    /// As much as there is room for; returns what was not written.
    std::string_view put(std::string_view text) {
        u32& producer = m.xen.console_word(in_producer);
        for (; !text.empty() && producer - m.xen.console_word(in_consumer) < 1024; text.remove_prefix(1)) {
            m.xen.console_page[producer % 1024] = static_cast<std::byte>(text[0]);
            ++producer;
        }
        m.xen.raise(m.xen.console_port);
        return text;
    }
    void type(std::string_view text) {
        ASSERT_TRUE(put(text).empty());
        settle();
    }
    u32 untaken() { return m.xen.console_word(in_producer) - m.xen.console_word(in_consumer); }
};

TEST_F(XenConsoleInput, CtrlCEndsTheMachine) {
    connect();
    EXPECT_FALSE(shutdown->requested());
    type("now\x03");
    EXPECT_TRUE(shutdown->requested());
    EXPECT_EQ(shutdown->end(), io::Shutdown::End::off);
    EXPECT_EQ(shutdown->by(), "Ctrl-C at Xen's console");
    EXPECT_EQ(untaken(), 0u);
    const auto answered = [&](Nanoseconds bound) {
        return m.run([](io::Shutdown& s, io::Bound b) -> io::Task<Result<bool>> {
            co_return co_await s.await_answer(b);
        }(*shutdown, {m.executor, bound}));
    };
    EXPECT_FALSE(*answered(50'000'000)) << "before the disks are quiet";
    type("\x03"); // one that is impatient
    shutdown->quiesced(true);
    EXPECT_TRUE(*answered(50'000'000));
}

TEST_F(XenConsoleInput, WhatWasTypedBeforeCountsToo) {
    connect(true);
    EXPECT_TRUE(shutdown->requested());
}

TEST_F(XenConsoleInput, OtherKeysAreTakenAndIgnored) {
    connect();
    u32 events = m.xen.console_events;
    for (u32 round = 0; round < 3; ++round) { // past the end of the ring, and past position 0
        std::string text(1000, 'a');
        type(text);
        EXPECT_EQ(untaken(), 0u);
        EXPECT_GT(m.xen.console_events, events) << "the other end hears that there is room";
        events = m.xen.console_events;
    }
    EXPECT_FALSE(shutdown->requested());
    type(std::string(1023, 'b') + "\x03"); // a full ring, Ctrl-C in its last byte
    EXPECT_TRUE(shutdown->requested());
}

TEST_F(XenConsoleInput, AnEventWithoutInputIsAnsweredByNothing) {
    connect();
    const u32 events = m.xen.console_events;
    type("");
    EXPECT_EQ(m.xen.console_events, events);
}

TEST_F(XenConsoleInput, AnImpossiblePositionEndsTheInput) {
    connect();
    m.xen.console_word(in_producer) = m.xen.console_word(in_consumer) + 1025;
    m.xen.raise(m.xen.console_port);
    settle();
    EXPECT_TRUE(log.has("the console's input position is impossible"));
    EXPECT_FALSE(shutdown->requested());
    m.xen.console_word(in_producer) = m.xen.console_word(in_consumer);
    type("\x03");
    EXPECT_FALSE(shutdown->requested()) << "the port is masked";
}

TEST_F(XenConsoleInput, AGuestWithoutAConsoleHasNoSuchDevice) {
    ASSERT_TRUE(m.install());
    ASSERT_TRUE(m.start());
    EXPECT_EQ(m.guest.console_page(), nullptr);
    hv::DeviceList devices;
    ASSERT_TRUE(m.run(m.guest.enumerate(devices)));
    for (const auto& device : devices.all()) {
        EXPECT_NE(device.type.view(), "console");
    }
    shutdown.emplace(m.executor);
    environment.emplace(drivers::Environment{.executor = m.executor,
                                             .dma = m.xen.memory,
                                             .interrupts = m.xen.interrupts,
                                             .disks = disks,
                                             .shutdown = &*shutdown});
    console.emplace(*environment, m.guest);
    EXPECT_FALSE(console->connect());
}

} // namespace
