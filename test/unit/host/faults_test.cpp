// Every fault of the host as visible in its packets, and the integration services, by packets written from the
// protocols.
#include "gtest_macros.hpp"

#include "zeroed.hpp"

import test.gtest;
import host.std;
import core.result;
import host.vmbus;
import host.storvsp;
import host.services;

#include "guest.hpp"

namespace {

using namespace typed;
using fl::host::Fault;
using fl::host::ServerConfig;

constexpr u64 buffer = 0x100200; // not page-aligned

// ---- faults ----

TEST(HostFaults, AreParsed) {
    for (const auto& known : fl::host::fault_names) {
        const auto spec = fl::host::parse_fault(std::string(known.name) + ",after=12,count=3");
        ASSERT_TRUE(spec) << known.name;
        EXPECT_EQ(spec->fault, known.fault);
        EXPECT_EQ(spec->after, 12u);
        EXPECT_EQ(spec->count, 3u);
        EXPECT_FALSE(known.rule.empty());
    }
    EXPECT_EQ(fl::host::fault_names.size(), static_cast<usize>(Fault::duplicate_relid)); // all except none
    for (const char* text : {"", "nothing", "no-answer,", "no-answer,after", "no-answer,after=x", "no-answer,before=1",
                             "no-answer,after=1x"}) {
        EXPECT_FALSE(fl::host::parse_fault(text)) << text;
    }
}

TEST(HostFaults, NothingHappensBeforeItsTime) {
    ServerConfig config;
    config.fault = {Fault::unknown_transaction, 3, 2};
    Guest guest(config);
    Rings rings;
    const u32 channel = guest.start(rings);
    std::vector<bool> good;
    for (int i = 0; i < 7; ++i) {
        good.push_back(guest.command(channel, rings, {0, 0, 0, 0, 0, 0}).has_value());
    }
    EXPECT_EQ(good, (std::vector<bool>{true, true, true, false, false, true, true}));
    EXPECT_EQ(guest.server->faults_injected(), 2u);
}

class HostFault : public ::testing::Test {
  protected:
    /// A guest on a host that injects `fault` at the second SRB; the first one succeeds.
    Guest& start(Fault fault, u32 after = 1) {
        ServerConfig config;
        config.fault = {fault, after, 1};
        guest.emplace(config);
        channel = guest->start(rings);
        EXPECT_TRUE(guest->command(channel, rings, Guest::read_16(1, 1), 1, buffer, 512));
        guest->machine.events.clear();
        return *guest;
    }
    void request(bool write = false) {
        rings.send(9, 0xabc, Guest::srb(Guest::read_16(2, 2, write), write ? 0 : 1, 1024), Guest::range(buffer, 1024));
        guest->signal(channel);
    }
    std::optional<Guest> guest;
    Rings rings;
    u32 channel = 0;
};

TEST_F(HostFault, RingIndices) {
    start(Fault::write_index_beyond);
    request();
    EXPECT_GE(rings.write_index(true), rings.bytes(true));
    EXPECT_FALSE(guest->machine.events.empty());
    start(Fault::read_index_beyond);
    request();
    EXPECT_GE(rings.read_index(false), rings.bytes(false));
}

TEST_F(HostFault, Packets) {
    start(Fault::packet_too_long);
    request();
    EXPECT_GT(rings.receive()->length, rings.bytes(true));
    start(Fault::packet_too_short);
    request();
    EXPECT_LT(rings.receive()->length, 16);
    start(Fault::packet_offset);
    request();
    const auto offset = rings.receive();
    EXPECT_GT(offset->offset, offset->length);
    start(Fault::packet_trailer);
    request();
    const auto trailer = rings.receive();
    EXPECT_NE(trailer->trailer, trailer->at);
    start(Fault::packet_type);
    request();
    EXPECT_EQ(rings.receive()->type, 0x42);
    start(Fault::rewrite_completion);
    request();
    EXPECT_EQ(rings.receive()->length, 0xfff0 * 8 % 65536);
}

TEST_F(HostFault, Transactions) {
    start(Fault::unknown_transaction);
    request();
    EXPECT_NE(rings.receive()->transaction, 0xabcu);
    start(Fault::repeated_completion);
    request();
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    start(Fault::early_completion);
    request();
    EXPECT_EQ(rings.receive()->transaction, 0xabcu);
    EXPECT_EQ(rings.receive()->transaction, 0xabdu);
    EXPECT_FALSE(rings.receive());
    start(Fault::no_answer);
    request();
    EXPECT_FALSE(rings.receive());
    request();
    EXPECT_TRUE(rings.receive());
}

TEST_F(HostFault, Storage) {
    start(Fault::completion_too_long);
    request();
    EXPECT_EQ(Guest::parse(*rings.receive()).transferred, 1024u + 4096);
    start(Fault::short_transfer);
    request();
    const auto short_one = Guest::parse(*rings.receive());
    EXPECT_EQ(short_one.transferred, 512u);
    EXPECT_EQ(short_one.srb_status, 1);
    start(Fault::medium_error);
    request();
    const auto medium = Guest::parse(*rings.receive());
    EXPECT_EQ(medium.srb_status, 0x84);
    EXPECT_EQ(medium.sense, hex("f0 00 03 00000002 0a 00000000 11 00 00 000000"));
    start(Fault::write_protected, 0);
    request(true);
    const auto write = Guest::parse(*rings.receive());
    EXPECT_EQ(write.sense[2], 7);
    EXPECT_EQ(write.sense[12], 0x27);
    start(Fault::unit_attention);
    request();
    EXPECT_EQ(Guest::parse(*rings.receive()).sense[2], 6);
}

TEST_F(HostFault, SignalStorm) {
    start(Fault::signal_storm);
    request();
    EXPECT_TRUE(rings.receive());
    for (int i = 0; i < 1300; ++i) {
        guest->server->poll(guest->now);
    }
    EXPECT_GE(guest->machine.events.size(), 5000u);
    EXPECT_EQ(guest->server->deadline(), ~u64{0});
}

TEST_F(HostFault, RescindInFlight) {
    start(Fault::rescind_in_flight);
    request();
    EXPECT_FALSE(rings.receive());
    EXPECT_EQ(guest->take(), hex("02000000 00000000 01000000"));
    EXPECT_EQ(guest->server->on_signal(0x2001, 0), fl::host::HvStatus::success); // the guest may not know yet
    guest->poll();
    Bytes released = message(13);
    put(released, u32{1});
    guest->post(released);
    EXPECT_EQ(guest->violations(), 0u);
}

TEST(HostFaults, OfMessages) {
    const auto with = [](Fault fault, u32 after = 0) {
        ServerConfig config;
        config.fault = {fault, after, 1};
        return config;
    };
    {
        Guest guest(with(Fault::no_version_response));
        EXPECT_FALSE(guest.connect());
        EXPECT_TRUE(guest.connect());
    }
    {
        Guest guest(with(Fault::refuse_versions));
        for (const u32 version : {0x00050003u, 0x00040000u, 0x0000000du}) {
            EXPECT_FALSE(guest.connect(version));
        }
    }
    {
        Guest guest(with(Fault::refuse_new_versions));
        EXPECT_FALSE(guest.connect(0x00040000));
        EXPECT_TRUE(guest.connect(0x00030000));
    }
    for (const Fault fault :
         {Fault::refuse_gpadl, Fault::no_gpadl_created, Fault::refuse_open, Fault::no_open_result}) {
        Guest guest(with(fault));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        Rings rings;
        EXPECT_FALSE(guest.open(1, rings));
        EXPECT_EQ(guest.violations(), 0u);
        EXPECT_EQ(guest.server->faults_injected(), 1u);
    }
    {
        Guest guest(with(Fault::rescind_at_open));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        ASSERT_EQ(guest.share(1, 0x10, {16, 17, 18, 19}), 0u);
        guest.post(Guest::open_message(1, 0x10, 2));
        EXPECT_EQ(guest.take(), hex("02000000 00000000 01000000"));
        EXPECT_TRUE(guest.machine.messages.empty());
    }
    {
        Guest guest(with(Fault::duplicate_relid));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        const auto offers = guest.request_offers();
        ASSERT_EQ(offers.size(), 2u);
        EXPECT_EQ(Guest::relid(offers[0]), Guest::relid(offers[1]));
        EXPECT_NE(offers[0], offers[1]);
    }
    {
        Guest guest(with(Fault::unknown_message, 1));
        ASSERT_TRUE(guest.connect());
        guest.post(message(3));
        EXPECT_EQ(get<u32>(guest.take(), 0), 99u);
        EXPECT_EQ(get<u32>(guest.take(), 0), 4u);
    }
    {
        Guest guest(with(Fault::short_message));
        guest.post(Guest::contact_message(0x00050003));
        EXPECT_EQ(guest.take().size(), 8u);
    }
    for (const Fault fault : {Fault::no_storage_version, Fault::refuse_storage_versions}) {
        Guest guest(with(fault));
        guest.add_disk();
        ASSERT_TRUE(guest.connect());
        guest.request_offers();
        guest.take();
        Rings rings;
        ASSERT_TRUE(guest.open(1, rings));
        ASSERT_EQ(guest.operation(1, rings, 7), 0u);
        EXPECT_NE(guest.operation(1, rings, 9, {0x00, 0x06}), std::optional<u32>(0));
    }
}

// ---- services ----

class HostServices : public ::testing::Test {
  protected:
    /// Opens the only channel and replies to the negotiation with framework 3.0 and `version`.
    void start(u16 major, u16 minor) {
        ASSERT_TRUE(guest.connect());
        ASSERT_EQ(guest.request_offers().size(), 1u);
        guest.take();
        ASSERT_TRUE(guest.open(1, rings));
        const auto asked = rings.receive();
        ASSERT_TRUE(asked);
        EXPECT_EQ(asked->type, 6);
        EXPECT_EQ(get<u32>(asked->payload, 0), 1u);
        EXPECT_EQ(get<u16>(asked->payload, 12), 0); // negotiate
        EXPECT_EQ(asked->payload[25], 3);           // transaction, request
        EXPECT_EQ(Bytes(asked->payload.begin() + 28, asked->payload.begin() + 30), hex("0200"));
        EXPECT_EQ(Bytes(asked->payload.begin() + 36, asked->payload.begin() + 44), hex("0100 0000 0300 0000"));
        Bytes body = hex("0100 0100 00000000 0300 0000");
        put(body, major);
        put(body, minor);
        answer(0, body);
    }
    void answer(u16 type, const Bytes& body, u32 status = 0) {
        Bytes payload;
        put(payload, u32{1});
        put(payload, static_cast<u32>(20 + body.size()));
        payload.resize(12);
        put(payload, type);
        put(payload, u32{3});
        put(payload, static_cast<u16>(body.size()));
        put(payload, status);
        payload.insert(payload.end(), {0, 5, 0, 0}); // transaction, response
        payload.insert(payload.end(), body.begin(), body.end());
        rings.send(6, 0, payload, {}, 0);
        guest.signal(1);
    }
    Guest guest;
    Rings rings;
};

TEST_F(HostServices, Shutdown) {
    auto& shutdown = guest.server->add(std::make_unique<fl::host::ShutdownService>());
    shutdown.request_shutdown(); // before the negotiation
    start(3, 2);
    EXPECT_EQ(shutdown.versions().message, 0x00030002u);
    const auto asked = rings.receive();
    ASSERT_TRUE(asked);
    EXPECT_EQ(get<u32>(asked->payload, 4), 20u + 12 + 2048);
    EXPECT_EQ(get<u16>(asked->payload, 12), 3);
    EXPECT_EQ(Bytes(asked->payload.begin() + 28, asked->payload.begin() + 40), hex("00000080 00000000 00000000"));
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::requested);
    answer(3, Bytes(asked->payload.begin() + 28, asked->payload.begin() + 40));
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::accepted);
    shutdown.request_shutdown(true);
    guest.poll();
    EXPECT_EQ(get<u32>(rings.receive()->payload, 36), 2u); // restart
    answer(3, {}, 0x80004005);
    EXPECT_EQ(shutdown.state(), fl::host::ShutdownState::refused);
    EXPECT_EQ(guest.violations(), 0u);
}

TEST_F(HostServices, Heartbeat) {
    auto& heartbeat = guest.server->add(std::make_unique<fl::host::HeartbeatService>());
    start(3, 0);
    for (u64 beat = 0; beat < 3; ++beat) {
        const auto asked = rings.receive();
        ASSERT_TRUE(asked);
        EXPECT_EQ(get<u16>(asked->payload, 12), 1);
        Bytes body;
        put(body, get<u64>(asked->payload, 28) + 1);
        answer(1, body);
        EXPECT_FALSE(rings.receive());
        EXPECT_EQ(guest.server->deadline(), guest.now + 2000000000);
        guest.now = guest.server->deadline();
        guest.poll();
    }
    EXPECT_EQ(heartbeat.answers(), 3u);
    EXPECT_EQ(guest.violations(), 0u);
    rings.receive();
    answer(1, Bytes(8));
    EXPECT_TRUE(guest.machine.logged("the sequence number is not one more"));
    answer(1, Bytes(8));
    EXPECT_TRUE(guest.machine.logged("an answer of an unexpected type"));
}

TEST_F(HostServices, TimeSync) {
    guest.server->add(
        std::make_unique<fl::host::TimeSyncService>([] { return u64{0x1122334455667788}; }, [] { return u64{77}; }));
    start(4, 0);
    const auto first = rings.receive();
    ASSERT_TRUE(first);
    EXPECT_EQ(Bytes(first->payload.begin() + 28, first->payload.begin() + 45),
              hex("8877665544332211 4d00000000000000 01"));
    answer(4, {});
    guest.now += 30000000000;
    guest.poll();
    EXPECT_EQ(rings.receive()->payload[44], 2); // a sample
    EXPECT_EQ(guest.violations(), 0u);
}

TEST_F(HostServices, VersionsThatWereNotOffered) {
    auto& shutdown = guest.server->add(std::make_unique<fl::host::ShutdownService>());
    start(9, 9);
    EXPECT_EQ(shutdown.versions().framework, 0u);
    EXPECT_TRUE(guest.machine.logged("the negotiation was answered with"));
    shutdown.request_shutdown();
    guest.poll();
    EXPECT_FALSE(rings.receive());
}

} // namespace
