#include "gtest_macros.hpp"
import test.gtest;
import host.std;
import core.result;
import core.dma;
import io.ring;
import io.ring.hostile;
import hv.hyperv.packets;

namespace {
using namespace fl;
using namespace fl::hv::hyperv;
using io::HostileMemory;

struct Ring {
    std::vector<u64> words;
    HostileMemory::State state;
    explicit Ring(usize data = 4096) : words((4096 + data) / 8) {
        state.storage = std::as_writable_bytes(std::span(words));
        HostileMemory memory(state);
        initialise_ring(memory);
    }
    HostileMemory memory() { return HostileMemory(state); }
    u32 word(usize at) const {
        u32 value;
        std::memcpy(&value, state.storage.data() + at, 4);
        return value;
    }
    void set(usize at, u32 value) { state.poke(at, value); }
    void bytes(usize at, std::initializer_list<u16> header) {
        for (const u16 half : header) {
            state.poke(4096 + at, half);
            at += 2;
        }
    }
};

std::array<std::byte, 256> buffer;

TEST(Packets, RingsAreWholePages) {
    Ring ring;
    EXPECT_TRUE(PacketSender<HostileMemory>::create(ring.memory()));
    std::vector<u64> odd((4096 + 100) / 8);
    HostileMemory::State state{std::as_writable_bytes(std::span(odd))};
    EXPECT_FALSE(PacketSender<HostileMemory>::create(HostileMemory(state)));
    EXPECT_FALSE(PacketReceiver<HostileMemory>::create(HostileMemory(state), buffer));
}

TEST(Packets, GpaDirectIsAsTheProtocolHasIt) {
    Ring ring;
    auto sender = *PacketSender<HostileMemory>::create(ring.memory());
    const std::array<u64, 2> frames{0x1234, 0x9876};
    const std::array<PageRange, 1> ranges{PageRange{0x1800, 0x400, frames}};
    const std::array<std::byte, 8> payload{std::byte{0x5a}};
    ASSERT_EQ(sender.gpa_direct(payload, ranges, 0x77, true), Sent::queued);
    ASSERT_TRUE(sender.publish());
    const std::array<u64, 8> expected{// type 9, header of 6 units, 7 in all, wants a completion; transaction
                                      0x0001'0007'0006'0009,
                                      0x77,
                                      0x00000001'00000000, // reserved, one range
                                      0x00000400'00001800, // bytes, offset
                                      0x1234,
                                      0x9876,
                                      0x5a,
                                      0};
    EXPECT_EQ(std::memcmp(ring.state.storage.data() + 4096, expected.data(), 64), 0);
    EXPECT_EQ(ring.word(0), 64u);
    // The same packet for the same consecutive pages.
    Ring second;
    auto direct = *PacketSender<HostileMemory>::create(second.memory());
    DmaSpan span{nullptr, 0x1234400, 0x1800};
    ASSERT_EQ(direct.gpa_direct(std::span<const std::byte>(payload), span, 0x77, true), Sent::queued);
    ASSERT_TRUE(direct.publish());
    EXPECT_EQ(std::memcmp(second.state.storage.data() + 4096, expected.data(), 32), 0);
    const std::array<u64, 2> in_a_row{0x1234, 0x1235};
    EXPECT_EQ(std::memcmp(second.state.storage.data() + 4096 + 32, in_a_row.data(), 16), 0);
}

TEST(Packets, TheHostsReadIndexIsCheckedBeforePublishing) {
    for (const u32 read : {96u, 4096u, 0xfffffff8u}) { // not published yet, outside the ring, far outside it
        Ring ring;
        auto sender = *PacketSender<HostileMemory>::create(ring.memory());
        const std::array<std::byte, 8> payload{};
        ASSERT_EQ(sender.inband(payload, 1, false), Sent::queued);
        ASSERT_TRUE(sender.publish());
        ring.set(4, 32); // all of it was read
        ASSERT_EQ(sender.inband(payload, 2, false), Sent::queued);
        ASSERT_TRUE(sender.publish());
        ring.set(4, read);
        ASSERT_EQ(sender.inband(payload, 3, false), Sent::queued);
        EXPECT_FALSE(sender.publish()) << read;
        EXPECT_EQ(ring.word(0), 64u) << "shown to no one";
        ASSERT_TRUE(sender.error());
        EXPECT_EQ(sender.error()->code, Code::protocol);
        EXPECT_NE(sender.error()->message.find("read index"), std::string_view::npos);
        ring.set(4, 64);
        EXPECT_EQ(sender.inband(payload, 4, false), Sent::broken) << "a good one afterwards does not help";
        EXPECT_FALSE(sender.publish());
    }
}

struct Broken {
    const char* what;
    u32 write;
    std::array<u16, 4> header; // type, header units, total units, flags
};
class Rules : public testing::TestWithParam<Broken> {};

TEST_P(Rules, ABrokenPacketBreaksTheRingForGood) {
    Ring ring;
    auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
    ring.bytes(0, {GetParam().header[0], GetParam().header[1], GetParam().header[2], GetParam().header[3]});
    ring.set(0, GetParam().write);
    Packet packet;
    const auto got = receiver.receive(packet);
    ASSERT_FALSE(got) << GetParam().what;
    EXPECT_EQ(got.error().code, Code::protocol);
    EXPECT_NE(got.error().message.find(GetParam().what), std::string_view::npos) << got.error().message;
    // Later valid ones do not repair it.
    ring.bytes(0, {6, 2, 2, 0});
    ring.set(0, 24);
    EXPECT_FALSE(receiver.receive(packet));
    EXPECT_FALSE(receiver.arm());
    EXPECT_TRUE(receiver.error());
}
INSTANTIATE_TEST_SUITE_P(Packets, Rules,
                         testing::Values(Broken{"outside of the ring", 4096, {6, 2, 2, 0}},
                                         Broken{"outside of the ring", 0xfffffff8, {6, 2, 2, 0}},
                                         Broken{"no multiple of 8", 25, {6, 2, 2, 0}},
                                         Broken{"fewer bytes", 16, {6, 2, 2, 0}},
                                         Broken{"shorter than a descriptor", 32, {6, 1, 3, 0}},
                                         Broken{"shorter than a descriptor", 32, {6, 0, 0, 0}},
                                         Broken{"shorter than its header", 32, {6, 3, 2, 0}},
                                         Broken{"longer than the data in the ring", 32, {6, 2, 4, 0}},
                                         Broken{"longer than the data in the ring", 32, {6, 2, 0xffff, 0}},
                                         Broken{"longer than this channel accepts", 4088, {6, 2, 500, 0}}),
                         [](const auto& info) {
                             std::string name = info.param.what;
                             std::replace(name.begin(), name.end(), ' ', '_');
                             return name + "_" + std::to_string(info.index);
                         });

TEST(Packets, ATrailerIsIgnored) {
    Ring ring;
    auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
    ring.bytes(0, {6, 2, 2, 0});
    ring.state.poke<u32>(4096 + 20, 0x1000); // the packet starts at 0, but its trailer contains 0x1000
    ring.set(0, 24);
    Packet packet;
    const auto got = receiver.receive(packet);
    ASSERT_TRUE(got && *got);
    EXPECT_FALSE(*receiver.receive(packet));
}

TEST(Packets, AnIndexThatGoesBackBreaksTheRing) {
    Ring ring;
    auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
    ring.bytes(0, {6, 2, 2, 0});
    ring.bytes(24, {6, 2, 2, 0});
    ring.set(0, 48);
    Packet packet;
    ASSERT_TRUE(*receiver.receive(packet));
    ASSERT_TRUE(*receiver.receive(packet));
    ASSERT_FALSE(*receiver.receive(packet));
    ring.set(0, 24); // 4072 bytes ahead: fits the ring, but there is no packet
    const auto got = receiver.receive(packet);
    EXPECT_FALSE(got);
}

TEST(Packets, AHostThatDoesNotWaitForRoomBreaksTheRing) {
    for (const bool released : {true, false}) {
        Ring ring;
        auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
        Packet packet;
        u32 taken = 0;
        for (u32 i = 0; i < 30; ++i) { // 280 bytes each: the fifteenth does not fit
            const u32 at = i * 280 % 4096;
            ring.bytes(at, {6, 2, 34, 0});
            ring.set(0, (at + 280) % 4096);
            const auto got = receiver.receive(packet);
            if (!got) {
                EXPECT_NE(got.error().message.find("were not released"), std::string_view::npos);
                break;
            }
            ASSERT_TRUE(*got);
            ++taken;
            if (released) {
                static_cast<void>(receiver.release());
            }
        }
        EXPECT_EQ(taken, released ? 30u : 14u);
        EXPECT_EQ(static_cast<bool>(receiver.error()), !released);
    }
}

TEST(Packets, WhatWasCheckedIsWhatIsUsed) {
    // The host changes the descriptor at every read: one copy is taken, and its lengths are used.
    Ring ring;
    auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
    ring.bytes(0, {6, 2, 3, 0});
    ring.set(0, 32);
    ring.state.before_read = [](void*, HostileMemory::State& state, usize offset, usize) {
        if (offset <= 4096) {
            return; // until the descriptor has been read
        }
        state.poke<u16>(4096 + 4, 0xffff);
        state.poke<u16>(4096 + 2, 0xffff);
    };
    Packet packet;
    auto got = receiver.receive(packet);
    ASSERT_TRUE(got && *got);
    EXPECT_EQ(packet.payload.size(), 8u);
    EXPECT_EQ(ring.word(4096 + 4) & 0xffff, 0xffffu) << "it was changed, and not read";
}

TEST(Packets, RandomMemoryNeverLeavesItsBounds) {
    std::mt19937 random(1);
    for (u32 round = 0; round < 3000; ++round) {
        Ring ring;
        std::vector<std::byte> heap(64 + round % 200); // so that ASan detects an overrun by one byte
        auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), heap);
        auto sender = *PacketSender<HostileMemory>::create(ring.memory());
        static std::mt19937* source;
        source = &random;
        ring.state.before_read = [](void*, HostileMemory::State& state, usize offset, usize count) {
            for (usize at = offset; at + 4 <= offset + count; at += 4) {
                const u32 kind = (*source)() % 8;
                state.poke<u32>(at, kind == 0  ? (*source)()
                                    : kind < 5 ? (*source)() % 4200 & ~7u
                                               : 0x00030002u + (*source)() % 5);
            }
        };
        Packet packet;
        for (u32 i = 0; i < 20; ++i) {
            const auto got = receiver.receive(packet);
            if (!got) {
                EXPECT_EQ(got.error().code, Code::protocol);
                break;
            }
            if (*got) {
                EXPECT_LE(packet.header.size() + packet.payload.size(), heap.size());
                volatile u8 sum = 0;
                for (const std::byte byte : packet.payload) {
                    sum = static_cast<u8>(sum + static_cast<u8>(byte));
                }
            }
            static_cast<void>(receiver.release());
            static_cast<void>(receiver.arm());
            static_cast<void>(sender.inband(std::span<const std::byte>(buffer).first(random() % 200), i, true));
            static_cast<void>(sender.publish());
        }
    }
}

TEST(Packets, ThousandsOfThemAroundTheEnd) {
    Ring ring(8192);
    auto sender = *PacketSender<HostileMemory>::create(ring.memory());
    auto receiver = *PacketReceiver<HostileMemory>::create(ring.memory(), buffer);
    std::mt19937 random(2);
    u64 sent = 0;
    u64 got = 0;
    while (got < 20000) {
        for (u32 n = random() % 40; n != 0; --n) {
            std::array<std::byte, 200> payload{};
            const usize size = random() % 200;
            for (usize i = 0; i < size; ++i) {
                payload[i] = static_cast<std::byte>(sent + i);
            }
            if (sender.inband(std::span<const std::byte>(payload).first(size), sent, (sent & 1) != 0) != Sent::queued) {
                break;
            }
            ++sent;
        }
        static_cast<void>(sender.publish());
        Packet packet;
        for (u32 n = random() % 40; n != 0; --n) {
            const auto one = receiver.receive(packet);
            ASSERT_TRUE(one);
            if (!*one) {
                break;
            }
            ASSERT_EQ(packet.transaction, got);
            ASSERT_EQ(packet.wants_completion, (got & 1) != 0);
            ASSERT_EQ(packet.payload.size() % 8, 0u);
            if (!packet.payload.empty()) {
                ASSERT_EQ(packet.payload[0], static_cast<std::byte>(got));
            }
            ++got;
        }
        static_cast<void>(receiver.release());
    }
}

} // namespace
