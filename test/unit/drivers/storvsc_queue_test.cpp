// A storage channel's packets, without a queue of requests, against a host that writes the rings' bytes itself.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import core.text;
import core.time;
import core.dma;
import core.log;
import io.executor;
import io.task;
import io.block;
import io.block_queue;
import hv.hyperv.hypercall;
import hv.hyperv.channel;
import drivers.storvsc.disk;

#include "unit/io/support.hpp"
// Depends on the includes above.
#include "unit/drivers/storvsc_fake.hpp"

namespace {
using namespace fl;
using namespace fl::drivers::storvsc;

class StorvscPackets : public testing::TestWithParam<Version> {
  protected:
    static constexpr usize interrupt_mask = 8; // in the host's ring [vmbus-ring]
    static constexpr usize write_index = 0;
    static constexpr usize read_index = 4;

    struct Raised final : io::Service {
        void flush() override {}
        bool drain() override { return false; }
        bool arm() override { return false; }
    };
    StorvscPackets() {
        hv::hyperv::Gate gate;
        gate.call = [](void*, u64, u64, u64) -> u64 { return 0; };
        EXPECT_TRUE(hypercalls.install(gate, memory));
        auto rings = memory.buffer(2 * fake::StorageHost::ring_size);
        host.attach(rings->data());
        host.packet_length = GetParam() >= Version::win8 ? 64 : 48;
        hv::hyperv::Channel::Signalling signalling;
        signalling.hypercalls = &hypercalls;
        EXPECT_TRUE(channel.attach({}, 0, std::move(*rings), fake::StorageHost::ring_size, signalling, events));
        lists = *memory.buffer(PacketQueue::lists_bytes);
        packets.set_terms({GetParam(), 32768});
        packets.start(lists, executor, service);
        packet.header = {Operation::execute_srb, flag_completion, 0};
    }
    ~StorvscPackets() {
        packets.stop();
        channel.detach().reset();
    }
    u32 hosts(usize at) { return fake::get32(host.in_ring() + at); }

    test::FakeMachine clock;
    io::Executor executor{clock.platform()};
    test::HeapDma memory;
    hv::hyperv::Hypercalls hypercalls;
    std::atomic<u32> events{0};
    hv::hyperv::Channel channel;
    fake::StorageHost host;
    DmaBuffer lists;
    Raised service;
    PacketQueue packets{channel};
    drivers::storvsc::Packet packet{};
    io::Counters counters;
};

TEST_P(StorvscPackets, TheHostSeesWhatWasPublished) {
    const DmaBuffer data = *memory.buffer(8192);
    EXPECT_EQ(packets.send(packet, data.span().subspan(512, 4096), 0x77), io::SendResult::sent);
    EXPECT_EQ(packets.send(packet, 0x88), io::SendResult::sent);
    EXPECT_FALSE(host.take());
    EXPECT_TRUE(packets.publish(counters));
    EXPECT_EQ(counters.notifications, 1u) << "for both";
    EXPECT_EQ(packets.take_signals(), 1u);
    EXPECT_EQ(packets.take_signals(), 0u);
    EXPECT_TRUE(host.take()); // which checks the length and the data's pages
    ASSERT_EQ(host.commands.size(), 2u);
    EXPECT_EQ(host.commands[0].id, 0x77u);
    EXPECT_EQ(host.commands[0].bytes(), 4096u);
    EXPECT_EQ(host.commands[1].id, 0x88u);
    EXPECT_TRUE(host.commands[1].data.empty());
}

TEST_P(StorvscPackets, EventsStopWithTheFirstPacketAndTheSpaceIsReturnedWithTheLast) {
    hv::hyperv::Packet taken;
    EXPECT_FALSE(*packets.arm());
    EXPECT_EQ(hosts(interrupt_mask), 0u);
    host.event(11);
    host.event(14);
    ASSERT_EQ(packets.take(taken), io::Next::one);
    EXPECT_EQ(hosts(interrupt_mask), 1u);
    EXPECT_EQ(fake::get32(taken.payload.data()), 11u);
    ASSERT_EQ(packets.take(taken), io::Next::one);
    EXPECT_EQ(fake::get32(taken.payload.data()), 14u);
    EXPECT_EQ(hosts(read_index), 0u);
    EXPECT_EQ(packets.take(taken), io::Next::none);
    EXPECT_EQ(hosts(read_index), hosts(write_index));
    host.event(11);
    EXPECT_TRUE(*packets.arm()) << "one is there";
    EXPECT_EQ(packets.take(taken), io::Next::one);
}

TEST_P(StorvscPackets, FullUntilTheHostHasTakenSome) {
    io::SendResult sent = io::SendResult::sent;
    for (u32 i = 0; i < 1000 && sent == io::SendResult::sent; ++i) {
        sent = packets.send(packet, i);
    }
    EXPECT_EQ(sent, io::SendResult::full);
    EXPECT_TRUE(packets.publish(counters));
    EXPECT_TRUE(host.take());
    EXPECT_EQ(packets.send(packet, 1), io::SendResult::sent);
}

TEST_P(StorvscPackets, APacketThatNeverFitsIsNamed) {
    constexpr u32 pages = fake::StorageHost::ring_data / sizeof(u64); // their numbers alone fill the ring
    const std::byte none{};
    const DmaSpan data{const_cast<std::byte*>(&none), 0, pages * 4096};
    EXPECT_EQ(packets.send(packet, data, 1), io::SendResult::broken);
    EXPECT_EQ(packets.fault().code, Code::exhausted);
    EXPECT_EQ(packets.fault().seen, packet_bytes(GetParam()));
}

TEST_P(StorvscPackets, ABrokenRingIsNamed) {
    fake::put32(host.in_ring() + write_index, 3); // not a multiple of 8
    hv::hyperv::Packet taken;
    EXPECT_EQ(packets.take(taken), io::Next::broken);
    EXPECT_EQ(packets.fault().code, Code::protocol);
    EXPECT_FALSE(packets.check());
    EXPECT_EQ(packets.fault().message, channel.broken()->message);
}

TEST_P(StorvscPackets, UnmapListsDoNotOverlap) {
    for (u32 slot = 0; slot < PacketQueue::max_packets; ++slot) {
        const DmaSpan list = packets.unmap_list(slot);
        EXPECT_EQ(list.size, 24u);
        EXPECT_EQ(list.bus % 8, 0u);
        EXPECT_GE(list.bus, lists.bus());
        EXPECT_LE(list.bus + list.size, lists.bus() + PacketQueue::lists_bytes);
        EXPECT_TRUE(slot == 0 || list.bus >= packets.unmap_list(slot - 1).bus + 24);
    }
}

INSTANTIATE_TEST_SUITE_P(, StorvscPackets, testing::Values(Version::win6, Version::win10),
                         [](const auto& info) { return info.param == Version::win6 ? "short" : "long"; });

} // namespace
