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
import hv.xen;
import hv.xen.console;

#include "unit/hv/xen_fake.hpp"

namespace {
using namespace fl;
using hv::xen::ConsoleRing;
using hv::xen::Consoles;

// ---- finding the consoles ----

struct Machine {
    u32 base = 0x40000000;
    bool hypervisor = true;
    bool leaves = true;
    u32 executed = 0;
};
Machine machine;

CpuidRegisters cpuid(u32 leaf, u32 subleaf) {
    ++machine.executed;
    if (leaf == 1) {
        return {0, 0, machine.hypervisor ? 1u << 31 : 0, 0};
    }
    if (machine.leaves && leaf == machine.base) {
        return {machine.base + 5, 0x566e6558, 0x65584d4d, 0x4d4d566e};
    }
    if (leaf == 0x40000000) { // Hyper-V's leaves, before Xen's
        return {0x40000005, 0x7263694d, 0x666f736f, 0x76482074};
    }
    if (machine.leaves && leaf == machine.base + 2) {
        return {1, 0x40000200, 0, 0};
    }
    if (machine.leaves && leaf == machine.base + 3 && subleaf == 0) {
        return {0, 0, 2'400'000, 0};
    }
    return {};
}

struct XenConsole : testing::Test {
    fake::Xen xen;
    ConsoleRing ring;
    static inline u64 now = 0;

    void SetUp() override {
        machine = {};
        now = 0;
        xen.console_answer = -1; // a release build of Xen: guests may not write through this call
        xen.give_console();
    }
    Consoles find() { return hv::xen::find_consoles(cpuid, xen.cpu, xen.gate(), 0x234000); }
    void open() {
        const Consoles found = find();
        ASSERT_EQ(found.ring, xen.console_frame * 4096);
        // One cycle per clock reading: a thousand of them are a millisecond.
        ring.open(found.calls, xen.memory.at(found.ring), found.port, [] { return ++now; }, 1000);
    }
};

TEST_F(XenConsole, IsFoundByThreeLeavesAndAFewCalls) {
    for (const u32 base : {0x40000000u, 0x40000100u}) {
        machine = {.base = base};
        const Consoles found = find();
        EXPECT_TRUE(found.found);
        EXPECT_FALSE(found.emulated);
        EXPECT_EQ(found.ring, xen.console_frame * 4096);
        EXPECT_EQ(to_underlying(found.port), 2u);
        EXPECT_EQ(found.tsc_khz, 2'400'000u);
        EXPECT_LE(machine.executed, 5u) << "each of them is an exit";
    }
    EXPECT_EQ(xen.yields, 0u);
}

TEST_F(XenConsole, NothingIsTouchedWhereThereIsNoXen) {
    for (const Machine& none : {Machine{.hypervisor = false}, Machine{.leaves = false}, Machine{.base = 0x40000200}}) {
        machine = none;
        EXPECT_FALSE(find().found);
    }
    EXPECT_TRUE(xen.cpu.msrs.empty());
    EXPECT_TRUE(xen.calls.empty());
}

TEST_F(XenConsole, ARingWithoutAReaderIsNotUsed) {
    xen.console_status = 1;
    EXPECT_NE(find().ring, 0u) << "xenconsoled may be about to come";
    xen.console_answer = -38;
    EXPECT_TRUE(find().emulated);
    EXPECT_EQ(find().ring, 0u) << "under an emulation none is";
    xen.console_status = 2;
    EXPECT_NE(find().ring, 0u) << "but for a device model that has bound it";
    xen.console_answer = -1;
    xen.console_status = 0;
    EXPECT_EQ(find().ring, 0u) << "a port that is not open";
    xen.status_answer = -38;
    EXPECT_NE(find().ring, 0u) << "a Xen that does not report it";
    xen.console_port = 5000;
    EXPECT_EQ(find().ring, 0u);
    xen.console_port = 2;
    xen.console_frame = u64{1} << 41;
    EXPECT_EQ(find().ring, 0u);
    xen.console_frame = 0;
    EXPECT_TRUE(find().found);
    EXPECT_EQ(find().ring, 0u);
    xen.version = -38;
    EXPECT_FALSE(find().found);
}

// ---- the ring ----

TEST_F(XenConsole, LinesForATerminalOneNotificationEach) {
    open();
    ring.write("[   0.001] hello\n");
    ring.write("@{\"record\":\"x\"}\n\npanic: y\n");
    EXPECT_EQ(xen.console_events, 2u);
    EXPECT_TRUE(xen.read_console());
    EXPECT_EQ(xen.console_text, "[   0.001] hello\r\n@{\"record\":\"x\"}\r\n\r\npanic: y\r\n");
    EXPECT_EQ(xen.yields, 0u);
    EXPECT_EQ(xen.console_word(3072) | xen.console_word(3076), 0u) << "the other direction is not touched";
}

TEST_F(XenConsole, WaitsForASlowReaderAndLosesNothing) {
    open();
    xen.on_yield = [this] { xen.read_console(7); };
    std::string all;
    for (u32 i = 0; i < 200; ++i) {
        const std::string line = std::to_string(i) + std::string(i * 13 % 600, 'x');
        ring.write(line + "\n");
        all += line + "\r\n";
    }
    ring.flush();
    EXPECT_EQ(xen.console_word(3080), xen.console_word(3084)) << "flush() returns when all has been read";
    EXPECT_TRUE(xen.console_text == all);
    EXPECT_EQ(ring.lost(), 0u);
}

TEST_F(XenConsole, ALineLongerThanTheRing) {
    open();
    xen.on_yield = [this] { xen.read_console(); };
    const std::string line(10'000, 'y');
    ring.write(line + "\n");
    ring.flush();
    EXPECT_TRUE(xen.console_text == line + "\r\n");
}

TEST_F(XenConsole, AReaderThatNeverReadsCostsOneBound) {
    open();
    for (u32 i = 0; i < 1000; ++i) {
        ring.write(std::string(100, 'z') + "\n");
    }
    const u64 timeout = ConsoleRing::timeout_ms * 1000;
    EXPECT_LT(now, timeout + 10'000) << "one wait, not one for each line";
    EXPECT_GT(now, timeout - 10'000);
    EXPECT_EQ(ring.lost(), 92 + 979 * 101u)
        << "what did not fit: 20 lines of 102 bytes with their ends did, and 8 bytes of the next one";
    ring.flush(); // once more, in case the reader has appeared
    EXPECT_LT(now, 2 * timeout + 20'000);
    xen.read_console();
    EXPECT_EQ(xen.console_text.size(), 2048u);
    ring.write("here again\n");
    xen.read_console();
    EXPECT_NE(xen.console_text.find("bytes are lost here: this console was not read]\r\nhere again\r\n"),
              std::string::npos);
    EXPECT_LT(now, 2 * timeout + 20'000);
}

// The machine, and with it the reader, is stopped for a minute while the ring is full: nothing is lost because of that.
TEST_F(XenConsole, AStopOfTheMachineIsNoAbsentReader) {
    open();
    u32 looks = 0;
    xen.on_yield = [this, &looks] {
        if (++looks == 3) {
            now += 60'000 * 1000; // a thousand for a millisecond
        } else if (looks > 5) {
            xen.read_console();
        }
    };
    const std::string line(5'000, 's');
    ring.write(line + "\n");
    ring.flush();
    EXPECT_GT(looks, 5u);
    EXPECT_EQ(ring.lost(), 0u);
    EXPECT_TRUE(xen.console_text == line + "\r\n");
}

// A reader whose position changes constantly to invalid values.
TEST_F(XenConsole, AReaderThatMovesForEverCostsOneBound) {
    open();
    const u64 timeout = ConsoleRing::timeout_ms * 1000;
    const u64 begun = now;
    xen.on_yield = [this, begun] {
        if (now - begun < 20 * timeout) {
            xen.console_word(3080) ^= 1;
        }
    };
    ring.write("a line\n");
    ring.flush();
    EXPECT_GT(now - begun, 7 * timeout) << "it moves";
    EXPECT_LT(now - begun, 9 * timeout);
}

TEST_F(XenConsole, ALateReaderGetsTheEnd) {
    open();
    for (u32 i = 0; i < 100; ++i) {
        ring.write(std::string(100, 'z') + "\n");
    }
    EXPECT_NE(ring.lost(), 0u);
    xen.on_yield = [this] { xen.read_console(64); };
    ring.flush(); // before the verdict
    ring.write("@{\"record\":\"verdict\"}\n");
    ring.flush();
    EXPECT_TRUE(xen.console_text.ends_with("this console was not read]\r\n@{\"record\":\"verdict\"}\r\n"));
}

TEST_F(XenConsole, AnInvalidReadersPositionIsRejected) {
    open();
    // far out of range; ahead of the guest; more than a ring's size before it
    for (const u32 position : {0x12345678u, 0xfffffe01u, 0xfffff5ffu}) {
        xen.console_word(3080) = position;
        ring.write("x\n");
    }
    EXPECT_GT(ring.lost(), 0u);
    EXPECT_LT(now, 2 * ConsoleRing::timeout_ms * 1000);
    // A reader that keeps moving without making room.
    xen.console_word(3080) = xen.console_word(3084) - 2048;
    xen.on_yield = [this] { xen.console_word(3080) = xen.console_word(3084) + 1 + now % 100; };
    ring.flush();
    EXPECT_LT(now, 20 * ConsoleRing::timeout_ms * 1000);
}

TEST_F(XenConsole, ContinuesAtAnotherAddressAndAfterALoadersText) {
    xen.console_word(3084) += 5; // a loader's data, not read yet
    std::memcpy(xen.console_page + 1024 + 0xfffffe00 % 2048, "boot:", 5);
    open();
    ring.write("one\n");
    std::array<std::byte, 4096> elsewhere; // the same page at another address
    std::memcpy(elsewhere.data(), xen.console_page, 4096);
    alignas(8) static std::array<std::byte, 4096> aligned;
    aligned = elsewhere;
    ring.move(aligned.data());
    xen.console_page = aligned.data();
    ring.write("two\n");
    xen.read_console();
    EXPECT_EQ(xen.console_text, "boot:one\r\ntwo\r\n");
}

} // namespace
