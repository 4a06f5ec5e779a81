// Hot plug: ports of PCI Express, and QEMU's registers, as the host moves them.
#include "gtest_macros.hpp"

#include "unit/drivers/pci_fake.hpp"
import test.gtest;
import host.std;
import core.dma;
import core.interrupt;
import core.log;
import core.mmio;
import core.result;
import core.text;
import core.time;
import io.executor;
import io.task;
import io.block;
import drivers.pci;
import drivers.pci.hotplug;
#include "unit/io/support.hpp"

namespace {
using namespace fl;
using namespace pci_test;
using fl::test::FakeMachine;

/// Lines and messages; each attached handler is callable.
class Controller final : public InterruptController {
  public:
    struct Held {
        InterruptHandler handler;
        void* context;
    };
    std::optional<Held> line;
    std::optional<Held> message;
    bool full = false;
    u32 gsi = 0;

    Result<void> attach_line(InterruptLine l, InterruptHandler handler, void* context, u32) override {
        if (full) {
            return Error{Code::exhausted, "no vector is free"};
        }
        gsi = l.gsi;
        line = {handler, context};
        return {};
    }
    void detach_line(InterruptLine, InterruptHandler, void*) override { line.reset(); }
    Result<InterruptVector> attach_message(u32, InterruptHandler handler, void* context) override {
        message = {handler, context};
        return InterruptVector{0x40, 0, 0};
    }
    Result<InterruptMessage> message_for(InterruptVector) const override { return InterruptMessage{0xfee00000, 0x40}; }
    Result<InterruptVector> attach_vector(InterruptHandler, void*, bool) override {
        return Error{Code::not_supported, "not here"};
    }
    void detach_vector(InterruptVector) override { message.reset(); }
};

/// QEMU's general-purpose events at 0x620 (4 bytes of each register) and hot plug registers at 0xcc0.
class QemuPorts final : public pci::Ports {
  public:
    u8 status = 0;
    std::array<u8, 4> enable{0xff, 0xff, 0xff, 0xff};
    u16 pm1a_enable = 0xffff;
    u32 selected = 0;
    std::map<u32, u32> added;
    std::map<u32, u32> to_remove;
    u32 ejected = 0;

    u8 in8(u16 port) override {
        EXPECT_EQ(port, 0x620);
        return status;
    }
    void out8(u16 port, u8 value) override {
        if (port == 0x620) {
            status &= static_cast<u8>(~value);
        } else {
            ASSERT_GE(port, 0x624);
            ASSERT_LT(port, 0x628);
            enable[port - 0x624u] = value;
        }
    }
    void out16(u16 port, u16 value) override {
        EXPECT_EQ(port, 0x602);
        pm1a_enable = value;
    }
    u32 in32(u16 port) override {
        EXPECT_TRUE(port == 0xcc0 || port == 0xcc4) << port;
        return port == 0xcc0 ? std::exchange(added[selected], 0) : to_remove[selected];
    }
    void out32(u16 port, u32 value) override {
        ejected += port == 0xcc8 ? 1 : 0;
        EXPECT_EQ(port, 0xcd0);
        selected = value;
    }
};

struct PciHotplug : testing::Test {
    fl::test::CapturedLog log;
    FakeMachine machine;
    io::Executor executor{machine.platform()};
    Controller controller;
    Mapper mapper;
    Space space;
    QemuPorts ports;
    std::optional<pci::Hotplug> hotplug{std::in_place, executor, controller, mapper};
    std::optional<io::TaskGroup> tasks{std::in_place, executor}; // ends before it
    const pci::AcpiHotplug where{.registers = 0xcc0,
                                 .gpe_status = 0x620,
                                 .gpe_enable = 0x624,
                                 .gpe_bytes = 4,
                                 .pm1a_enable = 0x602,
                                 .sci = {.gsi = 9}};

    void turn() {
        for (int i = 0; i < 4; ++i) {
            executor.turn();
        }
    }
    /// A root port with an empty hot-pluggable slot 7, and MSI.
    Function& port(u16 capabilities = 0x0142, u32 slot = 7 << 19 | 1 << 6) {
        space.functions.clear();
        Function& f = space.add(0, 3, 0, 0x1b36, 0x000c, 0x060400);
        f.bytes[0x0e] = 1;
        f.set32(0x18, 0x00020200);
        f.add_capability(0x40, 0x10);
        f.set16(0x42, capabilities);
        f.set32(0x54, slot);
        f.writable[0x5a] = 0;
        f.cleared_by_ones[0x5a] = 0x1f;
        f.add_capability(0x80, 0x05);
        f.set16(0x82, 0x0080); // 64-bit addresses
        return f;
    }
    pci::Device device() { return *pci::look_up(space, {.bus = 0, .device = 3}); }
    void interrupt() {
        ASSERT_TRUE(controller.message);
        controller.message->handler(controller.message->context);
        turn();
    }
    /// Event 1, as QEMU raises it.
    void event() {
        ports.status |= 2;
        ASSERT_TRUE(controller.line);
        controller.line->handler(controller.line->context);
        EXPECT_EQ(ports.status & 2, 0) << "the line would not fall";
        turn();
    }
    void watch() {
        ASSERT_TRUE(tasks->spawn(hotplug->watch()));
        turn();
    }
};

TEST_F(PciHotplug, APortReportsWhatItsButtonAsksFor) {
    Function& f = port();
    f.bytes[0x5a] = 0x09; // events of before
    const auto added = hotplug->add_port(device());
    ASSERT_TRUE(added);
    EXPECT_TRUE(*added);
    EXPECT_EQ(f.get16(0x58), 0x29) << "button, presence and the interrupt are enabled";
    EXPECT_EQ(f.bytes[0x5a], 0) << "events of before are cleared";
    EXPECT_EQ(f.bytes[4] & 4, 4) << "messages need bus mastering";
    watch();
    EXPECT_EQ(hotplug->reports(), 0u);

    f.bytes[0x5a] = 0x49; // a device is plugged in: presence changed, button
    interrupt();
    EXPECT_EQ(f.bytes[0x5a], 0x40);
    EXPECT_TRUE(log.has("the host has added a device in slot 7, bus 02: not used"));
    EXPECT_TRUE(log.has("@{\"record\":\"hotplug\",\"request\":\"add\",\"place\":\"slot 7, bus 02\",\"refused\":true}"));
    f.bytes[0x5a] = 0x41; // the button of an occupied slot
    interrupt();
    EXPECT_EQ(f.bytes[0x5a], 0x40);
    EXPECT_TRUE(log.has("the host asks to remove the device in slot 7, bus 02: refused"));
    EXPECT_EQ(hotplug->reports(), 2u);
    interrupt(); // nothing is new
    EXPECT_EQ(hotplug->reports(), 2u);
    f.bytes[0x5a] = 0x08; // pulled out
    interrupt();
    EXPECT_TRUE(log.has("the host has removed the device in slot 7, bus 02: its requests end with an error"));
    EXPECT_EQ(hotplug->reports(), 2u);
    tasks.reset();
    hotplug.reset();
    EXPECT_EQ(f.get16(0x58), 0);
    EXPECT_FALSE(controller.message);
}

TEST_F(PciHotplug, OtherFunctionsAreNotTouched) {
    space.written = [](u32 at, u32, u32) { ADD_FAILURE() << "written at " << at; };
    port(0x0042); // no slot
    EXPECT_FALSE(*hotplug->add_port(device()));
    port(0x0142, 7 << 19); // not hot-pluggable
    EXPECT_FALSE(*hotplug->add_port(device()));
    port().bytes[0x0e] = 0; // an endpoint
    EXPECT_FALSE(*hotplug->add_port(device()));
    Function& line = port();
    line.bytes[0x41] = 0; // no MSI
    line.bytes[0x3d] = 1;
    EXPECT_EQ(hotplug->add_port(device()).error().code, Code::not_supported);
}

TEST_F(PciHotplug, QemusRegistersReportEachRequestOnce) {
    ASSERT_TRUE(hotplug->add_acpi(ports, where));
    EXPECT_EQ(controller.gsi, 9u);
    EXPECT_EQ(ports.enable, (std::array<u8, 4>{2, 0, 0, 0}));
    EXPECT_EQ(ports.pm1a_enable, 0);
    watch();
    ports.added[0] = 1u << 5;
    ports.added[255] = 1u << 31;
    event();
    EXPECT_TRUE(log.has("the host has added a device in slot 5, hot plug bus 0: not used"));
    EXPECT_TRUE(log.has("the host has added a device in slot 31, hot plug bus 255: not used"));
    ports.to_remove[1] = 1;
    event();
    EXPECT_TRUE(log.has("the host asks to remove the device in slot 0, hot plug bus 1: refused"));
    EXPECT_EQ(hotplug->reports(), 3u);
    ports.added[0] = 1u << 6; // the removal is still pending
    event();
    EXPECT_EQ(hotplug->reports(), 4u);
    ports.to_remove[1] = 0; // and asked for again later
    event();
    ports.to_remove[1] = 1;
    event();
    EXPECT_EQ(hotplug->reports(), 5u);
    EXPECT_EQ(ports.ejected, 0u);
}

TEST_F(PciHotplug, AnotherOwnersInterruptIsLeftAlone) {
    ASSERT_TRUE(hotplug->add_acpi(ports, where));
    watch();
    ports.status = 0x04;
    ports.added[0] = 1;
    controller.line->handler(controller.line->context);
    turn();
    EXPECT_EQ(ports.status, 0x04);
    EXPECT_EQ(hotplug->reports(), 0u);
}

TEST_F(PciHotplug, AStormIsReportedOnlySoOften) {
    ASSERT_TRUE(hotplug->add_acpi(ports, where));
    watch();
    for (int i = 0; i < 200; ++i) {
        ports.added[i] = 2;
        event();
    }
    u32 lines = 0;
    const std::string text(log.text.view());
    for (usize at = 0; (at = text.find("\"record\":\"hotplug\"", at)) != std::string::npos; ++at) {
        ++lines;
    }
    EXPECT_EQ(lines, pci::Hotplug::max_reports);
}

TEST_F(PciHotplug, WithoutALineNothingIsEnabled) {
    controller.full = true;
    EXPECT_FALSE(hotplug->add_acpi(ports, where));
    EXPECT_EQ(ports.enable[0], 0xff);
    hotplug.reset();
    EXPECT_EQ(ports.enable[0], 0xff);
}

} // namespace
