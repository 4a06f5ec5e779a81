#include "gtest_macros.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.log;
import core.dma;
import core.time;
import io.executor;
import io.task;
import io.block;
import io.net;
import drivers.driver;
import drivers.table;
import boot.devices;
import boot.nets;
import boot.sinks;

#include "unit/io/support.hpp"

namespace {
using namespace fl;

struct Card final : io::NetDevice {
    Card(io::Executor& executor, std::string_view name) : NetDevice(executor) {
        identity_.name = FixedText<16>(name);
        identity_.driver = "fake";
        identity_.kind = io::Kind::synthetic;
        identity_.model.write("a card");
        identity_.features.write("sg checksum");
        identity_.mac = {{0, 0x16, 0x3e, 1, 2, 0xab}};
        set_open(true);
    }
    void close() { set_open(false); }
    bool start(const io::OutgoingFrame&, io::Checksum) override { return true; }
};

struct NetSinks : testing::Test {
    test::FakeMachine machine;
    io::Executor executor{machine.platform()};
    drivers::Table table;
    drivers::Plan plan = table.plan(hv::VmGuest::xen, std::nullopt);
    boot::Devices devices;
    boot::Attached attached{plan, &devices};
    boot::DriverSinks first{attached, "first"};
    boot::DriverSinks second{attached, "second"};
    test::CapturedLog log;
};

TEST_F(NetSinks, ACardAttachesOnceAndHasARecord) {
    Card eth0(executor, first.nets.free_name().view());
    Card twin(executor, "eth1");
    EXPECT_TRUE(second.nets.offered(0));
    ASSERT_TRUE(first.nets.announce(eth0, 0));
    EXPECT_TRUE(
        log.has(R"(@{"record":"net","name":"eth0","driver":"fake","kind":"synthetic","mac":"00:16:3e:01:02:ab",)"
                R"("mtu":1500,"model":"a card","features":["sg","checksum"],"queues":1})"));
    EXPECT_TRUE(log.has("eth0: synthetic network card by fake, 00:16:3e:01:02:ab, MTU 1500 [sg checksum] a card"));
    EXPECT_FALSE(second.nets.offered(0));
    EXPECT_EQ(second.nets.announce(twin, 0).error().code, Code::busy);
    EXPECT_TRUE(second.disks.offered(0)) << "disk 0 is another device";
    EXPECT_EQ(first.devices.attached(), 1u);
    EXPECT_EQ(attached.nets.all().size(), 1u);
    EXPECT_EQ(attached.nets.find("eth0"), &eth0);
    EXPECT_EQ(attached.nets.find("eth1"), nullptr);
}

TEST_F(NetSinks, NamesAreInTheOrderOfAttachmentAndThoseOfRemovedCardsAreFree) {
    EXPECT_EQ(attached.nets.names().view(), "none");
    Card eth0(executor, "eth0");
    Card eth1(executor, "eth1");
    ASSERT_TRUE(first.nets.announce(eth0, drivers::NetSink::no_twin));
    EXPECT_EQ(second.nets.free_name().view(), "eth1");
    ASSERT_TRUE(second.nets.announce(eth1, drivers::NetSink::no_twin));
    EXPECT_EQ(attached.nets.names().view(), "eth0, eth1");
    Card again(executor, "eth0");
    EXPECT_EQ(first.nets.announce(again, 3).error().code, Code::busy) << "the name is in use";
    EXPECT_TRUE(first.nets.offered(3)) << "and the number was not claimed";
    eth0.close();
    EXPECT_EQ(first.nets.free_name().view(), "eth0");
    EXPECT_EQ(attached.nets.find("eth0"), &eth0) << "closed, until another has the name";
    ASSERT_TRUE(first.nets.announce(again, 3));
    EXPECT_EQ(attached.nets.find("eth0"), &again);
    EXPECT_FALSE(second.nets.offered(3));
    first.nets.withdraw(3);
    EXPECT_TRUE(second.nets.offered(3));
}

TEST_F(NetSinks, AFullListRefusesFurtherCards) {
    std::vector<std::unique_ptr<Card>> cards;
    for (usize i = 0; i < boot::Nets::capacity; ++i) {
        cards.push_back(std::make_unique<Card>(executor, first.nets.free_name().view()));
        ASSERT_TRUE(first.nets.announce(*cards.back(), drivers::NetSink::no_twin));
    }
    Card extra(executor, "more");
    EXPECT_EQ(first.nets.announce(extra, drivers::NetSink::no_twin).error().code, Code::exhausted);
    EXPECT_EQ(first.nets.free_name().view(), "eth64");
}

// A synthetic card and its emulated twin are known by their hardware address, whichever comes first.
TEST_F(NetSinks, TwinsHaveOneNumber) {
    boot::DriverSinks synthetic{attached, "xen_net"};
    boot::DriverSinks native{attached, "e1000"};
    const io::MacAddress one{{0, 0x16, 0x3e, 1, 2, 3}};
    const io::MacAddress other{{0, 0x16, 0x3e, 1, 2, 4}};
    const u32 number = synthetic.nets.number_of(one);
    ASSERT_NE(number, drivers::no_twin);
    EXPECT_NE(native.nets.number_of(other), number);
    EXPECT_EQ(native.nets.number_of(one), number);
    EXPECT_EQ(synthetic.nets.number_of(other), native.nets.number_of(other));
    Card eth0(executor, "eth0");
    ASSERT_TRUE(synthetic.nets.announce(eth0, number));
    EXPECT_FALSE(native.nets.offered(number));
    EXPECT_TRUE(native.nets.offered(native.nets.number_of(other)));
    EXPECT_EQ(first.nets.number_of(one), drivers::no_twin) << "a driver that no rule names has no twins";
    const drivers::Plan elsewhere = table.plan(hv::VmGuest::kvm, std::nullopt);
    boot::Attached alone{elsewhere, &devices};
    boot::DriverSinks there{alone, "e1000"};
    EXPECT_EQ(there.nets.number_of(one), drivers::no_twin);
}

} // namespace
